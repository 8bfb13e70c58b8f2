"""Mixed precision under a budget: sensitivity of every target, allocation, one checkpoint."""
