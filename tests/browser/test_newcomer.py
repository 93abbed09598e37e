"""The main job as a newcomer does it: in a browser, by hand, from the first page to a phone with an app."""

import asyncio
import re
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
from playwright.async_api import FilePayload, Locator, Page, expect

from phones.simulator.layout import Box, layout
from tests.apks import build_apk
from tests.browser.conftest import UNREACHABLE, Visitor
from tests.house import PASSWORD, port_ranges
from tests.process import ServerProcess, server_process

WIDTH, HEIGHT = 720, 1280
SCREEN = layout(WIDTH, HEIGHT)
BELOW_STATUS, BELOW_CLOCK = SCREEN.status.bottom, SCREEN.clock.bottom
NARROW = {"width": 390, "height": 844}
PACKAGE = "org.example.hello"
LABEL = "Hello 你好"
APK: FilePayload = {
    "name": "../hello 你好.apk",
    "mimeType": "application/vnd.android.package-archive",
    "buffer": build_apk(
        package=PACKAGE,
        label=LABEL,
        version_name="2.5",
        version_code=25,
        permissions=("android.permission.INTERNET", "org.example.hello.SECRET"),
    ),
}

# Notes each state that the phone's badge goes through, on one page without a reload.
WATCH_BADGE = """
addEventListener("DOMContentLoaded", () => {
  const badge = document.querySelector('#phone .state[data-kind="device"]');
  if (!badge) return;
  window.states = [badge.dataset.state];
  const note = () => states.at(-1) === badge.dataset.state || states.push(badge.dataset.state);
  new MutationObserver(note).observe(badge, { attributes: true });
});
"""
# A digest of the pixels below `top` of the phone's picture, or null while the next one is being shown.
PIXELS = """
async (image, top) => {
  try {
    await image.decode();
  } catch {
    return null;
  }
  const { naturalWidth: width, naturalHeight: height } = image;
  const canvas = new OffscreenCanvas(width, height - top);
  const context = canvas.getContext("2d");
  context.drawImage(image, 0, -top);
  let hash = 0;
  for (const word of new Uint32Array(context.getImageData(0, 0, width, height - top).data.buffer)) {
    hash = Math.imul(hash ^ word, 16777619);
  }
  return `${width}×${height} ${hash}`;
}
"""
TOO_WIDE = """
() => [...document.querySelectorAll("body *")]
  .filter((element) => element.checkVisibility() && element.getBoundingClientRect().right > innerWidth + 1)
  .map((element) => element.outerHTML.slice(0, 80))
  .concat(document.documentElement.scrollWidth > innerWidth ? ["the whole page"] : [])
"""


@pytest.fixture
async def server() -> AsyncIterator[ServerProcess]:
    """A server on embedded defaults, ready; started again, it listens on the same port."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    sections: dict[str, dict[str, object]] = {
        "server": {"port": port},
        "devices": {"runtime": "simulated", **port_ranges()},
    }
    async with server_process(sections) as started:
        await started.start()
        yield started


async def test_a_newcomer_does_the_main_job_in_a_browser(visitor: Visitor, server: ServerProcess) -> None:
    await visitor.context.add_init_script(WATCH_BADGE)
    page = await visitor.context.new_page()
    await fits_a_phone(page, server.url, "/", "/signup", "/login")

    await signs_up(page, server.url)
    await rents_a_phone(page)
    phone = page.url
    await touches_it(page)
    await stops_and_starts_it(page, visitor)
    app = await uploads_an_app(page)
    await installs_and_opens_it(page, phone)
    order = await tops_up(page, visitor)
    await reaches_every_action_by_keyboard(page, phone)
    await outlives_the_server(page, phone, visitor, server)
    await reads_the_news(page)
    await reads_chinese(page)
    everywhere = ("/", "/devices", "/devices/new", phone, "/apps", app, "/billing", order, "/notifications")
    await fits_a_phone(page, server.url, *everywhere, "/account", "/api/docs")
    await signs_out(page)

    assert visitor.complaints == []


async def signs_up(page: Page, url: str) -> None:
    """From the first page to an account, with the keyboard alone."""
    await page.goto(url)
    await expect(page.get_by_role("heading", level=1)).to_have_text("Android phones in your browser")
    await press(page.get_by_role("main").get_by_role("link", name="Sign up"))
    await tab_to(page.get_by_label("E-mail"))
    await page.keyboard.type("newcomer@example.com")
    await tab_to(page.get_by_label("Your name"))
    await page.keyboard.type("小明")
    await tab_to(page.get_by_label("Password"))
    await page.keyboard.type(PASSWORD)
    await press(page.get_by_role("button", name="Make the account"))
    await expect(page.get_by_role("heading", name="You have no phone yet")).to_be_visible()
    await expect(balance(page)).to_have_text("CN¥10.00")
    await expect(page.locator("[data-live=on]")).to_have_text("Live")


async def rents_a_phone(page: Page) -> None:
    """Rent through the form, with the keyboard alone, and watch it come up."""
    await press(page.get_by_role("link", name="Rent your first phone"))
    await tab_to(page.get_by_label("Name"))
    await page.keyboard.type("My <b>first</b> 手机")
    await press(page.get_by_role("button", name="Rent this phone"))
    await expect(page.get_by_role("heading", level=1)).to_have_text("My <b>first</b> 手机")
    await expect(state(page)).to_have_text("Running")
    states = await page.evaluate("states")
    assert set(states) <= {"creating", "running"}
    assert states[-1] == "running"
    await expect(page.locator("[data-port=adb]")).to_have_text(re.compile(r"^\d{5}$"))
    await expect(page.get_by_text("This phone is simulated")).to_be_visible()
    await expect(page.locator("[data-screen-note]")).to_be_hidden()


async def touches_it(page: Page) -> None:
    """Tap, type on the screen, type in the box, run a command: each changes the picture."""
    screen = page.locator("#screen")
    home = await pixels(page, BELOW_CLOCK)
    await tap(page, SCREEN.dock_cells[1])
    await changed(page, home, BELOW_CLOCK)
    notes = await pixels(page)
    await tap(page, SCREEN.page)
    focused = await changed(page, notes)
    await expect(screen).to_be_focused()
    await page.keyboard.type("Hello, phone!")
    typed = await changed(page, focused)
    await page.get_by_label("Text for the phone").fill("你好 100%sure")
    await page.keyboard.press("Enter")
    await changed(page, typed)
    sent = await pixels(page, BELOW_CLOCK)
    await page.get_by_role("button", name="Home", exact=True).click()
    await changed(page, sent, BELOW_CLOCK)
    await page.get_by_role("textbox", name="Command").fill("echo 'a  b'; echo '<i>'; exit 3")
    await page.keyboard.press("Enter")
    await expect(page.get_by_text("Exit code 3")).to_be_visible()
    await expect(page.get_by_label("Output")).to_contain_text("a  b\n<i>")


async def stops_and_starts_it(page: Page, visitor: Visitor) -> None:
    """Every state on the way shows itself, and the page is never loaded again."""
    actions = page.get_by_role("group", name="What to do with the phone")
    # A picture asked for just before is refused when the phone stops meanwhile.
    with visitor.expecting("/screenshot"):
        await actions.get_by_role("button", name="Stop").click()
        await expect(state(page)).to_have_text("Stopped")
        await expect(page.get_by_text("The phone is stopped. It costs nothing")).to_be_visible()
        await actions.get_by_role("button", name="Start").click()
        await expect(state(page)).to_have_text("Running")
        await expect(page.locator("[data-screen-note]")).to_be_hidden()
    assert {"stopping", "stopped", "starting", "running"} <= set(await page.evaluate("states"))


async def uploads_an_app(page: Page) -> str:
    """Choose a file with the keyboard; see what it is and what it may do. Answers the app's address."""
    await page.get_by_role("navigation").get_by_role("link", name="Apps").click()
    await expect(page.get_by_role("heading", level=1)).to_have_text("Apps")
    async with page.expect_file_chooser() as chooser:
        await press(page.get_by_role("button", name="Choose a file"))
    await (await chooser.value).set_files(APK)
    card = page.get_by_role("link", name=LABEL)
    await expect(card).to_contain_text("2.5")
    await card.click()
    await expect(page.get_by_role("heading", level=1)).to_have_text(LABEL)
    await expect(page.get_by_text("Version 2.5")).to_be_visible()
    await expect(page.get_by_text(PACKAGE, exact=True)).to_be_visible()
    permissions = page.get_by_role("region", name="What it may do")
    await expect(permissions).to_contain_text("Use the internet")
    await expect(permissions).to_contain_text("org.example.hello.SECRET")
    icon = page.locator(".app-icon.large")
    assert await icon.evaluate("async (image) => { await image.decode(); return image.naturalWidth; }") > 0
    return page.url


async def installs_and_opens_it(page: Page, phone: str) -> None:
    """Install from the phone's page; it comes to the list and the home screen by itself; open it."""
    await page.goto(phone)
    await expect(page.locator("[data-screen-note]")).to_be_hidden()
    apps = page.get_by_role("region", name="Apps on this phone")
    await expect(apps.get_by_text("No app is installed yet")).to_be_visible()
    home = await pixels(page, BELOW_CLOCK)
    await apps.get_by_label("App to install").select_option(label=f"{LABEL} 2.5")
    await apps.get_by_role("button", name="Install", exact=True).click()
    installed = apps.locator("[data-installed] li")
    await expect(installed).to_contain_text(LABEL)
    await expect(installed).to_contain_text(PACKAGE)
    with_icon = await changed(page, home, BELOW_CLOCK)
    await installed.get_by_role("button", name="Open").click()
    await expect(page.get_by_text(f"{LABEL} is open on the phone")).to_be_visible()
    await changed(page, with_icon, BELOW_CLOCK)
    opened = await pixels(page)
    await tap(page, SCREEN.counter)
    await changed(page, opened)


async def tops_up(page: Page, visitor: Visitor) -> str:
    """Order, pay on the sandbox's page; the balance moves in another window too. Answers the order."""
    other = await page.context.new_page()
    await other.goto(page.url)
    await expect(balance(other)).to_have_text("CN¥10.00")
    await page.bring_to_front()
    await page.get_by_role("navigation").get_by_role("link", name="Balance").click()
    await page.get_by_label("Amount in CNY").fill("0")
    with visitor.expecting("status of 422", "/billing: 422"):
        await page.get_by_role("button", name="Continue to payment").click()
        await expect(page.locator("#f-amount-error")).to_contain_text("Enter an amount between")
    await page.get_by_role("button", name="50", exact=True).click()
    await expect(page.get_by_label("Amount in CNY")).to_have_value("50")
    await page.get_by_role("button", name="Continue to payment").click()
    await expect(page.get_by_role("heading", level=1)).to_have_text("Sandbox payment")
    await fits_a_phone(page, page.url, "")
    await page.get_by_role("button", name="Pay", exact=True).click()
    await expect(page.get_by_text("Paid. The amount is in your balance.")).to_be_visible()
    await expect(balance(page)).to_have_text("CN¥60.00")
    await expect(balance(other)).to_have_text("CN¥60.00")
    await other.close()
    return page.url


async def reaches_every_action_by_keyboard(page: Page, phone: str) -> None:
    """Tab leads through all that can be done with a phone, in the order of the page."""
    await page.goto(phone)
    await expect(page.locator("[data-installed] li")).to_be_visible()
    for action in ("Stop", "Restart", "Reset", "Delete"):
        await tab_to(page.get_by_role("button", name=action, exact=True))
    await tab_to(page.locator("#screen"))
    await tab_to(page.get_by_role("button", name="Back", exact=True))
    await tab_to(page.get_by_label("Text for the phone"))
    for label in ("Open", "Uninstall", "Install", "Copy the line", "Run"):
        await tab_to(page.get_by_role("button", name=label, exact=True))


async def outlives_the_server(page: Page, phone: str, visitor: Visitor, server: ServerProcess) -> None:
    """kill -9 while the page is open: it says so, comes back by itself, and one is still signed in."""
    await page.goto(phone)
    await expect(page.locator("[data-live=on]")).to_have_text("Live")
    await page.evaluate("window.sameDocument = true")
    with visitor.expecting(*UNREACHABLE):
        await server.kill()
        await expect(page.locator("[data-live=off]")).to_have_text("Reconnecting…")
        await server.start()
        await expect(page.locator("[data-live=on]")).to_have_text("Live")
    await expect(state(page)).to_have_text("Running")
    before = await pixels(page, BELOW_CLOCK)
    await page.get_by_role("button", name="Home", exact=True).click()
    await changed(page, before, BELOW_CLOCK)
    assert await page.evaluate("window.sameDocument") is True
    await page.reload()
    await expect(state(page)).to_have_text("Running")


async def reads_the_news(page: Page) -> None:
    """Every step was told once, and is still there after a reload."""
    await page.get_by_role("navigation").get_by_role("link", name="Notifications").click()
    news = page.locator("#inbox > li")
    for told in (
        "10.00 CNY of welcome credit were added",
        "手机 is running",
        "手机 is stopped",
        f"{PACKAGE} is installed",
        "Your balance is 60.00 CNY",
    ):
        await expect(news.filter(has_text=told).first).to_be_visible()
    await expect(news.filter(has_text=re.compile(r"Order \w+ is paid"))).to_have_count(1)
    ids = await news.evaluate_all("items => items.map((item) => Number(item.dataset.notificationId))")
    assert ids == sorted(set(ids), reverse=True)
    await expect(page.locator("[data-unread]")).to_have_text(str(len(ids)))
    before = await news.all_inner_texts()
    await page.reload()
    assert await news.all_inner_texts() == before
    await page.get_by_role("button", name="Mark all as read").click()
    await expect(page.locator("[data-unread]")).to_be_hidden()
    await page.reload()
    await expect(news).to_have_count(len(ids))
    await expect(page.locator("[data-unread]")).to_be_hidden()


async def reads_chinese(page: Page) -> None:
    """The switch turns everything into Chinese, what was told before as well, and back."""
    await page.get_by_role("button", name="中文").click()
    await expect(page.locator("html")).to_have_attribute("lang", "zh-CN")
    await expect(page.get_by_role("heading", level=1)).to_have_text("通知")
    await expect(page.locator("#inbox").get_by_text("is running")).to_have_count(0)
    await expect(page.locator("#inbox").get_by_text("正在运行").first).to_be_visible()
    await expect(balance(page)).to_have_text("¥60.00")
    await page.get_by_role("button", name="English").click()
    await expect(page.get_by_role("heading", level=1)).to_have_text("Notifications")


async def fits_a_phone(page: Page, url: str, *addresses: str) -> None:
    """No page is wider than a phone, in either language."""
    desk = page.viewport_size
    assert desk is not None
    await page.set_viewport_size(NARROW)  # type: ignore[arg-type]  # a dict of its shape
    for other in ("中文", "English"):
        for address in addresses:
            await page.goto(address if address.startswith("http") else url + address)
            assert await page.evaluate(TOO_WIDE) == [], f"{page.url}, before {other}"
        await page.get_by_role("banner").get_by_role("button", name=other).click()
        await expect(page.get_by_role("banner").get_by_role("button", name=other)).to_have_count(0)
    await page.set_viewport_size(desk)


async def signs_out(page: Page) -> None:
    """Afterwards the phones are out of reach."""
    await page.get_by_label("Your account").click()
    await page.get_by_role("button", name="Sign out").click()
    await expect(page.get_by_role("main").get_by_role("link", name="Sign up")).to_be_visible()
    await page.goto(page.url + "devices")
    await expect(page).to_have_url(re.compile(r"/login\?next=/devices$"))


def state(page: Page) -> Locator:
    """The badge of the phone's page."""
    return page.locator("#phone .head .state")


def balance(page: Page) -> Locator:
    """The balance in the header."""
    return page.get_by_role("banner").locator("[data-balance]")


async def tab_to(target: Locator) -> None:
    """Press Tab until the focus is there, and see that it shows."""
    await expect(target).to_be_visible()
    for _ in range(60):
        await target.page.keyboard.press("Tab")
        if await target.evaluate("element => element === document.activeElement"):
            break
    await expect(target).to_be_focused()
    assert await target.evaluate("element => getComputedStyle(element).outlineStyle") != "none"


async def press(target: Locator) -> None:
    """Use a link or a button with the keyboard."""
    await tab_to(target)
    await target.page.keyboard.press("Enter")


async def tap(page: Page, place: Box) -> None:
    """Click on a place of the phone's screen."""
    picture = page.locator("#screen img")
    box = await picture.bounding_box()
    assert box is not None
    x, y = place.middle
    await picture.click(position={"x": x * box["width"] / WIDTH, "y": y * box["height"] / HEIGHT})


async def pixels(page: Page, top: int = BELOW_STATUS) -> str:
    """A digest of the phone's picture from `top` down, once there is one: no clock may be in it."""
    async with asyncio.timeout(20):
        while (digest := await _digest(page, top)) is None:
            await asyncio.sleep(0.05)
    return digest


async def changed(page: Page, before: str, top: int = BELOW_STATUS) -> str:
    """The digest of the next picture that differs."""
    async with asyncio.timeout(20):
        while (digest := await _digest(page, top)) in {None, before}:
            await asyncio.sleep(0.05)
    assert digest is not None
    return digest


async def _digest(page: Page, top: int) -> str | None:
    digest: Any = await page.locator("#screen img[src^='blob:']").evaluate(PIXELS, top)
    return None if digest is None else str(digest)
