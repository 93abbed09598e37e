"""Whose turn it is at the phones' machine: a few at once, the others in order and visibly so."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from uuid import UUID


class Turns:
    """A queue for the machine. A phone that shall end goes before those that shall start."""

    def __init__(self, limit: int) -> None:
        self._free = limit
        self._urgent: dict[UUID, asyncio.Future[None]] = {}
        self._waiting: dict[UUID, asyncio.Future[None]] = {}

    def place_of(self, device_id: UUID) -> int | None:
        """Its place in the queue, 1 is next; None where it does not wait."""
        for place, waiting in enumerate((*self._urgent, *self._waiting), start=1):
            if waiting == device_id:
                return place
        return None

    @asynccontextmanager
    async def take(self, device_id: UUID, *, urgent: bool) -> AsyncIterator[None]:
        """Wait for a turn and keep it for the block. A device waits once at a time."""
        await self._wait(device_id, self._urgent if urgent else self._waiting)
        try:
            yield
        finally:
            self._pass_on()

    async def _wait(self, device_id: UUID, queue: dict[UUID, asyncio.Future[None]]) -> None:
        turn = queue[device_id] = asyncio.get_running_loop().create_future()
        self._hand_out()
        try:
            await turn
        except asyncio.CancelledError:
            queue.pop(device_id, None)
            if not turn.cancelled():
                self._pass_on()  # it came in the very moment in which nobody wanted it any more
            raise

    def _pass_on(self) -> None:
        self._free += 1
        self._hand_out()

    def _hand_out(self) -> None:
        for queue in (self._urgent, self._waiting):
            for device_id, turn in list(queue.items()):
                # Who gives up stands in the queue until its task has run, and gets no turn.
                if not turn.done() and self._free:
                    self._free -= 1
                    del queue[device_id]
                    turn.set_result(None)


class Place(int):
    """A place in a queue, for people."""

    @property
    def ordinal(self) -> str:
        """1st, 2nd, 3rd, 4th, 11th."""
        teen = 10 < self % 100 < 20
        return f"{int(self)}{'th' if teen else {1: 'st', 2: 'nd', 3: 'rd'}.get(self % 10, 'th')}"
