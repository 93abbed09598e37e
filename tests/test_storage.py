"""The storage door, on a real S3 server: what is kept, what is streamed, and what a broken upload leaves."""

import asyncio
import os
import resource
import time
from collections.abc import AsyncIterator
from contextlib import aclosing

import aiohttp
import pytest
import yarl

from server.storage import (
    PART_BYTES,
    ObjectMissing,
    ObjectTooLarge,
    Storage,
    StorageUnavailable,
    _Upload,
    content_disposition,
)
from tests.servers import Servers, open_storage

MIB = 1 << 20


async def pieces(total: int, size: int = MIB) -> AsyncIterator[bytes]:
    """`total` bytes that are not all alike."""
    block = os.urandom(size)
    for start in range(0, total, size):
        yield block[: min(size, total - start)]


async def each(items: list[bytes]) -> AsyncIterator[bytes]:
    for item in items:
        yield item


async def keys(storage: Storage, prefix: str = "") -> list[str]:
    return [entry.key async for entry in storage.list(prefix)]


async def collect(source: AsyncIterator[bytes]) -> bytes:
    return b"".join([piece async for piece in source])


async def test_an_object_is_kept_listed_and_deleted(storage: Storage) -> None:
    await storage.put("apps/ü 1.apk", b"content", "application/vnd.android.package-archive")
    await storage.put("icons/1", b"x", "image/png")
    assert await storage.get("apps/ü 1.apk") == b"content"
    assert await storage.head("apps/ü 1.apk") == 7
    entries = [entry async for entry in storage.list("apps/")]
    assert [(entry.key, entry.size_bytes) for entry in entries] == [("apps/ü 1.apk", 7)]
    assert entries[0].modified_at.tzinfo is not None
    await storage.delete("apps/ü 1.apk")
    await storage.delete("apps/ü 1.apk")
    assert await storage.head("apps/ü 1.apk") is None
    assert await keys(storage) == ["icons/1"]


async def test_an_absent_object_is_missing(storage: Storage) -> None:
    with pytest.raises(ObjectMissing):
        await storage.get("nothing")
    with pytest.raises(ObjectMissing):
        await collect(storage.read("nothing"))


async def test_a_large_object_is_not_taken_into_memory_by_mistake(storage: Storage) -> None:
    await storage.put("large", b"x" * 1000, "text/plain")
    with pytest.raises(ObjectTooLarge):
        await storage.get("large", limit_bytes=999)
    assert len(await storage.get("large", limit_bytes=1000)) == 1000


async def test_ranges_are_half_open(storage: Storage) -> None:
    await storage.put("digits", b"0123456789", "text/plain")
    assert await collect(storage.read("digits")) == b"0123456789"
    assert await collect(storage.read("digits", start=2, end=5)) == b"234"
    assert await collect(storage.read("digits", start=7)) == b"789"
    assert await collect(storage.read("digits", end=3)) == b"012"
    assert await collect(storage.read("digits", start=5, end=5)) == b""
    with pytest.raises(ValueError, match="no byte 10"):
        await collect(storage.read("digits", start=10))


async def test_a_stream_of_any_length_arrives_whole(storage: Storage) -> None:
    for size in (0, 1, PART_BYTES - 1, PART_BYTES, PART_BYTES + 1, 2 * PART_BYTES):
        sent = [piece async for piece in pieces(size, 700_001)]
        assert await storage.upload(f"stream{size}", each(sent), "application/octet-stream") == size
        assert await collect(storage.read(f"stream{size}")) == b"".join(sent)
        assert await storage.head(f"stream{size}") == size


async def test_a_long_stream_takes_memory_for_its_parts_alone(storage: Storage) -> None:
    await storage.upload("warm", pieces(2 * PART_BYTES), "application/octet-stream")
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    await storage.upload("long", pieces(20 * PART_BYTES), "application/octet-stream")
    grown_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown_kib < 6 * PART_BYTES / 1024


async def test_an_upload_whose_source_breaks_leaves_nothing(storage: Storage) -> None:
    async def source(sent_bytes: int) -> AsyncIterator[bytes]:
        async for piece in pieces(sent_bytes):
            yield piece
        raise ConnectionResetError

    for sent_bytes in (0, MIB, PART_BYTES + MIB):
        with pytest.raises(ConnectionResetError):
            await storage.upload("broken", source(sent_bytes), "application/octet-stream")
    assert await keys(storage) == []
    assert await storage.abort_stale_uploads(0) == 0


async def test_an_upload_cancelled_at_any_moment_leaves_nothing(storage: Storage) -> None:
    """Before the first byte, while the upload is begun, within a part, between two, at the end."""
    for delay_ms in range(0, 160, 16):
        upload = asyncio.create_task(
            storage.upload(f"cut{delay_ms}", pieces(2 * PART_BYTES + MIB), "application/octet-stream")
        )
        await asyncio.sleep(delay_ms / 1000)
        if upload.cancel():
            with pytest.raises(asyncio.CancelledError):
                await upload
        else:
            await storage.delete(f"cut{delay_ms}")
    assert await keys(storage) == []
    assert await storage.abort_stale_uploads(0) == 0


async def test_a_short_upload_cancelled_at_any_moment_leaves_nothing(storage: Storage) -> None:
    began = time.monotonic()
    await storage.upload("short", pieces(MIB), "application/octet-stream")
    took_s = time.monotonic() - began
    await storage.delete("short")
    for step in range(6, 24):
        upload = asyncio.create_task(storage.upload("short", pieces(MIB), "application/octet-stream"))
        await asyncio.sleep(took_s * (step / 20))
        if upload.cancel():
            with pytest.raises(asyncio.CancelledError):
                await upload
        else:
            await storage.delete("short")
        assert await keys(storage) == []


async def test_uploads_left_by_a_killed_server_are_swept_when_old(storage: Storage) -> None:
    await _Upload(storage, "orphan", "text/plain").add(b"x" * PART_BYTES)
    assert await storage.abort_stale_uploads(3600) == 0
    assert await storage.abort_stale_uploads(0) == 1
    assert await storage.abort_stale_uploads(0) == 0


async def test_a_signed_url_downloads_under_the_given_name_and_nothing_else(storage: Storage) -> None:
    await storage.put("apps/1", b"content", "text/plain")
    url = await storage.sign("apps/1", expires_s=60, filename='a"b/ü\r\nX-Evil: 1.apk')
    async with aiohttp.ClientSession() as http:
        async with http.get(yarl.URL(url, encoded=True)) as answer:
            assert await answer.read() == b"content"
            assert "X-Evil" not in answer.headers
            disposition = answer.headers["Content-Disposition"]
            assert disposition.startswith('attachment; filename="')
            assert disposition.endswith("filename*=UTF-8''ab%C3%BCX-Evil%3A%201.apk")
        async with http.get(yarl.URL(url.replace("apps/1", "apps/2"), encoded=True)) as answer:
            assert answer.status == 403
        async with http.get(url.partition("?")[0]) as answer:
            assert answer.status == 403


@pytest.mark.parametrize(
    ("name", "header"),
    [
        ("app.apk", "attachment; filename=\"app.apk\"; filename*=UTF-8''app.apk"),
        ("../../etc/x", "attachment; filename=\"....etcx\"; filename*=UTF-8''....etcx"),
        ("\r\n\0", "attachment; filename=\"download\"; filename*=UTF-8''download"),
        ("应用%.apk", "attachment; filename=\"___.apk\"; filename*=UTF-8''%E5%BA%94%E7%94%A8%25.apk"),
        ("a\u202eb", "attachment; filename=\"ab\"; filename*=UTF-8''ab"),
    ],
)
def test_any_file_name_makes_a_harmless_header(name: str, header: str) -> None:
    assert content_disposition(name) == header


async def test_a_stream_left_early_gives_its_connection_back(storage: Storage) -> None:
    await storage.upload("long", pieces(2 * PART_BYTES), "application/octet-stream")
    for _ in range(40):  # more than there are connections
        async with aclosing(storage.read("long")) as stream:
            async for _piece in stream:
                break
    assert await storage.head("long") == 2 * PART_BYTES


async def test_listings_go_on_past_one_page(storage: Storage, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("server.storage.PAGE_KEYS", 3)
    await asyncio.gather(*(storage.put(f"many/{n}", b"", "text/plain") for n in range(8)))
    assert await keys(storage, "many/") == [f"many/{n}" for n in range(8)]


async def test_storage_that_is_away_is_unavailable_within_seconds(servers: Servers) -> None:
    async def hang_up(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.close()

    nobody = await asyncio.start_server(hang_up, "127.0.0.1", 0)
    port = nobody.sockets[0].getsockname()[1]
    with pytest.raises(StorageUnavailable):
        await Storage.open(
            f"http://127.0.0.1:{port}", "cloudphone", "key", "secret", "us-east-1", patience_s=0.2
        )
    nobody.close()
    await nobody.wait_closed()
    with pytest.raises(StorageUnavailable):
        await Storage.open(
            f"http://127.0.0.1:{port}", "cloudphone", "key", "secret", "us-east-1", patience_s=0.2
        )


async def test_hung_storage_fails_the_ping_in_time(servers: Servers) -> None:
    """A line that goes dead after the opening: the ping says so, and the door heals with it."""
    alive = asyncio.Event()
    alive.set()
    target = yarl.URL(servers.endpoint_url)
    pumps: set[asyncio.Task[None]] = set()

    async def carry(near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
        far_in, far_out = await asyncio.open_connection(target.host, target.port)
        for source, sink in ((near_in, far_out), (far_in, near_out)):
            pumps.add(asyncio.create_task(pump(source, sink)))

    async def pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
        while piece := await source.read(65536):
            await alive.wait()
            sink.write(piece)
        sink.close()

    server = await asyncio.start_server(carry, "127.0.0.1", 0)
    access = servers.access
    storage = await Storage.open(
        f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}",
        await servers.new_bucket(),
        access.access_key,
        access.secret_key,
        "us-east-1",
    )
    loop = asyncio.get_running_loop()
    alive.clear()
    began = loop.time()
    with pytest.raises(StorageUnavailable):
        await storage.ping()
    assert loop.time() - began < 4
    alive.set()
    await storage.ping()
    await storage.close()
    server.close()
    for task in pumps:
        task.cancel()


async def test_wrong_keys_are_said_in_one_line(servers: Servers) -> None:
    with pytest.raises(StorageUnavailable) as fault:
        await Storage.open(
            servers.endpoint_url, "other", servers.access_key, "wrong-secret", "us-east-1", patience_s=0
        )
    assert "\n" not in str(fault.value)
    assert "wrong-secret" not in str(fault.value)


async def test_opening_the_same_bucket_twice_keeps_what_is_in_it(servers: Servers) -> None:
    bucket = await servers.new_bucket()
    first = await open_storage(servers.access, bucket)
    await first.put("kept", b"x", "text/plain")
    second = await open_storage(servers.access, bucket)
    assert await keys(second) == ["kept"]
    await first.close()
    await second.close()
