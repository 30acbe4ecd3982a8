"""Vision Transformers in JAX: pretraining at scale, transfer, and the paper's scaling plots."""
