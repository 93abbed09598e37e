"""Our ADB client against the simulated phone's adbd."""

import asyncio
import hashlib
import os
import statistics
import time
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from phones.adb import (
    AdbClient,
    AdbFault,
    AdbGarbled,
    AdbOverflow,
    AdbRefused,
    AdbTimeout,
    AdbUnreachable,
    InstallRefused,
    ShellResult,
    quote,
)
from phones.simulator.adbd import CONNECTIONS_MAX, Adbd
from phones.wire import Service, Stream
from tests.smallphone import PICTURE, SmallPhone, eventually

MB = 1 << 20


@pytest.fixture
async def phone(tmp_path: Path) -> SmallPhone:
    phone = SmallPhone(tmp_path / "phone")
    await phone.files.prepare({"/system/build.prop": "ro.x=1\n"})
    return phone


@pytest.fixture
async def adbd(phone: SmallPhone) -> AsyncIterator[Adbd]:
    adbd = Adbd(phone.as_phone())
    await adbd.serve("127.0.0.1", 0)
    yield adbd
    await adbd.close()


@pytest.fixture
async def client(adbd: Adbd) -> AsyncIterator[AdbClient]:
    async with await AdbClient.connect("127.0.0.1", adbd.port) as client:
        yield client


async def pieces(content: bytes, size: int = 100_000) -> AsyncIterator[bytes]:
    for start in range(0, len(content), size):
        yield content[start : start + size]


async def pulled(client: AdbClient, path: str) -> bytes:
    return b"".join([piece async for piece in client.pull(path)])


async def test_the_banner_names_the_phone(client: AdbClient) -> None:
    assert client.properties["ro.product.name"] == "small"
    assert client.properties["ro.product.model"] == "Small  Phone 1"
    assert client.features == {"shell_v2", "cmd", "stat_v2", "ls_v2", "fixed_push_mkdir", "sendrecv_v2"}
    assert not client.closed


async def test_a_command_gives_its_output_errors_and_exit_code(client: AdbClient) -> None:
    assert await client.shell(quote(["echo", "it's"]), timeout_s=5) == ShellResult(0, b"it's\n", b"")
    assert await client.shell("err no", timeout_s=5) == ShellResult(0, b"", b"no\n")
    assert await client.shell("exit 255", timeout_s=5) == ShellResult(255, b"", b"")
    assert (await client.shell("nonsense", timeout_s=5)).exit_code == 127
    assert await client.exec_out("echo raw", timeout_s=5) == b"raw\n"


async def test_a_command_reads_what_it_is_given(client: AdbClient) -> None:
    content = os.urandom(3 * MB)
    result = await client.shell("cat", timeout_s=10, stdin=content, max_output_bytes=4 * MB)
    assert result == ShellResult(0, content, b"")
    # One that does not read it holds nobody up.
    assert (await client.shell("echo done", timeout_s=5, stdin=content)).stdout == b"done\n"


async def test_too_much_output_is_an_error_and_ends_the_command(client: AdbClient, phone: SmallPhone) -> None:
    with pytest.raises(AdbOverflow):
        await client.shell("flood", timeout_s=5)
    with pytest.raises(AdbOverflow):
        await client.exec_out("zeros 3", timeout_s=5, max_output_bytes=2 * MB)
    await eventually(lambda: phone.shell.cancelled["flood"] == 1)


async def test_a_command_that_crashes_the_shell_leaves_no_exit_code(client: AdbClient) -> None:
    with pytest.raises(AdbGarbled):
        await client.shell("crash", timeout_s=5)
    assert (await client.shell("echo on", timeout_s=5)).stdout == b"on\n"


async def test_a_late_command_is_ended_on_the_phone(client: AdbClient, phone: SmallPhone) -> None:
    with pytest.raises(AdbTimeout):
        await client.shell("sleep", timeout_s=0.1)
    await eventually(lambda: phone.shell.cancelled["sleep"] == 1)
    waiting = asyncio.create_task(client.shell("sleep", timeout_s=5))
    await eventually(lambda: phone.shell.running["sleep"] == 1)
    waiting.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiting
    await eventually(lambda: phone.shell.cancelled["sleep"] == 2)


async def test_two_hundred_commands_run_at_once(client: AdbClient) -> None:
    results = await asyncio.gather(*(client.shell(f"echo {n}", timeout_s=10) for n in range(200)))
    assert [result.stdout for result in results] == [b"%d\n" % n for n in range(200)]


async def test_a_command_waits_for_no_other_stream(client: AdbClient, phone: SmallPhone) -> None:
    async with await client.open("exec:flood") as unread, await client.open("exec:drip") as slow:
        assert await slow.read() == b"drop\n"
        took = []
        for _ in range(20):
            began = time.perf_counter()
            assert (await client.shell("echo quick", timeout_s=5)).stdout == b"quick\n"
            took.append(time.perf_counter() - began)
        # The slow stream moves every 200 ms: whoever waited for it would take as long.
        assert statistics.median(took) < 0.05
        # Nobody takes what the other writes: one packet waits here, and its writer there.
        assert phone.shell.flooded_bytes <= 2 * 65536
        written = phone.shell.flooded_bytes
        await unread.read()
        await eventually(lambda: phone.shell.flooded_bytes > written)


async def test_a_file_survives_the_way_there_and_back(client: AdbClient, phone: SmallPhone) -> None:
    content = os.urandom(20 * MB)
    assert await client.push(pieces(content), "/sdcard/new/twenty.bin", mtime=1_600_000_000) == len(content)
    stored = await client.stat("/storage/emulated/0/new/twenty.bin")
    assert stored is not None
    assert (stored.size_bytes, stored.modified_at, stored.mode & 0o777) == (
        len(content),
        1_600_000_000,
        0o666,
    )
    digest = hashlib.sha256()
    async for piece in client.pull("/sdcard/new/twenty.bin"):
        digest.update(piece)
    assert digest.digest() == hashlib.sha256(content).digest()


async def test_small_and_empty_files_and_odd_names_survive_too(client: AdbClient) -> None:
    for name, content in (
        ("empty", b""),
        ("a,b 'c'.txt", b"x"),
        ("电话.txt", b"y" * 65536),
        ("z", b"z" * 65537),
    ):
        await client.push(pieces(content), f"/data/local/tmp/{name}")
        assert await pulled(client, f"/data/local/tmp/{name}") == content
    listed = await client.list("/data/local/tmp")
    assert [file.name for file in listed] == ["a,b 'c'.txt", "empty", "z", "电话.txt"]
    assert [file.size_bytes for file in listed] == [1, 0, 65537, 65536]
    assert [file.name for file in await client.list("/sdcard/none")] == []
    assert await client.stat("/sdcard/none") is None
    assert (await client.stat("/sdcard") or listed[0]).is_directory


@pytest.mark.parametrize(
    ("path", "reason"),
    [
        ("/system/x", "Read-only file system"),
        ("/sdcard/Download", "Is a directory"),
        ("/sdcard/" + "n" * 300, "File name too long"),
        ("/sdcard/../../../../../../tmp/x", "Read-only file system"),
        ("/sdcard/x\0y", "no NUL"),
        ("/sdcard/" + "d/" * 600, "1 to"),
    ],
)
async def test_a_push_the_phone_refuses_says_why(client: AdbClient, path: str, reason: str) -> None:
    with pytest.raises(AdbRefused, match=reason):
        await client.push(pieces(bytes(2 * MB)), path)


async def test_a_pull_the_phone_refuses_says_why(client: AdbClient) -> None:
    with pytest.raises(AdbRefused, match="No such file or directory"):
        await pulled(client, "/sdcard/none")
    with pytest.raises(AdbRefused, match="Is a directory"):
        await pulled(client, "/sdcard")
    assert await pulled(client, "/system/build.prop") == b"ro.x=1\n"


async def test_a_push_that_breaks_off_leaves_no_file(
    client: AdbClient, phone: SmallPhone, tmp_path: Path
) -> None:
    async def broken() -> AsyncIterator[bytes]:
        yield bytes(2 * MB)
        raise RuntimeError("the source failed")

    with pytest.raises(RuntimeError):
        await client.push(broken(), "/sdcard/half.bin")
    await eventually(lambda: not list((tmp_path / "phone" / "incoming").iterdir()))
    assert await client.stat("/sdcard/half.bin") is None


async def test_an_abandoned_pull_closes_its_stream(client: AdbClient, adbd: Adbd) -> None:
    await client.push(pieces(bytes(8 * MB)), "/sdcard/eight.bin")
    pulling = client.pull("/sdcard/eight.bin")
    assert await anext(pulling)
    await pulling.aclose()
    assert (await client.shell("echo on", timeout_s=5)).stdout == b"on\n"
    assert client._connection._streams == {}


async def test_a_screen_is_a_whole_picture_or_an_error(client: AdbClient, phone: SmallPhone) -> None:
    assert await client.screencap(timeout_s=5) == PICTURE
    for cut in (PICTURE[:-20], b"", b"screencap: no display\n"):
        phone.shell.picture = cut
        with pytest.raises(AdbGarbled, match="whole picture"):
            await client.screencap(timeout_s=5)


async def test_an_apk_is_streamed_into_the_package_manager(client: AdbClient, phone: SmallPhone) -> None:
    apk = os.urandom(5 * MB)
    await client.install(pieces(apk), len(apk), flags=("-r", "-g"), timeout_s=10)
    assert phone.shell.installed == [apk]


async def test_a_refused_apk_gives_androids_code_and_stops_the_upload(client: AdbClient) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        while True:
            sent += MB
            yield bytes(MB)

    with pytest.raises(InstallRefused, match="needs more") as refusal:
        await client.install(endless(), 1 << 40, flags=("--refuse",), timeout_s=10)
    assert refusal.value.code == "INSTALL_FAILED_OLDER_SDK"
    assert sent < 20 * MB


async def test_an_apk_of_another_length_is_an_error_and_installs_nothing(
    client: AdbClient, phone: SmallPhone
) -> None:
    for promised in (999, 1001):
        with pytest.raises(AdbFault, match=f"not {promised} bytes"):
            await client.install(pieces(bytes(1000)), promised, timeout_s=5)
    await eventually(lambda: not any(phone.shell.running.values()))
    assert phone.shell.installed == []


async def test_when_the_phone_dies_everything_on_it_fails_at_once(client: AdbClient, adbd: Adbd) -> None:
    running = asyncio.create_task(client.shell("sleep", timeout_s=30))
    pulling = client.pull("/system/build.prop")
    stream = await client.open("exec:drip")
    await adbd.close()
    with pytest.raises(AdbUnreachable):
        await running
    with pytest.raises(AdbUnreachable):
        while await stream.read():
            pass
    with pytest.raises(AdbUnreachable):
        await anext(pulling)
    await asyncio.wait_for(client.wait_closed(), 5)
    assert client.closed
    with pytest.raises(AdbUnreachable):
        await client.shell("echo", timeout_s=5)
    with pytest.raises(AdbUnreachable):
        await AdbClient.connect("127.0.0.1", adbd.port)


async def test_when_the_client_goes_its_commands_end(adbd: Adbd, phone: SmallPhone) -> None:
    client = await AdbClient.connect("127.0.0.1", adbd.port)
    running = [asyncio.create_task(client.shell("sleep", timeout_s=30)) for _ in range(5)]
    await eventually(lambda: phone.shell.running["sleep"] == 5)
    await client.close()
    results = await asyncio.gather(*running, return_exceptions=True)
    assert all(isinstance(result, AdbUnreachable) for result in results)
    await eventually(lambda: phone.shell.cancelled["sleep"] == 5)


async def test_input_sent_by_a_host_that_leaves_is_still_used(client: AdbClient, phone: SmallPhone) -> None:
    stream = await client.open("exec:keep")
    await stream.write(b"first, ")
    await stream.write(b"second")
    stream.close()
    await eventually(lambda: phone.shell.received == b"first, second.")


async def test_a_shell_without_a_command_talks_line_by_line(client: AdbClient) -> None:
    async with await client.open("shell:") as typed:
        await typed.write(b"echo hi\n")
        assert await typed.read_exactly(len(b"echo hi\nhi\n")) == b"echo hi\nhi\n"
        await typed.write(b"exit\n")
        assert await typed.read_exactly(5) == b"exit\n"
        assert await typed.read() == b""


async def test_a_phone_is_no_way_into_the_host(client: AdbClient, adbd: Adbd) -> None:
    for service in (
        f"tcp:{adbd.port}",
        f"tcp:{adbd.port}:127.0.0.1",
        "local:/var/run/docker.sock",
        "localfilesystem:/var/run/docker.sock",
        "localreserved:x",
        "dev:/dev/mem",
        "jdwp:1",
        "abb_exec:package",
        "",
    ):
        with pytest.raises(AdbRefused):
            await client.open(service)


async def test_the_phones_own_sockets_are_reached_by_name(client: AdbClient, adbd: Adbd) -> None:
    async def greet(stream: Stream) -> None:
        await stream.write(b"hello " + await stream.read())

    with pytest.raises(AdbRefused):
        await client.open("localabstract:scrcpy_1")
    adbd.listen("scrcpy_1", greet)
    with pytest.raises(ValueError, match="in use"):
        adbd.listen("scrcpy_1", greet)
    async with await client.open("localabstract:scrcpy_1") as stream:
        await stream.write(b"you")
        assert await stream.read() == b"hello you"
    adbd.unlisten("scrcpy_1")
    with pytest.raises(AdbRefused):
        await client.open("localabstract:scrcpy_1")


async def test_a_reversed_socket_leads_to_the_host_that_asked_for_it(adbd: Adbd) -> None:
    async def serve(stream: Stream) -> None:
        await stream.write(b"this is the host")

    def services(name: str) -> Service | None:
        return serve if name == "tcp:27183" else None

    client = await AdbClient.connect("127.0.0.1", adbd.port, services=services)
    with pytest.raises(AdbRefused):
        await adbd.dial("localabstract:scrcpy_2")
    async with await client.open("reverse:forward:localabstract:scrcpy_2;tcp:27183") as stream:
        assert await stream.read_exactly(4) == b"OKAY"
    async with await adbd.dial("localabstract:scrcpy_2") as stream:
        assert await stream.read() == b"this is the host"
    async with await client.open("reverse:forward:nonsense") as stream:
        assert (await stream.read_exactly(4), await stream.read_exactly(4)) == (b"FAIL", b"001d")
    await client.close()
    await eventually(lambda: not adbd._peers)
    with pytest.raises(AdbRefused):
        await adbd.dial("localabstract:scrcpy_2")


async def test_a_restart_hangs_up_and_tells_the_phone(phone: SmallPhone) -> None:
    asked: list[str] = []
    adbd = Adbd(phone.as_phone(), on_reboot=asked.append)
    await adbd.serve("127.0.0.1", 0)
    client = await AdbClient.connect("127.0.0.1", adbd.port)
    await client.open("reboot:recovery")
    await asyncio.wait_for(client.wait_closed(), 5)
    assert asked == ["recovery"]
    async with await AdbClient.connect("127.0.0.1", adbd.port) as again:
        assert (await again.shell("echo back", timeout_s=5)).stdout == b"back\n"
    await adbd.close()


async def test_only_so_many_connections_are_taken(adbd: Adbd) -> None:
    silent = [await asyncio.open_connection("127.0.0.1", adbd.port) for _ in range(CONNECTIONS_MAX)]
    await eventually(lambda: len(adbd._peers) == CONNECTIONS_MAX)
    with pytest.raises(AdbUnreachable):
        await AdbClient.connect("127.0.0.1", adbd.port)
    silent[0][1].transport.abort()
    await eventually(lambda: len(adbd._peers) == CONNECTIONS_MAX - 1)
    async with await AdbClient.connect("127.0.0.1", adbd.port) as client:
        assert (await client.shell("echo in", timeout_s=5)).stdout == b"in\n"
    for _, writer in silent:
        writer.transport.abort()


@pytest.mark.parametrize(
    ("request_bytes", "reason"),
    [
        (b"WHAT\x00\x00\x00\x00", b"unknown command WHAT"),
        (b"STAT\xff\xff\xff\xff", b"path too long"),
        (b"SEND\x06\x00\x00\x00/x,abc", b"bad mode"),
        (b"SEND\x0c\x00\x00\x00/sdcard/x,33DATA\xff\xff\xff\xff", b"oversize data message"),
        (b"SEND\x0c\x00\x00\x00/sdcard/x,33NOPE\x00\x00\x00\x00", b"invalid data message"),
        (b"RCV2\x01\x00\x00\x00/RCV2\x01\x00\x00\x00", b"compression is not supported"),
    ],
)
async def test_a_garbled_file_request_is_answered_and_ends_the_session(
    client: AdbClient, request_bytes: bytes, reason: bytes
) -> None:
    async with await client.open("sync:") as stream:
        await stream.write(request_bytes)
        answer = b""
        while piece := await stream.read():
            answer += piece
    assert answer == b"FAIL" + len(reason).to_bytes(4, "little") + reason


async def test_one_session_answers_many_file_requests_old_and_new(client: AdbClient) -> None:
    await client.push(pieces(b"content"), "/sdcard/one.txt", mtime=5)
    async with await client.open("sync:") as stream:
        await stream.write(b"STAT\x0f\x00\x00\x00/sdcard/one.txtSTAT\x05\x00\x00\x00/none")
        assert await stream.read_exactly(16) == b"STAT" + b"\xb6\x81\0\0" + b"\7\0\0\0" + b"\5\0\0\0"
        assert await stream.read_exactly(16) == b"STAT" + bytes(12)
        # A link is told as itself by the requests that are lstat.
        await stream.write(b"LST2\x07\x00\x00\x00/sdcard")
        record = await stream.read_exactly(72)
        assert int.from_bytes(record[24:28], "little") & 0o170000 == 0o120000
        await stream.write(b"LIST\x0a\x00\x00\x00/data/user")
        names = await stream.read_exactly(20 + 1 + 20)
        assert names[:4] == b"DENT" and names[20:] == b"0DONE" + bytes(16)
        await stream.write(b"SND2\x0f\x00\x00\x00/sdcard/two.txtSND2\xa4\x81\x00\x00\x00\x00\x00\x00")
        await stream.write(b"DATA\x03\x00\x00\x00twoDONE\x09\x00\x00\x00")
        assert await stream.read_exactly(8) == b"OKAY" + bytes(4)
        await stream.write(b"RCV2\x0f\x00\x00\x00/sdcard/two.txtRCV2\x00\x00\x00\x00QUIT\x00\x00\x00\x00")
        assert await stream.read_exactly(19) == b"DATA\3\0\0\0two" + b"DONE" + bytes(4)
        assert await stream.read() == b""
