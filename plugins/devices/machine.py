"""Which machine runs the phones, and why this one: a Docker engine, or local processes that simulate."""

import asyncio
from dataclasses import dataclass
from pathlib import Path
from typing import Final
from uuid import UUID

from phones.docker import DockerRuntime
from phones.engine import Engine, host_of
from phones.host import binder
from phones.runtime import Runtime, RuntimeFault, RuntimeName, RuntimeUnavailable
from phones.simulated import SimulatedRuntime
from plugins.devices.section import DevicesSection
from server.db import Database
from server.i18n import N_
from server.observe import log

_EVERYWHERE: Final = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # noqa: S104  (looked up, not bound)
SWEEP_DEADLINE_S: Final = 30.0

CONFIGURED: Final = N_("This server is configured to simulate its phones.")
NO_ENGINE: Final = N_("No Docker engine answers on this machine.")
NO_BINDER: Final = N_(
    "A Docker engine is there, but this machine's kernel lacks binder, which Android needs."
)


@dataclass(frozen=True, slots=True)
class Machine:
    """Where phones run. `reason` is a sentence for the pages, where they are simulated."""

    runtime: Runtime
    reason: str
    docker_url: str

    @property
    def is_here(self) -> bool:
        """Whether its ports are this machine's, so that they can be tried here."""
        return self.runtime.name == "simulated" or not host_of(self.docker_url)

    def reached_at(self, bind_address: str) -> str:
        """Where its phones' published ports are reached from here."""
        if bind_address not in _EVERYWHERE:
            return bind_address
        return (not self.is_here and host_of(self.docker_url)) or _EVERYWHERE[bind_address]


async def choose(database: Database, data_dir: Path, section: DevicesSection) -> Machine:
    """The machine that the configuration asks for, not opened yet; what ran elsewhere is ended."""
    row = await database.fetchrow("SELECT id, runtime FROM device_installation")
    assert row is not None
    has_devices = await database.fetchval("SELECT EXISTS (SELECT FROM devices)")
    stays = row["runtime"] if has_devices else None
    name, reason = await _pick(section, stays)
    await database.execute("UPDATE device_installation SET runtime = $1", name)
    simulated, docker = SimulatedRuntime(data_dir), _docker(section, row["id"])
    if name == "docker":
        if await asyncio.to_thread(data_dir.is_dir):
            await _end(simulated)
        return Machine(docker, "", section.docker_url)
    if stays == "docker":
        await _end(docker)
    return Machine(simulated, reason, section.docker_url)


async def would_run(section: DevicesSection) -> str:
    """Where phones would run if the server started now, in a few words."""
    name, reason = await _pick(section, None)
    if name == "docker":
        return f"phones run in containers of {section.docker_url or 'the local Docker engine'}"
    return f"phones are simulated: {reason.rstrip('.')}"


async def runtime_beside(database: Database, data_dir: Path, section: DevicesSection) -> Runtime:
    """The runtime that a server uses or would use, for somebody who only looks."""
    row = await database.fetchrow("SELECT id, runtime FROM device_installation")
    assert row is not None
    name = row["runtime"] or (await _pick(section, None))[0]
    return _docker(section, row["id"]) if name == "docker" else SimulatedRuntime(data_dir)


def _docker(section: DevicesSection, installation: UUID) -> DockerRuntime:
    return DockerRuntime(Engine(section.docker_url), str(installation))


async def _pick(section: DevicesSection, stays: str | None) -> tuple[RuntimeName, str]:
    """`stays` is where there are phones already: an engine that is away for a moment keeps them."""
    if section.runtime == "simulated":
        return "simulated", CONFIGURED
    if section.runtime == "docker" or stays == "docker":
        return "docker", ""
    engine = Engine(section.docker_url)
    try:
        await engine.ping()
    except RuntimeUnavailable:
        return "simulated", NO_ENGINE
    finally:
        await engine.close()
    # The kernel of an engine elsewhere cannot be seen from here; whoever names it knows it.
    if not host_of(section.docker_url) and not await asyncio.to_thread(binder):
        return "simulated", NO_BINDER
    return "docker", ""


async def _end(runtime: Runtime) -> None:
    """Stop the phones of a machine that another takes the place of; what they hold stays there."""
    try:
        async with asyncio.timeout(SWEEP_DEADLINE_S):
            await runtime.open()
            stops = [runtime.stop(phone.id) for phone in await runtime.list()]
            for fault in await asyncio.gather(*stops, return_exceptions=True):
                if fault is not None:
                    raise fault
    except (RuntimeFault, TimeoutError) as fault:
        log.warning("phones may still run elsewhere", extra={"runtime": runtime.name, "error": str(fault)})
    finally:
        await runtime.close()
