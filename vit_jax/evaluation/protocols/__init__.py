"""Evaluation protocols, one per file; see `evaluation.registry`."""
