"""Headless Chromium, and a visitor who remembers whatever the pages complain of."""

import shutil
from collections.abc import AsyncIterator, Generator, Iterator
from contextlib import contextmanager

import pytest
from playwright.async_api import (
    Browser,
    BrowserContext,
    ConsoleMessage,
    Request,
    Response,
    WebError,
    async_playwright,
    expect,
)

WAIT_MS = 20_000
ARGUMENTS = (
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
# What Chromium does to every request under way when an address of this machine comes or goes, as those of
# containers' networks do in the tests beside this one.
NETWORK_CHANGED = "ERR_NETWORK_CHANGED"
# What an open page cannot help saying while its server is away.
UNREACHABLE = ("ERR_CONNECTION_REFUSED", "ERR_CONNECTION_RESET", "ERR_EMPTY_RESPONSE")


class Visitor:
    """A person with a browser. `complaints` collects console errors, exceptions and failed requests."""

    def __init__(self, context: BrowserContext) -> None:
        self.context = context
        self.complaints: list[str] = []
        self._expected: tuple[str, ...] = ()
        context.on("console", self._hear)
        context.on("weberror", self._catch)
        context.on("requestfailed", self._miss)
        context.on("response", self._see)

    @contextmanager
    def expecting(self, *reasons: str) -> Iterator[None]:
        """Overlook complaints that give one of these reasons."""
        self._expected = reasons
        yield
        self._expected = ()

    def _complain(self, complaint: str) -> None:
        if not any(reason in complaint for reason in self._expected):
            self.complaints.append(complaint)

    def _hear(self, message: ConsoleMessage) -> None:
        if message.type in {"error", "warning"}:
            self._complain(f"{message.type}: {message.text} ({message.location['url']})")

    def _catch(self, error: WebError) -> None:
        self._complain(f"exception: {error.error}")

    def _miss(self, request: Request) -> None:
        # A page that is left aborts what it was loading.
        if request.failure != "net::ERR_ABORTED":
            self._complain(f"{request.method} {request.url}: {request.failure}")

    def _see(self, response: Response) -> None:
        if response.status >= 400:
            self._complain(f"{response.request.method} {response.url}: {response.status}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Visit again where the network was changed under the browser, and for no other reason."""
    for item in items:
        if "visitor" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.flaky(reruns=3, only_rerun=[NETWORK_CHANGED]))


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: pytest.Function) -> Generator[None, object, object]:
    """A visit that fails after its network was changed says so."""
    try:
        return (yield)
    except BaseException as error:
        visitor = pyfuncitem.funcargs.get("visitor")
        if isinstance(visitor, Visitor) and any(NETWORK_CHANGED in one for one in visitor.complaints):
            raise AssertionError(f"{NETWORK_CHANGED} during this visit") from error
        raise


@pytest.fixture
async def chromium() -> AsyncIterator[Browser]:
    """The browser; a machine without one fails the test and says how to get it."""
    path = shutil.which("chromium")
    if path is None:
        pytest.fail("chromium is not installed: run 'apt-get install chromium fonts-noto-cjk'", pytrace=False)
    expect.set_options(timeout=WAIT_MS)
    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield browser
        await browser.close()


@pytest.fixture
async def visitor(chromium: Browser) -> AsyncIterator[Visitor]:
    """Somebody who reads English, at a desk."""
    context = await chromium.new_context(locale="en-US", viewport={"width": 1280, "height": 900})
    context.set_default_timeout(WAIT_MS)
    yield Visitor(context)
    await context.close()
