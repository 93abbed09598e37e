"""The daily check: whether the books are right, shown to administrators, and an alarm where they are not.

Table: `ledger_checks`. The constraints make most of this impossible; the check is for the day somebody
changed a row by hand, restored half a backup, or wrote a fault into the constraints.
"""

from typing import Final

from aiohttp import web
from prometheus_client import Gauge

from server.api import Moment, Outgoing
from server.db import Record
from server.i18n import N_
from server.interfaces import DATABASE, DIRECTORY, NOTIFIER, Topic
from server.observe import METRICS, log

CHECK_EVERY_S: Final = 86400
CHECK_TIMEOUT_S: Final = 300.0
_SLACK_S: Final = 60

FINDINGS: Final = {
    "unbalanced_transactions": N_("Transactions whose entries do not sum up to zero"),
    "ledger_sum": N_("What all accounts together differ from zero"),
    "wrong_balances": N_("Accounts whose balance is not the sum of their entries"),
    "wrong_histories": N_("Accounts whose last entry does not end at their balance"),
    "paid_without_credit": N_("Paid orders without exactly one credit of their amount"),
    "credit_without_order": N_("Credits without a paid order"),
    "unapplied_difference": N_("What the unapplied payments differ from their account"),
    "clearing_difference": N_("What payments less refunds differ from the clearing account"),
}

IN_MONEY: Final = frozenset({"ledger_sum", "unapplied_difference", "clearing_difference"})
"""The findings that are amounts; the others are counts."""


class LedgerCheck(Outgoing):
    """What a check found: nothing, or how many or how much of what; amounts in minor units."""

    at: Moment
    sound: bool
    findings: dict[str, int]


class Checks:
    """Checks the books."""

    def __init__(self, app: web.Application) -> None:
        self._database = app[DATABASE]
        self._directory = app[DIRECTORY]
        self._notifier = app[NOTIFIER]
        self._found = Gauge(
            "cloudphone_ledger_findings",
            "What the last check of the ledger found wrong; 0 is right.",
            registry=app[METRICS].registry,
        )

    async def last(self) -> LedgerCheck | None:
        """The newest check, if there was one."""
        row = await self._database.fetchrow("SELECT at, findings FROM ledger_checks ORDER BY id DESC LIMIT 1")
        return _check(row) if row else None

    async def run_if_due(self) -> None:
        """Check where the last one is a day old; a restart does not repeat it."""
        is_fresh = await self._database.fetchval(
            "SELECT true FROM ledger_checks WHERE at > now() - make_interval(secs => $1) LIMIT 1",
            CHECK_EVERY_S - _SLACK_S,
        )
        if not is_fresh:
            await self.run()

    async def run(self) -> LedgerCheck:
        """Check everything as it is at one moment, and alarm administrators where something is wrong."""
        findings = await self._look()
        self._found.set(len(findings))
        async with self._database.transaction() as tx:
            row = await tx.fetchrow(
                "INSERT INTO ledger_checks (findings) VALUES ($1) RETURNING at, findings", findings
            )
            if findings:
                log.error("the ledger is not sound", extra={"findings": str(findings)})
                await self._notifier.broadcast(
                    tx,
                    await self._directory.administrators(tx),
                    Topic.SYSTEM,
                    N_("The ledger is not sound"),
                    N_("The daily check found {count} things that cannot be. See the money overview."),
                    params={"count": len(findings)},
                    data={"findings": findings},
                )
        assert row is not None
        return _check(row)

    async def _look(self) -> dict[str, int]:
        async with self._database.transaction() as tx:
            await tx.execute("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ, READ ONLY")
            await tx.execute(f"SET LOCAL statement_timeout = {CHECK_TIMEOUT_S * 1000:.0f}")
            (row,) = await tx.fetch(
                """
                WITH sums AS (
                    SELECT a.id, a.kind, a.balance, coalesce(e.total, 0) AS total,
                        coalesce(e.last, 0) AS last
                    FROM ledger_accounts a LEFT JOIN (
                        SELECT account_id, sum(amount) AS total,
                            (array_agg(balance_after ORDER BY position DESC))[1] AS last
                        FROM ledger_entries GROUP BY account_id
                    ) e ON e.account_id = a.id
                ), credits AS (
                    SELECT reference, count(*) AS times, sum(amount) AS amount FROM ledger_entries
                    WHERE kind = 'top_up' AND amount > 0 GROUP BY reference
                )
                SELECT
                    (SELECT count(*) FROM (
                        SELECT FROM ledger_entries GROUP BY transaction_id HAVING sum(amount) <> 0
                    ) t) AS unbalanced_transactions,
                    (SELECT coalesce(sum(balance), 0) FROM sums) AS ledger_sum,
                    (SELECT count(*) FROM sums WHERE balance <> total) AS wrong_balances,
                    (SELECT count(*) FROM sums WHERE balance <> last) AS wrong_histories,
                    (SELECT count(*) FROM orders o LEFT JOIN credits c ON c.reference = o.number
                     WHERE o.state = 'paid'
                        AND (c.times, c.amount) IS DISTINCT FROM (1::bigint, o.amount::numeric)
                    ) AS paid_without_credit,
                    (SELECT count(*) FROM credits c LEFT JOIN orders o
                     ON o.number = c.reference AND o.state = 'paid' WHERE o.id IS NULL
                    ) AS credit_without_order,
                    (SELECT balance FROM sums WHERE kind = 'unapplied')
                        - (SELECT coalesce(sum(amount), 0) FROM payments WHERE state = 'unapplied')
                        AS unapplied_difference,
                    (SELECT balance FROM sums WHERE kind = 'clearing')
                        + (SELECT coalesce(sum(amount - refunded), 0) FROM payments) AS clearing_difference
                """,
                timeout_s=CHECK_TIMEOUT_S,
            )
        return {name: int(row[name]) for name in FINDINGS if row[name]}


CHECKS: Final = web.AppKey("CHECKS", Checks)


def _check(row: Record) -> LedgerCheck:
    return LedgerCheck(at=row["at"], sound=not row["findings"], findings=row["findings"])
