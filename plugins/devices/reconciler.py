"""Carries out what the rows want: brings phones up and down, and mends what went wrong by itself.

One task a device. Every step may be broken off anywhere and is repeated from the row: by a kill -9, and by
a new intent, which raises the row's generation, ends the task and starts another.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Final, TypeVar
from uuid import UUID

from phones.adb import AdbFault
from phones.runtime import FoundPhone, PhoneStatus, PortTaken, Runtime, RuntimeFault, RuntimeUnavailable
from plugins.devices.fleet import Fleet
from plugins.devices.links import Links
from plugins.devices.metering import Metering
from plugins.devices.model import COMING_UP, NOTHING, Detail, DeviceState, Rented, Wanted
from plugins.devices.section import DevicesSection
from server.clock import Clock
from server.db import DatabaseUnavailable, Tx
from server.errors import Problem
from server.events import Events
from server.i18n import N_
from server.interfaces import DeviceDeleted
from server.locks import KeyedLocks
from server.observe import log

STARTS_AT_ONCE: Final = 8
ENDS_AT_ONCE: Final = 16
PORT_TRIES: Final = 4
RUNTIME_DEADLINE_S: Final = 30.0
REVIVAL_PAUSE: Final = timedelta(minutes=10)
_FIRST_RETRY_S = 1.0
_LAST_RETRY_S = 30.0
_FIRST_POLL_S = 0.05
_LAST_POLL_S = 1.0
_ASK_DEADLINE_S = 5.0

TROUBLES: Final = {
    DeviceState.CREATING: N_("The phone could not be started: {reason}"),
    DeviceState.STARTING: N_("The phone could not be started: {reason}"),
    DeviceState.STOPPING: N_("The phone could not be stopped: {reason}"),
    DeviceState.RESETTING: N_("The phone could not be reset: {reason}"),
    DeviceState.DELETING: N_("The phone could not be deleted: {reason}"),
}

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Attending:
    """The task that sees to a device, and the intent it carries out."""

    generation: int
    task: asyncio.Task[None]


class Reconciler:
    """Owns the devices' tasks. Close it before the runtime."""

    def __init__(
        self,
        runtime: Runtime,
        fleet: Fleet,
        links: Links,
        metering: Metering,
        events: Events,
        clock: Clock,
        section: DevicesSection,
    ) -> None:
        self._runtime = runtime
        self._fleet = fleet
        self._links = links
        self._metering = metering
        self._events = events
        self._clock = clock
        self._bind_address = section.bind_address
        self._start_deadline_s = section.start_deadline_s
        # A stop must not queue behind phones that are slow to come up.
        self._starts = asyncio.Semaphore(STARTS_AT_ONCE)
        self._ends = asyncio.Semaphore(ENDS_AT_ONCE)
        self._work = KeyedLocks[UUID]()  # guards: one device's phone, from a task to its successor
        self._current: dict[UUID, _Attending] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._closed = False
        self._awake = asyncio.Event()

    def ring(self, device_id: UUID) -> None:
        """See to a device; what is under way for an earlier intent is broken off."""
        device, attending = self._fleet.get(device_id), self._current.get(device_id)
        if device is None or self._closed:
            return
        if attending is not None:
            if attending.generation == device.generation:
                return
            attending.task.cancel()
        task = asyncio.create_task(self._attend(device_id))
        self._current[device_id] = _Attending(device.generation, task)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Break off what is under way; the rows remember it."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def watch(self, events: AsyncIterator[FoundPhone]) -> None:
        """Hear for ever of phones that ended by themselves, from the first `reconcile` on."""
        await self._awake.wait()
        async for found in events:
            await self._mend(UUID(found.id))

    async def reconcile(self) -> None:
        """Compare the rows with the machine, and mend both ways. Raises RuntimeFault.

        Call it first when every plugin has started, as from then on they may be told of what happened.
        """
        self._awake.set()
        await self._fleet.refresh()
        found = {UUID(phone.id): phone for phone in await _soon(self._runtime.list())}
        for device_id in found:
            if self._fleet.get(device_id) is None:
                await self._remove_orphan(device_id)
        for device in self._fleet.all():
            if device.needs_work:
                self.ring(device.id)
            elif not _agree(device, found.get(device.id)):
                await self._mend(device.id)

    async def _remove_orphan(self, device_id: UUID) -> None:
        log.warning("a phone without a device is removed", extra={"device": str(device_id)})
        try:
            await _soon(self._runtime.remove(str(device_id)))
        except RuntimeFault as fault:
            log.warning("a phone is seen to later", extra={"device": str(device_id), "error": str(fault)})

    # One device's task

    async def _attend(self, device_id: UUID) -> None:
        try:
            async with self._work.of(device_id):
                await self._work_on(device_id)
        finally:
            attending = self._current.get(device_id)
            if attending is not None and attending.task is asyncio.current_task():
                del self._current[device_id]

    async def _work_on(self, device_id: UUID) -> None:
        """Take step after step until the device is where it shall be."""
        pause_s = _FIRST_RETRY_S
        while (device := self._fleet.get(device_id)) is not None and device.needs_work:
            if await self._try_step(device):
                pause_s = _FIRST_RETRY_S
            else:
                await self._clock.sleep(pause_s)
                pause_s = min(2 * pause_s, _LAST_RETRY_S)

    async def _try_step(self, device: Rented) -> bool:
        async with self._starts if device.state in COMING_UP else self._ends:
            try:
                await self._step(device)
            except (RuntimeFault, DatabaseUnavailable) as fault:
                log.warning("a device has to wait", extra={"device": str(device.id), "error": str(fault)})
                return False
            except Exception:
                log.exception("unforeseen error at a device", extra={"device": str(device.id)})
                return False
        return True

    async def _step(self, device: Rented) -> None:
        """One state's work. Raises RuntimeUnavailable, to be tried again."""
        try:
            match device.state:
                case DeviceState.CREATING | DeviceState.STARTING:
                    await self._bring_up(device)
                case DeviceState.STOPPING:
                    await self._end(device)
                    await self._arrive(device)
                case DeviceState.RESETTING:
                    await self._end(device)
                    await _soon(self._runtime.wipe(str(device.id)))
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
            await self._fail(device, Detail(TROUBLES[device.state], {"reason": str(fault)}))

    async def _bring_up(self, device: Rented) -> None:
        try:
            async with asyncio.timeout(self._start_deadline_s):
                is_up = await self._start(device) and await self._booted(device)
        except TimeoutError:
            seconds = f"{self._start_deadline_s:g}"
            too_slow = Detail(N_("The phone did not come up within {seconds} s."), {"seconds": seconds})
            await self._fail(device, too_slow)
        except Problem as problem:
            await self._fail(device, Detail(problem.detail, dict(problem.params)))
        else:
            if is_up:
                await self._came_up(device)

    async def _start(self, device: Rented) -> bool:
        """Have the phone's process run; False when something else is wanted meanwhile."""
        tries = 0
        while (current := self._same_intent(device)) is not None:
            try:
                spec = current.spec(self._bind_address)
                await self._runtime.create(spec)
                await self._runtime.start(spec)
                return True
            except PortTaken as taken:
                tries += 1
                if tries == PORT_TRIES:
                    raise
                await self._take_other_ports(device, taken.port)
            except RuntimeUnavailable:
                await self._clock.sleep(_FIRST_RETRY_S)
        return False

    async def _take_other_ports(self, device: Rented, taken: int) -> None:
        self._fleet.ports.mark_foreign(taken)
        async with self._fleet.holding(device.id):
            current = self._same_intent(device)
            if current is None:
                return
            with self._fleet.new_ports(device.id) as ports:
                async with self._fleet.transaction(device.id) as tx:
                    await self._fleet.store(tx, replace(current, ports=ports))

    async def _booted(self, device: Rented) -> bool:
        """Wait until Android is up; False when something else is wanted meanwhile. Raises RuntimeFault."""
        pause_s = _FIRST_POLL_S
        while (current := self._same_intent(device)) is not None:
            try:
                link = await self._links.to(current)
                answer = await link.shell("getprop sys.boot_completed", timeout_s=_ASK_DEADLINE_S)
                if answer.stdout.strip() == b"1":
                    return True
            except AdbFault:
                await self._check_alive(device)
            await self._clock.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_POLL_S)
        return False

    async def _check_alive(self, device: Rented) -> None:
        """Raises RuntimeFault where the phone is down."""
        with suppress(RuntimeUnavailable):
            phone = await _soon(self._runtime.inspect(str(device.id)))
            if phone is None or phone.status is not PhoneStatus.RUNNING:
                raise RuntimeFault("it ended while it was starting")

    async def _came_up(self, device: Rented) -> None:
        async with self._fleet.holding(device.id):
            current = self._same_intent(device)
            if current is None:
                return
            async with self._fleet.transaction(device.id) as tx:
                now = await _now(tx)
                await self._fleet.store(
                    tx,
                    replace(
                        current,
                        state=DeviceState.RUNNING,
                        detail=NOTHING,
                        started_at=now,
                        metered_until=now,
                        warned=False,
                    ),
                )

    async def _end(self, device: Rented) -> None:
        await self._links.close(device.id)
        await _soon(self._runtime.stop(str(device.id)))

    async def _arrive(self, device: Rented) -> None:
        """The phone is down: it is stopped, or about to start again, on the same ports."""
        async with self._fleet.holding(device.id):
            current = self._same_intent(device)
            if current is None:
                return
            state = DeviceState.STARTING if current.wanted is Wanted.RUNNING else DeviceState.STOPPED
            async with self._fleet.transaction(device.id) as tx:
                await self._fleet.store(tx, replace(current, state=state))

    async def _remove(self, device: Rented) -> None:
        await self._links.close(device.id)
        await _soon(self._runtime.remove(str(device.id)))
        async with self._fleet.holding(device.id) as current:
            if current is None:
                return
            async with self._fleet.transaction(device.id) as tx:
                await self._events.publish(tx, DeviceDeleted(device.id, device.owner_id))
                await self._fleet.delete(tx, current)

    async def _fail(self, device: Rented, detail: Detail) -> None:
        """Give up, with the reason. The ports are free once the machine confirms that the phone is gone."""
        try:
            await self._end(device)
            is_gone = True
        except RuntimeFault as fault:
            log.warning(
                "a failed phone is not gone yet", extra={"device": str(device.id), "error": str(fault)}
            )
            is_gone = False
        async with self._fleet.holding(device.id):
            current = self._same_intent(device)
            if current is None:
                return
            async with self._fleet.transaction(device.id) as tx:
                failed = replace(current, state=DeviceState.FAILED, wanted=Wanted.STOPPED, detail=detail)
                await self._fleet.store(tx, replace(failed, ports=None) if is_gone else failed)

    async def _clear_away(self, device: Rented) -> None:
        """What `_fail` could not do: end the phone, then free its ports."""
        await self._end(device)
        async with self._fleet.holding(device.id):
            current = self._same_intent(device)
            if current is not None:
                async with self._fleet.transaction(device.id) as tx:
                    await self._fleet.store(tx, replace(current, ports=None))

    def _same_intent(self, device: Rented) -> Rented | None:
        """The device as it is now, unless something else is wanted of it than when the step began."""
        current = self._fleet.get(device.id)
        return current if current is not None and current.generation == device.generation else None

    # What happened by itself

    async def _mend(self, device_id: UUID) -> None:
        """Look at a device whose row and phone may disagree, and follow the row."""
        try:
            async with self._fleet.holding(device_id) as device:
                if device is None or device.needs_work:
                    return
                if _agree(device, await _soon(self._runtime.inspect(str(device_id)))):
                    return
                await self._end(device)
                if device.state is DeviceState.RUNNING:
                    await self._revive(device)
        except (DatabaseUnavailable, RuntimeFault) as fault:
            log.warning("a phone is seen to later", extra={"device": str(device_id), "error": str(fault)})
        except Exception:
            log.exception("unforeseen error at a device", extra={"device": str(device_id)})

    async def _revive(self, device: Rented) -> None:
        """Start a phone again that ended by itself; one that does so again soon has failed.

        Nobody knows since when it was down, so the time since its last charge is not paid.
        """
        async with self._fleet.transaction(device.id) as tx:
            now = await _now(tx)
            device = replace(
                await self._metering.end(tx, device, charge=False), generation=device.generation + 1
            )
            if device.revived_at is None or now - device.revived_at > REVIVAL_PAUSE:
                device = replace(
                    device,
                    state=DeviceState.STARTING,
                    revived_at=now,
                    detail=Detail(N_("The phone ended by itself and is started again.")),
                )
            else:
                device = replace(
                    device,
                    state=DeviceState.FAILED,
                    wanted=Wanted.STOPPED,
                    ports=None,
                    detail=Detail(
                        N_("The phone ended by itself twice within {minutes} minutes."),
                        {"minutes": REVIVAL_PAUSE // timedelta(minutes=1)},
                    ),
                )
            await self._fleet.store(tx, device)


def _agree(device: Rented, phone: FoundPhone | None) -> bool:
    """Whether a device that stands still is what the machine says of it."""
    runs = phone is not None and phone.status is PhoneStatus.RUNNING
    if device.state is DeviceState.RUNNING:
        return runs and phone is not None and phone.ports == device.ports
    return not runs


async def _now(tx: Tx) -> datetime:
    now: datetime = await tx.fetchval("SELECT now()")
    return now


async def _soon(answer: Awaitable[T]) -> T:
    """An answer of the machine, within its deadline. Raises RuntimeUnavailable."""
    try:
        async with asyncio.timeout(RUNTIME_DEADLINE_S):
            return await answer
    except TimeoutError:
        raise RuntimeUnavailable(
            f"the phones' machine did not answer within {RUNTIME_DEADLINE_S:g} s"
        ) from None
