"""An engine that is down, hung or restarted: the server goes on, and so does what was wanted of phones."""

import asyncio
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest

from tests.containers import OpenDocker
from tests.engine import Engine, PrivateEngine, Proxy, StartEngine, docker
from tests.house import Client, House
from tests.renting import (
    WISH,
    act,
    balance,
    becomes_gone,
    ran,
    rented,
    restarted,
    settled,
    shell,
    told,
    until,
)

pytestmark = pytest.mark.timeout(240)

ANSWER_S = 5.0


@pytest.fixture
async def proxy(engine: Engine) -> AsyncIterator[Proxy]:
    """A way to the machine's engine that can be cut."""
    async with Proxy.started(engine.url) as started:
        yield started


async def _refused_in_time(owner: Client, method: str, path: str, **more: Any) -> None:
    began = time.monotonic()
    reply = await owner.call(method, path, **more)
    assert (reply.status, reply.code) == (503, "runtime_unavailable"), path
    assert "Retry-After" in reply.headers
    assert time.monotonic() - began < ANSWER_S


async def _runtime_is(house: House, state: str) -> bool:
    reply = await house.anyone.get("//readyz")
    return bool(reply.json["parts"]["runtime"]["state"] == state)


async def _is_unharmed(house: House, owner: Client) -> None:
    """What needs no engine is answered at once."""
    for path in ("//healthz", "/devices", "/billing/balance", "//devices"):
        began = time.monotonic()
        assert (await owner.get(path)).status == 200
        assert time.monotonic() - began < 1


@pytest.mark.parametrize("fault", ["refuse", "hang"])
async def test_an_engine_that_does_not_answer_is_waited_for(
    house_on_engine: OpenDocker, engine: Engine, proxy: Proxy, fault: str
) -> None:
    there = await house_on_engine(proxy.url, engine.image, sweep_at=engine.url)
    house = there.house
    owner = await house.sign_up()
    kept, stopped, deleted, resting = [await rented(owner) for _ in range(4)]
    await act(owner, resting["id"], "stop", "stopped")
    if fault == "hang":
        proxy.hang()
    else:
        await proxy.refuse()
    await _refused_in_time(owner, "POST", "/devices", json=WISH)
    await _refused_in_time(owner, "POST", f"/devices/{resting['id']}/start")
    await _refused_in_time(owner, "POST", f"/devices/{kept['id']}/restart")
    await _refused_in_time(owner, "POST", f"/devices/{kept['id']}/reset")
    await _refused_in_time(owner, "GET", f"/devices/{kept['id']}/log")
    await _refused_in_time(owner, "GET", f"/devices/{kept['id']}/stats")
    assert await _runtime_is(house, "down")
    await _is_unharmed(house, owner)
    assert "does not answer at the moment" in (await owner.get("//devices")).body.decode()
    assert (await shell(owner, kept["id"], "echo on"))["stdout"] == "on\n", "phones go on meanwhile"
    # Nobody saw it run, so nobody pays for it.
    before = await balance(owner)
    await ran(house, stopped["id"], 3600)
    for call in (owner.post(f"/devices/{stopped['id']}/stop"), owner.delete(f"/devices/{deleted['id']}")):
        began = time.monotonic()
        assert (await call).status == 202
        assert time.monotonic() - began < ANSWER_S
    assert await balance(owner) == before

    async def says_why() -> bool:
        device = (await owner.get(f"/devices/{stopped['id']}")).json
        assert device["state"] == "stopping"
        return "does not answer" in (device["state_detail"] or "")

    await until(says_why, deadline_s=90)
    await proxy.heal()
    await settled(owner, stopped["id"], "stopped")
    assert await becomes_gone(owner, deleted["id"], wait=True)
    assert await _runtime_is(house, "ok")
    assert (await owner.get(f"/devices/{kept['id']}")).json == kept, "it ran on as it was"
    await rented(owner)
    assert await there.repairs() == []
    assert "does not answer at the moment" not in (await owner.get("//devices")).body.decode()


async def test_a_phone_under_way_comes_up_once_the_engine_is_back(
    house_on_engine: OpenDocker, engine: Engine, proxy: Proxy
) -> None:
    there = await house_on_engine(proxy.url, engine.image, sweep_at=engine.url)
    owner = await there.house.sign_up()
    await rented(owner)
    before = await balance(owner)
    ids = [(await owner.post("/devices", WISH)).json["id"] for _ in range(3)]
    await proxy.refuse()
    await asyncio.sleep(1)
    assert {(await owner.get(f"/devices/{device_id}")).json["state"] for device_id in ids} <= {
        "creating",
        "running",
    }
    await proxy.heal()
    for device_id in ids:
        await settled(owner, device_id, "running")
    assert len(await there.containers()) == 4
    assert await balance(owner) == before


async def test_a_server_starts_without_its_engine_and_finds_its_phones_later(
    house_on_engine: OpenDocker, engine: Engine, proxy: Proxy
) -> None:
    there = await house_on_engine(proxy.url, engine.image, sweep_at=engine.url)
    house = there.house
    owner = await house.sign_up()
    device = await rented(owner)
    await house.stop()
    await proxy.refuse()
    await house.start()
    assert await _runtime_is(house, "down")
    await _is_unharmed(house, owner)
    await _refused_in_time(owner, "POST", "/devices", json=WISH)
    assert (await owner.get(f"/devices/{device['id']}")).json == device
    await there.docker("kill", there.name_of(device["id"]))
    await proxy.heal()
    await restarted(owner, device)
    assert await there.repairs() == [("dead", device["id"])]


async def _private(private_engine: StartEngine, *, live_restore: bool) -> PrivateEngine:
    engine = await private_engine(live_restore=live_restore)
    await engine.load_image()
    return engine


async def test_phones_come_back_with_an_engine_that_was_stopped(
    private_engine: StartEngine, house_on_engine: OpenDocker
) -> None:
    engine = await _private(private_engine, live_restore=False)
    there = await house_on_engine(engine.url, engine.image)
    owner = await there.house.sign_up()
    device, resting = await rented(owner), await rented(owner)
    await shell(owner, device["id"], "echo kept > /sdcard/note")
    await act(owner, resting["id"], "stop", "stopped")
    for _ in range(2):
        device = await _back_after(engine, owner, device)
    assert (await shell(owner, device["id"], "cat /sdcard/note"))["stdout"] == "kept\n"
    assert (await owner.get(f"/devices/{resting['id']}")).json["state"] == "stopped"
    assert set((await there.containers()).values()) == {"running", "exited"}
    assert "failed" not in {item["data"]["state"] for item in await told(owner)}


async def _back_after(engine: PrivateEngine, owner: Client, device: dict[str, Any]) -> dict[str, Any]:
    """Stop the engine, which ends its phones, and start it again."""
    await engine.stop()
    await _refused_in_time(owner, "POST", "/devices", json=WISH)
    await engine.start()
    return await restarted(owner, device, deadline_s=60)


async def test_phones_run_on_through_the_death_of_an_engine_that_restores_them(
    private_engine: StartEngine, house_on_engine: OpenDocker
) -> None:
    engine = await _private(private_engine, live_restore=True)
    there = await house_on_engine(engine.url, engine.image)
    owner = await there.house.sign_up()
    device = await rented(owner)
    run = (await there.inspect(device["id"]))["State"]["StartedAt"]
    await engine.kill()
    await _refused_in_time(owner, "POST", "/devices", json=WISH)
    assert (await shell(owner, device["id"], "echo on"))["stdout"] == "on\n"
    await engine.start()

    async def ready() -> bool:
        return await _runtime_is(there.house, "ok")

    await until(ready)
    await rented(owner)
    assert (await owner.get(f"/devices/{device['id']}")).json == device
    assert (await there.inspect(device["id"]))["State"]["StartedAt"] == run
    assert await there.repairs() == []


async def test_an_engine_that_is_killed_with_its_phones_gets_them_back(
    private_engine: StartEngine, house_on_engine: OpenDocker
) -> None:
    engine = await _private(private_engine, live_restore=False)
    there = await house_on_engine(engine.url, engine.image)
    owner = await there.house.sign_up()
    device = await rented(owner)
    await engine.kill()
    await engine.start()
    await restarted(owner, device, deadline_s=60)
    assert list((await there.containers()).values()) == ["running"]
    assert await docker("ps", "--quiet", url=engine.url)
