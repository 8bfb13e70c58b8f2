"""What the plugins of a process registered, to be asked by name and by kind."""

from __future__ import annotations

from typing import Any, Final

from quantmill.registrations import (
    CodecRegistration,
    ConfigReader,
    Container,
    Finalizer,
    Kernel,
    Method,
    ModelSource,
    Preset,
    TargetingRule,
    Validator,
)

__all__ = ["REGISTRIES", "Registry", "check_kind"]

REGISTRIES: Final = {
    "methods": "quantmill_methods",
    "dialects": "quantmill_dialects",
    "codecs": "quantmill_codecs",
    "kernels": "quantmill_kernels",
    "model_sources": "quantmill_model_sources",
    "containers": "quantmill_containers",
    "validators": "quantmill_validators",
    "targeting_rules": "quantmill_targeting_rules",
    "finalizers": "quantmill_finalizers",
}
"""Kinds of registrations, and the hook that gives each."""

_KINDS: Final[dict[str, type]] = {
    "methods": Method,
    "dialects": ConfigReader,
    "codecs": CodecRegistration,
    "kernels": Kernel,
    "model_sources": ModelSource,
    "containers": Container,
    "validators": Validator,
    "targeting_rules": TargetingRule,
    "finalizers": Finalizer,
}


def check_kind(kind: str, hook: str, items: list[Any]) -> None:
    """Raise TypeError for what is no registration of its kind."""
    wanted = _KINDS[kind]
    for item in items:
        if not isinstance(item, wanted):
            raise TypeError(f"{hook} gave {type(item).__name__}, and gives {wanted.__name__}")


class Registry:
    """Registrations of all plugins, in the order in which they came."""

    def __init__(self) -> None:
        self._registered: dict[str, list[tuple[str, Any]]] = {kind: [] for kind in REGISTRIES}

    def claimed(self, kind: str, item: Any) -> tuple[str, str] | None:
        """The plugin that has a name of ``item`` already, and that name."""
        names = _claimed_names(item)
        for plugin, other in self._registered[kind]:
            both = names & _claimed_names(other)
            if both:
                return plugin, min(both)
        return None

    def registered(self, kind: str) -> list[tuple[str, Any]]:
        """``(plugin name, registration)`` for a kind of :data:`REGISTRIES`."""
        return list(self._registered[kind])

    @property
    def methods(self) -> dict[str, Method]:
        """Registered methods by name."""
        return {item.name: item for _, item in self._registered["methods"]}

    @property
    def presets(self) -> dict[str, tuple[Method, Preset]]:
        """Short names, with the method and options each stands for."""
        return {
            preset.name: (method, preset)
            for method in self.methods.values()
            for preset in method.presets
        }

    @property
    def dialects(self) -> list[ConfigReader]:
        """Registered configuration dialects."""
        return [item for _, item in self._registered["dialects"]]

    @property
    def codecs(self) -> dict[str, CodecRegistration]:
        """Registered codecs by name."""
        return {item.name: item for _, item in self._registered["codecs"]}

    @property
    def kernels(self) -> list[Kernel]:
        """Registered kernels."""
        return [item for _, item in self._registered["kernels"]]

    @property
    def model_sources(self) -> list[ModelSource]:
        """Registered model sources, the one to ask first first."""
        sources: list[ModelSource] = [item for _, item in self._registered["model_sources"]]
        return sorted(sources, key=lambda item: -item.priority)

    @property
    def containers(self) -> list[Container]:
        """Registered single-file formats."""
        return [item for _, item in self._registered["containers"]]

    @property
    def validators(self) -> list[Validator]:
        """Registered validators."""
        return [item for _, item in self._registered["validators"]]

    @property
    def targeting_rules(self) -> list[tuple[str, TargetingRule]]:
        """Registered targeting rules with the plugin each comes from."""
        return list(self._registered["targeting_rules"])

    @property
    def finalizers(self) -> list[Finalizer]:
        """Registered finalizers."""
        return [item for _, item in self._registered["finalizers"]]

    def plugin_of(self, kind: str, name: str) -> str | None:
        """Name of the plugin that registered ``name``."""
        for plugin, item in self._registered[kind]:
            if name in _claimed_names(item):
                return plugin
        return None


def _claimed_names(item: Any) -> set[str]:
    names = {item.name, *getattr(item, "aliases", ())}
    return names | {preset.name for preset in getattr(item, "presets", ())}
