"""Checks that any backend passes: what it declares is true and what it writes is what it read."""

from __future__ import annotations

from quantmill.testing.base import MatrixSource, make_target
from quantmill.testing.checkpoints import CheckpointPromises
from quantmill.testing.configuration import ConfigurationPromises
from quantmill.testing.forms import FormPromises
from quantmill.testing.linears import LinearPromises
from quantmill.testing.models import ModelPromises
from quantmill.testing.plain import PlainPromises
from quantmill.testing.registration import RegistrationPromises

__all__ = ["MatrixSource", "MethodConformance", "make_target"]


class MethodConformance(
    RegistrationPromises,
    ConfigurationPromises,
    FormPromises,
    LinearPromises,
    CheckpointPromises,
    PlainPromises,
    ModelPromises,
):
    """Subclass with ``method`` set; each test is one promise of the contract, in its name.

    What a method does not declare is skipped. Tests with live models are skipped where no
    framework is installed. Tolerances and shapes are attributes of
    :class:`quantmill.testing.base.Conformance`.
    """
