"""Corrections: what administrators add to a user's balance or take from it, and why."""

from typing import Annotated, Any, Final
from uuid import UUID

from aiohttp import web
from pydantic import Field

from plugins.billing.ledger import ACCOUNTS, Posting
from plugins.billing.model import MOST_AN_ORDER, AccountKind, Entry, Reason
from server.api import Incoming
from server.auth import Caller
from server.db import Tx
from server.errors import Code, Problem, not_found
from server.i18n import N_
from server.interfaces import AUDIT, DATABASE, DIRECTORY, NOTIFIER


class NewCorrection(Incoming):
    """What a balance rises by, or falls by where it is below zero, in minor units; the user reads why."""

    amount: Annotated[int, Field(ge=-MOST_AN_ORDER, le=MOST_AN_ORDER)]
    reason: Reason


class Corrections:
    """Changes balances by hand; what is given or taken is the house's revenue."""

    def __init__(self, app: web.Application) -> None:
        self._database = app[DATABASE]
        self._directory = app[DIRECTORY]
        self._accounts = app[ACCOUNTS]
        self._notifier = app[NOTIFIER]
        self._audit = app[AUDIT]

    async def make(
        self, caller: Caller, user_id: UUID, wish: NewCorrection, correction_id: UUID, address: str
    ) -> Entry:
        """Correct a balance, or find what an earlier try has done under this id.

        Raises Problem: not_found, invalid, insufficient_balance.
        """
        if wish.amount == 0:
            raise Problem(Code.INVALID, errors=[("amount", N_("A correction is not nothing."))])
        async with self._database.transaction() as tx:
            if user_id not in await self._directory.among(tx, [user_id]):
                raise not_found()
            balance = await self._accounts.lock_balance(tx, user_id)
            entry = await self._find(tx, user_id, correction_id)
            if entry is not None:
                return entry
            if balance + wish.amount < 0:
                less = N_("The user has less than that.")
                raise Problem(Code.INSUFFICIENT_BALANCE, less, errors=[("amount", less)])
            move = Posting(
                user_id, wish.amount, AccountKind.REVENUE, "correction", str(correction_id), wish.reason
            )
            (posted,) = await self._accounts.post(tx, [move])
            await self._audit.record(
                tx,
                action="billing.correct",
                target=str(user_id),
                actor_id=caller.user_id,
                address=address,
                before={"balance": balance},
                after={"balance": posted.balance_after, "reason": wish.reason},
            )
            body = N_("{amount} were added. Reason: {reason}")
            if wish.amount < 0:
                body = N_("{amount} were taken. Reason: {reason}")
            message = self._accounts.moved(posted, "correction", body, params={"reason": wish.reason})
            await self._notifier.publish_all(tx, [message])
            entry = await self._find(tx, user_id, correction_id)
        assert entry is not None
        return entry

    async def _find(self, tx: Tx, user_id: UUID, correction_id: UUID) -> Entry | None:
        row = await tx.fetchrow(
            """
            SELECT e.transaction_id AS id, e.amount, e.balance_after, e.kind, e.reference, e.label,
                e.created_at
            FROM ledger_entries e JOIN ledger_accounts a ON a.id = e.account_id
            WHERE a.user_id = $1 AND e.kind = 'correction' AND e.reference = $2
            """,
            user_id,
            str(correction_id),
        )
        fields: dict[str, Any] = dict(row) if row else {}
        return Entry(**fields) if row else None


CORRECTIONS: Final = web.AppKey("CORRECTIONS", Corrections)
