"""`python -m server doctor`: what the server needs, a line each, with the mend for what fails."""

import asyncio
import os
import shutil
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from aiohttp import web

from server.app import build
from server.config import Configuration
from server.db import SecondInstance
from server.operations import CORE_CHECKS, finding_of
from server.plugin import Plugin
from server.serve import START_FAULTS

MIN_DISK_MB = 1024
MIN_MEMORY_MB = 512


@dataclass(frozen=True)
class _Line:
    part: str
    failure: str | None
    mend: str = ""
    note: str = ""
    needed: bool = True


async def examine(configuration: Configuration, plugins: Sequence[Plugin]) -> int:
    """Print a line per part; 1 if the server could not start."""
    lines = [_disk(configuration.server.data_dir), _memory()]
    try:
        lines += [_port(configuration), *await _parts(configuration, plugins)]
    except SecondInstance as running:
        lines.append(_Line("server", None, note=f"runs already: {running}"))
    for line in lines:
        _print(line)
    return int(any(line.failure and line.needed for line in lines))


def _print(found: _Line) -> None:
    if found.failure is None:
        line = f"ok    {found.part}" + (f": {found.note}" if found.note else "")
    else:
        line = f"{'FAIL' if found.needed else 'warn'}  {found.part}: {found.failure}"
        line += f" -- {found.mend}" if found.mend else ""
    print(line)


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


async def _parts(configuration: Configuration, plugins: Sequence[Plugin]) -> list[_Line]:
    """Open the doors alone, as a start would, and ask every check."""
    app = await asyncio.to_thread(build, configuration, (), own_url=lambda: "doctor")
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1)
    try:
        await runner.setup()
        checks = [*CORE_CHECKS, *(check for plugin in plugins for check in plugin.checks)]
        findings = await asyncio.gather(*(finding_of(app, check) for check in checks))
        return [
            _Line(check.name, found.failure, check.mend, found.note, check.vital)
            for check, found in zip(checks, findings, strict=True)
        ]
    except SecondInstance:
        raise
    except START_FAULTS as fault:
        return [_Line("database and storage", str(fault), "see data_dir/logs")]
    finally:
        await runner.cleanup()
