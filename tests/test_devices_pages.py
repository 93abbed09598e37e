"""What pages say of the machine that runs the phones, and to whom."""

from tests.house import Client, House
from tests.renting import WISH, Open, runtime_of, settled
from tests.test_devices_reconciler import Away, Machine, Moody, on
from tests.test_notify import make_admin

PUBLIC = "adb has no login: who reaches a port owns the phone."
EXPOSED = "no firewall rule could be set for their network."
AWAY = "The machine that runs the phones does not answer at the moment."
PAGES = ("//devices", "//devices/new", "//billing", "//notifications")


class Exposed(Machine):
    """Cannot keep phones from the machine."""

    def is_exposed(self) -> bool:
        return True


class Lost(Away):
    """Away, and known to be."""

    def trouble(self) -> str:
        return "no Docker engine answers" if self.away else ""


async def read(client: Client, path: str, **headers: str) -> str:
    """A page's text."""
    page = await client.get(path, headers=headers)
    assert page.status == 200, path
    return page.body.decode()


async def both(house: House) -> tuple[Client, Client]:
    """An administrator and a user."""
    admin, user = await house.sign_up(), await house.sign_up()
    await make_admin(house, admin)
    return admin, user


async def test_public_ports_are_an_administrators_worry(open_house: Open) -> None:
    house = await open_house(devices={"bind_address": "0.0.0.0", "allow_public_ports": True})
    admin, user = await both(house)
    for path in PAGES:
        text = await read(admin, path)
        assert PUBLIC in text
        assert EXPOSED not in text
        assert PUBLIC not in await read(user, path)
    assert "adb 没有登录" in await read(admin, "//devices", **{"Accept-Language": "zh-CN"})
    assert PUBLIC not in await read(house.anyone, "//login")


async def test_phones_that_reach_the_machine_are_an_administrators_worry(open_house: Open) -> None:
    house = await open_house(on(Exposed))
    admin, user = await both(house)
    for path in PAGES:
        text = await read(admin, path)
        assert EXPOSED in text
        assert PUBLIC not in text
        assert EXPOSED not in await read(user, path)


async def test_without_a_danger_nobody_is_warned(house: House) -> None:
    admin, _ = await both(house)
    for path in PAGES:
        text = await read(admin, path)
        assert not any(warning in text for warning in (PUBLIC, EXPOSED, AWAY))


async def test_every_page_says_that_the_machine_is_away(open_house: Open) -> None:
    house = await open_house(on(Lost))
    owner = await house.sign_up()
    for path in PAGES:
        assert AWAY in await read(owner, path)
    assert AWAY in await read(house.anyone, "//login")
    runtime_of(house).away = False
    for path in PAGES:
        assert AWAY not in await read(owner, path)


async def test_a_failed_phones_page_gives_the_reason_and_its_log(open_house: Open) -> None:
    house = await open_house(on(Moody))
    owner = await house.sign_up()
    device_id = (await owner.post("/devices", {**WISH, "name": "broken"})).json["id"]
    await settled(owner, device_id, "failed")
    text = await read(owner, f"//devices/{device_id}")
    assert 'data-state="failed"' in text
    assert "no room on the disk" in text
    assert "What the phone printed last" in text
    assert (await owner.get(f"/devices/{device_id}/log")).json == {"lines": []}


async def test_readyz_names_the_runtime(open_house: Open) -> None:
    house = await open_house(on(Lost))
    ready = await house.anyone.get("//readyz")
    away = {"state": "down", "detail": "the machine does not answer"}
    assert (ready.status, ready.json["parts"]["runtime"]) == (503, away)
    runtime_of(house).away = False
    ready = await house.anyone.get("//readyz")
    assert (ready.status, ready.json["parts"]["runtime"]) == (200, {"state": "ok"})
