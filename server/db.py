"""The one door to PostgreSQL: pool, transactions, migrations and the single-instance lock.

Nothing else imports asyncpg. What it raises when the database is away, hung or shutting down comes
out as DatabaseUnavailable; constraint violations pass through under the names exported here, with
asyncpg's `constraint_name`. Values: `timestamptz` is an aware UTC datetime, `jsonb` any Python
object orjson knows, `uuid` a `uuid.UUID`.

Connections carry no state of a session: no SET, LISTEN or advisory lock outlives a statement on a
pooled one, since the pool sends no reset query when it takes a connection back.
"""

import asyncio
import hashlib
import logging
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import TYPE_CHECKING, Any, TypeAlias
from urllib.parse import parse_qs, urlsplit

import asyncpg
import orjson
from asyncpg import CheckViolationError as CheckViolation
from asyncpg import ForeignKeyViolationError as ForeignKeyViolation
from asyncpg import Record
from asyncpg import UniqueViolationError as UniqueViolation

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
    Connection: TypeAlias = asyncpg.Connection[Record]
    Pooled: TypeAlias = asyncpg.pool.PoolConnectionProxy[Record]
    AnyConnection: TypeAlias = Connection | Pooled

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
STATEMENT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = STATEMENT_TIMEOUT_S + 1.0  # the server's own limit comes first and says more
RELEASE_TIMEOUT_S = 1.0
PING_TIMEOUT_S = 2.0
CLOSE_TIMEOUT_S = 5.0
MIGRATION_TIMEOUT_S = 600.0
CLAIM_PATIENCE_S = 2.0  # a killed predecessor's connection needs a moment to be noticed
CLAIM_HEARTBEAT_S = 5.0

_LOCK_SPACE = 0x5E27E2  # first half of our advisory lock keys, so that no other program's collide
_CLAIM_LOCK = 1
_MIGRATION_LOCK = 2


class DatabaseUnavailable(Exception):
    """The database did not answer, or broke off; what was asked may be tried again later."""


class CommitUnknown(DatabaseUnavailable):
    """The database broke off during COMMIT: the transaction may stand or not."""


class SecondInstance(Exception):
    """Somebody else already serves here; the text names who, where and since when."""


class MigrationFault(Exception):
    """The schema does not fit this program: a migration was edited, failed, or is newer."""


_AWAY = (
    OSError,  # TimeoutError and ssl.SSLError are among them
    asyncpg.PostgresConnectionError,
    asyncpg.OperatorInterventionError,  # shutting down, starting up, statement_timeout
    asyncpg.InsufficientResourcesError,  # too many connections, disk full
    asyncpg.PostgresSystemError,
    asyncpg.InternalClientError,  # what a call in flight gets when the server is killed
    asyncpg.InvalidAuthorizationSpecificationError,
    asyncpg.InvalidCatalogNameError,
    asyncpg.TransactionRollbackError,  # deadlock, serialization
    asyncpg.LockNotAvailableError,
    asyncpg.ReadOnlySQLTransactionError,  # a standby after a failover
    asyncpg.IdleInTransactionSessionTimeoutError,
    asyncpg.ClientConfigurationError,
)
_THIS_MACHINE = ("127.0.0.1", "localhost", "::1")
_CLOSED = ("closed", "closing", "released back to the pool")


def _is_away(error: Exception) -> bool:
    if isinstance(error, _AWAY):
        return True
    # asyncpg has one class for a lost connection and for its own misuse; only the text differs.
    is_closed = isinstance(error, asyncpg.InterfaceError) and any(word in str(error) for word in _CLOSED)
    return is_closed and not isinstance(error, ValueError)


def _one_line(error: Exception) -> str:
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def _translated(connection: "AnyConnection | None" = None) -> Iterator[None]:
    """Turn what asyncpg raises when the database is away into DatabaseUnavailable."""
    try:
        yield
    except Exception as error:
        if not _is_away(error):
            raise
        if connection is not None and isinstance(error, asyncpg.InternalClientError):
            _terminate(connection)  # the protocol lost count; the next user would get its answers
        raise DatabaseUnavailable(_one_line(error)) from error


def _terminate(connection: "AnyConnection") -> None:
    with suppress(asyncpg.InterfaceError):  # already gone
        connection.terminate()


async def _set_codecs(connection: "AnyConnection") -> None:
    await connection.set_type_codec(
        "jsonb",
        schema="pg_catalog",
        encoder=lambda value: b"\x01" + orjson.dumps(value),  # the binary form starts with its version
        decoder=lambda raw: orjson.loads(raw[1:]),
        format="binary",
    )


async def _leave_as_is(_: "AnyConnection") -> None:
    """Stand in for the reset query, a round trip on each release that nothing here needs."""


def _server_settings(application_name: str) -> dict[str, str]:
    return {
        "application_name": application_name,
        "timezone": "UTC",
        "statement_timeout": f"{STATEMENT_TIMEOUT_S * 1000:.0f}",
        "idle_in_transaction_session_timeout": "60000",
        # A client whose machine vanished must not hold its locks for hours.
        "tcp_keepalives_idle": "5",
        "tcp_keepalives_interval": "2",
        "tcp_keepalives_count": "3",
    }


def _ssl(url: str) -> bool | None:
    """False for this machine, unless the URL asks for TLS: asyncpg would look for keys in the home
    folder, blocking, at each connection. None leaves it to asyncpg."""
    try:
        parts = urlsplit(url)
        query = parse_qs(parts.query)
        host = query.get("host", [parts.hostname or ""])[0]
    except ValueError:
        return None
    return False if host in _THIS_MACHINE and "sslmode" not in query else None


async def _connect(url: str, application_name: str) -> "Connection":
    with _translated():
        return await asyncpg.connect(
            url,
            ssl=_ssl(url),
            timeout=CONNECT_TIMEOUT_S,
            command_timeout=ANSWER_TIMEOUT_S,
            server_settings=_server_settings(application_name),
        )


async def answers(url: str) -> bool:
    """Whether a database accepts connections at `url` now."""
    try:
        connection = await _connect(url, "probe")
    except DatabaseUnavailable:
        return False
    _terminate(connection)
    return True


class Tx:
    """One open transaction. Not for concurrent use; dead once its `async with` block is left."""

    def __init__(self, connection: "Pooled") -> None:
        self._open: Pooled | None = connection
        self._acts: list[Callable[[], None]] = []
        self._committed = False

    @property
    def _connection(self) -> "Pooled":
        if self._open is None:
            raise RuntimeError("this transaction is over")
        return self._open

    async def fetch(self, sql: str, *args: Any) -> list[Record]:
        """All rows of one statement."""
        connection = self._connection
        with _translated(connection):
            return await connection.fetch(sql, *args)

    async def fetchrow(self, sql: str, *args: Any) -> Record | None:
        """The first row of one statement, or None."""
        connection = self._connection
        with _translated(connection):
            return await connection.fetchrow(sql, *args)

    async def fetchval(self, sql: str, *args: Any) -> Any:
        """The first column of the first row, or None."""
        connection = self._connection
        with _translated(connection):
            return await connection.fetchval(sql, *args)

    async def execute(self, sql: str, *args: Any, timeout_s: float | None = None) -> str:
        """Run one statement (several, when there are no arguments); answers its command tag."""
        connection = self._connection
        with _translated(connection):
            return await connection.execute(sql, *args, timeout=timeout_s)

    async def executemany(self, sql: str, rows: Iterable[Sequence[Any]]) -> None:
        """Run one statement for each row of arguments, in one go."""
        connection = self._connection
        with _translated(connection):
            await connection.executemany(sql, rows)

    def after_commit(self, act: Callable[[], None]) -> None:
        """Run `act` once the COMMIT has succeeded, in the order given, never otherwise.

        A doorbell, not a mailbox: what must not be lost belongs in a row.
        """
        self._acts.append(act)

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

    async def _send_commit(self, connection: "Pooled") -> None:
        try:
            with _translated(connection):
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
            _terminate(connection)  # the server rolls back what it loses sight of
            if not isinstance(error, Exception):
                raise

    def _ring(self) -> None:
        for act in self._acts if self._committed else ():
            try:
                act()
            except Exception:
                log.exception("a doorbell failed after its transaction was committed")


class Database:
    """A pool of connections to one database, which heals by itself when the database is back."""

    def __init__(self, url: str, pool: "asyncpg.Pool[Record]") -> None:
        self._url = url
        self._pool = pool
        self._inside: set[asyncio.Task[Any]] = set()  # tasks with an open transaction
        self._claim: _Claim | None = None
        self.claim_lost = asyncio.Event()

    @classmethod
    async def open(cls, url: str, *, pool_size: int = 10) -> "Database":
        """Connect to `url` (postgresql://…). Raises DatabaseUnavailable when nothing answers there."""
        with _translated():
            pool = asyncpg.create_pool(
                url,
                min_size=0,  # a floor would be kept up by a task that logs each failure with its trace
                max_size=pool_size,
                ssl=_ssl(url),
                timeout=CONNECT_TIMEOUT_S,
                command_timeout=ANSWER_TIMEOUT_S,
                init=_set_codecs,
                reset=_leave_as_is,
                server_settings=_server_settings("server"),
            )
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
        with _translated():
            connection = await self._pool.acquire(timeout=CONNECT_TIMEOUT_S)
        try:
            yield connection
        finally:
            try:
                await self._pool.release(connection, timeout=RELEASE_TIMEOUT_S)
            except Exception as error:  # whatever was done is done, and asyncpg has dropped the connection
                log.warning("a database connection was dropped: %s", _one_line(error))

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
            with _translated(connection):
                return await connection.fetch(sql, *args)

    async def fetchrow(self, sql: str, *args: Any) -> Record | None:
        """The first row of one statement on its own, or None."""
        async with self._connection() as connection:
            with _translated(connection):
                return await connection.fetchrow(sql, *args)

    async def fetchval(self, sql: str, *args: Any) -> Any:
        """The first column of the first row of one statement on its own, or None."""
        async with self._connection() as connection:
            with _translated(connection):
                return await connection.fetchval(sql, *args)

    async def execute(self, sql: str, *args: Any) -> str:
        """Run one statement on its own; answers its command tag."""
        async with self._connection() as connection:
            with _translated(connection):
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
        except asyncpg.PostgresError as error:
            raise MigrationFault(f"{owner} migration {number} failed: {_one_line(error)}") from error
        log.info("applied %s migration %d", owner, number)

    @asynccontextmanager
    async def _migration(self) -> AsyncIterator[Tx]:
        async with self.transaction() as tx:
            await tx.execute(f"SET LOCAL statement_timeout = {MIGRATION_TIMEOUT_S * 1000:.0f}")
            await tx.execute(
                f"SELECT pg_advisory_xact_lock({_LOCK_SPACE}, {_MIGRATION_LOCK})",
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
        claim = _Claim(self._url, holder, self.claim_lost)
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
            log.warning("database connections were cut off: %s", _one_line(error))
        finally:
            self._pool.terminate()
            if self._claim is not None:
                await self._claim.release()


class _Claim:
    """The single-instance lock, held on a connection of its own and taken again when that breaks."""

    def __init__(self, url: str, holder: str, lost: asyncio.Event) -> None:
        self._url = url
        self._holder = holder.encode("ascii", "replace")[:63].decode()
        self._lost = lost
        self._connection: Connection | None = None
        self._backend_pid = 0
        self._broken = asyncio.Event()
        self._keeper: asyncio.Task[None] | None = None
        self.held = False

    async def take(self) -> None:
        """Raises SecondInstance when somebody else holds the lock and keeps it."""
        loop = asyncio.get_running_loop()
        deadline = loop.time() + CLAIM_PATIENCE_S
        while (rival := await self._try_once()) is not None:
            if loop.time() >= deadline:
                raise SecondInstance(rival)
            await asyncio.sleep(0.1)
        self._keeper = asyncio.create_task(self._keep())

    async def release(self) -> None:
        if self._keeper is not None:
            self._keeper.cancel()
            await asyncio.wait([self._keeper])
        self._drop()

    async def _try_once(self) -> str | None:
        """Take the lock and answer None, or say who has it."""
        connection = await _connect(self._url, self._holder)
        try:
            with _translated():
                if await connection.fetchval(
                    "SELECT pg_try_advisory_lock($1::int, $2::int)", _LOCK_SPACE, _CLAIM_LOCK
                ):
                    self._adopt(connection)
                    return None
                return await self._describe_rival(connection)
        finally:
            if self._connection is not connection:
                _terminate(connection)

    async def _describe_rival(self, connection: "Connection") -> str:
        row = await connection.fetchrow(
            "SELECT a.pid, a.application_name, host(a.client_addr) AS address, a.backend_start"
            " FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid"
            " WHERE l.locktype = 'advisory' AND l.granted AND l.classid = $1::int::oid"
            " AND l.objid = $2::int::oid AND l.objsubid = 2"
            " AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())",
            _LOCK_SPACE,
            _CLAIM_LOCK,
        )
        if row is None:
            return "another server, just starting or stopping, uses this database"
        if row["pid"] == self._backend_pid and row["application_name"] == self._holder:
            # Our own connection of before, which the database has not missed yet.
            await connection.fetchval("SELECT pg_terminate_backend($1)", self._backend_pid)
        return (
            f"another server uses this database: {row['application_name']},"
            f" connected from {row['address'] or 'this machine'}"
            f" since {row['backend_start']:%Y-%m-%d %H:%M:%S} UTC"
        )

    def _adopt(self, connection: "Connection") -> None:
        self._broken.clear()
        self._connection = connection
        self._backend_pid = connection.get_server_pid()
        connection.add_termination_listener(self._on_termination)
        self.held = True

    def _on_termination(self, connection: object) -> None:
        if connection is self._connection:
            self.held = False
            self._broken.set()

    def _drop(self) -> None:
        self.held = False
        if self._connection is not None:
            _terminate(self._connection)
            self._connection = None

    async def _keep(self) -> None:
        while True:
            await self._until_broken()
            self._drop()
            log.warning("lost the single-instance lock; taking it again")
            if not await self._regain():
                self._lost.set()
                return

    async def _until_broken(self) -> None:
        """Return when the connection is gone or answers no more."""
        assert self._connection is not None
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(CLAIM_HEARTBEAT_S):
                    await self._broken.wait()
                return
            try:
                with _translated():
                    await self._connection.execute("SELECT 1")
            except DatabaseUnavailable:
                return

    async def _regain(self) -> bool:
        """Try until the database is back. False: somebody else has the lock."""
        loop = asyncio.get_running_loop()
        refused_since: float | None = None
        while True:
            try:
                rival = await self._try_once()
            except DatabaseUnavailable:
                refused_since = None
            else:
                if rival is None:
                    log.info("the single-instance lock is held again")
                    return True
                refused_since = refused_since or loop.time()
                if loop.time() - refused_since >= CLAIM_PATIENCE_S:
                    log.error("%s; stopping", rival)
                    return False
            await asyncio.sleep(0.1)
