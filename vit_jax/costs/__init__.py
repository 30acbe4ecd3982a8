"""FLOPs, memory, time and price of a training step, also for devices that aren't attached."""
