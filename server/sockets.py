"""Open WebSockets: sends that never wait for a slow reader, and an orderly end for all of them."""

import asyncio
from collections import deque
from uuid import UUID

from aiohttp import WSCloseCode, web

from server.observe import Metrics

BACKLOG_LIMIT_BYTES = 1 << 20
SEND_DEADLINE_S = 30.0
CLOSE_DEADLINE_S = 2.0
SLOW_READER = 4008
SESSION_ENDED = 4401


class Outbox:
    """One socket's waiting frames. A task exists only while there is something to send."""

    def __init__(self, socket: web.WebSocketResponse, user_id: UUID, session_id: UUID) -> None:
        self.socket = socket
        self.user_id = user_id
        self.session_id = session_id
        self._waiting: deque[str] = deque()
        self._waiting_bytes = 0
        self._sender: asyncio.Task[None] | None = None
        self._closing: asyncio.Task[None] | None = None

    def push(self, frame: str) -> None:
        """Send a text frame as soon as the reader takes it; a reader 1 MiB behind is dropped."""
        if self._closing is not None or self.socket.closed:
            return
        if self._waiting_bytes > BACKLOG_LIMIT_BYTES:
            self.end(SLOW_READER, b"too slow")
            return
        self._waiting.append(frame)
        self._waiting_bytes += len(frame)
        if self._sender is None or self._sender.done():
            self._sender = asyncio.create_task(self._send())

    async def _send(self) -> None:
        try:
            while self._waiting:
                async with asyncio.timeout(SEND_DEADLINE_S):
                    await self.socket.send_str(self._waiting[0])
                self._waiting_bytes -= len(self._waiting.popleft())
        except (TimeoutError, ConnectionError):
            self.end(SLOW_READER, b"too slow")

    def end(self, code: int, reason: bytes) -> None:
        """Start closing; frames still waiting are not sent, their rows are there to be read again."""
        self._waiting.clear()
        self._waiting_bytes = 0
        if self._closing is None:
            self._closing = asyncio.create_task(self._close(code, reason))

    async def _close(self, code: int, reason: bytes) -> None:
        if self._sender is not None and self._sender is not asyncio.current_task():
            self._sender.cancel()
        try:
            async with asyncio.timeout(CLOSE_DEADLINE_S):
                await self.socket.close(code=code, message=reason)
        except (TimeoutError, ConnectionError):
            pass
        finally:
            transport = self.socket._req.transport if self.socket._req is not None else None
            if transport is not None and code == SLOW_READER:
                transport.abort()

    async def settle(self) -> None:
        """Wait until the outbox has no task left."""
        tasks = [task for task in (self._sender, self._closing) if task is not None and not task.done()]
        if self._closing is None:
            for task in tasks:
                task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class Sockets:
    """Every open socket by its user, so that events reach it and endings close it."""

    def __init__(self, metrics: Metrics) -> None:
        self._metrics = metrics
        self._by_user: dict[UUID, set[Outbox]] = {}
        self._closing = False

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
        await asyncio.gather(*(outbox.settle() for outbox in outboxes))
