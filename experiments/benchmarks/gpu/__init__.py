"""Measures training on one NVIDIA GPU; see `__main__`."""
