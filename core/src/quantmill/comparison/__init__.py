"""Two checkpoints of one model, weight by weight and by what they compute."""
