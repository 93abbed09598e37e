"""`python -m server doctor`: what the server needs, a line each, with the mend for what fails.

With --repair also what came apart and is mended: where no server runs, by one that starts without listening.
"""

import asyncio
import os
import shutil
import socket
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from server.app import build, open_beside
from server.config import Configuration
from server.db import Database, MigrationFault, SecondInstance
from server.interfaces import DATABASE
from server.observe import log
from server.operations import checks_of, finding_of, why
from server.plugin import Check, Plugin, Repair
from server.serve import START_FAULTS

MIN_DISK_MB = 1024
MIN_MEMORY_MB = 512
REPAIR_DEADLINE_S = 120


@dataclass(frozen=True)
class _Line:
    part: str
    failure: str | None
    mend: str = ""
    note: str = ""
    needed: bool = True


async def examine(configuration: Configuration, plugins: Sequence[Plugin]) -> int:
    """Print a line per part; 1 if the server could not start."""
    disk = await asyncio.to_thread(_disk, configuration.server.data_dir)
    lines = [disk, await asyncio.to_thread(_memory)]
    checks = checks_of(plugins, configuration)
    try:
        lines += [_port(configuration), *await _parts(configuration, checks)]
    except SecondInstance as running:
        lines += await _parts_beside(configuration, checks)
        lines.append(_Line("server", None, note=f"runs already: {running}"))
    for line in lines:
        _print(line)
    return int(any(line.failure and line.needed for line in lines))


async def repair(configuration: Configuration, plugins: Sequence[Plugin], *, dry_run: bool) -> int:
    """Mend what came apart, a line for each thing, or say what would be mended; 1 if something failed.

    A running server mends by itself, so beside one this only says what lies before it.
    """
    if dry_run:
        return await _plan(configuration, plugins)
    app = await asyncio.to_thread(build, configuration, plugins, own_url=lambda: "doctor")
    runner = _runner(app)
    try:
        await runner.setup()
        return await _tell("mended", plugins, lambda _plugin, repair: repair.act(app))
    except SecondInstance:
        _print(_Line("repair", None, note="the running server repairs by itself"))
    except START_FAULTS as fault:
        _print(_Line("repair", str(fault), "mend what the lines above say"))
        return 1
    finally:
        await runner.cleanup()
    return await _plan(configuration, plugins)


async def _plan(configuration: Configuration, plugins: Sequence[Plugin]) -> int:
    try:
        async with open_beside(configuration) as database:
            return await _tell(
                "would", plugins, lambda plugin, repair: _planned(database, configuration, plugin, repair)
            )
    except START_FAULTS as fault:
        _print(_Line("repair", str(fault), "mend what the lines above say"))
        return 1


async def _planned(
    database: Database, configuration: Configuration, plugin: Plugin, repair: Repair
) -> list[str]:
    """A plugin's plan. A plan must not migrate: a server of another version may be running."""
    seen = await database.migrations_of(plugin.name)
    if seen == len(plugin.migrations):
        return await repair.plan(database, configuration)
    if seen == 0:
        return []
    raise MigrationFault("the database is of another version of this program; start the server once")


async def _tell(
    word: str, plugins: Sequence[Plugin], ask: Callable[[Plugin, Repair], Awaitable[list[str]]]
) -> int:
    """Print what each plugin's repair answers, after `word`; 1 if one failed."""
    told = failed = False
    for plugin in plugins:
        if plugin.repair is None:
            continue
        try:
            async with asyncio.timeout(REPAIR_DEADLINE_S):
                lines = await ask(plugin, plugin.repair)
        except Exception as error:
            log.warning("repair failed", exc_info=True)
            _print(_Line(plugin.name, why(error)))
            failed = True
            continue
        for line in lines:
            _say(f"{word:6} {line}")
            told = True
    if not (told or failed):
        _say("nothing to repair")
    return int(failed)


def _say(text: str) -> None:
    """One line, whatever is in it."""
    print(" ".join(text.splitlines()))


def _print(found: _Line) -> None:
    if found.failure is None:
        line = f"ok    {found.part}" + (f": {found.note}" if found.note else "")
    else:
        line = f"{'FAIL' if found.needed else 'warn'}  {found.part}: {found.failure}"
        line += f" -- {found.mend}" if found.mend else ""
    _say(line)


def _disk(data_dir: Path) -> _Line:
    standing = next(folder for folder in (data_dir, *data_dir.parents) if folder.exists())
    if not os.access(standing, os.W_OK):
        return _Line("disk", f"{standing} is not writable", "choose another server.data_dir")
    free_mb = shutil.disk_usage(standing).free >> 20
    failure = f"{free_mb} MB free under {standing}" if free_mb < MIN_DISK_MB else None
    return _Line("disk", failure, f"free at least {MIN_DISK_MB} MB", f"{free_mb} MB free")


def _memory() -> _Line:
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    available = next((int(line.split()[1]) >> 10 for line in lines if line.startswith("MemAvailable")), None)
    if available is None:
        return _Line("memory", None, note="unknown on this system")
    failure = f"{available} MB available" if available < MIN_MEMORY_MB else None
    return _Line("memory", failure, f"free at least {MIN_MEMORY_MB} MB", f"{available} MB available", False)


def _port(configuration: Configuration) -> _Line:
    section = configuration.server
    with socket.socket(socket.AF_INET6 if ":" in section.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((section.host, section.port))
        except OSError as error:
            reason = f"{section.host}:{section.port}: {error.strerror}"
            return _Line("port", reason, "stop what listens there, or set server.port")
    return _Line("port", None, note=f"{section.host}:{section.port} is free")


def _runner(app: web.Application) -> web.AppRunner:
    return web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1)


async def _parts(configuration: Configuration, checks: Sequence[Check]) -> list[_Line]:
    """Open the doors alone, as a start would, and ask every check."""
    app = await asyncio.to_thread(build, configuration, (), own_url=lambda: "doctor")
    runner = _runner(app)
    try:
        await runner.setup()
        return await _asked(app, checks)
    except SecondInstance:
        raise
    except START_FAULTS as fault:
        return [_Line("database and storage", str(fault), "see data_dir/logs")]
    finally:
        await runner.cleanup()


async def _parts_beside(configuration: Configuration, checks: Sequence[Check]) -> list[_Line]:
    """Ask what /readyz of the running server does not."""
    app = await asyncio.to_thread(build, configuration, (), own_url=lambda: "doctor")
    try:
        async with open_beside(configuration) as database:
            app[DATABASE] = database
            return await _asked(app, [check for check in checks if not check.in_readyz])
    except START_FAULTS as fault:
        return [_Line("database", str(fault), "see data_dir/logs")]


async def _asked(app: web.Application, checks: Sequence[Check]) -> list[_Line]:
    findings = await asyncio.gather(*(finding_of(app, check) for check in checks))
    return [
        _Line(check.name, found.failure, found.mend, found.note, check.vital)
        for check, found in zip(checks, findings, strict=True)
    ]
