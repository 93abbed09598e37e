"""The audit log: who did what, when and from where.

An entry is a row in the transaction of what it tells of, and stays: the database refuses to change or
delete one. It outlives its actor's account, so nothing keeps an actor from going.
"""

from collections.abc import Mapping
from typing import Annotated, Any, Final
from uuid import UUID

from aiohttp import web
from pydantic import Field

from server.api import Moment, Outgoing, Page, PageQuery, from_cursor, to_cursor, whole_number
from server.db import Database, Record, Tx


class AuditQuery(PageQuery):
    """Which entries: all, or those of exactly this action or target."""

    action: Annotated[str, Field(max_length=100)] | None = None
    target: Annotated[str, Field(max_length=300)] | None = None


class AuditEntry(Outgoing):
    """What somebody did. No actor: the server itself; no e-mail: that, or the account is gone."""

    id: int
    at: Moment
    actor_id: UUID | None
    actor_email: str | None
    action: str
    target: str
    address: str
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class AuditLog:
    """Every entry. Provides Audit."""

    def __init__(self, database: Database) -> None:
        self._database = database

    async def record(
        self,
        tx: Tx,
        *,
        action: str,
        target: str,
        actor_id: UUID | None = None,
        address: str = "",
        before: Mapping[str, object] | None = None,
        after: Mapping[str, object] | None = None,
    ) -> None:
        """Write an entry that counts once the caller's transaction commits."""
        await tx.execute(
            """
            INSERT INTO audit (actor_id, action, target, address, before, after)
            VALUES ($1, $2, $3, $4, $5, $6)
            """,
            actor_id,
            action,
            target,
            address,
            None if before is None else dict(before),
            None if after is None else dict(after),
        )

    async def page(self, query: AuditQuery) -> Page[AuditEntry]:
        """Entries, newest first."""
        (before,) = from_cursor(query.cursor, whole_number) if query.cursor else (None,)
        rows = await self._database.fetch(
            """
            SELECT audit.id, audit.at, audit.actor_id, users.email AS actor_email, audit.action,
                audit.target, audit.address, audit.before, audit.after
            FROM audit LEFT JOIN users ON users.id = audit.actor_id
            WHERE ($1::bigint IS NULL OR audit.id < $1)
                AND ($2::text IS NULL OR audit.action = $2)
                AND ($3::text IS NULL OR audit.target = $3)
            ORDER BY audit.id DESC LIMIT $4
            """,
            before,
            query.action,
            query.target,
            query.page_size + 1,
        )
        shown = rows[: query.page_size]
        more = to_cursor(shown[-1]["id"]) if len(rows) > len(shown) else None
        return Page[AuditEntry](items=[_entry(row) for row in shown], next_cursor=more)


def _entry(row: Record) -> AuditEntry:
    return AuditEntry(
        id=row["id"],
        at=row["at"],
        actor_id=row["actor_id"],
        actor_email=row["actor_email"],
        action=row["action"],
        target=row["target"],
        address=row["address"],
        before=row["before"],
        after=row["after"],
    )


AUDIT_LOG: Final = web.AppKey("AUDIT_LOG", AuditLog)
