"""Devices whose phones, machine or server misbehave: every row and every phone agree in the end."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import pytest

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
from plugins.devices import RECONCILER, repairs
from server.db import CommitUnknown, Tx
from server.interfaces import DATABASE
from server.plugin import Plugin
from tests.house import PASSWORD, House, port_ranges
from tests.process import server_process
from tests.renting import (
    DEADLINE_S,
    WISH,
    Open,
    act,
    balance,
    becomes_gone,
    held_ports,
    lives,
    process_of,
    rented,
    runtime_of,
    settled,
    shell,
    told,
    until,
)
from tests.servers import Servers


def on(make_runtime: Callable[[Path], Runtime]) -> tuple[Plugin, ...]:
    """The plugins, with phones on another runtime."""
    stood_in = replace(devices.PLUGIN, lifespan=devices.lifespan_with(make_runtime))
    return (users.PLUGIN, notify.PLUGIN, billing.PLUGIN, stood_in, apps.PLUGIN)


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
    assert "twice" in failed["state_detail"]

    async def freed() -> bool:
        return await held_ports(house) == 0

    await until(freed)
    await act(owner, device["id"], "start", "running")


# Machines that misbehave


class Machine:
    """A runtime whose phones have no life of their own: nothing listens on their ports."""

    name: RuntimeName = "simulated"
    epoch = 0

    def __init__(self, _data_dir: Path) -> None:
        self.phones: dict[str, PhoneSpec | None] = {}

    async def open(self) -> None:
        pass

    async def close(self) -> None:
        pass

    async def check(self) -> None:
        pass

    def trouble(self) -> str:
        return ""

    def is_exposed(self) -> bool:
        return False

    async def fetch(self, spec: PhoneSpec) -> AsyncIterator[int]:
        return
        yield 0

    async def discard(self, found: FoundPhone) -> None:
        self.phones.pop(found.id, None)

    async def limit(self, spec: PhoneSpec) -> None:
        pass

    async def log(self, phone_id: str, lines: int) -> list[str]:
        return []

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

    async def events(self) -> AsyncIterator[str | None]:
        await asyncio.Event().wait()
        yield None


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

    async def check(self) -> None:
        if self.away:
            raise RuntimeUnavailable("the machine does not answer")


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
        assert await becomes_gone(owner, device_id, wait=True)
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
    runtime_of(house).clings = False

    async def freed() -> bool:
        return (await owner.get(f"/devices/{device_id}")).json["ports"] is None

    await until(freed)
    assert await held_ports(house) == 0


async def test_a_stop_does_not_wait_for_phones_that_are_slow_to_come_up(open_house: Open) -> None:
    house = await open_house(on(Machine), devices={"max_per_user": 20})
    owner = await house.sign_up()
    replies = [await owner.post("/devices", WISH) for _ in range(6)]
    ids = [reply.json["id"] for reply in replies]
    async with asyncio.timeout(DEADLINE_S / 2):
        for device_id, action in ((ids[0], "stop"), (ids[-1], "stop")):
            await act(owner, device_id, action, "stopped")
        assert (await owner.delete(f"/devices/{ids[-2]}")).status == 202
        assert await becomes_gone(owner, ids[-2], wait=True)


async def test_nothing_is_rented_while_the_machine_is_away(open_house: Open) -> None:
    house = await open_house(on(Away))
    owner = await house.sign_up()
    refused = await owner.post("/devices", WISH)
    assert (refused.status, refused.code) == (503, "runtime_unavailable")
    assert (await owner.get("/devices")).json["items"] == []
    ready = await house.anyone.get("//readyz")
    assert (ready.status, ready.json["parts"]["runtime"]["state"]) == (503, "down")
    runtime_of(house).away = False
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


async def test_what_changed_while_the_server_was_away_is_mended(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(repairs, "ORPHAN_AGE", timedelta(0))
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
        **await servers.new_sections(),
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
