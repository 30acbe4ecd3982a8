"""Attention maps, filters and position embeddings, computed and drawn."""
