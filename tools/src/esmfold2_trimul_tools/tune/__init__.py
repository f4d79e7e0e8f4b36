"""A search for launch settings on a GPU: candidates, the search among them, the table it makes."""
