"""What is computed: the only room that imports flax.linen."""
