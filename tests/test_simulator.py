"""The simulated phone's package manager, and its process as a whole."""

import asyncio
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.apks import build_apk, truncated
from tests.realadb import RealAdb
from tests.simulated_phone import PHONE_ID, TestPhone, Typist, open_phone

ROOT = Path(__file__).resolve().parent.parent
APK = build_apk("org.example.shop", "Corner Shop", version_name="2.1", version_code=21)


@pytest.fixture
async def phone(tmp_path: Path) -> TestPhone:
    return await open_phone(tmp_path / "phone")


async def test_an_app_is_installed_described_and_removed(phone: TestPhone) -> None:
    apk = build_apk(
        "org.example.shop",
        "Corner Shop",
        version_name="2.1",
        version_code=21,
        permissions=["android.permission.CAMERA", "android.permission.INTERNET"],
        abis=["arm64-v8a"],
    )
    said = await phone.install(apk, "-r -g")
    assert (said.code, said.out, said.err) == (0, "Success\n", "")
    assert (await phone.sh("pm list packages -3 --show-versioncode")).out == (
        "package:org.example.shop versionCode:21\n"
    )
    assert (await phone.sh("pm list packages shop")).out == "package:org.example.shop\n"
    assert "package:com.android.settings\n" in (await phone.sh("pm list packages -s")).out
    path = (await phone.sh("pm path org.example.shop")).out.removeprefix("package:").strip()
    assert (await phone.sh(f"wc -c {path}")).out == f"{len(apk)} {path}\n"
    assert (await phone.sh("pm list packages -f shop")).out == f"package:{path}=org.example.shop\n"
    described = (await phone.sh("dumpsys package org.example.shop")).out
    assert "    versionCode=21 minSdk=21 targetSdk=33\n    versionName=2.1\n" in described
    assert "primaryCpuAbi=arm64-v8a" in described
    assert "android.permission.CAMERA: granted=true" in described
    await phone.sh("pm revoke org.example.shop android.permission.CAMERA")
    assert "CAMERA: granted=false" in (await phone.sh("cmd package dump org.example.shop")).out
    assert (await phone.sh("cmd package resolve-activity --brief org.example.shop")).out.endswith(
        "\norg.example.shop/.MainActivity\n"
    )
    removed = await phone.sh("cmd package uninstall org.example.shop")
    assert (removed.code, removed.out) == (0, "Success\n")
    assert (await phone.sh("pm path org.example.shop")).code == 1
    assert (await phone.sh("ls /data/app /data/data")).out == "/data/app:\n\n/data/data:\n"


async def test_an_app_is_installed_from_a_file_of_the_phone(phone: TestPhone) -> None:
    await phone.sh("cat > /data/local/tmp/x.apk", APK)
    assert (await phone.sh("pm install /data/local/tmp/x.apk")).out == "Success\n"
    missing = await phone.sh("pm install /data/local/tmp/y.apk")
    assert missing.code == 1
    assert missing.err.startswith("Error: Unable to open file: /data/local/tmp/y.apk\n")


@pytest.mark.parametrize(
    ("apk", "options", "refusal"),
    [
        (b"no apk at all", "-r", "INSTALL_PARSE_FAILED_NOT_APK"),
        (truncated(), "-r", "INSTALL_PARSE_FAILED_NOT_APK"),
        (build_apk(min_sdk=34), "-r", "INSTALL_FAILED_OLDER_SDK: Requires newer sdk version #34 (current"),
        (build_apk(abis=["riscv64"]), "-r", "INSTALL_FAILED_NO_MATCHING_ABIS"),
        (build_apk("org.example.shop", version_code=20), "-r", "INSTALL_FAILED_VERSION_DOWNGRADE"),
        (APK, "", "INSTALL_FAILED_ALREADY_EXISTS"),
        (build_apk(split="config.fr"), "-r", "INSTALL_FAILED_MISSING_SPLIT"),
        (build_apk("com.android.settings"), "-r", "INSTALL_FAILED_UPDATE_INCOMPATIBLE"),
    ],
)  # fmt: skip
async def test_a_refusal_says_what_android_says_and_leaves_nothing(
    phone: TestPhone, apk: bytes, options: str, refusal: str
) -> None:
    await phone.install(APK)
    before = (await phone.sh("pm list packages -f; ls /data/app")).out
    said = await phone.install(apk, options)
    assert said.code == 1
    assert said.out.startswith(f"Failure [{refusal}")
    assert (await phone.sh("pm list packages -f; ls /data/app")).out == before


async def test_an_update_keeps_the_app_and_takes_its_new_face(phone: TestPhone) -> None:
    await phone.install(APK)
    await phone.sh("echo kept > /data/data/org.example.shop/notes")
    assert (await phone.install(build_apk("org.example.shop", "Big Shop", version_code=22))).code == 0
    assert (await phone.sh("cat /data/data/org.example.shop/notes; ls /data/app | wc -l")).out == "kept\n1\n"
    assert [package.label for package in phone.packages.shown()] == ["Big Shop"]
    assert (await phone.install(APK, "-r -d")).code == 0
    assert (await phone.sh("pm clear org.example.shop; ls /data/data/org.example.shop")).out == "Success\n"


async def test_a_stream_that_is_cut_leaves_nothing(phone: TestPhone) -> None:
    said = await phone.sh(f"cmd package install -r -S {len(APK)}", APK[:-100])
    assert said.code == 1
    assert said.out.startswith("Failure [INSTALL_FAILED_INVALID_APK")
    waiting = Typist(APK[:1000], stays=True)
    running = asyncio.create_task(phone.shell.run(f"cmd package install -S {len(APK)}", waiting))
    await asyncio.sleep(0.1)
    running.cancel()
    await asyncio.wait({running})
    assert (await phone.sh("ls /data/app")).out == ""
    assert (await phone.sh("pm list packages -3")).out == ""


async def test_a_full_disk_is_a_refusal(phone: TestPhone) -> None:
    phone.files._reserve_bytes = 1 << 60
    said = await phone.install(APK)
    assert said.out == f"Failure [INSTALL_FAILED_INSUFFICIENT_STORAGE: Failed to allocate {len(APK)} bytes]\n"


async def test_splits_are_installed_as_one(phone: TestPhone) -> None:
    split = build_apk("org.example.shop", split="config.fr", version_code=21)
    created = (await phone.sh(f"pm install-create -r -S {len(APK) + len(split)}")).out
    number = created.removeprefix("Success: created install session [").removesuffix("]\n")
    for name, content in (("config.apk", split), ("base.apk", APK)):
        written = await phone.sh(f"pm install-write -S {len(content)} {number} {name} -", content)
        assert written.out == f"Success: streamed {len(content)} bytes\n"
    assert (await phone.sh(f"pm install-commit {number}")).out == "Success\n"
    paths = (await phone.sh("pm path org.example.shop")).out.splitlines()
    assert [path.rpartition("/")[2] for path in paths] == ["base.apk", "config.apk"]
    assert (await phone.sh(f"pm install-commit {number}")).code == 255
    abandoned = (await phone.sh("pm install-create")).out.partition("[")[2].partition("]")[0]
    assert (await phone.sh(f"pm install-abandon {abandoned}; ls /data/app | wc -l")).out == "Success\n1\n"


@pytest.mark.parametrize("name", ["no.such.app", "com.android.settings"])
async def test_what_is_not_installed_cannot_be_removed(phone: TestPhone, name: str) -> None:
    said = await phone.sh(f"pm uninstall {name}")
    assert (said.code, said.out) == (1, "Failure [DELETE_FAILED_INTERNAL_ERROR]\n")


async def test_apps_and_their_icons_survive_a_restart(tmp_path: Path) -> None:
    first = await open_phone(tmp_path)
    await first.install(APK)
    icon = first.packages.icon("org.example.shop")
    (tmp_path / "files/tree/data/app/vmdl7.tmp").mkdir()
    second = await open_phone(tmp_path)
    assert second.packages.get("org.example.shop") == first.packages.get("org.example.shop")
    assert icon is not None
    assert second.packages.icon("org.example.shop") == icon
    assert (await second.sh("ls /data/app | wc -l")).out == "1\n"


async def test_an_app_is_started_seen_and_stopped(phone: TestPhone) -> None:
    await phone.install(APK)
    started = await phone.sh("am start -n org.example.shop/.MainActivity")
    assert started.out == "Starting: Intent { cmp=org.example.shop/.MainActivity }\n"
    assert (
        "mCurrentFocus=Window{5f1a0c2 u0 org.example.shop/.MainActivity}"
        in (await phone.sh("dumpsys window")).out
    )
    assert "mResumedActivity" in (await phone.sh("dumpsys activity activities | grep shop")).out
    assert "Displayed org.example.shop/.MainActivity" in (await phone.sh("logcat -d")).out
    assert (await phone.sh("pidof org.example.shop")).code == 0
    again = await phone.sh("am start -a android.intent.action.MAIN -p org.example.shop")
    assert again.err.startswith("Warning: Activity not started, intent has been delivered")
    await phone.sh("am force-stop org.example.shop")
    assert (await phone.sh("pidof org.example.shop")).code == 1
    monkey = await phone.sh("monkey -p org.example.shop -c android.intent.category.LAUNCHER 1")
    assert monkey.out.splitlines()[-2] == "Events injected: 1"
    assert phone.activities.component == "org.example.shop/.MainActivity"
    await phone.sh("am start -a android.intent.action.MAIN -c android.intent.category.HOME")
    assert phone.activities.front is None


async def test_what_cannot_be_started_says_so(phone: TestPhone) -> None:
    said = await phone.sh("am start -n no.such/.App")
    assert (said.code, said.err) == (
        1,
        "Error type 3\nError: Activity class {no.such/no.such.App} does not exist.\n",
    )
    said = await phone.sh("monkey -p no.such -c android.intent.category.LAUNCHER 1")
    assert (said.code, said.err) == (252, "** No activities found to run, monkey aborted.\n")


class Process:
    """The phone as a program."""

    def __init__(self, directory: Path, port: int, process: asyncio.subprocess.Process) -> None:
        self.directory = directory
        self.port = port
        self.process = process

    @property
    def resident_kb(self) -> int:
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmRSS"))

    @property
    def cpu_s(self) -> float:
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


async def spawn(directory: Path, port: int) -> asyncio.subprocess.Process:
    return await asyncio.create_subprocess_exec(
        *(sys.executable, "-m", "phones.simulator", f"--data-dir={directory}", "--host=127.0.0.1"),
        *(f"--adb-port={port}", f"--id={PHONE_ID}", "--name=A phone", "--android-version=12"),
        cwd=ROOT,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
    )


@asynccontextmanager
async def started(directory: Path) -> AsyncIterator[Process]:
    """A phone that is ready; ended at the end."""
    port = free_port()
    process = await spawn(directory, port)
    try:
        async with asyncio.timeout(20):
            while not (directory / "phone.json").exists():
                assert process.returncode is None, (await process.communicate())[1]
                await asyncio.sleep(0.01)
        yield Process(directory, port, process)
    finally:
        if process.returncode is None:
            process.terminate()
        await asyncio.wait_for(process.wait(), 10)


async def test_the_program_announces_itself_and_ends_cleanly(tmp_path: Path) -> None:
    before = time.monotonic()
    async with started(tmp_path / "phone") as phone:
        assert time.monotonic() - before < 3
        announced = json.loads((tmp_path / "phone/phone.json").read_text())
        assert announced["pid"] == phone.process.pid
        assert announced["id"] == PHONE_ID
        assert announced["ports"]["adb"] == phone.port
        assert os.getsid(phone.process.pid) == phone.process.pid
        before = time.monotonic()
        phone.process.send_signal(signal.SIGTERM)
        assert await phone.process.wait() == 0
        assert time.monotonic() - before < 1
        assert await phone.process.communicate() == (b"", b"")
    assert not (tmp_path / "phone/phone.json").exists()


async def test_a_second_program_on_the_port_or_the_directory_fails_in_one_line(tmp_path: Path) -> None:
    async with started(tmp_path / "phone") as phone:
        for directory, port, reason in (
            (
                tmp_path / "other",
                phone.port,
                b"cannot listen on 127.0.0.1:%d: Address" % phone.port,
            ),
            (phone.directory, free_port(), b"is in use by another simulated phone"),
        ):
            second = await spawn(directory, port)
            _, err = await asyncio.wait_for(second.communicate(), 10)
            assert second.returncode == 1
            assert reason in err
            assert err.count(b"\n") == 1
        assert not (tmp_path / "other/phone.json").exists()
        assert (phone.directory / "phone.json").exists()


async def test_the_program_stays_small_and_still_and_keeps_its_apps(
    tmp_path: Path, real_adb: RealAdb
) -> None:
    apk = tmp_path / "shop.apk"
    apk.write_bytes(APK)
    async with started(tmp_path / "phone") as phone:
        serial = await real_adb.connect(phone.port)
        assert (await real_adb.run("-s", serial, "install", str(apk)))[0] == 0
        for _ in range(5):
            _, picture, _ = await real_adb.run("-s", serial, "exec-out", "screencap", "-p")
            assert picture.startswith(b"\x89PNG")
            await real_adb.run(
                "-s", serial, "shell", "input tap 300 400; input tap 360 1240; input tap 100 400"
            )
        assert phone.resident_kb < 60_000
        used = phone.cpu_s
        await asyncio.sleep(1)
        assert phone.cpu_s - used < 0.05
    async with started(tmp_path / "phone") as phone:
        serial = await real_adb.connect(phone.port)
        code, out, _ = await real_adb.run("-s", serial, "shell", "pm list packages -3; exit 7")
        assert (code, out) == (7, b"package:org.example.shop\n")


async def test_a_broken_state_file_is_told_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "state.json").write_text("{")
    process = await spawn(tmp_path, free_port())
    _, err = await asyncio.wait_for(process.communicate(), 10)
    assert process.returncode == 1
    assert err.count(b"\n") == 1
    assert b"state.json" in err
