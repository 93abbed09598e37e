"""Turns at the phones' machine: few at once, in order, and none lost or doubled, whoever gives up when."""

import asyncio
from contextlib import suppress
from uuid import UUID, uuid4

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plugins.devices.turns import Place, Turns


class Taker:
    """A device that wants a turn and keeps it until told to leave."""

    def __init__(self, turns: Turns, *, urgent: bool = False, device_id: UUID | None = None) -> None:
        self.id = device_id or uuid4()
        self.urgent = urgent
        self.has_turn = False
        self._turns = turns
        self._leave = asyncio.Event()
        self.task = asyncio.create_task(self._take())

    async def _take(self) -> None:
        async with self._turns.take(self.id, urgent=self.urgent):
            self.has_turn = True
            try:
                await self._leave.wait()
            finally:
                self.has_turn = False

    def leave(self) -> None:
        """Give the turn back, soon."""
        self._leave.set()

    def cancel(self) -> None:
        """Give up, waiting or not."""
        self.task.cancel()


async def quiet() -> None:
    """Let everything happen that can."""
    for _ in range(10):
        await asyncio.sleep(0)


async def end(*takers: Taker) -> None:
    for taker in takers:
        taker.cancel()
    await asyncio.gather(*(taker.task for taker in takers), return_exceptions=True)


@pytest.mark.parametrize("limit", [1, 2, 5])
async def test_no_more_than_the_limit_have_a_turn_at_once(limit: int) -> None:
    turns = Turns(limit)
    takers = [Taker(turns) for _ in range(8)]
    for served in range(8):
        await quiet()
        having = [taker for taker in takers if taker.has_turn]
        assert having == takers[served : served + limit], "in the order in which they came"
        having[0].leave()
        await having[0].task


async def test_who_is_urgent_goes_before_those_who_waited_longer() -> None:
    turns = Turns(1)
    holder, *waiting = (Taker(turns) for _ in range(3))
    await quiet()
    hasty = [Taker(turns, urgent=True) for _ in range(2)]
    await quiet()
    for expected in (*hasty, *waiting):
        places = [turns.place_of(taker.id) for taker in (*hasty, *waiting)]
        assert [place for place in places if place] == list(range(1, len([*filter(None, places)]) + 1))
        holder.leave()
        await quiet()
        assert expected.has_turn
        holder = expected
    await end(holder)


async def test_a_place_in_the_queue_moves_up_when_somebody_before_gives_up() -> None:
    turns = Turns(1)
    holder, first, second = (Taker(turns) for _ in range(3))
    await quiet()
    assert [turns.place_of(taker.id) for taker in (holder, first, second)] == [None, 1, 2]
    assert turns.place_of(uuid4()) is None
    await end(first)
    assert turns.place_of(second.id) == 1
    holder.leave()
    await quiet()
    assert second.has_turn
    assert turns.place_of(second.id) is None
    await end(second)


async def test_a_turn_that_comes_in_the_moment_of_giving_up_goes_to_the_next() -> None:
    turns = Turns(1)
    holder, first, second = (Taker(turns) for _ in range(3))
    await quiet()
    holder.leave()
    await asyncio.sleep(0)  # the turn is given to the first, who has not heard of it yet
    assert not first.has_turn
    first.cancel()
    await quiet()
    assert second.has_turn
    await end(second)


async def test_who_comes_while_another_gives_up_does_not_wait_for_nobody() -> None:
    turns = Turns(1)
    waiting: list[asyncio.Task[None]] = []

    async def wait() -> None:
        async with turns.take(uuid4(), urgent=False):
            pass

    async with turns.take(uuid4(), urgent=False):
        waiting.append(asyncio.create_task(wait()))
        await quiet()
        waiting[0].cancel()
    # The turn is free, and who gave up stands in the queue until its task runs again.
    async with asyncio.timeout(1), turns.take(uuid4(), urgent=False):
        pass
    with suppress(asyncio.CancelledError):
        await waiting[0]


async def test_whoever_fails_in_its_turn_gives_it_back() -> None:
    turns = Turns(1)
    with pytest.raises(ZeroDivisionError):
        async with turns.take(uuid4(), urgent=True):
            raise ZeroDivisionError
    async with asyncio.timeout(1), turns.take(uuid4(), urgent=False):
        pass


Steps = st.lists(
    st.tuples(
        st.sampled_from(["come", "come urgently", "leave", "give up", "pass", "pass"]),
        st.integers(min_value=0, max_value=7),
    ),
    max_size=60,
)


@settings(max_examples=300)
@given(limit=st.integers(min_value=1, max_value=3), steps=Steps)
def test_no_turn_is_lost_or_doubled(limit: int, steps: list[tuple[str, int]]) -> None:
    async def play() -> None:
        turns = Turns(limit)
        takers: list[Taker] = []
        for step, which in steps:
            there = [taker for taker in takers if not taker.task.done()]
            if step == "pass":
                await asyncio.sleep(0)  # one step of the loop, in which not everything has happened yet
            elif step.startswith("come"):
                takers.append(Taker(turns, urgent=step == "come urgently"))
            elif there:
                taker = there[which % len(there)]
                taker.leave() if step == "leave" else taker.cancel()
            assert sum(taker.has_turn for taker in takers) <= limit
        await quiet()
        there = [taker for taker in takers if not taker.task.done()]
        assert sum(taker.has_turn for taker in there) == min(limit, len(there))
        await end(*takers)
        anew = [Taker(turns) for _ in range(limit + 1)]
        await quiet()
        assert [taker.has_turn for taker in anew] == [True] * limit + [False]
        await end(*anew)

    asyncio.run(play())


def test_places_are_spelled_as_people_do() -> None:
    ordinals = "1st 2nd 3rd 4th 10th 11th 12th 13th 20th 21st 22nd 23rd 101st 111th 112th 113th 121st 1011th"
    for ordinal in ordinals.split():
        assert Place(ordinal[:-2]).ordinal == ordinal
