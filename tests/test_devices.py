"""Devices: renting, states, limits, control, pages and configuration, on real simulated phones."""

import asyncio
import socket
from contextlib import closing
from typing import Any

import pytest
from pydantic import ValidationError

from phones.runtime import (
    PhoneStatus,
)
from plugins.devices.section import DevicesSection
from server.plugin import PluginFault
from tests.house import House, Reply, port_ranges
from tests.renting import (
    WISH,
    Open,
    act,
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
    # It may have been stopped before anything of it was made.
    left = await runtime_of(house).list()
    assert [(phone.id, phone.status) for phone in left] in ([], [(stopped, PhoneStatus.STOPPED)])


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
    first = int(port_ranges()["adb_ports"][0])  # type: ignore[index]  # a pair, kept as object
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


async def test_an_address_that_is_not_this_machines_stops_the_start(open_house: Open) -> None:
    with pytest.raises(PluginFault, match="listen") as fault:
        await open_house(devices={"bind_address": "10.255.255.1"})
    assert "\n" not in str(fault.value)
