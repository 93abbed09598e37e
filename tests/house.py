"""A whole server inside the test's own process, on the real database and storage of the tests."""

import asyncio
import itertools
import json
import os
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Self

import aiohttp
from aiohttp import web
from aiohttp.web_app import _cached_build_middleware
from multidict import CIMultiDictProxy

from phones.simulated import SimulatedRuntime
from server.app import build
from server.config import load
from server.plugin import Plugin, in_order
from tests.servers import Servers

PASSWORD = "correct horse battery"
_NUMBERS = itertools.count(1)
_PORTS_PER_WORKER = 900


def port_ranges() -> dict[str, object]:
    """Phones' ports that no other test worker uses."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    first = 20000 + worker * _PORTS_PER_WORKER
    return {
        "adb_ports": [first, first + 299],
        "webrtc_ports": [first + 300, first + 599],
        "scrcpy_ports": [first + 600, first + 899],
    }


@dataclass(frozen=True)
class Reply:
    """An answer, read to its end."""

    status: int
    headers: CIMultiDictProxy[str]
    body: bytes

    @property
    def json(self) -> Any:
        """The body as JSON; None where there is none."""
        return json.loads(self.body) if self.body else None

    @property
    def code(self) -> str:
        """The problem's code."""
        return str(self.json["code"])


class Client:
    """Somebody who calls the API; with a token where signed in."""

    def __init__(self, house: "House", session: Mapping[str, Any] | None = None) -> None:
        self._house = house
        self.session = dict(session or {})
        self.user: dict[str, Any] = self.session.get("user", {})
        self.token: str = self.session.get("access_token", "")

    @property
    def headers(self) -> dict[str, str]:
        """What says who is calling."""
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}

    async def call(
        self, method: str, path: str, *, headers: Mapping[str, str] | None = None, **more: Any
    ) -> Reply:
        """Call the API under /api/v1, or a page when the path says so by a leading `//`."""
        url = self._house.url + (path[1:] if path.startswith("//") else f"/api/v1{path}")
        async with self._house.http.request(
            method, url, headers={**self.headers, **(headers or {})}, allow_redirects=False, **more
        ) as response:
            return Reply(response.status, response.headers, await response.read())

    async def get(self, path: str, **more: Any) -> Reply:
        """GET."""
        return await self.call("GET", path, **more)

    async def post(self, path: str, json: object = None, **more: Any) -> Reply:
        """POST JSON, or nothing."""
        if json is not None:
            more["json"] = json
        return await self.call("POST", path, **more)

    async def patch(self, path: str, json: object, **more: Any) -> Reply:
        """PATCH JSON."""
        return await self.call("PATCH", path, json=json, **more)

    async def delete(self, path: str, **more: Any) -> Reply:
        """DELETE."""
        return await self.call("DELETE", path, **more)

    async def socket(self, path: str, **more: Any) -> aiohttp.ClientWebSocketResponse[Any]:
        """Open a WebSocket of the API; the house closes it."""
        headers = {**self.headers, **more.pop("headers", {})}
        url = f"{self._house.url}/api/v1{path}"
        socket: aiohttp.ClientWebSocketResponse[Any] = await self._house.http.ws_connect(
            url, headers=headers, **more
        )
        return socket


class House:
    """A running server: where it is, and how to call it."""

    def __init__(
        self,
        configuration_file: Path,
        plugins: Sequence[Plugin],
        drop_database: Callable[[], Awaitable[None]],
    ) -> None:
        self._file = configuration_file
        self._drop_database = drop_database
        self._plugins = in_order(plugins)
        self._runner: web.AppRunner | None = None
        self.http = aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar())
        self.url = ""

    @classmethod
    async def open(
        cls,
        servers: Servers,
        folder: Path,
        sections: Mapping[str, Mapping[str, object]],
        plugins: Sequence[Plugin],
    ) -> Self:
        """Start with a fresh database and bucket and the given sections of config.toml."""
        folder.mkdir()
        merged: dict[str, dict[str, object]] = {
            "server": {"port": 0, "shutdown_grace_s": 2},
            **await servers.new_sections(),
        }
        drop_database = partial(servers.drop_database, str(merged["database"]["url"]))
        if any(plugin.name == "devices" for plugin in plugins):
            merged["devices"] = {"runtime": "simulated", **port_ranges()}
        for name, section in sections.items():
            merged.setdefault(name, {}).update(section)
        file = folder / "config.toml"
        file.write_text("".join(f"{name} = {to_toml(section)}\n" for name, section in merged.items()))
        house = cls(file, plugins, drop_database)
        try:
            await house.start()
        except BaseException:
            await house.close()
            raise
        return house

    @property
    def app(self) -> web.Application:
        """The application inside."""
        assert self._runner is not None
        return self._runner.app

    async def start(self) -> None:
        """Start the server on what the last one left."""
        configuration = await asyncio.to_thread(load, self._file, self._plugins)
        app = await asyncio.to_thread(build, configuration, self._plugins, own_url=lambda: self.url)
        self._runner = web.AppRunner(app, access_log=None, handle_signals=False, shutdown_timeout=2)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        """Stop the server in order; phones go on."""
        if self._runner is not None:
            await self._runner.cleanup()
            self._runner = None
            # aiohttp keeps the last 1,024 handlers, each with its whole application: after some hundred tests
            # one garbage collection over them would hold this process up for longer than a time limit.
            _cached_build_middleware.cache_clear()

    async def restart(self) -> None:
        """Stop, and start again on the same database, storage and data_dir."""
        await self.stop()
        await self.start()

    async def close(self) -> None:
        """Stop and remove whatever phones are left."""
        await self.http.close()
        try:
            await self.stop()
        finally:
            await remove_phones(self._file.parent / "data")
            await self._drop_database()

    @property
    def anyone(self) -> Client:
        """Somebody who is not signed in."""
        return Client(self)

    async def sign_up(self, email: str | None = None) -> Client:
        """A new account's client."""
        email = email or f"user{next(_NUMBERS)}@example.com"
        reply = await self.anyone.post("/auth/register", {"email": email, "password": PASSWORD})
        assert reply.status == 201, reply.body
        return Client(self, reply.json)


async def remove_phones(data_dir: Path) -> None:
    """End every simulated phone under a data directory, as its runtime would."""
    runtime = await asyncio.to_thread(SimulatedRuntime, data_dir / "phones")
    await runtime.open()
    for phone in await runtime.list():
        await runtime.remove(phone.id)
    await runtime.close()


def to_toml(value: object) -> str:
    """A value as config.toml spells it, tables inline."""
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{name} = {to_toml(part)}" for name, part in value.items()) + "}"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(map(to_toml, value)) + "]"
    return json.dumps(value)
