"""`python -m server` as a process of its own, on embedded defaults, as a newcomer starts it."""

import asyncio
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

from tests.house import remove_phones, to_toml
from tests.servers import cluster_of

ROOT = Path(__file__).parent.parent
START_DEADLINE_S = 60.0


def free_port() -> int:
    """A port to start on again and again, below those the system hands out by itself."""
    for port in range(18000 + os.getpid() % 1000, 20000):
        with socket.socket() as probe:
            try:
                probe.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise RuntimeError("no free port")


class ServerProcess:
    """A server with a data_dir of its own. Errors and log lines go to `data_dir/../server.log`."""

    def __init__(self, folder: Path, **variables: str) -> None:
        self.folder = folder
        self.data_dir = folder / "data"
        self.log = folder / "server.log"
        self.url = ""
        self.greeting = ""
        self._process: asyncio.subprocess.Process | None = None
        self._variables = variables

    @property
    def pid(self) -> int:
        """The server's process id."""
        assert self._process is not None
        return self._process.pid

    async def start(self) -> None:
        """Start, and wait until it says that it is ready."""
        await self.launch()
        assert self._process is not None
        assert self._process.stdout is not None
        async with asyncio.timeout(START_DEADLINE_S):
            line = (await self._process.stdout.readline()).decode()
            self.greeting = line + (await self._process.stdout.readline()).decode()
        assert "ready" in line, f"{line!r}\n{await asyncio.to_thread(self.log.read_text)}"
        self.url = line.split()[-1]

    async def launch(self, *arguments: str) -> None:
        """Start without waiting."""
        environment = {
            name: value for name, value in os.environ.items() if not name.startswith("CLOUDPHONE_")
        }
        with self.log.open("ab") as log:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable,
                *("-m", "server", "--config", str(self.folder / "config.toml"), *arguments),
                cwd=ROOT,
                env={**environment, **self._variables},
                stdin=asyncio.subprocess.DEVNULL,
                stdout=asyncio.subprocess.PIPE,
                stderr=log,
            )

    async def wait(self, deadline_s: float = START_DEADLINE_S) -> int:
        """The exit code, once it ends."""
        assert self._process is not None
        async with asyncio.timeout(deadline_s):
            return await self._process.wait()

    async def kill(self) -> None:
        """kill -9."""
        assert self._process is not None
        self._process.kill()
        await self.wait()

    async def stop(self) -> int:
        """SIGTERM; the exit code."""
        assert self._process is not None
        if self._process.returncode is None:
            self._process.send_signal(signal.SIGTERM)
        return await self.wait()


@asynccontextmanager
async def server_process(
    sections: dict[str, dict[str, object]], **variables: str
) -> AsyncIterator[ServerProcess]:
    """A server process, not yet started; whatever it leaves behind is removed."""
    folder = Path(await asyncio.to_thread(tempfile.mkdtemp, prefix="cloudphone-"))
    folder.chmod(0o711)  # the private PostgreSQL of a server run by root runs as nobody
    lines = [f"{name} = {to_toml(section)}\n" for name, section in sections.items()]
    (folder / "config.toml").write_text("".join(lines))
    server = ServerProcess(folder, **variables)
    try:
        yield server
    finally:
        if server._process is not None and server._process.returncode is None:
            await server.stop()
        await remove_phones(server.data_dir)
        await asyncio.to_thread(_remove, server)


def _remove(server: ServerProcess) -> None:
    if (server.data_dir / "postgres.json").exists():
        cluster = cluster_of(server.data_dir)
        if cluster.parent != server.data_dir:
            shutil.rmtree(cluster.parent)
    shutil.rmtree(server.folder)
