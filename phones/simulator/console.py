"""Where a shell's lines come from: a person's terminal, or a program that sends a script."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from phones.simulator.calls import to_bytes, to_text
from phones.simulator.streams import Terminal

INTERRUPTED_STATUS = 130
MAX_LINE_BYTES = 64 << 10
MAX_WAITING_LINES = 1000

_ENTER = b"\r\n"
_ERASE = b"\x7f\x08"
_INTERRUPT, _END, _ERASE_LINE, _ESCAPE = 0x03, 0x04, 0x15, 0x1B


class ScriptInput:
    """Lines of a script on a raw stream; what is left of it is the input of the commands themselves."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._rest = b""

    async def line(self) -> str | None:
        """The next line without its end, or None at the end of input."""
        while b"\n" not in self._rest and len(self._rest) < MAX_LINE_BYTES:
            chunk = await self._terminal.read()
            if not chunk:
                line, self._rest = self._rest, b""
                return to_text(line) if line else None
            self._rest += chunk
        line, _, self._rest = self._rest.partition(b"\n")
        return to_text(line.rstrip(b"\r"))

    async def read(self) -> bytes:
        if self._rest:
            chunk, self._rest = self._rest, b""
            return chunk
        return await self._terminal.read()

    async def write(self, output: bytes) -> None:
        await self._terminal.write(output)


class Console:
    """What the kernel's terminal does for a shell: echoes, mends the line, turns Ctrl-C into an end.

    The other side's terminal is raw, so line ends go out as carriage return and newline.
    """

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal
        self._lines: asyncio.Queue[bytes] = asyncio.Queue(MAX_WAITING_LINES)  # b"" is an end of input
        self._typed = bytearray()
        self._escaping = False
        self._ended = False
        self._running: asyncio.Task[int] | None = None

    @asynccontextmanager
    async def typing(self) -> AsyncIterator[None]:
        """Take what is typed for as long as the block runs."""
        taking = asyncio.create_task(self._take())
        try:
            yield
        finally:
            taking.cancel()
            await asyncio.wait({taking})

    async def line(self, prompt: str) -> str | None:
        """Show the prompt; the next line without its end, or None at the end of input."""
        await self._terminal.write(to_bytes(prompt))
        line = await self.read()
        return to_text(line).rstrip("\n") if line else None

    async def watch(self, running: asyncio.Task[int]) -> int:
        """Wait for a command, which Ctrl-C may cancel, and return its exit code."""
        self._running = running
        try:
            await asyncio.wait({running})
        finally:
            self._running = None
            if not running.done():
                running.cancel()
                await asyncio.wait({running})
        return INTERRUPTED_STATUS if running.cancelled() else running.result()

    async def read(self) -> bytes:
        if self._ended and self._lines.empty():
            return b""
        return await self._lines.get()

    async def write(self, output: bytes) -> None:
        await self._terminal.write(output.replace(b"\n", b"\r\n"))

    async def _take(self) -> None:
        try:
            while typed := await self._terminal.read():
                for byte in typed:
                    await self._take_byte(byte)
        finally:
            self._ended = True
            if not self._lines.full():
                self._lines.put_nowait(b"")

    async def _take_byte(self, byte: int) -> None:
        if self._escaping:
            # The arrow keys and their like, `ESC [ ... letter`, move nothing here.
            self._escaping = not (chr(byte).isalpha() or byte == ord("~"))
        elif byte in _ENTER:
            await self._terminal.write(b"\r\n")
            await self._send(bytes(self._typed) + b"\n")
        elif byte in _ERASE:
            await self._erase_character()
        elif byte == _ERASE_LINE:
            while self._typed:
                await self._erase_character()
        elif byte == _INTERRUPT:
            await self._terminal.write(b"^C\r\n")
            self._typed.clear()
            if self._running is not None:
                self._running.cancel()
            else:
                await self._send(b"\n")
        elif byte == _END:
            if not self._typed:
                await self._send(b"")
        elif byte == _ESCAPE:
            self._escaping = True
        elif byte >= 0x20 and len(self._typed) < MAX_LINE_BYTES:
            self._typed.append(byte)
            await self._terminal.write(bytes([byte]))

    async def _send(self, line: bytes) -> None:
        self._typed.clear()
        await self._lines.put(line)

    async def _erase_character(self) -> None:
        if not self._typed:
            return
        while self._typed and self._typed[-1] & 0xC0 == 0x80:
            self._typed.pop()
        if self._typed:
            self._typed.pop()
        await self._terminal.write(b"\b \b")
