"""The genuine adb program against the simulated phone's adbd."""

import hashlib
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from phones.simulator.adbd import Adbd
from tests.realadb import RealAdb
from tests.smallphone import PICTURE, SmallPhone


@pytest.fixture
async def phone(tmp_path: Path) -> SmallPhone:
    phone = SmallPhone(tmp_path / "phone")
    await phone.files.prepare()
    return phone


@pytest.fixture
async def adbd(phone: SmallPhone) -> AsyncIterator[Adbd]:
    adbd = Adbd(phone.as_phone())
    await adbd.serve("127.0.0.1", 0)
    yield adbd
    await adbd.close()


async def test_the_real_adb_runs_commands_and_moves_files(
    adbd: Adbd, phone: SmallPhone, tmp_path: Path
) -> None:
    local = tmp_path / "local"
    (local / "deep").mkdir(parents=True)
    content = os.urandom(3_000_000)
    (local / "big.bin").write_bytes(content)
    (local / "deep" / "small.txt").write_bytes(b"small")

    async with RealAdb.started(tmp_path) as adb:
        serial = await adb.connect(adbd.port)

        async def on_phone(*args: str, stdin: bytes = b"") -> tuple[int, bytes, bytes]:
            return await adb.run("-s", serial, *args, stdin=stdin)

        _, listed, _ = await adb.run("devices", "-l")
        assert b"device product:small model:Small__Phone_1 device:small_device" in listed
        assert await on_phone("shell", "echo", "hello") == (0, b"hello\n", b"")
        assert await on_phone("shell", "exit 7") == (7, b"", b"")
        assert await on_phone("shell", "nonsense") == (127, b"", b"sh: nonsense: not found\n")
        assert await on_phone("shell", "cat", stdin=content) == (0, content, b"")
        assert await on_phone("shell", stdin=b"echo one\nexit 3\n") == (3, b"one\n", b"")
        assert await on_phone("shell", "-tt", "echo typed") == (0, b"typed\r\n", b"")
        assert (await on_phone("shell", "-x", "echo old"))[:2] == (0, b"old\n")
        assert await on_phone("exec-out", "screencap", "-p") == (0, PICTURE, b"")

        code, out, err = await on_phone("push", str(local / "big.bin"), "/sdcard/new/folder/big.bin")
        assert code == 0 and b"1 file pushed" in out + err
        stored = await phone.files.stat("/sdcard/new/folder/big.bin")
        assert stored.size_bytes == len(content)
        assert stored.modified_at == int((local / "big.bin").stat().st_mtime)
        assert stored.mode & 0o777 == 0o666
        code, out, err = await on_phone("push", str(local), "/sdcard/tree")
        assert code == 0 and b"2 files pushed" in out + err
        code, out, err = await on_phone("pull", "/sdcard/tree", str(tmp_path / "back"))
        assert code == 0 and b"2 files pulled" in out + err
        pulled = (tmp_path / "back" / "big.bin").read_bytes()
        assert hashlib.sha256(pulled).digest() == hashlib.sha256(content).digest()
        assert (tmp_path / "back" / "deep" / "small.txt").read_bytes() == b"small"

        code, out, _ = await on_phone("ls", "/sdcard/tree")
        assert code == 0 and [line.split()[-1] for line in out.splitlines()] == [b"big.bin", b"deep"]
        code, out, err = await on_phone("push", str(local / "big.bin"), "/system/big.bin")
        assert code == 1 and b"couldn't create file: Read-only file system" in out + err
        code, out, err = await on_phone("pull", "/sdcard/none", str(tmp_path / "none"))
        assert code == 1 and (b"No such file" in err or b"does not exist" in err)


async def test_the_real_adb_installs_reverses_and_reboots(
    adbd: Adbd, phone: SmallPhone, tmp_path: Path
) -> None:
    apk = os.urandom(2_500_000)
    (tmp_path / "app.apk").write_bytes(apk)
    async with RealAdb.started(tmp_path) as adb:
        serial = await adb.connect(adbd.port)

        async def on_phone(*args: str) -> tuple[int, bytes, bytes]:
            return await adb.run("-s", serial, *args)

        code, out, err = await on_phone("install", "-r", str(tmp_path / "app.apk"))
        assert (code, out[-8:]) == (0, b"Success\n"), err
        assert phone.shell.installed == [apk]

        assert (await on_phone("reverse", "localabstract:scrcpy_1", "tcp:27183"))[0] == 0
        code, port, _ = await on_phone("reverse", "tcp:0", "tcp:27184")
        assert (code, port) == (0, b"40000\n")
        code, _, err = await on_phone("reverse", "--no-rebind", "tcp:40000", "tcp:1")
        assert code == 1 and b"cannot rebind existing socket" in err
        _, listed, _ = await on_phone("reverse", "--list")
        assert listed.split() == (
            b"host-1 localabstract:scrcpy_1 tcp:27183 host-1 tcp:40000 tcp:27184".split()
        )
        assert (await on_phone("reverse", "--remove", "tcp:40000"))[0] == 0
        code, _, err = await on_phone("reverse", "--remove", "tcp:40000")
        assert code == 1 and b"listener 'tcp:40000' not found" in err
        assert (await on_phone("reverse", "--remove-all"))[0] == 0
        assert (await on_phone("reverse", "--list"))[1].strip() == b""

        assert b"cannot run as root" in (await on_phone("root"))[1]
        assert (await on_phone("reboot"))[0] == 0
        # adb comes back by itself; a phone that is not there any more would never answer this.
        assert (await on_phone("wait-for-device", "shell", "echo back"))[:2] == (0, b"back\n")
