"""What the shell's commands read from and write to: the terminal, pipes, files of the phone."""

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, AsyncIterator
from typing import Protocol, cast

from phones.simulator.files import PhoneFileError, PhoneFiles

PIPE_BYTES = 64 << 10


class Source(Protocol):
    """Where a command's input comes from."""

    async def read(self) -> bytes:
        """The next piece; empty at the end."""


class Sink(Protocol):
    """Where a command's output goes."""

    async def write(self, output: bytes) -> None:
        """Wait until the reader can take more. Raises BrokenPipe when nobody reads any longer."""


class Terminal(Source, Sink, Protocol):
    """The person or program at the other end of a shell; its errors go another way than its output."""

    async def write_error(self, output: bytes) -> None:
        """Show error output; waits for the reader."""


class BrokenPipe(Exception):
    """Nobody reads what is written: the writer ends, as by SIGPIPE."""


class Pipe:
    """Joins a writer and a reader; the writer waits while 64 KiB are unread."""

    def __init__(self) -> None:
        self._chunks: deque[bytes] = deque()
        self._held_bytes = 0
        self._readable = asyncio.Event()
        self._writable = asyncio.Event()
        self._writable.set()
        self._ended = False
        self._left = False
        self.opened = asyncio.Event()

    async def write(self, output: bytes) -> None:
        if not output:
            return
        await self._writable.wait()
        if self._left:
            raise BrokenPipe
        self._chunks.append(output)
        self._held_bytes += len(output)
        if self._held_bytes >= PIPE_BYTES:
            self._writable.clear()
        self._readable.set()

    async def read(self) -> bytes:
        self.opened.set()
        await self._readable.wait()
        if not self._chunks:
            return b""
        chunk = self._chunks.popleft()
        self._held_bytes -= len(chunk)
        self._writable.set()
        if not self._chunks and not self._ended:
            self._readable.clear()
        return chunk

    def end(self) -> None:
        """The writer is done: the reader gets what is left, then the end."""
        self._ended = True
        self._readable.set()

    def leave(self) -> None:
        """The reader is done: the next write raises BrokenPipe."""
        self._left = True
        self._chunks.clear()
        self._writable.set()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        while chunk := await self.read():
            yield chunk


class Nothing:
    """`/dev/null`."""

    async def read(self) -> bytes:
        return b""

    async def write(self, output: bytes) -> None:
        pass


class Collected:
    """Keeps what is written, up to `limit` bytes; the rest is dropped."""

    def __init__(self, limit: int) -> None:
        self.content = bytearray()
        self._limit = limit

    async def write(self, output: bytes) -> None:
        self.content += output[: self._limit - len(self.content)]


class FileSource:
    """Reads one of the phone's files."""

    def __init__(self, files: PhoneFiles, path: str) -> None:
        # The files promise an iterator; it is a generator, whose end lets go of the file at once.
        self._chunks = cast("AsyncGenerator[bytes, None]", files.read(path))
        self._first: bytes | None = None

    async def open(self) -> None:
        """Raises PhoneFileError where the file cannot be read."""
        self._first = await anext(self._chunks, b"")

    async def read(self) -> bytes:
        if self._first is not None:
            chunk, self._first = self._first, None
            return chunk
        return await anext(self._chunks, b"")

    async def close(self) -> None:
        """Let go of the file; repeatable."""
        await self._chunks.aclose()

    async def abandon(self) -> None:
        await self.close()


class FileSink:
    """Writes one of the phone's files, which is whole once `close` has returned."""

    def __init__(self, files: PhoneFiles, path: str, *, append: bool) -> None:
        self._pipe = Pipe()
        self._fault: PhoneFileError | None = None
        self._writing = asyncio.create_task(self._write_file(files, path, append))

    async def _write_file(self, files: PhoneFiles, path: str, append: bool) -> None:
        try:
            await files.write(path, self._pipe, append=append)
        except PhoneFileError as fault:
            self._fault = fault
        finally:
            self._pipe.leave()
            self._pipe.opened.set()

    async def open(self) -> None:
        """Raises PhoneFileError where the file cannot be written."""
        await self._pipe.opened.wait()
        if self._fault is not None:
            raise self._fault

    async def write(self, output: bytes) -> None:
        await self._pipe.write(output)

    async def close(self) -> None:
        """Raises PhoneFileError where not all could be written."""
        self._pipe.end()
        await self._writing
        if self._fault is not None:
            raise self._fault

    async def abandon(self) -> None:
        """End without finishing the file; nothing where it was closed."""
        self._writing.cancel()
        await asyncio.wait({self._writing})
