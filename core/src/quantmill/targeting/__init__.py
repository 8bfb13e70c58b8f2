"""Targeting: which modules of a model are quantized, by which method, and why."""

from __future__ import annotations

from quantmill.targeting.types import Decision, ModuleInfo, ParameterInfo, Rule, Target, targets_of

__all__ = ["Decision", "ModuleInfo", "ParameterInfo", "Rule", "Target", "targets_of"]
