"""One action on many rented phones."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import pytest

from plugins.devices.model import Rented
from plugins.devices.room import DEVICES, Devices
from server.auth import Caller
from server.db import DatabaseUnavailable
from tests.conftest import Open
from tests.house import Client, House
from tests.renting import act, becomes_gone, rented, settled


async def done(person: Client, action: str, *ids: str) -> list[dict[str, Any]]:
    """The results of an action."""
    reply = await person.post("/devices/actions", {"action": action, "ids": ids})
    assert reply.status == 200, reply.body
    results: list[dict[str, Any]] = reply.json["results"]
    return results


async def test_each_phone_is_answered_as_by_its_single_call(house: House) -> None:
    owner, stranger = await house.sign_up(), await house.sign_up()
    running, stopped, theirs = await asyncio.gather(rented(owner), rented(owner), rented(stranger))
    await act(owner, stopped["id"], "stop", "stopped")
    unknown = str(uuid4())
    asked = [stopped["id"], running["id"], unknown, running["id"].upper(), theirs["id"], running["id"]]
    assert await done(owner, "stop", *asked) == [
        {"id": stopped["id"], "status": 409, "code": "invalid_state"},
        {"id": running["id"], "status": 202},
        {"id": unknown, "status": 404, "code": "not_found"},
        {"id": theirs["id"], "status": 404, "code": "not_found"},
    ]
    await settled(owner, running["id"], "stopped")
    assert (await stranger.get(f"/devices/{theirs['id']}")).json["state"] == "running"


async def test_every_action_does_what_its_single_call_does(house: House) -> None:
    owner = await house.sign_up()
    ids = [device["id"] for device in await asyncio.gather(rented(owner), rented(owner))]
    for action, state in (
        ("restart", "running"),
        ("stop", "stopped"),
        ("reset", "stopped"),
        ("start", "running"),
    ):
        results = await done(owner, action, *ids)
        assert results == [{"id": device_id, "status": 202} for device_id in ids], action
        assert await asyncio.gather(*(settled(owner, device_id, state) for device_id in ids))
    assert [result["status"] for result in await done(owner, "delete", *ids)] == [202, 202]
    for device_id in ids:
        assert await becomes_gone(owner, device_id, wait=True)
    assert [result["status"] for result in await done(owner, "delete", *ids)] == [404, 404]


async def test_phones_beyond_the_balance_are_not_started(open_house: Open) -> None:
    house = await open_house(billing={"welcome_credit": 45})
    owner = await house.sign_up()
    ids = []
    for _ in range(3):
        ids.append((await rented(owner))["id"])
        await act(owner, ids[-1], "stop", "stopped")
    results = await done(owner, "start", *ids)
    assert [result["id"] for result in results] == ids
    assert sorted(result["status"] for result in results) == [202, 202, 402]
    (refused,) = (result for result in results if result["status"] == 402)
    assert refused["code"] == "insufficient_balance"
    for result in results:
        await settled(owner, result["id"], "running" if result["status"] == 202 else "stopped")


async def test_what_fails_for_one_phone_is_said_of_that_one(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = await house.sign_up()
    away, broken, well = [device["id"] for device in await asyncio.gather(*(rented(owner) for _ in range(3)))]
    stop = Devices.stop

    async def unlucky(devices: Devices, caller: Caller, device_id: UUID) -> Rented:
        if str(device_id) == away:
            raise DatabaseUnavailable("gone")
        if str(device_id) == broken:
            raise RuntimeError("a bug")
        return await stop(devices, caller, device_id)

    monkeypatch.setattr(Devices, "stop", unlucky)
    assert await done(owner, "stop", away, broken, well) == [
        {"id": away, "status": 503, "code": "unavailable"},
        {"id": broken, "status": 500, "code": "internal"},
        {"id": well, "status": 202},
    ]
    await settled(owner, well, "stopped")


async def test_many_phones_are_treated_a_few_at_a_time(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    owner = await house.sign_up()
    at_once, most = 0, 0

    async def slow(devices: Devices, caller: Caller, device_id: UUID) -> Rented:
        nonlocal at_once, most
        at_once, most = at_once + 1, max(most, at_once + 1)
        await asyncio.sleep(0.01)
        at_once -= 1
        return devices.find(caller, device_id)

    monkeypatch.setattr(Devices, "stop", slow)
    ids = [str(uuid4()) for _ in range(100)]
    results = await done(owner, "stop", *ids)
    assert [(result["id"], result["status"]) for result in results] == [(one, 404) for one in ids]
    assert 1 < most <= 8


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"action": "stop", "ids": []}, "ids"),
        ({"action": "stop", "ids": [str(uuid4()) for _ in range(101)]}, "ids"),
        ({"action": "stop", "ids": [str(uuid4()), "../etc"]}, "ids.1"),
        ({"action": "stop", "ids": [7]}, "ids.0"),
        ({"action": "stop", "ids": "all"}, "ids"),
        ({"action": "stop"}, "ids"),
        ({"action": "explode", "ids": [str(uuid4())]}, "action"),
        ({"action": "rent", "ids": [str(uuid4())]}, "action"),
        ({"action": "stop", "ids": [str(uuid4())], "force": True}, "force"),
    ],
)
async def test_a_wrong_order_names_its_field(house: House, body: dict[str, object], field: str) -> None:
    owner = await house.sign_up()
    reply = await owner.post("/devices/actions", body)
    assert (reply.status, reply.code) == (422, "invalid")
    assert [error["field"] for error in reply.json["errors"]] == [field]


async def test_nobody_does_anything(house: House) -> None:
    assert (await house.anyone.post("/devices/actions", {"action": "stop", "ids": []})).status == 401
    assert (await house.anyone.get("/devices/actions")).status == 401
    owner = await house.sign_up()
    assert (await owner.get("/devices/actions")).status == 404
    assert house.app[DEVICES].of_owner(UUID(owner.user["id"])) == []
