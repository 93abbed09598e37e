"""The library and installations, on a running server with simulated phones."""

import asyncio
import hashlib
from typing import Any
from uuid import uuid4

import aiohttp
import pytest

from server.api import to_cursor
from server.interfaces import DATA_DIR, DATABASE, STORAGE
from tests import apks
from tests.apks import build_apk
from tests.conftest import Open
from tests.house import Client, House, Reply

APK = build_apk(package="org.example.notes", label="Notes", version_name="1.2", version_code=12,
                permissions=("android.permission.INTERNET",))  # fmt: skip


async def send(person: Client, content: bytes, name: str = "notes.apk", part: str = "file") -> Reply:
    """Upload a file."""
    form = aiohttp.FormData()
    form.add_field(part, content, filename=name)
    return await person.call("POST", "/apps", data=form)


async def rent(person: Client) -> str:
    """A running phone's id."""
    image = (await person.get("/device-images")).json["items"][0]["name"]
    plan = (await person.get("/device-plans")).json["items"][0]["name"]
    reply = await person.post("/devices", {"name": "mine", "image": image, "plan": plan})
    assert reply.status == 202, reply.body
    device_id = str(reply.json["id"])
    async with asyncio.timeout(30):
        while (await person.get(f"/devices/{device_id}")).json["state"] != "running":
            await asyncio.sleep(0.05)
    return device_id


async def ended(person: Client, device_id: str) -> list[Any]:
    """The phone's installations, once none is under way."""
    async with asyncio.timeout(30):
        while True:
            items: list[Any] = (await person.get(f"/devices/{device_id}/installations")).json["items"]
            if not {item["state"] for item in items} & {"queued", "installing"}:
                return items
            await asyncio.sleep(0.05)


async def nothing_left(house: House) -> None:
    """No temporary file, object or row of an upload that did not succeed."""
    folder = house.app[DATA_DIR] / "uploads"
    assert not await asyncio.to_thread(lambda: list(folder.iterdir()))
    rows = await house.app[DATABASE].fetch("SELECT id FROM apps")
    objects = [stored.key async for stored in house.app[STORAGE].list("apps/")]
    assert {key.removeprefix("apps/").partition(".")[0] for key in objects} == {
        str(row["id"]) for row in rows
    }
    assert await house.app[DATABASE].fetchval("SELECT count(*) FROM apps WHERE state <> 'ready'") == 0


async def test_an_upload_says_what_the_apk_is(house: House) -> None:
    person = await house.sign_up()
    reply = await send(person, APK, "../../e\u0301vil<b>.apk")
    app = reply.json
    assert reply.status == 201
    assert reply.headers["Location"] == f"/api/v1/apps/{app['id']}"
    assert (app["package"], app["label"], app["version_name"], app["version_code"]) == (
        "org.example.notes", "Notes", "1.2", 12,
    )  # fmt: skip
    assert app["permissions"] == ["android.permission.INTERNET"]
    assert (app["size_bytes"], app["sha256"]) == (len(APK), hashlib.sha256(APK).hexdigest())
    assert (await person.get("/apps")).json["items"] == [app]
    assert (await person.get(f"/apps/{app['id']}")).json == app
    assert (await person.get(f"/apps/{app['id']}/icon")).body.startswith(b"\x89PNG")
    await nothing_left(house)


async def test_the_same_file_again_is_the_same_app(house: House) -> None:
    person = await house.sign_up()
    first = await send(person, APK)
    again = await send(person, APK, "other-name.apk")
    assert (first.status, again.status) == (201, 200)
    assert again.json == first.json
    assert (await send(await house.sign_up(), APK)).status == 201
    twice = await asyncio.gather(*(send(person, build_apk(package="org.example.twice")) for _ in range(3)))
    assert sorted(reply.status for reply in twice) == [200, 200, 201]
    assert len({reply.json["id"] for reply in twice}) == 1
    await nothing_left(house)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a zip at all",
        apks.truncated(),
        apks.encrypted(),
        apks.manifest_bomb(),
        build_apk(package="org.example.part", split="config.x86"),
    ],
    ids=["empty", "text", "truncated", "encrypted", "bomb", "split"],
)
async def test_a_file_that_is_no_app_leaves_nothing(house: House, content: bytes) -> None:
    person = await house.sign_up()
    reply = await send(person, content)
    assert (reply.status, reply.code) == (422, "invalid_apk")
    assert reply.json["detail"]
    assert (await person.get("/apps")).json["items"] == []
    await nothing_left(house)


async def test_a_file_over_the_limit_is_refused(open_house: Open) -> None:
    house = await open_house(apps={"max_upload_mb": 1})
    person = await house.sign_up()
    small_room_over = await send(person, bytes(1536 << 10))
    far_over = await send(person, bytes(8 << 20))
    assert [(r.status, r.code) for r in (small_room_over, far_over)] == [(413, "too_large")] * 2
    await nothing_left(house)


async def test_a_body_without_the_part_is_refused(house: House) -> None:
    person = await house.sign_up()
    assert (await send(person, APK, part="other")).code == "malformed"
    assert (await person.call("POST", "/apps", data=b"x")).code == "unsupported_media_type"
    multipart = {"Content-Type": "multipart/form-data"}
    assert (await person.call("POST", "/apps", data=b"x", headers=multipart)).status == 400
    await nothing_left(house)


async def test_a_client_that_vanishes_leaves_nothing(house: House) -> None:
    person = await house.sign_up()
    host, port = house.url.removeprefix("http://").split(":")
    _, writer = await asyncio.open_connection(host, int(port))
    head = (
        f"POST /api/v1/apps HTTP/1.1\r\nHost: {host}\r\nAuthorization: Bearer {person.token}\r\n"
        "Content-Type: multipart/form-data; boundary=b\r\nContent-Length: 1000000\r\n\r\n"
        '--b\r\nContent-Disposition: form-data; name="file"; filename="x"\r\n\r\n'
    )
    writer.write(head.encode() + bytes(100_000))
    await writer.drain()
    async with asyncio.timeout(10):
        while not await house.app[DATABASE].fetchval("SELECT count(*) FROM apps"):
            await asyncio.sleep(0.02)
        writer.transport.abort()
        while await house.app[DATABASE].fetchval("SELECT count(*) FROM apps"):
            await asyncio.sleep(0.02)
    await nothing_left(house)


async def test_a_start_sweeps_what_a_killed_process_left(house: House) -> None:
    person = await house.sign_up()
    left = uuid4()
    await house.app[STORAGE].put(f"apps/{left}.apk", b"half", "application/octet-stream")
    await house.app[DATABASE].execute(
        "INSERT INTO apps (id, owner_id, state) SELECT $1, id, 'uploading' FROM users LIMIT 1", left
    )
    await asyncio.to_thread((house.app[DATA_DIR] / "uploads" / f"{left}.apk").write_bytes, b"half")
    kept = (await send(person, APK)).json
    await house.restart()
    assert (await person.get("/apps")).json["items"] == [kept]
    await nothing_left(house)


async def test_a_download_honours_ranges(house: House) -> None:
    person = await house.sign_up()
    app = (await send(person, APK)).json
    path = f"/apps/{app['id']}/download"
    whole = await person.get(path)
    part = await person.get(path, headers={"Range": "bytes=10-19"})
    tail = await person.get(path, headers={"Range": "bytes=-5"})
    assert (whole.status, whole.body) == (200, APK)
    assert whole.headers["Content-Disposition"].startswith("attachment")
    assert (part.status, part.body) == (206, APK[10:20])
    assert part.headers["Content-Range"] == f"bytes 10-19/{len(APK)}"
    assert (tail.status, tail.body) == (206, APK[-5:])
    assert (await person.get(path, headers={"Range": f"bytes={len(APK)}-"})).status == 416


async def test_an_app_is_nobody_elses(house: House) -> None:
    person, other = await house.sign_up(), await house.sign_up()
    app = (await send(person, APK)).json
    for path in (f"/apps/{app['id']}", f"/apps/{app['id']}/icon", f"/apps/{app['id']}/download"):
        assert (await other.get(path)).code == "not_found"
        assert (await house.anyone.get(path)).status == 401
    assert (await other.delete(f"/apps/{app['id']}")).code == "not_found"
    assert (await other.get("/apps")).json["items"] == []
    assert (await person.delete(f"/apps/{app['id']}")).status == 204
    assert (await person.get(f"/apps/{app['id']}")).code == "not_found"
    await nothing_left(house)


async def test_pages_lead_through_a_library(house: House) -> None:
    person = await house.sign_up()
    for number in range(3):
        await send(person, build_apk(package=f"org.example.a{number}"))
    first = (await person.get("/apps?limit=2")).json
    second = (await person.get(f"/apps?limit=2&cursor={first['next_cursor']}")).json
    packages = [app["package"] for app in first["items"] + second["items"]]
    assert packages == ["org.example.a2", "org.example.a1", "org.example.a0"]
    assert second["next_cursor"] is None
    for forged in (to_cursor("garbage", str(uuid4())), to_cursor("2026-01-01", str(uuid4())), to_cursor(1)):
        assert (await person.get(f"/apps?cursor={forged}")).code == "malformed"


async def test_an_app_goes_onto_a_phone_and_off_again(house: House) -> None:
    person = await house.sign_up()
    app, device_id = (await send(person, APK)).json, await rent(person)
    key = {"Idempotency-Key": "once"}
    queued = await person.post(f"/devices/{device_id}/apps", {"app_id": app["id"]}, headers=key)
    again = await person.post(f"/devices/{device_id}/apps", {"app_id": app["id"]}, headers=key)
    assert (queued.status, queued.json["state"], again.json) == (202, "queued", queued.json)
    (installation,) = await ended(person, device_id)
    assert (installation["state"], installation["package"]) == ("installed", app["package"])
    on_phone = {"package": app["package"], "version_name": "1.2", "version_code": 12}
    assert (await person.get(f"/devices/{device_id}/apps")).json == [on_phone]
    assert (await person.post(f"/devices/{device_id}/apps/{app['package']}/launch")).status == 204
    assert (await person.post(f"/devices/{device_id}/apps/no.such.app/launch")).code == "not_found"
    assert (await person.delete(f"/devices/{device_id}/apps/{app['package']}")).status == 204
    assert (await person.delete(f"/devices/{device_id}/apps/{app['package']}")).code == "not_found"
    assert (await person.get(f"/devices/{device_id}/apps")).json == []
    told = [one for one in (await person.get("/notifications?limit=100")).json["items"]
            if one["topic"] == "app.installation"]  # fmt: skip
    assert [one["data"]["state"] for one in told] == ["queued", "installing", "installed"]


async def test_a_refusal_of_the_phone_is_explained(house: House) -> None:
    person = await house.sign_up()
    app = (await send(person, build_apk(package="org.example.future", min_sdk=99))).json
    device_id = await rent(person)
    await person.post(f"/devices/{device_id}/apps", {"app_id": app["id"]})
    (installation,) = await ended(person, device_id)
    assert installation["state"] == "failed"
    assert "newer Android" in installation["detail"]


async def test_only_a_running_phone_of_ones_own_takes_apps(house: House) -> None:
    person, other = await house.sign_up(), await house.sign_up()
    app, device_id = (await send(person, APK)).json, await rent(person)
    assert (await other.post(f"/devices/{device_id}/apps", {"app_id": app["id"]})).code == "not_found"
    assert (await person.post(f"/devices/{uuid4()}/apps", {"app_id": app["id"]})).code == "not_found"
    assert (await person.post(f"/devices/{device_id}/apps", {"app_id": str(uuid4())})).code == "not_found"
    assert (await other.get(f"/devices/{device_id}/apps")).code == "not_found"
    await person.post(f"/devices/{device_id}/stop")
    refused = await person.post(f"/devices/{device_id}/apps", {"app_id": app["id"]})
    assert (refused.status, refused.code) == (409, "device_not_running")
    assert (await person.get(f"/devices/{device_id}/apps")).code == "device_not_running"


async def test_an_installation_survives_a_restart(house: House) -> None:
    person = await house.sign_up()
    app, device_id = (await send(person, APK)).json, await rent(person)
    await person.post(f"/devices/{device_id}/apps", {"app_id": app["id"]})
    await ended(person, device_id)
    await house.app[DATABASE].execute("UPDATE installations SET state = 'installing'")
    await house.restart()
    (installation,) = await ended(person, device_id)
    assert installation["state"] == "installed"


async def test_an_app_being_installed_is_not_deleted(house: House) -> None:
    person = await house.sign_up()
    app, device_id = (await send(person, APK)).json, await rent(person)
    await person.post(f"/devices/{device_id}/apps", {"app_id": app["id"]})
    await ended(person, device_id)
    await house.app[DATABASE].execute("UPDATE installations SET state = 'installing'")
    assert (await person.delete(f"/apps/{app['id']}")).code == "invalid_state"
    await house.app[DATABASE].execute("UPDATE installations SET state = 'installed'")
    assert (await person.delete(f"/apps/{app['id']}")).status == 204
