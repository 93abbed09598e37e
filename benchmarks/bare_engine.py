"""Phones' containers over an engine's API and nothing else, to hold against what a server makes of it.

`python -m benchmarks.bare_engine` reads a `Job` as JSON from standard input and prints a `Result` as JSON.
For each container: make its volume, create it, start it, a few at once; then ask the phone in it over ADB
until Android is up, with the pauses between two questions that the server makes.
"""

import asyncio
import json
import sys
import time
from contextlib import AsyncExitStack
from dataclasses import asdict, dataclass
from typing import Any, Final

import aiohttp
import uvloop

from phones.adb import AdbClient, AdbFault

DEADLINE_S: Final = 240.0
_ASK_DEADLINE_S: Final = 5.0


@dataclass(frozen=True, slots=True)
class Container:
    """What to make. `config` is the body of the engine's call; its phone's ADB answers on `adb_port`."""

    name: str
    volume: dict[str, Any]
    config: dict[str, Any]
    adb_port: int


@dataclass(frozen=True, slots=True)
class Job:
    """All containers, so many `at_once`. The pauses between two questions double from first to last."""

    url: str
    at_once: int
    first_pause_s: float
    last_pause_s: float
    containers: list[Container]


@dataclass(frozen=True, slots=True)
class Result:
    """From the first call until every phone is up, and the processor time of this process meanwhile."""

    wall_s: float
    cpu_s: float


class _Bare:
    def __init__(self, job: Job, engine: aiohttp.ClientSession, base: str) -> None:
        self._job = job
        self._engine = engine
        self._base = base
        self._turn = asyncio.Semaphore(job.at_once)

    async def bring_up(self, container: Container) -> None:
        async with self._turn:
            await self._post("/volumes/create", container.volume)
            await self._post(f"/containers/create?name={container.name}", container.config)
            await self._post(f"/containers/{container.name}/start")
        await self._booted(container.adb_port)

    async def _post(self, path: str, body: object = None) -> None:
        async with self._engine.post(self._base + path, json=body) as answer:
            said = await answer.read()
            if answer.status >= 300:
                raise RuntimeError(f"{path}: {answer.status} {said[:300]!r}")

    async def _booted(self, port: int) -> None:
        pause_s = self._job.first_pause_s
        async with AsyncExitStack() as stack:
            phone: AdbClient | None = None
            while True:
                try:
                    if phone is None or phone.closed:
                        connecting = AdbClient.connect("127.0.0.1", port, _ASK_DEADLINE_S)
                        phone = await stack.enter_async_context(await connecting)
                    answer = await phone.shell("getprop sys.boot_completed", timeout_s=_ASK_DEADLINE_S)
                    if answer.stdout.strip() == b"1":
                        return
                except AdbFault:
                    pass
                await asyncio.sleep(pause_s)
                pause_s = min(2 * pause_s, self._job.last_pause_s)


def door(url: str) -> tuple[str, aiohttp.BaseConnector]:
    """How an engine at unix://PATH, tcp://HOST:PORT or http://HOST:PORT is called."""
    scheme, _, place = url.partition("://")
    if scheme == "unix":
        return "http://engine", aiohttp.UnixConnector(place, limit=0)
    return f"http://{place}", aiohttp.TCPConnector(limit=0)


async def drive(job: Job) -> Result:
    """Do the job; what was made stays."""
    base, connector = door(job.url)
    async with asyncio.timeout(DEADLINE_S), aiohttp.ClientSession(connector=connector) as engine:
        bare = _Bare(job, engine, base)
        began, began_cpu = time.perf_counter(), time.process_time()
        async with asyncio.TaskGroup() as group:
            for container in job.containers:
                group.create_task(bare.bring_up(container))
        return Result(time.perf_counter() - began, time.process_time() - began_cpu)


async def drive_apart(job: Job) -> Result:
    """Do the job in a process of its own, whose processor time is its own too."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "benchmarks.bare_engine"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(2 * DEADLINE_S):
            out, _ = await process.communicate(json.dumps(asdict(job)).encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise RuntimeError(f"the bare side ended with {process.returncode}")
    return Result(**json.loads(out))


def _read() -> Job:
    told = json.load(sys.stdin)
    return Job(**told | {"containers": [Container(**one) for one in told["containers"]]})


if __name__ == "__main__":
    print(json.dumps(asdict(uvloop.run(drive(_read())))))
