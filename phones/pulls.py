"""Images on their way to an engine: one pull an image, however many phones wait for it."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Final

from phones.engine import Engine
from phones.runtime import RuntimeFault, RuntimeUnavailable

TELL_EVERY_S: Final = 1.0


@dataclass(eq=False, slots=True)
class _Pull:
    task: "asyncio.Task[None] | None" = None
    percent: int = 0


class Pulls:
    """The images that an engine has or is fetching. Close it before the engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._present: set[str] = set()
        self._under_way: dict[str, _Pull] = {}

    async def close(self) -> None:
        """Break off every pull; what arrived of it is kept by the engine."""
        tasks = [pull.task for pull in self._under_way.values() if pull.task is not None]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def forget(self, reference: str | None = None) -> None:
        """Ask the engine again whether it has this image, or any."""
        if reference is None:
            self._present.clear()
        self._present.discard(reference or "")

    async def has(self, reference: str) -> bool:
        """Whether the engine has the image."""
        if reference not in self._present and await self._engine.has_image(reference):
            self._present.add(reference)
        return reference in self._present

    async def follow(self, reference: str) -> AsyncIterator[int]:
        """The percentage that is there, now and again, until all is. Raises RuntimeFault with the reason."""
        if await self.has(reference):
            return
        pull = self._under_way.get(reference)
        if pull is None:
            pull = self._under_way[reference] = _Pull()
            pull.task = asyncio.create_task(self._fetch(reference, pull))
            pull.task.add_done_callback(_hear)
        assert pull.task is not None
        while not pull.task.done():
            yield pull.percent
            await asyncio.wait({pull.task}, timeout=TELL_EVERY_S)
        if pull.task.cancelled():
            raise RuntimeUnavailable("the image's way here was broken off")
        pull.task.result()

    async def _fetch(self, reference: str, pull: _Pull) -> None:
        try:
            async for percent in self._engine.pull(reference):
                pull.percent = percent
            if not await self._engine.has_image(reference):
                raise RuntimeFault(f"the image {reference} did not arrive")
            self._present.add(reference)
        except RuntimeUnavailable:
            raise
        except RuntimeFault as fault:
            raise RuntimeFault(f"the image {reference} cannot be had: {fault}") from None
        finally:
            del self._under_way[reference]


def _hear(task: asyncio.Task[None]) -> None:
    """Take note of how a pull ended, as everybody who waited for it may have gone."""
    if not task.cancelled():
        task.exception()
