"""Devices: rented phones, their states, ports and prices, and how they are seen and touched.

Tables: `devices`, `device_ports`, `device_meters`, `balance_warnings` (what owners were told of theirs), and
`device_installation` (the id that marks our containers, and where phones ran last).

Invariants: what is wanted of a phone is a row before anything happens to the phone; whatever is broken
off is taken up again from there, also after a kill -9, and phones outlive the server. A port belongs to
one device at most, from before its phone starts until the machine says that the phone is gone. A phone
costs from the moment it runs until somebody asks for its end, to the second; nothing where it never
came up, or for time in which nobody could see it run. Its owner hears of every change of state.

`fleet` holds the rows and their mirror in memory, `room` the operations, `bulk` many at once; `reconciler`
carries them out in `turns` and mends by `repairs`; `metering` charges what `meters` count, `outlook` says for
how long a balance lasts; `control` and `files` talk to a running phone, `machine` says where phones run and
`checks` what that machine lacks.
"""

import asyncio
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Final

from aiohttp import web
from prometheus_client import Gauge

from phones.ports import PortAllocator
from phones.runtime import Runtime, RuntimeFault, RuntimeUnavailable
from plugins.devices.checks import CHECKS
from plugins.devices.fleet import Fleet, read_devices
from plugins.devices.links import Links
from plugins.devices.machine import choose, runtime_beside, would_run
from plugins.devices.metering import CHARGE_EVERY_S, Metering
from plugins.devices.model import DeviceState
from plugins.devices.reconciler import Reconciler
from plugins.devices.repairs import compare
from plugins.devices.room import DEVICES, Devices
from plugins.devices.routes import PUBLIC_PORTS, facts_of_page, routes
from plugins.devices.schema import MIGRATIONS
from plugins.devices.section import DevicesSection
from server.clock import SystemClock
from server.config import Configuration
from server.db import Database
from server.interfaces import (
    AUDIT,
    CLOCK,
    CONFIGURATION,
    DATA_DIR,
    DATABASE,
    EVENTS,
    JOBS,
    LEDGER,
    NOTIFIER,
    PHONES,
    SPENDING,
)
from server.observe import METRICS, Metrics, log
from server.pages import PAGE_CONTEXT
from server.plugin import Check, Job, Lifespan, Plugin, PluginFault, Repair

OPEN_DEADLINE_S: Final = 60.0
METER_JOB: Final = "devices.meter"

METERING: Final = web.AppKey("METERING", Metering)
RECONCILER: Final = web.AppKey("RECONCILER", Reconciler)

MakeRuntime = Callable[[Path], Runtime]


def _check_address(address: str) -> None:
    """Raises PluginFault where phones could not listen."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.bind((address, 0))
    except OSError as error:
        raise PluginFault(f"devices.bind_address: cannot listen on {address}: {error.strerror}") from None


def lifespan_with(make_runtime: MakeRuntime | None = None) -> Lifespan:
    """The plugin's lifespan; where wanted on a runtime of one's own, which is given a folder."""

    @asynccontextmanager
    async def lifespan(app: web.Application) -> AsyncIterator[None]:
        """Take the rows into memory and open the runtime; the reconciler's first run does the rest."""
        section = app[CONFIGURATION].section("devices")
        assert isinstance(section, DevicesSection)
        machine = await choose(app[DATABASE], app[DATA_DIR] / "phones", section)
        runtime = make_runtime(app[DATA_DIR] / "phones") if make_runtime else machine.runtime
        if machine.is_here:
            await asyncio.to_thread(_check_address, section.bind_address)
        if section.is_public:
            log.warning(PUBLIC_PORTS)
        ports = PortAllocator(
            adb=section.adb_ports,
            webrtc=section.webrtc_ports,
            scrcpy=section.scrcpy_ports,
            bind_address=section.bind_address if machine.is_here else None,
        )
        fleet = Fleet(app[DATABASE], app[NOTIFIER], ports)
        await fleet.load()
        links = Links(machine.reached_at(section.bind_address))
        metering = Metering(app, fleet, section)
        await metering.open()
        reconciler = Reconciler(
            runtime,
            fleet,
            links,
            metering,
            app[DATABASE],
            app[EVENTS],
            app[AUDIT],
            app[CLOCK],
            section,
        )
        fleet.doorbell = reconciler.ring
        async with _opened(runtime):
            app[DEVICES] = app[PHONES] = Devices(
                runtime, machine.reason, fleet, links, metering, reconciler, app[CLOCK], section
            )
            app[METERING], app[RECONCILER] = metering, reconciler
            app[PAGE_CONTEXT].append(facts_of_page)
            app[SPENDING].append(metering.spending_of)
            _measure(app[METRICS], fleet)
            watching = asyncio.create_task(reconciler.watch(runtime.events()))
            try:
                yield
            finally:
                watching.cancel()
                await asyncio.gather(watching, return_exceptions=True)
                await reconciler.close()
                await links.close_all()

    return lifespan


@asynccontextmanager
async def _opened(runtime: Runtime) -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(OPEN_DEADLINE_S):
            await runtime.open()
    except (RuntimeFault, TimeoutError) as fault:
        raise PluginFault(f"devices: {fault or 'the runtime did not open in time'}") from None
    try:
        yield
    finally:
        await runtime.close()


def _measure(metrics: Metrics, fleet: Fleet) -> None:
    devices = Gauge("cloudphone_devices", "Devices by state.", ["state"], registry=metrics.registry)
    for state in DeviceState:
        devices.labels(state.value).set_function(partial(_count, fleet, state))
    free = Gauge("cloudphone_ports_free", "Ports left to give.", ["range"], registry=metrics.registry)
    for name in fleet.ports.free_counts():
        free.labels(name).set_function(partial(_free, fleet, name))


def _count(fleet: Fleet, state: DeviceState) -> int:
    return sum(device.state is state for device in fleet.all())


def _free(fleet: Fleet, name: str) -> int:
    return fleet.ports.free_counts()[name]


async def _reconcile(app: web.Application) -> None:
    """Compare rows and machine; one that is away says so itself, and is asked when it is back."""
    vouched = app[RECONCILER].vouches()
    with suppress(RuntimeUnavailable):
        await app[RECONCILER].reconcile()
        if not vouched:
            app[JOBS].ring(METER_JOB)


async def _meter(app: web.Application) -> None:
    """Charge, unless nobody could see the phones run: what they owe is charged once somebody can."""
    seen = await app[DEVICES].is_seen()
    await app[METERING].reprice(seen=seen)
    if seen:
        await app[METERING].meter()


async def _expire(app: web.Application) -> None:
    await app[METERING].expire()


async def _ask_runtime(app: web.Application) -> str:
    devices = app.get(DEVICES)
    if devices is None:  # the doctor has no room
        section = app[CONFIGURATION].section("devices")
        assert isinstance(section, DevicesSection)
        return f"{await would_run(section)}."
    await devices.runtime.check()
    return f"phones run on: {devices.runtime.name}. {devices.runtime_reason}"


async def _plan_repairs(database: Database, configuration: Configuration) -> list[str]:
    """What a start, or the running server, would mend now."""
    section = configuration.section("devices")
    assert isinstance(section, DevicesSection)
    runtime = await runtime_beside(database, configuration.server.data_dir / "phones", section)
    try:
        found = await runtime.list()
    finally:
        await runtime.close()
    devices = {device.id: device for device in await read_devices(database)}
    return [
        repair.line()
        for repair in compare(devices.values(), found, SystemClock().now(), devices.__contains__)
    ]


async def _repair(app: web.Application) -> list[str]:
    """Mend everything, and wait until phones that shall run do."""
    await app[RECONCILER].reconcile()
    await app[RECONCILER].settle()
    return list(app[RECONCILER].repaired)


PLUGIN: Final = Plugin(
    name="devices",
    config=DevicesSection,
    lifespan=lifespan_with(),
    needs=(AUDIT, NOTIFIER, LEDGER, SPENDING),
    provides=(PHONES,),
    migrations=MIGRATIONS,
    routes=routes.declared,
    jobs=(
        Job("devices.reconcile", every_s=30, deadline_s=60, run=_reconcile),
        Job(METER_JOB, every_s=CHARGE_EVERY_S, deadline_s=60, run=_meter),
        Job("devices.expire", every_s=3600, deadline_s=120, run=_expire),
    ),
    checks=(
        Check(
            "runtime",
            _ask_runtime,
            "start the Docker engine, or see devices.runtime in config.toml",
            vital=False,
        ),
        *CHECKS,
    ),
    repair=Repair(_plan_repairs, _repair),
)
