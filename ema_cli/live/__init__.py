"""Following a live training run."""
