"""Whole folds beside each other: seconds, peak memory, and the time of each part."""
