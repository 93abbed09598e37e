"""Files on rented phones whose way breaks off: nobody takes a part for the whole, and nothing is left."""

import asyncio
import os
import signal
from collections.abc import AsyncIterator
from functools import partial

import aiohttp
import pytest

from server import files as streams
from tests.house import House
from tests.phonefiles import (
    MB,
    nothing_left,
    opened,
    pieces,
    raw_request,
    read,
    something_came,
    tree_of,
    write,
)
from tests.renting import DEADLINE_S, process_of, rented, shell, until


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
