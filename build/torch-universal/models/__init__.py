"""The models whose triangle multiplications these kernels replace."""
