"""Other people's checkpoints, and fitting a checkpoint to another task."""
