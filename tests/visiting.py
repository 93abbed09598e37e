"""What tests of accounts do again and again, as programs and as browsers."""

import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp
import pytest

from plugins import notify, users
from tests.conftest import Open
from tests.house import PASSWORD, House, Reply

PLUGINS = (users.PLUGIN, notify.PLUGIN)
EMAIL = "ann@example.com"


@pytest.fixture
async def house(open_house: Open) -> House:
    """A server with accounts and notifications alone."""
    return await open_house(PLUGINS)


async def log_in(house: House, email: str = EMAIL, password: str = PASSWORD) -> Reply:
    """Try to sign in."""
    return await house.anyone.post("/auth/login", {"email": email, "password": password})


@dataclass(frozen=True)
class PageReply:
    """A page, or where it sends the browser."""

    status: int
    location: str
    text: str

    @property
    def csrf_token(self) -> str:
        """What its forms carry."""
        found = re.search(r'name="csrf_token" value="([^"]*)"', self.text)
        assert found, self.text
        return found[1]


class Visitor:
    """A browser: keeps cookies, says which site its page is from, follows no redirect by itself."""

    def __init__(self, house: House, http: aiohttp.ClientSession) -> None:
        self._house = house
        self.http = http

    async def get(self, path: str) -> PageReply:
        """Open a page."""
        return await self._ask("GET", path, {}, None)

    async def post(self, path: str, origin: str | None = None, **fields: str) -> PageReply:
        """Send a form."""
        return await self._ask("POST", path, {"Origin": origin or self._house.url}, fields)

    async def log_in(self, email: str = EMAIL) -> PageReply:
        """Sign in by the form."""
        return await self.post("/login", email=email, password=PASSWORD)

    async def _ask(
        self, method: str, path: str, headers: dict[str, str], form: dict[str, str] | None
    ) -> PageReply:
        async with self.http.request(
            method,
            self._house.url + path,
            headers={"Accept": "text/html", **headers},
            data=form,
            allow_redirects=False,
        ) as reply:
            return PageReply(reply.status, reply.headers.get("Location", ""), await reply.text())


@asynccontextmanager
async def browser(house: House) -> AsyncIterator[Visitor]:
    """A browser of its own for a while."""
    async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as http:
        yield Visitor(house, http)
