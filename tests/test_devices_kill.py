"""A server that is killed at any moment while phones come and go: rows, containers and ports agree again."""

import asyncio
import os
import random
import time
from typing import Any

import aiohttp
import pytest

from server.db import Database
from tests.containers import containers_of, sections_for, sweep
from tests.engine import Engine
from tests.house import PASSWORD, port_ranges
from tests.process import ServerProcess, server_process
from tests.renting import WISH
from tests.servers import Servers

KILLS = int(os.environ.get("TEST_KILLS", "5"))
"""How often the server is killed; CI does so more often."""
AGREE_S = 15.0
MOST_PHONES = 6

pytestmark = pytest.mark.timeout(120 + 20 * KILLS)


class Renter:
    """Somebody whose requests may be broken off."""

    def __init__(self, server: ServerProcess, http: aiohttp.ClientSession, token: str) -> None:
        self._server = server
        self._http = http
        self._headers = {"Authorization": f"Bearer {token}"}

    async def call(self, method: str, path: str, json: object = None) -> Any:
        """The answer's JSON; None where there was no answer."""
        url = f"{self._server.url}/api/v1{path}"
        try:
            async with self._http.request(method, url, json=json, headers=self._headers) as reply:
                assert reply.status in {200, 202, 404, 409}, await reply.text()
                return await reply.json()
        except (aiohttp.ClientError, OSError):
            return None

    async def devices(self) -> dict[str, str]:
        """Every device and its state."""
        page = await self.call("GET", "/devices?limit=100")
        return {item["id"]: item["state"] for item in page["items"]}

    async def make_trouble(self) -> None:
        """Create some phones and delete others, at once, until the server is gone."""
        while (page := await self.call("GET", "/devices?limit=100")) is not None:
            ids = [item["id"] for item in page["items"]]
            creates = max(0, min(3, MOST_PHONES - len(ids)))
            doomed = random.sample(ids, min(len(ids), random.randint(1, 3)))
            await asyncio.gather(
                *(self.call("POST", "/devices", WISH) for _ in range(creates)),
                *(self.call("DELETE", f"/devices/{device_id}") for device_id in doomed),
            )
            await asyncio.sleep(random.uniform(0, 0.5))


async def test_a_server_killed_at_random_moments_leaves_no_phone_and_no_port_astray(
    engine: Engine, servers: Servers
) -> None:
    sections: dict[str, dict[str, object]] = {
        "server": {"port": 0},
        **await servers.new_sections(),
        "billing": {"welcome_credit": 1_000_000},
        "devices": sections_for(engine.url, engine.image, **port_ranges()),
    }
    url = str(sections["database"]["url"])
    slowest = 0.0
    async with server_process(sections) as server, aiohttp.ClientSession() as http:
        await server.start()
        account = {"email": "killed@example.com", "password": PASSWORD}
        async with http.post(f"{server.url}/api/v1/auth/register", json=account) as reply:
            renter = Renter(server, http, (await reply.json())["access_token"])
        database = await Database.open(url, pool_size=1)
        installation = str(await database.fetchval("SELECT id FROM device_installation"))
        try:
            for _ in range(KILLS):
                trouble = asyncio.create_task(renter.make_trouble())
                await asyncio.sleep(random.uniform(0.05, 2))
                await server.kill()
                await trouble
                began = time.monotonic()
                await server.start()
                await _until_agreed(renter, database, engine, installation)
                slowest = max(slowest, time.monotonic() - began)
            said = f"{KILLS} kills, agreed within {slowest:.1f} s of each start"
            print(said)  # noqa: T201 (a figure for whoever runs it by hand)
        finally:
            await database.close()
            await server.stop()
            await sweep(engine.url, installation)
            await servers.drop_database(url)


async def _until_agreed(renter: Renter, database: Database, engine: Engine, installation: str) -> None:
    """Every device runs, has one container and three ports of its own, and there are no others."""
    seen: tuple[object, ...] = ()
    try:
        async with asyncio.timeout(AGREE_S):
            while True:
                devices = await renter.devices()
                containers = await containers_of(engine.url, installation)
                ports = await database.fetch("SELECT device_id, port FROM device_ports")
                seen = devices, containers, ports
                names = {f"cloudphone-{installation[:8]}-{device_id}" for device_id in devices}
                if (
                    set(devices.values()) <= {"running"}
                    and containers == dict.fromkeys(names, "running")
                    and len({row["port"] for row in ports}) == 3 * len(devices)
                    and {str(row["device_id"]) for row in ports} == set(devices)
                ):
                    return
                await asyncio.sleep(0.1)
    except TimeoutError:
        raise AssertionError(f"after {AGREE_S:g} s: {seen}") from None
