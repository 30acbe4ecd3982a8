"""Evaluation protocols and their registry, calibration and intervals."""
