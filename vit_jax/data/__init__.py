"""What goes in: sources, decoding, augmentation, and the order of examples."""
