"""What tests of rented phones do again and again."""

import asyncio
import json
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

from plugins.billing.ledger import ACCOUNTS, Posting
from plugins.billing.model import AccountKind
from plugins.devices.room import DEVICES
from server.interfaces import DATABASE
from tests.house import Client, House

WISH = {"name": "mine", "image": "android-12", "plan": "basic"}
DEADLINE_S = 30
LOOK_EVERY_S = 0.05

Open = Callable[..., Awaitable[House]]


async def until(holds: Callable[[], Awaitable[bool]], *, deadline_s: float = DEADLINE_S) -> None:
    """Wait until it holds."""
    async with asyncio.timeout(deadline_s):
        while not await holds():
            await asyncio.sleep(LOOK_EVERY_S)


async def settled(owner: Client, device_id: str, state: str) -> dict[str, Any]:
    """The device, once it is in this state."""
    async with asyncio.timeout(DEADLINE_S):
        while True:
            device: dict[str, Any] = (await owner.get(f"/devices/{device_id}")).json
            if device.get("state") == state:
                return device
            assert state == "failed" or device.get("state") != "failed", device["state_detail"]
            await asyncio.sleep(LOOK_EVERY_S)


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


async def restarted(
    owner: Client, device: dict[str, Any], *, deadline_s: float = DEADLINE_S
) -> dict[str, Any]:
    """The device, once it runs again after it was seen like this."""
    again: dict[str, Any] = {}

    async def came_up() -> bool:
        again.update((await owner.get(f"/devices/{device['id']}")).json)
        return bool(again["state"] == "running" and again["started_at"] > device["started_at"])

    await until(came_up, deadline_s=deadline_s)
    return again


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


async def give(house: House, owner: Client, amount: int) -> None:
    """Top a balance up."""
    gift = Posting(UUID(owner.user["id"]), amount, AccountKind.PROMOTIONS, "gift", str(uuid4()))
    async with house.app[DATABASE].transaction() as tx:
        await house.app[ACCOUNTS].post(tx, [gift])


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
    """Let both clocks think that a phone has been running unpaid for so much longer."""
    await house.app[DATABASE].execute(
        "UPDATE device_meters SET metered_until = metered_until - make_interval(secs => $2),"
        " steady_s = steady_s - $2 WHERE device_id = $1",
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


async def becomes_gone(owner: Client, device_id: str, *, wait: bool) -> bool:
    """Whether a device answers 404, or will."""

    async def gone() -> bool:
        return (await owner.get(f"/devices/{device_id}")).status == 404

    if wait:
        await until(gone)
    return await gone()


def runtime_of(house: House) -> Any:
    """What the phones run on."""
    return house.app[DEVICES].runtime
