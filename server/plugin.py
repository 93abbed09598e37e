"""The plugin contract: a frozen value at the end of a plugin's file, and the order plugins start in."""

from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from aiohttp import web
from pydantic import BaseModel, ConfigDict

from server.api import Route
from server.db import Database, Tx

if TYPE_CHECKING:
    from server.config import Configuration

Lifespan = Callable[[web.Application], AbstractAsyncContextManager[None]]
Listener = Callable[[web.Application, Tx, Any], Awaitable[None]]


class Section(BaseModel):
    """A section of config.toml: frozen, unknown keys forbidden, units in key names."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class PluginFault(Exception):
    """A plugin's declaration does not fit; the server does not start. One line."""


@dataclass(frozen=True)
class Job:
    """Recurring work: runs once at start, then `every_s` after each run's end, never overlapping.

    `every_s` may be a function of the plugin's section; a run over `deadline_s` is cancelled.
    """

    name: str
    every_s: float | Callable[[Any], float]
    deadline_s: float
    run: Callable[[web.Application], Awaitable[None]]


class CheckFailed(Exception):
    """Why a check fails, and the command that mends just this; without one the declared mend holds."""

    def __init__(self, reason: str, mend: str = "") -> None:
        super().__init__(reason)
        self.mend = mend


def _always(_section: Any) -> bool:
    return True


@dataclass(frozen=True)
class Check:
    """One line of `doctor` and one part of `/readyz`: `ask` raises with the reason when it fails.

    What `ask` answers is a note worth reading also when all is well. It may use the doors and the
    configuration, not the plugin's room. The server starts without a part that is not `vital`. Where
    `applies` denies it of the plugin's section, the question does not arise and nothing is said.

    One that is not `in_readyz` is the doctor's alone, who also asks it beside a running server: then
    the database is the only open door.
    """

    name: str
    ask: Callable[[web.Application], Awaitable[str | None]]
    mend: str
    vital: bool = True
    in_readyz: bool = True
    applies: Callable[[Any], bool] = _always


@dataclass(frozen=True)
class Repair:
    """What a plugin mends when asked: rows and the world that came apart. A line for each thing.

    `plan` says what `act` would do now, changes nothing, and also works beside a running server. `act`
    is given the started application; it raises where something cannot be mended.
    """

    plan: "Callable[[Database, Configuration], Awaitable[list[str]]]"
    act: Callable[[web.Application], Awaitable[list[str]]]


@dataclass(frozen=True)
class Plugin:
    """One domain and its tables. The lifespan sets `app[KEY]` for every key in `provides`."""

    name: str
    config: type[Section]
    lifespan: Lifespan
    needs: tuple[web.AppKey[Any], ...] = ()
    provides: tuple[web.AppKey[Any], ...] = ()
    migrations: tuple[str, ...] = ()
    routes: Sequence[Route] = ()
    jobs: tuple[Job, ...] = ()
    listens: Mapping[type[object], Listener] = field(default_factory=dict)
    checks: tuple[Check, ...] = ()
    repair: Repair | None = None


def in_order(plugins: Sequence[Plugin]) -> tuple[Plugin, ...]:
    """The plugins so that each comes after those whose keys it needs.

    Raises PluginFault naming a doubled name or key, a gap or a cycle.
    """
    providers: dict[web.AppKey[Any], Plugin] = {}
    for plugin in plugins:
        if any(plugin.name == other.name for other in plugins if other is not plugin):
            raise PluginFault(f"two plugins are named {plugin.name!r}")
        for key in plugin.provides:
            if key in providers:
                raise PluginFault(f"plugins {providers[key].name!r} and {plugin.name!r} both provide {key}")
            providers[key] = plugin
    for plugin in plugins:
        for key in plugin.needs:
            if key not in providers:
                raise PluginFault(f"plugin {plugin.name!r} needs {key}, which no plugin provides")
    ordered: list[Plugin] = []
    waiting = list(plugins)
    while waiting:
        ready = [p for p in waiting if all(providers[key] in ordered for key in p.needs)]
        if not ready:
            raise PluginFault("plugins need each other in a circle: " + ", ".join(p.name for p in waiting))
        ordered.append(ready[0])
        waiting.remove(ready[0])
    return tuple(ordered)
