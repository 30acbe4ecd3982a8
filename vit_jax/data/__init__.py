"""Input data: sources, decoding, augmentation, and the order of examples."""
