"""Promises about what a plugin registers."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

from quantmill.backend import BlockCalibrator, Codec, LinearFactory, Quantizer
from quantmill.config import MethodConfig
from quantmill.host import REGISTRIES, Host, Status
from quantmill.job import Job, Selection
from quantmill.registrations import Capabilities, resolve
from quantmill.targeting.types import TARGET_KINDS
from quantmill.testing.base import Conformance

__all__ = ["RegistrationPromises"]

HEAVY = ("torch", "pydantic", "transformers", "bitsandbytes", "torchao", "numpy")
_REFERENCES = ("codec", "rules", "accepts", "check", "finalize", "open", "read", "tokenizer")


def _of(host: Host, plugin: str, kind: str) -> list[Any]:
    return [item for owner, item in host.registered(kind) if owner == plugin]


class RegistrationPromises(Conformance):
    """The plugin is found, is cheap to ask, and names things that exist."""

    def test_the_plugin_is_ok(self, host: Host, selection: Selection) -> None:
        assert host.plugins[selection.plugin].status is Status.OK

    def test_registration_imports_nothing_heavy(self, host: Host, selection: Selection) -> None:
        entry = host.plugins[selection.plugin].entry.partition(":")[0]
        code = f"import sys, {entry}; print([name for name in {HEAVY!r} if name in sys.modules])"
        done = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True, check=True
        )
        assert done.stdout.strip() == "[]"

    def test_registering_again_gives_the_same_data(self, host: Host, selection: Selection) -> None:
        module = host.plugins[selection.plugin].module
        for kind, hook in REGISTRIES.items():
            implementation = getattr(module, hook, None)
            again = list(implementation() or ()) if implementation is not None else []
            assert again == _of(host, selection.plugin, kind), hook

    def test_every_import_string_resolves(self, host: Host, job: Job, selection: Selection) -> None:
        for kind in REGISTRIES:
            for item in _of(host, selection.plugin, kind):
                if kind not in ("methods", "kernels"):
                    for name in _REFERENCES:
                        if isinstance(getattr(item, name, None), str):
                            resolve(getattr(item, name))
        for kernel in _of(host, selection.plugin, "kernels"):
            # What can't run on this machine need not import on it either.
            if job.kernels.unavailable(kernel) is None:
                for reference in (kernel.implementation, kernel.prepare, kernel.restore):
                    if reference is not None:
                        resolve(reference)

    def test_classes_are_those_of_the_contract(self, selection: Selection) -> None:
        method = selection.method
        assert issubclass(resolve(method.config), MethodConfig)
        assert issubclass(resolve(method.quantizer), Quantizer)
        codec = resolve(method.codec)
        assert issubclass(codec, Codec)
        assert codec.suffixes and all(isinstance(name, str) for name in codec.suffixes)
        assert method.capabilities.calibrated == (method.calibrator is not None)
        if method.calibrator is not None:
            assert issubclass(resolve(method.calibrator), BlockCalibrator)
        if method.linear is not None:
            assert issubclass(resolve(method.linear), LinearFactory)

    def test_every_short_name_has_a_valid_config_and_a_summary(self, selection: Selection) -> None:
        config_class = resolve(selection.method.config)
        for preset in selection.method.presets:
            config_class.from_user(preset.options)
            assert preset.summary and preset.bits > 0, preset.name
        assert selection.method.summary

    def test_it_declares_some_way_in_and_the_cpu(self, able: Capabilities) -> None:
        assert able.on_the_fly or able.calibrated or able.prequantized
        assert "cpu" in able.devices, "every method loads, runs and saves on a CPU"
        assert able.prequantized or not able.serialisable, "what is written can be loaded"

    def test_declared_kinds_exist(self, able: Capabilities) -> None:
        assert able.target_kinds and set(able.target_kinds) <= set(TARGET_KINDS)
