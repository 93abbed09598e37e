"""Refunds: money that administrators give back, from the wish to the provider's word.

A wish is a row, and the money is set apart, in one transaction; the provider is asked afterwards, again and
again under the same id until it says that it is done or that it will not: then the money is put back. Never
more than was paid goes back, which the database sees to.
"""

import asyncio
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal
from uuid import UUID

from aiohttp import web
from pydantic import Field

from plugins.billing.ledger import ACCOUNTS, Posting
from plugins.billing.model import AccountKind, Reason
from plugins.billing.orders import payable
from plugins.billing.providers import (
    PROVIDERS,
    ProviderUnavailable,
    RefundProgress,
    RefundRefused,
    RefundWish,
)
from server.api import Incoming, Moment, Outgoing, Page, PageQuery, from_cursor, to_cursor, whole_number
from server.auth import Caller
from server.db import DatabaseUnavailable, Record, Tx
from server.errors import Code, Problem, not_found
from server.i18n import N_
from server.interfaces import AUDIT, DATABASE, DIRECTORY, JOBS, NOTIFIER, Message, Topic
from server.observe import log

REFUND_JOB: Final = "billing.refund"
ROUND: Final = 50
RETRY_S: Final = 60.0
RETRY_MOST_S: Final = 3600.0


class NewRefund(Incoming):
    """How much of a payment goes back, in minor units, and why. An unapplied payment goes back whole."""

    amount: Annotated[int, Field(gt=0, lt=2**63)]
    reason: Reason


RefundState = Literal["requested", "done", "refused"]


class RefundQuery(PageQuery):
    """Which refunds."""

    state: RefundState | None = None
    user_id: UUID | None = None


class Refund(Outgoing):
    """Money on its way back; `detail` says why a provider refused."""

    id: UUID
    payment_id: UUID
    order_number: str
    user_id: UUID
    email: str
    amount: int
    currency: str
    reason: str
    state: RefundState
    detail: str
    requested_at: Moment
    settled_at: Moment | None


class Refunds:
    """Gives money back."""

    def __init__(self, app: web.Application) -> None:
        self._database = app[DATABASE]
        self._directory = app[DIRECTORY]
        self._accounts = app[ACCOUNTS]
        self._notifier = app[NOTIFIER]
        self._audit = app[AUDIT]
        self._providers = app[PROVIDERS]
        self._jobs = app[JOBS]
        self._asking = asyncio.Lock()  # guards: the refunds under way, each asked for once at a time

    async def page(self, query: RefundQuery) -> Page[Refund]:
        """Refunds, newest first."""
        (before,) = from_cursor(query.cursor, whole_number) if query.cursor else (None,)
        rows = await self._database.fetch(
            """
            SELECT r.id, r.payment AS payment_id, o.number AS order_number, o.user_id, r.amount, o.currency,
                r.reason, r.state, r.detail, r.requested_at, r.settled_at, r.position
            FROM refunds r JOIN payments p ON p.id = r.payment JOIN orders o ON o.id = p.order_id
            WHERE ($1::text IS NULL OR r.state = $1) AND ($2::uuid IS NULL OR o.user_id = $2)
                AND ($3::bigint IS NULL OR r.position < $3)
            ORDER BY r.position DESC LIMIT $4
            """,
            query.state,
            query.user_id,
            before,
            query.page_size + 1,
        )
        shown = rows[: query.page_size]
        more = to_cursor(shown[-1]["position"]) if len(rows) > len(shown) else None
        return Page[Refund](items=await self._refunds(shown), next_cursor=more)

    async def get(self, refund_id: UUID) -> Refund:
        """One refund. Raises Problem(not_found)."""
        rows = await self._database.fetch(
            """
            SELECT r.id, r.payment AS payment_id, o.number AS order_number, o.user_id, r.amount, o.currency,
                r.reason, r.state, r.detail, r.requested_at, r.settled_at
            FROM refunds r JOIN payments p ON p.id = r.payment JOIN orders o ON o.id = p.order_id
            WHERE r.id = $1
            """,
            refund_id,
        )
        if not rows:
            raise not_found()
        return (await self._refunds(rows))[0]

    async def request(
        self, caller: Caller, payment: UUID, wish: NewRefund, refund_id: UUID, address: str
    ) -> Refund:
        """Set money apart to be given back, or find what an earlier try has made under this id.

        Raises Problem: not_found, invalid_state where the payment holds less, insufficient_balance where
        its owner does.
        """
        async with self._database.transaction() as tx:
            row = await tx.fetchrow(
                """
                SELECT p.id AS payment_id, p.state, p.amount, p.refunded, o.id, o.number, o.user_id
                FROM payments p JOIN orders o ON o.id = p.order_id WHERE p.id = $1 FOR NO KEY UPDATE OF p
                """,
                payment,
            )
            if row is None:
                raise not_found()
            # Asked under the payment's lock: the same wish, sent twice at once, is one refund.
            if not await tx.fetchval("SELECT true FROM refunds WHERE id = $1", refund_id):
                await self._set_apart(tx, caller, row, wish, refund_id, address)
        return await self.get(refund_id)

    async def _set_apart(
        self, tx: Tx, caller: Caller, row: Record, wish: NewRefund, refund_id: UUID, address: str
    ) -> None:
        payment = row["payment_id"]
        is_unapplied = row["state"] == "unapplied"
        if wish.amount > row["amount"] - row["refunded"]:
            raise _unfit(Code.INVALID_STATE, N_("That is more than is left of this payment."))
        if is_unapplied and wish.amount != row["amount"]:
            raise _unfit(Code.INVALID_STATE, N_("An unapplied payment goes back whole."))
        await tx.execute(
            "UPDATE payments SET refunded = refunded + $2, state = $3 WHERE id = $1",
            payment,
            wish.amount,
            "returned" if is_unapplied else row["state"],
        )
        await tx.execute(
            "INSERT INTO refunds (id, payment, amount, reason, requested_by) VALUES ($1, $2, $3, $4, $5)",
            refund_id,
            payment,
            wish.amount,
            wish.reason,
            caller.user_id,
        )
        if not is_unapplied and await self._accounts.lock_balance(tx, row["user_id"]) < wish.amount:
            raise _unfit(Code.INSUFFICIENT_BALANCE, N_("The user has spent more of it than that leaves."))
        await self._accounts.post(tx, [_posting(row, -wish.amount, "refund", is_unapplied)])
        await self._audit.record(
            tx,
            action="billing.refund",
            target=str(payment),
            actor_id=caller.user_id,
            address=address,
            before={"refunded": row["refunded"]},
            after={"refunded": row["refunded"] + wish.amount, "order": row["number"], "reason": wish.reason},
        )
        title = N_("A payment of order {number} goes back to you")
        body = N_("{amount} are returned the way they were paid. Reason: {reason}")
        await self._tell(tx, row, wish.amount, title, body, {"reason": wish.reason})
        tx.after_commit(lambda: self._jobs.ring(REFUND_JOB))

    async def carry_out(self) -> None:
        """Ask the providers for every refund that is due."""
        async with self._asking:
            for row in await self._due():
                await self._carry_out(row)

    async def _due(self) -> list[Record]:
        """The refunds to ask for now; when to ask again is written down before that."""
        return await self._database.fetch(
            """
            UPDATE refunds r SET tries = tries + 1,
                next_try_at = now() + make_interval(secs => least($2 * 2 ^ least(tries, 10), $3))
            FROM payments p JOIN orders o ON o.id = p.order_id
            WHERE p.id = r.payment AND r.state = 'requested' AND r.id IN (
                SELECT id FROM refunds WHERE state = 'requested' AND next_try_at <= now()
                ORDER BY next_try_at LIMIT $1
            )
            RETURNING r.id AS refund_id, r.payment, r.amount AS wanted, r.reason, p.payment_id,
                p.amount AS paid, o.id, o.number, o.user_id, o.provider, o.amount, o.currency, o.created_at,
                o.expires_at, o.provider_reference
            """,
            ROUND,
            RETRY_S,
            RETRY_MOST_S,
        )

    async def _carry_out(self, row: Record) -> None:
        provider = self._providers.get(row["provider"])
        wish = RefundWish(
            id=row["refund_id"],
            order=payable(row),
            payment_id=row["payment_id"],
            paid=row["paid"],
            amount=row["wanted"],
            reason=row["reason"],
        )
        try:
            if provider is None:
                raise ProviderUnavailable("it is not configured any more")
            if await provider.refund(wish) is RefundProgress.DONE:
                await self._settle(row)
        except RefundRefused as refusal:
            await self._put_back(row, str(refusal))
        except DatabaseUnavailable:
            raise
        except Exception as error:  # one refund that cannot be asked for must not keep the others waiting
            log.warning(
                "a refund is not done yet",
                extra={"provider": row["provider"], "refund": str(row["refund_id"]), "error": repr(error)},
                exc_info=None if isinstance(error, ProviderUnavailable) else error,
            )

    async def _settle(self, row: Record) -> None:
        async with self._database.transaction() as tx:
            if await self._end(tx, row, "done", ""):
                title = N_("{amount} of order {number} were returned")
                body = N_("The payment provider has sent them; your bank may need some days.")
                await self._tell(tx, row, row["wanted"], title, body, {})

    async def _put_back(self, row: Record, detail: str) -> None:
        """The provider will not: the money is where it was, and everybody knows."""
        async with self._database.transaction() as tx:
            if not await self._end(tx, row, "refused", detail):
                return
            state = await tx.fetchval(
                """
                UPDATE payments SET refunded = refunded - $2,
                    state = CASE state WHEN 'returned' THEN 'unapplied' ELSE state END
                WHERE id = $1 RETURNING state
                """,
                row["payment"],
                row["wanted"],
            )
            await self._accounts.post(
                tx, [_posting(row, row["wanted"], "refund_refused", state == "unapplied")]
            )
            title = N_("{amount} of order {number} could not be returned")
            body = N_("The payment provider refused. The money is where it was before.")
            await self._tell(tx, row, row["wanted"], title, body, {})
            await self._notifier.broadcast(
                tx,
                await self._directory.administrators(tx),
                Topic.SYSTEM,
                N_("A refund of order {number} was refused"),
                N_("{provider} says: {detail}"),
                params={"number": row["number"], "provider": row["provider"], "detail": detail},
                data={"order_number": row["number"], "refund_id": str(row["refund_id"])},
            )

    async def _end(self, tx: Tx, row: Record, state: str, detail: str) -> bool:
        """Whether it was this that ended the refund."""
        ended: bool | None = await tx.fetchval(
            """
            UPDATE refunds SET state = $2, detail = $3, settled_at = now(), next_try_at = NULL
            WHERE id = $1 AND state = 'requested' RETURNING true
            """,
            row["refund_id"],
            state,
            detail,
        )
        return bool(ended)

    async def _tell(
        self, tx: Tx, order: Record, amount: int, title: str, body: str, params: Mapping[str, object]
    ) -> None:
        words = {"number": order["number"], "amount": self._accounts.spoken(amount), **params}
        data = {"order_id": str(order["id"]), "number": order["number"], "amount": amount, "kind": "refund"}
        message = Message(order["user_id"], Topic.BILLING_BALANCE, title, body, words, data)
        await self._notifier.publish_all(tx, [message])

    async def _refunds(self, rows: list[Record]) -> list[Refund]:
        emails = await self._directory.emails({row["user_id"] for row in rows})
        return [Refund(**_fields(row), email=emails.get(row["user_id"], "")) for row in rows]


REFUNDS: Final = web.AppKey("REFUNDS", Refunds)


def _unfit(code: Code, detail: str) -> Problem:
    """A rule that the amount breaks; forms show it beside that field."""
    return Problem(code, detail, errors=[("amount", detail)])


def _posting(order: Record, amount: int, kind: str, is_unapplied: bool) -> Posting:
    """Money back to the provider where `amount` is below zero, else from there."""
    return Posting(
        None if is_unapplied else order["user_id"],
        amount,
        AccountKind.CLEARING,
        kind,
        order["number"],
        account=AccountKind.UNAPPLIED if is_unapplied else AccountKind.USER,
    )


def _fields(row: Record) -> dict[str, Any]:
    return {name: row[name] for name in Refund.model_fields if name != "email"}
