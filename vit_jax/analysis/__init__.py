"""What it costs and what it sees."""
