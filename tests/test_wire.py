"""The ADB transport: its codec, its streams against each other, and peers that mean no good."""

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Self

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phones.adb import AdbClient, AdbUnauthorized, AdbUnreachable
from phones.wire import (
    MAX_PAYLOAD,
    AdbClosed,
    AdbGarbled,
    AdbRefused,
    Command,
    Connection,
    Service,
    Services,
    ShellChannel,
    ShellFrames,
    Stream,
    no_services,
    packet_header,
    shell_frame,
)
from tests.smallphone import eventually

VERSION = 0x01000001
OLD_VERSION = 0x01000000


class Wire:
    """One end of a TCP connection, spoken by hand."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader = reader
        self.writer = writer

    @classmethod
    async def connect(cls, port: int) -> Self:
        return cls(*await asyncio.open_connection("127.0.0.1", port))

    def send(
        self, command: Command, arg0: int, arg1: int, payload: bytes = b"", *, checksum: bool = False
    ) -> None:
        self.writer.write(packet_header(command, arg0, arg1, payload, checksum=checksum) + payload)

    async def receive(self) -> tuple[int, int, int, bytes]:
        async with asyncio.timeout(5):
            command, arg0, arg1, length, self.checksum, magic = struct.unpack(
                "<6I", await self.reader.readexactly(24)
            )
            assert magic == command ^ 0xFFFFFFFF
            return command, arg0, arg1, await self.reader.readexactly(length)

    async def greet(self, version: int = VERSION) -> str:
        self.send(Command.CNXN, version, MAX_PAYLOAD, b"host::", checksum=True)
        command, _, _, banner = await self.receive()
        assert command == Command.CNXN
        return banner.decode()

    async def ended(self) -> bool:
        """Whether the other side hangs up, whatever it says before."""
        async with asyncio.timeout(5):
            try:
                while await self.reader.read(65536):
                    pass
            except ConnectionResetError:
                pass
            return True

    def close(self) -> None:
        self.writer.transport.abort()


@asynccontextmanager
async def device(
    services: Services = no_services,
    *,
    streams_max: int = 256,
    connections: list[Connection] | None = None,
) -> AsyncIterator[int]:
    """A listening device side; yields its port."""
    running: set[asyncio.Task[None]] = set()

    def welcome(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        connection = Connection(
            reader,
            writer,
            role="device",
            banner="device::ro.product.model=Test;features=shell_v2",
            services=services,
            streams_max=streams_max,
        )
        running.add(connection.start())
        if connections is not None:
            connections.append(connection)

    server = await asyncio.start_server(welcome, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)


def only(name: str, service: Service) -> Services:
    return lambda asked: service if asked == name else None


async def echo(stream: Stream) -> None:
    while piece := await stream.read():
        await stream.write(piece)


@given(st.lists(st.tuples(st.sampled_from(ShellChannel), st.binary(max_size=40))), st.integers(1, 50))
def test_shell_frames_survive_any_division_into_pieces(
    frames: list[tuple[ShellChannel, bytes]], size: int
) -> None:
    wire = b"".join(shell_frame(channel, content) for channel, content in frames)
    reader = ShellFrames()
    joined: dict[int, bytes] = {}
    for start in range(0, len(wire), size):
        for channel, content in reader.feed(wire[start : start + size]):
            joined[channel] = joined.get(channel, b"") + content
    expected: dict[int, bytes] = {}
    for channel, content in frames:
        expected[channel] = expected.get(channel, b"") + content
    assert joined == expected


def test_a_shell_frame_that_claims_four_gigabytes_is_passed_on_in_pieces() -> None:
    reader = ShellFrames()
    pieces = list(reader.feed(struct.pack("<BI", 1, 0xFFFFFFFF) + b"x" * 1000))
    assert pieces == [(1, b"x" * 1000)]
    assert list(reader.feed(b"y")) == [(1, b"y")]


async def test_a_stream_carries_bytes_both_ways_and_ends() -> None:
    async with device(only("echo:", echo)) as port, await AdbClient.connect("127.0.0.1", port) as client:
        assert client.properties["ro.product.model"] == "Test"
        async with await client.open("echo:") as stream:
            sent = bytes(range(256)) * 20_000  # five packets

            async def send() -> None:
                for start in range(0, len(sent), 1_500_000):
                    await stream.write(sent[start : start + 1_500_000])

            sending = asyncio.create_task(send())
            assert await stream.read_exactly(len(sent)) == sent
            await sending


async def test_a_refused_service_is_an_error_and_the_connection_stays() -> None:
    async with device(only("echo:", echo)) as port, await AdbClient.connect("127.0.0.1", port) as client:
        with pytest.raises(AdbRefused, match="nonsense"):
            await client.open("nonsense:x")
        with pytest.raises(AdbRefused):
            await client.open("echo:\0")
        async with await client.open("echo:") as stream:
            await stream.write(b"still here")
            assert await stream.read() == b"still here"


async def test_a_packet_is_acknowledged_when_it_is_taken_and_not_before() -> None:
    sent: list[int] = []

    async def talk(stream: Stream) -> None:
        for number in range(5):
            await stream.write(b"x")
            sent.append(number)

    async with (
        device(only("talk:", talk)) as port,
        await AdbClient.connect("127.0.0.1", port) as client,
        await client.open("talk:") as stream,
    ):
        await asyncio.sleep(0.05)
        assert sent == [0]
        assert await stream.read() == b"x"
        await asyncio.sleep(0.05)
        assert sent == [0, 1]


async def test_what_came_before_the_end_can_still_be_read() -> None:
    async def bye(stream: Stream) -> None:
        await stream.write(b"last words")

    async with device(only("bye:", bye)) as port, await AdbClient.connect("127.0.0.1", port) as client:
        stream = await client.open("bye:")
        await asyncio.sleep(0.05)
        with pytest.raises(AdbClosed):
            await stream.write(b"too late")
        assert await stream.read() == b"last words"
        assert await stream.read() == b""
        stream.close()


async def test_read_exactly_says_when_a_stream_breaks_off() -> None:
    async def bye(stream: Stream) -> None:
        await stream.write(b"abc")

    async with (
        device(only("bye:", bye)) as port,
        await AdbClient.connect("127.0.0.1", port) as client,
        await client.open("bye:") as stream,
    ):
        assert await stream.read_exactly(2) == b"ab"
        with pytest.raises(AdbGarbled):
            await stream.read_exactly(2)


async def test_a_closed_stream_cancels_its_service_unless_that_may_linger() -> None:
    ends: list[str] = []

    async def wait(stream: Stream) -> None:
        try:
            await asyncio.Event().wait()
        finally:
            ends.append("cancelled")

    async def finish(stream: Stream) -> None:
        stream.linger_s = 5
        await stream.read()
        await asyncio.sleep(0.02)
        assert await stream.read() == b""
        ends.append("finished")

    def services(name: str) -> Service | None:
        return {"wait:": wait, "finish:": finish}.get(name)

    async with device(services) as port, await AdbClient.connect("127.0.0.1", port) as client:
        (await client.open("wait:")).close()
        stream = await client.open("finish:")
        await stream.write(b"input")
        stream.close()
        await eventually(lambda: len(ends) == 2)
    assert ends == ["cancelled", "finished"]


async def test_the_phone_can_open_a_stream_of_the_host() -> None:
    connections: list[Connection] = []

    async with (
        device(connections=connections) as port,
        await AdbClient.connect("127.0.0.1", port, services=only("tcp:5", echo)),
    ):
        with pytest.raises(AdbRefused):
            await connections[0].open("tcp:6")
        async with await connections[0].open("tcp:5") as stream:
            await stream.write(b"from the phone")
            assert await stream.read() == b"from the phone"


@pytest.mark.parametrize(
    "garbage",
    [
        pytest.param(b"GET / HTTP/1.1\r\nHost: phone\r\n\r\n", id="http"),
        pytest.param(bytes(24), id="zeros"),
        pytest.param(
            struct.pack("<6I", Command.CNXN, VERSION, MAX_PAYLOAD, 0xFFFFFFFF, 0, Command.CNXN ^ 0xFFFFFFFF),
            id="four-gigabytes",
        ),
        pytest.param(packet_header(Command.OPEN, 1, 0, b"", checksum=False), id="open-before-greeting"),
        pytest.param(
            packet_header(Command.CNXN, OLD_VERSION, MAX_PAYLOAD, b"hi", checksum=False) + b"hi",
            id="wrong-checksum",
        ),
        pytest.param(packet_header(Command.CNXN, VERSION, 1, b"", checksum=False), id="one-byte-packets"),
    ],
)
async def test_garbage_is_hung_up_on_at_once_and_harms_nobody_else(garbage: bytes) -> None:
    async with device(only("echo:", echo)) as port, await AdbClient.connect("127.0.0.1", port) as client:
        wire = await Wire.connect(port)
        wire.writer.write(garbage)
        assert await wire.ended()
        wire.close()
        async with await client.open("echo:") as stream:
            await stream.write(b"unharmed")
            assert await stream.read() == b"unharmed"


async def test_an_old_peer_gets_checksums_and_has_its_own_checked() -> None:
    async with device(only("echo:", echo)) as port:
        wire = await Wire.connect(port)
        await wire.greet(OLD_VERSION)
        wire.send(Command.OPEN, 7, 0, b"echo:\0", checksum=True)
        _, theirs, _, _ = await wire.receive()
        wire.send(Command.WRTE, 7, theirs, b"abc", checksum=True)
        packets = [await wire.receive(), await wire.receive()]
        assert [packet[0] for packet in packets] == [Command.OKAY, Command.WRTE]
        assert packets[1][3] == b"abc"
        assert wire.checksum == sum(b"abc")
        wire.send(Command.WRTE, 7, theirs, b"abc")
        assert await wire.ended()
        wire.close()


async def test_packets_for_unknown_streams_are_answered_with_a_close_or_ignored() -> None:
    async with device(only("echo:", echo)) as port:
        wire = await Wire.connect(port)
        await wire.greet()
        wire.send(Command.CLSE, 3, 99)
        wire.send(Command.WRTE, 4, 99, b"?")
        assert await wire.receive() == (Command.CLSE, 99, 4, b"")
        wire.send(Command.OKAY, 5, 99)
        assert await wire.receive() == (Command.CLSE, 99, 5, b"")
        wire.send(Command.OPEN, 6, 0, b"nothing:\0")
        assert await wire.receive() == (Command.CLSE, 0, 6, b"")
        wire.close()


async def test_a_second_greeting_starts_afresh() -> None:
    async with device(only("echo:", echo)) as port:
        wire = await Wire.connect(port)
        await wire.greet()
        wire.send(Command.OPEN, 1, 0, b"echo:\0")
        _, theirs, _, _ = await wire.receive()
        await wire.greet()
        wire.send(Command.WRTE, 1, theirs, b"?")
        assert await wire.receive() == (Command.CLSE, theirs, 1, b"")
        wire.close()


async def test_a_peer_that_sends_without_waiting_is_dropped() -> None:
    async def never_reads(stream: Stream) -> None:
        await asyncio.Event().wait()

    async with device(only("mute:", never_reads)) as port:
        wire = await Wire.connect(port)
        await wire.greet()
        wire.send(Command.OPEN, 1, 0, b"mute:\0")
        _, theirs, _, _ = await wire.receive()
        wire.send(Command.WRTE, 1, theirs, b"one")
        wire.send(Command.WRTE, 1, theirs, b"two")
        assert await wire.ended()
        wire.close()


async def test_more_streams_than_allowed_are_refused_and_may_be_opened_later() -> None:
    async with (
        device(only("echo:", echo), streams_max=3) as port,
        await AdbClient.connect("127.0.0.1", port) as client,
    ):
        streams = [await client.open("echo:") for _ in range(3)]
        with pytest.raises(AdbRefused):
            await client.open("echo:")
        streams[0].close()
        async with await client.open("echo:") as stream:
            await stream.write(b"room again")
            assert await stream.read() == b"room again"


async def test_a_flood_of_small_packets_leaves_the_loop_to_others() -> None:
    async with device() as port:
        wire = await Wire.connect(port)
        await wire.greet()
        turns = 0

        async def others() -> None:
            nonlocal turns
            while True:
                await asyncio.sleep(0)
                turns += 1

        packets = 80_000
        wire.writer.write(packet_header(Command.CLSE, 5, 99, b"", checksum=False) * packets)
        await wire.writer.drain()
        turning = asyncio.create_task(others())
        wire.send(Command.OPEN, 1, 0, b"nothing:")
        assert (await wire.receive())[0] == Command.CLSE
        turning.cancel()
        # Without pauses there is a turn for each read of the socket, some dozens.
        assert turns > packets / 200
        wire.close()


async def test_a_peer_that_asks_and_never_reads_is_dropped() -> None:
    async with device() as port:
        wire = await Wire.connect(port)
        await wire.greet()
        wire.writer.transport.pause_reading()  # type: ignore[attr-defined]  # a read transport too
        unknown = packet_header(Command.OKAY, 5, 99, b"", checksum=False) * 40_000
        with pytest.raises(ConnectionError):
            async with asyncio.timeout(20):
                while True:
                    wire.writer.write(unknown)
                    await wire.writer.drain()
        wire.close()


@asynccontextmanager
async def answering(*packets: bytes) -> AsyncIterator[int]:
    """A device that answers whatever it gets with the next of these."""

    async def welcome(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        for packet in packets:
            await reader.read(65536)
            writer.write(packet)
        await reader.read(65536)
        writer.close()

    server = await asyncio.start_server(welcome, "127.0.0.1", 0)
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        server.close()


def packet(command: Command, arg0: int, arg1: int, payload: bytes = b"") -> bytes:
    return packet_header(command, arg0, arg1, payload, checksum=True) + payload


async def test_a_phone_that_asks_for_a_key_is_told_apart() -> None:
    async with answering(packet(Command.AUTH, 1, 0, bytes(20))) as port:
        with pytest.raises(AdbUnauthorized, match="asks for a key"):
            await AdbClient.connect("127.0.0.1", port)


async def test_a_phone_that_is_none_or_says_nothing_is_unreachable() -> None:
    async with answering(b"220 smtp.example.com ESMTP Postfix\r\n") as port:
        with pytest.raises(AdbGarbled):
            await AdbClient.connect("127.0.0.1", port)
    async with answering(b"") as port:
        with pytest.raises(AdbUnreachable, match=r"within 0\.2 s"):
            await AdbClient.connect("127.0.0.1", port, deadline_s=0.2)
    with pytest.raises(AdbUnreachable, match="does not answer"):
        await AdbClient.connect("127.0.0.1", port)


async def test_a_shell_that_ends_without_an_exit_code_is_an_error() -> None:
    greeting = packet(Command.CNXN, VERSION, MAX_PAYLOAD, b"device::features=shell_v2")
    async with (
        answering(greeting, packet(Command.OKAY, 9, 1) + packet(Command.CLSE, 9, 1)) as port,
        await AdbClient.connect("127.0.0.1", port) as client,
    ):
        with pytest.raises(AdbGarbled, match="exit code"):
            await client.shell("ls", timeout_s=5)
