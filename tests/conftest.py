"""What every test gets: no blocking call on the event loop, and a house of its own for the asking."""

import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from pathlib import Path

import pytest
from blockbuster import blockbuster_ctx

from server.__main__ import PLUGINS
from server.plugin import Plugin
from tests.containers import docker_house as docker_house
from tests.containers import house_on_engine as house_on_engine
from tests.engine import engine as engine
from tests.engine import private_engine as private_engine
from tests.house import House
from tests.realadb import RealAdb
from tests.servers import Servers
from tests.servers import database as database
from tests.servers import servers as servers
from tests.servers import storage as storage

Open = Callable[..., Awaitable[House]]


@pytest.fixture(autouse=True)
def nothing_blocks_the_loop() -> Iterator[None]:
    """Fail a test in which our code blocks the event loop."""
    with blockbuster_ctx(["server", "phones", "plugins"]):
        yield


@pytest.fixture
async def open_house(servers: Servers, tmp_path: Path) -> AsyncIterator[Open]:
    """Start servers with a configuration of one's own: `await open_house(devices={"max_per_user": 1})`."""
    houses: list[House] = []

    async def open_one(plugins: Sequence[Plugin] = PLUGINS, **sections: dict[str, object]) -> House:
        house = await House.open(servers, tmp_path / f"house{len(houses)}", sections, plugins)
        houses.append(house)
        return house

    yield open_one
    for house in houses:
        await house.close()


@pytest.fixture
async def house(open_house: Open) -> House:
    """A running server with the default configuration."""
    return await open_house()


@pytest.fixture
async def real_adb(tmp_path: Path) -> AsyncIterator[RealAdb]:
    """The genuine adb with a server of its own."""
    async with RealAdb.started(tmp_path) as adb:
        yield adb


def pytest_collection_finish() -> None:
    """What the programs are made of lives as long as the process: no collection need look at it again."""
    gc.collect()
    gc.freeze()
