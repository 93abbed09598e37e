"""Stands in for a Docker engine with more containers than a benchmark could start.

`python -m benchmarks.fake_engine SOCKET` reads a `Crowd` as JSON from standard input, says "ready" and
listens on the Unix socket SOCKET until it is killed. Its containers all run and nothing ever happens to
them. What it says of each is what dockerd 20.10.24 said of a simulated phone's container (`recorded.json`),
under that phone's ids, ports and start, so that an answer is as long as a real one.

It answers what `phones.docker.DockerRuntime` asks when it looks and does nothing: `_ping`, `version`, `info`,
`containers/json` with label filters, `containers/{id or name}/json`, and `events`, which stay silent. All
else is 404. It keeps every answer ready: what is measured against it is the asker. A real engine takes
longer, about 1 ms to describe a container.
"""

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from string import Template
from typing import Any, Final

import uvloop
from aiohttp import web

RECORDED: Final = Path(__file__).with_name("recorded.json")
VERSION: Final = {"Version": "20.10.24", "ApiVersion": "1.41", "MinAPIVersion": "1.12"}
SURVEY: Final = {
    "ServerVersion": "20.10.24",
    "CgroupVersion": "2",
    "LiveRestoreEnabled": True,
    "NCPU": 64,
    "MemTotal": 1 << 40,
    "DockerRootDir": "/var/lib/docker",
}
START_DEADLINE_S: Final = 30.0


@dataclass(frozen=True, slots=True)
class FakePhone:
    """One running container. `started_at` is as an engine writes it."""

    phone: str
    container: str
    adb: int
    webrtc: int
    scrcpy: int
    started_at: str


@dataclass(frozen=True, slots=True)
class Crowd:
    """Everything that the engine has."""

    installation: str
    phones: list[FakePhone]


@dataclass(frozen=True, slots=True)
class _Container:
    labels: frozenset[str]
    listed: bytes
    inspected: bytes


class FakeEngine:
    """The answers."""

    def __init__(self, crowd: Crowd) -> None:
        recorded = json.loads(RECORDED.read_text())
        listed, inspected = (Template(_compact(recorded[part])) for part in ("listed", "inspected"))
        self._containers: list[_Container] = []
        self._by_name: dict[str, _Container] = {}
        for phone in crowd.phones:
            values = asdict(phone) | {
                "installation": crowd.installation,
                "short": crowd.installation[:8],
                "short_phone": phone.phone[:8],
                "short_container": phone.container[:12],
            }
            in_short = listed.substitute(values)
            container = _Container(
                frozenset(f"{name}={value}" for name, value in json.loads(in_short)["Labels"].items()),
                in_short.encode(),
                inspected.substitute(values).encode(),
            )
            self._containers.append(container)
            self._by_name[phone.container] = container
            self._by_name[json.loads(in_short)["Names"][0].removeprefix("/")] = container

    def app(self) -> web.Application:
        """The engine's API, so far as it goes."""
        app = web.Application()
        app.router.add_get("/_ping", self._ping)
        for prefix in ("", r"/v{version:\d+\.\d+}"):
            app.router.add_get(f"{prefix}/version", self._version)
            app.router.add_get(f"{prefix}/info", self._info)
            app.router.add_get(f"{prefix}/events", self._events)
            app.router.add_get(f"{prefix}/containers/json", self._list)
            app.router.add_get(f"{prefix}/containers/{{name}}/json", self._inspect)
        return app

    async def _ping(self, _request: web.Request) -> web.Response:
        return web.Response(text="OK")

    async def _version(self, _request: web.Request) -> web.Response:
        return web.json_response(VERSION)

    async def _info(self, _request: web.Request) -> web.Response:
        return web.json_response(SURVEY)

    async def _list(self, request: web.Request) -> web.Response:
        wanted = frozenset(json.loads(request.query.get("filters", "{}")).get("label", ()))
        found = [one.listed for one in self._containers if wanted <= one.labels]
        return _answer(b"[" + b",".join(found) + b"]")

    async def _inspect(self, request: web.Request) -> web.Response:
        container = self._by_name.get(request.match_info["name"])
        if container is None:
            return web.json_response({"message": "No such container"}, status=404)
        return _answer(container.inspected)

    async def _events(self, request: web.Request) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Type": "application/json"})
        await response.prepare(request)
        await asyncio.Event().wait()
        return response


def _compact(value: Mapping[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))


def _answer(body: bytes) -> web.Response:
    return web.Response(body=body, content_type="application/json")


async def serve(socket: str, crowd: Crowd) -> None:
    """Answer for ever."""
    runner = web.AppRunner(FakeEngine(crowd).app(), access_log=None)
    await runner.setup()
    await web.UnixSite(runner, socket).start()
    print("ready", flush=True)
    await asyncio.Event().wait()


@asynccontextmanager
async def fake_engine(folder: Path, installation: str, phones: Sequence[FakePhone]) -> AsyncIterator[str]:
    """Such an engine in a process of its own; its URL. Its socket is in `folder`."""
    socket = folder / "engine.sock"
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "benchmarks.fake_engine", str(socket)),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    assert process.stdin is not None
    assert process.stdout is not None
    try:
        async with asyncio.timeout(START_DEADLINE_S):
            process.stdin.write(json.dumps(asdict(Crowd(installation, list(phones)))).encode())
            process.stdin.close()
            if await process.stdout.readline() != b"ready\n":
                raise RuntimeError("the stand-in for an engine did not start")
        yield f"unix://{socket}"
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


def _read() -> Crowd:
    told = json.load(sys.stdin)
    return Crowd(told["installation"], [FakePhone(**phone) for phone in told["phones"]])


if __name__ == "__main__":
    uvloop.run(serve(sys.argv[1], _read()))
