"""From a folder of images to a tested classifier."""
