"""A real PostgreSQL and a real S3 server for the tests: one of each for every test process.

Started by the server's own code, in a thread that lives as long as the process, and only waited for
by a test that uses them. Each test gets a database and a bucket of its own.
"""

import asyncio
import itertools
import json
import os
import shutil
import tempfile
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import pytest

from server.db import Database
from server.embedded_postgres import PUBLIC_HOME, EmbeddedPostgres
from server.embedded_storage import EmbeddedStorage, StorageAccess
from server.storage import Storage

Result = TypeVar("Result")

START_TIMEOUT_S = 60.0
BUCKETS = 8
MEMORY = Path("/dev/shm")
MEMORY_NEEDED_BYTES = 4 << 30
# Nobody wants the tests' data after a power cut, and every house of a test has its own pool.
QUICK = {"fsync": "off", "full_page_writes": "off", "max_connections": "200", "autovacuum": "off"}


class Servers:
    """The servers of this test process. Made with `Servers.start()`, ended with `stop()`."""

    def __init__(self, data_dir: Path, loop: asyncio.AbstractEventLoop) -> None:
        self._data_dir = data_dir
        self._loop = loop
        self._numbers = itertools.count(1)
        self._bucket_numbers = itertools.count()
        self._buckets: dict[str, Storage] = {}
        self._postgres = EmbeddedPostgres(data_dir, settings=QUICK)
        self._storage = EmbeddedStorage(data_dir)
        self._url = self._run(self._postgres.start())
        self._access = self._run(self._storage.start())

    @classmethod
    def start(cls) -> "Servers":
        """Begin to start both; what asks for one of them waits for it."""
        data_dir = _new_data_dir()
        loop = asyncio.new_event_loop()
        threading.Thread(target=loop.run_forever, daemon=True, name="servers").start()
        return cls(data_dir, loop)

    def _run(self, work: Coroutine[Any, Any, Result]) -> Future[Result]:
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def stop(self) -> None:
        """End both and remove what they wrote."""
        for started in (self._url, self._access):
            started.exception(START_TIMEOUT_S)
        self._run(self._close()).result(START_TIMEOUT_S)
        self._loop.call_soon_threadsafe(self._loop.stop)
        _remove(self._data_dir)

    async def new_database(self, template: str = "template1") -> str:
        """The URL of a fresh database, a copy of `template`."""
        url = await asyncio.wrap_future(self._url)
        name = f"test{next(self._numbers)}"
        database = await Database.open(url, pool_size=1)
        await database.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        await database.close()
        return urlsplit(url)._replace(path=f"/{name}").geturl()

    async def new_sections(self) -> dict[str, dict[str, object]]:
        """A server's configuration of both, with a fresh database and bucket."""
        return {
            "database": {"url": await self.new_database()},
            "storage": {
                "endpoint_url": self.endpoint_url,
                "bucket": await self.new_bucket(),
                "access_key": self.access_key,
                "secret_key": self.secret_key,
            },
        }

    async def drop_database(self, url: str) -> None:
        """Remove what `new_database` made; hundreds of them would fill the disk."""
        name = urlsplit(url).path.removeprefix("/")
        database = await Database.open(await asyncio.wrap_future(self._url), pool_size=1)
        await database.execute(f"DROP DATABASE {name} WITH (FORCE)")
        await database.close()

    async def new_bucket(self) -> str:
        """The name of a bucket with nothing in it; `Storage.open` makes it where it is absent.

        Making one takes a third of a second and a volume file, so old tests' buckets are emptied
        and used again: keep no more than BUCKETS at a time.
        """
        number = next(self._bucket_numbers)
        name = f"test{number % BUCKETS}"
        await asyncio.wrap_future(self._access)
        if number >= BUCKETS:
            await asyncio.wrap_future(self._run(self._empty(name)))
        return name

    async def _empty(self, bucket: str) -> None:
        """Runs in the servers' thread, where its clients are kept."""
        if bucket not in self._buckets:
            self._buckets[bucket] = await open_storage(self.access, bucket)
        storage = self._buckets[bucket]
        keys = [entry.key async for entry in storage.list("")]
        await asyncio.gather(*(storage.delete(key) for key in keys))
        await storage.abort_stale_uploads(0)

    async def _close(self) -> None:
        await asyncio.gather(*(storage.close() for storage in self._buckets.values()))
        await asyncio.gather(self._postgres.stop(), self._storage.stop())

    @property
    def access(self) -> StorageAccess:
        """How to reach the S3 server."""
        return self._access.result(START_TIMEOUT_S)

    @property
    def endpoint_url(self) -> str:
        """Where the S3 server answers."""
        return self.access.endpoint_url

    @property
    def access_key(self) -> str:
        """The S3 key."""
        return self.access.access_key

    @property
    def secret_key(self) -> str:
        """The S3 key's secret."""
        return self.access.secret_key


async def open_storage(access: StorageAccess, bucket: str) -> Storage:
    """A bucket of the S3 server at `access`."""
    return await Storage.open(access.endpoint_url, bucket, access.access_key, access.secret_key, "us-east-1")


@asynccontextmanager
async def private_postgres() -> AsyncIterator[tuple[EmbeddedPostgres, str]]:
    """A PostgreSQL that a test may break, and its URL; it comes up again by itself."""
    data_dir = await asyncio.to_thread(_new_data_dir)
    postgres = EmbeddedPostgres(data_dir)
    try:
        yield postgres, await postgres.start()
    finally:
        await postgres.stop()
        await asyncio.to_thread(_remove, data_dir)


def _new_data_dir() -> Path:
    data_dir = Path(tempfile.mkdtemp(prefix="servers-", dir=_quick_place()))
    data_dir.chmod(0o711)  # a PostgreSQL that root starts runs as nobody, who has to get in
    return data_dir


def _remove(data_dir: Path) -> None:
    home = cluster_of(data_dir).parent
    if home.parent == PUBLIC_HOME:
        shutil.rmtree(home)
    shutil.rmtree(data_dir)


def _quick_place() -> Path | None:
    """Memory where there is plenty: a database is made and dropped for every test."""
    if (
        MEMORY.is_dir()
        and os.access(MEMORY, os.W_OK)
        and shutil.disk_usage(MEMORY).free > MEMORY_NEEDED_BYTES
    ):
        return MEMORY
    return None


def cluster_of(data_dir: Path) -> Path:
    """Where the private PostgreSQL of this data folder keeps its files."""
    home = json.loads((data_dir / "postgres.json").read_text())["home"]
    return Path(home or data_dir) / "postgres"


@pytest.fixture(scope="session")
def servers() -> Iterator[Servers]:
    """This test process's own PostgreSQL and S3 server."""
    started = Servers.start()
    yield started
    started.stop()


@pytest.fixture
async def database(servers: Servers) -> AsyncIterator[Database]:
    """A fresh, empty database."""
    url = await servers.new_database()
    opened = await Database.open(url)
    yield opened
    await opened.close()
    await servers.drop_database(url)


@pytest.fixture
async def storage(servers: Servers) -> AsyncIterator[Storage]:
    """A fresh, empty bucket."""
    opened = await open_storage(servers.access, await servers.new_bucket())
    yield opened
    await opened.close()
