"""Streams: every notification to every open reader once, in order, with no seam between old and new."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Final
from uuid import UUID

from aiohttp import WSCloseCode

from plugins.notify.model import Letter
from server.db import DatabaseUnavailable
from server.observe import log
from server.sockets import Outbox

STREAMS_PER_USER: Final = 20
REPLAY_PAGE: Final = 100

After = Callable[[UUID, int, int], Awaitable[Sequence[Letter]]]


@dataclass(eq=False, slots=True)
class Reader:
    """One open stream, and how far it has come."""

    outbox: Outbox
    locale: str
    sent: int = 0
    known: int = 0
    replaying: bool = True  # what rings meanwhile is only noted in `known`
    replay: asyncio.Task[None] | None = None


class Streams:
    """The open streams by user. `after(user_id, id, limit)` reads stored letters in ascending order.

    Each reader keeps the last number it was sent. A letter that is the next one goes out as it
    comes; any other says that some are missing, and those are read from the database.
    """

    def __init__(self, after: After) -> None:
        self._after = after
        self._readers: dict[UUID, list[Reader]] = {}  # the oldest first

    def join(self, outbox: Outbox, locale: str) -> Reader:
        """Note from now on what comes for a reader; nothing is sent before `begin`."""
        reader = Reader(outbox, locale)
        readers = self._readers.setdefault(outbox.user_id, [])
        readers.append(reader)
        going_on = [other for other in readers if not other.outbox.ended]
        if len(going_on) > STREAMS_PER_USER:
            going_on[0].outbox.end(WSCloseCode.POLICY_VIOLATION, b"too many streams")
        return reader

    def begin(self, reader: Reader, since: int | None, last_id: int) -> None:
        """Send what is stored after `since`, then what comes; without `since` what comes after `last_id`."""
        reader.sent = last_id if since is None else min(since, last_id)
        reader.known = max(reader.known, last_id)
        self._go_on(reader)

    async def leave(self, reader: Reader) -> None:
        """The reader is gone."""
        user_id = reader.outbox.user_id
        self._readers[user_id].remove(reader)
        if not self._readers[user_id]:
            del self._readers[user_id]
        if reader.replay is not None:
            reader.replay.cancel()
            await asyncio.gather(reader.replay, return_exceptions=True)

    def ring(self, user_id: UUID, letter: Letter) -> None:
        """A letter was stored."""
        readers = self._readers.get(user_id)
        if not readers:
            return
        frame = cache(letter.frame)  # encoded once for all who read the same language
        for reader in readers:
            reader.known = max(reader.known, letter.id)
            if reader.replaying:
                continue
            if letter.id == reader.sent + 1:
                reader.outbox.push(frame(reader.locale))
                reader.sent = letter.id
            else:
                self._go_on(reader)

    def _go_on(self, reader: Reader) -> None:
        reader.replaying = reader.sent < reader.known
        if reader.replaying:
            reader.replay = asyncio.create_task(self._replay(reader))

    async def _replay(self, reader: Reader) -> None:
        """Send what is stored and was not sent, until nothing is missing."""
        try:
            while reader.sent < reader.known and not reader.outbox.ended:
                await self._replay_page(reader)
        except DatabaseUnavailable:
            reader.outbox.end(WSCloseCode.TRY_AGAIN_LATER, b"database away")
            return
        except Exception:
            log.exception("a stream broke")
            reader.outbox.end(WSCloseCode.INTERNAL_ERROR, b"stream broke")
            return
        # No await since the last look at `known`: what rings from here on goes out directly.
        reader.replaying = False

    async def _replay_page(self, reader: Reader) -> None:
        known = reader.known
        letters = await self._after(reader.outbox.user_id, reader.sent, REPLAY_PAGE)
        for letter in letters:
            reader.outbox.push(letter.frame(reader.locale))
            reader.sent = letter.id
            if reader.outbox.behind:
                await reader.outbox.drained()
        if len(letters) < REPLAY_PAGE:
            reader.sent = max(reader.sent, known)  # the rest is older than what is kept
