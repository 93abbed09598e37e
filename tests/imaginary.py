"""Phones that exist in rows alone: nothing runs, and time passes when a test says so."""

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from typing import Self
from uuid import UUID, uuid4

import pytest

from phones.ports import PortAllocator
from plugins.billing.ledger import ACCOUNTS, Posting
from plugins.billing.model import AccountKind
from plugins.devices.fleet import Fleet
from plugins.devices.metering import Metering
from plugins.devices.meters import Meters, Moment
from plugins.devices.model import DeviceState, Hardware, Rented, Wanted
from plugins.devices.schema import MIGRATIONS
from plugins.devices.section import DevicesSection, ImageSection, PlanSection
from server.db import Tx
from server.interfaces import DATABASE, NOTIFIER
from tests.house import House


class Time:
    """The database's clock and our steady one, which only a test moves."""

    def __init__(self) -> None:
        self.at = datetime(2030, 1, 1, tzinfo=UTC)
        self.steady_s = 1000.0

    def run(self, seconds: float) -> None:
        """Time passes."""
        self.at += timedelta(seconds=seconds)
        self.steady_s += seconds

    def set_clock(self, seconds: float) -> None:
        """Somebody sets the database's clock, forwards or back; no time passes."""
        self.at += timedelta(seconds=seconds)


class Street:
    """A bank's customers and their phones."""

    def __init__(self, bank: House, time: Time) -> None:
        self.bank = bank
        self.time = time
        self.app = bank.app

    @classmethod
    @asynccontextmanager
    async def opened(cls, bank: House, **plans: int) -> AsyncIterator[Self]:
        """A street with these plans and their prices; it is cleared away at the end."""
        time = Time()

        async def moment(_meters: Meters, _tx: Tx) -> Moment:
            return Moment(time.at, time.steady_s)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Meters, "moment", moment)
            await bank.app[DATABASE].migrate("devices", MIGRATIONS)
            street = cls(bank, time)
            await street.restart(**plans)
            yield street
            await bank.app[DATABASE].execute("DELETE FROM devices")
            await bank.app[DATABASE].execute("DELETE FROM balance_warnings")

    async def restart(self, **plans: int) -> None:
        """The server is another process now, which knows what the rows say; perhaps with other prices."""
        if plans:
            self.plans = plans
        sections = tuple(
            PlanSection(name=name, price_per_hour=price) for name, price in sorted(self.plans.items())
        )
        ports = PortAllocator(adb=(1, 2), webrtc=(3, 4), scrcpy=(5, 6), bind_address=None)
        self.time.steady_s = 7.0 + self.time.steady_s / 3
        self.fleet = Fleet(self.app[DATABASE], self.app[NOTIFIER], ports)
        await self.fleet.load()
        self.metering = Metering(self.app, self.fleet, DevicesSection(plans=sections))
        await self.metering.open()

    # Money

    async def owner(self, balance: int) -> UUID:
        """Somebody who has so much."""
        owner_id = UUID((await self.bank.sign_up()).user["id"])
        await self.give(owner_id, balance - self.balance(owner_id))
        return owner_id

    async def give(self, owner_id: UUID, amount: int) -> None:
        """Top a balance up, or take from it."""
        if amount:
            gift = Posting(owner_id, amount, AccountKind.PROMOTIONS, "gift", str(uuid4()))
            async with self.app[DATABASE].transaction() as tx:
                await self.app[ACCOUNTS].post(tx, [gift])

    def balance(self, owner_id: UUID) -> int:
        """What somebody has."""
        return self.app[ACCOUNTS].balance_of(owner_id).balance

    async def paid(self, *device_ids: UUID) -> int:
        """All that was ever charged for these phones."""
        return int(
            await self.app[DATABASE].fetchval(
                "SELECT coalesce(-sum(amount), 0)::bigint FROM ledger_entries"
                " WHERE kind = 'device_time' AND amount < 0 AND reference = ANY ($1)",
                [str(device_id) for device_id in device_ids],
            )
        )

    async def heard(self, owner_id: UUID, topic: str) -> list[tuple[str, str]]:
        """Titles and bodies of what somebody was told about something, in English, oldest first."""
        rows = await self.app[DATABASE].fetch(
            "SELECT title, body, params FROM notifications WHERE user_id = $1 AND topic = $2 AND title <> ''"
            " ORDER BY id",
            owner_id,
            topic,
        )
        return [(row["title"].format(**row["params"]), row["body"].format(**row["params"])) for row in rows]

    async def warnings(self, owner_id: UUID) -> list[str]:
        """What somebody was told of a balance that runs out."""
        heard = await self.heard(owner_id, "billing.balance")
        return [body for title, body in heard if title == "Your balance runs out soon"]

    # Phones

    async def rent(self, owner_id: UUID, plan: str = "basic") -> UUID:
        """A phone that runs."""
        section = PlanSection(name=plan, price_per_hour=self.plans[plan])
        device = Rented(
            id=uuid4(),
            owner_id=owner_id,
            name="mine",
            image="android-12",
            plan=plan,
            price_per_hour=section.price_per_hour,
            hardware=Hardware.chosen(ImageSection(name="android-12", kind="simulated"), section),
            state=DeviceState.STARTING,
            wanted=Wanted.RUNNING,
            created_at=self.time.at,
            updated_at=self.time.at,
        )
        async with self.app[DATABASE].transaction() as tx:
            await self.fleet.insert(tx, device)
        await self.come_up(device.id)
        return device.id

    async def come_up(self, device_id: UUID) -> None:
        """A phone runs from now on."""
        async with self.fleet.holding(device_id) as device, self.fleet.transaction(device_id) as tx:
            assert device is not None
            await self.fleet.store(tx, await self.metering.start(tx, device))

    async def start(self, device_id: UUID) -> None:
        """Start a phone that is down. Raises Problem(insufficient_balance)."""
        async with self.fleet.holding(device_id) as device, self.fleet.transaction(device_id) as tx:
            assert device is not None
            await self.metering.require_cover(tx, device)
            starting = replace(device, state=DeviceState.STARTING, wanted=Wanted.RUNNING, spent_at=None)
            await self.fleet.store(tx, starting)
        await self.come_up(device_id)

    async def stop(self, device_id: UUID, *, charge: bool = True) -> None:
        """Stop a phone, whatever it does."""
        async with self.fleet.holding(device_id) as device, self.fleet.transaction(device_id) as tx:
            assert device is not None
            await self.metering.end(tx, device, charge=charge)
            await self.fleet.store(tx, replace(device, state=DeviceState.STOPPED, wanted=Wanted.STOPPED))

    def runs(self, *device_ids: UUID) -> list[bool]:
        """Which of these phones run."""
        found = [self.fleet.get(device_id) for device_id in device_ids]
        return [device is not None and device.state is DeviceState.RUNNING for device in found]

    async def remainders(self, device_ids: Sequence[UUID]) -> list[int]:
        """What is left over of each phone."""
        rows = await self.app[DATABASE].fetch("SELECT device_id, remainder FROM device_meters")
        found = {row["device_id"]: row["remainder"] for row in rows}
        return [found[device_id] for device_id in device_ids]
