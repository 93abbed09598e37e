"""Connections to PostgreSQL: the only place that imports asyncpg, and what it raises by our names.

What it raises when the database is away, hung or shutting down comes out as DatabaseUnavailable;
constraint violations pass through under the names exported here, with their `constraint_name`.
Values: `timestamptz` is an aware UTC datetime, `jsonb` any Python object orjson knows, `uuid` a
`uuid.UUID`.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, TypeAlias
from urllib.parse import parse_qs, urlsplit

import asyncpg
import orjson
from asyncpg import CheckViolationError as CheckViolation
from asyncpg import ForeignKeyViolationError as ForeignKeyViolation
from asyncpg import PostgresError, Record
from asyncpg import UniqueViolationError as UniqueViolation

__all__ = [
    "CheckViolation",
    "DatabaseUnavailable",
    "ForeignKeyViolation",
    "PostgresError",
    "Record",
    "UniqueViolation",
    "connect",
    "make_pool",
    "one_line",
    "terminate",
    "translated",
]

if TYPE_CHECKING:
    Connection: TypeAlias = asyncpg.Connection[Record]
    Pooled: TypeAlias = asyncpg.pool.PoolConnectionProxy[Record]
    AnyConnection: TypeAlias = Connection | Pooled
    Pool: TypeAlias = asyncpg.Pool[Record]

CONNECT_TIMEOUT_S = 5.0
STATEMENT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = STATEMENT_TIMEOUT_S + 1.0  # the server's own limit comes first and says more


class DatabaseUnavailable(Exception):
    """The database did not answer, or broke off; what was asked may be tried again later."""


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


def one_line(error: Exception) -> str:
    """What kind of error it is, and the first line of what it says."""
    text = str(error).strip().split("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


@contextmanager
def translated(connection: "AnyConnection | None" = None) -> Iterator[None]:
    """Turn what asyncpg raises when the database is away into DatabaseUnavailable."""
    try:
        yield
    except Exception as error:
        if not _is_away(error):
            raise
        if connection is not None and isinstance(error, asyncpg.InternalClientError):
            terminate(connection)  # the protocol lost count; the next user would get its answers
        raise DatabaseUnavailable(one_line(error)) from error


def terminate(connection: "AnyConnection") -> None:
    """Drop the connection at once; the server rolls back what it was doing."""
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


async def connect(url: str, application_name: str) -> "Connection":
    """A connection of one's own, outside the pool. Raises DatabaseUnavailable."""
    with translated():
        return await asyncpg.connect(
            url,
            ssl=_ssl(url),
            timeout=CONNECT_TIMEOUT_S,
            command_timeout=ANSWER_TIMEOUT_S,
            server_settings=_server_settings(application_name),
        )


def make_pool(url: str, size: int) -> "Pool":
    """A pool of at most `size` connections, none of them open yet."""
    return asyncpg.create_pool(
        url,
        min_size=0,  # a floor would be kept up by a task that logs each failure with its trace
        max_size=size,
        ssl=_ssl(url),
        timeout=CONNECT_TIMEOUT_S,
        command_timeout=ANSWER_TIMEOUT_S,
        init=_set_codecs,
        reset=_leave_as_is,
        server_settings=_server_settings("server"),
    )
