"""Background work: loops that never end, recurring jobs, and bounded pieces of work."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine

import aiojobs
from aiohttp import web

from server.clock import Clock, sleep_unless
from server.observe import Metrics, log

WORK_LIMIT = 64


class Jobs:
    """Two aiojobs schedulers: loops are cancelled on stop, work is awaited up to the grace.

    A loop would hold a slot of a limit for ever, so loops have none; work is bounded and waits its turn.
    """

    def __init__(self, app: web.Application, clock: Clock, metrics: Metrics, *, grace_s: float) -> None:
        self._app = app
        self._clock = clock
        self._metrics = metrics
        self._loops = aiojobs.Scheduler(limit=None, close_timeout=5.0, exception_handler=_log_failure)
        self._work = aiojobs.Scheduler(
            limit=WORK_LIMIT,
            pending_limit=0,
            wait_timeout=grace_s,
            close_timeout=1.0,
            exception_handler=_log_failure,
        )
        self._doorbells: dict[str, asyncio.Event] = {}
        self._stopping = False

    async def loop(self, name: str, run: Coroutine[object, object, None]) -> None:
        """Own a task that never ends by itself."""
        await self._loops.spawn(run, name=name)

    async def work(self, name: str, run: Coroutine[object, object, None]) -> None:
        """Own a piece of work that ends; it waits for a free place."""
        if self._stopping:
            run.close()
            return
        await self._work.spawn(run, name=name)

    async def repeat(
        self, name: str, every_s: float, deadline_s: float, run: Callable[[web.Application], Awaitable[None]]
    ) -> None:
        """Run a job now and again `every_s` after each end, until the server stops."""
        self._doorbells[name] = asyncio.Event()
        await self.loop(name, self._repeat(name, every_s, deadline_s, run))

    def ring(self, name: str) -> None:
        """Have a recurring job run again at once."""
        if bell := self._doorbells.get(name):
            bell.set()

    async def _repeat(
        self, name: str, every_s: float, deadline_s: float, run: Callable[[web.Application], Awaitable[None]]
    ) -> None:
        bell = self._doorbells[name]
        while True:
            bell.clear()
            outcome = "failed"
            try:
                async with asyncio.timeout(deadline_s):
                    await run(self._app)
                outcome = "done"
            except Exception as error:
                log.warning("job failed", extra={"job": name, "error": f"{type(error).__name__}: {error}"})
            self._metrics.jobs.labels(name, outcome).inc()
            await sleep_unless(bell, self._clock, every_s)

    async def close(self) -> None:
        """End the loops at once, then await the work up to the grace and cancel what is left."""
        self._stopping = True
        await self._loops.close()
        await self._work.wait_and_close()


def _log_failure(_scheduler: aiojobs.Scheduler, context: dict[str, object]) -> None:
    error = context.get("exception")
    log.error(
        "background work failed",
        extra={"job": str(context.get("job", ""))},
        exc_info=error if isinstance(error, BaseException) else None,
    )
