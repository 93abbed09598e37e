"""How the house's money stands, for administrators."""

from datetime import date
from typing import Any, Final
from uuid import UUID

from aiohttp import web

from plugins.billing.checks import CHECKS, LedgerCheck
from plugins.billing.ledger import ACCOUNTS
from plugins.billing.model import AccountKind, OrderState
from server.api import Moment, Outgoing
from server.interfaces import DATABASE

DAYS: Final = 30


class ProviderTurnover(Outgoing):
    """What came in through a payment provider, and how much of that went back."""

    provider: str
    payments: int
    received: int
    refunded: int


class DayOfRevenue(Outgoing):
    """What was earned on a day (UTC)."""

    day: date
    amount: int


class MoneyOverview(Outgoing):
    """Sums over everything, in minor units of `currency`.

    `balances`: what users have; `revenue`: what was earned; `clearing`: what providers took and have not
    given back; `promotions`: what was given away; `unapplied`: what waits for an administrator;
    `refunded`: what went back, `refunds_open`: what is on its way there.
    """

    currency: str
    balances: int
    revenue: int
    clearing: int
    promotions: int
    unapplied: int
    unapplied_payments: int
    misfit_callbacks: int
    refunded: int
    refunds_open: int
    refunds_refused: int
    providers: list[ProviderTurnover]
    revenue_by_day: list[DayOfRevenue]
    last_check: LedgerCheck | None


class UserOrder(Outgoing):
    """A top-up as administrators see it; amounts in minor units."""

    id: UUID
    number: str
    provider: str
    amount: int
    currency: str
    state: OrderState
    created_at: Moment
    paid_at: Moment | None


class Overview:
    """Looks at all accounts at once."""

    def __init__(self, app: web.Application) -> None:
        self._database = app[DATABASE]
        self._checks = app[CHECKS]
        self._currency = app[ACCOUNTS].currency

    async def now(self) -> MoneyOverview:
        """How things stand."""
        balances = await self._balances()
        sums = await self._database.fetchrow(
            """
            SELECT
                (SELECT count(*) FROM payments WHERE state = 'unapplied') AS unapplied_payments,
                (SELECT count(*) FROM payment_events WHERE misfit <> '' AND reviewed_at IS NULL)
                    AS misfit_callbacks,
                (SELECT coalesce(sum(amount), 0)::bigint FROM refunds WHERE state = 'done') AS refunded,
                (SELECT coalesce(sum(amount), 0)::bigint FROM refunds WHERE state = 'requested')
                    AS refunds_open,
                (SELECT count(*) FROM refunds WHERE state = 'refused') AS refunds_refused
            """
        )
        assert sums is not None
        return MoneyOverview(
            currency=self._currency,
            balances=balances.get(AccountKind.USER, 0),
            revenue=balances.get(AccountKind.REVENUE, 0),
            clearing=-balances.get(AccountKind.CLEARING, 0),
            promotions=-balances.get(AccountKind.PROMOTIONS, 0),
            unapplied=balances.get(AccountKind.UNAPPLIED, 0),
            **dict(sums),
            providers=await self._providers(),
            revenue_by_day=await self._revenue_by_day(),
            last_check=await self._checks.last(),
        )

    async def latest_orders(self, user_id: UUID, *, limit: int) -> list[UserOrder]:
        """A user's orders, newest first."""
        rows = await self._database.fetch(
            """
            SELECT id, number, provider, amount, currency, state, created_at, paid_at FROM orders
            WHERE user_id = $1 ORDER BY position DESC LIMIT $2
            """,
            user_id,
            limit,
        )
        fields: list[dict[str, Any]] = [dict(row) for row in rows]
        return [UserOrder(**one) for one in fields]

    async def _balances(self) -> dict[AccountKind, int]:
        rows = await self._database.fetch(
            "SELECT kind, sum(balance)::bigint AS balance FROM ledger_accounts GROUP BY kind"
        )
        return {AccountKind(row["kind"]): row["balance"] for row in rows}

    async def _providers(self) -> list[ProviderTurnover]:
        rows = await self._database.fetch(
            """
            SELECT o.provider, count(*) AS payments, sum(p.amount)::bigint AS received,
                sum(p.refunded)::bigint AS refunded
            FROM payments p JOIN orders o ON o.id = p.order_id GROUP BY o.provider ORDER BY o.provider
            """
        )
        return [ProviderTurnover(**dict(row)) for row in rows]

    async def _revenue_by_day(self) -> list[DayOfRevenue]:
        rows = await self._database.fetch(
            """
            SELECT d.day::date AS day, coalesce(sum(e.amount), 0)::bigint AS amount
            FROM generate_series(current_date - $1::integer, current_date, interval '1 day') AS d (day)
            LEFT JOIN ledger_entries e ON e.created_at >= d.day AND e.created_at < d.day + interval '1 day'
                AND e.account_id = (SELECT id FROM ledger_accounts WHERE kind = 'revenue')
            GROUP BY d.day ORDER BY d.day
            """,
            DAYS - 1,
        )
        return [DayOfRevenue(**dict(row)) for row in rows]


OVERVIEW: Final = web.AppKey("OVERVIEW", Overview)
