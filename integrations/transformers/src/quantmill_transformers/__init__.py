"""quantmill for Hugging Face Transformers."""

from quantmill_transformers.activation import (
    Activation,
    activate,
    activated,
    active,
    deactivate,
)

__version__ = "0.1.0"
__all__ = ["Activation", "activate", "activated", "active", "deactivate"]
