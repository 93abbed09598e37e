"""Files on rented phones: read, written and listed over the API, on real simulated phones."""

import asyncio
import gzip
import hashlib
import os
import signal
import stat
import tracemalloc
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
import pytest
from yarl import URL

from phones.adb import AdbClient, RemoteFile
from plugins.devices import files
from plugins.devices.room import DEVICES
from server import files as streams
from tests.conftest import Open
from tests.house import Client, House, Reply
from tests.renting import DEADLINE_S, act, process_of, rented, shell, until
from tests.visiting import browser

MB = 1 << 20


async def read(person: Client, device_id: str, path: str) -> Reply:
    """A file's answer."""
    return await person.get(f"/devices/{device_id}/files", params={"path": path})


async def write(person: Client, device_id: str, path: str, content: Any, **more: Any) -> Reply:
    """What writing a file answers."""
    return await person.call(
        "PUT", f"/devices/{device_id}/files", params={"path": path}, data=content, **more
    )


async def listed(person: Client, device_id: str, path: str) -> Reply:
    """A directory's answer."""
    return await person.get(f"/devices/{device_id}/files/list", params={"path": path})


def tree_of(house: House, device_id: str) -> Path:
    """Where the phone's own files lie on this machine."""
    (tree,) = (house._file.parent / "data" / "phones" / device_id).glob("**/files/tree")
    return tree


async def something_came(house: House, device_id: str) -> bool:
    """Whether a part of a file has reached the phone."""
    incoming = tree_of(house, device_id).parent / "incoming"
    return any(draft.stat().st_size for draft in incoming.iterdir())


async def nothing_left(house: House, device_id: str) -> None:
    """Wait until no stream is open to the phone, and nothing half written lies on it."""
    connection = (await house.app[DEVICES].link(UUID(device_id)))._connection
    incoming = tree_of(house, device_id).parent / "incoming"

    async def holds() -> bool:
        return not connection._streams and not list(incoming.iterdir())

    await until(holds)


@asynccontextmanager
async def raw_request(
    person: Client, house: House, method: str, device_id: str, path: str, *headers: str
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A request whose head is sent and whose connection is ours to break."""
    url = URL(house.url)
    target = URL.build(path=f"/api/v1/devices/{device_id}/files", query={"path": path})
    reader, writer = await asyncio.open_connection(url.host, url.port)
    with closing(writer):
        head = [f"{method} {target} HTTP/1.1", "Host: phones", f"Authorization: Bearer {person.token}"]
        writer.write("".join(f"{line}\r\n" for line in (*head, *headers, "")).encode())
        yield reader, writer
        writer.transport.abort()


@asynccontextmanager
async def opened(
    house: House, person: Client, device_id: str, path: str
) -> AsyncIterator[aiohttp.ClientResponse]:
    """A file's answer whose body is not read yet."""
    url = f"{house.url}/api/v1/devices/{device_id}/files"
    async with house.http.get(url, params={"path": path}, headers=person.headers) as response:
        assert response.status == 200
        yield response


async def pieces(count: int) -> AsyncIterator[bytes]:
    """So many megabytes."""
    for number in range(count):
        yield bytes([number % 256]) * MB


# The way there and back


async def test_a_large_file_survives_the_way_there_and_back_in_little_memory(house: House) -> None:
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    noise = os.urandom(MB)
    sent, received = hashlib.sha256(), hashlib.sha256()

    async def content() -> AsyncIterator[bytes]:
        for number in range(30):
            piece = bytes([number]) + noise[1:]
            sent.update(piece)
            yield piece

    tracemalloc.start()
    try:
        reply = await write(owner, device_id, "/sdcard/new/large.bin", content())
        assert (reply.status, reply.body) == (204, b"")
        async with opened(house, owner, device_id, "/sdcard/new/large.bin") as response:
            assert response.content_length == 30 * MB
            # As long as nobody reads, the phone must wait.
            await asyncio.sleep(0.3)
            async for piece in response.content.iter_any():
                received.update(piece)
        _, peak_bytes = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert received.digest() == sent.digest()
    assert peak_bytes < 15 * MB
    await nothing_left(house, device_id)


async def test_a_phone_that_takes_nothing_holds_up_the_sender(house: House) -> None:
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    assert (await write(owner, device_id, "/sdcard/first", b"x")).status == 204
    sent_bytes = 0

    async def content() -> AsyncIterator[bytes]:
        nonlocal sent_bytes
        async for piece in pieces(40):
            sent_bytes += len(piece)
            yield piece

    pid = process_of(house, device_id)
    os.kill(pid, signal.SIGSTOP)
    try:
        writing = asyncio.create_task(write(owner, device_id, "/sdcard/second", content()))
        await asyncio.sleep(0.5)
        assert sent_bytes < 25 * MB
    finally:
        os.kill(pid, signal.SIGCONT)
    assert (await writing).status == 204
    assert sent_bytes == 40 * MB


async def test_any_name_goes_there_and_back(house: House) -> None:
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    names = ["a b", "电话 📱.txt", 'it\'s "q\\uoted"', "new\nline", "100%41", "a+b&c=d#e?", "a,33188", "-rf"]
    for name in names:
        content = name.encode() + b"\0\xff"
        assert (await write(owner, device_id, f"/sdcard/odd/{name}", content)).status == 204, name
        reply = await read(owner, device_id, f"/sdcard/odd/{name}")
        assert (reply.status, reply.body) == (200, content)
        assert reply.headers["Content-Disposition"].startswith("attachment;")
        assert reply.headers["Content-Disposition"].isprintable()
    tree = tree_of(house, device_id) / "storage/emulated/0/odd"
    (tree / os.fsdecode(b"no\xff")).write_bytes(b"x")
    assert [item["name"] for item in (await listed(owner, device_id, "/sdcard/odd")).json["items"]] == sorted(
        [*names, "no\ufffd"]
    )


async def test_a_file_is_answered_as_bytes_that_no_browser_opens(house: House) -> None:
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    page = b"<script>alert(1)</script>"
    sent = await write(
        owner, device_id, "/sdcard/evil.html", page, headers={"Content-Type": "text/html; charset=x"}
    )
    assert sent.status == 204
    headers = (await read(owner, device_id, "/sdcard/evil.html")).headers
    assert headers["Content-Type"] == "application/octet-stream"
    assert headers["Content-Length"] == str(len(page))
    assert headers["X-Content-Type-Options"] == "nosniff"
    assert headers["Content-Security-Policy"] == "default-src 'none'; sandbox"
    assert headers["Cache-Control"] == "no-store"
    assert "evil.html" in headers["Content-Disposition"]


async def test_a_file_is_replaced_as_a_whole_and_may_be_empty(house: House) -> None:
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    for content in (b"a longer text", b"short", b""):
        assert (await write(owner, device_id, "/sdcard/note", content)).status == 204
        reply = await read(owner, device_id, "/sdcard/note")
        assert (reply.body, reply.headers["Content-Length"]) == (content, str(len(content)))


async def test_what_the_kernel_makes_up_comes_whole_though_its_size_is_said_to_be_nothing(
    house: House,
) -> None:
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    reply = await read(owner, device_id, "/proc/version")
    assert (reply.status, reply.headers["Content-Length"]) == (200, str(len(reply.body)))
    assert reply.body.startswith(b"Linux version")


async def test_a_long_file_of_no_said_size_comes_in_chunks(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    await write(owner, device_id, "/sdcard/long", pieces(2))
    ask = AdbClient.stat

    async def lying(client: AdbClient, path: str, *, timeout_s: float = 10.0) -> RemoteFile | None:
        found = await ask(client, path, timeout_s=timeout_s)
        assert found is not None
        return replace(found, size_bytes=0)

    monkeypatch.setattr(AdbClient, "stat", lying)
    reply = await read(owner, device_id, "/sdcard/long")
    assert reply.body == b"".join([piece async for piece in pieces(2)])
    assert reply.headers["Transfer-Encoding"] == "chunked"
    async with opened(house, owner, device_id, "/sdcard/long"):
        pass
    await nothing_left(house, device_id)


async def test_two_transfers_and_a_shell_share_a_phone(house: House) -> None:
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    content = os.urandom(8 * MB)
    await write(owner, device_id, "/sdcard/one", content)
    there, back, said = await asyncio.gather(
        write(owner, device_id, "/sdcard/two", content),
        read(owner, device_id, "/sdcard/one"),
        shell(owner, device_id, "echo on"),
    )
    assert (there.status, back.body == content, said["stdout"]) == (204, True, "on\n")
    assert (await read(owner, device_id, "/sdcard/two")).body == content


# What breaks off


async def test_a_file_that_grows_meanwhile_ends_at_the_length_it_had(house: House) -> None:
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    await write(owner, device_id, "/sdcard/log", pieces(30))
    async with opened(house, owner, device_id, "/sdcard/log") as response:
        with (tree_of(house, device_id) / "storage/emulated/0/log").open("ab") as log:
            log.write(b"x" * MB)
        content = await response.read()
    assert content == b"".join([piece async for piece in pieces(30)])
    await nothing_left(house, device_id)


async def test_a_file_that_shrinks_meanwhile_is_a_broken_answer(house: House) -> None:
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    await write(owner, device_id, "/sdcard/log", pieces(30))
    async with opened(house, owner, device_id, "/sdcard/log") as response:
        os.truncate(tree_of(house, device_id) / "storage/emulated/0/log", 20)
        with pytest.raises(aiohttp.ClientError):
            await response.read()
    await nothing_left(house, device_id)


async def test_a_phone_that_dies_meanwhile_is_a_broken_answer(house: House) -> None:
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    await write(owner, device_id, "/sdcard/large", pieces(30))
    async with opened(house, owner, device_id, "/sdcard/large") as response:
        os.kill(process_of(house, device_id), signal.SIGKILL)
        with pytest.raises(aiohttp.ClientError):
            await response.read()
    reply = await read(owner, device_id, "/sdcard/large")
    assert reply.code in {"device_not_running", "runtime_unavailable"}


async def test_a_phone_that_dies_while_it_is_written_is_answered(house: House) -> None:
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    pid = process_of(house, device_id)

    async def content() -> AsyncIterator[bytes]:
        yield bytes(4 * MB)
        os.kill(pid, signal.SIGKILL)
        async for piece in pieces(20):
            yield piece

    reply = await write(owner, device_id, "/sdcard/x", content())
    assert (reply.status, reply.code) in {(409, "device_not_running"), (503, "runtime_unavailable")}


async def test_a_sender_who_vanishes_leaves_nothing_and_the_file_that_was_there(house: House) -> None:
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    await write(owner, device_id, "/sdcard/old", b"as it was")
    for path, framing in (
        ("/sdcard/new", f"Content-Length: {8 * MB}"),
        ("/sdcard/old", "Transfer-Encoding: chunked"),
    ):
        async with raw_request(owner, house, "PUT", device_id, path, framing) as (_, writer):
            writer.write((b"800000\r\n" if "chunked" in framing else b"") + bytes(3 * MB))
            await until(partial(something_came, house, device_id))
        await nothing_left(house, device_id)
    assert (await read(owner, device_id, "/sdcard/new")).status == 404
    assert (await read(owner, device_id, "/sdcard/old")).body == b"as it was"
    assert (await shell(owner, device_id, "echo on"))["stdout"] == "on\n"


async def test_a_sender_who_falls_silent_is_told_and_leaves_nothing(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(streams, "STALL_S", 0.3)
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    length = f"Content-Length: {8 * MB}"
    async with raw_request(owner, house, "PUT", device_id, "/sdcard/half", length) as (reader, writer):
        writer.write(bytes(2 * MB))
        await writer.drain()
        assert (await asyncio.wait_for(reader.readline(), DEADLINE_S)).startswith(b"HTTP/1.1 400")
        await nothing_left(house, device_id)
    assert (await read(owner, device_id, "/sdcard/half")).status == 404


async def test_a_reader_who_vanishes_or_takes_nothing_frees_the_phone(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    await write(owner, device_id, "/sdcard/large", pieces(30))
    async with raw_request(owner, house, "GET", device_id, "/sdcard/large") as (reader, _):
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
    await nothing_left(house, device_id)
    monkeypatch.setattr(streams, "STALL_S", 0.3)
    async with raw_request(owner, house, "GET", device_id, "/sdcard/large") as (reader, _):
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        await nothing_left(house, device_id)
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await reader.readexactly(30 * MB)


# What is refused


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


# Listing


async def test_a_directory_is_listed_directories_first(house: House) -> None:
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    await write(owner, device_id, "/sdcard/Show/b", b"four")
    await write(owner, device_id, "/sdcard/Show/a", b"")
    await write(owner, device_id, "/sdcard/Show/z/inner", b"x")
    reply = await listed(owner, device_id, "/sdcard/Show")
    assert reply.json["next_cursor"] is None
    shown = [(item["name"], item["kind"], item["size_bytes"]) for item in reply.json["items"]]
    assert (shown[0][:2], shown[1:]) == (("z", "directory"), [("a", "file", 0), ("b", "file", 4)])
    assert set(reply.json["items"][1]) == {"name", "kind", "size_bytes", "modified_at"}
    assert reply.json["items"][1]["modified_at"] > "2020"
    root = {item["name"]: item["kind"] for item in (await listed(owner, device_id, "/")).json["items"]}
    assert (root["sdcard"], root["data"]) == ("link", "directory")
    assert {item["kind"] for item in (await listed(owner, device_id, "/dev")).json["items"]} == {"other"}


async def test_only_a_directory_of_a_sane_size_is_listed(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "MAX_ENTRIES", 300)  # ten thousand take a while to make
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    assert (await listed(owner, device_id, "/sdcard/none")).code == "not_found"
    refused = await listed(owner, device_id, "/system/build.prop")
    assert (refused.status, refused.json["errors"][0]["field"]) == (422, "path")
    many = tree_of(house, device_id) / "storage/emulated/0/many"
    many.mkdir()
    for number in range(300):
        (many / f"{number:05}").touch()
    last = (await listed(owner, device_id, "/sdcard/many")).json["items"][-1]
    assert last["name"] == "00299"
    (many / "one more").touch()
    reply = await listed(owner, device_id, "/sdcard/many")
    assert (reply.status, reply.json["errors"][0]["field"]) == (422, "path")
    assert "10,000" in reply.json["errors"][0]["message"]


async def test_whatever_a_phone_says_of_a_file_can_be_shown(
    house: House, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]

    async def hostile(*_: object, **__: object) -> list[RemoteFile]:
        return [
            RemoteFile("late", stat.S_IFREG, 2**64 - 1, 2**63 - 1),
            RemoteFile("early", stat.S_IFSOCK, 0, -(2**63)),
            RemoteFile("\udcff", 0, 0, 0),
        ]

    monkeypatch.setattr(AdbClient, "list", hostile)
    items = (await listed(owner, device_id, "/sdcard")).json["items"]
    assert [tuple(item.values()) for item in items] == [
        ("early", "other", 0, "0001-01-01T00:00:00Z"),
        ("late", "file", 2**64 - 1, "9999-12-31T23:59:59Z"),
        ("\ufffd", "other", 0, "1970-01-01T00:00:00Z"),
    ]


# What is said of them


async def test_the_description_says_what_goes_in_and_comes_out(house: House) -> None:
    document = (await house.anyone.get("/openapi.json")).json
    reading = document["paths"]["/api/v1/devices/{device_id}/files"]["get"]
    writing = document["paths"]["/api/v1/devices/{device_id}/files"]["put"]
    assert reading["responses"]["200"]["content"] == {"application/octet-stream": {}}
    assert writing["requestBody"] == {"required": True, "content": {"*/*": {}}}
    assert set(writing["responses"]) >= {"204", "404", "409", "413", "422", "503"}
    assert "200" not in writing["responses"]
    (path,) = (one for one in writing["parameters"] if one["in"] == "query")
    assert (path["name"], path["required"]) == ("path", True)
    upload = document["paths"]["/api/v1/apps"]["post"]["requestBody"]["content"]
    assert list(upload) == ["multipart/form-data"]
