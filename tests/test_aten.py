"""Where PeakBytes was: here for the files that take it from here still."""

from peak_bytes import PeakBytes  # noqa: F401
