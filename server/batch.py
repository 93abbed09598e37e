"""Take together what arrives together: one statement, one fsync, for many callers."""

import asyncio
import contextvars
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from typing import Generic, TypeVar

Item = TypeVar("Item")
Answer = TypeVar("Answer")


class LaneClosed(Exception):
    """The lane takes no more items; the server is stopping."""


class Lane(Generic[Item, Answer]):
    """One batch after the other: what arrives while one runs goes into the next.

    `run` gets at most `limit` items and answers one result for each, in their order; an exception
    among the results is raised to that item's caller, one raised by `run` to the whole batch. It
    has to bound its own waiting.
    """

    def __init__(
        self, run: Callable[[Sequence[Item]], Awaitable[Sequence[Answer | Exception]]], *, limit: int = 128
    ) -> None:
        self._run = run
        self._limit = limit
        self._waiting: deque[tuple[Item, asyncio.Future[Answer]]] = deque()
        self._worker: asyncio.Task[None] | None = None
        self._closed = False

    async def do(self, item: Item) -> Answer:
        """The answer for `item`, from the next batch.

        A caller that is cancelled takes its item back as long as its batch has not begun, and
        never disturbs the others. Raises LaneClosed once the lane is.
        """
        if self._closed:
            raise LaneClosed("this lane is closed")
        future: asyncio.Future[Answer] = asyncio.get_running_loop().create_future()
        self._waiting.append((item, future))
        if self._worker is None or self._worker.done():
            # An empty context: the batch belongs to no one caller's request.
            self._worker = asyncio.create_task(self._work(), context=contextvars.Context())
        return await future

    async def close(self) -> None:
        """Take nothing more, and finish what is waiting."""
        self._closed = True
        if self._worker is not None:
            await self._worker

    async def _work(self) -> None:
        batch: list[tuple[Item, asyncio.Future[Answer]]] = []
        try:
            while batch := self._next_batch():
                await self._settle(batch)
        finally:
            for _, future in (*batch, *self._waiting):
                if not future.done():
                    future.set_exception(LaneClosed("this lane was closed before the answer came"))
            self._waiting.clear()

    def _next_batch(self) -> list[tuple[Item, asyncio.Future[Answer]]]:
        batch: list[tuple[Item, asyncio.Future[Answer]]] = []
        while self._waiting and len(batch) < self._limit:
            item, future = self._waiting.popleft()
            if not future.done():
                batch.append((item, future))
        return batch

    async def _settle(self, batch: Sequence[tuple[Item, asyncio.Future[Answer]]]) -> None:
        answers: Sequence[Answer | Exception]
        try:
            answers = await self._run([item for item, _ in batch])
            if len(answers) != len(batch):
                raise RuntimeError(f"{len(batch)} items got {len(answers)} answers")
        except Exception as error:
            answers = [error] * len(batch)
        for (_, future), answer in zip(batch, answers, strict=True):
            if future.done():
                continue
            if isinstance(answer, Exception):
                future.set_exception(answer)
            else:
                future.set_result(answer)
