"""Payments that have come in: what administrators see of them, and what they do with unapplied ones."""

from typing import Any, Final, Literal
from uuid import UUID

from aiohttp import web

from plugins.billing.ledger import ACCOUNTS, Posting
from plugins.billing.model import AccountKind, Reason
from server.api import (
    Incoming,
    Moment,
    Outgoing,
    Page,
    PageQuery,
    from_cursor,
    moment,
    to_cursor,
    whole_number,
)
from server.auth import Caller
from server.db import Record
from server.errors import Code, Problem, not_found
from server.i18n import N_
from server.interfaces import AUDIT, DATABASE, DIRECTORY, NOTIFIER

PaymentState = Literal["credited", "unapplied", "returned"]


class Payment(Outgoing):
    """Money that a provider took for an order.

    `credited`: it is in the owner's balance; `unapplied`: it waits for an administrator, for `reason`;
    `returned`: it was given back without having been credited. `refunded` is what went back so far.
    """

    id: UUID
    order_id: UUID
    order_number: str
    user_id: UUID
    email: str
    provider: str
    amount: int
    refunded: int
    currency: str
    state: PaymentState
    reason: Literal["", "order_closed", "paid_twice"]
    received_at: Moment


class PaymentQuery(PageQuery):
    """Which payments."""

    state: PaymentState | None = None
    user_id: UUID | None = None


class Application(Incoming):
    """Why a payment is added to its owner's balance."""

    reason: Reason


class MisfitQuery(PageQuery):
    """Which of the callbacks that did not fit: those nobody has looked at, or all."""

    reviewed: bool = False


class Misfit(Outgoing):
    """A genuine callback that fitted no order; `body` is what the provider sent."""

    id: UUID
    provider: str
    order_number: str
    amount: int
    currency: str
    misfit: Literal["unknown_order", "amount_mismatch", "unreadable"]
    deliveries: int
    body: str
    received_at: Moment
    reviewed_at: Moment | None


class Received:
    """What came in."""

    def __init__(self, app: web.Application) -> None:
        self._database = app[DATABASE]
        self._directory = app[DIRECTORY]
        self._accounts = app[ACCOUNTS]
        self._notifier = app[NOTIFIER]
        self._audit = app[AUDIT]

    async def page(self, query: PaymentQuery) -> Page[Payment]:
        """Payments, newest first."""
        (before,) = from_cursor(query.cursor, whole_number) if query.cursor else (None,)
        rows = await self._database.fetch(
            """
            SELECT p.id, p.order_id, o.number AS order_number, o.user_id, o.provider, p.amount, p.refunded,
                o.currency, p.state, p.reason, p.received_at, p.position
            FROM payments p JOIN orders o ON o.id = p.order_id
            WHERE ($1::text IS NULL OR p.state = $1) AND ($2::uuid IS NULL OR o.user_id = $2)
                AND ($3::bigint IS NULL OR p.position < $3)
            ORDER BY p.position DESC LIMIT $4
            """,
            query.state,
            query.user_id,
            before,
            query.page_size + 1,
        )
        shown = rows[: query.page_size]
        more = to_cursor(shown[-1]["position"]) if len(rows) > len(shown) else None
        return Page[Payment](items=await self._payments(shown), next_cursor=more)

    async def get(self, payment: UUID) -> Payment:
        """One payment. Raises Problem(not_found)."""
        rows = await self._database.fetch(
            """
            SELECT p.id, p.order_id, o.number AS order_number, o.user_id, o.provider, p.amount, p.refunded,
                o.currency, p.state, p.reason, p.received_at
            FROM payments p JOIN orders o ON o.id = p.order_id WHERE p.id = $1
            """,
            payment,
        )
        if not rows:
            raise not_found()
        return (await self._payments(rows))[0]

    async def apply(self, caller: Caller, payment: UUID, reason: str, address: str) -> Payment:
        """Add an unapplied payment to its owner's balance, once. Raises Problem: not_found, invalid_state."""
        async with self._database.transaction() as tx:
            row = await tx.fetchrow(
                """
                UPDATE payments p SET state = 'credited' FROM orders o
                WHERE p.id = $1 AND p.state = 'unapplied' AND o.id = p.order_id
                RETURNING p.amount, o.number, o.user_id
                """,
                payment,
            )
            if row is not None:
                number, user_id = row["number"], row["user_id"]
                await self._accounts.open(tx, user_id)
                move = Posting(user_id, row["amount"], AccountKind.UNAPPLIED, "applied_payment", number)
                (posted,) = await self._accounts.post(tx, [move])
                await self._audit.record(
                    tx,
                    action="billing.apply_payment",
                    target=str(payment),
                    actor_id=caller.user_id,
                    address=address,
                    before={"state": "unapplied"},
                    after={"state": "credited", "amount": row["amount"], "order": number, "reason": reason},
                )
                body = N_("{amount} that had come too late or twice were added by an administrator.")
                await self._notifier.publish_all(tx, [self._accounts.moved(posted, "applied_payment", body)])
        found = await self.get(payment)
        if row is None:
            raise Problem(Code.INVALID_STATE, N_("Only an unapplied payment can be added to a balance."))
        return found

    async def misfits(self, query: MisfitQuery) -> Page[Misfit]:
        """Genuine callbacks that fitted no order, newest first."""
        before_at, before_id = (None, None)
        if query.cursor:
            before_at, before_id = from_cursor(query.cursor, moment, UUID)
        rows = await self._database.fetch(
            """
            SELECT id, provider, order_number, amount, currency, misfit, deliveries, body, received_at,
                reviewed_at
            FROM payment_events
            WHERE misfit <> '' AND ($1 OR reviewed_at IS NULL)
                AND ($2::timestamptz IS NULL OR (received_at, id) < ($2, $3::uuid))
            ORDER BY received_at DESC, id DESC LIMIT $4
            """,
            query.reviewed,
            before_at,
            before_id,
            query.page_size + 1,
        )
        shown = rows[: query.page_size]
        more = None
        if len(rows) > len(shown):
            more = to_cursor(shown[-1]["received_at"].isoformat(), str(shown[-1]["id"]))
        return Page[Misfit](items=[_misfit(row) for row in shown], next_cursor=more)

    async def review(self, caller: Caller, event: UUID, address: str) -> None:
        """Note that an administrator has looked at a callback. Raises Problem(not_found)."""
        async with self._database.transaction() as tx:
            found = await tx.fetchval(
                """
                UPDATE payment_events SET reviewed_at = coalesce(reviewed_at, now())
                WHERE id = $1 AND misfit <> '' RETURNING order_number
                """,
                event,
            )
            if found is None:
                raise not_found()
            await self._audit.record(
                tx,
                action="billing.review_callback",
                target=str(event),
                actor_id=caller.user_id,
                address=address,
                after={"order": found},
            )

    async def _payments(self, rows: list[Record]) -> list[Payment]:
        emails = await self._directory.emails({row["user_id"] for row in rows})
        return [Payment(**_fields(row), email=emails.get(row["user_id"], "")) for row in rows]


RECEIVED: Final = web.AppKey("RECEIVED", Received)


def _fields(row: Record) -> dict[str, Any]:
    return {name: row[name] for name in Payment.model_fields if name != "email"}


def _misfit(row: Record) -> Misfit:
    fields: dict[str, Any] = dict(row)
    return Misfit(**fields | {"body": row["body"].decode(errors="backslashreplace")})
