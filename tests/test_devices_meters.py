"""Meters: what phones cost over any time, whatever happens to clocks, servers and balances meanwhile."""

import asyncio
import random
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any
from uuid import UUID

import pytest
import pytest_asyncio
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from plugins.devices import metering
from plugins.devices.meters import JUMP_S, SLOW_S, Meters
from plugins.devices.model import DeviceState
from plugins.devices.schema import MIGRATIONS
from server.db import CommitUnknown, Database, DatabaseUnavailable, Tx
from server.errors import Problem
from server.interfaces import DATABASE, LEDGER
from tests.house import House
from tests.imaginary import Street
from tests.paying import assert_sound
from tests.paying import bank as bank

pytestmark = pytest.mark.asyncio(loop_scope="module")

HOUR = 3600
PRICE = 7


@pytest_asyncio.fixture(loop_scope="module")
async def street(bank: House) -> AsyncIterator[Street]:
    """Phones at PRICE an hour."""
    async with Street.opened(bank, basic=PRICE) as opened:
        yield opened


# Exactly


async def test_a_day_of_irregular_charges_costs_24_hours(street: Street) -> None:
    owner = await street.owner(1000)
    phone = await street.rent(owner)
    chance = random.Random(7)
    left_ms = 24 * HOUR * 1000
    while left_ms:
        # Each run lasts whole seconds, and is looked at in between at any moment.
        run_ms = min(left_ms, 1000 * chance.randrange(1, 8000))
        left_ms -= run_ms
        while run_ms:
            part_ms = min(run_ms, chance.randrange(1, 1_500_000))
            run_ms -= part_ms
            street.time.run(part_ms / 1000)
            if run_ms:
                await street.metering.meter()
                if chance.random() < 0.2:
                    await street.restart()
        await street.stop(phone)
        street.time.run(chance.randrange(1, 5000))
        await street.metering.meter()
        if left_ms:
            await street.start(phone)
    assert await street.paid(phone) == 24 * PRICE == 168
    assert await street.remainders([phone]) == [0]
    assert street.balance(owner) == 1000 - 168
    await assert_sound(street.bank)


async def test_what_is_less_than_a_coin_is_carried_over(street: Street) -> None:
    phone = await street.rent(await street.owner(100))
    for _ in range(3):
        street.time.run(514)  # 514 × 7 = 3598 of 3600
        await street.metering.meter()
    assert (await street.paid(phone), await street.remainders([phone])) == (2, [3 * 3598 - 2 * HOUR])
    street.time.run(0.999)
    await street.metering.meter()
    assert (await street.paid(phone), await street.remainders([phone])) == (2, [3594])
    street.time.run(0.001)
    await street.metering.meter()
    assert (await street.paid(phone), await street.remainders([phone])) == (3, [1])


async def test_all_phones_are_charged_at_once(street: Street, monkeypatch: pytest.MonkeyPatch) -> None:
    owners = [await street.owner(100) for _ in range(3)]
    phones = [await street.rent(owner) for owner in owners for _ in range(4)]
    charge, asked = street.app[LEDGER].charge, []

    async def counted(tx: Tx, usages: Any) -> Any:
        asked.append(len(usages))
        return await charge(tx, usages)

    monkeypatch.setattr(street.app[LEDGER], "charge", counted)
    street.time.run(HOUR)
    await street.metering.meter()
    assert asked == [12]
    assert [await street.paid(phone) for phone in phones] == [PRICE] * 12
    assert [street.balance(owner) for owner in owners] == [100 - 4 * PRICE] * 3


async def test_time_that_nobody_vouches_for_is_not_paid(street: Street) -> None:
    phone = await street.rent(await street.owner(100))
    street.time.run(HOUR)
    await street.metering.meter()
    street.time.run(HOUR)
    await street.stop(phone, charge=False)
    await street.start(phone)
    street.time.run(HOUR)
    await street.stop(phone)
    assert await street.paid(phone) == 2 * PRICE


# Broken off


async def test_a_charge_that_fails_halfway_charges_nothing_and_the_next_all(
    street: Street, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = await street.owner(100)
    phones = [await street.rent(owner) for _ in range(2)]
    street.time.run(HOUR)
    charge = street.app[LEDGER].charge

    async def broken_off(tx: Tx, usages: Any) -> Any:
        await charge(tx, usages)
        raise DatabaseUnavailable("killed")

    with monkeypatch.context() as patch:
        patch.setattr(street.app[LEDGER], "charge", broken_off)
        with pytest.raises(DatabaseUnavailable):
            await street.metering.meter()
    assert await street.paid(*phones) == 0
    await street.restart()
    street.time.run(HOUR)
    await street.metering.meter()
    assert [await street.paid(phone) for phone in phones] == [2 * PRICE] * 2
    await assert_sound(street.bank)


async def test_a_charge_of_whose_commit_nobody_knows_is_not_repeated(
    street: Street, monkeypatch: pytest.MonkeyPatch
) -> None:
    phone = await street.rent(await street.owner(100))
    street.time.run(HOUR)
    commit = Tx._send_commit

    async def broken_off(tx: Tx, connection: Any) -> None:
        await commit(tx, connection)
        raise CommitUnknown("connection lost")

    with monkeypatch.context() as patch:
        patch.setattr(Tx, "_send_commit", broken_off)
        with pytest.raises(CommitUnknown):
            await street.metering.meter()
    await street.metering.meter()
    assert await street.paid(phone) == PRICE


async def test_a_stop_and_charges_at_the_same_moment_charge_no_second_twice(street: Street) -> None:
    owner = await street.owner(10_000)
    phones = [await street.rent(owner) for _ in range(2)]
    hours = 25
    for _ in range(hours):
        street.time.run(HOUR)
        await asyncio.gather(
            street.metering.meter(),
            *(street.stop(phone) for phone in phones),
            street.metering.meter(),
            street.metering.meter(),
        )
        await asyncio.gather(*(street.start(phone) for phone in phones), street.metering.meter())
    assert [await street.paid(phone) for phone in phones] == [hours * PRICE] * 2
    await assert_sound(street.bank)


# Clocks


@pytest.mark.parametrize("jump_s", [-30 * 24 * HOUR, -HOUR, -JUMP_S - 1, JUMP_S + 1, HOUR, 30 * 24 * HOUR])
@pytest.mark.parametrize("ends_with_a_stop", [False, True])
async def test_a_clock_that_is_set_costs_nobody_anything(
    street: Street, jump_s: int, ends_with_a_stop: bool
) -> None:
    owner = await street.owner(10_000)
    phone, free_of_jumps = await street.rent(owner), await street.rent(owner)
    street.time.run(100)
    await street.metering.meter()
    street.time.run(1000)
    street.time.set_clock(jump_s)
    await street.stop(free_of_jumps)
    street.time.run(2500)
    if ends_with_a_stop:
        await street.stop(phone)
    else:
        await street.metering.meter()
        street.time.run(HOUR)
        await street.metering.meter()
    assert await street.paid(phone) == PRICE * (1 if ends_with_a_stop else 2)
    await street.start(free_of_jumps)
    street.time.run(2500)
    await street.stop(free_of_jumps)
    assert await street.paid(free_of_jumps) == PRICE


async def test_a_phone_that_comes_up_after_the_clock_was_set_pays_from_then_on(street: Street) -> None:
    owner = await street.owner(10_000)
    await street.rent(owner)
    street.time.set_clock(10 * HOUR)
    late = await street.rent(owner)
    street.time.run(HOUR)
    await street.metering.meter()
    assert await street.paid(late) == PRICE


async def test_across_a_restart_the_databases_clock_alone_counts(street: Street) -> None:
    phone = await street.rent(await street.owner(10_000))
    street.time.run(HOUR)
    street.time.set_clock(HOUR)
    await street.restart()
    street.time.run(HOUR)
    street.time.set_clock(5 * HOUR)
    await street.metering.meter()
    assert await street.paid(phone) == 3 * PRICE


async def test_a_clock_that_was_set_back_while_no_server_ran_makes_no_phone_free(street: Street) -> None:
    phone = await street.rent(await street.owner(10_000))
    street.time.run(HOUR)
    await street.metering.meter()
    street.time.set_clock(-24 * HOUR)
    await street.restart()
    street.time.run(HOUR)
    await street.metering.meter()
    assert await street.paid(phone) == 2 * PRICE


async def test_a_reading_that_comes_out_of_turn_takes_nothing_back(street: Street) -> None:
    phone = await street.rent(await street.owner(100))
    street.time.run(HOUR)
    await street.metering.meter()
    street.time.run(-1)
    await street.metering.meter()
    assert (await street.paid(phone), await street.remainders([phone])) == (PRICE, [0])
    street.time.run(1 + HOUR)
    await street.metering.meter()
    assert await street.paid(phone) == 2 * PRICE


class Watch:
    """A steady clock that a test reads from."""

    def __init__(self, *shows: float) -> None:
        self._shows = iter(shows)

    def monotonic(self) -> float:
        """What it shows next."""
        return next(self._shows)


@pytest.mark.asyncio(loop_scope="function")
async def test_an_answer_that_came_late_tells_nothing_of_the_steady_clock(database: Database) -> None:
    watch: Any = Watch(1.0, 1.0 + SLOW_S / 2, 5.0, 5.0 + SLOW_S)
    async with database.transaction() as tx:
        early, late = await Meters(watch).moment(tx), await Meters(watch).moment(tx)
    assert (early.steady_s, late.steady_s) == (1.0 + SLOW_S / 2, None)
    assert early.at <= late.at


# Spent


async def test_a_spent_balance_stops_all_its_phones_and_lets_the_rest_go(street: Street) -> None:
    await street.restart(basic=20)
    owner, other = await street.owner(60), await street.owner(60)
    pair, untouched = [await street.rent(owner), await street.rent(owner)], await street.rent(other)
    await street.give(owner, -30)
    street.time.run(HOUR)
    await street.metering.meter()
    assert street.runs(*pair, untouched) == [False, False, True]
    assert (await street.paid(*pair), street.balance(owner), street.balance(other)) == (30, 0, 40)
    for phone in pair:
        device = street.fleet.get(phone)
        assert device is not None
        assert device.state is DeviceState.STOPPING
        assert device.spent_at is not None
        await street.stop(phone)
        with pytest.raises(Problem, match="insufficient_balance"):
            await street.start(phone)
    await street.give(owner, 40)
    street.time.run(HOUR)
    await street.metering.meter()
    assert street.runs(*pair) == [False, False], "one click starts them, nothing else does"
    for phone in pair:
        await street.start(phone)
    street.time.run(HOUR - 1)
    await street.metering.meter()
    assert (await street.paid(*pair), street.balance(owner)) == (30 + 38, 2), "let go is let go"
    await assert_sound(street.bank)


async def test_phones_run_to_the_last_coin(street: Street) -> None:
    phone = await street.rent(await street.owner(2 * PRICE))
    street.time.run(2 * HOUR - 1)
    await street.metering.meter()
    assert street.runs(phone) == [True]
    street.time.run(1)
    await street.metering.meter()
    assert (street.runs(phone), await street.paid(phone)) == ([False], 2 * PRICE)


async def test_a_server_that_died_before_it_stopped_them_stops_them_the_next_time(
    street: Street, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner, lucky = await street.owner(PRICE), await street.owner(PRICE)
    phone, kept = await street.rent(owner), await street.rent(lucky)
    street.time.run(HOUR)

    async def dies(*_: object) -> None:
        raise DatabaseUnavailable("killed")

    with monkeypatch.context() as patch:
        patch.setattr(metering.Metering, "_stop_spent", dies)
        with pytest.raises(DatabaseUnavailable):
            await street.metering.meter()
    assert street.runs(phone, kept) == [True, True]
    await street.restart()
    await street.give(lucky, 100)
    street.time.run(1)
    await street.metering.meter()
    assert street.runs(phone, kept) == [False, True]
    assert await street.paid(phone, kept) == 2 * PRICE


async def test_who_tops_up_at_the_last_moment_goes_on(
    street: Street, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = await street.owner(PRICE)
    phone = await street.rent(owner)
    street.time.run(HOUR)
    stop = metering.Metering._stop_spent

    async def topped_up_first(self: metering.Metering, device_id: UUID) -> None:
        await street.give(owner, 1)
        await stop(self, device_id)

    monkeypatch.setattr(metering.Metering, "_stop_spent", topped_up_first)
    await street.metering.meter()
    assert street.runs(phone) == [True]


# Warnings


async def test_owners_are_warned_once_an_hour_and_once_ten_minutes_ahead(street: Street) -> None:
    await street.restart(basic=60)  # a coin a minute
    owner = await street.owner(120)
    phone = await street.rent(owner)

    async def after(minutes: float) -> list[str]:
        street.time.run(minutes * 60)
        await street.metering.meter()
        return [body.partition(" for ")[2].partition(".")[0] for body in await street.warnings(owner)]

    assert await after(60) == []
    assert await after(0.25) == ["60 min more"]
    assert await after(20) == ["60 min more"]
    await street.restart()
    assert await after(29.5) == ["60 min more"]
    assert await after(1) == ["60 min more", "10 min more"]
    await street.restart()
    assert await after(5) == ["60 min more", "10 min more"]
    await street.give(owner, 30)
    assert len(await after(1)) == 2, "it lasts for half an hour again, of which the hour was told before"
    assert (await after(25))[2:] == ["9 min more"]
    await street.give(owner, 100)
    assert len(await after(1)) == 3
    assert (await after(60))[3:] == ["48 min more"]
    await street.give(owner, 100)
    assert len(await after(1)) == 4
    assert (await after(140))[4:] == ["7 min more"], "both at once are told as one"
    assert len(await after(6)) == 5
    await after(2)
    assert (street.runs(phone), street.balance(owner)) == ([False], 0)
    assert len(await street.warnings(owner)) == 5, "of a spent balance other news tell"


async def test_more_phones_bring_the_end_nearer_and_fewer_put_it_off(street: Street) -> None:
    await street.restart(basic=60)
    owner, bystander = await street.owner(100), await street.owner(10_000)
    first, _ = await street.rent(owner), await street.rent(bystander)
    street.time.run(1)
    await street.metering.meter()
    assert await street.warnings(owner) == []
    await street.give(owner, 20)
    second = await street.rent(owner)
    await street.give(owner, -20)
    street.time.run(1)
    await street.metering.meter()
    assert len(await street.warnings(owner)) == 1
    await street.stop(second)
    street.time.run(1)
    await street.metering.meter()
    await street.stop(first)
    await street.give(owner, 100)
    await street.start(second)
    await street.start(first)
    await street.give(owner, -100)
    street.time.run(1)
    await street.metering.meter()
    assert len(await street.warnings(owner)) == 2
    assert await street.warnings(bystander) == []


async def test_a_restarted_phone_does_not_repeat_a_warning(street: Street) -> None:
    await street.restart(basic=60)
    owner = await street.owner(60)
    phone = await street.rent(owner)
    street.time.run(90)
    await street.metering.meter()
    assert len(await street.warnings(owner)) == 1
    await street.stop(phone)
    await street.metering.meter()
    await street.come_up(phone)
    street.time.run(90)
    await street.metering.meter()
    assert len(await street.warnings(owner)) == 1


# Prices


async def test_another_price_holds_from_when_it_is_seen_and_the_owner_hears_of_it(street: Street) -> None:
    await street.restart(basic=20, gone=50)
    owner = await street.owner(1000)
    runs, stands, left = (
        await street.rent(owner),
        await street.rent(owner),
        await street.rent(owner, "gone"),
    )
    await street.stop(stands)
    street.time.run(HOUR // 2)
    await street.restart(basic=90)
    street.time.run(HOUR // 2)
    await street.metering.reprice(seen=False)
    await street.metering.reprice(seen=True)
    street.time.run(HOUR)
    await street.start(stands)
    street.time.run(HOUR)
    await street.metering.meter()
    await street.metering.reprice(seen=True)
    assert [await street.paid(phone) for phone in (runs, stands, left)] == [20 + 2 * 90, 90, 3 * 50]
    heard = await street.heard(owner, "device.state")
    news = [(title, body) for title, body in heard if "costs" in title]
    assert len(news) == 2, "each repriced phone is told of once, and the one without a plan never"
    assert news[0][0] == "mine costs CN¥0.90 an hour from now on"
    assert "Until now it was CN¥0.20 an hour." in news[0][1]
    assert street.metering.spending_of(owner) == 90 + 90 + 50
    for phone in (runs, stands):
        rows = await street.app[DATABASE].fetch(
            "SELECT action, before, after FROM audit WHERE target = $1", str(phone)
        )
        assert [tuple(row.values()) for row in rows] == [
            ("devices.reprice", {"price_per_hour": 20}, {"price_per_hour": 90})
        ]


async def test_time_that_nobody_saw_is_not_paid_for_a_new_price(street: Street) -> None:
    phone = await street.rent(await street.owner(1000))
    street.time.run(HOUR)
    await street.restart(basic=100)
    await street.metering.reprice(seen=False)
    assert await street.paid(phone) == 0
    await street.stop(phone, charge=False)
    await street.metering.reprice(seen=False)
    await street.start(phone)
    street.time.run(HOUR)
    await street.metering.meter()
    assert await street.paid(phone) == 100


async def test_a_free_phone_that_gets_a_price_pays_from_then_on(street: Street) -> None:
    await street.restart(basic=0)
    owner = await street.owner(100)
    phone = await street.rent(owner)
    street.time.run(HOUR)
    await street.metering.meter()
    await street.restart(basic=10)
    await street.metering.reprice(seen=True)
    street.time.run(HOUR)
    await street.metering.meter()
    await street.restart(basic=0)
    await street.metering.reprice(seen=True)
    street.time.run(HOUR)
    await street.metering.meter()
    await street.stop(phone)
    assert await street.paid(phone) == 10


# Deletion


async def test_a_notice_of_deletion_that_comes_late_still_gives_a_day(street: Street) -> None:
    owner = await street.owner(PRICE)
    phone = await street.rent(owner)
    street.time.run(HOUR)
    await street.metering.meter()
    await street.stop(phone)
    await street.app[DATABASE].execute(
        "UPDATE devices SET spent_at = now() - interval '30 days' WHERE id = $1", phone
    )
    await street.restart()
    for _ in range(2):
        await street.metering.expire()
        device = street.fleet.get(phone)
        assert device is not None
        assert device.state is DeviceState.STOPPED
    titles = [title for title, _ in await street.heard(owner, "device.state")]
    assert titles.count("mine will be deleted soon") == 1
    assert await street.app[DATABASE].fetchval(
        "SELECT now() - spent_at < interval '6 days 1 minute' FROM devices WHERE id = $1", phone
    )
    await street.app[DATABASE].execute(
        "UPDATE devices SET spent_at = spent_at - interval '1 day' WHERE id = $1", phone
    )
    await street.give(owner, 1)
    await street.metering.expire()
    device = street.fleet.get(phone)
    assert device is not None
    assert (device.state, device.spent_at) == (DeviceState.STOPPED, None), "a top-up keeps it"


# Earlier rows


@pytest.mark.asyncio(loop_scope="function")
async def test_meters_of_an_earlier_version_go_on(database: Database) -> None:
    await database.execute("CREATE TABLE users (id uuid PRIMARY KEY)")
    await database.migrate("devices", MIGRATIONS[:2])
    await database.execute("INSERT INTO users SELECT md5(n::text)::uuid FROM generate_series(1, 3) n")
    for number, state, since, remainder, warned in (
        (1, "running", "2030-01-01", 17, True),
        (2, "stopped", None, 5, False),
        (3, "stopped", None, 0, False),
    ):
        await database.execute(
            "INSERT INTO devices (id, owner_id, name, image, plan, price_per_hour, hardware, state,"
            " wanted_state, metered_until, charge_remainder, warned)"
            " VALUES (md5('d' || $1)::uuid, md5($1)::uuid, 'mine', 'i', 'p', 20, '{}', $2, 'stopped',"
            " $3::text::timestamptz, $4, $5)",
            str(number),
            state,
            since,
            remainder,
            warned,
        )
    await database.migrate("devices", MIGRATIONS)
    rows = await database.fetch(
        "SELECT metered_until::text, remainder, price_per_hour FROM device_meters ORDER BY remainder"
    )
    assert [tuple(row.values()) for row in rows] == [(None, 5, 20), ("2030-01-01 00:00:00+00", 17, 20)]
    assert [tuple(row.values()) for row in await database.fetch("SELECT minutes FROM balance_warnings")] == [
        (10,),
        (60,),
    ]
    assert not await database.fetch("SELECT FROM devices WHERE deletion_warned")


# Whatever happens


@dataclass
class Model:
    """What is owed, told simply: milliseconds, one phone after the other."""

    balance: int
    price: int
    now_ms: int = 0
    since_ms: list[int | None] = field(default_factory=lambda: [0, 0])
    remainder: list[int] = field(default_factory=lambda: [0, 0])
    paid: list[int] = field(default_factory=lambda: [0, 0])
    owed: list[int] = field(default_factory=lambda: [0, 0])
    was_spent: bool = False

    def read(self, which: int) -> None:
        since_ms = self.since_ms[which]
        if since_ms is None:
            return
        ran_s = (self.now_ms - since_ms) // 1000
        self.since_ms[which] = since_ms + 1000 * ran_s
        self.owed[which] += self.price * ran_s
        amount, self.remainder[which] = divmod(self.price * ran_s + self.remainder[which], HOUR)
        taken = min(amount, self.balance)
        if taken < amount:
            self.remainder[which], self.was_spent = 0, True
        self.balance -= taken
        self.paid[which] += taken

    def tick(self) -> None:
        if self.price == 0 or not any(self.runs()):
            return
        for which in (0, 1):
            self.read(which)
        if self.balance == 0:
            self.since_ms = [None, None]

    def stop(self, which: int) -> None:
        self.read(which)
        self.since_ms[which] = None

    def start(self, which: int) -> bool:
        if self.balance < self.price * (1 + self.runs()[1 - which]):
            return False
        self.since_ms[which] = self.now_ms
        return True

    def reprice(self, price: int) -> None:
        if price != self.price:
            for which in (0, 1):
                self.read(which)
            self.price = price

    def runs(self) -> list[bool]:
        return [since_ms is not None for since_ms in self.since_ms]


Which = st.integers(0, 1)
Steps = st.lists(
    st.one_of(
        st.tuples(st.just("run"), st.integers(1, 9_000_000)),
        st.tuples(st.just("run"), st.integers(1, 30_000)),
        st.tuples(st.just("tick"), st.just(0)),
        st.tuples(st.just("stop"), Which),
        st.tuples(st.just("start"), Which),
        st.tuples(st.just("price"), st.sampled_from([0, 1, 7, 20, 3599, 3600, 100_003])),
        st.tuples(st.just("top up"), st.integers(1, 5000)),
        st.tuples(st.just("restart"), st.just(0)),
        st.tuples(st.just("set clock"), st.sampled_from([-86_400, -11, 11, 86_400])),
    ),
    min_size=4,
    max_size=25,
)


@settings(
    max_examples=15,
    deadline=None,
    phases=(Phase.reuse, Phase.generate),  # to shrink takes longer than a test may
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
@given(steps=Steps, balance=st.integers(0, 40_000), price=st.sampled_from([1, 7, 20, 3600, 9999]))
async def test_whatever_happens_a_phone_costs_its_price_by_the_second(
    bank: House, steps: list[tuple[str, int]], balance: int, price: int
) -> None:
    async with Street.opened(bank, basic=price) as street:
        owner = await street.owner(balance)
        phones = sorted([await street.rent(owner), await street.rent(owner)])
        model = Model(balance, price)
        for step, value in [*steps, ("tick", 0)]:
            match step:
                case "run":
                    model.now_ms += value
                    street.time.run(value / 1000)
                case "tick":
                    model.tick()
                    await street.metering.meter()
                case "stop":
                    model.stop(value)
                    await street.stop(phones[value])
                case "start" if not model.runs()[value]:
                    try:
                        await street.start(phones[value])
                    except Problem:
                        assert not model.start(value)
                    else:
                        assert model.start(value)
                case "price":
                    model.reprice(value)
                    await street.restart(basic=value)
                    await street.metering.reprice(seen=True)
                case "top up":
                    model.balance += value
                    await street.give(owner, value)
                case "restart":
                    await street.restart()
                case "set clock" if model.price:  # what is free is not looked at
                    street.time.set_clock(value)
                    model.tick()
                    await street.metering.meter()
            assert (street.runs(*phones), street.balance(owner)) == (model.runs(), model.balance)
        assert [await street.paid(phone) for phone in phones] == model.paid
        assert await street.remainders(phones) == model.remainder
        if not model.was_spent:
            assert model.paid == [owed // HOUR for owed in model.owed]
            assert model.remainder == [owed % HOUR for owed in model.owed]
