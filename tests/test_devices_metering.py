"""What running phones cost, and what happens when their owner cannot pay."""

from uuid import UUID

from plugins.devices import METERING
from server.interfaces import DATABASE
from tests.house import House
from tests.renting import Open, act, balance, becomes_gone, charges, ran, rented, settled, shell, told


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
    titles = [item["title"] for item in await told(owner)]
    assert titles.count("mine will stop soon") == 1
    assert titles.index("mine will stop soon") < titles.index("mine is stopping") < len(titles) - 1
    assert (await owner.post(f"/devices/{device_id}/start")).code == "insufficient_balance"


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
