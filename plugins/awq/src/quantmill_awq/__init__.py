"""AWQ for quantmill: weights scaled by what their inputs are worth, then rounded."""

__version__ = "0.1.0"
