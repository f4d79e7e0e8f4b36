"""The kernel beside its rivals: what is measured, how, and what is reported."""
