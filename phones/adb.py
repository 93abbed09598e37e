"""Speaks to a phone over ADB: commands, files, APKs, many at once on one connection.

Every wait for the phone has a deadline. What goes wrong is an `AdbFault`; its kinds tell whether to
connect again (`AdbUnreachable`), to try again (`AdbTimeout`) or to give the answer to the user.
"""

import asyncio
import os
import re
import shlex
import stat
import time
from collections.abc import (
    AsyncGenerator,
    AsyncIterable,
    AsyncIterator,
    Awaitable,
    Coroutine,
    Iterable,
    Sequence,
)
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, Self, TypeVar

from phones import sync
from phones.wire import (
    READ_BUFFER_BYTES,
    AdbClosed,
    AdbFault,
    AdbGarbled,
    AdbRefused,
    AdbUnauthorized,
    AdbUnreachable,
    Connection,
    Services,
    ShellChannel,
    ShellFrames,
    Stream,
    no_services,
    shell_frame,
)

__all__ = [
    "AdbClient",
    "AdbClosed",
    "AdbFault",
    "AdbGarbled",
    "AdbOverflow",
    "AdbRefused",
    "AdbTimeout",
    "AdbUnauthorized",
    "AdbUnreachable",
    "FileRefused",
    "InstallRefused",
    "RemoteFile",
    "ShellResult",
    "quote",
]

T = TypeVar("T")

_BANNER = "host::features=shell_v2,cmd,stat_v2,ls_v2,fixed_push_mkdir,sendrecv_v2"
_PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_BATCH_BYTES = 12 * sync.CHUNK_BYTES
_ENOENT = 2  # as the phone numbers it, whatever this machine runs
_ERRNO_MAX = 4095


class AdbTimeout(AdbFault):
    """The phone did not answer in time; whether it did what was asked is unknown."""


class AdbOverflow(AdbFault):
    """The phone sent more than the caller would take."""


class FileRefused(AdbRefused):
    """The phone does not read or write this file; the text is its reason."""


class InstallRefused(AdbFault):
    """The phone's package manager said no: `code` is Android's, like INSTALL_FAILED_OLDER_SDK."""

    def __init__(self, code: str, text: str) -> None:
        super().__init__(text)
        self.code = code


@dataclass(frozen=True, slots=True)
class ShellResult:
    """What a command left behind. `exit_code` is 0-255."""

    exit_code: int
    stdout: bytes
    stderr: bytes


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file on the phone. `mode` is st_mode, type included; `modified_at` is in Unix seconds."""

    name: str
    mode: int
    size_bytes: int
    modified_at: int

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)


def quote(args: Iterable[str]) -> str:
    """A command line on which the phone's shell sees exactly these arguments."""
    return shlex.join(args)


class AdbClient:
    """One connection to one phone. All its operations may run at the same time."""

    def __init__(self, connection: Connection, running: asyncio.Task[None]) -> None:
        self._connection = connection
        self._running = running
        self.properties = _banner_properties(connection.peer_banner)
        """What the phone said of itself: `ro.product.model` and the like, and `features`."""

    @classmethod
    async def connect(
        cls, host: str, port: int, deadline_s: float = 5.0, *, services: Services = no_services
    ) -> Self:
        """Connect and greet. `services` serves what the phone opens by itself (`reverse:`).

        Raises AdbUnreachable when nobody answers in time, AdbUnauthorized when the phone wants a key.
        """
        where = f"the phone at {host}:{port}"
        running: asyncio.Task[None] | None = None
        try:
            async with asyncio.timeout(deadline_s):
                reader, writer = await asyncio.open_connection(host, port, limit=READ_BUFFER_BYTES)
                connection = Connection(reader, writer, role="host", banner=_BANNER, services=services)
                running = connection.start()
                await connection.greeted()
            return cls(connection, running)
        except BaseException as fault:
            if running is not None:
                await _cancelled(running)
            if isinstance(fault, TimeoutError):
                raise AdbUnreachable(f"{where} did not answer within {deadline_s:g} s") from None
            if isinstance(fault, OSError):
                raise AdbUnreachable(f"{where} does not answer: {fault.strerror or fault}") from None
            raise

    @property
    def closed(self) -> bool:
        """Whether the connection is gone; a new client is needed then."""
        return self._connection.closed

    async def wait_closed(self) -> None:
        """Wait until the connection is gone, for whatever reason."""
        await asyncio.wait({self._running})

    async def close(self) -> None:
        """Close the connection; what is under way on it ends with AdbUnreachable."""
        await _cancelled(self._running)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    async def open(self, service: str, *, timeout_s: float = 10.0) -> Stream:
        """Open any service (`exec:logcat`, `localabstract:scrcpy`); close the stream after use.

        Raises AdbRefused when nothing serves it.
        """
        async with _deadline(timeout_s, service):
            return await self._connection.open(service)

    async def shell(
        self, command: str, *, timeout_s: float, stdin: bytes = b"", max_output_bytes: int = 1 << 20
    ) -> ShellResult:
        """Run a command line in the phone's shell.

        Raises AdbOverflow when stdout and stderr together pass `max_output_bytes`, AdbGarbled when the
        phone breaks off before the exit code; the command is ended with the stream, also on a timeout.
        """
        if "shell_v2" not in self.features:
            raise AdbRefused("the phone's adbd is too old: it reports no exit codes")
        output: dict[int, list[bytes]] = {ShellChannel.STDOUT: [], ShellChannel.STDERR: []}
        room = max_output_bytes
        frames = ShellFrames()
        async with (
            _deadline(timeout_s, command),
            await self._connection.open(f"shell,v2,raw:{command}") as stream,
            _beside(_feed_stdin(stream, stdin)),
        ):
            while piece := await stream.read():
                for channel, content in frames.feed(piece):
                    if channel == ShellChannel.EXIT and content:
                        return ShellResult(
                            content[0],
                            b"".join(output[ShellChannel.STDOUT]),
                            b"".join(output[ShellChannel.STDERR]),
                        )
                    if channel in output:
                        room -= len(content)
                        if room < 0:
                            raise AdbOverflow(f"the command wrote more than {max_output_bytes} bytes")
                        output[channel].append(content)
        raise AdbGarbled("the phone broke off before the command's exit code")

    async def exec_out(self, command: str, *, timeout_s: float, max_output_bytes: int = 64 << 20) -> bytes:
        """Run a command and return its raw output, without exit code. Raises AdbOverflow."""
        async with (
            _deadline(timeout_s, command),
            await self._connection.open(f"exec:{command}") as stream,
        ):
            return await _read_all(stream, max_output_bytes)

    async def screencap(self, timeout_s: float) -> bytes:
        """The screen as a PNG. Raises AdbGarbled when the phone sends none, or not all of it."""
        picture = await self.exec_out("screencap -p", timeout_s=timeout_s)
        if not picture.startswith(_PNG_SIGNATURE) or b"IEND" not in picture[-12:]:
            said = picture[:80].decode("ascii", "replace").strip()
            raise AdbGarbled("the phone sent no whole picture" + (f": {said}" if said.isprintable() else ""))
        return picture

    async def install(
        self,
        apk: AsyncIterable[bytes],
        size_bytes: int,
        *,
        flags: Sequence[str] = ("-r",),
        timeout_s: float,
    ) -> None:
        """Install an APK, streamed to the phone's package manager as fast as that takes it.

        Raises InstallRefused with Android's code, and AdbFault when `apk` yields not `size_bytes`.
        """
        arguments = " ".join(shlex.quote(flag) for flag in flags)
        service = f"exec:cmd package 'install' {arguments} -S {size_bytes}"
        async with (
            _deadline(timeout_s, "the installation"),
            await self._connection.open(service) as stream,
            _beside(_read_all(stream, 64 << 10)) as reply,
        ):
            sent = 0
            async for chunk in apk:
                sent += len(chunk)
                if sent > size_bytes:
                    break
                if not await _took(stream.write(chunk)):
                    # The phone has seen enough: its reason is in the reply.
                    sent = size_bytes
                    break
            if sent != size_bytes:
                raise AdbFault(f"the APK is not {size_bytes} bytes long")
            _check_installed((await reply).decode("utf-8", "replace"))

    async def push(
        self,
        chunks: AsyncIterable[bytes],
        path: str,
        *,
        mode: int = 0o644,
        mtime: int | None = None,
        step_timeout_s: float = 30.0,
    ) -> int:
        """Write a file on the phone and return its size; directories above it are made.

        `step_timeout_s` is for each wait for the phone, not for the source. Raises FileRefused.
        """
        target = _path(path, extra=len(",33188"))
        written = 0
        async with await self._open_sync(step_timeout_s) as stream:
            head = sync.request(b"SEND", target + f",{stat.S_IFREG | (mode & 0o777)}".encode())
            done = sync.REQUEST.pack(b"DONE", int(time.time()) if mtime is None else mtime)
            wanted = await _within(step_timeout_s, path, _took(stream.write(head)))
            async for batch in _batches(chunks):
                written += len(batch)
                # A phone that closes early has left its reason, which is read below.
                if wanted:
                    wanted = await _within(
                        step_timeout_s, path, _took(stream.write(sync.data_records(batch)))
                    )
            await _within(step_timeout_s, path, _took(stream.write(done)))
            await _within(step_timeout_s, path, _expect(stream, b"OKAY"))
        return written

    async def pull(self, path: str, *, step_timeout_s: float = 30.0) -> AsyncGenerator[bytes, None]:
        """A file of the phone, piece by piece; the phone waits while a piece is used.

        `step_timeout_s` is for each wait for the phone. Raises FileRefused.
        """
        async with await self._open_sync(step_timeout_s) as stream:
            await _within(step_timeout_s, path, stream.write(sync.request(b"RECV", _path(path))))
            while size := await _within(step_timeout_s, path, _expect(stream, b"DATA", b"DONE")):
                yield await _within(step_timeout_s, path, stream.read_exactly(size))

    async def stat(self, path: str, *, timeout_s: float = 10.0) -> RemoteFile | None:
        """What stands at `path`, links followed where the phone can; None when there is nothing.

        Raises FileRefused where the phone does not say.
        """
        name = path.rstrip("/").rpartition("/")[2] or "/"
        async with _deadline(timeout_s, path), await self._open_sync(timeout_s) as stream:
            if "stat_v2" not in self.features:
                await stream.write(sync.request(b"STAT", _path(path)))
                _, mode, size, mtime = sync.STAT.unpack(await stream.read_exactly(sync.STAT.size))
                return RemoteFile(name, mode, size, mtime) if mode else None
            await stream.write(sync.request(b"STA2", _path(path)))
            answer = sync.STAT2.unpack(await stream.read_exactly(sync.STAT2.size))
            if answer[1] not in (0, _ENOENT):
                raise FileRefused(_reason(answer[1]))
            return RemoteFile(name, answer[4], answer[8], answer[10]) if not answer[1] else None

    async def list(
        self, path: str, *, timeout_s: float = 10.0, max_entries: int = 100_000
    ) -> list[RemoteFile]:
        """What a directory holds; nothing where there is no directory, as ADB cannot tell the two apart.

        Raises AdbOverflow when it holds more than `max_entries`.
        """
        second = "ls_v2" in self.features
        record = sync.ENTRY2 if second else sync.ENTRY
        found: list[RemoteFile] = []
        async with _deadline(timeout_s, path), await self._open_sync(timeout_s) as stream:
            await stream.write(sync.request(b"LIS2" if second else b"LIST", _path(path)))
            while True:
                fields = record.unpack(await stream.read_exactly(record.size))
                if fields[0] == b"DONE":
                    return found
                if fields[0] not in (b"DENT", b"DNT2") or fields[-1] > sync.PATH_MAX_BYTES:
                    raise AdbGarbled("the phone sent no directory listing")
                name = (await stream.read_exactly(fields[-1])).decode("utf-8", "surrogateescape")
                mode, size, mtime = (fields[4], fields[8], fields[10]) if second else fields[1:4]
                if name in (".", ".."):
                    continue
                if len(found) == max_entries:
                    raise AdbOverflow(f"the directory holds more than {max_entries} entries")
                found.append(RemoteFile(name, mode, size, mtime))

    @property
    def features(self) -> frozenset[str]:
        """What the phone's adbd can do."""
        return frozenset(self.properties.get("features", "").split(","))

    async def _open_sync(self, timeout_s: float) -> Stream:
        return await self.open("sync:", timeout_s=timeout_s)


def _banner_properties(banner: str) -> dict[str, str]:
    """`device::ro.product.name=X;...;features=a,b` as a dict."""
    pairs = banner.partition("::")[2].split(";")
    return dict(pair.split("=", 1) for pair in pairs if "=" in pair)


def _path(path: str, extra: int = 0) -> bytes:
    name = path.encode("utf-8", "surrogateescape")
    if b"\0" in name or not 0 < len(name) <= sync.PATH_MAX_BYTES - extra:
        raise FileRefused(f"a path has 1 to {sync.PATH_MAX_BYTES - extra} bytes and no NUL")
    return name


def _reason(number: int) -> str:
    return os.strerror(number) if number <= _ERRNO_MAX else f"error {number}"


async def _expect(stream: Stream, *words: bytes) -> int:
    """Read one answer of the sync service and return its number. Raises FileRefused for FAIL."""
    word, number = sync.REQUEST.unpack(await stream.read_exactly(sync.REQUEST.size))
    if word == b"FAIL":
        reason = await stream.read_exactly(min(number, sync.CHUNK_BYTES))
        raise FileRefused(reason.decode("utf-8", "replace"))
    if word not in words or (word == b"DATA" and number > sync.CHUNK_BYTES):
        raise AdbGarbled(f"the phone answered {word!r}")
    return 0 if word == b"DONE" else int(number)


async def _batches(chunks: AsyncIterable[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in pieces large enough to fill packets."""
    batch = bytearray()
    async for chunk in chunks:
        for start in range(0, len(chunk), _BATCH_BYTES):
            batch += chunk[start : start + _BATCH_BYTES]
            if len(batch) >= _BATCH_BYTES:
                yield bytes(batch)
                batch.clear()
    if batch:
        yield bytes(batch)


async def _feed_stdin(stream: Stream, stdin: bytes) -> None:
    room = stream.max_payload - 5
    for start in range(0, len(stdin), room):
        if not await _took(stream.write(shell_frame(ShellChannel.STDIN, stdin[start : start + room]))):
            return
    await _took(stream.write(shell_frame(ShellChannel.CLOSE_STDIN)))


async def _took(sending: Awaitable[None]) -> bool:
    """Whether the phone still wanted what we sent."""
    try:
        await sending
    except AdbClosed:
        return False
    return True


async def _read_all(stream: Stream, max_bytes: int) -> bytes:
    content = bytearray()
    while piece := await stream.read():
        content += piece
        if len(content) > max_bytes:
            raise AdbOverflow(f"the phone sent more than {max_bytes} bytes")
    return bytes(content)


def _check_installed(reply: str) -> None:
    text = reply.strip()
    if text.splitlines()[-1:] == ["Success"]:
        return
    if not text:
        raise AdbGarbled("the phone broke off the installation")
    code = re.search(r"INSTALL_[A-Z0-9_]+", text)
    raise InstallRefused(code[0] if code else "INSTALL_FAILED_INTERNAL_ERROR", text[:1000])


@asynccontextmanager
async def _deadline(timeout_s: float, what: str) -> AsyncIterator[None]:
    """Raise AdbTimeout when the block takes longer."""
    timeout = asyncio.timeout(timeout_s)
    try:
        async with timeout:
            yield
    except TimeoutError:
        if not timeout.expired():
            raise
        raise AdbTimeout(f"the phone did not finish {what[:100]!r} within {timeout_s:g} s") from None


async def _within(timeout_s: float, what: str, waiting: Awaitable[T]) -> T:
    async with _deadline(timeout_s, what):
        return await waiting


@asynccontextmanager
async def _beside(work: Coroutine[Any, Any, T]) -> AsyncIterator[asyncio.Task[T]]:
    """Run `work` in a task beside the block; it ends with the block."""
    task = asyncio.create_task(work)
    try:
        yield task
    finally:
        await _cancelled(task)


async def _cancelled(task: asyncio.Task[Any]) -> None:
    """Cancel a task and wait until it has ended; what it ended with is of no interest."""
    task.cancel()
    await asyncio.wait({task})
    if not task.cancelled():
        task.exception()
