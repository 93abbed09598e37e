"""What a user's phones cost: by day and phone, and as a statement of everything that came and went."""

import csv
import io
from calendar import monthrange
from collections.abc import AsyncIterator
from datetime import date
from decimal import Decimal
from typing import Any, Final, Self
from uuid import UUID

from aiohttp import web
from babel.numbers import get_currency_precision
from pydantic import Field, model_validator

from plugins.billing.ledger import ACCOUNTS, USAGE_KIND
from server.api import Moment, Outgoing, Query
from server.db import Record
from server.i18n import N_
from server.interfaces import CLOCK, DATABASE

DAYS: Final = 30
MOST_DAYS: Final = 366
MONTHS: Final = 3
CHUNK: Final = 1000
_FORMULA_STARTS: Final = ("=", "+", "-", "@", "\t", "\r", "\n", "＝", "＋", "－", "＠")


class PeriodQuery(Query):
    """Which days (UTC), both included; the last thirty where none are named."""

    first: date | None = Field(default=None, alias="from")
    last: date | None = Field(default=None, alias="to")

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.first and self.last and not 0 <= (self.last - self.first).days < MOST_DAYS:
            raise ValueError(N_("A period has 1 to 366 days."))
        return self


class DayOfUse(Outgoing):
    """What a phone cost on a day; `name` is what it was called."""

    device_id: str
    name: str
    day: date
    amount: int


class Period(Outgoing):
    """Days (UTC), both included."""

    first_day: date
    last_day: date


class UsageReport(Period):
    """What phones cost, newest day first, in minor units of `currency`."""

    currency: str
    total: int
    items: list[DayOfUse]


class StatementLine(Outgoing):
    """Something that came or went; the use of a phone is one line a day."""

    at: Moment
    kind: str
    label: str
    reference: str
    amount: int


class Statement(Period):
    """A period's movements, oldest first; they lead from `opening` to `closing`."""

    currency: str
    opening: int
    closing: int
    lines: list[StatementLine]


class Usage:
    """Reads the ledger for its owners."""

    def __init__(self, app: web.Application) -> None:
        self._database = app[DATABASE]
        self._clock = app[CLOCK]
        self.currency = app[ACCOUNTS].currency

    def period(self, query: PeriodQuery) -> tuple[date, date]:
        """The days asked for, what is missing filled in."""
        if query.first and not query.last:
            return query.first, _days_away(query.first, DAYS - 1)
        last = query.last or self._clock.now().date()
        return query.first or _days_away(last, 1 - DAYS), last

    def latest_months(self) -> list[tuple[date, date]]:
        """The first and the last day of this month and of the two before it."""
        months: list[tuple[date, date]] = []
        last = self._clock.now().date()
        last = last.replace(day=monthrange(last.year, last.month)[1])
        for _ in range(MONTHS):
            months.append((last.replace(day=1), last))
            last = _days_away(last.replace(day=1), -1)
        return months

    async def by_day(self, user_id: UUID, query: PeriodQuery) -> UsageReport:
        """What each phone cost on each day."""
        first, last = self.period(query)
        rows = await self._database.fetch(
            """
            SELECT e.reference AS device_id, (array_agg(e.label ORDER BY e.position DESC))[1] AS name,
                (e.created_at AT TIME ZONE 'UTC')::date AS day, -sum(e.amount)::bigint AS amount
            FROM ledger_entries e JOIN ledger_accounts a ON a.id = e.account_id
            WHERE a.user_id = $1 AND e.kind = $4
                AND e.created_at >= $2::date AND e.created_at < $3::date + 1
            GROUP BY e.reference, day ORDER BY day DESC, amount DESC, device_id
            """,
            user_id,
            first,
            last,
            USAGE_KIND,
        )
        items = [DayOfUse(**dict(row)) for row in rows]
        total = sum(item.amount for item in items)
        return UsageReport(first_day=first, last_day=last, currency=self.currency, total=total, items=items)

    async def statement(self, user_id: UUID, query: PeriodQuery) -> Statement:
        """Everything that came and went, a phone's use summed up by day."""
        first, last = self.period(query)
        rows = await self._database.fetch(
            """
            SELECT max(e.created_at) AS at, e.kind, (array_agg(e.label ORDER BY e.position DESC))[1] AS label,
                e.reference, sum(e.amount)::bigint AS amount
            FROM ledger_entries e JOIN ledger_accounts a ON a.id = e.account_id
            WHERE a.user_id = $1 AND e.created_at >= $2::date AND e.created_at < $3::date + 1
            GROUP BY e.kind, e.reference, (e.created_at AT TIME ZONE 'UTC')::date,
                CASE WHEN e.kind <> $4 THEN e.position END
            ORDER BY at, max(e.position)
            """,
            user_id,
            first,
            last,
            USAGE_KIND,
        )
        opening = await self._database.fetchval(
            """
            SELECT coalesce(sum(e.amount), 0)::bigint
            FROM ledger_entries e JOIN ledger_accounts a ON a.id = e.account_id
            WHERE a.user_id = $1 AND e.created_at < $2::date
            """,
            user_id,
            first,
        )
        lines = [StatementLine(**dict(row)) for row in rows]
        return Statement(
            first_day=first,
            last_day=last,
            currency=self.currency,
            opening=opening,
            closing=opening + sum(line.amount for line in lines),
            lines=lines,
        )

    async def csv(self, user_id: UUID, query: PeriodQuery) -> AsyncIterator[bytes]:
        """Every entry of the period, oldest first, as a spreadsheet reads it, in pieces.

        A cell that a spreadsheet would take for a formula begins with an apostrophe (OWASP, "CSV
        Injection").
        """
        first, last = self.period(query)
        yield _csv_line(["time", "kind", "label", "reference", "amount", "balance_after", "currency"])
        after = 0
        rows: list[Record] = []
        while after == 0 or len(rows) == CHUNK:
            rows = await self._database.fetch(
                """
                SELECT e.position, e.created_at, e.kind, e.label, e.reference, e.amount, e.balance_after
                FROM ledger_entries e JOIN ledger_accounts a ON a.id = e.account_id
                WHERE a.user_id = $1 AND e.position > $4
                    AND e.created_at >= $2::date AND e.created_at < $3::date + 1
                ORDER BY e.position LIMIT $5
                """,
                user_id,
                first,
                last,
                after,
                CHUNK,
            )
            if not rows:
                return
            after = rows[-1]["position"]
            yield b"".join(self._csv_row(row) for row in rows)

    def _csv_row(self, row: Record) -> bytes:
        return _csv_line(
            [
                row["created_at"].isoformat(timespec="seconds").replace("+00:00", "Z"),
                _cell(row["kind"]),
                _cell(row["label"]),
                _cell(row["reference"]),
                self._major(row["amount"]),
                self._major(row["balance_after"]),
                self.currency,
            ]
        )

    def _major(self, amount: int) -> str:
        return f"{Decimal(amount).scaleb(-get_currency_precision(self.currency)):f}"


USAGE: Final = web.AppKey("USAGE", Usage)


def _days_away(day: date, days: int) -> date:
    """Another day, as far as the calendar goes."""
    return date.fromordinal(min(max(day.toordinal() + days, 1), date.max.toordinal()))


def _cell(text: str) -> str:
    return f"'{text}" if text.startswith(_FORMULA_STARTS) else text


def _csv_line(cells: list[Any]) -> bytes:
    line = io.StringIO()
    csv.writer(line).writerow(cells)
    return line.getvalue().encode()
