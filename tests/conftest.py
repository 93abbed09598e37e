"""What every test gets: no blocking call on the event loop, and a house of its own for the asking."""

from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from pathlib import Path

import pytest
from blockbuster import blockbuster_ctx

from tests.house import House
from tests.servers import Servers

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

    async def open_one(**sections: dict[str, object]) -> House:
        house = await House.open(servers, tmp_path / f"house{len(houses)}", sections)
        houses.append(house)
        return house

    yield open_one
    for house in houses:
        await house.close()


@pytest.fixture
async def house(open_house: Open) -> House:
    """A running server with the default configuration."""
    return await open_house()
