"""Docker engines for the tests: the machine's own, private ones that may be broken, and a way in between.

The machine's engine belongs to everybody: a test removes what it made there and does nothing to the engine
itself. What ends, stops or loses an engine is done to a `PrivateEngine`, or to a `Proxy` in front of one.
"""

import asyncio
import fcntl
import hashlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NoReturn

import aiohttp
import pytest

from phones import image
from phones.engine import DEFAULT_URL
from phones.processes import Process

ROOT = Path(__file__).parent.parent
HELP = "install docker.io and start it, or run .ci/run, which does both for its time"
TEST_NAME = "cloudphone/simulated-phone"
KEPT = timedelta(days=1)
START_S = 30.0
STOP_S = 30.0
COMMAND_S = 60.0
MARK = "CLOUDPHONE_TEST_ENGINE"
SYS_RESOURCE = 1 << 24
RUNTIME = ROOT / ".ci" / "runc-without-sys-resource"


@dataclass(frozen=True, slots=True)
class Engine:
    """The engine that this machine has. `image` is the name of a phone image built for these tests."""

    url: str
    image: str


def unavailable(reason: str) -> NoReturn:
    """Skip a test for want of what a newcomer may not have; in CI, where all has to be there, fail it."""
    if os.environ.get("CI"):
        pytest.fail(reason)
    pytest.skip(reason)


async def docker(*arguments: str, url: str = "", deadline_s: float = COMMAND_S) -> str:
    """What the `docker` command prints, for a test that acts from outside.

    `url` is the engine's, "" the machine's own. Raises RuntimeError with what it says where it fails, and
    TimeoutError after killing it.
    """
    process = await asyncio.create_subprocess_exec(
        *("docker", "--host", url or machine_url(), *arguments),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(deadline_s):
            out, err = await process.communicate()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode != 0:
        raise RuntimeError(f"docker {' '.join(arguments)}: {err.decode(errors='replace').strip()}")
    return out.decode(errors="replace").strip()


def machine_url() -> str:
    """Where the machine's own engine is looked for."""
    return os.environ.get("DOCKER_HOST") or DEFAULT_URL


# --- The machine's engine -----------------------------------------------------------------------


@pytest.fixture(scope="session")
def engine() -> Engine:
    """The machine's engine, with a phone image that this checkout's sources made."""
    if shutil.which("docker") is None:
        unavailable(f"there is no docker command: {HELP}")
    url = machine_url()
    try:
        _apart(docker("version", deadline_s=10.0))
    except (RuntimeError, TimeoutError) as fault:
        unavailable(f"no Docker engine answers at {url} ({fault}): {HELP}")
    reference = f"{TEST_NAME}:test-{_fingerprint()}"
    # One test process builds, the others wait for it.
    with (Path(tempfile.gettempdir()) / f"cloudphone-image-{os.getuid()}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        _apart(_provide(url, reference))
    return Engine(url, reference)


def _apart(work: Coroutine[Any, Any, None] | Coroutine[Any, Any, str]) -> None:
    """Run in a loop of its own, in a thread, so that the tests' loop stays as it is."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, work).result()


async def _provide(url: str, reference: str) -> None:
    if await docker("image", "ls", "--quiet", reference, url=url):
        return
    await image.build(url, reference, lambda line: None)
    listed = await docker(
        *("image", "ls", "--filter", f"reference={TEST_NAME}:test-*"),
        *("--format", "{{.Repository}}:{{.Tag}}\t{{.CreatedAt}}"),
        url=url,
    )
    for line in listed.splitlines():
        name, _, created = line.partition("\t")
        # 2026-11-25 10:40:39 +0000 UTC
        made_at = datetime.strptime(" ".join(created.split()[:3]), "%Y-%m-%d %H:%M:%S %z")
        # Other checkouts' tests may be under way. The engine itself refuses what a container is made of.
        if datetime.now(UTC) - made_at > KEPT:
            with suppress(RuntimeError):
                await docker("image", "rm", name, url=url)


def _fingerprint() -> str:
    """Another one wherever the image would be another."""
    content = hashlib.sha256(sys.version.encode())
    for source in (*image.sources(), ROOT / "requirements.lock"):
        content.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return content.hexdigest()[:12]


# --- An engine of one's own ---------------------------------------------------------------------


class PrivateEngine:
    """An engine that a test may break. Made by the fixture `private_engine`, which also removes it.

    It has a network namespace of its own. In the machine's, two engines cannot live together: a dockerd
    takes every interface `docker0` and every firewall chain `DOCKER` for its own, and removes them at times.
    Ports are published in the machine's namespace all the same, on 127.0.0.1, as its proxies listen there.
    Its containers do not reach the outside, and `--network host` is its namespace.
    """

    def __init__(self, *, live_restore: bool = False) -> None:
        self.folder = Path(tempfile.mkdtemp(prefix="engine-"))
        self.url = f"unix://{self.folder}/engine.sock"
        self.image = ""
        self.log = self.folder / "log"
        self._namespace = f"eng{secrets.token_hex(5)}"
        self._has_network = False
        self._live_restore = live_restore
        self._process: asyncio.subprocess.Process | None = None

    @property
    def is_running(self) -> bool:
        """Whether its process is there, be it paused."""
        return self._process is not None and self._process.returncode is None

    @property
    def pid(self) -> int:
        """Its process id."""
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Start it, for the first time or again, and wait until it answers; 1-3 s."""
        assert not self.is_running
        # Those of a killed engine still have the ports that this one's are to have.
        await self._end_processes(only="docker-proxy")
        await asyncio.to_thread(self._configure)
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                *("nsenter", f"--net=/run/netns/{self._namespace}"),
                *("setpriv", "--pdeathsig", "TERM"),  # it ends by itself should the tests be killed
                *("dockerd", "--config-file", str(self.folder / "daemon.json")),
                env={**os.environ, MARK: str(self.folder)},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
            )
        async with asyncio.timeout(START_S):
            while not await self._answers():
                assert self.is_running, self.log.read_text()[-2000:]
                await asyncio.sleep(0.05)

    async def load_image(self) -> str:
        """Build a phone image into it; its name, also in `image`."""
        await image.build(self.url, image.DEFAULT_REFERENCE, lambda line: None)
        self.image = image.DEFAULT_REFERENCE
        return self.image

    async def stop(self) -> None:
        """SIGTERM. Without `live_restore` its containers end too."""
        self.resume()
        await self._end(signal.SIGTERM)

    async def kill(self) -> None:
        """SIGKILL; its containers go on, and so do their ports."""
        await self._end(signal.SIGKILL)
        # Whoever reaps orphans may be late, and a dead process's number in such a file stops the next start.
        child = self.folder / "run" / "containerd" / "containerd.pid"
        if child.exists():
            async with asyncio.timeout(STOP_S):
                while Path("/proc", child.read_text().strip(), "exe").exists():
                    await asyncio.sleep(0.01)
        for file in (child, self.folder / "pid"):
            file.unlink(missing_ok=True)

    def pause(self) -> None:
        """SIGSTOP: connections are accepted, and nothing is answered."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        """Go on after `pause`."""
        self._send(signal.SIGCONT)

    async def close(self) -> None:
        """Remove its containers and networks, end everything it started, and remove its folder."""
        try:
            if not self.is_running:
                await self.start()
            self.resume()
            if containers := await docker("ps", "--all", "--quiet", url=self.url):
                await docker("rm", "--force", "--volumes", *containers.split(), url=self.url)
            await docker("network", "prune", "--force", url=self.url)
            await self.stop()
        finally:
            if self.is_running:
                await self._end(signal.SIGKILL)
            await self._end_processes()
            await asyncio.to_thread(self._remove)

    def _configure(self) -> None:
        if self._has_network:
            return
        # Private addresses that hardly anybody has: a link, the default network, and room for eight more.
        first, second = 128 + secrets.randbelow(120), 16 * secrets.randbelow(16)
        self._make_network(f"10.{first}.{second}")
        self._write_settings(f"10.{first}.{second + 1}.1/24", f"10.{first}.{second + 8}.0/21")

    def _make_network(self, link: str) -> None:
        """The namespace, and a way into it, where a docker-proxy outside finds the containers."""
        name = self._namespace
        _ip("netns", "add", name)
        self._has_network = True
        _ip("link", "add", name, "type", "veth", "peer", "name", "eth0", "netns", name)
        _ip("address", "add", f"{link}.1/30", "dev", name)
        _ip("link", "set", name, "up")
        _ip("-n", name, "address", "add", f"{link}.2/30", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        _ip("-n", name, "link", "set", "lo", "up")
        _ip("route", "add", f"{link}.0/20", "via", f"{link}.2")

    def _write_settings(self, default_network: str, other_networks: str) -> None:
        proxy = self.folder / "proxy"
        # An engine's death ends its proxies (PR_SET_PDEATHSIG). Elsewhere a firewall's rules keep the ports
        # of its phones open then; here, where there are none, the proxies have to stay.
        proxy.write_text(
            f"#!/bin/sh\nexec setpriv --pdeathsig clear nsenter --net=/proc/{os.getpid()}/ns/net"
            f' {shutil.which("docker-proxy")} "$@"\n'
        )
        proxy.chmod(0o755)
        settings: dict[str, object] = {
            "hosts": [self.url],
            "data-root": str(self.folder / "data"),
            "exec-root": str(self.folder / "run"),
            "pidfile": str(self.folder / "pid"),
            "live-restore": self._live_restore,
            "shutdown-timeout": 3,
            "iptables": False,
            "ip-masq": False,
            "userland-proxy-path": str(proxy),
            "bip": default_network,
            "default-address-pools": [{"base": other_networks, "size": 24}],
        }
        if not _capabilities() & SYS_RESOURCE:
            settings |= {"runtimes": {"lesser": {"path": str(RUNTIME)}}, "default-runtime": "lesser"}
        (self.folder / "daemon.json").write_text(json.dumps(settings))

    async def _answers(self) -> bool:
        connector = aiohttp.UnixConnector(self.url.removeprefix("unix://"))
        with suppress(aiohttp.ClientError, OSError, TimeoutError):
            async with (
                asyncio.timeout(1),
                aiohttp.ClientSession(connector=connector) as session,
                session.get("http://engine/_ping") as answer,
            ):
                return answer.status == 200
        return False

    def _send(self, number: signal.Signals) -> None:
        if self.is_running:
            assert self._process is not None
            self._process.send_signal(number)

    async def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._send(number)
            async with asyncio.timeout(STOP_S):
                await self._process.wait()

    async def _end_processes(self, only: str = "") -> None:
        """SIGKILL for what it started and left, or of that for the programs of one name."""
        for process in await asyncio.to_thread(self._left, only):
            process.watch(lambda: None)
            process.send(signal.SIGKILL)
            async with asyncio.timeout(STOP_S):
                await process.ended.wait()

    def _left(self, only: str) -> list[Process]:
        """Its processes, each held. They are known by their environment; containers', by their parent."""
        mark = f"{MARK}={self.folder}".encode()
        found: dict[int, Process] = {}
        others: list[Process] = []
        for entry in Path("/proc").iterdir():
            if not entry.name.isdecimal():
                continue
            with suppress(OSError):
                process = Process(int(entry.name))
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    found[process.pid] = process
                else:
                    others.append(process)
        for process in others:
            with suppress(OSError):
                parent = int(Path(f"/proc/{process.pid}/stat").read_text().rpartition(")")[2].split()[1])
                if parent in found:
                    found[process.pid] = process
                    continue
            process.let_go()
        wanted = [process for process in found.values() if not only or _program(process.pid) == only]
        for process in found.values():
            if process not in wanted:
                process.let_go()
        return wanted

    def _remove(self) -> None:
        if self._has_network:
            _ip("netns", "delete", self._namespace)
        mounted = [line.split()[1] for line in Path("/proc/self/mounts").read_text().splitlines()]
        for place in sorted(mounted, reverse=True):
            if place.startswith(f"{self.folder}/"):
                subprocess.run(["umount", "--lazy", place], check=True, timeout=STOP_S)
        shutil.rmtree(self.folder)


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True, timeout=COMMAND_S)


def _program(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/exe").readlink().name
    except OSError:
        return ""


def _capabilities() -> int:
    """What this process may do, as bits (capabilities(7))."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines["CapEff"], 16)


StartEngine = Callable[..., Awaitable[PrivateEngine]]


@pytest.fixture
async def private_engine() -> AsyncIterator[StartEngine]:
    """Start engines of one's own: `await private_engine(live_restore=True)`."""
    lacking = [
        name
        for name in ("dockerd", "docker", "docker-proxy", "ip", "nsenter", "setpriv")
        if shutil.which(name) is None
    ]
    if lacking:
        unavailable(f"there is no {lacking[0]}: install docker.io and iproute2, or run .ci/run, which does")
    if os.geteuid() != 0:
        unavailable("only root can start an engine of its own: run the tests as root")
    engines: list[PrivateEngine] = []

    async def start_one(*, live_restore: bool = False) -> PrivateEngine:
        engine = PrivateEngine(live_restore=live_restore)
        engines.append(engine)
        await engine.start()
        return engine

    yield start_one
    for engine in engines:
        await engine.close()


# --- Between a client and an engine -------------------------------------------------------------


class Proxy:
    """A socket in front of an engine's that can fail as networks do. Made with `Proxy.started(url)`."""

    def __init__(self, upstream: str, path: Path) -> None:
        self.url = f"unix://{path}"
        self._path = path
        self._upstream = upstream
        self._server: asyncio.Server | None = None
        self._is_hanging = False
        self._connections: set[asyncio.Task[None]] = set()
        self._spoilt: set[asyncio.Task[None]] = set()

    @classmethod
    @asynccontextmanager
    async def started(cls, url: str) -> AsyncIterator["Proxy"]:
        """A proxy before the engine at `url`, a unix:// one, until the block ends."""
        folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="proxy-"))
        proxy = cls(url.removeprefix("unix://"), folder / "engine.sock")
        try:
            await proxy.heal()
            yield proxy
        finally:
            await proxy.refuse()
            await asyncio.to_thread(shutil.rmtree, folder)

    def hang(self) -> None:
        """Take every connection and every byte from now on, and pass nothing on, in neither direction."""
        self._is_hanging = True

    async def refuse(self) -> None:
        """Close every connection and refuse new ones."""
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._end(self._connections)

    async def heal(self) -> None:
        """Pass everything on again. Connections that lost something meanwhile are closed."""
        self._is_hanging = False
        await self._end(self._spoilt)
        if self._server is None:
            self._server = await asyncio.start_unix_server(self._serve, self._path)

    async def _end(self, connections: set[asyncio.Task[None]]) -> None:
        ending = [*connections]
        for connection in ending:
            connection.cancel()
        await asyncio.gather(*ending, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = asyncio.current_task()
        assert connection is not None
        self._connections.add(connection)
        writers = [writer]
        try:
            if self._is_hanging:
                await self._swallow(connection, reader)
            engine_reader, engine_writer = await asyncio.open_unix_connection(self._upstream)
            writers.append(engine_writer)
            async with asyncio.TaskGroup() as both:
                both.create_task(self._pass_on(connection, reader, engine_writer))
                both.create_task(self._pass_on(connection, engine_reader, writer))
        except* OSError:
            pass  # an end has gone, and so does the other
        finally:
            self._connections.discard(connection)
            self._spoilt.discard(connection)
            for each in writers:
                each.close()

    async def _pass_on(
        self, connection: asyncio.Task[None], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        while read := await reader.read(1 << 16):
            if self._is_hanging:
                break
            writer.write(read)
            await writer.drain()
        if self._is_hanging:
            await self._swallow(connection, reader)
        writer.write_eof()

    async def _swallow(self, connection: asyncio.Task[None], reader: asyncio.StreamReader) -> NoReturn:
        """Read on and tell nobody, until this connection is ended."""
        self._spoilt.add(connection)
        while await reader.read(1 << 16):
            pass
        await asyncio.Event().wait()
        raise AssertionError("nobody sets this event")
