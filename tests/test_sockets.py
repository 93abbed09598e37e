"""Open sockets: sends that wait for nobody, and ends that reach everybody."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any
from uuid import uuid4

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient, TestServer

from server.auth import AUTHENTICATOR, Caller
from server.clock import SystemClock
from server.observe import Metrics
from server.sockets import BACKLOG_LIMIT_BYTES, Outbox, Sockets, until_closed

CALLER = Caller(uuid4(), "ann@example.com", "", "user", uuid4())
Connect = Callable[[], Awaitable[tuple[aiohttp.ClientWebSocketResponse[Any], Outbox]]]


class Living:
    """Sessions that live until told otherwise."""

    def __init__(self) -> None:
        self.ended = False

    def caller_of_session(self, session_id: object) -> Caller | None:
        """The one caller."""
        return None if self.ended else CALLER

    def caller_of_token(self, token: str) -> Caller | None:
        """Nobody."""
        return None

    def redeem_ticket(self, ticket: str) -> Caller | None:
        """Nobody."""
        return None


@pytest.fixture
def sockets() -> Sockets:
    """No socket yet."""
    return Sockets(Metrics())


@pytest.fixture
def sessions() -> Living:
    """A session that lives."""
    return Living()


@pytest.fixture
async def connect(sockets: Sockets, sessions: Living) -> AsyncIterator[Connect]:
    """Open sockets of a server that only sends."""
    opened: asyncio.Queue[Outbox] = asyncio.Queue()
    clients: list[aiohttp.ClientWebSocketResponse[Any]] = []

    async def serve(request: web.Request) -> web.WebSocketResponse:
        async with sockets.open(request, CALLER, heartbeat_s=20) as outbox:
            opened.put_nowait(outbox)
            await until_closed(outbox, SystemClock())
        return outbox.socket

    app = web.Application()
    app[AUTHENTICATOR] = sessions
    app.router.add_get("/", serve)
    async with TestClient(TestServer(app)) as client:

        async def one() -> tuple[aiohttp.ClientWebSocketResponse[Any], Outbox]:
            clients.append(await client.ws_connect("/"))
            return clients[-1], await opened.get()

        yield one
        await sockets.close_all()
        for socket in clients:
            if (transport := transport_of(socket)) is not None:
                transport.abort()


def transport_of(socket: aiohttp.ClientWebSocketResponse[Any]) -> asyncio.Transport | None:
    """The client's end of the connection, as long as there is one."""
    connection = socket._response.connection
    return connection.transport if connection is not None else None


def stall(socket: aiohttp.ClientWebSocketResponse[Any]) -> asyncio.Transport:
    """Have the client read no more."""
    transport = transport_of(socket)
    assert transport is not None
    transport.pause_reading()
    return transport


def open_sockets(sockets: Sockets) -> float:
    """What the metric says."""
    return sockets._metrics.registry.get_sample_value("cloudphone_sockets") or 0.0


async def until(holds: Callable[[], bool]) -> None:
    """Wait until it holds."""
    async with asyncio.timeout(10):
        while not holds():
            await asyncio.sleep(0.01)


async def test_frames_arrive_in_order_and_the_outbox_rests_without_a_task(connect: Connect) -> None:
    socket, outbox = await connect()
    for number in range(1000):
        outbox.push(f"frame {number} ü".encode())
    await asyncio.wait_for(outbox.drained(), 10)
    assert outbox._sender is not None
    assert outbox._sender.done()
    assert [await socket.receive_str(timeout=5) for _ in range(1000)] == [f"frame {n} ü" for n in range(1000)]


async def test_a_reader_who_stopped_is_dropped_once_a_mebibyte_waits(
    connect: Connect, sockets: Sockets
) -> None:
    socket, outbox = await connect()
    stall(socket)
    frame = b"x" * 65536
    pushed = 0
    while not outbox.ended:
        outbox.push(frame)
        pushed += len(frame)
        assert outbox._waiting_bytes + outbox._unsent_bytes() <= BACKLOG_LIMIT_BYTES + len(frame)
        await asyncio.sleep(0.001)
        assert pushed < 64 << 20
    assert pushed > BACKLOG_LIMIT_BYTES
    await until(lambda: open_sockets(sockets) == 0)
    assert not sockets.of(CALLER.user_id)


async def test_a_dropped_reader_who_reads_again_learns_why(connect: Connect) -> None:
    socket, outbox = await connect()
    transport = stall(socket)
    while not outbox.ended:
        outbox.push(b"x" * 65536)
        await asyncio.sleep(0.001)
    transport.resume_reading()
    async with asyncio.timeout(10):
        async for _ in socket:
            pass
    assert socket.close_code == 4008


async def test_a_reader_who_is_slow_but_reads_gets_everything(connect: Connect) -> None:
    socket, outbox = await connect()
    for number in range(100):
        outbox.push(f"{number}".encode() + b"x" * 30_000)
        await outbox.drained()
        if number % 10 == 0:
            await asyncio.sleep(0.005)
    received = [await socket.receive_str(timeout=5) for _ in range(100)]
    assert [int(text.rstrip("x")) for text in received] == list(range(100))


async def test_an_ended_session_closes_its_own_sockets(
    connect: Connect, sockets: Sockets, sessions: Living
) -> None:
    (socket, _), (other, _) = await connect(), await connect()
    sockets.end_session(CALLER.user_id, uuid4())
    assert open_sockets(sockets) == 2
    sockets.end_session(CALLER.user_id, CALLER.session_id)
    for closed in (socket, other):
        assert (await closed.receive(timeout=5)).data == 4401
    await until(lambda: open_sockets(sockets) == 0)
    sessions.ended = True
    late, outbox = await connect()
    assert (await late.receive(timeout=5)).data == 4401
    assert outbox.ended


async def test_everybody_is_told_when_the_server_goes_and_nobody_holds_it_up(
    connect: Connect, sockets: Sockets
) -> None:
    (socket, _), (deaf, outbox) = await connect(), await connect()
    stall(deaf)
    outbox.push(b"x" * 900_000)
    began = asyncio.get_running_loop().time()
    reading = asyncio.create_task(socket.receive(timeout=5))
    await sockets.close_all()
    assert (await reading).data == aiohttp.WSCloseCode.GOING_AWAY
    assert asyncio.get_running_loop().time() - began < 4
    late, _ = await connect()
    assert (await late.receive(timeout=5)).data == aiohttp.WSCloseCode.GOING_AWAY


async def test_a_reader_who_vanishes_leaves_nothing_behind(connect: Connect, sockets: Sockets) -> None:
    socket, outbox = await connect()
    transport = stall(socket)
    for _ in range(10):
        outbox.push(b"x" * 65536)
    transport.abort()
    await until(lambda: open_sockets(sockets) == 0)
    outbox.push(b"too late")
    assert outbox.ended
    assert all(task is None or task.done() for task in (outbox._sender, outbox._closing))
