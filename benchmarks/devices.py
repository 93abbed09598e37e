"""What a server adds to an engine's own work: `python -m benchmarks.devices [--starts] [--rows]`.

`--starts`: 1, 4 and 16 phones at once on this machine's engine (DOCKER_HOST, or the usual socket), until all
run. A `python -m server` of its own, on embedded defaults and durable as it comes, takes turns with
`benchmarks.bare_engine`, which makes the same containers, as the engine described the server's, over the
same network and with as many at once.

- In both: volume, container, start, and `getprop sys.boot_completed` over ADB until it says 1, with the same
  pauses (they double to 1 s, so that a phone which comes up a little later may be seen much later).
- In the server's alone: the requests, rows, ports, queue and notifications, the looks at the volume and at
  phones that do not answer yet, and its other work of that time. Its clock runs from the first POST to the
  last "running" on the owner's WebSocket.
- In neither: image, network and firewall rule, which a first round settles, and the removal.

Processor time is that of the server and of its PostgreSQL, or of the bare side; the engine's is in neither.

`--rows`: 1,000 running phones in the rows and as many containers of `benchmarks.fake_engine`, compared by a
whole server inside this process. The first comparison after a start looks at every container.

Both by default. Whatever is made is removed, also after Ctrl-C.
"""

import argparse
import asyncio
import json
import os
import secrets
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final
from uuid import UUID, uuid4

import aiohttp
import uvloop

from benchmarks.bare_engine import Container, Job, drive_apart
from benchmarks.fake_engine import FakePhone, fake_engine
from benchmarks.phones import processes, resident_mb
from phones import image
from phones.docker import DEVICE_LABEL, INSTALLATION_LABEL
from phones.engine import Engine
from phones.runtime import RuntimeUnavailable
from plugins.devices import RECONCILER, steps
from plugins.devices.model import Hardware
from plugins.devices.room import DEVICES
from plugins.devices.section import DevicesSection, ImageSection
from server.__main__ import PLUGINS
from server.db import Database
from server.embedded_postgres import known_url
from server.interfaces import DATABASE
from tests.containers import sections_for, sweep
from tests.engine import docker, machine_url
from tests.house import PASSWORD, House
from tests.process import ServerProcess, server_process
from tests.renting import WISH
from tests.servers import Servers

ROUNDS: Final = {1: 10, 4: 6, 16: 4}
AT_ONCE: Final = DevicesSection().operations_at_once
# Away from those of tests that run beside it.
PORTS: Final = {
    "adb_ports": [29000, 29099],
    "webrtc_ports": [29100, 29199],
    "scrcpy_ports": [29200, 29299],
}
DEADLINE_S: Final = 240.0
SWEEPS: Final = 5
REST_S: Final = 0.5
AIM_RATIO: Final = 1.10

ROWS: Final = 1000
STARTS: Final = 3
COMPARISONS: Final = 5
ROWS_DEADLINE_S: Final = 90.0
SETTLE_S: Final = 1.0
AIM_S: Final = 1.0


def cpu_s(pid: int, *, with_reaped: bool = False) -> float:
    """The processor time a process has taken; where wanted with that of children it has waited for."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return sum(map(int, fields[11 : 15 if with_reaped else 13])) / os.sysconf("SC_CLK_TCK")


def load() -> str:
    """How busy the machine is: processes that want to run, over 1 and 5 minutes."""
    one, five, _ = os.getloadavg()
    return f"load {one:.1f} (5 min {five:.1f}) on {os.cpu_count()} cores"


# --- Starts -------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Round:
    """So many phones brought up: wall time, and processor time of both processes that a side may have."""

    wall_s: float
    own_cpu_s: float
    postgres_cpu_s: float = 0.0


class Served:
    """The server's side. One owner rents; its stream of notifications says what became of it."""

    def __init__(
        self,
        server: ServerProcess,
        http: aiohttp.ClientSession,
        stream: aiohttp.ClientWebSocketResponse[Any],
    ) -> None:
        self._server = server
        self._http = http
        self._stream = stream
        self._devices: list[str] = []

    async def bring_up(self, count: int) -> Round:
        """Rent phones and wait until all run."""
        before = self._cpu()
        began = time.perf_counter()
        self._devices = await asyncio.gather(*(self._rent() for _ in range(count)))
        await self._all("running")
        wall_s = time.perf_counter() - began
        own_s, postgres_s = (after - earlier for after, earlier in zip(self._cpu(), before, strict=True))
        return Round(wall_s, own_s, postgres_s)

    async def remove(self) -> None:
        """Delete all phones and wait until they are gone."""
        for device in self._devices:
            async with self._http.delete(f"/api/v1/devices/{device}") as reply:
                assert reply.status == 202, await reply.text()
        await self._all("deleted")

    async def _rent(self) -> str:
        async with self._http.post("/api/v1/devices", json=WISH) as reply:
            assert reply.status == 202, await reply.text()
            return str((await reply.json())["id"])

    async def _all(self, state: str) -> None:
        missing = set(self._devices)
        async with asyncio.timeout(DEADLINE_S):
            while missing:
                data = (await self._stream.receive_json()).get("data") or {}
                if data.get("state") == state:
                    missing.discard(data["device_id"])
                elif data.get("state") == "failed":
                    raise RuntimeError(f"a phone failed: {data['detail']}")

    def _cpu(self) -> tuple[float, float]:
        everyone = processes()
        clusters = [
            pid
            for pid, (parent, command) in everyone.items()
            if parent == self._server.pid and "postgres" in command
        ]
        postgres_s = sum(cpu_s(pid, with_reaped=True) for pid in clusters)
        for pid, (parent, _) in everyone.items():
            if parent in clusters:
                with suppress(FileNotFoundError):  # it has ended, and its parent has its time
                    postgres_s += cpu_s(pid)
        return cpu_s(self._server.pid), postgres_s


class Bare:
    """The other side: the same containers under another name, with nothing around them."""

    def __init__(self, url: str, installation: str, like: Sequence[dict[str, Any]]) -> None:
        """`like` is what the engine says of the containers to copy."""
        self._url = url
        self._installation = installation
        self._containers = [self._copy(number, found) for number, found in enumerate(like)]

    def _copy(self, number: int, found: dict[str, Any]) -> Container:
        name = f"bare-{self._installation[:8]}-{number}"
        volume = f"{name}-data"
        labels = found["Config"]["Labels"] | {INSTALLATION_LABEL: self._installation}
        host = found["HostConfig"]
        (mount,) = host["Mounts"]
        ((published,),) = host["PortBindings"].values()
        return Container(
            name,
            {
                "Name": volume,
                "Labels": {label: labels[label] for label in (INSTALLATION_LABEL, DEVICE_LABEL)},
            },
            found["Config"]
            | {"Labels": labels, "HostConfig": host | {"Mounts": [mount | {"Source": volume}]}},
            int(published["HostPort"]),
        )

    async def bring_up(self, count: int) -> Round:
        """Make the first few of the containers and wait until their phones are up."""
        result = await drive_apart(
            Job(
                self._url,
                AT_ONCE,
                steps.FIRST_POLL_S,
                steps.LAST_POLL_S,
                self._containers[:count],
            )
        )
        return Round(result.wall_s, result.cpu_s)

    async def remove(self) -> None:
        """Remove what was made."""
        await clear(self._url, self._installation)


async def clear(url: str, installation: str) -> None:
    """Remove all that an installation has on the engine, which may still be at something broken off."""
    for _ in range(SWEEPS - 1):
        try:
            await sweep(url, installation)
        except RuntimeError:
            await asyncio.sleep(1)
        else:
            return
    await sweep(url, installation)


@asynccontextmanager
async def phone_image(url: str) -> AsyncIterator[str]:
    """An image of the simulated phone under a name of its own."""
    reference = f"cloudphone/simulated-phone:benchmark-{secrets.token_hex(4)}"
    try:
        await image.build(url, reference, print)
        yield reference
    finally:
        with suppress(RuntimeError):
            await docker("image", "rm", reference, url=url)


async def installation_of(server: ServerProcess) -> str:
    """What marks a server's containers as its own."""
    database_url = await asyncio.to_thread(known_url, server.data_dir)
    assert database_url
    database = await Database.open(database_url, pool_size=1)
    try:
        return str(await database.fetchval("SELECT id FROM device_installation"))
    finally:
        await database.close()


async def containers_of(url: str, installation: str) -> list[dict[str, Any]]:
    """All that the engine knows of an installation's containers."""
    ids = await docker("ps", "--quiet", "--filter", f"label={INSTALLATION_LABEL}={installation}", url=url)
    return list(json.loads(await docker("inspect", *ids.split(), url=url)))


@asynccontextmanager
async def signed_in(server: ServerProcess) -> AsyncIterator[Served]:
    """A new owner at the server."""
    async with AsyncExitStack() as stack:
        anyone = await stack.enter_async_context(aiohttp.ClientSession(server.url))
        body = {"email": "owner@example.com", "password": PASSWORD}
        async with anyone.post("/api/v1/auth/register", json=body) as reply:
            assert reply.status == 201, await reply.text()
            token = (await reply.json())["access_token"]
        headers = {"Authorization": f"Bearer {token}"}
        http = await stack.enter_async_context(aiohttp.ClientSession(server.url, headers=headers))
        stream = await stack.enter_async_context(http.ws_connect("/api/v1/notifications/stream"))
        await stream.receive_json()
        yield Served(server, http, stream)


async def measure_starts(url: str) -> None:
    """Let both sides take turns, and print what it took."""
    largest = max(ROUNDS)
    async with AsyncExitStack() as stack:
        reference = await stack.enter_async_context(phone_image(url))
        devices = sections_for(
            url,
            reference,
            max_per_user=largest,
            start_deadline_s=DEADLINE_S,
            operations_at_once=AT_ONCE,
            **PORTS,
        )
        sections: dict[str, dict[str, object]] = {
            "server": {"port": 0},
            "billing": {"welcome_credit": 10_000_000},
            "devices": devices,
        }
        server = await stack.enter_async_context(server_process(sections))
        await server.start()
        installation, other = await installation_of(server), str(uuid4())
        # From the last to the first: what is still under way at the server ends before all is swept.
        stack.push_async_callback(clear, url, installation)
        stack.push_async_callback(clear, url, other)
        stack.push_async_callback(server.stop)
        served = await stack.enter_async_context(signed_in(server))
        print(f"{load()}; a round of {largest} to warm up ...", flush=True)
        await served.bring_up(largest)
        bare = Bare(url, other, await containers_of(url, installation))
        await served.remove()
        await bare.bring_up(largest)
        await bare.remove()
        rounds = {count: await _take_turns(served, bare, count) for count in ROUNDS}
    _print_starts(rounds)


async def _take_turns(served: Served, bare: Bare, count: int) -> list[tuple[Round, Round]]:
    rounds = []
    for number in range(ROUNDS[count]):
        found: dict[object, Round] = {}
        for side in (served, bare) if number % 2 == 0 else (bare, served):
            found[side] = await side.bring_up(count)
            await side.remove()
            await asyncio.sleep(REST_S)  # an engine tidies up after a removal that it has answered
        ours, theirs = found[served], found[bare]
        rounds.append((ours, theirs))
        print(
            f"{count:>4} at once: server {ours.wall_s:6.2f} s, bare {theirs.wall_s:6.2f} s; {load()}",
            flush=True,
        )
    return rounds


def _print_starts(rounds: dict[int, list[tuple[Round, Round]]]) -> None:
    print("\ncreate to running, seconds; CPU in ms a phone, mean of the rounds")
    print(f"{'':<12}{'median of the rounds':^30}{'fastest round':^30}{'CPU':^34}")
    print(f"{'phones':<12}" + 2 * f"{'server':>10}{'bare':>8}{'ratio':>8}    " + f"{'server':>10}", end="")
    print(f"{'PostgreSQL':>12}{'bare':>8}")
    for count, pairs in rounds.items():
        print(f"{count:<12}{_beside(pairs, statistics.median)}{_beside(pairs, min)}", end="")
        phones, (ours, theirs) = count * len(pairs), zip(*pairs, strict=True)
        print(f"{1000 * sum(one.own_cpu_s for one in ours) / phones:>10.1f}", end="")
        print(f"{1000 * sum(one.postgres_cpu_s for one in ours) / phones:>12.1f}", end="")
        print(f"{1000 * sum(one.own_cpu_s for one in theirs) / phones:>8.1f}")
    everything = [pair for pairs in rounds.values() for pair in pairs]
    print(
        f"{'all, summed':<12}{_beside(everything, sum)}(aim: a ratio of at most {AIM_RATIO:.2f})\n",
        flush=True,
    )


def _beside(pairs: Sequence[tuple[Round, Round]], of: Callable[[Iterable[float]], float]) -> str:
    ours_s, bare_s = (of([pair[side].wall_s for pair in pairs]) for side in (0, 1))
    return f"{ours_s:>10.2f}{bare_s:>8.2f}{ours_s / bare_s:>8.2f}    "


# --- Rows ---------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Comparison:
    """One run of the reconciler, and the memory of the whole process."""

    wall_s: float
    cpu_s: float
    before_mb: float
    after_mb: float


async def measure_rows() -> None:
    """Compare 1,000 rows with as many containers, and print what it took."""
    installation = uuid4()
    phones = [_phone(number) for number in range(ROWS)]
    # The timer's runs would come in between.
    plugins = [replace(plugin, jobs=()) if plugin.name == "devices" else plugin for plugin in PLUGINS]
    async with asyncio.timeout(ROWS_DEADLINE_S), AsyncExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="rows-")))
        url = await stack.enter_async_context(fake_engine(folder, str(installation), phones))
        servers = Servers.start()
        stack.push_async_callback(asyncio.to_thread, _end, servers)
        # The ranges that a server has by default, in place of the few ports of a test.
        ranges = {name: getattr(DevicesSection(), name) for name in PORTS}
        sections = {"devices": {"runtime": "docker", "docker_url": url, **ranges}}
        house = await House.open(servers, folder / "house", sections, plugins)
        stack.push_async_callback(house.close)
        await _fill(house.app[DATABASE], installation, phones)
        firsts: list[Comparison] = []
        for _ in range(STARTS):
            await house.restart()
            await asyncio.sleep(SETTLE_S)
            firsts.append(await _compare(house))
        await asyncio.sleep(SETTLE_S)  # the engine's "back" has the reconciler compare once more
        laters = [await _compare(house) for _ in range(COMPARISONS)]
        _print_rows(firsts, laters)


def _end(servers: Servers) -> None:
    """Stop them, and leave nothing behind where Ctrl-C met them in the middle of their start. Blocking."""
    try:
        servers.stop()
    finally:
        shutil.rmtree(servers._data_dir, ignore_errors=True)


def _phone(number: int) -> FakePhone:
    ranges = DevicesSection()
    firsts = (ranges.adb_ports[0], ranges.webrtc_ports[0], ranges.scrcpy_ports[0])
    adb, webrtc, scrcpy = (first + number for first in firsts)
    started_at = f"2026-01-02T03:04:05.{number:09}Z"
    return FakePhone(str(uuid4()), secrets.token_hex(32), adb, webrtc, scrcpy, started_at)


async def _fill(database: Database, installation: UUID, phones: Sequence[FakePhone]) -> None:
    """A user each, whose phone runs as the engine says."""
    section = DevicesSection()
    hardware = asdict(Hardware.chosen(ImageSection(name="android-12", kind="simulated"), section.plans[0]))
    async with database.transaction() as tx:
        await tx.execute("UPDATE device_installation SET id = $1", installation)
        owners = [uuid4() for _ in phones]
        await tx.executemany(
            "INSERT INTO users (id, email, email_folded, password_hash) VALUES ($1, $2, $2, '')",
            [(owner, f"{owner.hex}@example.com") for owner in owners],
        )
        await tx.executemany(
            """
            INSERT INTO devices (id, owner_id, name, image, plan, price_per_hour, hardware, state,
                wanted_state, started_at, run)
            VALUES ($1, $2, 'mine', 'android-12', 'basic', 20, $3, 'running', 'running', now(), $4)
            """,
            [
                (UUID(phone.phone), owner, hardware, phone.started_at)
                for phone, owner in zip(phones, owners, strict=True)
            ],
        )
        await tx.execute(
            "INSERT INTO device_meters (device_id, owner_id, price_per_hour, metered_until)"
            " SELECT id, owner_id, price_per_hour, started_at FROM devices"
        )
        await tx.executemany(
            "INSERT INTO device_ports (node, port, role, device_id) VALUES ('local', $1, $2, $3)",
            [
                (port, role, UUID(phone.phone))
                for phone in phones
                for role, port in (("adb", phone.adb), ("webrtc", phone.webrtc), ("scrcpy", phone.scrcpy))
            ],
        )


async def _compare(house: House) -> Comparison:
    before_mb = resident_mb(os.getpid())
    began, began_cpu = time.perf_counter(), time.process_time()
    await house.app[RECONCILER].reconcile()
    wall_s, cpu = time.perf_counter() - began, time.process_time() - began_cpu
    after_mb = resident_mb(os.getpid())
    assert not house.app[RECONCILER].repaired, "the stand-in's phones are not as their rows say"
    assert all(phone.run for phone in await house.app[DEVICES].runtime.list()), "not all were looked at"
    return Comparison(wall_s, cpu, before_mb, after_mb)


def _print_rows(firsts: Sequence[Comparison], laters: Sequence[Comparison]) -> None:
    title = f"{ROWS:,} rows, {ROWS:,} containers"
    print(f"{title:<30}{'wall':>10}{'CPU':>10}{'resident':>14}   (aim: below {AIM_S:g} s)")
    print(f"{'before':<50}{firsts[0].before_mb:>11.1f} MB")
    for name, found in (("first after a start", firsts), ("later", laters)):
        wall_s, cpu = (statistics.median(getattr(one, kind) for one in found) for kind in ("wall_s", "cpu_s"))
        print(f"{name:<30}{wall_s:>8.2f} s{cpu:>8.2f} s{found[-1].after_mb:>11.1f} MB", end="")
        print(f"   median of {len(found)}, at most {max(one.wall_s for one in found):.2f} s", flush=True)
    print(load(), flush=True)


# --- Both ---------------------------------------------------------------------------------------


async def engine_here() -> str:
    """Where this machine's engine answers. Exits where none does."""
    url = machine_url()
    engine = Engine(url)
    try:
        await engine.ping()
    except RuntimeUnavailable as trouble:
        sys.exit(f"starts cannot be measured: {trouble} at {url}")
    finally:
        await engine.close()
    if shutil.which("docker") is None:
        sys.exit("starts cannot be measured: the docker command, which tidies up, is not installed")
    return url


async def main(parts: Sequence[Callable[[], Awaitable[None]]]) -> None:
    """Measure one part after the other."""
    for part in parts:
        await part()


async def starts() -> None:
    """The first part, where there is an engine."""
    await measure_starts(await engine_here())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure what a server adds to an engine's own work.")
    parser.add_argument("--starts", action="store_true", help="bring up 1, 4 and 16 phones at once")
    parser.add_argument("--rows", action="store_true", help="compare 1,000 rows with as many containers")
    chosen = parser.parse_args()
    everything = not (chosen.starts or chosen.rows)
    wanted: list[Callable[[], Awaitable[None]]] = []
    if chosen.starts or everything:
        wanted.append(starts)
    if chosen.rows or everything:
        wanted.append(measure_rows)
    try:
        uvloop.run(main(wanted))
    except KeyboardInterrupt:
        sys.exit(130)
