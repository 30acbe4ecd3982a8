"""Training: the step, the optimizer, the loop, checkpoints and metrics."""
