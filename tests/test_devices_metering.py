"""What running phones cost, and what happens when their owner cannot pay."""

import asyncio
from uuid import UUID

import pytest

from plugins.devices import METERING
from server.clock import SystemClock
from server.interfaces import DATABASE
from tests.house import Client, House
from tests.paying import assert_sound
from tests.renting import (
    WISH,
    Open,
    act,
    balance,
    becomes_gone,
    charges,
    give,
    ran,
    rented,
    settled,
    shell,
    told,
    until,
)

HOUR = 3600


async def test_running_time_is_charged_exactly(house: House) -> None:
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    before = await balance(owner)
    metering = house.app[METERING]
    for seconds in (3600, 100, 100, 7, 33, 1800, 59):
        await ran(house, device_id, seconds)
        await metering.meter()
    row = await house.app[DATABASE].fetchrow(
        "SELECT extract(epoch FROM m.metered_until - d.started_at)::bigint AS behind_s, m.remainder"
        " FROM device_meters m JOIN devices d ON d.id = m.device_id WHERE d.id = $1",
        UUID(device_id),
    )
    assert row is not None
    paid = await charges(house, device_id)
    # What was metered is what the meter was set back by, and what passed since it started.
    metered_s = 3600 + 100 + 100 + 7 + 33 + 1800 + 59 + row["behind_s"]
    assert paid * 3600 + row["remainder"] == 20 * metered_s
    assert before - await balance(owner) == paid
    await ran(house, device_id, 720)
    await act(owner, device_id, "stop", "stopped")
    assert await charges(house, device_id) >= paid + 4, "what is left is charged when it stops"
    total = await charges(house, device_id)
    await metering.meter()
    assert await charges(house, device_id) == total, "a stopped phone costs nothing"


async def test_a_spent_balance_stops_the_phone_after_a_warning(open_house: Open) -> None:
    house = await open_house(billing={"welcome_credit": 20})
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    await shell(owner, device_id, "echo kept > /sdcard/note")
    metering = house.app[METERING]
    for _ in range(2):
        await ran(house, device_id, 1620)
        await metering.meter()
    assert (await owner.get(f"/devices/{device_id}")).json["state"] == "running"
    await ran(house, device_id, 3600)
    await metering.meter()
    stopped = await settled(owner, device_id, "stopped")
    assert "kept for 7 days" in stopped["state_detail"]
    assert await balance(owner) == 0
    assert await charges(house, device_id) == 20, "never more than there is"
    titles = [item["title"] for item in (await owner.get("/notifications?limit=100")).json["items"]]
    assert titles.count("Your balance runs out soon") == 2
    assert titles[-3:] == ["Your balance is spent", "mine is stopping", "mine is stopped"]
    assert (await owner.post(f"/devices/{device_id}/start")).code == "insufficient_balance"
    await give(house, owner, 20)
    await metering.meter()
    assert (await owner.get(f"/devices/{device_id}")).json["state"] == "stopped", "not by itself"
    await act(owner, device_id, "start", "running")
    assert (await shell(owner, device_id, "cat /sdcard/note"))["stdout"] == "kept\n"


async def test_a_phone_nobody_pays_for_is_deleted_after_a_notice(open_house: Open) -> None:
    house = await open_house(billing={"welcome_credit": 20}, devices={"keep_stopped_days": 3})
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    metering, database = house.app[METERING], house.app[DATABASE]
    await ran(house, device_id, 7200)
    await metering.meter()
    await settled(owner, device_id, "stopped")
    for days, state in ((1.9, "stopped"), (2.1, "stopped"), (3.1, "gone")):
        await database.execute(
            "UPDATE devices SET spent_at = now() - make_interval(secs => $1)", days * 86400
        )
        await metering.expire()
        assert (state == "gone") == (await becomes_gone(owner, device_id, wait=state == "gone"))
    titles = [item["title"] for item in await told(owner)]
    assert titles[-3:] == ["mine will be deleted soon", "mine is being deleted", "mine is deleted"]


async def test_fifty_rents_at_once_are_as_many_as_the_balance_covers(open_house: Open) -> None:
    house = await open_house(billing={"welcome_credit": 60}, devices={"max_per_user": 50})
    owner = await house.sign_up()
    replies = await asyncio.gather(*(owner.post("/devices", WISH) for _ in range(50)))
    assert sorted(reply.status for reply in replies) == [202] * 3 + [402] * 47
    assert {reply.code for reply in replies if reply.status == 402} == {"insufficient_balance"}
    for reply in replies:
        if reply.status == 202:
            await settled(owner, reply.json["id"], "running")
            await ran(house, reply.json["id"], 2 * HOUR)
    spends = (await owner.get("/billing/balance")).json
    assert (spends["spending_per_hour"], spends["lasts_s"]) == (60, HOUR)
    await house.app[METERING].meter()
    assert await balance(owner) == 0
    await assert_sound(house)


async def test_time_without_a_server_is_paid_by_phones_that_ran_through_it(house: House) -> None:
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    await ran(house, device_id, HOUR)
    await house.restart()

    async def charged() -> bool:
        return await charges(house, device_id) == 20

    await until(charged)  # by itself, once the phone was seen to run


async def test_a_plan_at_another_price_tells_its_owners_and_costs_that_from_then_on(
    open_house: Open,
) -> None:
    plans = [{"name": "basic", "price_per_hour": 20}]
    house = await open_house(devices={"plans": plans})
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    await ran(house, device_id, HOUR)
    configuration = house._file.read_text()
    assert "price_per_hour = 20" in configuration
    house._file.write_text(configuration.replace("price_per_hour = 20", "price_per_hour = 50"))
    await house.restart()

    async def heard() -> bool:
        return "mine costs CN¥0.50 an hour from now on" in [item["title"] for item in await told(owner)]

    await until(heard)
    assert await charges(house, device_id) == 20
    await ran(house, device_id, HOUR)
    await act(owner, device_id, "stop", "stopped")
    assert await charges(house, device_id) == 70
    assert (await owner.get("/billing/balance")).json["spending_per_hour"] == 0


async def test_a_clock_that_jumps_is_noticed_on_real_clocks(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = await house.sign_up()
    forwards, back = (await rented(owner))["id"], (await rented(owner))["id"]
    await house.app[DATABASE].execute(
        "UPDATE device_meters SET metered_until = metered_until - interval '1 day' WHERE device_id = $1",
        UUID(forwards),
    )
    await house.app[METERING].meter()
    assert (await charges(house, forwards), await charges(house, back)) == (0, 0)
    monotonic = SystemClock.monotonic
    monkeypatch.setattr(SystemClock, "monotonic", lambda clock: monotonic(clock) + HOUR)
    await house.app[METERING].meter()
    assert (await charges(house, forwards), await charges(house, back)) == (20, 20)


async def test_another_plan_of_a_phone_that_is_down_holds_from_its_next_start(house: House) -> None:
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    place = f"/devices/{device_id}"
    refused = await owner.patch(place, {"plan": "small"})
    assert (refused.status, refused.code) == (409, "invalid_state")
    await shell(owner, device_id, "echo kept > /sdcard/note")
    await ran(house, device_id, HOUR)
    await act(owner, device_id, "stop", "stopped")
    unknown = await owner.patch(place, {"plan": "huge"})
    assert (unknown.status, unknown.json["errors"][0]["field"]) == (422, "plan")
    assert (await owner.patch(place, {})).json["plan"] == "basic"
    changed = await owner.patch(place, {"plan": "small", "name": "tiny"})
    assert (changed.status, changed.json["plan"], changed.json["name"]) == (200, "small", "tiny")
    await act(owner, device_id, "start", "running")
    assert await _size(owner, device_id) == "540x960"
    assert (await shell(owner, device_id, "cat /sdcard/note"))["stdout"] == "kept\n"
    await ran(house, device_id, HOUR)
    await act(owner, device_id, "stop", "stopped")
    assert await charges(house, device_id) == 20 + 10
    await house.restart()
    assert (await owner.get(place)).json["plan"] == "small"


async def _size(owner: Client, device_id: str) -> str:
    return str((await shell(owner, device_id, "wm size"))["stdout"]).split()[-1]
