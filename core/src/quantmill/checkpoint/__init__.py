"""Checkpoints: sources, headers, streaming reader, atomic writer, manifest."""
