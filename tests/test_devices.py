"""Devices: renting, states, ports, money and control, on real simulated phones where one has to come up."""

import asyncio
import json
import os
import signal
import socket
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import pytest
from pydantic import ValidationError

from phones.runtime import (
    FoundPhone,
    PhoneSpec,
    PhoneStats,
    PhoneStatus,
    PortTaken,
    Runtime,
    RuntimeFault,
    RuntimeName,
    RuntimeUnavailable,
)
from phones.simulated import SimulatedRuntime
from plugins import apps, billing, devices, notify, users
from plugins.devices import METERING, RECONCILER
from plugins.devices.reconciler import STARTS_AT_ONCE
from plugins.devices.room import DEVICES
from plugins.devices.section import DevicesSection
from server.db import CommitUnknown, Tx
from server.interfaces import DATABASE
from server.plugin import Plugin, PluginFault
from tests.house import PASSWORD, Client, House, Reply, port_ranges
from tests.process import server_process
from tests.servers import Servers

WISH = {"name": "mine", "image": "android-12", "plan": "basic"}
DEADLINE_S = 30

Open = Callable[..., Awaitable[House]]


def on(make_runtime: Callable[[Path], Runtime]) -> tuple[Plugin, ...]:
    """The plugins, with phones on another runtime."""
    stood_in = replace(devices.PLUGIN, lifespan=devices.lifespan_with(make_runtime))
    return (users.PLUGIN, notify.PLUGIN, billing.PLUGIN, stood_in, apps.PLUGIN)


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Wait until it holds."""
    async with asyncio.timeout(DEADLINE_S):
        while not await holds():
            await asyncio.sleep(0.02)


async def settled(owner: Client, device_id: str, state: str) -> dict[str, Any]:
    """The device, once it is in this state."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            device: dict[str, Any] = (await owner.get(f"/devices/{device_id}")).json
            if device.get("state") == state:
                return device
            assert state == "failed" or device.get("state") != "failed", device["state_detail"]
            await asyncio.sleep(0.02)


async def rented(owner: Client, **wish: object) -> dict[str, Any]:
    """A running phone."""
    reply = await owner.post("/devices", {**WISH, **wish})
    assert reply.status == 202, reply.body
    return await settled(owner, reply.json["id"], "running")


async def act(owner: Client, device_id: str, action: str, state: str) -> dict[str, Any]:
    """Do something to a device and wait for the state it leads to."""
    reply = await owner.post(f"/devices/{device_id}/{action}")
    assert reply.status == 202, reply.body
    return await settled(owner, device_id, state)


async def shell(owner: Client, device_id: str, command: str) -> dict[str, Any]:
    """A command's answer."""
    reply = await owner.post(f"/devices/{device_id}/shell", {"command": command})
    assert reply.status == 200, reply.body
    return dict(reply.json)


async def told(owner: Client) -> list[dict[str, Any]]:
    """What the owner heard of devices, oldest first."""
    items = (await owner.get("/notifications?limit=100")).json["items"]
    return [item for item in items if item["topic"] == "device.state"]


async def balance(owner: Client) -> int:
    """What the owner has."""
    return int((await owner.get("/billing/balance")).json["balance"])


async def charges(house: House, device_id: str) -> int:
    """All that was ever charged for a device, in minor units."""
    return int(
        await house.app[DATABASE].fetchval(
            "SELECT coalesce(-sum(amount), 0)::bigint FROM ledger_entries"
            " WHERE reference = $1 AND kind = 'device_time' AND amount < 0",
            device_id,
        )
    )


async def ran(house: House, device_id: str, seconds: int) -> None:
    """Let the database think that a phone has been running unpaid for so much longer."""
    await house.app[DATABASE].execute(
        "UPDATE devices SET metered_until = metered_until - make_interval(secs => $2) WHERE id = $1",
        UUID(device_id),
        float(seconds),
    )


async def held_ports(house: House) -> int:
    """How many ports are taken by rows."""
    return int(await house.app[DATABASE].fetchval("SELECT count(*) FROM device_ports"))


def process_of(house: House, device_id: str) -> int:
    """The process of a simulated phone."""
    phone = house._file.parent / "data" / "phones" / device_id / "phone.json"
    return int(json.loads(phone.read_text())["pid"])


def lives(pid: int) -> bool:
    """Whether a process is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


# Renting and the states


async def test_a_rented_phone_comes_up_and_its_owner_is_told(house: House) -> None:
    owner = await house.sign_up()
    key = {"Idempotency-Key": "one"}
    reply, again = [await owner.post("/devices", WISH, headers=key) for _ in range(2)]
    device = reply.json
    assert again.json["id"] == device["id"], "the same request again rents no second phone"
    assert (reply.status, device["state"], device["runtime"]) == (202, "creating", "simulated")
    assert reply.headers["Location"] == f"/api/v1/devices/{device['id']}"
    assert (device["owner_id"], device["started_at"]) == (owner.user["id"], None)
    up = await settled(owner, device["id"], "running")
    assert up["ports"] == device["ports"]
    assert len(set(up["ports"].values())) == 3
    assert up["started_at"] >= up["created_at"]
    assert (await owner.get("/devices")).json["items"] == [up]
    heard = await told(owner)
    assert [item["data"]["state"] for item in heard] == ["creating", "running"]
    data = {"device_id": device["id"], "name": "mine", "state": "running", "detail": None}
    assert heard[1]["data"] == data
    assert heard[1]["title"] == "mine is running"
    stats = (await owner.get(f"/devices/{device['id']}/stats")).json
    assert 0 < stats["memory_bytes"] < stats["memory_limit_bytes"]
    metrics = (await house.anyone.call("GET", "//metrics")).body.decode()
    assert 'cloudphone_devices{state="running"} 1.0' in metrics


async def test_a_phone_keeps_its_ports_and_data_until_it_is_reset(house: House) -> None:
    owner = await house.sign_up()
    device = await rented(owner)
    device_id, ports = device["id"], device["ports"]
    await shell(owner, device_id, "echo kept > /sdcard/note")
    stopped = await act(owner, device_id, "stop", "stopped")
    assert stopped["ports"] == ports
    assert (await owner.get(f"/devices/{device_id}/screenshot")).code == "device_not_running"
    assert (await owner.post(f"/devices/{device_id}/stop")).code == "invalid_state"
    assert (await act(owner, device_id, "start", "running"))["ports"] == ports
    assert (await owner.post(f"/devices/{device_id}/start")).code == "invalid_state"
    assert (await shell(owner, device_id, "cat /sdcard/note"))["stdout"] == "kept\n"
    assert (await owner.post(f"/devices/{device_id}/restart")).json["state"] == "stopping"
    await settled(owner, device_id, "running")
    assert (await shell(owner, device_id, "cat /sdcard/note"))["stdout"] == "kept\n"
    assert (await act(owner, device_id, "reset", "running"))["ports"] == ports
    assert (await shell(owner, device_id, "cat /sdcard/note"))["exit_code"] == 1
    states = [item["data"]["state"] for item in await told(owner)]
    assert states == [
        *("creating", "running", "stopping", "stopped", "starting", "running"),
        *("stopping", "starting", "running", "resetting", "starting", "running"),
    ]


async def test_a_stopped_phone_stays_stopped_when_it_is_reset(house: House) -> None:
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    await shell(owner, device_id, "echo kept > /sdcard/note")
    await act(owner, device_id, "stop", "stopped")
    await act(owner, device_id, "reset", "stopped")
    await act(owner, device_id, "start", "running")
    assert (await shell(owner, device_id, "cat /sdcard/note"))["exit_code"] == 1


async def test_a_deleted_phone_is_gone_with_its_ports_and_its_process(house: House) -> None:
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    pid = process_of(house, device_id)
    reply = await owner.delete(f"/devices/{device_id}")
    assert (reply.status, reply.json["state"]) == (202, "deleting")

    async def gone() -> bool:
        return (await owner.get(f"/devices/{device_id}")).status == 404

    await until(gone)
    assert not lives(pid)
    assert await held_ports(house) == 0
    assert (await owner.delete(f"/devices/{device_id}")).status == 404
    assert [item["data"]["state"] for item in await told(owner)][-2:] == ["deleting", "deleted"]


async def test_phones_created_at_once_all_come_up_on_their_own_ports(open_house: Open) -> None:
    house = await open_house(devices={"max_per_user": 12})
    owner = await house.sign_up()
    replies = await asyncio.gather(*(owner.post("/devices", WISH) for _ in range(12)))
    assert {reply.status for reply in replies} == {202}
    ups = await asyncio.gather(*(settled(owner, reply.json["id"], "running") for reply in replies))
    assert len({port for up in ups for port in up["ports"].values()}) == 36
    first = (await owner.get("/devices?limit=5&state=running")).json
    rest = (await owner.get(f"/devices?limit=100&cursor={first['next_cursor']}")).json
    listed = [item["id"] for item in first["items"] + rest["items"]]
    assert sorted(listed) == sorted(up["id"] for up in ups)
    assert rest["next_cursor"] is None
    assert (await owner.get("/devices?state=stopped")).json == {"items": [], "next_cursor": None}


async def test_a_phone_that_is_still_being_made_can_be_stopped_and_deleted(house: House) -> None:
    owner = await house.sign_up()
    stopped, deleted = [(await owner.post("/devices", WISH)).json["id"] for _ in range(2)]
    assert (await owner.post(f"/devices/{stopped}/stop")).status == 202
    assert (await owner.delete(f"/devices/{deleted}")).status == 202
    await settled(owner, stopped, "stopped")

    async def gone() -> bool:
        return (await owner.get(f"/devices/{deleted}")).status == 404

    await until(gone)
    assert [phone.status for phone in await _runtime(house).list()] == [PhoneStatus.STOPPED]


async def test_a_wrong_wish_names_its_field(house: House) -> None:
    owner = await house.sign_up()
    wrong: list[tuple[str, object]] = [
        ("name", ""),
        ("name", "x" * 65),
        ("name", "two\nlines"),
        ("name", "evil\u202ename"),
        ("name", None),
        ("image", "redroid/redroid:12"),
        ("plan", "gratis"),
        ("price_per_hour", 0),
    ]
    for field, value in wrong:
        reply = await owner.post("/devices", {**WISH, field: value})
        assert (reply.status, reply.code) == (422, "invalid")
        assert [error["field"] for error in reply.json["errors"]] == [field]
    assert (await owner.get("/devices")).json["items"] == []
    assert await held_ports(house) == 0


async def test_a_phone_can_be_renamed_and_keeps_odd_but_harmless_names(house: House) -> None:
    owner = await house.sign_up()
    device_id = (await owner.post("/devices", WISH)).json["id"]
    for name in ("<b>{{7*7}}</b>", "我的手机 👩‍💻", "a" * 64):
        assert (await owner.patch(f"/devices/{device_id}", {"name": name})).json["name"] == name
    assert (await owner.patch(f"/devices/{device_id}", {"name": " \u200f"})).status == 422
    assert (await owner.get(f"/devices/{device_id}")).json["name"] == "a" * 64


async def test_somebody_elses_phone_is_not_there(house: House) -> None:
    owner, stranger = await house.sign_up(), await house.sign_up()
    device_id = (await rented(owner))["id"]
    before = (await owner.get(f"/devices/{device_id}")).json
    place = f"/devices/{device_id}"
    calls: list[tuple[str, str, dict[str, Any]]] = [
        ("GET", place, {}),
        ("PATCH", place, {"json": {"name": "theirs"}}),
        ("DELETE", place, {}),
        *(("POST", f"{place}/{action}", {}) for action in ("start", "stop", "restart", "reset")),
        ("GET", f"{place}/screenshot", {}),
        ("GET", f"{place}/stats", {}),
        ("POST", f"{place}/input", {"json": {"type": "key", "key": "HOME"}}),
        ("POST", f"{place}/shell", {"json": {"command": "id"}}),
        ("GET", f"//devices/{device_id}", {}),
    ]
    for method, path, more in calls:
        assert (await stranger.call(method, path, **more)).status == 404, path
        assert (await house.anyone.call(method, path, **more)).status == 401, path
    assert (await stranger.get("/devices")).json["items"] == []
    assert (await owner.get(place)).json == before


# Limits


async def test_two_rents_at_once_on_a_balance_for_one_give_one_phone(open_house: Open) -> None:
    house = await open_house(billing={"welcome_credit": 39})
    owner = await house.sign_up()
    replies = await asyncio.gather(*(owner.post("/devices", WISH) for _ in range(2)))
    assert sorted(reply.status for reply in replies) == [202, 402]
    refused = next(reply for reply in replies if reply.status == 402)
    assert refused.code == "insufficient_balance"
    assert "0.40" in refused.json["detail"]
    assert len((await owner.get("/devices")).json["items"]) == 1
    assert await held_ports(house) == 3
    device_id = (await owner.get("/devices")).json["items"][0]["id"]
    await settled(owner, device_id, "running")
    await act(owner, device_id, "stop", "stopped")
    other = (await owner.post("/devices", WISH)).json["id"]
    assert (await owner.post(f"/devices/{device_id}/start")).code == "insufficient_balance"
    await settled(owner, other, "running")


async def test_a_quota_holds_under_concurrency(open_house: Open) -> None:
    house = await open_house(devices={"max_per_user": 1})
    owner = await house.sign_up()
    replies = await asyncio.gather(*(owner.post("/devices", WISH) for _ in range(4)))
    assert sorted(reply.status for reply in replies) == [202, 409, 409, 409]
    assert {reply.code for reply in replies if reply.status == 409} == {"quota_exceeded"}


async def test_foreign_ports_are_skipped_and_the_last_ones_run_out(open_house: Open) -> None:
    first = int(port_ranges()["adb_ports"][0])  # type: ignore[index]
    ranges = {"adb_ports": [first, first + 1], "webrtc_ports": [first + 2, first + 3]}
    with closing(socket.create_server(("127.0.0.1", first))):
        house = await open_house(devices={**ranges, "scrcpy_ports": [first + 4, first + 9]})
        owner = await house.sign_up()
        device = await rented(owner)
        assert device["ports"]["adb"] == first + 1
        refused = await owner.post("/devices", WISH)
        assert (refused.status, refused.code) == (503, "ports_exhausted")
        assert "Retry-After" in refused.headers
    assert len((await owner.get("/devices")).json["items"]) == 1
    assert await held_ports(house) == 3


# Control


async def test_a_phone_is_seen_touched_and_typed_on(house: House) -> None:
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]

    async def screen() -> bytes:
        reply = await owner.get(f"/devices/{device_id}/screenshot")
        assert (reply.status, reply.headers["Content-Type"]) == (200, "image/png")
        return reply.body

    async def does(**gesture: object) -> Reply:
        return await owner.post(f"/devices/{device_id}/input", gesture)

    assert (await screen()).startswith(b"\x89PNG")
    assert (await does(type="tap", x=719, y=1279)).status == 204
    assert (await does(type="swipe", x=300, y=900, to_x=300, to_y=200, duration_ms=50)).status == 204
    assert (await does(type="key", key="KEYCODE_HOME")).status == 204
    evil = 'it\'s 100%s "$(touch /sdcard/evil)" `touch /sdcard/evil`; touch /sdcard/evil 你好'
    assert (await does(type="text", text=evil)).status == 204
    assert (await shell(owner, device_id, "ls /sdcard/evil"))["exit_code"] != 0
    for wrong, field in (
        ({"type": "tap", "x": 1280, "y": 10}, "x"),
        ({"type": "tap", "x": -1, "y": 10}, "tap.x"),
        ({"type": "swipe", "x": 1, "y": 1, "to_x": 1, "to_y": 5000}, "to_y"),
        ({"type": "key", "key": "NO_SUCH_KEY"}, "key"),
        ({"type": "key", "key": "1; reboot"}, "key.key"),
        ({"type": "text", "text": ""}, "text.text"),
        ({"type": "pinch"}, "body"),
    ):
        reply = await does(**wrong)
        assert (reply.status, reply.json["errors"][0]["field"]) == (422, field)


async def test_a_command_on_the_phone_is_bounded(house: House) -> None:
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    answer = await shell(owner, device_id, "printf 'a\\xffb'; echo oops >&2; exit 3")
    assert answer == {"exit_code": 3, "stdout": "a\ufffdb", "stderr": "oops\n"}

    async def refused(**command: object) -> Reply:
        return await owner.post(f"/devices/{device_id}/shell", command)

    late = await refused(command="sleep 20", timeout_s=1)
    assert (late.status, late.code) == (409, "command_ended")
    assert "1 s" in late.json["detail"]
    assert (await refused(command="id", timeout_s=301)).status == 422
    assert (await refused(command="")).status == 422
    assert (await refused(command="a\x00b")).status == 422


async def test_a_phone_that_dies_is_started_again_once_and_then_fails(house: House) -> None:
    owner = await house.sign_up()
    device = await rented(owner)
    pid = process_of(house, device["id"])
    os.kill(pid, signal.SIGKILL)

    async def another() -> bool:
        try:
            return await asyncio.to_thread(process_of, house, device["id"]) != pid
        except (OSError, ValueError):
            return False

    await until(another)
    again = await settled(owner, device["id"], "running")
    assert again["ports"] == device["ports"]
    states = [(item["data"]["state"], item["data"]["detail"]) for item in await told(owner)]
    assert states[2:] == [("starting", "The phone ended by itself and is started again."), ("running", None)]
    os.kill(await asyncio.to_thread(process_of, house, device["id"]), signal.SIGKILL)
    failed = await settled(owner, device["id"], "failed")
    assert failed["ports"] is None
    assert "twice" in failed["state_detail"]
    assert await held_ports(house) == 0
    await act(owner, device["id"], "start", "running")


# Money


async def test_running_time_is_charged_exactly(house: House) -> None:
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    before = await balance(owner)
    metering = house.app[METERING]
    for seconds in (3600, 100, 100, 7, 33, 1800, 59):
        await ran(house, device_id, seconds)
        await metering.meter()
    row = await house.app[DATABASE].fetchrow(
        "SELECT extract(epoch FROM metered_until - started_at)::bigint AS behind_s, charge_remainder"
        " FROM devices WHERE id = $1",
        UUID(device_id),
    )
    assert row is not None
    paid = await charges(house, device_id)
    # What was metered is what the meter was set back by, and what passed since it started.
    metered_s = 3600 + 100 + 100 + 7 + 33 + 1800 + 59 + row["behind_s"]
    assert paid * 3600 + row["charge_remainder"] == 20 * metered_s
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
        assert (state == "gone") == (await _becomes_gone(owner, device_id, wait=state == "gone"))
    titles = [item["title"] for item in await told(owner)]
    assert titles[-3:] == ["mine will be deleted soon", "mine is being deleted", "mine is deleted"]


async def _becomes_gone(owner: Client, device_id: str, *, wait: bool) -> bool:
    async def gone() -> bool:
        return (await owner.get(f"/devices/{device_id}")).status == 404

    if wait:
        await until(gone)
    return await gone()


# Machines that misbehave


class Machine:
    """A runtime whose phones have no life of their own: nothing listens on their ports."""

    name: RuntimeName = "simulated"

    def __init__(self, _data_dir: Path) -> None:
        self.phones: dict[str, PhoneSpec | None] = {}

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def create(self, spec: PhoneSpec) -> None:
        self.phones.setdefault(spec.id, None)

    async def start(self, spec: PhoneSpec) -> None:
        self.phones[spec.id] = spec

    async def stop(self, phone_id: str) -> None:
        if phone_id in self.phones:
            self.phones[phone_id] = None

    async def wipe(self, phone_id: str) -> None:
        pass

    async def remove(self, phone_id: str) -> None:
        self.phones.pop(phone_id, None)

    async def inspect(self, phone_id: str) -> FoundPhone | None:
        if phone_id not in self.phones:
            return None
        spec = self.phones[phone_id]
        status = PhoneStatus.RUNNING if spec else PhoneStatus.STOPPED
        return FoundPhone(phone_id, status, spec.ports if spec else None)

    async def list(self) -> list[FoundPhone]:
        found = [await self.inspect(phone_id) for phone_id in self.phones]
        return [phone for phone in found if phone]

    async def stats(self, phone_id: str) -> PhoneStats:
        raise RuntimeFault("the phone does not run")

    async def events(self) -> AsyncIterator[FoundPhone]:
        await asyncio.Event().wait()
        yield FoundPhone("", PhoneStatus.STOPPED, None)


class Moody(Machine):
    """Its phones behave as they are named."""

    def __init__(self, data_dir: Path) -> None:
        super().__init__(data_dir)
        self._upset: set[str] = set()

    async def create(self, spec: PhoneSpec) -> None:
        await super().create(spec)
        if spec.name == "exploding" and spec.id not in self._upset:
            self._upset.add(spec.id)
            raise ZeroDivisionError

    async def start(self, spec: PhoneSpec) -> None:
        match spec.name:
            case "silent":
                await super().start(spec)
            case "fainting":
                self.phones[spec.id] = None
            case "crowded":
                raise PortTaken(spec.ports.webrtc)
            case _:
                raise RuntimeFault("no room on the disk")


class Away(Machine):
    """Does not answer, until told otherwise."""

    away = True

    async def inspect(self, phone_id: str) -> FoundPhone | None:
        if self.away:
            raise RuntimeUnavailable("the machine does not answer")
        return await super().inspect(phone_id)


class Clinging(Machine):
    """Cannot end a phone, until told otherwise."""

    clings = True

    async def stop(self, phone_id: str) -> None:
        if self.clings:
            raise RuntimeFault("the phone's process cannot be ended")
        await super().stop(phone_id)


class Crowded(SimulatedRuntime):
    """Finds somebody else's program on the first two triples of ports."""

    refused = 0

    async def start(self, spec: PhoneSpec) -> None:
        if self.refused < 2:
            self.refused += 1
            raise PortTaken(spec.ports.scrcpy)
        await super().start(spec)


def _runtime(house: House) -> Any:
    return house.app[DEVICES].runtime


async def test_a_phone_that_cannot_come_up_fails_with_the_reason(open_house: Open) -> None:
    house = await open_house(on(Moody), devices={"start_deadline_s": 0.4})
    owner = await house.sign_up()
    before = await balance(owner)
    for name, reason in (
        ("silent", "did not come up within 0.4 s"),
        ("fainting", "ended while it was starting"),
        ("crowded", "in use by another program"),
        ("broken", "no room on the disk"),
        ("exploding", "no room on the disk"),
    ):
        device_id = (await owner.post("/devices", {**WISH, "name": name})).json["id"]
        failed = await settled(owner, device_id, "failed")
        assert reason in failed["state_detail"]
        assert (failed["ports"], failed["started_at"]) == (None, None)
        assert await held_ports(house) == 0
        heard = (await told(owner))[-1]
        assert (heard["data"]["state"], heard["data"]["detail"]) == ("failed", failed["state_detail"])
        assert reason in heard["body"]
        chinese = await owner.get(f"/devices/{device_id}", headers={"Accept-Language": "zh-CN"})
        assert chinese.json["state_detail"].startswith(("手机", "无法"))
        reply = await owner.post(f"/devices/{device_id}/start")
        assert (reply.status, reply.json["state_detail"]) == (202, None)
        assert reply.json["ports"] is not None
        assert (await owner.delete(f"/devices/{device_id}")).status == 202
        assert await _becomes_gone(owner, device_id, wait=True)
    assert await balance(owner) == before
    assert await held_ports(house) == 0


async def test_a_taken_port_is_exchanged_for_another(open_house: Open) -> None:
    house = await open_house(on(Crowded))
    owner = await house.sign_up()
    first = (await owner.post("/devices", WISH)).json
    up = await settled(owner, first["id"], "running")
    assert up["ports"]["scrcpy"] - first["ports"]["scrcpy"] == 2
    assert await held_ports(house) == 3


async def test_ports_stay_taken_until_the_phone_is_really_gone(open_house: Open) -> None:
    house = await open_house(on(Clinging), devices={"start_deadline_s": 0.2})
    owner = await house.sign_up()
    device_id = (await owner.post("/devices", WISH)).json["id"]
    failed = await settled(owner, device_id, "failed")
    assert failed["ports"] is not None
    assert await held_ports(house) == 3
    _runtime(house).clings = False

    async def freed() -> bool:
        return (await owner.get(f"/devices/{device_id}")).json["ports"] is None

    await until(freed)
    assert await held_ports(house) == 0


async def test_a_stop_does_not_wait_for_phones_that_are_slow_to_come_up(open_house: Open) -> None:
    house = await open_house(on(Machine), devices={"max_per_user": 20})
    owner = await house.sign_up()
    replies = [await owner.post("/devices", WISH) for _ in range(STARTS_AT_ONCE + 2)]
    ids = [reply.json["id"] for reply in replies]
    async with asyncio.timeout(DEADLINE_S / 2):
        for device_id, action in ((ids[0], "stop"), (ids[-1], "stop")):
            await act(owner, device_id, action, "stopped")
        assert (await owner.delete(f"/devices/{ids[-2]}")).status == 202
        assert await _becomes_gone(owner, ids[-2], wait=True)


async def test_nothing_is_rented_while_the_machine_is_away(open_house: Open) -> None:
    house = await open_house(on(Away))
    owner = await house.sign_up()
    refused = await owner.post("/devices", WISH)
    assert (refused.status, refused.code) == (503, "runtime_unavailable")
    assert (await owner.get("/devices")).json["items"] == []
    ready = await house.anyone.get("//readyz")
    assert (ready.status, ready.json["parts"]["runtime"]["state"]) == (503, "down")
    _runtime(house).away = False
    assert (await owner.post("/devices", WISH)).status == 202


async def test_a_commit_of_which_nobody_knows_is_looked_up(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = await house.sign_up()
    commit = Tx._send_commit
    broken_off = 0

    async def break_off(tx: Tx, connection: Any) -> None:
        nonlocal broken_off
        written = await connection.fetchval("SELECT count(*) FROM devices")
        await commit(tx, connection)
        if written and not broken_off:
            broken_off += 1
            tx._committed = False
            raise CommitUnknown("connection lost")

    monkeypatch.setattr(Tx, "_send_commit", break_off)
    assert (await owner.post("/devices", WISH)).status == 503
    assert (await owner.get("/devices")).json["items"] == []
    await house.app[RECONCILER].reconcile()
    (device,) = (await owner.get("/devices")).json["items"]
    await settled(owner, device["id"], "running")
    assert await held_ports(house) == 3


# Across restarts


async def test_phones_outlive_the_server_and_are_adopted(house: House) -> None:
    owner = await house.sign_up()
    device = await rented(owner)
    stopped_id = (await rented(owner))["id"]
    await act(owner, stopped_id, "stop", "stopped")
    pid = process_of(house, device["id"])
    passing = (await owner.post("/devices", WISH)).json
    await house.restart()
    assert (await owner.get(f"/devices/{device['id']}")).json == device
    assert process_of(house, device["id"]) == pid
    assert (await shell(owner, device["id"], "echo hello"))["stdout"] == "hello\n"
    assert (await settled(owner, passing["id"], "running"))["ports"] == passing["ports"]
    assert (await owner.get(f"/devices/{stopped_id}")).json["state"] == "stopped"


async def test_what_changed_while_the_server_was_away_is_mended(house: House) -> None:
    owner = await house.sign_up()
    missing, orphan = await rented(owner), await rented(owner)
    orphan_pid = process_of(house, orphan["id"])
    for table, column in (("device_ports", "device_id"), ("devices", "id")):
        await house.app[DATABASE].execute(f"DELETE FROM {table} WHERE {column} = $1", UUID(orphan["id"]))
    await house.stop()
    os.kill(process_of(house, missing["id"]), signal.SIGKILL)
    await house.start()

    async def started_again() -> bool:
        device = (await owner.get(f"/devices/{missing['id']}")).json
        return bool(device["state"] == "running" and device["started_at"] > missing["started_at"])

    await until(started_again)
    assert (await owner.get(f"/devices/{missing['id']}")).json["ports"] == missing["ports"]

    async def removed() -> bool:
        return not lives(orphan_pid)

    await until(removed)
    assert (await owner.get(f"/devices/{orphan['id']}")).status == 404


async def test_a_killed_server_loses_no_phone_and_doubles_none(servers: Servers) -> None:
    sections: dict[str, dict[str, object]] = {
        "server": {"port": 0},
        "database": {"url": await servers.new_database()},
        "storage": {
            "endpoint_url": servers.endpoint_url,
            "bucket": await servers.new_bucket(),
            "access_key": servers.access_key,
            "secret_key": servers.secret_key,
        },
        "devices": {"runtime": "simulated", **port_ranges()},
    }
    async with server_process(sections) as server, aiohttp.ClientSession() as http:
        await server.start()

        async def call(method: str, path: str, **more: Any) -> Any:
            async with http.request(method, f"{server.url}/api/v1{path}", headers=headers, **more) as reply:
                assert reply.status < 300, await reply.text()
                return await reply.json()

        async def all_run() -> bool:
            items = (await call("GET", "/devices"))["items"]
            return {item["state"] for item in items} == {"running"}

        headers: dict[str, str] = {}
        account = {"email": "killed@example.com", "password": PASSWORD}
        session = await call("POST", "/auth/register", json=account)
        headers["Authorization"] = f"Bearer {session['access_token']}"
        await call("POST", "/devices", json=WISH)
        await until(all_run)
        (adopted,) = (await call("GET", "/devices"))["items"]
        await asyncio.gather(*(call("POST", "/devices", json=WISH) for _ in range(3)))
        await server.kill()
        await server.start()
        await until(all_run)
        items = (await call("GET", "/devices"))["items"]
        assert len(items) == 4
        assert adopted in items
        phones = await _phones_below(server.data_dir / "phones")
        assert phones == {(item["id"], *item["ports"].values()) for item in items}


async def _phones_below(folder: Path) -> set[tuple[object, ...]]:
    runtime = await asyncio.to_thread(SimulatedRuntime, folder)
    await runtime.open()
    found = await runtime.list()
    await runtime.close()
    assert all(phone.ports for phone in found)
    return {
        (phone.id, phone.ports.adb, phone.ports.webrtc, phone.ports.scrcpy) for phone in found if phone.ports
    }


# Pages and configuration


async def test_the_pages_show_what_there_is_and_rent(house: House) -> None:
    owner = await house.sign_up()
    assert "You have no phone yet" in (await owner.get("//devices")).body.decode()
    form = (await owner.get("//devices/new")).body.decode()
    assert "android-12" in form
    assert "configured to simulate" in form
    wrong = await owner.call(
        "POST", "//devices/new", data={"name": "", "image": "android-12", "plan": "basic"}
    )
    assert wrong.status == 422
    sent = await owner.call("POST", "//devices/new", data={**WISH, "name": "<i>mine</i>"})
    assert sent.status == 303
    device_id = sent.headers["Location"].removeprefix("/devices/")
    await settled(owner, device_id, "running")
    assert "&lt;i&gt;mine&lt;/i&gt;" in (await owner.get("//devices")).body.decode()
    page = (await owner.get(f"//devices/{device_id}")).body.decode()
    ports = (await owner.get(f"/devices/{device_id}")).json["ports"]
    assert f"adb connect 127.0.0.1:{ports['adb']}" in page
    assert (await owner.get("//devices/nonsense")).status == 404


async def test_what_can_be_chosen_comes_from_the_configuration(open_house: Open) -> None:
    images = [{"name": "android-9", "kind": "simulated"}, {"name": "android-13", "reference": "x/y:13"}]
    plans = [{"name": "free", "price_per_hour": 0, "width": 480, "height": 800}]
    house = await open_house(devices={"images": images, "plans": plans}, billing={"welcome_credit": 0})
    owner = await house.sign_up()
    assert [image["name"] for image in (await owner.get("/device-images")).json["items"]] == [
        "android-9",
        "android-13",
    ]
    (plan,) = (await owner.get("/device-plans")).json["items"]
    assert (plan["name"], plan["price_per_hour"], plan["currency"]) == ("free", 0, "CNY")
    device_id = (await rented(owner, image="android-13", plan="free"))["id"]
    answer = await shell(owner, device_id, "getprop ro.build.version.release; wm size")
    assert answer["stdout"] == "13\nPhysical size: 480x800\n"


@pytest.mark.parametrize(
    ("section", "said"),
    [
        ({"adb_ports": [24000, 24100]}, "adb_ports and scrcpy_ports overlap"),
        ({"adb_ports": [21999, 20000]}, "the lower one first"),
        ({"adb_ports": [0, 10]}, "greater than or equal to 1"),
        ({"bind_address": "0.0.0.0"}, "allow_public_ports"),
        ({"bind_address": "8.8.8.8"}, "allow_public_ports"),
        ({"bind_address": "localhost"}, "expected an IP address"),
        ({"images": [{"name": "android-12"}]}, "needs a reference"),
        ({"images": [{"name": "x", "kind": "simulated"}] * 2}, "same name"),
        ({"images": [{"name": "x", "reference": "-v /:/host"}]}, "pattern"),
        ({"plans": [{"name": "x", "price_per_hour": -1}]}, "greater than or equal to 0"),
        ({"plans": [{"name": "x", "widht": 1}]}, "Extra inputs"),
        ({"runtime": "qemu"}, "'auto', 'docker' or 'simulated'"),
    ],
)
def test_an_impossible_section_is_refused(section: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        DevicesSection.model_validate(section)


def test_private_and_expressly_public_addresses_are_taken() -> None:
    for address in ("127.0.0.1", "192.168.1.5", "::1"):
        assert DevicesSection(bind_address=address).bind_address == address
    assert DevicesSection(bind_address="0.0.0.0", allow_public_ports=True)


@pytest.mark.parametrize(
    ("section", "said"),
    [({"runtime": "docker"}, "cannot drive a Docker engine"), ({"bind_address": "10.255.255.1"}, "listen")],
)
async def test_what_this_machine_cannot_do_stops_the_start(
    open_house: Open, section: dict[str, object], said: str
) -> None:
    with pytest.raises(PluginFault, match=said) as fault:
        await open_house(devices=section)
    assert "\n" not in str(fault.value)


async def test_auto_simulates_and_says_why(open_house: Open) -> None:
    house = await open_house(devices={"runtime": "auto"})
    owner = await house.sign_up()
    page = (await owner.get("//devices/new")).body.decode()
    assert any(reason in page for reason in ("No Docker engine", "lacks binder", "cannot drive"))
