"""A search for launch settings on a GPU."""
