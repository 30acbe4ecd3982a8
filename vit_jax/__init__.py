"""Vision Transformers in JAX: pretrain on accelerator meshes, transfer to small datasets, reproduce the paper's plots."""
