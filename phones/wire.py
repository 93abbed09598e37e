"""ADB's transport, for the side that asks (a host) and the side that answers (a phone).

One TCP connection carries many streams. A packet is a header of six little-endian u32 (command, two
arguments, length and checksum of the payload, the command inverted) and its payload. A WRTE may
follow the last one of its stream only after the other side's OKAY, which is sent here when the
reader takes the bytes: a reader that waits holds up its own stream and no other, and what waits for
it is one packet. Source: AOSP packages/modules/adb, protocol.txt and SERVICES.TXT.
"""

import asyncio
import logging
import socket
import struct
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from enum import IntEnum
from typing import Literal, Self

log = logging.getLogger(__name__)

MAX_PAYLOAD = 1 << 20
READ_BUFFER_BYTES = 2 << 20
"""The `limit` to open a StreamReader with."""
VERSION_WITHOUT_CHECKSUM = 0x01000001

_HEADER = struct.Struct("<6I")
_GREETING_S = 10.0
_CLOSING_S = 1.0
_MIN_PAYLOAD = 4096
_WRITE_BUFFER_BYTES = 4 << 20
# Replies to a peer that asks without reading; bulk data never gets this far.
_WRITE_BUFFER_MAX_BYTES = 2 * _WRITE_BUFFER_BYTES
# What may wait for readers on one connection, over all its streams.
_UNREAD_MAX_BYTES = 64 << 20
_PACKETS_PER_TURN = 64


class AdbFault(Exception):
    """Something between us and a phone went wrong; the text is fit for the phone's owner."""


class AdbUnreachable(AdbFault):
    """There is no connection to the phone, or there is none any more."""


class AdbUnauthorized(AdbFault):
    """The phone wants a key or TLS before it talks."""


class AdbRefused(AdbFault):
    """The phone does not do what was asked."""


class AdbGarbled(AdbFault):
    """What arrived breaks the protocol, or breaks off."""


class AdbClosed(AdbFault):
    """The stream was closed, by the other side or by us."""


class Command(IntEnum):
    """The packets, named by the ASCII word that each number spells."""

    CNXN = int.from_bytes(b"CNXN", "little")
    AUTH = int.from_bytes(b"AUTH", "little")
    STLS = int.from_bytes(b"STLS", "little")
    OPEN = int.from_bytes(b"OPEN", "little")
    OKAY = int.from_bytes(b"OKAY", "little")
    WRTE = int.from_bytes(b"WRTE", "little")
    CLSE = int.from_bytes(b"CLSE", "little")


Service = Callable[["Stream"], Awaitable[None]]
"""What serves a stream the peer opened, in a task of its own; the stream is closed at its end."""

Services = Callable[[str], Service | None]
"""Finds the service for a name the peer asks for (`shell,v2:ls`), or None to refuse it."""


def no_services(_name: str) -> Service | None:
    """Refuse whatever the peer opens."""
    return None


def packet_header(command: int, arg0: int, arg1: int, payload: bytes, *, checksum: bool) -> bytes:
    """The 24 bytes before a payload; peers since version 0x01000001 take 0 for the checksum."""
    total = sum(payload) & 0xFFFFFFFF if checksum else 0
    return _HEADER.pack(command, arg0, arg1, len(payload), total, command ^ 0xFFFFFFFF)


class Stream:
    """One service's two-way byte stream. Raises AdbFault when it or its connection is gone.

    Leave it by `close()`, or `async with`: until then the other side keeps it, too.
    """

    def __init__(self, connection: "Connection", service: str, local_id: int, remote_id: int = 0) -> None:
        self.service = service
        self.local_id = local_id
        self.remote_id = remote_id
        self.linger_s = 0.0
        """How long a service goes on after its peer closed, to use what it was sent; then it is cancelled."""
        self.task: asyncio.Task[None] | None = None
        self._connection = connection
        self._inbox = b""
        self._rest = bytearray()
        self._credit = remote_id != 0
        self._end: AdbFault | None = None
        self._readable = asyncio.Event()
        self._writable = asyncio.Event()
        self._writing = asyncio.Lock()

    @property
    def max_payload(self) -> int:
        """The most bytes that one packet carries."""
        return self._connection.max_payload

    async def read(self) -> bytes:
        """The next bytes, as many as have come; b"" once the other side has closed."""
        if self._rest:
            piece = bytes(self._rest)
            self._rest.clear()
            return piece
        return await self._take()

    async def read_exactly(self, size: int) -> bytes:
        """Exactly `size` bytes. Raises AdbGarbled where the stream ends before."""
        while len(self._rest) < size:
            piece = await self._take()
            if not piece:
                raise AdbGarbled(f"{self.service!r} broke off")
            self._rest += piece
        piece = bytes(memoryview(self._rest)[:size])
        del self._rest[:size]
        return piece

    async def write(self, data: bytes) -> None:
        """Send bytes, waiting for the other side to take what went before. Raises AdbClosed."""
        async with self._writing:
            for start in range(0, len(data), self.max_payload):
                await self.wait_for_credit()
                async with self._connection.bulk:
                    await self._connection.drained()
                    self._check_open()
                    self._credit = False
                    piece = data[start : start + self.max_payload]
                    self._connection.send(Command.WRTE, self.local_id, self.remote_id, piece)

    def close(self) -> None:
        """Tell the other side that we are done. What it still sends is thrown away."""
        if self._end is None:
            self._connection.forget(self)
            if self.remote_id:
                self._connection.send(Command.CLSE, self.local_id, self.remote_id)
        self._drop_inbox()
        self._rest.clear()
        self.end(AdbClosed(f"{self.service!r} is closed"))

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self.close()

    async def wait_for_credit(self) -> None:
        """Wait until the next packet may be sent."""
        while not self._credit:
            self._check_open()
            self._writable.clear()
            await self._writable.wait()

    def put(self, payload: bytes) -> None:
        """A payload arrived. Raises AdbGarbled when the peer did not wait for the OKAY."""
        if self._inbox:
            raise AdbGarbled(f"{self.service!r} did not wait for its acknowledgement")
        self._inbox = payload
        self._connection.unread_bytes += len(payload)
        self._readable.set()

    def acknowledge(self, remote_id: int) -> None:
        """The peer took the last packet, or accepted the stream."""
        self.remote_id = remote_id
        self._credit = True
        self._writable.set()

    def end(self, reason: AdbFault) -> None:
        """Nothing comes or goes any more; who waits wakes up."""
        if self._end is None:
            self._end = reason
        self._readable.set()
        self._writable.set()

    async def _take(self) -> bytes:
        while not self._inbox:
            if isinstance(self._end, AdbClosed):
                return b""
            if self._end is not None:
                raise self._end
            self._readable.clear()
            await self._readable.wait()
        piece = self._inbox
        self._drop_inbox()
        if self._end is None:
            self._connection.send(Command.OKAY, self.local_id, self.remote_id)
        return piece

    def _check_open(self) -> None:
        if self._end is not None:
            raise self._end

    def _drop_inbox(self) -> None:
        self._connection.unread_bytes -= len(self._inbox)
        self._inbox = b""


class Connection:
    """One ADB connection. Its owner calls `start()` and cancels the task it returns to close it.

    `banner` is what we say of ourselves; `services` finds what serves the streams the peer opens,
    of which there are at most `streams_max` at once.
    """

    def __init__(
        self,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
        *,
        role: Literal["host", "device"],
        banner: str,
        services: Services = no_services,
        streams_max: int = 256,
    ) -> None:
        self.max_payload = MAX_PAYLOAD
        self.peer_banner = ""
        self.unread_bytes = 0
        self.bulk = asyncio.Lock()  # guards: the write buffer's last free room, so that streams take turns
        self._reader = reader
        self._writer = writer
        self._role = role
        self._banner = banner
        self._services = services
        self._streams_max = streams_max
        self._streams: dict[int, Stream] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._last_id = 0
        self._version = VERSION_WITHOUT_CHECKSUM
        self._greeted = asyncio.Event()
        self._fault: AdbFault | None = None
        _tune(writer)

    @property
    def closed(self) -> bool:
        """Whether the connection is gone for good."""
        return self._fault is not None

    def start(self) -> asyncio.Task[None]:
        """Serve the connection in a task that ends when the peer goes or breaks the protocol."""
        running = asyncio.create_task(self._run())
        # Also a task that is cancelled before its first step must not leave the socket open.
        running.add_done_callback(lambda _: self._writer.transport.abort())
        return running

    async def greeted(self) -> None:
        """Wait for the peer's greeting. Raises AdbFault when none comes."""
        await self._greeted.wait()
        if self._fault is not None:
            raise self._fault

    async def open(self, service: str) -> Stream:
        """Open a service of the peer's. Raises AdbRefused when it has none of that name."""
        name = service.encode("utf-8", "surrogateescape")
        if b"\0" in name or len(name) >= self.max_payload:
            raise AdbRefused("a command may hold no NUL and must fit one packet")
        if self._fault is not None:
            raise self._fault
        stream = Stream(self, service, self._next_id())
        self._streams[stream.local_id] = stream
        self.send(Command.OPEN, stream.local_id, 0, name + b"\0")
        try:
            await stream.wait_for_credit()
        except AdbClosed:
            raise AdbRefused(f"the phone refused {service.partition(':')[0]!r}") from None
        except asyncio.CancelledError:
            stream.close()
            raise
        return stream

    def send(self, command: Command, arg0: int, arg1: int, payload: bytes = b"") -> None:
        """Queue one packet; nothing happens on a connection that is closing."""
        if self._writer.transport.is_closing():
            return
        checksum = self._version < VERSION_WITHOUT_CHECKSUM or command is Command.CNXN
        header = packet_header(command, arg0, arg1, payload, checksum=checksum)
        if len(payload) < 4096:
            self._writer.write(header + payload)
        else:
            self._writer.write(header)
            self._writer.write(payload)

    async def drained(self) -> None:
        """Wait until the network has taken most of what was queued."""
        try:
            await self._writer.drain()
        except OSError:
            raise self._fault or AdbUnreachable("the other side closed the connection") from None

    def forget(self, stream: Stream) -> None:
        """Let go of a stream that is closed."""
        self._streams.pop(stream.local_id, None)

    async def _run(self) -> None:
        fault: AdbFault = AdbUnreachable("the connection was closed")
        try:
            if self._role == "host":
                self._greet()
            await self._read_packets()
        except AdbFault as broken:
            fault = broken
            log.debug("adb connection dropped: %s", broken)
        except (OSError, asyncio.IncompleteReadError):
            fault = AdbUnreachable("the other side closed the connection")
        finally:
            self._fault = fault
            self._greeted.set()
            self._end_streams(fault)
            try:
                await asyncio.gather(*self._tasks, return_exceptions=True)
            finally:
                await self._hang_up()

    async def _read_packets(self) -> None:
        deadline_s = _GREETING_S if self._role == "device" else None
        try:
            async with asyncio.timeout(deadline_s):
                while not self._greeted.is_set():
                    await self._read_packet()
        except TimeoutError:
            raise AdbGarbled("the other side did not greet") from None
        while True:
            for _ in range(_PACKETS_PER_TURN):
                await self._read_packet()
            # What is buffered is read without a pause: let the others run, and see that replies leave.
            await asyncio.sleep(0)
            if self._writer.transport.get_write_buffer_size() > _WRITE_BUFFER_MAX_BYTES:
                raise AdbUnreachable("the other side sends and does not read")

    async def _read_packet(self) -> None:
        header = await self._reader.readexactly(_HEADER.size)
        command, arg0, arg1, length, checksum, magic = _HEADER.unpack(header)
        if magic != command ^ 0xFFFFFFFF:
            raise AdbGarbled("this is not ADB")
        if length > MAX_PAYLOAD:
            raise AdbGarbled(f"a packet of {length} bytes")
        if not self._greeted.is_set() and command not in (Command.CNXN, Command.AUTH, Command.STLS):
            raise AdbGarbled("a packet before the greeting")
        payload = await self._reader.readexactly(length) if length else b""
        version = min(self._version, arg0) if command == Command.CNXN else self._version
        if version < VERSION_WITHOUT_CHECKSUM and sum(payload) & 0xFFFFFFFF != checksum:
            raise AdbGarbled("a packet with a wrong checksum")
        self._dispatch(command, arg0, arg1, payload)

    def _dispatch(self, command: int, arg0: int, arg1: int, payload: bytes) -> None:
        match command:
            case Command.WRTE:
                self._on_write(arg0, arg1, payload)
            case Command.OKAY:
                self._on_okay(arg0, arg1)
            case Command.OPEN:
                self._on_open(arg0, payload)
            case Command.CLSE:
                self._on_close(arg0, arg1)
            case Command.CNXN:
                self._on_greeting(arg0, arg1, payload)
            case Command.AUTH | Command.STLS if self._role == "host":
                wanted = "a key" if command == Command.AUTH else "TLS"
                raise AdbUnauthorized(f"the phone asks for {wanted} before it talks, and we have none for it")

    def _on_greeting(self, version: int, max_payload: int, payload: bytes) -> None:
        if max_payload < _MIN_PAYLOAD:
            raise AdbGarbled(f"a greeting that takes {max_payload} bytes a packet")
        self._end_streams(AdbUnreachable("the other side started afresh"))
        self._version = min(version, VERSION_WITHOUT_CHECKSUM)
        self.max_payload = min(max_payload, MAX_PAYLOAD)
        self.peer_banner = payload.rstrip(b"\0").decode("utf-8", "replace")
        if self._role == "device":
            self._greet()
        self._greeted.set()

    def _on_open(self, remote_id: int, payload: bytes) -> None:
        name = payload.removesuffix(b"\0").decode("utf-8", "surrogateescape")
        if remote_id == 0:
            raise AdbGarbled("a stream without a number")
        service = self._services(name) if self._has_room() else None
        if service is None:
            self.send(Command.CLSE, 0, remote_id)
            return
        stream = Stream(self, name, self._next_id(), remote_id)
        self._streams[stream.local_id] = stream
        self.send(Command.OKAY, stream.local_id, remote_id)
        stream.task = asyncio.create_task(self._serve(stream, service))
        self._tasks.add(stream.task)
        stream.task.add_done_callback(self._tasks.discard)

    def _has_room(self) -> bool:
        serving = sum(not task.cancelling() for task in self._tasks)
        return serving < self._streams_max and len(self._tasks) < 2 * self._streams_max

    async def _serve(self, stream: Stream, service: Service) -> None:
        try:
            await service(stream)
        except AdbFault as fault:
            log.debug("adb service %.100r ended: %s", stream.service, fault)
        except Exception:
            log.exception("adb service %.100r failed", stream.service)
        finally:
            stream.close()

    def _on_okay(self, remote_id: int, local_id: int) -> None:
        stream = self._streams.get(local_id)
        if stream is None:
            # Accepted after we gave up waiting: the peer must let go of it.
            self.send(Command.CLSE, local_id, remote_id)
        elif remote_id and stream.remote_id in (0, remote_id):
            stream.acknowledge(remote_id)

    def _on_write(self, remote_id: int, local_id: int, payload: bytes) -> None:
        stream = self._streams.get(local_id)
        if stream is None or stream.remote_id != remote_id:
            self.send(Command.CLSE, local_id, remote_id)
        elif not payload:
            self.send(Command.OKAY, local_id, remote_id)
        elif self.unread_bytes + len(payload) > _UNREAD_MAX_BYTES:
            stream.close()
        else:
            stream.put(payload)

    def _on_close(self, remote_id: int, local_id: int) -> None:
        stream = self._streams.get(local_id)
        if stream is None or remote_id not in (0, stream.remote_id):
            return
        self.forget(stream)
        if stream.remote_id:
            self.send(Command.CLSE, local_id, stream.remote_id)
        stream.end(AdbClosed(f"the other side closed {stream.service!r}"))
        if stream.task is not None:
            if stream.linger_s > 0:
                asyncio.get_running_loop().call_later(stream.linger_s, stream.task.cancel)
            else:
                stream.task.cancel()

    def _greet(self) -> None:
        self.send(Command.CNXN, VERSION_WITHOUT_CHECKSUM, MAX_PAYLOAD, self._banner.encode())

    def _next_id(self) -> int:
        self._last_id = self._last_id % 0xFFFFFFFF + 1
        return self._last_id

    def _end_streams(self, reason: AdbFault) -> None:
        for stream in self._streams.values():
            stream.end(reason)
        self._streams.clear()
        for task in self._tasks:
            task.cancel()

    async def _hang_up(self) -> None:
        self._writer.close()
        with suppress(TimeoutError, OSError):
            async with asyncio.timeout(_CLOSING_S):
                await self._writer.wait_closed()


def _tune(writer: asyncio.StreamWriter) -> None:
    writer.transport.set_write_buffer_limits(high=_WRITE_BUFFER_BYTES)
    connected: socket.socket | None = writer.get_extra_info("socket")
    if connected is not None:
        with suppress(OSError):
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connected.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


class ShellChannel(IntEnum):
    """What a frame of the shell,v2 service carries."""

    STDIN = 0
    STDOUT = 1
    STDERR = 2
    EXIT = 3
    CLOSE_STDIN = 4
    WINDOW_SIZE = 5


_FRAME = struct.Struct("<BI")
FRAME_HEADER_BYTES = _FRAME.size


def shell_frame(channel: ShellChannel, data: bytes = b"") -> bytes:
    """One frame of shell,v2: u8 channel, u32 length, data."""
    return _FRAME.pack(channel, len(data)) + data


class ShellFrames:
    """Reads shell,v2 frames from the pieces of a stream.

    A long frame is passed on as its pieces come, whatever length it claims, so nothing is gathered.
    """

    def __init__(self) -> None:
        self._header = b""
        self._channel = 0
        self._missing = 0

    def feed(self, piece: bytes) -> Iterator[tuple[int, bytes]]:
        """The frames, or parts of frames, in the next piece: (channel, data)."""
        view = memoryview(piece)
        while view:
            if self._missing:
                data, view = view[: self._missing], view[self._missing :]
                self._missing -= len(data)
                yield self._channel, bytes(data)
                continue
            needed = _FRAME.size - len(self._header)
            self._header += bytes(view[:needed])
            view = view[needed:]
            if len(self._header) == _FRAME.size:
                self._channel, self._missing = _FRAME.unpack(self._header)
                self._header = b""
                if not self._missing:
                    yield self._channel, b""
