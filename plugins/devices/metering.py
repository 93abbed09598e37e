"""What running phones cost: by the second of the database's clock, exact to the smallest coin.

`metered_until` is set while a phone runs: all seconds before it are paid. What a charge leaves over, less
than one coin, is kept in `charge_remainder` (in 1/3600 of a coin), so that nothing is lost to rounding.
"""

from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final
from uuid import UUID

from plugins.devices.fleet import Fleet
from plugins.devices.model import NOTHING, Detail, DeviceState, Rented, Wanted
from plugins.devices.section import DevicesSection
from server.db import Database, Tx
from server.errors import Code, Problem
from server.events import Events
from server.i18n import N_, SOURCE_LOCALE, money
from server.interfaces import DeviceStopped, Ledger, Usage

CHARGE_EVERY_S: Final = 30
WARN_MINUTES: Final = 10
NOTICE_DAYS: Final = 1
_HOUR_S = 3600


@dataclass(frozen=True, slots=True)
class Reading:
    """A device whose meter was read: whether its owner could pay, and what is left."""

    device: Rented
    now: datetime
    paid: bool = True
    balance_after: int | None = None


class Metering:
    """Who may run phones, and what they pay."""

    def __init__(
        self,
        database: Database,
        ledger: Ledger,
        events: Events,
        fleet: Fleet,
        section: DevicesSection,
    ) -> None:
        self._database = database
        self._ledger = ledger
        self._events = events
        self._fleet = fleet
        self._min_balance_hours = section.min_balance_hours
        self._keep_stopped_days = section.keep_stopped_days

    async def require_cover(self, tx: Tx, joining: Rented) -> None:
        """Lock the owner's balance, which must cover the phones that run then.

        Raises Problem(insufficient_balance). A free phone needs no balance.
        """
        if joining.price_per_hour == 0:
            return
        others = (
            device.price_per_hour
            for device in self._fleet.of_owner(joining.owner_id)
            if device.is_due and device.id != joining.id
        )
        needed = self._min_balance_hours * (joining.price_per_hour + sum(others))
        if await self._ledger.lock_balance(tx, joining.owner_id) < needed:
            raise Problem(
                Code.INSUFFICIENT_BALANCE,
                N_("Your balance must cover {hours} h of all phones that run then: {needed}. Top up first."),
                hours=self._min_balance_hours,
                needed=money(needed, self._ledger.currency, SOURCE_LOCALE),
            )

    async def end(self, tx: Tx, device: Rented, *, charge: bool = True) -> Rented:
        """Stop a running phone's meter, and tell those to the right that it runs no more.

        Without `charge`, when nobody knows how long it ran, what is not metered yet is not paid.
        """
        if device.state is not DeviceState.RUNNING:
            return device
        if charge:
            device = (await self._read(tx, device)).device
        await self._events.publish(tx, DeviceStopped(device.id, device.owner_id))
        return replace(device, metered_until=None)

    async def meter(self) -> None:
        """Charge every phone that owes a coin or more, and stop those whose owners cannot pay."""
        rows = await self._database.fetch(
            """
            SELECT id FROM devices
            WHERE state = 'running' AND price_per_hour > 0
                AND metered_until <= now() - make_interval(secs => $1)
                AND floor(extract(epoch FROM now() - metered_until)) * price_per_hour + charge_remainder >= $2
            ORDER BY metered_until
            """,
            CHARGE_EVERY_S,
            _HOUR_S,
        )
        for row in rows:
            await self._meter(row["id"])

    async def _meter(self, device_id: UUID) -> None:
        async with self._fleet.holding(device_id) as device:
            if device is None or device.state is not DeviceState.RUNNING:
                return
            async with self._fleet.transaction(device_id) as tx:
                reading = await self._read(tx, device)
                if reading.paid:
                    device = await self._warn(tx, reading)
                else:
                    device = await self._stop_unpaid(tx, reading)
                await self._fleet.store(tx, device)

    async def _read(self, tx: Tx, device: Rented) -> Reading:
        """Charge the whole seconds since the last reading."""
        row = await tx.fetchrow(
            """
            SELECT now() AS now, metered_until, charge_remainder,
                greatest(floor(extract(epoch FROM now() - metered_until)), 0)::bigint AS ran_s
            FROM devices WHERE id = $1
            """,
            device.id,
        )
        assert row is not None
        amount, remainder = divmod(device.price_per_hour * row["ran_s"] + row["charge_remainder"], _HOUR_S)
        metered_until = row["metered_until"] + timedelta(seconds=row["ran_s"])
        device = replace(device, metered_until=metered_until, charge_remainder=remainder)
        if amount == 0:
            return Reading(device, row["now"])
        (charged,) = await self._ledger.charge(
            tx, [Usage(device.owner_id, amount, str(device.id), device.name)]
        )
        if charged.amount < amount:
            # What cannot be paid is let go: a balance never falls below nothing.
            return Reading(replace(device, charge_remainder=0), row["now"], paid=False)
        return Reading(device, row["now"], balance_after=charged.balance_after)

    async def _warn(self, tx: Tx, reading: Reading) -> Rented:
        """Tell the owner once, by whichever of the phones is read first, that the balance runs out."""
        device = reading.device
        if reading.balance_after is None:
            return device
        running = [one for one in self._fleet.of_owner(device.owner_id) if one.state is DeviceState.RUNNING]
        lasts_s = reading.balance_after * _HOUR_S // sum(one.price_per_hour for one in running)
        if lasts_s >= WARN_MINUTES * 60:
            return replace(device, warned=False)
        if any(one.warned for one in running):
            return device
        await self._fleet.tell(
            tx,
            device,
            N_("{name} will stop soon"),
            Detail(
                N_("Your balance lasts for less than {minutes} minutes. Top up to keep your phones running."),
                {"minutes": WARN_MINUTES},
            ),
            state=device.state,
        )
        return replace(device, warned=True)

    async def _stop_unpaid(self, tx: Tx, reading: Reading) -> Rented:
        device = await self.end(tx, reading.device, charge=False)
        return replace(
            device,
            state=DeviceState.STOPPING,
            wanted=Wanted.STOPPED,
            generation=device.generation + 1,
            detail=Detail(
                N_("Your balance is spent. The phone's data is kept for {days} days."),
                {"days": self._keep_stopped_days},
            ),
            spent_at=reading.now,
            warned=False,
        )

    async def expire(self) -> None:
        """Delete the phones that stood stopped too long after the balance was spent; tell a day before."""
        rows = await self._database.fetch(
            """
            SELECT id, spent_at < now() - make_interval(days => $1) AS over FROM devices
            WHERE state = 'stopped' AND spent_at < now() - make_interval(days => $2)
            """,
            self._keep_stopped_days,
            self._keep_stopped_days - NOTICE_DAYS,
        )
        for row in rows:
            await self._expire(row["id"], over=row["over"])

    async def _expire(self, device_id: UUID, *, over: bool) -> None:
        async with self._fleet.holding(device_id) as device:
            if device is None or device.state is not DeviceState.STOPPED or device.spent_at is None:
                return
            async with self._fleet.transaction(device_id) as tx:
                if await self._ledger.lock_balance(tx, device.owner_id) >= device.price_per_hour:
                    # Topped up meanwhile: it is kept like any other stopped phone.
                    device = replace(device, spent_at=None, warned=False, detail=NOTHING)
                elif over and device.warned:
                    device = replace(
                        device,
                        state=DeviceState.DELETING,
                        wanted=Wanted.DELETED,
                        generation=device.generation + 1,
                        detail=Detail(N_("Your balance was spent too long ago.")),
                    )
                elif not device.warned:
                    await self._fleet.tell(
                        tx,
                        device,
                        N_("{name} will be deleted soon"),
                        Detail(N_("Your balance is spent. Top up to keep the phone and its data.")),
                        state=device.state,
                    )
                    device = replace(device, warned=True)
                await self._fleet.store(tx, device)
