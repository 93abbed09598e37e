"""A simulated phone inside the test's own process, and somebody who types on it."""

import asyncio
import io
from collections.abc import AsyncIterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from PIL import Image

from phones.simulator.clock import SystemClock
from phones.simulator.phone import Model, Phone

PHONE_ID = "3f0e7a52-6c1d-4c55-9d2e-0b9b6b1f7a10"
DEADLINE_S = 20


class StoodStill(SystemClock):
    """A clock that moves when told."""

    def __init__(self) -> None:
        self.time = datetime(2026, 3, 5, 14, 7, 30, tzinfo=UTC)

    def now(self) -> datetime:
        return self.time


class Typist:
    """A terminal: types what it was given, then waits or ends, and keeps what it is shown."""

    def __init__(self, typed: bytes = b"", *, stays: bool = False) -> None:
        self.out = b""
        self.err = b""
        self._typed = asyncio.Queue[bytes]()
        if typed:
            self._typed.put_nowait(typed)
        if not stays:
            self._typed.put_nowait(b"")
        self._changed = asyncio.Event()

    async def read(self) -> bytes:
        typed = await self._typed.get()
        if not typed:
            self._typed.put_nowait(b"")
        return typed

    async def write(self, output: bytes) -> None:
        self.out += output
        self._changed.set()

    async def write_error(self, output: bytes) -> None:
        self.err += output
        self._changed.set()

    def type(self, typed: bytes) -> None:
        self._typed.put_nowait(typed)

    async def shown(self, wanted: bytes) -> None:
        """Wait until the output has it."""
        async with asyncio.timeout(DEADLINE_S):
            while wanted not in self.out:
                self._changed.clear()
                await self._changed.wait()


@dataclass(frozen=True)
class Said:
    """What a command has answered."""

    code: int
    out: str
    err: str


class TestPhone(Phone):
    """A phone whose shell is easily asked."""

    __test__ = False

    async def sh(self, command: str, typed: bytes = b"") -> Said:
        """Run a command line to its end."""
        terminal = Typist(typed)
        async with asyncio.timeout(DEADLINE_S):
            code = await self.shell.run(command, terminal)
        return Said(code, terminal.out.decode(errors="replace"), terminal.err.decode(errors="replace"))

    async def picture(self) -> Image.Image:
        """The screen as `screencap -p` gives it."""
        terminal = Typist()
        assert await self.shell.run("screencap -p", terminal) == 0
        return Image.open(io.BytesIO(terminal.out)).convert("RGB")

    async def install(self, apk: bytes, options: str = "-r") -> Said:
        """Install from the input, as adb does."""
        return await self.sh(f"cmd package install {options} -S {len(apk)}", apk)


async def open_phone(directory: Path, **model: int | str) -> TestPhone:
    """A phone that keeps its things in `directory`, where an earlier one may have lived."""
    phone = TestPhone(directory, Model(PHONE_ID, "Test phone", **model), StoodStill())  # type: ignore[arg-type]  # named by the test
    await phone.open()
    return phone


async def pieces(*chunks: bytes) -> AsyncIterator[bytes]:
    """Chunks as a stream."""
    for chunk in chunks:
        yield chunk
