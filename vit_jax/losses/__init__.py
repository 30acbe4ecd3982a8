"""Losses and their targets, for training and for evaluation."""
