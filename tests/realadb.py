"""The genuine `adb` program with a server of its own, for tests that must hold for what users run."""

import asyncio
import importlib.util
import os
import shutil
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

_START_S = 10.0
_STOP_S = 5.0


def adb_binary() -> str:
    """The `adb` of the adbutils wheel, or else the one on PATH."""
    package = importlib.util.find_spec("adbutils")
    for folder in (package.submodule_search_locations or []) if package else []:
        bundled = Path(folder) / "binaries" / "adb"
        if os.access(bundled, os.X_OK):
            return str(bundled)
    on_path = shutil.which("adb")
    assert on_path, "no adb: neither in the adbutils wheel nor on PATH"
    return on_path


class RealAdb:
    """Runs `adb` commands against a private adb server. Make it with `RealAdb.started(tmp_path)`."""

    def __init__(self, binary: str, environment: dict[str, str]) -> None:
        self.binary = binary
        self.environment = environment

    @classmethod
    @asynccontextmanager
    async def started(cls, home: Path) -> AsyncIterator["RealAdb"]:
        """An adb with its own server, port and HOME under `home`; its server ends with the block."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        own_home = home / "adb-home"
        await asyncio.to_thread(own_home.mkdir, exist_ok=True)
        environment = os.environ | {
            "HOME": str(own_home),
            "ANDROID_ADB_SERVER_PORT": str(port),
            # Neither emulators nor phones of this network are wanted.
            "ADB_LOCAL_TRANSPORT_MAX_PORT": "5554",
            "ADB_MDNS": "0",
        }
        environment.pop("ANDROID_SERIAL", None)
        adb = cls(await asyncio.to_thread(adb_binary), environment)
        server = await asyncio.create_subprocess_exec(
            *(adb.binary, "nodaemon", "server"),
            env=environment,
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
        )
        try:
            await _wait_for(port)
            yield adb
        finally:
            await adb._stop(server)

    async def _stop(self, server: asyncio.subprocess.Process) -> None:
        try:
            async with asyncio.timeout(_STOP_S):
                await self.run("kill-server")
                await server.wait()
        except TimeoutError:
            server.kill()
            await server.wait()

    async def run(self, *args: str, stdin: bytes = b"", timeout_s: float = 20.0) -> tuple[int, bytes, bytes]:
        """Run one `adb` command: (exit code, stdout, stderr). Raises TimeoutError after killing it."""
        process = await asyncio.create_subprocess_exec(
            self.binary,
            *args,
            env=self.environment,
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            stderr=asyncio.subprocess.PIPE,
        )
        try:
            async with asyncio.timeout(timeout_s):
                out, err = await process.communicate(stdin)
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        return process.returncode or 0, out, err

    async def connect(self, port: int) -> str:
        """Connect to a phone on loopback and return its serial, for `-s`."""
        serial = f"127.0.0.1:{port}"
        _, out, err = await self.run("connect", serial)
        # adb exits with 0 also when it could not connect.
        assert out.startswith(b"connected to"), (out, err)
        return serial


async def _wait_for(port: int) -> None:
    async with asyncio.timeout(_START_S):
        while True:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                await asyncio.sleep(0.02)
            else:
                writer.close()
                await writer.wait_closed()
                return
