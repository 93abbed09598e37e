"""What is done for a device in each of its passing states, once.

A step may be broken off anywhere and is repeated from the row. It asks for its turn at the phones' machine
for as long as the machine has to act, and writes the row when that is done, unless something else is wanted
of the device by then.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Coroutine
from contextlib import asynccontextmanager, suppress
from dataclasses import replace
from datetime import datetime
from typing import Any, Final, TypeVar
from uuid import UUID

from phones.adb import AdbFault
from phones.runtime import (
    FoundPhone,
    MachineFault,
    PhoneStatus,
    PortTaken,
    Runtime,
    RuntimeFault,
    RuntimeUnavailable,
)
from plugins.devices.fleet import Fleet
from plugins.devices.links import Links
from plugins.devices.metering import Metering
from plugins.devices.model import COMING_UP, NOTHING, PASSING, Detail, DeviceState, Rented, Wanted
from plugins.devices.section import DevicesSection
from plugins.devices.turns import Place, Turns
from server.clock import Clock
from server.db import Database, Tx, UniqueViolation
from server.errors import Problem
from server.events import Events
from server.i18n import N_
from server.interfaces import DeviceDeleted
from server.observe import log

PORT_TRIES: Final = 4
RUNTIME_DEADLINE_S: Final = 60.0
LEFTOVER_DEADLINE_S: Final = 10.0
PATIENCE: Final = 2
REVIVAL_PATIENCE: Final = 15
"""For how many seconds a failure may turn out to be the end of the machine itself."""
TELL_EVERY_PERCENT: Final = 10
FIRST_POLL_S = 0.05
LAST_POLL_S = 1.0
_ASK_DEADLINE_S = 5.0

TROUBLES: Final = {
    DeviceState.CREATING: N_("The phone could not be started: {reason}"),
    DeviceState.STARTING: N_("The phone could not be started: {reason}"),
    DeviceState.STOPPING: N_("The phone could not be stopped: {reason}"),
    DeviceState.RESETTING: N_("The phone could not be reset: {reason}"),
    DeviceState.DELETING: N_("The phone could not be deleted: {reason}"),
}
QUEUED: Final = N_("queued, {place.ordinal}")
FETCHING: Final = N_("The Android image is being downloaded: {percent} %")

T = TypeVar("T")


class Steps:
    """The steps of all devices, which share the machine's turns."""

    def __init__(
        self,
        runtime: Runtime,
        fleet: Fleet,
        links: Links,
        metering: Metering,
        database: Database,
        events: Events,
        clock: Clock,
        section: DevicesSection,
    ) -> None:
        self.waits: Final[dict[UUID, Detail]] = {}
        """What devices wait for, but for their turn."""
        self.is_closing = False
        """Whether nobody waits for anything any more: the next start finds what was left."""
        self._turns = Turns(section.operations_at_once)
        self._runtime = runtime
        self._fleet = fleet
        self._links = links
        self._metering = metering
        self._database = database
        self._events = events
        self._clock = clock
        self._bind_address = section.bind_address
        self._start_deadline_s = section.start_deadline_s

    def waits_for(self, device: Rented) -> Detail:
        """What keeps a passing device waiting at this moment."""
        if device.state not in PASSING:
            return NOTHING
        place = self._turns.place_of(device.id)
        return Detail(QUEUED, {"place": Place(place)}) if place else self.waits.get(device.id, NOTHING)

    @asynccontextmanager
    async def _turn(self, device: Rented) -> AsyncIterator[None]:
        """A turn at the machine. A stop must not queue behind phones that shall come up."""
        async with self._turns.take(device.id, urgent=device.state not in COMING_UP):
            yield

    async def take(self, device: Rented) -> None:
        """The work of the device's present state.

        Raises RuntimeUnavailable, RuntimeFault and DatabaseUnavailable, to be tried again.
        """
        epoch = self._runtime.epoch
        try:
            match device.state:
                case DeviceState.CREATING | DeviceState.STARTING:
                    await self._bring_up(device)
                case DeviceState.STOPPING:
                    await self.end(device)
                    await self._arrive(device)
                case DeviceState.RESETTING:
                    await self.end(device)
                    async with self._turn(device):
                        await soon(self._runtime.wipe(str(device.id)))
                    await self._arrive(device)
                case DeviceState.DELETING:
                    await self._remove(device)
                case DeviceState.FAILED:
                    await self._clear_away(device)
        except RuntimeUnavailable:
            raise
        except RuntimeFault as fault:
            if device.state is DeviceState.FAILED:
                raise
            if isinstance(fault, MachineFault) and await self._goes_away(device, epoch):
                raise RuntimeUnavailable(str(fault)) from None
            await self.fail(device, Detail(TROUBLES[device.state], {"reason": str(fault)}))

    async def _goes_away(self, device: Rented, epoch: int) -> bool:
        """Whether the machine is going down, which is then why it failed.

        One that does takes its phones along first, so that more patience is due to a phone that just died.
        """
        waits = REVIVAL_PATIENCE if device.revived_at else PATIENCE
        for _ in range(waits):
            await self._clock.sleep(1)
            try:
                await soon(self._runtime.check())
            except RuntimeUnavailable:
                return True
            if self._runtime.epoch != epoch:
                return True
        return False

    async def _bring_up(self, device: Rented) -> None:
        """Fetch, create, start, and wait for Android. The queue and the way of the image take their time."""
        try:
            await self._fetch(device)
            if not await self._start(device):
                return
            async with asyncio.timeout(self._start_deadline_s):
                run = await self._booted(device)
        except TimeoutError:
            await soon(self._runtime.check())  # where it is away, nobody knows what the phone does
            seconds = f"{self._start_deadline_s:g}"
            too_slow = Detail(N_("The phone did not come up within {seconds} s."), {"seconds": seconds})
            await self.fail(device, too_slow)
        except Problem as problem:
            await self.fail(device, Detail(problem.detail, dict(problem.params)))
        else:
            if run is not None:
                await self._came_up(device, run)

    async def _fetch(self, device: Rented) -> None:
        """Have the phone's image on the machine; its owner sees how far it is."""
        told = -TELL_EVERY_PERCENT
        async for percent in self._runtime.fetch(device.spec(self._bind_address)):
            detail = self.waits[device.id] = Detail(FETCHING, {"percent": percent})
            if percent - told >= TELL_EVERY_PERCENT:
                title = N_("{name} waits for its Android image") if told < 0 else ""
                told = percent
                async with self._database.transaction() as tx:
                    await self._fleet.tell(tx, device, title, detail, state=device.state)
        self.waits.pop(device.id, None)

    async def _start(self, device: Rented) -> bool:
        """Have the phone's process run; False when something else is wanted meanwhile."""
        tries = 0
        while (current := self.same_intent(device)) is not None:
            try:
                async with self._turn(device):
                    await self._end_restarted(device)
                    spec = current.spec(self._bind_address)
                    await self._to_its_end(self._runtime.create(spec))
                    await self._to_its_end(self._runtime.start(spec))
                return True
            except PortTaken as taken:
                tries += 1
                if tries == PORT_TRIES:
                    raise
                await self._take_other_ports(device, taken.port)
        return False

    async def _to_its_end(self, making: Coroutine[Any, Any, None]) -> None:
        """Make something at the machine; where that is not wanted any more, it is still waited for a while.

        A machine goes on with what it was asked, and whoever removes the phone next must find it.
        """
        task = asyncio.create_task(soon(making))
        try:
            await asyncio.shield(task)
        except asyncio.CancelledError:
            if not self.is_closing:
                await asyncio.wait({task}, timeout=LEFTOVER_DEADLINE_S)
            raise
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def _end_restarted(self, device: Rented) -> None:
        """A phone that came up again by itself is started anew, so that its next end is seen too."""
        if device.state is DeviceState.STARTING:
            phone = await soon(self._runtime.inspect(str(device.id)))
            if phone is not None and phone.has_restarted:
                await soon(self._runtime.stop(str(device.id)))

    async def _take_other_ports(self, device: Rented, taken: int) -> None:
        self._fleet.ports.mark_foreign(taken)
        async with self._fleet.holding(device.id):
            current = self.same_intent(device)
            if current is None:
                return
            # Where a row holds one of them that memory did not know of, the next try takes others.
            with suppress(UniqueViolation), self._fleet.new_ports(device.id) as ports:
                async with self._fleet.transaction(device.id) as tx:
                    await self._fleet.store(tx, replace(current, ports=ports))

    async def _booted(self, device: Rented) -> str | None:
        """Wait until Android is up; the run it came up in, which may have no name.

        None when something else is wanted meanwhile. Raises RuntimeFault.
        """
        pause_s = FIRST_POLL_S
        while (current := self.same_intent(device)) is not None:
            try:
                link = await self._links.to(current)
                answer = await link.shell("getprop sys.boot_completed", timeout_s=_ASK_DEADLINE_S)
                if answer.stdout.strip() == b"1":
                    return (await self._alive(device)).run or ""
            except AdbFault:
                with suppress(RuntimeUnavailable):
                    await self._alive(device)
            await self._clock.sleep(pause_s)
            pause_s = min(2 * pause_s, LAST_POLL_S)
        return None

    async def _alive(self, device: Rented) -> FoundPhone:
        """Raises RuntimeFault where the phone is down, or was meanwhile."""
        phone = await soon(self._runtime.inspect(str(device.id)))
        if phone is None or phone.status is not PhoneStatus.RUNNING or phone.has_restarted:
            raise MachineFault("it ended while it was starting")
        return phone

    async def _came_up(self, device: Rented, run: str) -> None:
        async with self._fleet.holding(device.id):
            current = self.same_intent(device)
            if current is None:
                return
            async with self._fleet.transaction(device.id) as tx:
                running = await self._metering.start(tx, current)
                await self._fleet.store(tx, replace(running, detail=NOTHING, run=run or None))

    async def end(self, device: Rented) -> None:
        """Bring the phone down. Raises RuntimeFault."""
        await self._links.close(device.id)
        async with self._turn(device):
            await soon(self._runtime.stop(str(device.id)))

    async def _arrive(self, device: Rented) -> None:
        """The phone is down: it is stopped, or about to start again, on the same ports."""
        async with self._fleet.holding(device.id):
            current = self.same_intent(device)
            if current is None:
                return
            state = DeviceState.STARTING if current.wanted is Wanted.RUNNING else DeviceState.STOPPED
            async with self._fleet.transaction(device.id) as tx:
                await self._fleet.store(tx, replace(current, state=state))

    async def _remove(self, device: Rented) -> None:
        await self._links.close(device.id)
        async with self._turn(device):
            await soon(self._runtime.remove(str(device.id)))
        async with self._fleet.holding(device.id) as current:
            if current is None:
                return
            async with self._fleet.transaction(device.id) as tx:
                await self._events.publish(tx, DeviceDeleted(device.id, device.owner_id))
                await self._fleet.delete(tx, current)

    async def fail(self, device: Rented, detail: Detail) -> None:
        """Give up, with the reason. The ports are free once the machine confirms that the phone is gone."""
        try:
            await self.end(device)
            is_gone = True
        except RuntimeFault as fault:
            log.warning(
                "a failed phone is not gone yet", extra={"device": str(device.id), "error": str(fault)}
            )
            is_gone = False
        async with self._fleet.holding(device.id):
            current = self.same_intent(device)
            if current is None:
                return
            async with self._fleet.transaction(device.id) as tx:
                failed = replace(current, state=DeviceState.FAILED, wanted=Wanted.STOPPED, detail=detail)
                await self._fleet.store(tx, replace(failed, ports=None) if is_gone else failed)

    async def _clear_away(self, device: Rented) -> None:
        """What `fail` could not do: end the phone, then free its ports."""
        await self.end(device)
        async with self._fleet.holding(device.id):
            current = self.same_intent(device)
            if current is not None:
                async with self._fleet.transaction(device.id) as tx:
                    await self._fleet.store(tx, replace(current, ports=None))

    def same_intent(self, device: Rented) -> Rented | None:
        """The device as it is now, unless something else is wanted of it than when the step began."""
        current = self._fleet.get(device.id)
        return current if current is not None and current.generation == device.generation else None


async def now_of(tx: Tx) -> datetime:
    """The database's time in this transaction."""
    now: datetime = await tx.fetchval("SELECT now()")
    return now


async def soon(answer: Awaitable[T]) -> T:
    """An answer of the machine, within its deadline. Raises RuntimeUnavailable."""
    try:
        async with asyncio.timeout(RUNTIME_DEADLINE_S):
            return await answer
    except TimeoutError:
        raise RuntimeUnavailable(
            f"the phones' machine did not answer within {RUNTIME_DEADLINE_S:g} s"
        ) from None
