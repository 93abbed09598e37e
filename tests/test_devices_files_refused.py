"""Files on rented phones that are not read or written, and what is said of that."""

import asyncio
import gzip
import tracemalloc
from functools import partial

import pytest
from yarl import URL

from server import files as streams
from tests.conftest import Open
from tests.house import House
from tests.phonefiles import MB, listed, nothing_left, pieces, raw_request, read, something_came, write
from tests.renting import DEADLINE_S, act, rented, until
from tests.visiting import browser


async def test_what_is_not_there_or_no_file_is_said_before_anything_is_sent(house: House) -> None:
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    await write(owner, device_id, "/sdcard/note", b"x")
    missing = await read(owner, device_id, "/sdcard/none")
    assert (missing.status, missing.code) == (404, "not_found")
    for path, said in (
        ("/sdcard", "files/list"),
        ("/", "files/list"),
        ("/dev/null", "no regular file"),
        ("/sdcard/note/below", "Not a directory"),
        ("/sdcard/" + "n" * 300, "File name too long"),
    ):
        reply = await read(owner, device_id, path)
        (error,) = reply.json["errors"]
        assert (reply.status, reply.code, error["field"]) == (422, "invalid", "path"), path
        assert said in error["message"]
    assert "Not a directory" in (await read(owner, device_id, "/sdcard/note/below")).json["detail"]


@pytest.mark.parametrize("content", [b"x", bytes(5 * MB)], ids=["small", "large"])
async def test_a_write_the_phone_refuses_is_answered_with_its_reason(house: House, content: bytes) -> None:
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    for path, reason in (
        ("/system/app/x", "Read-only file system"),
        ("/storage/x", "Permission denied"),
        ("/sdcard/Download", "Is a directory"),
        ("/sdcard/x/", "Is a directory"),
        ("/sdcard/{hours} %(x)s/" + "n" * 300, "File name too long"),
    ):
        reply = await write(owner, device_id, path, content)
        (error,) = reply.json["errors"]
        assert (reply.status, reply.code, error["field"]) == (422, "invalid", "path"), path
        assert reason in error["message"]
        assert reason in reply.json["detail"]
    await nothing_left(house, device_id)
    assert (await write(owner, device_id, "/sdcard/x", content)).status == 204


@pytest.mark.parametrize(
    "query",
    [
        "",
        "path=",
        "path=sdcard/x",
        "path=/" + "x" * 1000,
        "path=/" + "%E7%94%B5" * 334,
        "path=/a%00b",
        "path=/%FF",
        "path=/%ED%A0%80",
    ],
)
async def test_a_path_that_can_be_none_names_its_field(house: House, query: str) -> None:
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    for method, place in (("GET", "files"), ("PUT", "files"), ("GET", "files/list")):
        url = URL(f"{house.url}/api/v1/devices/{device_id}/{place}?{query}", encoded=True)
        async with house.http.request(method, url, headers=owner.headers) as response:
            problem = await response.json(content_type=None)
        assert (problem["status"], problem["code"]) == (422, "invalid")
        assert [error["field"] for error in problem["errors"]] == ["path"]


async def test_a_path_of_1000_bytes_is_taken(house: House) -> None:
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    path = "/sdcard" + "/directory" * 99 + "/xx"
    assert len(path) == 1000
    assert (await write(owner, device_id, path, b"deep")).status == 204
    assert (await read(owner, device_id, path)).body == b"deep"
    assert (await listed(owner, device_id, path[:-3])).json["items"][0]["name"] == "xx"


async def test_a_file_that_is_too_large_is_refused_and_leaves_nothing(open_house: Open) -> None:
    house = await open_house(devices={"max_file_mb": 1})
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    assert (await write(owner, device_id, "/sdcard/most", bytes(MB))).status == 204
    said = f"Content-Length: {MB + 1}"
    async with raw_request(owner, house, "PUT", device_id, "/sdcard/x", said) as (reader, _):
        # Not one byte of the body was sent.
        assert (await asyncio.wait_for(reader.readline(), DEADLINE_S)).startswith(b"HTTP/1.1 413")
    reply = await write(owner, device_id, "/sdcard/x", pieces(2))
    assert (reply.status, reply.code) == (413, "too_large")
    assert "1 MB" in reply.json["detail"]
    await nothing_left(house, device_id)
    assert (await read(owner, device_id, "/sdcard/x")).status == 404


async def test_a_small_body_that_unpacks_to_a_large_file_is_too_large(open_house: Open) -> None:
    house = await open_house(devices={"max_file_mb": 1})
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    bomb, gzipped = gzip.compress(bytes(100 * MB)), {"Content-Encoding": "gzip"}
    tracemalloc.start()
    try:
        reply = await write(owner, device_id, "/sdcard/x", bomb, headers=gzipped)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (reply.status, reply.code) == (413, "too_large")
    assert peak_bytes < 15 * MB
    await nothing_left(house, device_id)


async def test_a_body_that_cannot_be_read_leaves_nothing(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    # aiohttp tells nobody that a later chunk makes no sense: the sender seems to have fallen silent.
    monkeypatch.setattr(streams, "STALL_S", 0.5)
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    chunked = "Transfer-Encoding: chunked"
    async with raw_request(owner, house, "PUT", device_id, "/sdcard/x", chunked) as (reader, writer):
        writer.write(b"200000\r\n" + bytes(2 * MB) + b"\r\n")
        await until(partial(something_came, house, device_id))
        writer.write(b"zz\r\nno chunk")
        assert b" 400 " in await asyncio.wait_for(reader.readline(), DEADLINE_S)
        await nothing_left(house, device_id)
    reply = await write(owner, device_id, "/sdcard/x", b"no gzip", headers={"Content-Encoding": "gzip"})
    assert (reply.status, reply.code) == (400, "malformed")
    await nothing_left(house, device_id)
    assert (await read(owner, device_id, "/sdcard/x")).status == 404


async def test_a_part_of_a_file_is_not_taken_for_the_whole(house: House) -> None:
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    reply = await write(owner, device_id, "/sdcard/x", b"rest", headers={"Content-Range": "bytes 4-7/8"})
    assert (reply.status, reply.code) == (400, "malformed")
    assert (await read(owner, device_id, "/sdcard/x")).status == 404


async def test_only_the_owner_reaches_a_phones_files_and_only_while_it_runs(house: House) -> None:
    owner, stranger = await house.sign_up(), await house.sign_up()
    device_id = (await rented(owner))["id"]
    await write(owner, device_id, "/sdcard/x", b"mine")
    for person, status in ((stranger, 404), (house.anyone, 401)):
        assert (await read(person, device_id, "/sdcard/x")).status == status
        assert (await listed(person, device_id, "/sdcard")).status == status
        assert (await write(person, device_id, "/sdcard/x", b"theirs")).status == status
        assert (await write(person, device_id, "/sdcard/x", pieces(5))).status == status
    assert (await read(owner, device_id, "/sdcard/x")).body == b"mine"
    await act(owner, device_id, "stop", "stopped")
    for reply in (
        await read(owner, device_id, "/sdcard/x"),
        await listed(owner, device_id, "/sdcard"),
        await write(owner, device_id, "/sdcard/x", pieces(5)),
    ):
        assert (reply.status, reply.code) == (409, "device_not_running")


async def test_another_site_cannot_write_through_the_owners_browser(house: House) -> None:
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    url = f"{house.url}/api/v1/devices/{device_id}/files"
    async with browser(house) as visitor:
        await visitor.log_in(owner.user["email"])
        token = (await visitor.get("/account")).csrf_token

        async def put(**headers: str) -> int:
            sent = {name.replace("_", "-"): value for name, value in headers.items()}
            async with visitor.http.put(
                url, params={"path": "/sdcard/x"}, data=b"x", headers=sent
            ) as response:
                return response.status

        assert await put() == 403
        assert await put(X_CSRF_Token="guessed") == 403
        assert await put(X_CSRF_Token=token, Origin="https://evil.example") == 403
        assert (await read(owner, device_id, "/sdcard/x")).status == 404
        assert await put(X_CSRF_Token=token, Origin=house.url) == 204
    assert (await read(owner, device_id, "/sdcard/x")).body == b"x"
