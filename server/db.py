"""The database: transactions, single statements, migrations, over a pool that heals by itself.

Connections carry no state of a session: no SET, LISTEN or advisory lock outlives a statement on a
pooled one, since the pool sends no reset query when it takes a connection back.
"""

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any

from server.claim import LOCK_SPACE, Claim, SecondInstance
from server.pg import (
    CONNECT_TIMEOUT_S,
    CheckViolation,
    DatabaseUnavailable,
    ForeignKeyViolation,
    PostgresError,
    Record,
    UniqueViolation,
    connect,
    make_pool,
    one_line,
    terminate,
    translated,
)

__all__ = [
    "CheckViolation",
    "CommitUnknown",
    "Database",
    "DatabaseUnavailable",
    "ForeignKeyViolation",
    "MigrationFault",
    "Record",
    "SecondInstance",
    "Tx",
    "UniqueViolation",
    "answers",
]

if TYPE_CHECKING:
    from server.pg import Pool, Pooled

log = logging.getLogger(__name__)

RELEASE_TIMEOUT_S = 1.0
PING_TIMEOUT_S = 2.0
CLOSE_TIMEOUT_S = 5.0
MIGRATION_TIMEOUT_S = 600.0

_MIGRATION_LOCK = 2


class CommitUnknown(DatabaseUnavailable):
    """The database broke off during COMMIT: the transaction may stand or not."""


class MigrationFault(Exception):
    """The schema does not fit this program: a migration was edited, failed, or is newer."""


async def answers(url: str) -> bool:
    """Whether a database accepts connections at `url` now."""
    try:
        connection = await connect(url, "probe")
    except DatabaseUnavailable:
        return False
    terminate(connection)
    return True


class Tx:
    """One open transaction. Not for concurrent use; dead once its `async with` block is left."""

    def __init__(self, connection: "Pooled") -> None:
        self._open: Pooled | None = connection
        self._acts: list[Callable[[], None]] = []
        self._doubts: list[Callable[[], None]] = []
        self._committed = False
        self._in_doubt = False

    @property
    def _connection(self) -> "Pooled":
        if self._open is None:
            raise RuntimeError("this transaction is over")
        return self._open

    async def fetch(self, sql: str, *args: Any, timeout_s: float | None = None) -> list[Record]:
        """All rows of one statement."""
        connection = self._connection
        with translated(connection):
            return await connection.fetch(sql, *args, timeout=timeout_s)

    async def fetchrow(self, sql: str, *args: Any) -> Record | None:
        """The first row of one statement, or None."""
        connection = self._connection
        with translated(connection):
            return await connection.fetchrow(sql, *args)

    async def fetchval(self, sql: str, *args: Any) -> Any:
        """The first column of the first row, or None."""
        connection = self._connection
        with translated(connection):
            return await connection.fetchval(sql, *args)

    async def execute(self, sql: str, *args: Any, timeout_s: float | None = None) -> str:
        """Run one statement (several, when there are no arguments); answers its command tag."""
        connection = self._connection
        with translated(connection):
            return await connection.execute(sql, *args, timeout=timeout_s)

    async def executemany(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """Run one statement for each row of arguments, in one go."""
        connection = self._connection
        with translated(connection):
            await connection.executemany(sql, rows)

    def after_commit(self, act: Callable[[], None]) -> None:
        """Run `act` once the COMMIT has succeeded, in the order given, never otherwise.

        A doorbell, not a mailbox: what must not be lost belongs in a row.
        """
        self._acts.append(act)

    def in_doubt(self, act: Callable[[], None]) -> None:
        """Run `act` where the database breaks off during COMMIT: what memory holds may be out of date."""
        self._doubts.append(act)

    async def _commit(self) -> None:
        """COMMIT to its end: a cancellation takes effect only when the outcome is known."""
        commit = asyncio.create_task(self._send_commit(self._connection))
        try:
            await asyncio.shield(commit)
        except asyncio.CancelledError:
            await asyncio.wait([commit])
            if not commit.cancelled() and (error := commit.exception()):
                log.warning("a cancelled transaction did not commit: %s", error)
            raise
        finally:
            self._in_doubt = not commit.done() or (
                not commit.cancelled() and isinstance(commit.exception(), CommitUnknown)
            )

    async def _send_commit(self, connection: "Pooled") -> None:
        try:
            with translated(connection):
                outcome = await connection.execute("COMMIT")
        except DatabaseUnavailable as error:
            raise CommitUnknown(str(error)) from error
        if outcome != "COMMIT":
            raise RuntimeError("nothing was written: a failed statement of this transaction was caught")
        self._committed = True

    async def _rollback(self) -> None:
        connection = self._connection
        try:
            await connection.execute("ROLLBACK", timeout=RELEASE_TIMEOUT_S)
        except BaseException as error:
            terminate(connection)  # the server rolls back what it loses sight of
            if not isinstance(error, Exception):
                raise

    def _ring(self) -> None:
        for act in self._acts if self._committed else self._doubts if self._in_doubt else ():
            try:
                act()
            except Exception:
                log.exception("a doorbell failed after its transaction")


class Database:
    """A pool of connections to one database, which heals by itself when the database is back."""

    def __init__(self, url: str, pool: "Pool") -> None:
        self._url = url
        self._pool = pool
        self._inside: set[asyncio.Task[Any]] = set()  # tasks with an open transaction
        self._claim: Claim | None = None
        self.claim_lost = asyncio.Event()

    @classmethod
    async def open(cls, url: str, *, pool_size: int = 10) -> "Database":
        """Connect to `url` (postgresql://…). Raises DatabaseUnavailable when nothing answers there."""
        with translated():
            pool = make_pool(url, pool_size)
            try:
                async with asyncio.timeout(2 * CONNECT_TIMEOUT_S):
                    await pool
                    await pool.fetchval("SELECT 1")
            except BaseException:
                pool.terminate()
                raise
        return cls(url, pool)

    @property
    def size(self) -> int:
        """Connections open now."""
        return self._pool.get_size()

    @property
    def idle(self) -> int:
        """Connections open and unused now."""
        return self._pool.get_idle_size()

    @property
    def limit(self) -> int:
        """The most connections the pool will open."""
        return self._pool.get_max_size()

    @asynccontextmanager
    async def _connection(self) -> AsyncIterator["Pooled"]:
        if asyncio.current_task() in self._inside:
            raise RuntimeError("use the open transaction: a second connection may wait for it for ever")
        if self._claim is not None and not self._claim.held:
            raise DatabaseUnavailable("the single-instance lock is being regained")
        with translated():
            connection = await self._pool.acquire(timeout=CONNECT_TIMEOUT_S)
        try:
            yield connection
        finally:
            try:
                await self._pool.release(connection, timeout=RELEASE_TIMEOUT_S)
            except Exception as error:  # whatever was done is done, and asyncpg has dropped the connection
                log.warning("a database connection was dropped: %s", one_line(error))

    @asynccontextmanager
    async def transaction(self) -> AsyncIterator[Tx]:
        """BEGIN … COMMIT, or ROLLBACK when the block raises.

        Opening a second one, or asking the database past this one, from the same task is a
        RuntimeError. Raises DatabaseUnavailable, and CommitUnknown when that happened during COMMIT.
        """
        task = asyncio.current_task()
        assert task is not None
        tx: Tx | None = None
        try:
            async with self._connection() as connection:
                tx = Tx(connection)
                await tx.execute("BEGIN")
                self._inside.add(task)
                try:
                    yield tx
                except BaseException:
                    await tx._rollback()
                    raise
                else:
                    await tx._commit()
                finally:
                    self._inside.discard(task)
                    tx._open = None
        finally:
            if tx is not None:
                tx._ring()

    async def fetch(self, sql: str, *args: Any) -> list[Record]:
        """All rows of one statement, on its own."""
        async with self._connection() as connection:
            with translated(connection):
                return await connection.fetch(sql, *args)

    async def fetchrow(self, sql: str, *args: Any) -> Record | None:
        """The first row of one statement on its own, or None."""
        async with self._connection() as connection:
            with translated(connection):
                return await connection.fetchrow(sql, *args)

    async def fetchval(self, sql: str, *args: Any) -> Any:
        """The first column of the first row of one statement on its own, or None."""
        async with self._connection() as connection:
            with translated(connection):
                return await connection.fetchval(sql, *args)

    async def execute(self, sql: str, *args: Any) -> str:
        """Run one statement on its own; answers its command tag."""
        async with self._connection() as connection:
            with translated(connection):
                return await connection.execute(sql, *args)

    async def migrate(self, owner: str, steps: Sequence[str]) -> None:
        """Bring `owner`'s tables up to date: run the steps this database has not seen, in order.

        `steps` is append-only; each runs in its own transaction and is remembered with its
        checksum. Raises MigrationFault, in one line, when a step was edited after it ran, fails, or
        the database has seen more steps than there are.
        """
        checksums = [hashlib.sha256(step.strip().encode()).hexdigest() for step in steps]
        async with self._migration() as tx:
            await tx.execute(
                "CREATE TABLE IF NOT EXISTS schema_migrations (owner text, number int,"
                " checksum text NOT NULL, applied_at timestamptz NOT NULL DEFAULT now(),"
                " PRIMARY KEY (owner, number))"
            )
            rows = await tx.fetch(
                "SELECT number, checksum FROM schema_migrations WHERE owner = $1 ORDER BY number", owner
            )
        if len(rows) > len(steps):
            raise MigrationFault(
                f"the database is newer than this program: {owner} has migration {len(rows)},"
                f" the program knows {len(steps)}"
            )
        for row, checksum in zip(rows, checksums, strict=False):
            if row["checksum"] != checksum:
                raise MigrationFault(f"{owner} migration {row['number']} was edited after it was applied")
        for number in range(len(rows) + 1, len(steps) + 1):
            await self._apply(owner, number, steps[number - 1], checksums[number - 1])

    async def migrations_of(self, owner: str) -> int:
        """How many of `owner`'s migrations this database has seen."""
        if await self.fetchval("SELECT to_regclass('schema_migrations')") is None:
            return 0
        seen: int = await self.fetchval("SELECT count(*) FROM schema_migrations WHERE owner = $1", owner)
        return seen

    async def _apply(self, owner: str, number: int, step: str, checksum: str) -> None:
        try:
            async with self._migration() as tx:
                await tx.execute(
                    "INSERT INTO schema_migrations (owner, number, checksum) VALUES ($1, $2, $3)",
                    owner,
                    number,
                    checksum,
                )
                await tx.execute(step, timeout_s=MIGRATION_TIMEOUT_S)
        except PostgresError as error:
            raise MigrationFault(f"{owner} migration {number} failed: {one_line(error)}") from error
        log.info("applied %s migration %d", owner, number)

    @asynccontextmanager
    async def _migration(self) -> AsyncIterator[Tx]:
        async with self.transaction() as tx:
            await tx.execute(f"SET LOCAL statement_timeout = {MIGRATION_TIMEOUT_S * 1000:.0f}")
            await tx.execute(
                f"SELECT pg_advisory_xact_lock({LOCK_SPACE}, {_MIGRATION_LOCK})",
                timeout_s=MIGRATION_TIMEOUT_S,
            )
            yield tx

    async def claim(self, holder: str) -> None:
        """Become the one server of this database until `close`. Raises SecondInstance.

        `holder` says who we are to the next one that tries: process id, machine and address in at
        most 63 bytes. When the lock is lost, because the database restarted or the line broke,
        every statement is refused as DatabaseUnavailable until it is held again; when somebody
        else took it meanwhile, `claim_lost` is set and the server has to stop.
        """
        claim = Claim(self._url, holder, self.claim_lost)
        await claim.take()
        self._claim = claim

    async def ping(self) -> None:
        """Raises DatabaseUnavailable unless the database answers within two seconds."""
        try:
            async with asyncio.timeout(PING_TIMEOUT_S):
                await self.fetchval("SELECT 1")
        except TimeoutError:
            raise DatabaseUnavailable(f"no answer within {PING_TIMEOUT_S:.0f} s") from None

    async def close(self) -> None:
        """Wait a little for statements under way, then let go of every connection and the claim."""
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT_S):
                await self._pool.close()
        except Exception as error:
            log.warning("database connections were cut off: %s", one_line(error))
        finally:
            self._pool.terminate()
            if self._claim is not None:
                await self._claim.release()
