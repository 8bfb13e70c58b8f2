"""quantmill for Hugging Face Diffusers."""

from quantmill_diffusers.activation import (
    Activation,
    activate,
    activated,
    active,
    deactivate,
)

__version__ = "0.1.0"
__all__ = ["Activation", "activate", "activated", "active", "deactivate"]
