"""Files on rented phones: read, written and listed over the API, on real simulated phones."""

import asyncio
import hashlib
import os
import signal
import stat
import tracemalloc
from collections.abc import AsyncIterator
from dataclasses import replace

import pytest

from phones.adb import AdbClient, RemoteFile
from tests.house import House
from tests.phonefiles import MB, listed, nothing_left, opened, pieces, read, tree_of, write
from tests.renting import process_of, rented, shell

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


async def test_only_a_directory_of_a_sane_size_is_listed(house: House) -> None:
    owner = await house.sign_up()
    device_id = (await rented(owner))["id"]
    assert (await listed(owner, device_id, "/sdcard/none")).code == "not_found"
    refused = await listed(owner, device_id, "/system/build.prop")
    assert (refused.status, refused.json["errors"][0]["field"]) == (422, "path")
    many = tree_of(house, device_id) / "storage/emulated/0/many"
    many.mkdir()
    for number in range(10_000):
        (many / f"{number:05}").touch()
    last = (await listed(owner, device_id, "/sdcard/many")).json["items"][-1]
    assert last["name"] == "09999"
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
