"""The door to a Docker engine: what we ask of one, with a deadline on every call.

Whatever goes wrong is a RuntimeFault: `RuntimeUnavailable` when the engine is away, hung or ending, so
that the call may be made again, `NotThere` and `NameTaken` for what its name says, `PortTaken` for a host
port, and a plain fault with the engine's own words for the rest.
"""

import asyncio
import json
import re
import socket
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Final

import aiohttp
from aiodocker import Docker, DockerError
from yarl import URL

from phones.host import ENGINE_SOCKET
from phones.runtime import MachineFault, PortTaken, RuntimeFault, RuntimeUnavailable

DEFAULT_URL: Final = f"unix://{ENGINE_SOCKET}"
CONNECT_DEADLINE_S: Final = 3.0
PING_DEADLINE_S: Final = 3.0
ASK_DEADLINE_S: Final = 10.0
ACT_DEADLINE_S: Final = 45.0
"""For what the engine does to a container: a start takes seconds on a busy machine."""
PULL_STALL_S: Final = 120.0

_MAX_REASON = 300
_PORT_TAKEN = re.compile(r":(\d+)(?: failed: port is already allocated|: bind: address already in use)")
# What an engine says while it goes down, or when its containerd has gone before it.
_ENDING = re.compile(
    r"shutting down|transport is closing|context canceled|containerd\.sock|grpc: the client|database not open"
)
# What an engine says when it does not reach a registry, and when a program does not start.
_UNREACHED = re.compile(r'(?:Get|Head) "https?://([^/"]+)[^"]*": (?:.*: )?(.+)')
_UNSTARTED = re.compile(
    r".*OCI runtime create failed: (?:.*container process(?: caused)?: )?(.*?)(?:: unknown)?"
)
_NO_CONNECTION = 900  # aiodocker's own number


class NotThere(RuntimeFault):
    """The engine has no container, image, volume or network of this name."""


class NameTaken(RuntimeFault):
    """The name is in use, or what bore it is just being removed."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What an engine says of itself and its machine."""

    version: str
    cgroup_version: str
    live_restore: bool
    cpus: int
    memory_bytes: int
    data_root: str
    missing_images: tuple[str, ...]


class Engine:
    """One Docker engine. Opens its connections when first asked; `close` it at the end."""

    def __init__(self, url: str) -> None:
        """`url` is unix://, tcp://, http:// or https://; empty for the local engine's socket."""
        self.url: Final = url or DEFAULT_URL
        self._docker: Docker | None = None
        self._connector: aiohttp.BaseConnector | None = None

    @property
    def is_local(self) -> bool:
        """Whether the engine is reached over a socket of this machine."""
        return self.url.startswith("unix://")

    async def close(self) -> None:
        """Close every connection; streams end."""
        docker, connector = self._docker, self._connector
        self._docker = self._connector = None
        if docker is not None and connector is not None:
            try:
                async with asyncio.timeout(CONNECT_DEADLINE_S):
                    await docker.close()
            except (aiohttp.ClientError, DockerError, TimeoutError, OSError):
                # What a broken stream still had to say; the connection is closed all the same.
                await docker.session.close()
            await connector.close()

    def _client(self) -> Docker:
        if self._docker is None:
            # No limit: every stream of statistics holds a connection, and a call must never wait for one.
            timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_DEADLINE_S)
            if self.is_local:
                self._connector = aiohttp.UnixConnector(self.url.removeprefix("unix://"), limit=0)
                address = "unix://localhost"
            else:
                self._connector = aiohttp.TCPConnector(limit=0, socket_factory=_kept_alive)
                address = re.sub(r"^tcp://", "http://", self.url)
            self._docker = Docker(address, connector=self._connector, timeout=timeout)
        return self._docker

    # The engine itself

    async def ping(self) -> None:
        """Raises RuntimeUnavailable unless the engine answers in time."""
        async with _asking("answer", PING_DEADLINE_S):
            # aiodocker has no call for it; /version asks containerd too and takes ten times as long.
            await self._client()._query_json("_ping", versioned_api=False)

    async def survey(self, references: Sequence[str]) -> Survey:
        """What the engine says of itself, and which of these images it lacks."""
        async with _asking("describe itself", ASK_DEADLINE_S):
            told = await self._client().system.info()
        return Survey(
            version=told["ServerVersion"],
            cgroup_version=str(told.get("CgroupVersion", "1")),
            live_restore=bool(told["LiveRestoreEnabled"]),
            cpus=int(told["NCPU"]),
            memory_bytes=int(told["MemTotal"]),
            data_root=told["DockerRootDir"],
            missing_images=tuple(
                [name for name in dict.fromkeys(references) if not await self.has_image(name)]
            ),
        )

    async def events(self, label: str) -> AsyncIterator[dict[str, Any]]:
        """What happens to containers with this label, from now on; ends when the engine does.

        The first event is an empty one: from then on nothing is missed. Raises RuntimeUnavailable.
        """
        params = {"filters": json.dumps({"type": ["container"], "label": [label]})}
        with _translated("report what happens"):
            async with asyncio.timeout(ASK_DEADLINE_S):
                response = await self._client()._do_query("events", "GET", params=params)
            async with _lines_of(response) as events:
                yield {}
                async for event in events:
                    yield event

    # Containers

    async def create(self, name: str, config: Mapping[str, Any]) -> None:
        """Create a container. Raises NameTaken, NotThere where its image is missing."""
        async with _asking("create the container", ACT_DEADLINE_S):
            await self._client().containers.create(dict(config), name=name)

    async def start(self, name: str) -> None:
        """Start a container; one that runs is no error. Raises NotThere, PortTaken."""
        async with _asking("start the container", ACT_DEADLINE_S):
            await self._client().containers.container(name).start()

    async def stop(self, name: str, grace_s: int) -> None:
        """Stop a container, with SIGKILL after the grace; one that is down is no error. Raises NotThere."""
        async with _asking("stop the container", ACT_DEADLINE_S + grace_s):
            await self._client().containers.container(name).stop(t=grace_s)

    async def unpause(self, name: str) -> None:
        """Let a paused container go on."""
        async with _asking("unpause the container", ACT_DEADLINE_S):
            await self._client().containers.container(name).unpause()

    async def wait(self, name: str, deadline_s: float) -> int:
        """The exit code of a container once it has ended."""
        async with _asking("finish", deadline_s):
            return int((await self._client().containers.container(name).wait())["StatusCode"])

    async def delete(self, name: str) -> None:
        """Kill and delete a container; one that is not there, or about to go, is no error."""
        try:
            async with _asking("delete the container", ACT_DEADLINE_S):
                await self._client().containers.container(name).delete(force=True)
        except (NotThere, NameTaken):
            return

    async def inspect(self, name: str) -> dict[str, Any] | None:
        """All the engine knows of a container."""
        try:
            async with _asking("describe the container", ASK_DEADLINE_S):
                return await self._client().containers.container(name).show()
        except NotThere:
            return None

    async def containers(self, *labels: str) -> list[dict[str, Any]]:
        """The containers that have all these labels, running or not, in short."""
        # Asked directly: aiodocker makes an object of each, with the same content behind it.
        params: dict[str, Any] = {"all": True, "filters": json.dumps({"label": list(labels)})}
        async with _asking("list containers", ASK_DEADLINE_S):
            found: list[dict[str, Any]] = await self._client()._query_json("containers/json", params=params)
        return found

    async def update(self, name: str, limits: Mapping[str, Any]) -> None:
        """Change a container's limits."""
        async with _asking("change the container's limits", ACT_DEADLINE_S):
            # aiodocker has no call for it.
            await self._client()._query_json(f"containers/{name}/update", "POST", data=dict(limits))

    async def logs(self, name: str, lines: int) -> list[str]:
        """The last lines a container printed."""
        async with _asking("read the container's log", ASK_DEADLINE_S):
            printed = (
                await self._client().containers.container(name).log(stdout=True, stderr=True, tail=lines)
            )
        return "".join(printed).splitlines()

    async def stats(self, name: str) -> AsyncIterator[dict[str, Any]]:
        """What a container uses, once a second; ends with the container. Raises NotThere."""
        with _translated("measure the container"):
            async for sample in self._client().containers.container(name).stats(stream=True):
                yield sample

    # Images, volumes, networks

    async def has_image(self, reference: str) -> bool:
        """Whether the engine has the image."""
        try:
            async with _asking("look for the image", ASK_DEADLINE_S):
                await self._client().images.inspect(reference)
        except NotThere:
            return False
        return True

    async def pull(self, reference: str) -> AsyncIterator[int]:
        """Fetch an image from its registry; yields the percentage that is there whenever that rises.

        Raises RuntimeFault with the registry's reason, or when nothing moves for a while.
        """
        params = {"fromImage": reference}
        if "@" not in reference and ":" not in reference.rpartition("/")[2]:
            params["tag"] = "latest"  # none stands for all of them
        progress, percent = _Progress(), 0
        with _translated("fetch the image"):
            async with _moving():
                response = await self._client()._do_query("images/create", "POST", params=params)
            async with _lines_of(response) as steps:
                while True:
                    async with _moving():
                        step = await anext(steps, None)
                    if step is None:
                        return
                    if "error" in step:
                        raise DockerError(500, step["error"])
                    there = progress.after(step)
                    if there > percent:
                        percent = there
                        yield percent

    async def create_volume(self, name: str, labels: Mapping[str, str]) -> dict[str, str]:
        """Make a volume, or find it; the labels it has, which are those it was first made with."""
        async with _asking("make the volume", ACT_DEADLINE_S):
            volume = await self._client().volumes.create({"Name": name, "Labels": dict(labels)})
            return dict((await volume.show()).get("Labels") or {})

    async def volume_labels(self, name: str) -> dict[str, str] | None:
        """The labels of a volume; None where there is none."""
        try:
            async with _asking("describe the volume", ASK_DEADLINE_S):
                volume = await self._client().volumes.get(name)
                return dict((await volume.show()).get("Labels") or {})
        except NotThere:
            return None

    async def delete_volume(self, name: str) -> None:
        """Delete a volume with its data; one that is not there is no error."""
        try:
            async with _asking("delete the volume", ACT_DEADLINE_S):
                await (await self._client().volumes.get(name)).delete()
        except NotThere:
            return

    async def network(self, name: str) -> dict[str, Any] | None:
        """What the engine knows of a network."""
        try:
            async with _asking("describe the network", ASK_DEADLINE_S):
                return await (await self._client().networks.get(name)).show()
        except NotThere:
            return None

    async def create_network(self, config: Mapping[str, Any]) -> None:
        """Make a network; one of the same name is no error."""
        try:
            async with _asking("make the network", ACT_DEADLINE_S):
                await self._client().networks.create(dict(config))
        except NameTaken:
            return


class _Progress:
    """How much of an image is there. A layer's size is told when it begins to arrive."""

    def __init__(self) -> None:
        self._layers: dict[str, tuple[int, int]] = {}  # bytes that are there, and all of them

    def after(self, step: Mapping[str, Any]) -> int:
        """The percentage, once this is told; until then a layer counts as one of middling size."""
        status, layer, size = step.get("status"), step.get("id", ""), step.get("progressDetail") or {}
        if status == "Pulling fs layer":
            self._layers[layer] = (0, 0)
        elif status == "Downloading" and size.get("total"):
            self._layers[layer] = (size["current"], size["total"])
        elif status in {"Download complete", "Pull complete"} and layer in self._layers:
            _, whole = self._layers.pop(layer)
            if whole:
                self._layers[layer] = (whole, whole)
        sizes = [whole for _, whole in self._layers.values() if whole]
        there = sum(part for part, _ in self._layers.values())
        return 100 * there * len(sizes) // (sum(sizes) * len(self._layers)) if sizes else 0


async def survey(url: str, references: Sequence[str]) -> Survey:
    """What an engine says of itself, over a connection of its own. Raises RuntimeUnavailable."""
    engine = Engine(url)
    try:
        await engine.ping()
        return await engine.survey(references)
    finally:
        await engine.close()


@asynccontextmanager
async def _lines_of(response: aiohttp.ClientResponse) -> AsyncIterator[AsyncIterator[dict[str, Any]]]:
    """An answer's JSON lines as they come. At the end of the block the engine sees that nobody listens.

    aiodocker's own streams hide why they ended, and hold the connection until they are collected.
    """

    async def lines() -> AsyncIterator[dict[str, Any]]:
        async for line in response.content:
            yield json.loads(line)

    try:
        yield lines()
    finally:
        response.close()


@asynccontextmanager
async def _moving() -> AsyncIterator[None]:
    """Raises RuntimeFault where a pull does not come one step further."""
    try:
        async with asyncio.timeout(PULL_STALL_S):
            yield
    except TimeoutError:
        raise RuntimeFault(f"nothing arrived for {PULL_STALL_S:g} s") from None


@asynccontextmanager
async def _asking(what: str, deadline_s: float) -> AsyncIterator[None]:
    with _translated(what):
        try:
            async with asyncio.timeout(deadline_s):
                yield
        except TimeoutError:
            raise RuntimeUnavailable(f"the Docker engine did not {what} within {deadline_s:g} s") from None


@contextmanager
def _translated(what: str) -> Iterator[None]:
    try:
        yield
    except DockerError as error:
        raise _fault(error, what) from None
    except TimeoutError:
        raise RuntimeUnavailable(f"the Docker engine did not {what} in time") from None
    except (aiohttp.ClientError, OSError):
        raise RuntimeUnavailable(f"the Docker engine broke off; it was to {what}") from None


def _fault(error: DockerError, what: str) -> RuntimeFault:
    text = _reason(error.message)
    if error.status == _NO_CONNECTION:
        denied = "Permission denied" in text
        return RuntimeUnavailable(
            "this user may not use the Docker engine" if denied else "no Docker engine answers"
        )
    if error.status == 404:
        return NotThere(text)
    if error.status == 409:
        return NameTaken(text)
    if taken := _PORT_TAKEN.search(error.message):
        return PortTaken(int(taken[1]))
    if error.status >= 500 and _ENDING.search(text):
        return RuntimeUnavailable(f"the Docker engine is going down; it was to {what}")
    return MachineFault(text) if error.status >= 500 else RuntimeFault(text)


def _reason(message: str) -> str:
    """An engine's words in one line, without the way they took through its parts."""
    text = " ".join(message.split())
    if unreached := _UNREACHED.fullmatch(text):
        text = ": ".join(unreached.groups())
    elif unstarted := _UNSTARTED.fullmatch(text):
        text = unstarted[1]
    return text[:_MAX_REASON]


def _kept_alive(address: tuple[Any, ...]) -> socket.socket:
    """A socket that notices within seconds when the engine's machine is cut off."""
    family, kind, protocol, *_ = address
    made = socket.socket(family, kind, protocol)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 5)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 2)
    made.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, 8000)
    return made


def host_of(url: str) -> str:
    """The machine that an engine is on, where that is another one; empty for this one."""
    if not url or url.startswith("unix://"):
        return ""
    name = URL(url).host or ""
    try:
        is_here = ip_address(name).is_loopback
    except ValueError:
        is_here = name in {"", "localhost"}
    return "" if is_here else name
