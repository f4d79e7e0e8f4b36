"""The parts that every Triton kernel here is made of: tiles, launches and settings."""
