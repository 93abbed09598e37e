"""The private servers: that they start anywhere, keep what they were given, and never stay behind."""

import asyncio
import json
import os
import shutil
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import aiohttp
import pytest

from server.db import Database, DatabaseUnavailable, SecondInstance
from server.embedded import LOG_LIMIT_BYTES, DataDirLock, EmbeddedFault, free_ports, open_log
from server.embedded_postgres import PUBLIC_HOME, EmbeddedPostgres, known_url
from server.embedded_storage import EmbeddedStorage
from server.storage import Storage, StorageUnavailable
from tests.servers import cluster_of, open_storage

CONTROLLER = """
import asyncio, sys
from pathlib import Path
from server.db import Database
from server.embedded import DataDirLock
from server.embedded_postgres import EmbeddedPostgres
from server.embedded_storage import EmbeddedStorage
from server.storage import Storage

async def main(data_dir):
    lock = DataDirLock(data_dir)
    lock.acquire("http://127.0.0.1:1")
    postgres, storage = EmbeddedPostgres(data_dir), EmbeddedStorage(data_dir)
    url, access = await asyncio.gather(postgres.start(), storage.start())
    database = await Database.open(url)
    await database.execute("CREATE TABLE kept (id int)")
    await database.execute("INSERT INTO kept VALUES (1)")
    objects = await Storage.open(
        access.endpoint_url, "kept", access.access_key, access.secret_key, "us-east-1"
    )
    await objects.put("kept", b"kept", "text/plain")
    print(postgres.pid, storage.pid, flush=True)
    await asyncio.sleep(600)

run = __import__(sys.argv[2]).run
run(main(Path(sys.argv[1])))
"""


@pytest.fixture
def data_dir() -> Iterator[Path]:
    """A folder anybody may pass through, with a name that wants quoting."""
    folder = Path(tempfile.mkdtemp(prefix="embedded-"))
    folder.chmod(0o711)
    yield folder / 'it\'s a "folder", 100%'
    shutil.rmtree(folder)


@pytest.fixture(scope="session")
def cluster() -> Iterator[Path]:
    """A data folder whose PostgreSQL was started once and stopped."""
    folder = Path(tempfile.mkdtemp(prefix="embedded-"))
    folder.chmod(0o711)

    async def make() -> None:
        postgres = EmbeddedPostgres(folder / "data")
        await postgres.start()
        await postgres.stop()

    asyncio.run(make())
    yield folder / "data"
    shutil.rmtree(folder)


@pytest.fixture
def ready(cluster: Path, data_dir: Path) -> Path:
    """A copy of that folder for one test."""
    subprocess.run(["cp", "-a", cluster, data_dir], check=True)
    return data_dir


@asynccontextmanager
async def running(postgres: EmbeddedPostgres) -> AsyncIterator[Database]:
    database = await Database.open(await postgres.start())
    try:
        yield database
    finally:
        await database.close()
        await postgres.stop()


@asynccontextmanager
async def storing(server: EmbeddedStorage) -> AsyncIterator[Storage]:
    storage = await open_storage(await server.start(), "cloudphone")
    try:
        yield storage
    finally:
        await storage.close()
        await server.stop()


def is_alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


async def where(data_dir: Path) -> Path:
    return await asyncio.to_thread(cluster_of, data_dir)


async def until(holds: Callable[[], bool], limit_s: float = 10.0) -> None:
    deadline = time.monotonic() + limit_s
    while not holds():
        assert time.monotonic() < deadline
        await asyncio.sleep(0.02)


async def heals(ask: Callable[[], Awaitable[object]], fault: type[Exception], limit_s: float = 15.0) -> None:
    deadline = time.monotonic() + limit_s
    while True:
        try:
            await ask()
            return
        except fault:
            assert time.monotonic() < deadline
            await asyncio.sleep(0.05)


async def test_the_second_start_is_quick_and_finds_everything(data_dir: Path) -> None:
    async with running(EmbeddedPostgres(data_dir)) as database:
        await database.execute("CREATE TABLE kept AS SELECT lower('ÄÖÜ') AS name")
    began = time.monotonic()
    async with running(EmbeddedPostgres(data_dir)) as database:
        assert time.monotonic() - began < 2
        assert await database.fetchval("SELECT name FROM kept") == "äöü"


@pytest.mark.parametrize("loop", ["asyncio", "uvloop"])
async def test_a_killed_server_takes_its_children_along_and_loses_nothing(data_dir: Path, loop: str) -> None:
    controller = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CONTROLLER, str(data_dir), loop, stdout=subprocess.PIPE
    )
    try:
        assert controller.stdout is not None
        pids = [int(word) for word in (await controller.stdout.readline()).split()]
        assert len(pids) == 2
        with pytest.raises(SecondInstance, match=f"pid {controller.pid}, http://127.0.0.1:1, since 20"):
            await asyncio.to_thread(DataDirLock(data_dir).acquire, "http://127.0.0.1:2")
    finally:
        controller.kill()
        await controller.wait()
    await until(lambda: not any(map(is_alive, pids)))
    with DataDirLock(data_dir) as lock:
        await asyncio.to_thread(lock.acquire, "http://127.0.0.1:2")
        async with running(EmbeddedPostgres(data_dir)) as database:
            assert await database.fetchval("SELECT count(*) FROM kept") == 1
        server = EmbeddedStorage(data_dir)
        storage = await open_storage(await server.start(), "kept")
        assert await storage.get("kept") == b"kept"
        await storage.close()
        await server.stop()


async def test_children_that_outlived_their_server_are_ended_first(ready: Path) -> None:
    """As where the kernel does not tell children of their parent's death."""
    left = EmbeddedPostgres(ready)
    await left.start()
    pid = left.pid
    assert pid is not None
    assert left._child is not None
    assert left._child._watcher is not None
    left._child._watcher.cancel()  # nobody watches it any more
    async with running(EmbeddedPostgres(ready)) as database:
        assert not is_alive(pid)
        await database.ping()
    assert "not properly shut down" not in (ready / "logs" / "postgres.log").read_text()


async def test_a_killed_postmaster_is_started_again_and_the_database_heals(ready: Path) -> None:
    postgres = EmbeddedPostgres(ready)
    async with running(postgres) as database:
        await database.claim("pid 1 on box")
        await database.execute("CREATE TABLE kept AS SELECT 1 AS id")
        flight = asyncio.create_task(database.fetch("SELECT pg_sleep(4)"))
        await asyncio.sleep(0.1)
        pid = postgres.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        with pytest.raises(DatabaseUnavailable):
            await flight
        await heals(lambda: database.fetch("SELECT id FROM kept"), DatabaseUnavailable)
        assert postgres.pid not in (pid, None)
        assert not database.claim_lost.is_set()


async def test_a_killed_s3_server_is_started_again_on_its_port(data_dir: Path) -> None:
    server = EmbeddedStorage(data_dir)
    async with storing(server) as storage:
        await storage.put("kept", b"kept", "text/plain")
        pid = server.pid
        assert pid is not None
        os.kill(pid, signal.SIGKILL)
        await until(lambda: server.pid not in (pid, None))
        await heals(lambda: storage.put("new", b"new", "text/plain"), StorageUnavailable)
        assert await storage.get("kept") == b"kept"


async def test_nothing_is_left_running_after_a_stop(ready: Path) -> None:
    postgres = EmbeddedPostgres(ready)
    storage = EmbeddedStorage(ready)
    await asyncio.gather(postgres.start(), storage.start())
    pids = [postgres.pid, storage.pid]
    assert all(
        pid is not None and os.getsid(pid) == pid != os.getsid(0) for pid in pids
    )  # Ctrl-C is ours alone
    await asyncio.gather(postgres.stop(), storage.stop())
    assert not any(is_alive(pid) for pid in pids if pid is not None)
    assert not ((await where(ready)) / "postmaster.pid").exists()
    assert not list(ready.glob("*.pid"))


@pytest.mark.parametrize("folder", ["one, two", "a-rather-long-folder-name/" * 5])
async def test_a_path_no_socket_address_can_hold_gets_a_port(ready: Path, folder: str) -> None:
    (ready.parent / folder).mkdir(parents=True)
    ready = ready.rename(ready.parent / folder / "data")
    async with running(EmbeddedPostgres(ready)) as database:
        await database.ping()
        url = await asyncio.to_thread(known_url, ready)
    assert url is not None
    query = parse_qs(urlsplit(url).query)
    assert query["host"] == ["127.0.0.1"]
    # The port is kept while it is free, and given up when it is not.
    with socket.create_server(("127.0.0.1", int(query["port"][0]))):
        async with running(EmbeddedPostgres(ready)) as database:
            await database.ping()
            assert await asyncio.to_thread(known_url, ready) != url


async def test_ports_somebody_took_are_chosen_anew_and_the_objects_are_still_there(data_dir: Path) -> None:
    server = EmbeddedStorage(data_dir)
    async with storing(server) as storage:
        await storage.put("kept", b"kept", "text/plain")
        ports = json.loads((data_dir / "storage.json").read_text())["ports"]
    with socket.create_server(("127.0.0.1", ports[0])):
        async with storing(EmbeddedStorage(data_dir)) as storage:
            assert await storage.get("kept") == b"kept"
            assert not set(json.loads((data_dir / "storage.json").read_text())["ports"]) & {ports[0]}


async def test_secrets_are_private_and_inner_ports_closed_to_strangers(data_dir: Path) -> None:
    server = EmbeddedStorage(data_dir)
    postgres = EmbeddedPostgres(data_dir)
    async with running(postgres), storing(server) as storage:
        await storage.put("private", b"private", "text/plain")
        facts = json.loads((data_dir / "storage.json").read_text())
        secrets = [facts["secret_key"], facts["inner_key"]]
        secrets.append(json.loads((data_dir / "postgres.json").read_text())["password"])
        for path in (data_dir / "storage.json", data_dir / "postgres.json", data_dir / "storage" / "s3.json"):
            assert stat.S_IMODE(path.stat().st_mode) == 0o600
        for pid in (server.pid, postgres.pid):
            shown = Path(f"/proc/{pid}/cmdline").read_text() + Path(f"/proc/{pid}/environ").read_text()
            assert not any(secret in shown for secret in secrets)
        async with aiohttp.ClientSession() as http:
            for port in facts["ports"][2:7:2]:  # volume, filer, S3
                async with http.get(f"http://127.0.0.1:{port}/buckets/cloudphone/private") as answer:
                    assert answer.status in (400, 401, 403, 404), port
        said = "".join(path.read_text() for path in (data_dir / "logs").iterdir())
        assert not any(secret in said for secret in secrets)


async def test_a_closed_folder_above_stays_closed(data_dir: Path) -> None:
    """Whoever starts the server: root's PostgreSQL, which runs as nobody, goes where nobody may go."""
    data_dir.mkdir()
    data_dir.chmod(0o700)
    data = data_dir / "data"
    async with running(EmbeddedPostgres(data)) as database:
        await database.execute("CREATE TABLE kept AS SELECT 1 AS id")
    async with running(EmbeddedPostgres(data)) as database:
        assert await database.fetchval("SELECT id FROM kept") == 1
    assert stat.S_IMODE(data_dir.stat().st_mode) == 0o700
    home = (await where(data)).parent
    if home.parent == PUBLIC_HOME:
        shutil.rmtree(home)
    assert (home.parent == PUBLIC_HOME) == (os.geteuid() == 0)
    assert (home == data) == (os.geteuid() != 0)


async def test_a_lock_file_that_names_a_stranger_does_not_stop_the_start(ready: Path) -> None:
    cluster = await where(ready)
    owner = cluster.stat().st_uid
    stranger = await asyncio.create_subprocess_exec(
        "sleep", "60", user=owner if os.geteuid() == 0 else None, cwd="/"
    )
    try:
        lock = cluster / "postmaster.pid"
        lock.write_text(f"{stranger.pid}\n{cluster}\n1700000000\n5432\n{cluster}\n\n\nready\n")
        os.chown(lock, owner, -1)
        async with running(EmbeddedPostgres(ready)) as database:
            await database.ping()
        assert stranger.returncode is None
    finally:
        stranger.kill()
        await stranger.wait()


async def test_a_damaged_cluster_is_one_line_that_names_the_log(ready: Path) -> None:
    ((await where(ready)) / "global" / "pg_control").write_bytes(b"")
    postgres = EmbeddedPostgres(ready)
    with pytest.raises(EmbeddedFault) as fault:
        await postgres.start()
    assert "\n" not in str(fault.value)
    assert "pg_control" in str(fault.value)
    assert str(ready / "logs" / "postgres.log") in str(fault.value)
    assert postgres.pid is None


async def test_a_folder_that_is_no_cluster_is_left_alone(data_dir: Path) -> None:
    (data_dir / "postgres").mkdir(parents=True)
    (data_dir / "postgres" / "thesis.txt").write_text("do not lose")
    with pytest.raises(EmbeddedFault) as fault:
        await EmbeddedPostgres(data_dir).start()
    assert "\n" not in str(fault.value)
    assert (data_dir / "postgres" / "thesis.txt").read_text() == "do not lose"


async def test_an_unusable_data_folder_is_one_line(data_dir: Path) -> None:
    data_dir.write_text("a file")
    for server in (EmbeddedPostgres(data_dir), EmbeddedStorage(data_dir)):
        with pytest.raises(EmbeddedFault) as fault:
            await server.start()
        assert "\n" not in str(fault.value)


async def test_a_cluster_of_a_version_that_is_not_installed_is_one_line(ready: Path) -> None:
    ((await where(ready)) / "PG_VERSION").write_text("9\n")
    with pytest.raises(EmbeddedFault, match="made by PostgreSQL 9"):
        await EmbeddedPostgres(ready).start()


def test_a_second_server_is_told_who_has_the_folder(data_dir: Path) -> None:
    first = DataDirLock(data_dir)
    first.acquire("http://127.0.0.1:8080")
    first.announce("http://127.0.0.1:8081")
    with pytest.raises(SecondInstance) as refusal:
        DataDirLock(data_dir).acquire("http://127.0.0.1:9090")
    assert f"pid {os.getpid()}, http://127.0.0.1:8081, since 20" in str(refusal.value)
    assert "\n" not in str(refusal.value)
    first.release()
    with DataDirLock(data_dir) as second:
        second.acquire("http://127.0.0.1:9090")


def test_a_log_does_not_grow_without_end(data_dir: Path) -> None:
    log_file = data_dir / "logs" / "postgres.log"
    _, output = open_log(log_file)
    with output:
        output.write(b"x" * (LOG_LIMIT_BYTES + 1))
        output.flush()
        _, again = open_log(log_file)
        again.close()
        assert log_file.stat().st_size == 0
        output.write(b"next\n")
        output.flush()
    assert log_file.read_bytes() == b"next\n"
    assert sorted(path.name for path in log_file.parent.iterdir()) == ["postgres.log", "postgres.log.1"]


def test_preferred_ports_are_kept_while_they_are_free() -> None:
    ports = free_ports(3)
    assert len(set(ports)) == 3
    assert free_ports(3, ports) == ports
    with socket.create_server(("127.0.0.1", ports[1])):
        assert ports[1] not in free_ports(3, ports)
