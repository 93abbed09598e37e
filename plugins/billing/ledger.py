"""The ledger: accounts, entries, balances in memory."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

from aiohttp import web
from babel.numbers import get_currency_precision

from plugins.billing.model import AccountKind, Balance, BillingSection, Entry
from server.api import Page, PageQuery, from_cursor, to_cursor, whole_number
from server.db import Record, Tx
from server.errors import Code, Problem
from server.i18n import N_
from server.interfaces import CONFIGURATION, DATABASE, NOTIFIER, Charged, Message, Topic
from server.plugin import PluginFault


@dataclass(frozen=True, slots=True)
class Posting:
    """Money for a user's account (below zero: from it), taken from or given to one of the house's."""

    user_id: UUID
    amount: int
    against: AccountKind
    kind: str
    reference: str


@dataclass(frozen=True, slots=True)
class Posted:
    """What a posting became. `position` counts the ledger's entries."""

    user_id: UUID
    amount: int
    balance_after: int
    position: int


class Accounts:
    """Users' money and where it came from and went to; implements `Ledger`.

    A transaction takes locks in this order: orders, accounts, notifications; of each, by user id.
    """

    def __init__(self, app: web.Application) -> None:
        section = app[CONFIGURATION].section("billing")
        assert isinstance(section, BillingSection)
        self.currency = section.currency
        self._welcome_credit = section.welcome_credit
        self._database = app[DATABASE]
        self._notifier = app[NOTIFIER]
        self._balances: dict[UUID, tuple[int, int]] = {}  # position of the last entry, balance after it

    async def load(self) -> None:
        """Open the house's own accounts and take every balance into memory.

        Raises PluginFault where the ledger counts another currency than the configuration.
        """
        await self._database.execute(
            "INSERT INTO ledger_accounts (kind, currency) SELECT unnest($1::text[]), $2"
            " ON CONFLICT DO NOTHING",
            [kind.value for kind in AccountKind if kind is not AccountKind.USER],
            self.currency,
        )
        other = await self._database.fetchval(
            "SELECT currency FROM ledger_accounts WHERE currency <> $1 LIMIT 1", self.currency
        )
        if other is not None:
            raise PluginFault(f"billing.currency is {self.currency}, but this ledger is in {other}")
        rows = await self._database.fetch(
            "SELECT user_id, balance FROM ledger_accounts WHERE kind = 'user' AND balance > 0"
        )
        self._balances = {row["user_id"]: (0, row["balance"]) for row in rows}

    def balance_of(self, user_id: UUID) -> Balance:
        """What a user has, from memory."""
        _, balance = self._balances.get(user_id, (0, 0))
        return Balance(balance=balance, currency=self.currency)

    def spoken(self, amount: int) -> str:
        """An amount as it stands in a notification: `50.00 CNY`."""
        major = Decimal(amount).scaleb(-get_currency_precision(self.currency))
        return f"{major:f} {self.currency}"

    async def page(self, user_id: UUID, query: PageQuery) -> Page[Entry]:
        """A user's entries, newest first."""
        (before,) = from_cursor(query.cursor, whole_number) if query.cursor else (None,)
        rows = await self._database.fetch(
            """
            SELECT e.transaction_id AS id, e.position, e.amount, e.balance_after, e.kind, e.reference,
                e.created_at
            FROM ledger_entries e JOIN ledger_accounts a ON a.id = e.account_id
            WHERE a.user_id = $1 AND ($2::bigint IS NULL OR e.position < $2)
            ORDER BY e.position DESC LIMIT $3
            """,
            user_id,
            before,
            query.page_size + 1,
        )
        shown = rows[: query.page_size]
        more = to_cursor(shown[-1]["position"]) if len(rows) > len(shown) else None
        return Page[Entry](items=[_entry(row) for row in shown], next_cursor=more)

    async def open(self, tx: Tx, user_id: UUID) -> None:
        """Make sure that a user has an account."""
        await tx.execute(
            "INSERT INTO ledger_accounts (kind, user_id, currency, balance) VALUES ('user', $1, $2, 0)"
            " ON CONFLICT (user_id) DO NOTHING",
            user_id,
            self.currency,
        )

    async def welcome(self, tx: Tx, user_id: UUID) -> None:
        """Open a new user's account with the welcome credit on it."""
        await self.open(tx, user_id)
        if not self._welcome_credit:
            return
        gift = Posting(user_id, self._welcome_credit, AccountKind.PROMOTIONS, "welcome_credit", str(user_id))
        posted = await self.post(tx, [gift])
        body = N_("{amount} of welcome credit were added.")
        await self._notifier.publish_all(tx, [self.moved(posted[0], "welcome_credit", body)])

    async def lock_balance(self, tx: Tx, user_id: UUID) -> int:
        """The user's balance, which nobody else can change until the transaction ends."""
        lock = "SELECT balance FROM ledger_accounts WHERE user_id = $1 FOR NO KEY UPDATE"
        balance = await tx.fetchval(lock, user_id)
        if balance is None:
            await self.open(tx, user_id)
            balance = await tx.fetchval(lock, user_id)
        return int(balance)

    async def charge(
        self, tx: Tx, user_id: UUID, amount: int, *, kind: str, reference: str, partial: bool = False
    ) -> Charged:
        """Take `amount` from the user in one statement, and tell them only when that spends their balance.

        Raises Problem(insufficient_balance) where the balance is smaller, unless `partial`: then what
        there is is taken, and `Charged.amount` says how much that was.
        """
        if amount < 0:
            raise ValueError("a charge takes, it does not give")
        if amount == 0:
            return Charged(0, await self.lock_balance(tx, user_id))
        wish = Posting(user_id, -amount, AccountKind.REVENUE, kind, reference)
        posted = await self.post(tx, [wish], partial=partial)
        if not posted and not partial:
            raise Problem(Code.INSUFFICIENT_BALANCE, N_("Your balance does not cover this; top it up first."))
        if not posted:
            return Charged(0, 0)
        if posted[0].balance_after == 0:
            title = N_("Your balance is spent")
            body = N_("Running phones are stopped and keep their data. Top up to start them again.")
            await self._notifier.publish_all(tx, [self.moved(posted[0], "spent", body, title)])
        return Charged(-posted[0].amount, posted[0].balance_after)

    async def post(self, tx: Tx, postings: Sequence[Posting], *, partial: bool = False) -> list[Posted]:
        """Write the entries of many postings at once, in order; at most one of them takes from a user.

        One that its account does not cover is left out, or with `partial` cut to what there is. Accounts
        are locked in the order of their users, so that two batches never wait for each other in a circle.
        """
        if not postings:
            return []
        rows = await tx.fetch(
            """
            WITH wanted AS (
                SELECT * FROM unnest($1::uuid[], $2::bigint[], $3::text[], $4::text[], $5::text[])
                    WITH ORDINALITY AS w (user_id, amount, against, kind, reference, place)
            ), held AS (
                SELECT id, user_id, balance FROM ledger_accounts
                WHERE user_id = ANY ($1::uuid[]) ORDER BY user_id FOR NO KEY UPDATE
            ), granted AS (
                SELECT w.user_id, w.against, w.kind, w.reference, w.place, held.id AS account_id,
                    CASE WHEN $6 THEN greatest(w.amount, -held.balance) ELSE w.amount END AS amount
                FROM wanted w JOIN held USING (user_id)
                WHERE held.balance + w.amount >= 0 OR w.amount > 0 OR ($6 AND held.balance > 0)
            ), placed AS (
                SELECT gen_random_uuid() AS transaction_id, g.*, (held.balance
                    + sum(g.amount) OVER (PARTITION BY g.user_id ORDER BY g.place))::bigint AS balance_after
                FROM granted g JOIN held ON held.id = g.account_id
            ), moved AS (
                UPDATE ledger_accounts a SET balance = a.balance + s.amount
                FROM (SELECT account_id, sum(amount)::bigint AS amount FROM placed GROUP BY account_id) s
                WHERE a.id = s.account_id
            ), written AS (
                INSERT INTO ledger_entries
                    (transaction_id, account_id, amount, balance_after, kind, reference)
                SELECT transaction_id, account_id, amount, balance_after, kind, reference FROM (
                    SELECT place, transaction_id, account_id, amount, balance_after, kind, reference
                    FROM placed
                    UNION ALL
                    SELECT p.place, p.transaction_id, a.id, -p.amount, NULL, p.kind, p.reference
                    FROM placed p JOIN ledger_accounts a ON a.kind = p.against
                ) legs ORDER BY place
                RETURNING transaction_id, account_id, amount, balance_after, position
            )
            SELECT p.user_id, w.amount, w.balance_after, w.position
            FROM written w JOIN placed p USING (transaction_id, account_id) ORDER BY w.position
            """,
            [one.user_id for one in postings],
            [one.amount for one in postings],
            [one.against for one in postings],
            [one.kind for one in postings],
            [one.reference for one in postings],
            partial,
        )
        posted = [Posted(*row) for row in rows]
        tx.after_commit(functools.partial(self._remember, posted))
        return posted

    async def set_aside(self, tx: Tx, payments: Sequence[tuple[str, int]]) -> list[str]:
        """Book payments for closed orders, (order number, amount), as unapplied, each order's once.

        Answers the numbers whose payment was not booked before.
        """
        rows = await tx.fetch(
            """
            WITH wanted AS (
                SELECT gen_random_uuid() AS transaction_id, w.reference, w.amount
                FROM unnest($1::text[], $2::bigint[]) AS w (reference, amount)
                WHERE NOT EXISTS (
                    SELECT FROM ledger_entries e
                    WHERE e.kind = 'unapplied_payment' AND e.amount > 0 AND e.reference = w.reference
                )
            )
            INSERT INTO ledger_entries (transaction_id, account_id, amount, kind, reference)
            SELECT w.transaction_id, a.id, CASE a.kind WHEN 'unapplied' THEN w.amount ELSE -w.amount END,
                'unapplied_payment', w.reference
            FROM wanted w JOIN ledger_accounts a ON a.kind IN ('unapplied', 'clearing')
            RETURNING amount, reference
            """,
            [number for number, _ in payments],
            [amount for _, amount in payments],
        )
        return [row["reference"] for row in rows if row["amount"] > 0]

    def _remember(self, posted: Sequence[Posted]) -> None:
        """Positions rise along an account's history, which the news of two commits need not."""
        for one in posted:
            position, _ = self._balances.get(one.user_id, (0, 0))
            if one.position > position:
                self._balances[one.user_id] = (one.position, one.balance_after)

    # What users hear of it

    def moved(self, posted: Posted, kind: str, body: str, title: str = "") -> Message:
        """The notification of a changed balance; `body` may use {amount} and {balance}."""
        return Message(
            posted.user_id,
            Topic.BILLING_BALANCE,
            title or N_("Your balance is {balance}"),
            body,
            {"balance": self.spoken(posted.balance_after), "amount": self.spoken(abs(posted.amount))},
            {
                "balance": posted.balance_after,
                "amount": posted.amount,
                "currency": self.currency,
                "kind": kind,
            },
        )


ACCOUNTS: Final = web.AppKey("ACCOUNTS", Accounts)


def _entry(row: Record) -> Entry:
    fields: dict[str, Any] = {name: row[name] for name in Entry.model_fields}
    return Entry.model_construct(**fields)
