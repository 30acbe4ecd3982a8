"""Benchmarks: a script for each claim about speed; results are in `results/`."""
