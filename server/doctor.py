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
from server.operations import CORE_CHECKS, failure_of
from server.plugin import Plugin
from server.serve import START_FAULTS

MIN_DISK_MB = 1024
MIN_MEMORY_MB = 512


@dataclass(frozen=True)
class _Finding:
    part: str
    failure: str | None
    mend: str = ""
    note: str = ""
    needed: bool = True


async def examine(configuration: Configuration, plugins: Sequence[Plugin]) -> int:
    """Print a line per part; 1 if the server could not start."""
    findings = [_disk(configuration.server.data_dir), _memory(), _port(configuration)]
    findings += await _parts(configuration, plugins)
    for finding in findings:
        _print(finding)
    return int(any(finding.failure and finding.needed for finding in findings))


def _print(finding: _Finding) -> None:
    if finding.failure is None:
        line = f"ok    {finding.part}" + (f": {finding.note}" if finding.note else "")
    else:
        line = f"{'FAIL' if finding.needed else 'warn'}  {finding.part}: {finding.failure}"
        line += f" -- {finding.mend}" if finding.mend else ""
    print(line)


def _disk(data_dir: Path) -> _Finding:
    standing = next(folder for folder in (data_dir, *data_dir.parents) if folder.exists())
    if not os.access(standing, os.W_OK):
        return _Finding("disk", f"{standing} is not writable", "choose another server.data_dir")
    free_mb = shutil.disk_usage(standing).free >> 20
    failure = f"{free_mb} MB free under {standing}" if free_mb < MIN_DISK_MB else None
    return _Finding("disk", failure, f"free at least {MIN_DISK_MB} MB", f"{free_mb} MB free")


def _memory() -> _Finding:
    lines = Path("/proc/meminfo").read_text().splitlines() if Path("/proc/meminfo").exists() else []
    available = next((int(line.split()[1]) >> 10 for line in lines if line.startswith("MemAvailable")), None)
    if available is None:
        return _Finding("memory", None, note="unknown on this system")
    failure = f"{available} MB available" if available < MIN_MEMORY_MB else None
    return _Finding(
        "memory", failure, f"free at least {MIN_MEMORY_MB} MB", f"{available} MB available", False
    )


def _port(configuration: Configuration) -> _Finding:
    section = configuration.server
    with socket.socket(socket.AF_INET6 if ":" in section.host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((section.host, section.port))
        except OSError as error:
            reason = f"{section.host}:{section.port}: {error.strerror}"
            return _Finding("port", reason, "stop what listens there, or set server.port")
    return _Finding("port", None, note=f"{section.host}:{section.port} is free")


async def _parts(configuration: Configuration, plugins: Sequence[Plugin]) -> list[_Finding]:
    """Open the doors alone, as a start would, and ask every check."""
    app = await asyncio.to_thread(build, configuration, (), own_url=lambda: "doctor")
    runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=1)
    try:
        await runner.setup()
        checks = [*CORE_CHECKS, *(check for plugin in plugins for check in plugin.checks)]
        failures = await asyncio.gather(*(failure_of(app, check) for check in checks))
        return [
            _Finding(check.name, failure, check.mend, needed=check.vital)
            for check, failure in zip(checks, failures, strict=True)
        ]
    except SecondInstance as running:
        return [_Finding("database and storage", None, note=f"in use by a running server ({running})")]
    except START_FAULTS as fault:
        return [_Finding("database and storage", str(fault), "see data_dir/logs")]
    finally:
        await runner.cleanup()
