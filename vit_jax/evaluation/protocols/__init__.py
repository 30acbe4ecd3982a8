"""One evaluation protocol a file: its `Config` and `make`. `evaluation.registry` finds them."""
