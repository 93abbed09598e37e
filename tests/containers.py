"""Servers whose phones are containers, and what an outsider sees and does on their engine."""

import asyncio
import json
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from typing import Any
from uuid import UUID

import pytest

from server.__main__ import PLUGINS
from server.interfaces import DATABASE
from server.plugin import Plugin
from tests.engine import Engine, docker
from tests.house import House
from tests.renting import Open

LABEL = "cloudphone.installation"
PLANS = [{"name": "basic", "cpus": 1.0, "memory_mb": 512, "price_per_hour": 20}]

OpenDocker = Callable[..., Awaitable["DockerHouse"]]


class DockerHouse:
    """A server and the engine that its phones run on."""

    def __init__(self, house: House, url: str, installation: str) -> None:
        self.house = house
        self.url = url
        self.installation = installation

    async def docker(self, *arguments: str) -> str:
        """The docker command on the phones' engine."""
        return await docker(*arguments, url=self.url)

    def name_of(self, device_id: str) -> str:
        """What a phone's container is called."""
        return f"cloudphone-{self.installation[:8]}-{device_id}"

    async def containers(self) -> dict[str, str]:
        """This installation's containers: name and state."""
        return await containers_of(self.url, self.installation)

    async def inspect(self, device_id: str) -> dict[str, Any]:
        """All the engine knows of a phone's container."""
        (found,) = json.loads(await self.docker("inspect", self.name_of(device_id)))
        return dict(found)

    async def repairs(self) -> list[tuple[str, str]]:
        """What the audit log says was mended: fault and device."""
        rows = await self.house.app[DATABASE].fetch(
            "SELECT after->>'fault' AS fault, target FROM audit WHERE action = 'devices.repair' ORDER BY id"
        )
        return [(row["fault"], row["target"]) for row in rows]


async def containers_of(url: str, installation: str) -> dict[str, str]:
    """An installation's containers: name and state."""
    listed = await docker(
        *("ps", "--all", "--no-trunc", "--filter", f"label={LABEL}={installation}"),
        *("--format", "{{.Names}} {{.State}}"),
        url=url,
    )
    return dict(line.split() for line in listed.splitlines())


def idle(image: str) -> tuple[str, ...]:
    """What `docker run` needs at its end for a container of a phone's image that is no phone."""
    return ("--entrypoint", "/usr/bin/python3", image, "-S", "-c", "import time; time.sleep(600)")


def sections_for(url: str, image: str, **more: object) -> dict[str, object]:
    """The configuration of a server whose phones are simulated ones in containers."""
    images = [
        {"name": "android-12", "kind": "simulated", "reference": image},
        # It does not know redroid's arguments, says so and ends: an Android that cannot boot.
        {"name": "broken-12", "kind": "redroid", "reference": image},
    ]
    return {"runtime": "docker", "docker_url": url, "images": images, "plans": PLANS, **more}


async def installation_of(house: House) -> str:
    """What marks a server's containers as its own."""
    installation: UUID = await house.app[DATABASE].fetchval("SELECT id FROM device_installation")
    return str(installation)


async def sweep(url: str, installation: str) -> None:
    """Remove everything that an installation has on an engine. Its server must not run."""
    mine = f"label={LABEL}={installation}"
    for listing, removal in (
        (("ps", "--all", "--quiet", "--filter", mine), ("rm", "--force")),
        (("volume", "ls", "--quiet", "--filter", mine), ("volume", "rm", "--force")),
        (("network", "ls", "--quiet", "--filter", mine), ("network", "rm")),
    ):
        if found := (await docker(*listing, url=url)).split():
            await docker(*removal, *found, url=url)
    if os.geteuid() == 0:
        for tool in ("iptables", "ip6tables"):
            with suppress(FileNotFoundError):
                rule = f"INPUT -i cph-{installation[:8]} -m conntrack ! --ctstate ESTABLISHED,RELATED -j DROP"
                process = await asyncio.create_subprocess_exec(
                    tool, "-w", "-D", *rule.split(), stderr=asyncio.subprocess.DEVNULL
                )
                await process.wait()


@pytest.fixture
async def house_on_engine(open_house: Open) -> AsyncIterator[OpenDocker]:
    """Start servers on any engine: `await house_on_engine(url, image, max_per_user=60)`."""
    opened: list[DockerHouse] = []

    async def open_one(
        url: str,
        image: str,
        *,
        plugins: Sequence[Plugin] = PLUGINS,
        sweep_at: str = "",
        sections: dict[str, dict[str, object]] | None = None,
        **devices: object,
    ) -> DockerHouse:
        """`sweep_at` is where the engine is reached from outside, when `url` leads over a proxy."""
        house = await open_house(plugins, devices=sections_for(url, image, **devices), **(sections or {}))
        opened.append(DockerHouse(house, sweep_at or url, await installation_of(house)))
        return opened[-1]

    yield open_one
    for one in opened:
        await one.house.stop()
        await sweep(one.url, one.installation)


@pytest.fixture
def docker_house(house_on_engine: OpenDocker, engine: Engine) -> OpenDocker:
    """Start servers on the machine's own engine: `await docker_house(max_per_user=60)`."""
    return partial(house_on_engine, engine.url, engine.image)
