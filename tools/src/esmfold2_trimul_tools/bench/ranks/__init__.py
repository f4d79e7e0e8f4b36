"""The benchmark of a pair tensor over many ranks."""
