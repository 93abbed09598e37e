"""Open WebSockets: sends that never wait for a slow reader, and an orderly end for all of them."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID

from aiohttp import WSCloseCode, WSMsgType, web

from server.auth import AUTHENTICATOR, Caller
from server.clock import Clock
from server.observe import Metrics

BACKLOG_LIMIT_BYTES = 1 << 20
INCOMING_LIMIT_BYTES = 4096
INCOMING_PER_SECOND = 20
SEND_DEADLINE_S = 30.0
CLOSE_DEADLINE_S = 2.0
SLOW_READER = 4008
SESSION_ENDED = 4401


class Outbox:
    """One socket's waiting frames. A task exists only while there is something to send."""

    def __init__(self, request: web.Request, socket: web.WebSocketResponse, caller: Caller) -> None:
        self.socket = socket
        self.user_id = caller.user_id
        self.session_id = caller.session_id
        self._request = request
        self._waiting: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._sender: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None
        self._left = False

    @property
    def ended(self) -> bool:
        """Whether nothing more is sent."""
        return self._left or self._closing is not None or self.socket.closed

    @property
    def behind(self) -> bool:
        """Whether so much waits that somebody who can wait should."""
        return self._waiting_bytes >= BACKLOG_LIMIT_BYTES // 4

    def push(self, frame: bytes) -> None:
        """Send a text frame, in UTF-8, as soon as the reader takes it.

        A reader for whom 1 MiB waits is dropped.
        """
        if self.ended:
            return
        if self._waiting_bytes + self._unsent_bytes() >= BACKLOG_LIMIT_BYTES:
            self.end(SLOW_READER, b"too slow")
            return
        self._waiting.append(frame)
        self._waiting_bytes += len(frame)
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send())

    def _unsent_bytes(self) -> int:
        """What was handed to the connection and is not yet on its way."""
        transport = self._request.transport
        return transport.get_write_buffer_size() if transport is not None else 0

    async def _send(self) -> None:
        try:
            while self._waiting:
                frame = self._waiting.popleft()
                self._waiting_bytes -= len(frame)
                async with asyncio.timeout(SEND_DEADLINE_S):
                    await self.socket.send_frame(frame, WSMsgType.TEXT)
        except (TimeoutError, ConnectionError):
            self.end(SLOW_READER, b"too slow")

    async def drained(self) -> None:
        """Wait until the reader has taken what was pushed, or is given up."""
        if self._sender is not None and not self._sender.done():
            await asyncio.wait([self._sender])

    def end(self, code: int, reason: bytes) -> None:
        """Start closing; frames still waiting are not sent, their rows are there to be read again."""
        self._waiting.clear()
        self._waiting_bytes = 0
        if self._closing is None and not self._left:
            self._closing = asyncio.create_task(self._close(code, reason))

    async def _close(self, code: int, reason: bytes) -> None:
        # A sender that waits for the reader shares the connection's one waiting place with this task;
        # cancelled, it would take that away. It ends when the reader reads, or with the connection.
        try:
            async with asyncio.timeout(CLOSE_DEADLINE_S):
                await self.socket.close(code=code, message=reason)
        except (TimeoutError, ConnectionError):
            self._cut()

    async def settle(self) -> None:
        """Send nothing more; wait until no task is left and the connection has nothing to send."""
        self._left = True
        if self._closing is None and self._sender is not None:
            self._sender.cancel()
        tasks = [task for task in (self._sender, self._closing) if task is not None]
        await asyncio.gather(*tasks, return_exceptions=True)
        if self._unsent_bytes():
            self._cut()

    def _cut(self) -> None:
        """End the connection at once: a close that waits for a reader who does not read never ends."""
        if self._request.transport is not None:
            self._request.transport.abort()


class Sockets:
    """Every open socket by its user, so that events reach it and endings close it."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._by_user: dict[UUID, set[Outbox]] = {}
        self._closing = False

    @asynccontextmanager
    async def open(
        self, request: web.Request, caller: Caller, *, heartbeat_s: float
    ) -> AsyncIterator[Outbox]:
        """Upgrade the request to a WebSocket that mostly sends; it is closed when the block is left."""
        socket = web.WebSocketResponse(
            heartbeat=heartbeat_s, compress=False, max_msg_size=INCOMING_LIMIT_BYTES
        )
        async with asyncio.timeout(SEND_DEADLINE_S):
            await socket.prepare(request)
        outbox = Outbox(request, socket, caller)
        self.add(outbox)
        if request.app[AUTHENTICATOR].caller_of_session(caller.session_id) is None:
            outbox.end(SESSION_ENDED, b"session ended")
        try:
            yield outbox
        finally:
            await self.remove(outbox)

    def add(self, outbox: Outbox) -> None:
        """Count a socket in."""
        self._by_user.setdefault(outbox.user_id, set()).add(outbox)
        self._metrics.sockets.inc()
        if self._closing:
            outbox.end(WSCloseCode.GOING_AWAY, b"server stops")

    async def remove(self, outbox: Outbox) -> None:
        """Count a socket out and let its tasks end."""
        of_user = self._by_user[outbox.user_id]
        of_user.discard(outbox)
        if not of_user:
            del self._by_user[outbox.user_id]
        self._metrics.sockets.dec()
        await outbox.settle()

    def of(self, user_id: UUID) -> frozenset[Outbox]:
        """The user's open sockets."""
        return frozenset(self._by_user.get(user_id, ()))

    def end_session(self, user_id: UUID, session_id: UUID) -> None:
        """Close what a session that ended still holds open."""
        for outbox in self.of(user_id):
            if outbox.session_id == session_id:
                outbox.end(SESSION_ENDED, b"session ended")

    async def close_all(self) -> None:
        """Tell every reader that the server goes away."""
        self._closing = True
        outboxes = [outbox for of_user in self._by_user.values() for outbox in of_user]
        for outbox in outboxes:
            outbox.end(WSCloseCode.GOING_AWAY, b"server stops")
        closing = [outbox._closing for outbox in outboxes if outbox._closing is not None]
        await asyncio.gather(*closing, return_exceptions=True)


async def until_closed(outbox: Outbox, clock: Clock) -> None:
    """Wait for the end of a socket whose reader has nothing to say.

    Its text frames are thrown away, up to 20 a second; more, or a binary one, end the socket.
    """
    second_ends, received = 0.0, 0
    async for message in outbox.socket:
        if message.type is WSMsgType.BINARY:
            outbox.end(WSCloseCode.UNSUPPORTED_DATA, b"text only")
        if clock.monotonic() >= second_ends:
            second_ends, received = clock.monotonic() + 1, 0
        received += 1
        if received > INCOMING_PER_SECOND:
            outbox.end(WSCloseCode.POLICY_VIOLATION, b"too many messages")
