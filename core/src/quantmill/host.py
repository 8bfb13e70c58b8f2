"""The plugin host: finds plugins, keeps each in isolation, says what became of it.

Discovery reads entry points of the group ``quantmill.plugins`` from installed metadata. For each
plugin, in this order and stopping at the first failure:

1. the disable and allow lists (arguments, then ``QUANTMILL_DISABLE`` and ``QUANTMILL_ALLOW``);
2. the requirements its distribution declares, from metadata, before anything is imported;
3. two distributions that claim one plugin name: a conflict, naming both;
4. import of the entry module, with any exception caught;
5. its hook API version; 6. its hook implementations against the specs; 7. its requirements hook;
8. its registrations, and names already taken by another plugin.

A failure gives that plugin a status and a reason, and touches no other plugin. Strict mode turns
every status but ``ok`` and ``disabled`` into an error. The host imports neither torch, pydantic
nor a vendor library.
"""

from __future__ import annotations

import functools
import importlib
import importlib.metadata as metadata
import os
from collections.abc import Callable, Collection
from typing import Any, Final

import pluggy

from quantmill import hookspecs
from quantmill.findings import Finding, FindingsError, Severity, declare
from quantmill.hook_calls import HookCalls
from quantmill.plugin_info import PluginInfo, Status
from quantmill.registry import REGISTRIES, Registry, check_kind
from quantmill.requirements import missing_requirements, unmet_metadata

__all__ = ["REGISTRIES", "Host", "PluginInfo", "Status", "default_host"]

BUILTIN: Final = "quantmill"

PLUGIN_BROKEN = declare("QM-PLUGIN-001", "A plugin can't be used", Severity.WARNING)
NAME_CONFLICT = declare("QM-PLUGIN-002", "Two plugins claim one name")
STRICT_STATUS = declare("QM-PLUGIN-003", "Strict mode: a plugin is not ok")


def _names_from_environment(variable: str) -> list[str]:
    return [name.strip() for name in os.environ.get(variable, "").split(",") if name.strip()]


class Host(Registry):
    """Holds the plugins of one process and calls their hooks."""

    def __init__(
        self,
        *,
        disable: Collection[str] = (),
        allow: Collection[str] | None = None,
        strict: bool = False,
        discover: bool = True,
    ) -> None:
        """Args:
            disable: names of plugins or distributions not to use.
            allow: if given, only these plugins or distributions are used.
            strict: raise if any plugin is neither ok nor disabled.
            discover: look for installed plugins; otherwise only :meth:`add` brings some.

        Raises:
            FindingsError: in strict mode, with one finding per plugin that is not ok.
        """
        self.plugins: dict[str, PluginInfo] = {}
        self.conflicts: list[PluginInfo] = []
        self.disable = {*disable, *_names_from_environment("QUANTMILL_DISABLE")}
        allowed = list(allow) if allow is not None else _names_from_environment("QUANTMILL_ALLOW")
        self.allow = set(allowed) if allow is not None or allowed else None
        self.manager = pluggy.PluginManager("quantmill")
        self.manager.add_hookspecs(hookspecs)
        self._known_hooks = {name for name in dir(hookspecs) if name.startswith("quantmill_")}
        super().__init__()
        self._add_builtin()
        if discover:
            self._discover()
        if strict:
            self.require_ok()

    # -- discovery -----------------------------------------------------------------------------

    def _add_builtin(self) -> None:
        # By name: the host knows that the core is a plugin too, not what is in it.
        self.manager.register(importlib.import_module("quantmill.builtin"), BUILTIN)

    def _discover(self) -> None:
        found: dict[str, list[tuple[PluginInfo, metadata.EntryPoint, metadata.Distribution]]] = {}
        seen: set[tuple[str, str, str]] = set()
        for entry in metadata.entry_points(group=hookspecs.ENTRY_POINT_GROUP):
            distribution = entry.dist
            if distribution is None:
                continue
            # One distribution can be on the path twice (an editable one and a wheel).
            key = (entry.name, distribution.name, entry.value)
            if key in seen:
                continue
            seen.add(key)
            info = PluginInfo(entry.name, distribution.name, distribution.version, entry.value)
            found.setdefault(entry.name, []).append((info, entry, distribution))
        for name in sorted(found):
            usable = []
            for info, entry, distribution in found[name]:
                if self._listed(info):
                    usable.append((info, entry, distribution))
                else:
                    self.plugins.setdefault(info.name, info)
            if len(usable) > 1:
                owners = " and ".join(sorted(item[0].distribution for item in usable))
                for info, _, _ in usable:
                    self._fail(
                        info,
                        Status.CONFLICT,
                        f"plugin name {name!r} is claimed by {owners}",
                        "uninstall one, or disable one by its distribution's name",
                    )
                    self.conflicts.append(info)
                self.plugins[name] = usable[0][0]
            elif usable:
                info, entry, distribution = usable[0]
                self.plugins[name] = info
                unmet = unmet_metadata(distribution)
                if unmet:
                    wants = "; ".join(f"{wanted} ({there})" for wanted, there in unmet)
                    packages = " ".join(f'"{wanted}"' for wanted, _ in unmet)
                    self._fail(info, Status.MISSING, f"needs {wants}", f"pip install {packages}")
                    continue
                self._load(info, functools.partial(importlib.import_module, entry.module))

    def _listed(self, info: PluginInfo) -> bool:
        names = {info.name, info.distribution}
        if names & self.disable:
            self._fail(info, Status.DISABLED, "on the disable list", "take it off the list")
            return False
        if self.allow is not None and not names & self.allow:
            self._fail(info, Status.DISABLED, "not on the allow list", "add it to the list")
            return False
        return True

    def add(
        self, module: Any, name: str, *, distribution: str = "", version: str = ""
    ) -> PluginInfo:
        """Add a plugin that no entry point names (tests, notebooks). Returns its fate."""
        info = PluginInfo(name, distribution or name, version, getattr(module, "__name__", name))
        if name in self.plugins:
            self._fail(
                info,
                Status.CONFLICT,
                f"plugin name {name!r} is claimed by {self.plugins[name].distribution}"
                f" and {info.distribution}",
                "disable one of them",
            )
            self.conflicts.append(info)
            return info
        self.plugins[name] = info
        if self._listed(info):
            self._load(info, lambda: module)
        return info

    def _load(self, info: PluginInfo, load: Callable[[], Any]) -> None:
        try:
            module = load()
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # noqa: BLE001 a plugin may even call sys.exit: nobody else may suffer
            self._fail(
                info,
                Status.BROKEN,
                f"importing {info.entry} raised {type(error).__name__}: {error}",
                f"reinstall or update {info.distribution}",
            )
            return
        version = getattr(module, "QUANTMILL_API", None)
        if version not in hookspecs.SUPPORTED_API_VERSIONS:
            supported = ", ".join(map(str, hookspecs.SUPPORTED_API_VERSIONS))
            stated = "states no QUANTMILL_API" if version is None else f"was made for API {version}"
            newer = isinstance(version, int) and version > hookspecs.HOOK_API_VERSION
            self._fail(
                info,
                Status.WRONG_API,
                f"{stated}; this quantmill takes {supported}",
                "update quantmill" if newer else f"update {info.distribution}",
            )
            return
        unknown = sorted(
            name
            for name in dir(module)
            if hasattr(getattr(module, name, None), "quantmill_impl")
            and name not in self._known_hooks
        )
        if unknown:
            self._fail(
                info,
                Status.BROKEN,
                f"implements unknown hooks: {', '.join(unknown)}",
                f"update {info.distribution} or quantmill",
            )
            return
        try:
            self.manager.register(module, info.name)
        except (pluggy.PluginValidationError, ValueError) as error:
            self._fail(info, Status.BROKEN, str(error), f"update {info.distribution}")
            return
        info.module = module
        self._take_registrations(info, module)

    def _take_registrations(self, info: PluginInfo, module: Any) -> None:
        try:
            unmet = [
                (requirement, there)
                for requirement, there in missing_requirements(
                    self._call(module, "quantmill_requirements")
                )
                if not requirement.optional
            ]
            given = {kind: self._call(module, hook) for kind, hook in REGISTRIES.items()}
            for kind, hook in REGISTRIES.items():
                check_kind(kind, hook, given[kind])
        except Exception as error:  # noqa: BLE001 any mistake of a plugin is its own
            self._drop(info)
            self._fail(
                info,
                Status.BROKEN,
                f"registration raised {type(error).__name__}: {error}",
                f"update {info.distribution}",
            )
            return
        if unmet:
            self._drop(info)
            wants = "; ".join(
                f"{item.distribution}{item.versions} ({there})" for item, there in unmet
            )
            packages = " ".join(f'"{item.distribution}{item.versions}"' for item, _ in unmet)
            self._fail(info, Status.MISSING, f"needs {wants}", f"pip install {packages}")
            return
        for kind in ("methods", "codecs", "kernels", "model_sources", "containers"):
            for item in given[kind]:
                found = self.claimed(kind, item)
                if found is not None:
                    owner, name = self.plugins[found[0]], found[1]
                    self._drop(info)
                    self._fail(
                        info,
                        Status.CONFLICT,
                        f"{kind[:-1].replace('_', ' ')} {name!r} is registered by"
                        f" {owner.distribution} and {info.distribution}",
                        f"disable {owner.name} or {info.name}",
                    )
                    info.rivals = (info.name, owner.name)
                    self.conflicts.append(info)
                    return
        for kind, items in given.items():
            self._registered[kind].extend((info.name, item) for item in items)
            info.provides[kind] = [
                getattr(item, "name", getattr(item, "pattern", "")) for item in items
            ]

    def _call(self, module: Any, hook: str) -> list[Any]:
        implementation = getattr(module, hook, None)
        if implementation is None or not hasattr(implementation, "quantmill_impl"):
            return []
        return list(implementation() or ())

    def _drop(self, info: PluginInfo) -> None:
        self.manager.unregister(name=info.name)
        info.module = None

    @staticmethod
    def _fail(info: PluginInfo, status: Status, reason: str, fix: str) -> None:
        info.status, info.reason, info.fix = status, reason, fix

    # -- what is there -------------------------------------------------------------------------

    def unusable(self, name: str) -> list[PluginInfo]:
        """Plugins that can't be used, for which somebody may ask by ``name``: those whose names it
        begins with, else all. What they would have registered is not known."""
        failed = [
            info
            for info in self.plugins.values()
            if info.status not in (Status.OK, Status.DISABLED)
        ]
        return [info for info in failed if name.startswith(info.name)] or failed

    def require_ok(self) -> None:
        """Raise one finding per plugin that is neither ok nor disabled."""
        problems = [
            STRICT_STATUS(f"plugin {info.name}", f"{info.status}: {info.reason}", info.fix)
            for info in self.plugins.values()
            if info.status not in (Status.OK, Status.DISABLED)
        ]
        if problems:
            raise FindingsError(problems)

    def findings(self, used: Collection[str] | None = None) -> list[Finding]:
        """One finding per plugin that can't be used.

        A conflict is an error where a plugin in ``used`` takes part in it; None stands for all.
        """
        found = []
        for info in self.plugins.values():
            if info.status in (Status.OK, Status.DISABLED):
                continue
            disputed = used is None or bool({info.name, *info.rivals} & set(used))
            conflict = info.status is Status.CONFLICT and disputed
            code = NAME_CONFLICT if conflict else PLUGIN_BROKEN
            found.append(code(f"plugin {info.name}", f"{info.status}: {info.reason}", info.fix))
        return found

    def check_pending(self) -> None:
        """Verify that every hook implementation belongs to a spec (pluggy's own check)."""
        self.manager.check_pending()

    def trace(self, before: Callable[[str, dict[str, Any]], None]) -> Callable[[], None]:
        """Call ``before(hook name, arguments)`` at every hook call. Returns a function to undo."""
        return self.manager.add_hookcall_monitoring(
            lambda name, impls, kwargs: before(name, dict(kwargs)),
            lambda outcome, name, impls, kwargs: None,
        )

    @property
    def hook(self) -> HookCalls:
        """The hooks, callable with keyword arguments; see :mod:`quantmill.hook_calls`."""
        return HookCalls(self)

    def packages(self) -> dict[str, PluginInfo]:
        """The plugins that are loaded, by the top package of their code."""
        return {
            info.module.__name__.partition(".")[0]: info
            for info in self.plugins.values()
            if info.module is not None
        }

    def blame(self, error: BaseException) -> PluginInfo | None:
        """The plugin in whose code an exception was raised, innermost frame first."""
        packages = self.packages()
        frames = []
        trace = error.__traceback__
        while trace is not None:
            frames.append(str(trace.tb_frame.f_globals.get("__name__", "")))
            trace = trace.tb_next
        return next(
            (
                packages[top]
                for name in reversed(frames)
                if (top := name.partition(".")[0]) in packages
            ),
            None,
        )


_default: Host | None = None


def default_host() -> Host:
    """The host of this process, made on first use."""
    global _default
    if _default is None:
        _default = Host()
    return _default
