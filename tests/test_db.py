"""The database door, on a real PostgreSQL: what commits, what is undone, and what a fault looks like."""

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from uuid import UUID, uuid4

import asyncpg
import pytest

from server.db import (
    CheckViolation,
    CommitUnknown,
    Database,
    DatabaseUnavailable,
    MigrationFault,
    SecondInstance,
    UniqueViolation,
    answers,
)
from server.pg import translated
from tests.servers import Servers

NOTES = "CREATE TABLE notes (id int PRIMARY KEY, text text CONSTRAINT notes_short CHECK (length(text) < 10))"


@pytest.fixture
async def notes(database: Database) -> Database:
    """A database with an empty table."""
    await database.execute(NOTES)
    return database


async def count(database: Database) -> int:
    return int(await database.fetchval("SELECT count(*) FROM notes"))


async def test_a_transaction_commits_and_then_rings_its_doorbells_in_order(notes: Database) -> None:
    rung: list[str] = []

    def look() -> None:
        rung.append(f"{notes.size - notes.idle} in use")

    async with notes.transaction() as tx:
        await tx.execute("INSERT INTO notes VALUES ($1, $2)", 1, "one")
        tx.in_doubt(lambda: rung.append("in doubt"))
        tx.after_commit(look)
        tx.after_commit(lambda: rung.append("second"))
        assert rung == []
    assert rung == ["0 in use", "second"]
    assert await count(notes) == 1


async def test_a_failed_transaction_leaves_nothing_and_rings_nothing(notes: Database) -> None:
    rung: list[str] = []
    with pytest.raises(LookupError):
        async with notes.transaction() as tx:
            await tx.execute("INSERT INTO notes VALUES (1, 'one')")
            tx.after_commit(lambda: rung.append("rung"))
            raise LookupError
    assert await count(notes) == 0
    assert rung == []


async def test_a_broken_doorbell_does_not_undo_or_silence_the_others(notes: Database) -> None:
    rung: list[str] = []
    async with notes.transaction() as tx:
        await tx.execute("INSERT INTO notes VALUES (1, 'one')")
        tx.after_commit(lambda: rung.remove("nothing"))
        tx.after_commit(lambda: rung.append("rung"))
    assert rung == ["rung"]
    assert await count(notes) == 1


async def test_violations_come_through_with_their_constraint(notes: Database) -> None:
    await notes.execute("INSERT INTO notes VALUES (1, 'one')")
    with pytest.raises(UniqueViolation) as taken:
        await notes.execute("INSERT INTO notes VALUES (1, 'two')")
    assert taken.value.constraint_name == "notes_pkey"
    with pytest.raises(CheckViolation) as long:
        async with notes.transaction() as tx:
            await tx.execute("INSERT INTO notes VALUES (2, 'much too long')")
    assert long.value.constraint_name == "notes_short"


async def test_a_transaction_whose_failure_was_swallowed_says_that_it_wrote_nothing(notes: Database) -> None:
    with pytest.raises(RuntimeError, match="nothing was written"):
        async with notes.transaction() as tx:
            await tx.execute("INSERT INTO notes VALUES (1, 'one')")
            with contextlib.suppress(UniqueViolation):
                await tx.execute("INSERT INTO notes VALUES (1, 'two')")
    assert await count(notes) == 0


async def test_one_task_cannot_take_a_second_connection_within_its_transaction(notes: Database) -> None:
    with pytest.raises(RuntimeError, match="open transaction"):
        async with notes.transaction(), notes.transaction():
            pass
    with pytest.raises(RuntimeError, match="open transaction"):
        async with notes.transaction():
            await notes.fetch("SELECT 1")
    async with notes.transaction() as tx:
        other_task = asyncio.create_task(count(notes))
        await tx.execute("INSERT INTO notes VALUES (1, 'one')")
        assert await other_task == 0
    with pytest.raises(RuntimeError, match="over"):
        await tx.fetch("SELECT 1")


async def test_values_come_back_as_python_knows_them(database: Database) -> None:
    document = {"a": [1, None, "ü"], "b": {"c": True}}
    moment = datetime(2026, 1, 2, 3, 4, 5, tzinfo=UTC)
    key = uuid4()
    row = await database.fetchrow(
        "SELECT $1::jsonb AS document, $2::timestamptz AS moment, $3::uuid AS key, $1::jsonb -> 'a' AS part",
        document,
        moment,
        key,
    )
    assert row is not None
    assert row["document"] == document
    assert row["part"] == [1, None, "ü"]
    assert row["moment"] == moment
    assert row["moment"].utcoffset().total_seconds() == 0
    assert row["key"] == key
    assert isinstance(row["key"], UUID)


async def test_a_cancelled_transaction_leaves_nothing_and_its_connection_is_usable(notes: Database) -> None:
    async def write_and_wait() -> None:
        async with notes.transaction() as tx:
            await tx.execute("INSERT INTO notes VALUES (1, 'one')")
            await tx.execute("SELECT pg_sleep(3)")

    tasks = [asyncio.create_task(write_and_wait()) for _ in range(12)]
    await asyncio.sleep(0.1)
    for task in tasks:
        task.cancel()
    outcomes = await asyncio.gather(*tasks, return_exceptions=True)
    assert all(isinstance(outcome, asyncio.CancelledError) for outcome in outcomes)
    assert await asyncio.gather(*(count(notes) for _ in range(20))) == [0] * 20


async def test_a_cancellation_during_commit_waits_until_the_outcome_is_known(notes: Database) -> None:
    # A deferred trigger makes COMMIT itself take its time.
    await notes.execute(
        "CREATE FUNCTION dawdle() RETURNS trigger LANGUAGE plpgsql AS"
        " $$ BEGIN PERFORM pg_sleep(0.3); RETURN NULL; END $$"
    )
    await notes.execute(
        "CREATE CONSTRAINT TRIGGER slow AFTER INSERT ON notes DEFERRABLE INITIALLY DEFERRED"
        " FOR EACH ROW EXECUTE FUNCTION dawdle()"
    )
    rung: list[str] = []

    async def write() -> None:
        async with notes.transaction() as tx:
            await tx.execute("INSERT INTO notes VALUES (1, 'one')")
            tx.after_commit(lambda: rung.append("rung"))

    task = asyncio.create_task(write())
    await asyncio.sleep(0.15)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert rung == ["rung"]
    assert await count(notes) == 1


async def test_a_deadlock_is_a_temporary_fault(notes: Database) -> None:
    await notes.execute("INSERT INTO notes VALUES (1, 'one'), (2, 'two')")
    met = asyncio.Barrier(2)

    async def lock(first: int, second: int) -> None:
        async with notes.transaction() as tx:
            await tx.execute("UPDATE notes SET text = 'x' WHERE id = $1", first)
            await met.wait()
            await tx.execute("UPDATE notes SET text = 'y' WHERE id = $1", second)

    outcomes = await asyncio.gather(lock(1, 2), lock(2, 1), return_exceptions=True)
    assert sorted(type(outcome).__name__ for outcome in outcomes) == ["DatabaseUnavailable", "NoneType"]


async def test_migrations_run_once_in_order_and_are_remembered(database: Database) -> None:
    steps = [NOTES, "INSERT INTO notes VALUES (1, 'one'); INSERT INTO notes VALUES (2, 'two')"]
    await database.migrate("notes", steps)
    await database.migrate("notes", steps)
    assert await count(database) == 2
    await database.migrate("notes", [*steps, "DELETE FROM notes WHERE id = 1"])
    assert await count(database) == 1
    await database.migrate("others", ["CREATE TABLE others (id int)"])
    assert await database.fetchval("SELECT count(*) FROM schema_migrations") == 4


async def test_an_edited_or_newer_migration_refuses_the_start(database: Database) -> None:
    await database.migrate("notes", [NOTES, "INSERT INTO notes VALUES (1, 'one')"])
    with pytest.raises(MigrationFault, match="notes migration 2 was edited"):
        await database.migrate("notes", [NOTES, "INSERT INTO notes VALUES (1, 'eins')"])
    with pytest.raises(MigrationFault, match="newer than this program: notes has migration 2"):
        await database.migrate("notes", [NOTES])
    assert await count(database) == 1


async def test_a_failing_migration_leaves_nothing_of_itself(database: Database) -> None:
    with pytest.raises(MigrationFault, match="notes migration 2 failed: PostgresSyntaxError"):
        await database.migrate("notes", [NOTES, "INSERT INTO notes VALUES (1, 'one'); INSERT oops"])
    assert await count(database) == 0
    await database.migrate("notes", [NOTES, "INSERT INTO notes VALUES (1, 'one')"])
    assert await count(database) == 1


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nobody waits long for a lock."""
    monkeypatch.setattr("server.claim.PATIENCE_S", 0.3)


@pytest.mark.usefixtures("impatient")
async def test_a_second_instance_is_refused_by_name_and_admitted_after_the_first(servers: Servers) -> None:
    url = await servers.new_database()
    first, second = await Database.open(url), await Database.open(url)
    await first.claim("pid 4711 on box, http://127.0.0.1:8080")
    with pytest.raises(SecondInstance, match=r"pid 4711 on box, http://127\.0\.0\.1:8080.* since 20"):
        await second.claim("pid 4712 on box, http://127.0.0.1:9090")
    await first.execute("SELECT 1")
    await first.close()
    await second.claim("pid 4712 on box, http://127.0.0.1:9090")
    await second.close()


@pytest.mark.usefixtures("impatient")
async def test_a_broken_claim_is_taken_again(servers: Servers) -> None:
    database = await Database.open(await servers.new_database())
    await database.claim("pid 1 on box")
    before = await database.fetchval(CLAIM_HOLDER)
    await database.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name = 'pid 1 on box'"
    )
    await _eventually_claims_again(database, before)
    assert not database.claim_lost.is_set()
    with pytest.raises(SecondInstance):
        await (other := await Database.open(_url_of(database))).claim("pid 2 on box")
    await other.close()
    await database.close()


@pytest.mark.usefixtures("impatient")
async def test_a_claim_somebody_else_took_meanwhile_is_lost(servers: Servers) -> None:
    url = await servers.new_database()
    first, second = await Database.open(url), await Database.open(url)
    await first.claim("pid 1 on box")
    lock = await second.fetchrow(
        "SELECT pid, classid::int, objid::int FROM pg_locks WHERE locktype = 'advisory'"
    )
    assert lock is not None
    # A rival that queues for the lock has it before the first can come back.
    rival = asyncio.create_task(
        second.fetch("SELECT pg_advisory_lock($1::int, $2::int)", lock["classid"], lock["objid"])
    )
    await asyncio.sleep(0.1)
    await second.execute("SELECT pg_terminate_backend($1)", lock["pid"])
    await rival
    async with asyncio.timeout(10):
        await first.claim_lost.wait()
    with pytest.raises(DatabaseUnavailable):
        await first.execute("SELECT 1")
    await second.execute("SELECT 1")
    await first.close()
    await second.close()


class Wire:
    """A line between the door and PostgreSQL that can be cut, and cuts itself at a word."""

    def __init__(self, server: asyncio.Server, port: int) -> None:
        self._server = server
        self.port = port
        self.cut_at: bytes | None = None
        self.hears = asyncio.Event()
        self.hears.set()
        self._lines: set[asyncio.StreamWriter] = set()

    @classmethod
    @contextlib.asynccontextmanager
    async def to(cls, socket_path: str) -> AsyncIterator["Wire"]:
        pumps: set[asyncio.Task[None]] = set()

        async def carry(near_in: asyncio.StreamReader, near_out: asyncio.StreamWriter) -> None:
            far_in, far_out = await asyncio.open_unix_connection(socket_path)
            wire._lines |= {near_out, far_out}
            for source, target in ((near_in, far_out), (far_in, near_out)):
                pump = asyncio.create_task(wire._pump(source, target))
                pumps.add(pump)

        server = await asyncio.start_server(carry, "127.0.0.1", 0)
        wire = cls(server, server.sockets[0].getsockname()[1])
        try:
            yield wire
        finally:
            server.close()
            wire.cut()
            for pump in pumps:
                pump.cancel()
            await asyncio.gather(*pumps, return_exceptions=True)

    async def _pump(self, source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            while piece := await source.read(65536):
                await self.hears.wait()
                target.write(piece)
                if self.cut_at is not None and self.cut_at in piece:
                    await target.drain()
                    self.cut()
                    return
        target.close()

    def cut(self) -> None:
        for line in self._lines:
            line.transport.abort()
        self._lines.clear()


@contextlib.asynccontextmanager
async def wired(servers: Servers) -> AsyncIterator[tuple[Wire, Database, Database]]:
    """A wire, a database behind it with the table, and the same database past it."""
    url = await servers.new_database()
    head, _, query = url.partition("?")
    folder = query.removeprefix("host=").partition("&")[0].replace("%2F", "/")
    async with Wire.to(f"{folder}/.s.PGSQL.5432") as wire:
        direct = await Database.open(url)
        await direct.execute(NOTES)
        database = await Database.open(f"{head}?host=127.0.0.1&port={wire.port}", pool_size=3)
        yield wire, database, direct
        await database.close()
        await direct.close()


async def test_a_cut_line_is_one_kind_of_fault_and_heals(servers: Servers) -> None:
    async with wired(servers) as (wire, database, direct):
        with pytest.raises(DatabaseUnavailable):
            async with database.transaction() as tx:
                await tx.execute("INSERT INTO notes VALUES (1, 'one')")
                wire.cut()
                await asyncio.sleep(0.01)
                await tx.fetchval("SELECT 1")
        sleeping = [asyncio.create_task(database.fetch("SELECT pg_sleep(2)")) for _ in range(3)]
        await asyncio.sleep(0.1)
        wire.cut()
        outcomes = await asyncio.gather(*sleeping, return_exceptions=True)
        assert [type(outcome) for outcome in outcomes] == [DatabaseUnavailable] * 3
        assert await count(database) == 0
        assert await count(direct) == 0
        assert database.size <= 3


async def test_a_commit_nobody_confirmed_is_unknown(servers: Servers) -> None:
    rung: list[str] = []
    async with wired(servers) as (wire, database, direct):
        with pytest.raises(CommitUnknown):
            async with database.transaction() as tx:
                await tx.execute("INSERT INTO notes VALUES (1, 'one')")
                tx.after_commit(lambda: rung.append("rung"))
                tx.in_doubt(lambda: rung.append("in doubt"))
                wire.cut_at = b"COMMIT"
        wire.cut_at = None
        assert rung == ["in doubt"]
        assert await count(direct) in (0, 1)
        assert await count(database) in (0, 1)


def test_what_a_killed_server_leaves_in_a_call_under_way_is_the_same_fault() -> None:
    """Which of these asyncpg raises depends on the microsecond."""
    for error in (
        asyncpg.InternalClientError("cannot switch to state 12; another operation (2) is in progress"),
        asyncpg.InterfaceError("connection is closed"),
        asyncpg.ConnectionDoesNotExistError("connection was closed in the middle of operation"),
        asyncpg.AdminShutdownError("terminating connection due to administrator command"),
        ConnectionResetError(),
    ):
        with pytest.raises(DatabaseUnavailable), translated():
            raise error
    for mistake in (
        asyncpg.InterfaceError("cannot perform operation: another operation is in progress"),
        asyncpg.DataError("invalid input for query argument $1: 'closed' (an integer is required)"),
    ):
        with pytest.raises(type(mistake)), translated():
            raise mistake


async def test_a_silent_database_is_unavailable_within_seconds_and_heals(servers: Servers) -> None:
    async with wired(servers) as (wire, database, _):
        loop = asyncio.get_running_loop()
        wire.hears.clear()
        began = loop.time()
        with pytest.raises(DatabaseUnavailable):
            await database.ping()
        assert loop.time() - began < 5
        wire.hears.set()
        assert await count(database) == 0


async def test_a_statement_has_a_limit_and_its_connection_survives(database: Database) -> None:
    pid = await database.fetchval("SELECT pg_backend_pid()")
    with pytest.raises(DatabaseUnavailable, match="statement timeout"):
        async with database.transaction() as tx:
            await tx.execute("SET LOCAL statement_timeout = 50")
            await tx.execute("SELECT pg_sleep(1)")
    assert await database.fetchval("SELECT pg_backend_pid()") == pid


async def test_an_exhausted_pool_is_unavailable_not_for_ever(
    servers: Servers, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("server.db.CONNECT_TIMEOUT_S", 0.2)
    database = await Database.open(await servers.new_database(), pool_size=1)
    taken, free = asyncio.Event(), asyncio.Event()

    async def hold() -> None:
        async with database.transaction():
            taken.set()
            await free.wait()

    holding = asyncio.create_task(hold())
    await taken.wait()
    with pytest.raises(DatabaseUnavailable):
        await database.fetch("SELECT 1")
    free.set()
    await holding
    assert await database.fetchval("SELECT 1") == 1
    await database.close()


async def test_nothing_there_is_said_in_one_line() -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        nowhere = f"postgresql://app:hidden-password@127.0.0.1:{probe.getsockname()[1]}/app"
        with pytest.raises(DatabaseUnavailable) as fault:
            await Database.open(nowhere)
        assert not await answers(nowhere)
    assert "\n" not in str(fault.value)
    assert "hidden-password" not in str(fault.value)


async def test_a_wrong_password_or_database_is_said_in_one_line(servers: Servers) -> None:
    url = await servers.new_database()
    head, _, query = url.partition("?")
    user, _, place = head.rpartition("@")
    for wrong in (f"{user}x@{place}?{query}", f"{head}x?{query}", "mysql://nowhere/x"):
        with pytest.raises(DatabaseUnavailable) as fault:
            await Database.open(wrong)
        assert "\n" not in str(fault.value)


def _url_of(database: Database) -> str:
    return database._url


CLAIM_HOLDER = """
    SELECT pid FROM pg_locks JOIN pg_stat_activity USING (pid)
    WHERE locktype = 'advisory' AND granted AND application_name = 'pid 1 on box'
"""


async def _eventually_claims_again(database: Database, before: int) -> None:
    async with asyncio.timeout(10):
        while True:
            try:
                if await database.fetchval(CLAIM_HOLDER) not in {None, before}:
                    return
            except DatabaseUnavailable:
                pass
            await asyncio.sleep(0.02)
