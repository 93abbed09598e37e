"""What running phones cost: by the second, exact to the smallest coin, and what follows when it is not paid.

All phones are charged in one transaction, so that a charge and the meters it is for stand or fall together.
What follows from a balance that runs out is done afterwards, and found again by the next charge should it be
broken off: rows say what an owner was told, a balance of nothing whose phones to stop.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Final
from uuid import UUID

from aiohttp import web

from plugins.devices.fleet import Fleet
from plugins.devices.meters import Meters, Reading
from plugins.devices.model import NOTHING, Detail, DeviceState, Rented, Wanted
from plugins.devices.outlook import Warnings, outlooks
from plugins.devices.section import DevicesSection
from server.db import Tx
from server.errors import Code, Problem
from server.i18n import N_, SOURCE_LOCALE, money
from server.interfaces import AUDIT, CLOCK, DATABASE, EVENTS, LEDGER, NOTIFIER, DeviceStopped

CHARGE_EVERY_S: Final = 20
NOTICE_DAYS: Final = 1


class Metering:
    """Who may run phones, and what they pay."""

    def __init__(self, app: web.Application, fleet: Fleet, section: DevicesSection) -> None:
        self._database = app[DATABASE]
        self._ledger = app[LEDGER]
        self._audit = app[AUDIT]
        self._events = app[EVENTS]
        self._fleet = fleet
        self._meters = Meters(app[CLOCK])
        self._warnings = Warnings(app[DATABASE], app[NOTIFIER], self._ledger.currency)
        self._prices = {plan.name: plan.price_per_hour for plan in section.plans}
        self._min_balance_hours = section.min_balance_hours
        self._keep_stopped_days = section.keep_stopped_days

    async def open(self) -> None:
        """Go on with the meters of the last server, before anything else happens to them."""
        await self._meters.open(self._database)

    def spending_of(self, owner_id: UUID) -> int:
        """What a user's running phones cost now, in minor units an hour."""
        devices = self._fleet.of_owner(owner_id)
        return sum(device.price_per_hour for device in devices if device.state is DeviceState.RUNNING)

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
                needed=self._spoken(needed),
            )

    def _spoken(self, amount: int) -> str:
        return money(amount, self._ledger.currency, SOURCE_LOCALE)

    # One phone's meter

    async def start(self, tx: Tx, device: Rented) -> Rented:
        """A phone runs: it costs its price from this moment on."""
        return replace(device, state=DeviceState.RUNNING, started_at=await self._meters.start(tx, device))

    async def end(self, tx: Tx, device: Rented, *, charge: bool = True) -> None:
        """Stop a running phone's meter, and tell those to the right that it runs no more.

        Without `charge`, when nobody knows how long it ran, what is not metered yet is not paid.
        """
        if device.state is not DeviceState.RUNNING:
            return
        if charge:
            await self._charge(tx, await self._meters.read(tx, device.id))
        await self._meters.stop(tx, device.id)
        await self._events.publish(tx, DeviceStopped(device.id, device.owner_id))

    async def _charge(self, tx: Tx, readings: Sequence[Reading]) -> Mapping[UUID, int]:
        """Take what was read, as far as there is something; what each owner has left."""
        if not readings:
            return {}
        charged = await self._ledger.charge(tx, [reading.usage for reading in readings])
        met = list(zip(readings, charged, strict=True))
        # What cannot be paid is let go: a balance never falls below nothing.
        unpaid = [reading.device_id for reading, taken in met if taken.amount < reading.owed]
        if unpaid:
            await self._meters.let_go(tx, unpaid)
        return {reading.owner_id: taken.balance_after for reading, taken in met}

    # All of them

    async def meter(self) -> None:
        """Charge every running phone; warn owners whose balance runs out, stop phones where it is spent."""
        async with self._database.transaction() as tx:
            readings = await self._meters.read(tx)
            balances = await self._charge(tx, readings)
        await self._warnings.tell(outlooks(readings, balances))
        for reading in readings:
            if balances[reading.owner_id] == 0:
                await self._stop_spent(reading.device_id)

    async def _stop_spent(self, device_id: UUID) -> None:
        """Stop a phone and keep its data, unless its owner has something again or stopped it meanwhile."""
        async with self._fleet.holding(device_id) as device:
            if device is None or device.state is not DeviceState.RUNNING:
                return
            async with self._fleet.transaction(device_id) as tx:
                balances = await self._charge(tx, await self._meters.read(tx, device_id))
                if balances.get(device.owner_id) != 0:
                    return
                await self.end(tx, device, charge=False)
                detail = Detail(
                    N_("Your balance is spent. The phone's data is kept for {days} days."),
                    {"days": self._keep_stopped_days},
                )
                device = replace(
                    device,
                    state=DeviceState.STOPPING,
                    wanted=Wanted.STOPPED,
                    generation=device.generation + 1,
                    detail=detail,
                    spent_at=await tx.fetchval("SELECT now()"),
                    deletion_warned=False,
                )
                await self._fleet.store(tx, device)

    # Other prices

    async def reprice(self, *, seen: bool) -> None:
        """Have every device cost what its plan costs now; what it ran until then is paid at the old price.

        A running one only where it is `seen` to run. One whose plan is gone keeps its price.
        """
        for device in self._fleet.all():
            if self._price_of(device) != device.price_per_hour:
                await self._reprice(device.id, seen=seen)

    def _price_of(self, device: Rented) -> int:
        return self._prices.get(device.plan, device.price_per_hour)

    async def _reprice(self, device_id: UUID, *, seen: bool) -> None:
        async with self._fleet.holding(device_id) as device:
            if device is None or device.wanted is Wanted.DELETED:
                return
            before, price = device.price_per_hour, self._price_of(device)
            if price == before or (device.state is DeviceState.RUNNING and not seen):
                return
            async with self._fleet.transaction(device_id) as tx:
                await self._charge(tx, await self._meters.read(tx, device_id))
                await self._meters.set_price(tx, device_id, price)
                device = await self._fleet.store(tx, replace(device, price_per_hour=price))
                await self._audit.record(
                    tx,
                    action="devices.reprice",
                    target=str(device_id),
                    before={"price_per_hour": before},
                    after={"price_per_hour": price},
                )
                prices: dict[str, object] = {"price": self._spoken(price), "before": self._spoken(before)}
                body = N_("The price of its plan was changed. Until now it was {before} an hour.")
                title = N_("{name} costs {price} an hour from now on")
                await self._fleet.tell(tx, device, title, Detail(body, prices), state=device.state)

    # What nobody pays for

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
                if await self._ledger.lock_balance(tx, device.owner_id) > 0:
                    # Topped up meanwhile: it is kept like any other stopped phone.
                    device = replace(device, spent_at=None, deletion_warned=False, detail=NOTHING)
                elif over and device.deletion_warned:
                    device = replace(
                        device,
                        state=DeviceState.DELETING,
                        wanted=Wanted.DELETED,
                        generation=device.generation + 1,
                        detail=Detail(N_("Your balance was spent too long ago.")),
                    )
                elif not device.deletion_warned:
                    device = await self._give_notice(tx, device)
                await self._fleet.store(tx, device)

    async def _give_notice(self, tx: Tx, device: Rented) -> Rented:
        """Tell the owner; a notice that comes late, as no server ran, has the phone kept for its day too."""
        await self._fleet.tell(
            tx,
            device,
            N_("{name} will be deleted soon"),
            Detail(N_("Your balance is spent. Top up to keep the phone and its data.")),
            state=device.state,
        )
        counted_from = await tx.fetchval(
            "SELECT greatest($1::timestamptz, now() - make_interval(days => $2))",
            device.spent_at,
            self._keep_stopped_days - NOTICE_DAYS,
        )
        return replace(device, spent_at=counted_from, deletion_warned=True)
