"""A phone with a handful of commands, to test what carries commands and files rather than them."""

import asyncio
import re
import shlex
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, cast

from phones.simulator.files import PhoneFiles

if TYPE_CHECKING:
    from phones.simulator.phone import Phone
    from phones.simulator.shell import Terminal

PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 4000 + b"IEND\xaeB`\x82"


async def eventually(holds: Callable[[], bool], within_s: float = 5.0) -> None:
    """Wait until something holds. Raises TimeoutError when it does not in time."""
    async with asyncio.timeout(within_s):
        while not holds():
            await asyncio.sleep(0.005)


class SmallPhone:
    """What adbd needs of a phone."""

    def __init__(self, root: Path) -> None:
        self.files = PhoneFiles(root)
        self.shell = SmallShell()
        self.properties = {
            "ro.product.name": "small",
            "ro.product.model": "Small; Phone=1",
            "ro.product.device": "small_device",
        }

    def as_phone(self) -> "Phone":
        return cast("Phone", self)


class SmallShell:
    """Runs fixed commands and counts what became of them."""

    def __init__(self) -> None:
        self.running: Counter[str] = Counter()
        self.cancelled: Counter[str] = Counter()
        self.picture = PICTURE
        self.flooded_bytes = 0
        self.received = b""
        self.installed: list[bytes] = []

    async def run(self, command: str, terminal: "Terminal") -> int:
        self.running[command] += 1
        try:
            return await self._run(command, terminal)
        except asyncio.CancelledError:
            self.cancelled[command] += 1
            raise
        finally:
            self.running[command] -= 1

    async def interact(self, terminal: "Terminal", *, echo: bool) -> int:
        typed = b""
        while piece := await terminal.read():
            typed += piece
            if echo:
                await terminal.write(piece)
            *lines, typed = typed.split(b"\n")
            for line in lines:
                if line.startswith(b"exit"):
                    return int(line[4:] or b"0")
                await self.run(line.decode(), terminal)
        return 0

    async def _run(self, command: str, terminal: "Terminal") -> int:
        word, *arguments = shlex.split(command)
        rest = " ".join(arguments)
        match word:
            case "echo":
                await terminal.write(rest.encode() + b"\n")
            case "err":
                await terminal.write_error(rest.encode() + b"\n")
            case "exit":
                return int(rest)
            case "cat":
                while piece := await terminal.read():
                    await terminal.write(piece)
            case "keep":
                self.received = b""
                while piece := await terminal.read():
                    self.received += piece
                self.received += b"."
            case "flood":
                while True:
                    await terminal.write(bytes(65536))
                    self.flooded_bytes += 65536
            case "drip":
                while True:
                    await terminal.write(b"drop\n")
                    await asyncio.sleep(0.2)
            case "zeros":
                for _ in range(int(rest)):
                    await terminal.write(bytes(1 << 20))
            case "sleep":
                await asyncio.Event().wait()
            case "crash":
                raise RuntimeError("a bug in a command")
            case "screencap":
                await terminal.write(self.picture)
            case "cmd":
                return await self._install(rest, terminal)
            case _:
                await terminal.write_error(f"sh: {word}: not found\n".encode())
                return 127
        return 0

    async def _install(self, arguments: str, terminal: "Terminal") -> int:
        size = re.search(r"-S (\d+)", arguments)
        assert size, arguments
        if "--refuse" in arguments:
            await terminal.write(b"Failure [INSTALL_FAILED_OLDER_SDK: needs more]\n")
            return 1
        apk = b""
        while len(apk) < int(size[1]):
            piece = await terminal.read()
            if not piece:
                return 1
            apk += piece
        self.installed.append(apk)
        await terminal.write(b"Success\n")
        return 0
