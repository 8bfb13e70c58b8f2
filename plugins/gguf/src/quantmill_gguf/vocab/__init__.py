"""Tokenizers: out of a file's metadata, and out of a folder's files into metadata."""
