"""What an APK says about itself, and what is refused."""

import asyncio
import io
import os
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from phones import apk
from phones.apk import ApkFacts, InvalidApk, inspect
from tests import apks


async def facts_of(content: bytes, tmp_path: Path, *, deadline_s: float = 10.0) -> ApkFacts:
    path = tmp_path / "some.apk"
    await asyncio.to_thread(path.write_bytes, content)
    return await inspect(path, deadline_s=deadline_s)


async def refusal_of(content: bytes, tmp_path: Path) -> str:
    with pytest.raises(InvalidApk) as refusal:
        await facts_of(content, tmp_path)
    return str(refusal.value)


def picture(png: bytes | None) -> Image.Image:
    assert png is not None
    image = Image.open(io.BytesIO(png))
    assert image.format == "PNG"
    return image.convert("RGB")


@pytest.mark.parametrize("by_reference", [False, True])
async def test_an_apk_is_read_whole(tmp_path: Path, by_reference: bool) -> None:
    content = apks.build_apk(
        package="org.example.maps",
        label="Maps 地图 ✓",
        version_name="2.5.1",
        version_code=251,
        min_sdk=23,
        target_sdk=34,
        permissions=["android.permission.INTERNET", "android.permission.CAMERA", "android.permission.CAMERA"],
        abis=["x86_64", "arm64-v8a"],
        icon_rgb=(200, 30, 40),
        by_reference=by_reference,
    )
    facts = await facts_of(content, tmp_path)
    assert facts == ApkFacts(
        package="org.example.maps",
        label="Maps 地图 ✓",
        version_name="2.5.1",
        version_code=251,
        min_sdk=23,
        target_sdk=34,
        permissions=("android.permission.CAMERA", "android.permission.INTERNET"),
        abis=("arm64-v8a", "x86_64"),
        launcher_activity="org.example.maps.MainActivity",
        split=None,
        icon_png=facts.icon_png,
    )
    icon = picture(facts.icon_png)
    assert icon.size == (96, 96)
    assert icon.getpixel((48, 48)) == (200, 30, 40)


async def test_what_is_not_there_is_none(tmp_path: Path) -> None:
    facts = await facts_of(
        apks.build_apk(
            version_name=None, min_sdk=None, target_sdk=None, icon_rgb=None, activity=None, label=""
        ),
        tmp_path,
    )
    assert facts.label == "com.example.app"
    assert (facts.version_name, facts.min_sdk, facts.target_sdk) == (None, None, None)
    assert (facts.permissions, facts.abis) == ((), ())
    assert (facts.launcher_activity, facts.split, facts.icon_png) == (None, None, None)


async def test_a_split_says_which_part_it_is(tmp_path: Path) -> None:
    assert (await facts_of(apks.build_apk(split="config.x86_64"), tmp_path)).split == "config.x86_64"


@pytest.mark.parametrize(
    ("written", "level"), [("VanillaIceCream", 35), ("Tiramisu.fp1a2b", 33), ("Nonesuch", None), ("24", 24)]
)
async def test_codenames_become_api_levels(tmp_path: Path, written: str, level: int | None) -> None:
    assert (await facts_of(apks.build_apk(min_sdk=written), tmp_path)).min_sdk == level


@pytest.mark.parametrize(
    ("written", "full"),
    [("Main", "com.example.app.Main"), (".ui.Main$Inner", "com.example.app.ui.Main$Inner"), ("a b;c", None)],
)
async def test_the_launcher_activity_has_its_full_name(
    tmp_path: Path, written: str, full: str | None
) -> None:
    assert (await facts_of(apks.build_apk(activity=written), tmp_path)).launcher_activity == full


async def test_hostile_strings_come_out_harmless(tmp_path: Path) -> None:
    facts = await facts_of(
        apks.build_apk(
            label="  a\nb\u202egpj.\u2066exe\x1b[31m" + "x" * 3000,
            version_name="1\r\n0",
            permissions=["good.NAME", "bad name", "$(id)", "<b>"],
        ),
        tmp_path,
    )
    assert facts.label.startswith("a bgpj.exe")
    assert "\x1b" not in facts.label
    assert len(facts.label) == apk.MAX_TEXT
    assert facts.version_name == "1 0"
    assert facts.permissions == ("good.NAME",)


@pytest.mark.parametrize("package", ["", "app", "a b.c", "com.example;rm", "../x.y", "com." + "x" * 300])
async def test_a_package_name_android_would_refuse_is_refused(tmp_path: Path, package: str) -> None:
    assert "no valid package" in await refusal_of(apks.build_apk(package=package), tmp_path)


async def test_a_webp_icon_becomes_a_small_png(tmp_path: Path) -> None:
    facts = await facts_of(apks.build_apk(icon=apks.draw_icon(500, (0, 90, 200), "WEBP")), tmp_path)
    icon = picture(facts.icon_png)
    assert icon.size == (192, 192)


@pytest.mark.parametrize(
    "icon",
    [
        pytest.param(b"no bitmap", id="no bitmap"),
        pytest.param(apks.draw_icon(64, (1, 2, 3))[:60], id="cut off"),
        pytest.param(apks.draw_icon(5000, (0, 0, 0)), id="25 million pixels"),
        pytest.param(apks.draw_icon(64, (1, 2, 3), "GIF"), id="another format"),
    ],
)
async def test_a_bad_icon_does_not_lose_the_rest(tmp_path: Path, icon: bytes) -> None:
    facts = await facts_of(apks.build_apk(icon=icon), tmp_path)
    assert facts.icon_png is None
    assert (facts.package, facts.label) == ("com.example.app", "Example")


async def test_broken_resources_do_not_lose_the_manifest(tmp_path: Path) -> None:
    whole = apks.build_apk(by_reference=True, version_code=7)
    members = apks.unpack(whole)
    members["resources.arsc"] = members["resources.arsc"][:200]
    facts = await facts_of(apks.build_zip(members), tmp_path)
    assert (facts.package, facts.version_code, facts.label) == ("com.example.app", 7, "com.example.app")
    assert facts.version_name is None


@pytest.mark.parametrize(
    ("build", "reason"),
    [
        (lambda: b"", "no zip directory"),
        (lambda: b"hello " * 1000, "no zip directory"),
        (apks.truncated, "cut off"),
        (lambda: apks.build_zip({"hello.txt": b"x"}), "no AndroidManifest.xml"),
        (lambda: apks.build_zip({"manifest.json": b"{}", "base.apk": b"x"}), "bundle of several APKs"),
        (lambda: apks.build_zip({"AndroidManifest.xml": b"<manifest/>"}), "cannot be read"),
        (lambda: apks.build_zip({"AndroidManifest.xml": os.urandom(5000)}), "cannot be read"),
        (apks.encrypted, "encrypted"),
        (apks.doubled_manifest, "more than once"),
        (apks.lying_sizes, "cannot be unpacked"),
        (apks.many_entries, "more than 20000 files"),
        (lambda: apks.many_entries(20_001), "more than 20000 files"),
        (lambda: apks.with_member("../../escape"), "lead out of it"),
        (lambda: apks.with_member("/etc/passwd"), "lead out of it"),
        (lambda: apks.with_member("a\\b"), "lead out of it"),
        (lambda: apks.with_member("link", b"/etc/passwd", mode=0o120777), "lead out of it"),
    ],
)
async def test_what_is_no_honest_apk_is_refused_with_the_reason(
    tmp_path: Path, build: Callable[[], bytes], reason: str
) -> None:
    assert reason in await refusal_of(build(), tmp_path)


async def test_a_bomb_is_refused_quickly(tmp_path: Path) -> None:
    bomb = await asyncio.to_thread(apks.manifest_bomb, 1 << 28)
    began = time.monotonic()
    assert "too large" in await refusal_of(bomb, tmp_path)
    assert time.monotonic() - began < 5


async def test_a_manifest_nested_without_end_is_refused_quickly(tmp_path: Path) -> None:
    deep: apks.Element = ("manifest", {"package": "com.example.app"}, [])
    for _ in range(200):
        deep = ("manifest", {"package": "com.example.app"}, [deep])
    began = time.monotonic()
    manifest = apks.build_axml(deep)
    assert "nested" in await refusal_of(apks.build_zip({"AndroidManifest.xml": manifest}), tmp_path)
    assert time.monotonic() - began < 5


async def test_references_that_run_in_circles_do_no_harm(tmp_path: Path) -> None:
    members = apks.unpack(apks.build_apk(by_reference=True))
    string = bytes([8, 0, 0, 3])  # a Res_value that is a string; 1 makes it a reference
    circle = members["resources.arsc"].replace(
        string + bytes([2, 0, 0, 0]), bytes([8, 0, 0, 1]) + bytes([0, 0, 2, 0x7F])
    )
    assert circle != members["resources.arsc"]
    members["resources.arsc"] = circle
    assert (await facts_of(apks.build_zip(members), tmp_path)).label == "com.example.app"


async def test_reading_ends_at_its_deadline_and_leaves_no_child(tmp_path: Path) -> None:
    slow = await asyncio.to_thread(apks.slow_resources)
    began = time.monotonic()
    with pytest.raises(InvalidApk, match="too long"):
        await facts_of(slow, tmp_path, deadline_s=0.4)
    assert time.monotonic() - began < 2
    assert await asyncio.to_thread(children_reading, tmp_path) == []


async def test_a_cancelled_reading_leaves_no_child(tmp_path: Path) -> None:
    slow = await asyncio.to_thread(apks.slow_resources)
    reading = asyncio.create_task(facts_of(slow, tmp_path))
    async with asyncio.timeout(10):
        while True:
            if await asyncio.to_thread(children_reading, tmp_path):
                break
            await asyncio.sleep(0)
    cancelled_at = time.monotonic()
    reading.cancel()
    with pytest.raises(asyncio.CancelledError):
        await reading
    assert time.monotonic() - cancelled_at < 2
    assert await asyncio.to_thread(children_reading, tmp_path) == []


async def test_at_most_two_children_run_at_once(tmp_path: Path) -> None:
    path = tmp_path / "some.apk"
    await asyncio.to_thread(path.write_bytes, apks.build_apk())
    most = 0
    async with asyncio.timeout(20), asyncio.TaskGroup() as group:
        readings = [group.create_task(inspect(path)) for _ in range(6)]
        while not all(reading.done() for reading in readings):
            most = max(most, len(await asyncio.to_thread(children_reading, tmp_path)))
            await asyncio.sleep(0.005)
    assert most == apk.CHILDREN_AT_ONCE


def children_reading(place: Path) -> list[str]:
    """The processes that were given a file in this directory."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdecimal():
            try:
                command = (entry / "cmdline").read_bytes().decode(errors="replace")
            except OSError:
                continue
            if "phones.apk" in command and str(place) in command:
                found.append(command)
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("hello-world", ("de.rhab.helloworld", "HelloWorld", "1.0", 1, 21, 25, True)),
        ("issue2836-webp-icon", ("com.ibotpeaches.issue2836", "Issue 2836", "1.0", 1, 33, 33, True)),
        ("native-libs-7-abis", ("org.dyndns.fules.ck", "Compass Keyboard", "v1.6pre2", 20, 7, 8, True)),
        ("politedroid-minsdk3", ("com.politedroid", "Polite Droid", "1.2", 3, 3, None, True)),
        (
            "small-xml-icon-only",
            ("io.github.skylot.android.smallapp", "Small App", "1.0", 1, 26, 33, False),
        ),
    ],
)
async def test_real_apks_are_read(name: str, expected: tuple[object, ...]) -> None:
    path = apks.SAMPLES / f"{name}.apk"
    if not await asyncio.to_thread(path.exists):
        return
    facts = await inspect(path)
    assert expected == (
        facts.package, facts.label, facts.version_name, facts.version_code, facts.min_sdk, facts.target_sdk,
        facts.icon_png is not None,
    )  # fmt: skip
