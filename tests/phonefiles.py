"""What tests of files on rented phones do again and again."""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, closing
from pathlib import Path
from typing import Any
from uuid import UUID

import aiohttp
from yarl import URL

from plugins.devices.room import DEVICES
from tests.house import Client, House, Reply
from tests.renting import until

MB = 1 << 20


async def read(person: Client, device_id: str, path: str) -> Reply:
    """A file's answer."""
    return await person.get(f"/devices/{device_id}/files", params={"path": path})


async def write(person: Client, device_id: str, path: str, content: Any, **more: Any) -> Reply:
    """What writing a file answers."""
    return await person.call(
        "PUT", f"/devices/{device_id}/files", params={"path": path}, data=content, **more
    )


async def listed(person: Client, device_id: str, path: str) -> Reply:
    """A directory's answer."""
    return await person.get(f"/devices/{device_id}/files/list", params={"path": path})


def tree_of(house: House, device_id: str) -> Path:
    """Where the phone's own files lie on this machine."""
    (tree,) = (house._file.parent / "data" / "phones" / device_id).glob("**/files/tree")
    return tree


async def something_came(house: House, device_id: str) -> bool:
    """Whether a part of a file has reached the phone."""
    incoming = tree_of(house, device_id).parent / "incoming"
    return any(draft.stat().st_size for draft in incoming.iterdir())


async def nothing_left(house: House, device_id: str) -> None:
    """Wait until no stream is open to the phone, and nothing half written lies on it."""
    connection = (await house.app[DEVICES].link(UUID(device_id)))._connection
    incoming = tree_of(house, device_id).parent / "incoming"

    async def holds() -> bool:
        return not connection._streams and not list(incoming.iterdir())

    await until(holds)


@asynccontextmanager
async def raw_request(
    person: Client, house: House, method: str, device_id: str, path: str, *headers: str
) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    """A request whose head is sent and whose connection is ours to break."""
    url = URL(house.url)
    target = URL.build(path=f"/api/v1/devices/{device_id}/files", query={"path": path})
    reader, writer = await asyncio.open_connection(url.host, url.port)
    with closing(writer):
        head = [f"{method} {target} HTTP/1.1", "Host: phones", f"Authorization: Bearer {person.token}"]
        writer.write("".join(f"{line}\r\n" for line in (*head, *headers, "")).encode())
        yield reader, writer
        writer.transport.abort()


@asynccontextmanager
async def opened(
    house: House, person: Client, device_id: str, path: str
) -> AsyncIterator[aiohttp.ClientResponse]:
    """A file's answer whose body is not read yet."""
    url = f"{house.url}/api/v1/devices/{device_id}/files"
    async with house.http.get(url, params={"path": path}, headers=person.headers) as response:
        assert response.status == 200
        yield response


async def pieces(count: int) -> AsyncIterator[bytes]:
    """So many megabytes."""
    for number in range(count):
        yield bytes([number % 256]) * MB
