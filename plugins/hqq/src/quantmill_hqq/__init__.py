"""HQQ for quantmill: affine groups with float zero points, optimised without data."""

__version__ = "0.1.0"
