"""The simulated phone's screen: what is drawn, and what touches and keys do to it."""

import struct
from datetime import timedelta
from pathlib import Path

import pytest
from PIL import Image, ImageChops

from phones.simulator import fonts, keys, screen
from phones.simulator.activities import View
from phones.simulator.layout import Box, layout
from phones.simulator.packages import BROWSER_APP, NOTES_APP, SETTINGS_APP
from phones.simulator.painting import _icon
from phones.simulator.scene import Scene, Tile
from tests.apks import build_apk
from tests.simulated_phone import StoodStill, TestPhone, Typist, open_phone

PLAN = layout(720, 1280)
GREEN = (20, 200, 90)
APP = "org.example.shop"


@pytest.fixture
async def phone(tmp_path: Path) -> TestPhone:
    phone = await open_phone(tmp_path)
    await phone.install(build_apk(APP, "Corner Shop", icon_rgb=GREEN))
    return phone


def changed(before: Image.Image, after: Image.Image) -> Box | None:
    """Where two pictures differ."""
    found = ImageChops.difference(before, after).getbbox()
    return Box(*found) if found else None


def share_of(picture: Image.Image, box: Box, colour: tuple[int, int, int]) -> float:
    """How much of a place has a colour, or nearly."""
    part = picture.crop((box.left, box.top, box.right, box.bottom))
    far = ImageChops.difference(part, Image.new("RGB", part.size, colour))
    worst = ImageChops.lighter(ImageChops.lighter(far.getchannel(0), far.getchannel(1)), far.getchannel(2))
    return sum(worst.histogram()[:13]) / (part.width * part.height)


async def tap(phone: TestPhone, box: Box) -> None:
    x, y = box.middle
    assert (await phone.sh(f"input tap {x} {y}")).code == 0


def text_of(phone: TestPhone) -> str:
    assert phone.activities.front is not None
    return phone.activities.front.text


async def test_a_picture_has_the_screens_size_and_is_repeatable(phone: TestPhone) -> None:
    first, second = await phone.picture(), await phone.picture()
    assert first.size == (720, 1280)
    assert changed(first, second) is None
    raw = Typist()
    assert await phone.shell.run("screencap", raw) == 0
    assert struct.unpack_from("<4I", raw.out) == (720, 1280, 1, 1)
    assert Image.frombytes("RGBA", (720, 1280), raw.out[16:]).convert("RGB").tobytes() == first.tobytes()
    await phone.sh("screencap /sdcard/x.png")
    assert (await phone.sh("head -c 4 /sdcard/x.png | tail -c 3")).out == "PNG"


async def test_a_picture_is_drawn_again_only_when_something_has_changed(
    phone: TestPhone, monkeypatch: pytest.MonkeyPatch
) -> None:
    drawn: list[Scene] = []
    draw = screen._png

    def noted(scene: Scene) -> bytes:
        drawn.append(scene)
        return draw(scene)

    monkeypatch.setattr(screen, "_png", noted)
    await phone.picture()
    await phone.picture()
    assert len(drawn) == 1
    assert isinstance(phone.clock, StoodStill)
    phone.clock.time += timedelta(seconds=10)
    await phone.picture()
    assert len(drawn) == 1
    phone.clock.time += timedelta(minutes=1)
    await phone.picture()
    assert [scene.time for scene in drawn] == ["14:07", "14:08"]


async def test_the_home_screen_shows_the_installed_apps_icon(phone: TestPhone) -> None:
    with_app = await phone.picture()
    assert share_of(with_app, PLAN.cells[0], GREEN) > 0.2
    await phone.sh(f"pm uninstall {APP}")
    without = await phone.picture()
    assert share_of(without, PLAN.cells[0], GREEN) == 0
    where = changed(with_app, without)
    assert where is not None
    cell = PLAN.cells[0]
    assert cell.left <= where.left < where.right <= cell.right
    assert cell.top <= where.top < where.bottom <= cell.bottom


async def test_every_view_says_that_it_is_simulated(phone: TestPhone) -> None:
    pill = Box(PLAN.length(64), 0, PLAN.length(134), PLAN.status.bottom)
    amber = (255, 196, 61)
    for command in ("true", f"monkey -p {APP} 1", "input keyevent APP_SWITCH", f"monkey -p {SETTINGS_APP} 1"):
        await phone.sh(command)
        assert share_of(await phone.picture(), pill, amber) > 0.2, command
    await phone.sh("input keyevent POWER")
    dark = await phone.picture()
    assert changed(dark, Image.new("RGB", dark.size)) is not None


async def test_a_tap_on_the_icon_launches_the_app(phone: TestPhone) -> None:
    home = await phone.picture()
    await tap(phone, PLAN.cells[0])
    assert phone.activities.component == f"{APP}/.MainActivity"
    app = await phone.picture()
    assert changed(home, app) is not None
    assert share_of(app, PLAN.title, GREEN) > 0.02
    assert share_of(app, PLAN.counter, (43, 98, 214)) > 0.5


async def test_a_tap_on_the_button_is_counted_and_seen(phone: TestPhone) -> None:
    await phone.sh(f"monkey -p {APP} 1")
    before = await phone.picture()
    await tap(phone, PLAN.counter)
    where = changed(before, await phone.picture())
    assert where is not None
    assert PLAN.counter.holds(where.left, where.top)
    assert PLAN.counter.holds(where.right - 1, where.bottom - 1)
    assert phone.activities.front is not None
    assert phone.activities.front.taps == 1


async def test_typed_text_appears_in_the_field_that_was_tapped(phone: TestPhone) -> None:
    await phone.sh(f"monkey -p {APP} 1")
    empty = await phone.picture()
    await tap(phone, PLAN.field)
    focused = await phone.picture()
    assert changed(empty, focused) is not None
    await phone.sh("input text 'Hello%sworld'")
    assert text_of(phone) == "Hello world"
    where = changed(focused, await phone.picture())
    assert where is not None
    assert PLAN.field.holds(where.left, where.top)
    assert PLAN.field.holds(where.right - 1, where.bottom - 1)
    await phone.sh("input keyevent KEYCODE_DEL 67 KEYCODE_ENTER KEYCODE_A 7")
    assert text_of(phone) == "Hello wor\na0"
    await phone.sh("input text '谢谢 שלום مرحبا 🙂'")
    assert text_of(phone).endswith("谢谢 שלום مرحبا 🙂")
    await phone.picture()


async def test_a_touch_is_seen_where_it_was(phone: TestPhone) -> None:
    await phone.sh(f"monkey -p {APP} 1")
    before = await phone.picture()
    x, y = PLAN.canvas.middle
    await phone.sh(f"input swipe {x - 100} {y} {x + 100} {y + 50} 300")
    where = changed(before, await phone.picture())
    assert where is not None
    assert where.holds(x - 100, y)
    assert where.holds(x + 100, y + 50)
    assert where.width < 300
    await phone.sh(f"input motionevent DOWN {x} {y + 200}; input motionevent UP {x} {y + 200}")
    assert phone.activities.front is not None
    assert len(phone.activities.front.marks) == 2


async def test_the_navigation_bar_and_its_keys_agree(phone: TestPhone) -> None:
    for back in (PLAN.back, "BACK"):
        await phone.sh(f"monkey -p {APP} 1")
        await tap(phone, PLAN.field)
        await press(phone, back)
        assert phone.activities.front is not None
        assert not phone.activities.front.focused
        await press(phone, back)
        assert phone.activities.view is View.HOME
    for home in (PLAN.home, "KEYCODE_HOME", "3"):
        await phone.sh(f"monkey -p {APP} 1")
        await press(phone, home)
        assert phone.activities.view is View.HOME
    for recents in (PLAN.recents, "APP_SWITCH"):
        await press(phone, recents)
        seen = [phone.activities.view]
        await press(phone, recents)
        assert [*seen, phone.activities.view] == [View.RECENTS, View.HOME]


async def press(phone: TestPhone, what: Box | str) -> None:
    if isinstance(what, Box):
        await tap(phone, what)
    else:
        assert (await phone.sh(f"input keyevent {what}")).code == 0


async def test_recent_apps_come_back_and_are_cleared(phone: TestPhone) -> None:
    await phone.sh(f"monkey -p {APP} 1; input text kept; monkey -p {NOTES_APP} 1; input keyevent APP_SWITCH")
    assert share_of(await phone.picture(), PLAN.cards[1], GREEN) > 0.03
    await tap(phone, PLAN.cards[1])
    assert text_of(phone) == "kept"
    await phone.sh("input keyevent APP_SWITCH")
    await tap(phone, PLAN.clear_all)
    assert phone.activities.running() == []
    assert phone.activities.view is View.HOME


async def test_the_power_key_darkens_the_screen_and_wakes_it(phone: TestPhone) -> None:
    lit = await phone.picture()
    await phone.sh("input keyevent POWER")
    dark = await phone.picture()
    assert max(high for _, high in dark.getextrema()) < 80  # type: ignore[misc]  # pairs, as the picture has three bands
    await tap(phone, PLAN.cells[0])
    assert phone.activities.front is None
    assert (await phone.sh("dumpsys power | grep mWakefulness")).out == "  mWakefulness=Asleep\n"
    await phone.sh("input keyevent WAKEUP")
    assert changed(lit, await phone.picture()) is None


async def test_built_in_apps_open_from_the_dock(phone: TestPhone) -> None:
    for place, name in enumerate((SETTINGS_APP, NOTES_APP, BROWSER_APP)):
        home = await phone.picture()
        await tap(phone, PLAN.dock_cells[place])
        assert phone.activities.front is not None
        assert phone.activities.front.package.name == name
        assert changed(home, await phone.picture()) is not None
        await phone.sh("input keyevent HOME")
    await phone.sh(f"monkey -p {SETTINGS_APP} 1; input text nothing")
    assert text_of(phone) == ""


async def test_more_apps_than_fit_go_to_further_pages(phone: TestPhone) -> None:
    await phone.sh("wm size 400x500")
    plan = layout(400, 500)
    for number in range(len(plan.cells)):
        await phone.install(build_apk(f"org.example.n{number}", f"N{number}"))
        if len(phone.packages.shown()) > len(plan.cells):
            break
    first = await phone.picture()
    assert first.size == (400, 500)
    await phone.sh("input swipe 350 200 50 200")
    assert phone.screen.page == 1
    assert changed(first, await phone.picture()) is not None
    await tap(phone, plan.cells[0])
    assert phone.activities.front is not None
    assert phone.activities.front.package.name == f"org.example.n{len(plan.cells) - 1}"
    await phone.sh("input keyevent HOME; input swipe 50 200 350 200")
    assert changed(first, await phone.picture()) is None


@pytest.mark.parametrize("size", ["200x200", "200x1280", "1440x200", "1280x720", "1440x2560"])
async def test_every_size_can_be_drawn_in_every_view(phone: TestPhone, size: str) -> None:
    await phone.sh(f"wm size {size}")
    width, height = map(int, size.split("x"))
    for command in (
        "input keyevent HOME",
        f"monkey -p {APP} 1; input text some%stext",
        "input keyevent APP_SWITCH",
        f"monkey -p {NOTES_APP} 1",
        f"monkey -p {BROWSER_APP} 1",
        f"monkey -p {SETTINGS_APP} 1",
        "input keyevent POWER",
    ):
        await phone.sh(command)
        assert (await phone.picture()).size == (width, height)


async def test_touches_and_text_from_anywhere_do_no_harm(phone: TestPhone) -> None:
    await phone.sh("input tap -5 99999; input swipe 0 0 99999 99999; input text ''; input tap 1.5 2.5")
    for code in range(keys.LAST_CODE + 1):
        phone.screen.key(code)
    phone.screen.key(keys.WAKEUP)
    await phone.sh(f"monkey -p {APP} 1")
    for _ in range(30):
        await phone.sh(f"input text {'x' * 200}")
    assert len(text_of(phone)) == 2000
    await phone.picture()


def test_text_is_cut_and_wrapped_to_its_width() -> None:
    assert fonts.shortened("a very long label", 20, 80).endswith("…")
    assert fonts.width_of(fonts.shortened("a very long label", 20, 80), 20) <= 80
    lines = fonts.wrapped("one two three\nfour", 20, 70)
    assert " ".join(lines) == "one two three four"
    assert all(fonts.width_of(line, 20) <= 70 for line in lines)


def test_an_icon_that_is_no_picture_becomes_a_letter() -> None:
    letter = _icon(Tile("a.b", "Shop", None), 64)
    assert _icon(Tile("a.b", "Shop", b"no picture"), 64).tobytes() == letter.tobytes()
