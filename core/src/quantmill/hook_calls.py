"""Calling hooks of other people's code: who raised, and whether the job needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from quantmill.findings import Finding, QuantmillError, Severity, declare

if TYPE_CHECKING:
    from quantmill.host import Host
    from quantmill.job import Job
    from quantmill.plugin_info import PluginInfo

__all__ = ["PLUGIN_RAISED", "HookCalls", "accuse"]

PLUGIN_RAISED = declare("QM-PLUGIN-004", "A plugin raised an exception in a hook")
PLUGIN_ASIDE = declare(
    "QM-PLUGIN-005",
    "A plugin that the job does not need raised an exception, and is left out",
    Severity.WARNING,
    fallback=True,
)
# Models may be half changed, so these can't be called again without the one that raised.
_ONCE = frozenset({"quantmill_finalize"})


class HookCalls:
    """The hooks of a host, callable with keyword arguments.

    What a plugin raises, other than findings, becomes a finding that names plugin and hook: an
    error where the job needs the plugin, and otherwise a warning, and the others are asked again.
    """

    def __init__(self, host: Host) -> None:
        self._host = host

    def __getattr__(self, name: str) -> Callable[..., Any]:
        manager = self._host.manager

        def call(**arguments: Any) -> Any:
            caller, aside = getattr(manager.hook, name), []
            while True:
                try:
                    answer = _settled(caller(**arguments))
                except QuantmillError:
                    raise
                except Exception as error:
                    job = None if name in _ONCE else arguments.get("job")
                    info, finding = accuse(self._host, job, error, name)
                    if job is None or info.module in aside or not _does(info, name):
                        raise _as_error(finding, error) from error
                    job.findings.add(finding)
                    aside.append(info.module)
                    caller = manager.subset_hook_caller(name, remove_plugins=aside)
                    continue
                return answer

        return call


def accuse(host: Host, job: Job | None, error: Exception, where: str) -> tuple[PluginInfo, Finding]:
    """The plugin in whose code an exception was raised, and a warning that says so.

    Raises:
        QuantmillError: the job needs that plugin (its method, model source or file format), or
            there is no job.
        Exception: the exception itself, if no plugin raised it.
    """
    from quantmill.backend import NonFiniteWeight

    plugin = host.blame(error)
    if plugin is None or isinstance(error, NonFiniteWeight):
        raise error
    cause = f"it raised {type(error).__name__}: {error}"
    fix = f"report it to {plugin.distribution} {plugin.version}, or disable it"
    finding = PLUGIN_ASIDE(f"plugin {plugin.name}: {where}", cause, fix)
    if job is None or plugin.name in set(_needed(host, job)):
        raise _as_error(finding, error) from error
    return plugin, finding


def _as_error(finding: Finding, error: Exception) -> QuantmillError:
    return QuantmillError(PLUGIN_RAISED(finding.where, finding.cause, finding.fix))


def _needed(host: Host, job: Job) -> Iterator[str]:
    """Plugins that the job can't do without: until methods are selected, that is any."""
    if not job.selections:
        yield from host.plugins
    yield from (selection.plugin for selection in job.selections.values())
    packages = host.packages()
    for part in (job.architecture, job.container):
        package = type(part).__module__.partition(".")[0]
        if package in packages:
            yield packages[package].name


def _does(info: PluginInfo, name: str) -> bool:
    """Whether a plugin implements a hook itself, so that leaving it out changes something."""
    return hasattr(getattr(info.module, name, None), "quantmill_impl")


def _settled(answer: Any) -> Any:
    """Answers that are computed while they are read, read: what they raise is raised here."""
    if not isinstance(answer, list):
        return answer
    return [list(item) if isinstance(item, Iterator) else item for item in answer]
