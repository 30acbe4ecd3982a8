"""Claims about speed: one script each, results beside them."""
