"""For how long a balance pays its owner's running phones, and what the owner is told ahead of its end.

Table `balance_warnings`: which warnings an owner has had. A row goes once the balance lasts for longer again,
so that a restart repeats nothing and a top-up makes the next end worth telling.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Final
from uuid import UUID

from plugins.devices.meters import HOUR_S, Reading
from server.db import Database
from server.i18n import N_
from server.interfaces import Message, Notifier, Topic

WARN_MINUTES: Final = (60, 10)


@dataclass(frozen=True, slots=True)
class Outlook:
    """What an owner has left after a charge, and for how long that pays all their running phones."""

    balance: int
    lasts_s: int

    def is_short_of(self, minutes: int) -> bool:
        """Whether it lasts for less. Of a spent one nothing is left to warn of."""
        return self.balance > 0 and self.lasts_s < minutes * 60


def outlooks(readings: Sequence[Reading], balances: Mapping[UUID, int]) -> dict[UUID, Outlook]:
    """The outlook of every owner of a phone that was read."""
    rates, begun = defaultdict[UUID, int](int), defaultdict[UUID, int](int)
    for reading in readings:
        rates[reading.owner_id] += reading.price_per_hour
        begun[reading.owner_id] += reading.remainder
    return {
        owner_id: Outlook(balances[owner_id], (balances[owner_id] * HOUR_S - begun[owner_id]) // rate)
        for owner_id, rate in rates.items()
    }


class Warnings:
    """Tells owners of the end of their balance, once at each of WARN_MINUTES."""

    def __init__(self, database: Database, notifier: Notifier, currency: str) -> None:
        self._database = database
        self._notifier = notifier
        self._currency = currency

    async def tell(self, found: Mapping[UUID, Outlook]) -> None:
        """Tell those whom it is news to; one who falls short of several limits at once hears of it once."""
        if not found:
            return
        limits = [(owner_id, minutes) for owner_id in found for minutes in WARN_MINUTES]
        short = [(owner_id, minutes) for owner_id, minutes in limits if found[owner_id].is_short_of(minutes)]
        enough = set(limits).difference(short)
        async with self._database.transaction() as tx:
            await tx.execute(
                """
                DELETE FROM balance_warnings w
                USING unnest($1::uuid[], $2::integer[]) AS enough (owner_id, minutes)
                WHERE w.owner_id = enough.owner_id AND w.minutes = enough.minutes
                """,
                [owner_id for owner_id, _ in enough],
                [minutes for _, minutes in enough],
            )
            news = await tx.fetch(
                """
                INSERT INTO balance_warnings (owner_id, minutes)
                SELECT owner_id, minutes FROM unnest($1::uuid[], $2::integer[]) AS short (owner_id, minutes)
                ON CONFLICT DO NOTHING RETURNING owner_id
                """,
                [owner_id for owner_id, _ in short],
                [minutes for _, minutes in short],
            )
            owners = {row["owner_id"] for row in news}
            await self._notifier.publish_all(tx, [self._message(owner, found[owner]) for owner in owners])

    def _message(self, owner_id: UUID, outlook: Outlook) -> Message:
        return Message(
            owner_id,
            Topic.BILLING_BALANCE,
            N_("Your balance runs out soon"),
            N_("It pays your running phones for {minutes} min more. Top up to keep them running."),
            {"minutes": -(-outlook.lasts_s // 60)},
            {
                "balance": outlook.balance,
                "amount": 0,
                "currency": self._currency,
                "kind": "low",
                "lasts_s": outlook.lasts_s,
            },
        )
