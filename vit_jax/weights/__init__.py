"""Trained models, foreign checkpoint formats, and adapting checkpoints to other models."""
