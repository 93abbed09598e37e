"""The single-instance lock: who holds it is the one server of a database.

An advisory lock on a connection of its own, outside the pool; it ends with that connection, so a
killed server leaves nothing behind. It is taken again when the line breaks or the database
restarts.
"""

import asyncio
import logging
from contextlib import suppress
from typing import TYPE_CHECKING

from server import pg

if TYPE_CHECKING:
    from server.pg import Connection

log = logging.getLogger(__name__)

PATIENCE_S = 2.0  # a killed predecessor's connection needs a moment to be noticed
HEARTBEAT_S = 5.0
LOCK_SPACE = 0x5E27E2  # first half of our advisory lock keys, so that no other program's collide
_CLAIM_LOCK = 1


class SecondInstance(Exception):
    """Somebody else already serves here; the text names who, where and since when."""


class Claim:
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
        deadline = loop.time() + PATIENCE_S
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
        connection = await pg.connect(self._url, self._holder)
        try:
            with pg.translated():
                if await connection.fetchval(
                    "SELECT pg_try_advisory_lock($1::int, $2::int)", LOCK_SPACE, _CLAIM_LOCK
                ):
                    self._adopt(connection)
                    return None
                return await self._describe_rival(connection)
        finally:
            if self._connection is not connection:
                pg.terminate(connection)

    async def _describe_rival(self, connection: "Connection") -> str:
        row = await connection.fetchrow(
            "SELECT a.pid, a.application_name, host(a.client_addr) AS address, a.backend_start"
            " FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid"
            " WHERE l.locktype = 'advisory' AND l.granted AND l.classid = $1::int::oid"
            " AND l.objid = $2::int::oid AND l.objsubid = 2"
            " AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())",
            LOCK_SPACE,
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
            pg.terminate(self._connection)
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
                async with asyncio.timeout(HEARTBEAT_S):
                    await self._broken.wait()
                return
            try:
                with pg.translated():
                    await self._connection.execute("SELECT 1")
            except pg.DatabaseUnavailable:
                return

    async def _regain(self) -> bool:
        """Try until the database is back. False: somebody else has the lock."""
        loop = asyncio.get_running_loop()
        refused_since: float | None = None
        while True:
            try:
                rival = await self._try_once()
            except pg.DatabaseUnavailable:
                refused_since = None
            else:
                if rival is None:
                    log.info("the single-instance lock is held again")
                    return True
                refused_since = refused_since or loop.time()
                if loop.time() - refused_since >= PATIENCE_S:
                    log.error("%s; stopping", rival)
                    return False
            await asyncio.sleep(0.1)
