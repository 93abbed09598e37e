"""Carries out what the rows want: brings phones up and down, and mends what went wrong by itself.

One task a device. Every step may be broken off anywhere and is repeated from the row: by a kill -9, and by
a new intent, which raises the row's generation, ends the task and starts another. Where the phones' machine
is away, tasks wait for it and go on when it is back.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager, suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
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
from plugins.devices.repairs import Fault, Repair, compare, judge
from plugins.devices.section import DevicesSection
from plugins.devices.turns import Place, Turns
from server.clock import Clock
from server.db import Database, DatabaseUnavailable, Tx, UniqueViolation
from server.errors import Problem
from server.events import Events
from server.i18n import N_
from server.interfaces import Audit, DeviceDeleted
from server.locks import KeyedLocks
from server.observe import log

PORT_TRIES: Final = 4
MACHINE_TRIES: Final = 5
"""How often a start may fail for want of an answer while the machine answers otherwise."""
RUNTIME_DEADLINE_S: Final = 60.0
PATIENCE: Final = 2
REVIVAL_PATIENCE: Final = 15
"""For how many seconds a failure may turn out to be the end of the machine itself."""
REPAIRS_AT_ONCE: Final = 16
REMEMBERED_REPAIRS: Final = 1000
REVIVAL_PAUSE: Final = timedelta(minutes=10)
TELL_EVERY_PERCENT: Final = 10
_FIRST_RETRY_S = 1.0
_LAST_RETRY_S = 30.0
_FIRST_POLL_S = 0.05
_LAST_POLL_S = 1.0
_ASK_DEADLINE_S = 5.0
_CHECK_DEADLINE_S = 4.0

TROUBLES: Final = {
    DeviceState.CREATING: N_("The phone could not be started: {reason}"),
    DeviceState.STARTING: N_("The phone could not be started: {reason}"),
    DeviceState.STOPPING: N_("The phone could not be stopped: {reason}"),
    DeviceState.RESETTING: N_("The phone could not be reset: {reason}"),
    DeviceState.DELETING: N_("The phone could not be deleted: {reason}"),
}
QUEUED: Final = N_("queued, {place.ordinal}")
FETCHING: Final = N_("The Android image is being downloaded: {percent} %")
MACHINE_AWAY: Final = N_("The phones' machine does not answer; this goes on when it is back.")

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
        database: Database,
        events: Events,
        audit: Audit,
        clock: Clock,
        section: DevicesSection,
    ) -> None:
        self._runtime = runtime
        self._fleet = fleet
        self._links = links
        self._metering = metering
        self._database = database
        self._events = events
        self._audit = audit
        self._clock = clock
        self._bind_address = section.bind_address
        self._start_deadline_s = section.start_deadline_s
        self._turns = Turns(section.operations_at_once)
        self._work = KeyedLocks[UUID]()  # guards: one device's phone, from a task to its successor
        self._current: dict[UUID, _Attending] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
        self._waits: dict[UUID, Detail] = {}  # what passing devices wait for, but for their turn
        self._suspects: set[UUID] = set()  # devices that are about to be looked at
        self._closed = False
        self._awake = asyncio.Event()
        self._back = asyncio.Event()  # set, and replaced, when the machine is back
        self._back_at: datetime | None = None
        self._seen_epoch: int | None = None
        self._comparing = asyncio.Lock()  # guards: rows and machine being compared, once at a time
        self.repaired: Final = deque[str](maxlen=REMEMBERED_REPAIRS)
        """What was mended last, a line each."""

    def waits_for(self, device: Rented) -> Detail:
        """What keeps a passing device waiting at this moment."""
        if device.state not in PASSING:
            return NOTHING
        place = self._turns.place_of(device.id)
        return Detail(QUEUED, {"place": Place(place)}) if place else self._waits.get(device.id, NOTHING)

    def vouches(self) -> bool:
        """Whether phones were seen to be as their rows say since the machine was last lost sight of."""
        return self._seen_epoch == self._runtime.epoch

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
        self._own(task)

    def _own(self, task: asyncio.Task[Any]) -> None:
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def close(self) -> None:
        """Break off what is under way; the rows remember it."""
        self._closed = True
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def settle(self) -> None:
        """Wait until no device is being worked on."""
        while self._tasks:
            await asyncio.wait(self._tasks)

    # What happened by itself

    async def watch(self, events: AsyncIterator[str | None]) -> None:
        """Hear for ever of phones to which something happened, from the first `reconcile` on."""
        await self._awake.wait()
        async for phone_id in events:
            if phone_id is None:
                await self._come_back()
            else:
                with suppress(ValueError):
                    self._suspect(UUID(phone_id))

    async def _come_back(self) -> None:
        """The machine was away: whoever waits for it goes on, and whatever ended meanwhile is its fault."""
        self._back.set()
        self._back = asyncio.Event()
        self._back_at = self._clock.now()
        try:
            await self.reconcile()
        except (RuntimeFault, DatabaseUnavailable) as fault:
            log.warning("phones are compared later", extra={"error": str(fault)})
        except Exception:
            log.exception("unforeseen error while comparing phones")

    def _suspect(self, device_id: UUID) -> None:
        """Look at a device soon, once for however many reasons."""
        if self._fleet.get(device_id) is not None and device_id not in self._suspects and not self._closed:
            self._suspects.add(device_id)
            self._own(asyncio.create_task(self._mend(device_id)))

    async def reconcile(self) -> None:
        """Compare the rows with the machine, and mend both ways.

        Call it first when every plugin has started, as from then on they may be told of what happened.
        Raises RuntimeFault.
        """
        self._awake.set()
        async with self._comparing:
            await self._compare()

    async def _compare(self) -> None:
        await self._fleet.refresh()
        for device in self._fleet.all():
            if device.needs_work:
                self.ring(device.id)
        epoch = self._runtime.epoch
        found = await _soon(self._runtime.list())
        repairs = compare(self._fleet.all(), found, self._clock.now(), self._is_known)
        turn = asyncio.Semaphore(REPAIRS_AT_ONCE)
        await asyncio.gather(*(self._repair(repair, turn) for repair in repairs))
        self._seen_epoch = epoch

    def _is_known(self, device_id: UUID) -> bool:
        return self._fleet.get(device_id) is not None

    async def _repair(self, repair: Repair, turn: asyncio.Semaphore) -> None:
        async with turn:
            if repair.device is not None:
                await self._mend(repair.device.id)
            elif repair.phone is not None:
                await self._discard(repair, repair.phone)

    async def _discard(self, repair: Repair, phone: FoundPhone) -> None:
        try:
            await _soon(self._runtime.discard(phone))
            async with self._database.transaction() as tx:
                await self._note(tx, repair)
        except (DatabaseUnavailable, RuntimeFault) as fault:
            log.warning("a phone is seen to later", extra={"device": phone.id, "error": str(fault)})

    async def _mend(self, device_id: UUID) -> None:
        """Look at a device whose row and phone may disagree, and follow the row."""
        try:
            async with self._work.of(device_id):
                self._suspects.discard(device_id)
                device = self._fleet.get(device_id)
                if device is None or device.needs_work:
                    return
                phone = await _soon(self._runtime.inspect(str(device_id)))
                fault = judge(device, phone)
                if fault is not None:
                    await self._follow_row(Repair(fault, device, phone), device)
        except (DatabaseUnavailable, RuntimeFault) as fault:
            log.warning("a phone is seen to later", extra={"device": str(device_id), "error": str(fault)})
        except Exception:
            log.exception("unforeseen error at a device", extra={"device": str(device_id)})
        finally:
            self._suspects.discard(device_id)

    async def _follow_row(self, repair: Repair, device: Rented) -> None:
        if repair.fault is Fault.DEAD:
            await self._links.close(device.id)
            async with self._fleet.holding(device.id):
                current = self._same_intent(device)
                if current is None or current.needs_work:
                    return
                async with self._fleet.transaction(device.id) as tx:
                    await self._revive(tx, current)
                    await self._note(tx, repair)
            return
        if repair.fault is Fault.LOOSE:
            await self._end(device)
        elif device.ports is not None:
            await _soon(self._runtime.limit(device.spec(self._bind_address)))
        async with self._database.transaction() as tx:
            await self._note(tx, repair)

    async def _note(self, tx: Tx, repair: Repair) -> None:
        """One audit row, and one line in the log once that is written."""
        phone = repair.phone
        state = repair.device.state if repair.device else "unknown"
        target = str(repair.device.id) if repair.device else (phone.id if phone else "")
        await self._audit.record(
            tx,
            action="devices.repair",
            target=target,
            before={
                "row": state,
                "phone": phone.status if phone else "missing",
                "place": phone.place if phone else "",
            },
            after={"fault": repair.fault},
        )
        tx.after_commit(partial(self._say, target, repair.line()))

    def _say(self, target: str, line: str) -> None:
        log.warning("repaired", extra={"device": target, "repair": line})
        self.repaired.append(line)

    async def _revive(self, tx: Tx, device: Rented) -> None:
        """Start a phone again that ended by itself; one that does so again soon has failed.

        Nobody knows since when it was down, so the time since its last charge is not paid.
        """
        now = await _now(tx)
        device = replace(
            await self._metering.end(tx, device, charge=False), generation=device.generation + 1, run=None
        )
        revived_at = device.revived_at
        if revived_at and self._back_at and revived_at < self._back_at:
            revived_at = None  # the machine went away since, and phones with it
        if revived_at is None or now - revived_at > REVIVAL_PAUSE:
            device = replace(
                device,
                state=DeviceState.STARTING,
                revived_at=now,
                detail=Detail(N_("The phone ended by itself and is started again.")),
            )
        else:
            # Its ports are freed by the device's task, once the machine confirms that it is down.
            device = replace(
                device,
                state=DeviceState.FAILED,
                wanted=Wanted.STOPPED,
                detail=Detail(
                    N_("The phone ended by itself twice within {minutes} minutes."),
                    {"minutes": REVIVAL_PAUSE // timedelta(minutes=1)},
                ),
            )
        await self._fleet.store(tx, device)

    # One device's task

    async def _attend(self, device_id: UUID) -> None:
        try:
            async with self._work.of(device_id):
                await self._work_on(device_id)
        finally:
            self._waits.pop(device_id, None)
            attending = self._current.get(device_id)
            if attending is not None and attending.task is asyncio.current_task():
                del self._current[device_id]

    async def _work_on(self, device_id: UUID) -> None:
        """Take step after step until the device is where it shall be."""
        pause_s, silences = _FIRST_RETRY_S, 0
        while (device := self._fleet.get(device_id)) is not None and device.needs_work:
            fault = await self._try_step(device)
            if fault is None:
                pause_s, silences = _FIRST_RETRY_S, 0
                continue
            silences += await self._is_only_silent(fault)
            if silences >= MACHINE_TRIES and device.state in COMING_UP:
                await self._give_up(device, fault)
                continue
            if pause_s == _FIRST_RETRY_S:
                log.warning("a device has to wait", extra={"device": str(device_id), "error": str(fault)})
            await self._pause(pause_s)
            pause_s = min(2 * pause_s, _LAST_RETRY_S)

    async def _try_step(self, device: Rented) -> Exception | None:
        """One step; what makes it wait, or None."""
        try:
            await self._step(device)
        except RuntimeUnavailable as fault:
            self._waits[device.id] = Detail(MACHINE_AWAY)
            return fault
        except (RuntimeFault, DatabaseUnavailable) as fault:
            return fault
        except Exception as fault:
            log.exception("unforeseen error at a device", extra={"device": str(device.id)})
            return fault
        self._waits.pop(device.id, None)
        return None

    async def _is_only_silent(self, fault: Exception) -> bool:
        """Whether the machine answers, but for what this device asked of it."""
        if not isinstance(fault, RuntimeUnavailable):
            return False
        try:
            async with asyncio.timeout(_CHECK_DEADLINE_S):
                await self._runtime.check()
        except (RuntimeFault, TimeoutError):
            return False
        return True

    async def _give_up(self, device: Rented, fault: Exception) -> None:
        try:
            await self._fail(device, Detail(TROUBLES[device.state], {"reason": str(fault)}))
        except (RuntimeFault, DatabaseUnavailable) as trouble:
            log.warning("a device has to wait", extra={"device": str(device.id), "error": str(trouble)})
            await self._pause(_LAST_RETRY_S)

    async def _pause(self, seconds: float) -> None:
        """Wait, or until the machine is back."""
        back = asyncio.ensure_future(self._back.wait())
        sleeping = asyncio.ensure_future(self._clock.sleep(seconds))
        try:
            await asyncio.wait({back, sleeping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            back.cancel()
            sleeping.cancel()

    @asynccontextmanager
    async def _turn(self, device: Rented) -> AsyncIterator[None]:
        """A turn at the machine. A stop must not queue behind phones that shall come up."""
        async with self._turns.take(device.id, urgent=device.state not in COMING_UP):
            yield

    async def _step(self, device: Rented) -> None:
        """One state's work. Raises RuntimeUnavailable, to be tried again."""
        epoch = self._runtime.epoch
        try:
            match device.state:
                case DeviceState.CREATING | DeviceState.STARTING:
                    await self._bring_up(device)
                case DeviceState.STOPPING:
                    await self._end(device)
                    await self._arrive(device)
                case DeviceState.RESETTING:
                    await self._end(device)
                    async with self._turn(device):
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
            if isinstance(fault, MachineFault) and await self._goes_away(device, epoch):
                raise RuntimeUnavailable(str(fault)) from None
            await self._fail(device, Detail(TROUBLES[device.state], {"reason": str(fault)}))

    async def _goes_away(self, device: Rented, epoch: int) -> bool:
        """Whether the machine is going down, which is then why it failed.

        One that does takes its phones along first, so that more patience is due to a phone that just died.
        """
        waits = REVIVAL_PATIENCE if device.revived_at else PATIENCE
        for _ in range(waits):
            await self._clock.sleep(1)
            try:
                await _soon(self._runtime.check())
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
            seconds = f"{self._start_deadline_s:g}"
            too_slow = Detail(N_("The phone did not come up within {seconds} s."), {"seconds": seconds})
            await self._fail(device, too_slow)
        except Problem as problem:
            await self._fail(device, Detail(problem.detail, dict(problem.params)))
        else:
            if run is not None:
                await self._came_up(device, run)

    async def _fetch(self, device: Rented) -> None:
        """Have the phone's image on the machine; its owner sees how far it is."""
        told = -TELL_EVERY_PERCENT
        async for percent in self._runtime.fetch(device.spec(self._bind_address)):
            detail = self._waits[device.id] = Detail(FETCHING, {"percent": percent})
            if percent - told >= TELL_EVERY_PERCENT:
                title = N_("{name} waits for its Android image") if told < 0 else ""
                told = percent
                async with self._database.transaction() as tx:
                    await self._fleet.tell(tx, device, title, detail, state=device.state)
        self._waits.pop(device.id, None)

    async def _start(self, device: Rented) -> bool:
        """Have the phone's process run; False when something else is wanted meanwhile."""
        tries = 0
        while (current := self._same_intent(device)) is not None:
            try:
                async with self._turn(device):
                    await self._end_restarted(device)
                    spec = current.spec(self._bind_address)
                    await _soon(self._runtime.create(spec))
                    await _soon(self._runtime.start(spec))
                return True
            except PortTaken as taken:
                tries += 1
                if tries == PORT_TRIES:
                    raise
                await self._take_other_ports(device, taken.port)
        return False

    async def _end_restarted(self, device: Rented) -> None:
        """A phone that came up again by itself is started anew, so that its next end is seen too."""
        if device.state is DeviceState.STARTING:
            phone = await _soon(self._runtime.inspect(str(device.id)))
            if phone is not None and phone.has_restarted:
                await _soon(self._runtime.stop(str(device.id)))

    async def _take_other_ports(self, device: Rented, taken: int) -> None:
        self._fleet.ports.mark_foreign(taken)
        async with self._fleet.holding(device.id):
            current = self._same_intent(device)
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
        pause_s = _FIRST_POLL_S
        while (current := self._same_intent(device)) is not None:
            try:
                link = await self._links.to(current)
                answer = await link.shell("getprop sys.boot_completed", timeout_s=_ASK_DEADLINE_S)
                if answer.stdout.strip() == b"1":
                    return (await self._alive(device)).run or ""
            except AdbFault:
                with suppress(RuntimeUnavailable):
                    await self._alive(device)
            await self._clock.sleep(pause_s)
            pause_s = min(2 * pause_s, _LAST_POLL_S)
        return None

    async def _alive(self, device: Rented) -> FoundPhone:
        """Raises RuntimeFault where the phone is down, or was meanwhile."""
        phone = await _soon(self._runtime.inspect(str(device.id)))
        if phone is None or phone.status is not PhoneStatus.RUNNING or phone.has_restarted:
            raise MachineFault("it ended while it was starting")
        return phone

    async def _came_up(self, device: Rented, run: str) -> None:
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
                        run=run or None,
                    ),
                )

    async def _end(self, device: Rented) -> None:
        await self._links.close(device.id)
        async with self._turn(device):
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
        async with self._turn(device):
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
