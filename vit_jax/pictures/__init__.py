"""What a model looks at, and how to draw it."""
