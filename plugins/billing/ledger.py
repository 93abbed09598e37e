"""The ledger: accounts, entries, balances in memory."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any, Final
from uuid import UUID

from aiohttp import web
from babel.numbers import get_currency_precision

from plugins.billing.model import AccountKind, Balance, BillingSection, Entry
from server.api import Page, PageQuery, from_cursor, to_cursor, whole_number
from server.db import Record, Tx
from server.i18n import N_
from server.interfaces import CONFIGURATION, DATABASE, NOTIFIER, SPENDING, Charged, Message, Topic, Usage
from server.plugin import PluginFault

USAGE_KIND: Final = "device_time"
_HOUR_S: Final = 3600


@dataclass(frozen=True, slots=True)
class Posting:
    """Money for one account (below zero: from it), taken from or given to one of the house's.

    The account is the user's, or without one the house's `account`.
    """

    user_id: UUID | None
    amount: int
    against: AccountKind
    kind: str
    reference: str
    label: str = ""
    account: AccountKind = AccountKind.USER


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
        self._spending = app[SPENDING]
        self._balances: dict[UUID, tuple[int, int]] = {}  # position of the last entry, balance after it
        self._doubtful: set[UUID] = set()  # users whose entries a commit wrote of which nobody knows
        self._house: dict[AccountKind, int] = {}  # ids of the house's own accounts, which never change

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
        own = await self._database.fetch("SELECT kind, id FROM ledger_accounts WHERE kind <> 'user'")
        self._house = {AccountKind(row["kind"]): row["id"] for row in own}
        other = await self._database.fetchval(
            "SELECT currency FROM ledger_accounts WHERE currency <> $1 LIMIT 1", self.currency
        )
        if other is not None:
            raise PluginFault(f"billing.currency is {self.currency}, but this ledger is in {other}")
        rows = await self._database.fetch(
            "SELECT user_id, balance FROM ledger_accounts WHERE kind = 'user' AND balance > 0"
        )
        self._balances = {row["user_id"]: (0, row["balance"]) for row in rows}

    async def read_again(self) -> None:
        """Take the balances into memory of which a lost connection left in doubt what they are."""
        doubtful, self._doubtful = self._doubtful, set()
        if not doubtful:
            return
        try:
            async with self._database.transaction() as tx:
                # The transaction in doubt may still be under way over there: wait for it.
                await tx.execute(
                    "SELECT FROM ledger_accounts WHERE user_id = ANY ($1) ORDER BY user_id FOR NO KEY UPDATE",
                    list(doubtful),
                )
                rows = await tx.fetch(
                    """
                    SELECT user_id, 0 AS amount, balance,
                        (SELECT max(position) FROM ledger_entries WHERE account_id = a.id) AS position
                    FROM ledger_accounts a WHERE user_id = ANY ($1)
                    """,
                    list(doubtful),
                )
        except BaseException:
            self._doubtful |= doubtful
            raise
        self._remember([Posted(*row) for row in rows if row["position"]])

    def balance_of(self, user_id: UUID) -> Balance:
        """What a user has and spends, from memory."""
        _, balance = self._balances.get(user_id, (0, 0))
        rate = sum(spending(user_id) for spending in self._spending)
        return Balance(
            balance=balance,
            currency=self.currency,
            spending_per_hour=rate,
            lasts_s=balance * _HOUR_S // rate if rate else None,
        )

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
                e.label, e.created_at
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

    async def charge(self, tx: Tx, usages: Sequence[Usage]) -> list[Charged]:
        """Take what was used from its users, all at once, cut to what each still has; one answer for each.

        Users hear of it only when that spends their balance.
        """
        rows = await tx.fetch(
            """
            SELECT user_id, balance FROM ledger_accounts WHERE user_id = ANY ($1)
            ORDER BY user_id FOR NO KEY UPDATE
            """,
            list({usage.user_id for usage in usages}),
        )
        left = {row["user_id"]: row["balance"] for row in rows}
        charged: list[Charged] = []
        for usage in usages:
            if usage.amount < 0:
                raise ValueError("a charge takes, it does not give")
            before = left.get(usage.user_id, 0)
            left[usage.user_id] = after = max(0, before - usage.amount)
            charged.append(Charged(before - after, after))
        takes = [
            Posting(
                usage.user_id, -took.amount, AccountKind.REVENUE, USAGE_KIND, usage.reference, usage.label
            )
            for usage, took in zip(usages, charged, strict=True)
            if took.amount
        ]
        title = N_("Your balance is spent")
        body = N_("Running phones are stopped and keep their data. Top up to start them again.")
        spent = [
            self.moved(posted, "spent", body, title)
            for posted in await self.post(tx, takes)
            if posted.balance_after == 0
        ]
        await self._notifier.publish_all(tx, spent)
        return charged

    async def post(self, tx: Tx, postings: Sequence[Posting]) -> list[Posted]:
        """Write the entries of many postings at once, in order; answers those on users' accounts.

        A transaction posts once: accounts are locked in one order, users' by id and then the house's, so
        that two transactions never wait for each other in a circle. Raises CheckViolation where an account
        does not cover what is taken from it.
        """
        if not postings:
            return []
        rows = await tx.fetch(
            """
            WITH wanted AS MATERIALIZED (
                SELECT gen_random_uuid() AS transaction_id, w.*
                FROM unnest($1::uuid[], $2::bigint[], $3::bigint[], $4::bigint[], $5::text[], $6::text[],
                    $7::text[]) WITH ORDINALITY
                    AS w (user_id, house_id, against_id, amount, kind, reference, label, place)
            ), held AS (
                SELECT id, user_id, balance FROM ledger_accounts
                WHERE user_id = ANY ($1) OR id = ANY ($2) OR id = ANY ($3)
                ORDER BY user_id NULLS LAST, id FOR NO KEY UPDATE
            ), legs AS (
                SELECT w.*, held.id AS account_id, w.amount AS moves, held.balance
                FROM wanted w JOIN held ON held.user_id = w.user_id
                UNION ALL
                SELECT w.*, held.id, w.amount, held.balance FROM wanted w JOIN held ON held.id = w.house_id
                UNION ALL
                SELECT w.*, held.id, -w.amount, held.balance FROM wanted w JOIN held ON held.id = w.against_id
            ), placed AS (
                SELECT transaction_id, user_id, account_id, moves, kind, reference, label, place,
                    (balance + sum(moves) OVER (PARTITION BY account_id ORDER BY place))::bigint
                        AS balance_after
                FROM legs
            ), moved AS (
                UPDATE ledger_accounts a SET balance = a.balance + s.moves
                FROM (SELECT account_id, sum(moves)::bigint AS moves FROM placed GROUP BY account_id) s
                WHERE a.id = s.account_id
            ), written AS (
                INSERT INTO ledger_entries
                    (transaction_id, account_id, amount, balance_after, kind, reference, label)
                SELECT transaction_id, account_id, moves, balance_after, kind, reference, label
                FROM placed ORDER BY place
                RETURNING transaction_id, account_id, amount, balance_after, position
            )
            SELECT held.user_id, w.amount, w.balance_after, w.position
            FROM written w JOIN held ON held.id = w.account_id
            WHERE held.user_id IS NOT NULL ORDER BY w.position
            """,
            [one.user_id for one in postings],
            [None if one.user_id else self._house[one.account] for one in postings],
            [self._house[one.against] for one in postings],
            [one.amount for one in postings],
            [one.kind for one in postings],
            [one.reference for one in postings],
            [one.label for one in postings],
        )
        posted = [Posted(*row) for row in rows]
        tx.after_commit(functools.partial(self._remember, posted))
        tx.in_doubt(functools.partial(self._doubt, posted))
        return posted

    def _remember(self, posted: Sequence[Posted]) -> None:
        """Positions rise along an account's history, which the news of two commits need not."""
        for one in posted:
            position, _ = self._balances.get(one.user_id, (0, 0))
            if one.position > position:
                self._balances[one.user_id] = (one.position, one.balance_after)

    def _doubt(self, posted: Sequence[Posted]) -> None:
        self._doubtful.update(one.user_id for one in posted)

    # What users hear of it

    def moved(
        self,
        posted: Posted,
        kind: str,
        body: str,
        title: str = "",
        *,
        params: Mapping[str, object] | None = None,
    ) -> Message:
        """The notification of a changed balance; `body` may use {amount}, {balance} and `params`."""
        return Message(
            posted.user_id,
            Topic.BILLING_BALANCE,
            title or N_("Your balance is {balance}"),
            body,
            {
                "balance": self.spoken(posted.balance_after),
                "amount": self.spoken(abs(posted.amount)),
                **(params or {}),
            },
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
