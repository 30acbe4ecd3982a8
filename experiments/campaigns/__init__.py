"""Campaigns of faults: commands killed, files damaged, images that cost memory; see README.md."""
