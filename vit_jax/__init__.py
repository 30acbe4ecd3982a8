"""Vision Transformers in JAX: pretrain at scale, transfer to small data, redraw the paper's plots."""
