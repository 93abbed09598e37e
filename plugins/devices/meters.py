"""The meters of running phones, a row each: until when a phone has paid, and what was less than a coin.

Two clocks. What counts is the database's, which everything agrees on and a restart finds again. It may be
set forwards or back while phones run, so a row also holds what our steady clock said at the same moment:
where the two disagree about how long ago that was, the database's was set, and the steady one is believed. Of
the time in which no server ran, the database's clock alone knows.

A transaction locks meters first, then the ledger's accounts, then notifications.
"""

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from typing import Final
from uuid import UUID

from plugins.devices.model import Rented
from server.clock import Clock
from server.db import Database, Tx
from server.interfaces import Usage

HOUR_S: Final = 3600
JUMP_S: Final = 3
"""A clock that is off by more was set; one that is off by less is only read a little late."""
SLOW_S: Final = 1.0


@dataclass(frozen=True, slots=True)
class Moment:
    """A moment by the database's clock and by our steady one, in seconds, where it can be told that well."""

    at: datetime
    steady_s: float | None


@dataclass(frozen=True, slots=True)
class Reading:
    """What a running phone owes since it was read last, in whole coins; `remainder` is left, in 1/3600."""

    device_id: UUID
    owner_id: UUID
    name: str
    price_per_hour: int
    owed: int
    remainder: int

    @property
    def usage(self) -> Usage:
        """What the ledger shall charge."""
        return Usage(self.owner_id, self.owed, str(self.device_id), self.name)


class Meters:
    """All meters. A phone's runs from `start` to `stop`, which belong into the transactions of its state."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    async def open(self, database: Database) -> None:
        """Take over the meters of a server that is gone, and with it its steady clock. Before anything else.

        Until now the database's clock counts alone. It may have been set back meanwhile: then from now on.
        """
        async with database.transaction() as tx:
            now = await self.moment(tx)
            await tx.execute(
                """
                UPDATE device_meters
                SET steady_s = $2 - greatest(extract(epoch FROM $1 - metered_until), 0)::double precision
                WHERE metered_until IS NOT NULL
                """,
                now.at,
                now.steady_s,
            )

    async def moment(self, tx: Tx) -> Moment:
        """Now. Where the answer came late, nobody knows when within the wait it was true."""
        asked_s = self._clock.monotonic()
        at: datetime = await tx.fetchval("SELECT clock_timestamp()")
        steady_s = self._clock.monotonic()
        return Moment(at, steady_s if steady_s - asked_s < SLOW_S else None)

    async def start(self, tx: Tx, device: Rented) -> datetime:
        """A phone runs, at the device's price, from the moment that is given back."""
        now = await self.moment(tx)
        await tx.execute(
            """
            INSERT INTO device_meters (device_id, owner_id, price_per_hour, metered_until, steady_s)
            VALUES ($1, $2, $3, $4, $5)
            ON CONFLICT (device_id) DO UPDATE SET price_per_hour = excluded.price_per_hour,
                metered_until = excluded.metered_until, steady_s = excluded.steady_s
            """,
            device.id,
            device.owner_id,
            device.price_per_hour,
            now.at,
            now.steady_s,
        )
        return now.at

    async def read(self, tx: Tx, device_id: UUID | None = None) -> list[Reading]:
        """Move on the meter of one phone, or those of all that cost something, by the seconds they ran.

        Whoever reads charges what is owed in the same transaction. A phone that does not run has no reading.
        """
        now = await self.moment(tx)
        rows = await tx.fetch(
            """
            WITH held AS MATERIALIZED (
                SELECT m.device_id, d.name, m.price_per_hour, m.remainder, CASE
                    WHEN abs(extract(epoch FROM $1 - m.metered_until) - ($2 - m.steady_s)) > $4
                    THEN $1 - make_interval(secs => $2 - m.steady_s)
                    ELSE m.metered_until END AS since
                FROM device_meters m JOIN devices d ON d.id = m.device_id
                WHERE m.metered_until IS NOT NULL
                    AND CASE WHEN $3::uuid IS NULL THEN m.price_per_hour > 0 ELSE m.device_id = $3 END
                ORDER BY m.device_id FOR NO KEY UPDATE OF m
            ), ran AS (
                SELECT *, greatest(floor(extract(epoch FROM $1 - since)), 0)::bigint AS ran_s FROM held
            ), owing AS (
                SELECT *, price_per_hour * ran_s + remainder AS parts FROM ran
            )
            UPDATE device_meters m SET
                metered_until = o.since + make_interval(secs => o.ran_s),
                steady_s = $2 - extract(epoch FROM $1 - o.since)::double precision + o.ran_s,
                remainder = o.parts % $5
            FROM owing o WHERE m.device_id = o.device_id
            RETURNING m.device_id, m.owner_id, o.name, m.price_per_hour, o.parts / $5 AS owed, m.remainder
            """,
            now.at,
            now.steady_s,
            device_id,
            JUMP_S,
            HOUR_S,
        )
        return [Reading(*row) for row in rows]

    async def let_go(self, tx: Tx, device_ids: Collection[UUID]) -> None:
        """Forget what is left over of phones whose owner could not pay the rest either."""
        await tx.execute("UPDATE device_meters SET remainder = 0 WHERE device_id = ANY ($1)", device_ids)

    async def set_price(self, tx: Tx, device_id: UUID, price_per_hour: int) -> None:
        """Another price from the last reading on."""
        await tx.execute(
            "UPDATE device_meters SET price_per_hour = $2 WHERE device_id = $1", device_id, price_per_hour
        )

    async def stop(self, tx: Tx, device_id: UUID) -> None:
        """The phone runs no more; what was not read is never paid."""
        await tx.execute(
            "UPDATE device_meters SET metered_until = NULL, steady_s = NULL WHERE device_id = $1", device_id
        )
