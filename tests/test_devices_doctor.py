"""The doctor beside phones in containers: what it lists, and what it mends."""

import asyncio
from datetime import timedelta
from typing import Any
from uuid import uuid4

import aiohttp
import pytest

from plugins.devices import PLUGIN, repairs
from server.__main__ import PLUGINS
from server.config import load
from server.interfaces import DATABASE
from tests.containers import LABEL, OpenDocker, containers_of, idle, sections_for, sweep
from tests.engine import Engine, docker
from tests.house import PASSWORD, port_ranges
from tests.process import ServerProcess, server_process
from tests.renting import WISH, rented, until
from tests.servers import Servers
from tests.test_serve import output

pytestmark = pytest.mark.timeout(240)


async def orphan(url: str, image: str, installation: str) -> str:
    """A container of this installation that nobody rents; its device's id."""
    device_id = str(uuid4())
    marks = ("--label", f"{LABEL}={installation}", "--label", f"cloudphone.device={device_id}")
    name = f"cloudphone-{installation[:8]}-{device_id}"
    await docker("run", "--detach", "--name", name, *marks, *idle(image), url=url)
    return device_id


async def test_the_plan_lists_what_the_server_would_mend_and_mends_nothing(
    docker_house: OpenDocker, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = await docker_house()
    owner = await there.house.sign_up()
    device = await rented(owner)
    image = (await there.inspect(device["id"]))["Config"]["Image"]
    configuration = await asyncio.to_thread(load, there.house._file, PLUGINS)
    assert PLUGIN.repair is not None
    plan = PLUGIN.repair.plan

    async def planned() -> list[str]:
        return await plan(there.house.app[DATABASE], configuration)

    lost = await orphan(there.url, image, there.installation)
    assert await planned() == [], "it is too young"
    with monkeypatch.context() as patch:
        patch.setattr(repairs, "ORPHAN_AGE", timedelta(0))
        (line,) = await planned()
    place = await there.docker("ps", "--quiet", "--filter", f"name={there.name_of(lost)}")
    assert line == f"orphan phone {lost} ({place}): remove it"
    assert len(await there.containers()) == 2


async def rent_one(server: ServerProcess) -> str:
    """Rent a phone of a server process; its id once it runs."""
    async with aiohttp.ClientSession(f"{server.url}/api/v1/") as http:

        async def ask(method: str, path: str, **more: Any) -> Any:
            async with http.request(method, path, **more) as reply:
                assert reply.status < 300, await reply.text()
                return await reply.json()

        session = await ask("POST", "auth/register", json={"email": "a@example.com", "password": PASSWORD})
        mine = {"Authorization": f"Bearer {session['access_token']}"}
        device_id = str((await ask("POST", "devices", json=WISH, headers=mine))["id"])

        async def runs() -> bool:
            return bool((await ask("GET", f"devices/{device_id}", headers=mine))["state"] == "running")

        await until(runs)
        return device_id


async def test_the_command_lists_beside_a_server_and_mends_without_one(
    engine: Engine, servers: Servers
) -> None:
    sections: dict[str, dict[str, object]] = {
        "server": {"port": 0, "shutdown_grace_s": 5},
        **await servers.new_sections(),
        "devices": {**port_ranges(), **sections_for(engine.url, engine.image)},
    }
    installation = ""
    async with server_process(sections) as server:
        try:
            await server.start()
            device_id = await rent_one(server)
            label = f"label=cloudphone.device={device_id}"
            shown = ("ps", "--all", "--filter", label, "--format", f'{{{{.Names}}}} {{{{.Label "{LABEL}"}}}}')
            name, installation = (await docker(*shown, url=engine.url)).split()
            await orphan(engine.url, engine.image, installation)
            beside = ServerProcess(server.folder)
            *_, running, by_itself, nothing = await output(beside, "doctor", "--repair")
            assert str(server.pid) in running
            assert "repairs by itself" in by_itself
            assert nothing == "nothing to repair", "the orphan is young"
            await server.stop()
            await docker("kill", name, url=engine.url)
            dead = f"dead phone {device_id} "
            last = (await output(server, "doctor", "--repair", "--dry-run"))[-1]
            assert last.startswith(f"would  {dead}")
            assert last.endswith(": start it again")
            assert (await containers_of(engine.url, installation))[name] == "exited"
            assert (await output(server, "doctor", "--repair"))[-1].startswith(f"mended {dead}")
            assert (await containers_of(engine.url, installation))[name] == "running"
            assert (await output(server, "doctor", "--repair"))[-1] == "nothing to repair"
            assert len(await containers_of(engine.url, installation)) == 2
        finally:
            if server._process is not None:
                await server.stop()
            if installation:
                await sweep(engine.url, installation)
