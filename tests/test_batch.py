"""The lane: what arrives together is taken together, and nobody's trouble is another's."""

import asyncio
from collections.abc import Sequence

import pytest

from server.batch import Lane, LaneClosed


class Counter:
    """Doubles numbers, a batch at a time, and remembers the batches. Waits for `gate`."""

    def __init__(self) -> None:
        self.batches: list[list[int]] = []
        self.gate = asyncio.Event()
        self.gate.set()

    async def run(self, items: Sequence[int]) -> Sequence[int | Exception]:
        self.batches.append(list(items))
        await self.gate.wait()
        if 13 in items:
            raise ConnectionError("unlucky batch")
        return [ValueError(f"{item} is negative") if item < 0 else item * 2 for item in items]


async def test_what_arrives_while_a_batch_runs_goes_into_the_next() -> None:
    counter = Counter()
    lane = Lane(counter.run, limit=4)
    counter.gate.clear()
    first = asyncio.create_task(lane.do(1))
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    others = [asyncio.create_task(lane.do(number)) for number in range(2, 8)]
    await asyncio.sleep(0)
    counter.gate.set()
    assert await asyncio.gather(first, *others) == [2, 4, 6, 8, 10, 12, 14]
    assert counter.batches == [[1], [2, 3, 4, 5], [6, 7]]


async def test_an_exception_for_one_item_reaches_its_caller_alone() -> None:
    lane = Lane(Counter().run)
    answers = await asyncio.gather(lane.do(1), lane.do(-1), lane.do(2), return_exceptions=True)
    assert answers[0] == 2
    assert isinstance(answers[1], ValueError)
    assert answers[2] == 4


async def test_an_exception_of_the_run_reaches_its_whole_batch_and_no_later_one() -> None:
    lane = Lane(Counter().run)
    answers = await asyncio.gather(lane.do(13), lane.do(1), return_exceptions=True)
    assert [type(answer) for answer in answers] == [ConnectionError, ConnectionError]
    assert await lane.do(1) == 2


async def test_a_cancelled_caller_leaves_the_others_their_answers() -> None:
    counter = Counter()
    counter.gate.clear()
    lane = Lane(counter.run)
    impatient, patient = asyncio.create_task(lane.do(1)), asyncio.create_task(lane.do(2))
    await asyncio.sleep(0.01)
    late = asyncio.create_task(lane.do(3))
    await asyncio.sleep(0)
    impatient.cancel()
    late.cancel()
    counter.gate.set()
    assert await patient == 4
    await lane.close()
    assert counter.batches == [[1, 2]]  # what had not begun was taken back


async def test_a_closed_lane_finishes_what_waits_and_takes_nothing_more() -> None:
    counter = Counter()
    counter.gate.clear()
    lane = Lane(counter.run, limit=1)
    waiting = [asyncio.create_task(lane.do(number)) for number in (1, 2)]
    await asyncio.sleep(0.01)
    closing = asyncio.create_task(lane.close())
    await asyncio.sleep(0.01)
    with pytest.raises(LaneClosed):
        await lane.do(3)
    counter.gate.set()
    await closing
    assert [await task for task in waiting] == [2, 4]


async def test_a_lane_closed_by_force_tells_its_callers() -> None:
    counter = Counter()
    counter.gate.clear()
    lane = Lane(counter.run)
    waiting = asyncio.create_task(lane.do(1))
    await asyncio.sleep(0.01)
    with pytest.raises(TimeoutError):
        async with asyncio.timeout(0.01):
            await lane.close()
    with pytest.raises(LaneClosed):
        await waiting
