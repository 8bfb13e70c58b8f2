"""Integrity of a checkpoint, without a model: every tensor is read and looked at."""
