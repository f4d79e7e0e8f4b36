"""The benchmark of the kernel and its rivals: shapes, measurements and reports."""
