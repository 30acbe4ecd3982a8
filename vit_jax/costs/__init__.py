"""What a step takes: FLOPs, memory, time and price, on devices that are here or not."""
