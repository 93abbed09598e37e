"""Carries out what the rows want: brings phones up and down, and mends what went wrong by itself.

One task a device. Every step may be broken off anywhere and is repeated from the row: by a kill -9, and by
a new intent, which raises the row's generation, ends the task and starts another. Where the phones' machine
is away, tasks wait for it and go on when it is back.
"""

import asyncio
from collections import deque
from collections.abc import AsyncIterator
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial
from typing import Any, Final
from uuid import UUID

from phones.runtime import (
    FoundPhone,
    Runtime,
    RuntimeFault,
    RuntimeUnavailable,
)
from plugins.devices.fleet import Fleet
from plugins.devices.links import Links
from plugins.devices.metering import Metering
from plugins.devices.model import COMING_UP, Detail, DeviceState, Rented, Wanted
from plugins.devices.repairs import Fault, Repair, compare, judge
from plugins.devices.section import DevicesSection
from plugins.devices.steps import TROUBLES, Steps, now_of, soon
from server.clock import Clock, sleep_unless
from server.db import Database, DatabaseUnavailable, Tx
from server.events import Events
from server.i18n import N_
from server.interfaces import Audit
from server.locks import KeyedLocks
from server.observe import log

MACHINE_TRIES: Final = 5
"""How often a start may fail for want of an answer while the machine answers otherwise."""
REPAIRS_AT_ONCE: Final = 16
REMEMBERED_REPAIRS: Final = 1000
REVIVAL_PAUSE: Final = timedelta(minutes=10)
_FIRST_RETRY_S = 1.0
_LAST_RETRY_S = 30.0
_CHECK_DEADLINE_S = 4.0

MACHINE_AWAY: Final = N_("The phones' machine does not answer; this goes on when it is back.")


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
        self._audit = audit
        self._clock = clock
        self._bind_address = section.bind_address
        self._steps = Steps(runtime, fleet, links, metering, database, events, clock, section)
        self._work = KeyedLocks[UUID]()  # guards: one device's phone, from a task to its successor
        self._current: dict[UUID, _Attending] = {}
        self._tasks: set[asyncio.Task[Any]] = set()
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
        return self._steps.waits_for(device)

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
        self._closed = self._steps.is_closing = True
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
        found = await soon(self._runtime.list())
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
            await soon(self._runtime.discard(phone))
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
                phone = await soon(self._runtime.inspect(str(device_id)))
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
                current = self._steps.same_intent(device)
                if current is None or current.needs_work:
                    return
                async with self._fleet.transaction(device.id) as tx:
                    await self._revive(tx, current)
                    await self._note(tx, repair)
            return
        if repair.fault is Fault.LOOSE:
            await self._steps.end(device)
        elif device.ports is not None:
            await soon(self._runtime.limit(device.spec(self._bind_address)))
        async with self._database.transaction() as tx:
            await self._note(tx, repair)

    async def _note(self, tx: Tx, repair: Repair) -> None:
        """One audit row, and one line in the log once that is written."""
        phone = repair.phone
        named = repair.device or phone
        state = repair.device.state if repair.device else "unknown"
        target = str(named.id) if named else ""
        await self._audit.record(
            tx,
            action="devices.repair",
            target=target,
            before={
                "row": state,
                "phone": phone.status if phone else "missing",
                "node": named.node if named else "",
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
        now = await now_of(tx)
        await self._metering.end(tx, device, charge=False)
        device = replace(device, generation=device.generation + 1, run=None)
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
            self._steps.waits.pop(device_id, None)
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
            await sleep_unless(self._back, self._clock, pause_s)
            pause_s = min(2 * pause_s, _LAST_RETRY_S)

    async def _try_step(self, device: Rented) -> Exception | None:
        """One step; what makes it wait, or None."""
        try:
            await self._steps.take(device)
        except RuntimeUnavailable as fault:
            self._steps.waits[device.id] = Detail(MACHINE_AWAY)
            return fault
        except (RuntimeFault, DatabaseUnavailable) as fault:
            return fault
        except Exception as fault:
            log.exception("unforeseen error at a device", extra={"device": str(device.id)})
            return fault
        self._steps.waits.pop(device.id, None)
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
            await self._steps.fail(device, Detail(TROUBLES[device.state], {"reason": str(fault)}))
        except (RuntimeFault, DatabaseUnavailable) as trouble:
            log.warning("a device has to wait", extra={"device": str(device.id), "error": str(trouble)})
            await sleep_unless(self._back, self._clock, _LAST_RETRY_S)
