"""Folds with ESMFold2, with the kernel and without it."""
