"""The devices' operations: who may do what to which phone, and when."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from operator import attrgetter
from typing import Final
from uuid import UUID

from aiohttp import web

from phones.adb import AdbClient, AdbUnreachable
from phones.runtime import PhoneStats, PortTriple, Runtime, RuntimeFault, RuntimeUnavailable
from plugins.devices.fleet import Fleet
from plugins.devices.links import Links
from plugins.devices.metering import Metering
from plugins.devices.model import (
    NOTHING,
    Detail,
    DeviceChanges,
    DeviceQuery,
    DeviceState,
    Hardware,
    NewDevice,
    Rented,
    Wanted,
)
from plugins.devices.reconciler import Reconciler
from plugins.devices.section import DevicesSection, ImageSection, PlanSection
from plugins.devices.steps import PORT_TRIES
from server.api import from_cursor, to_cursor
from server.auth import Caller
from server.clock import Clock
from server.db import UniqueViolation
from server.errors import Code, Problem, not_found
from server.i18n import N_
from server.interfaces import RentedPhone
from server.locks import KeyedLocks

ASK_DEADLINE_S: Final = 4.5
"""Whoever asks for a phone hears within 5 s that the machine does not answer."""
LOG_LINES: Final = 200
NO_SUCH_PLAN: Final = N_("There is no such plan; see /api/v1/device-plans.")

_STOPPABLE = frozenset({DeviceState.CREATING, DeviceState.STARTING, DeviceState.RUNNING})
_STARTABLE = frozenset({DeviceState.STOPPED, DeviceState.FAILED})
_RESETTABLE = _STARTABLE | {DeviceState.RUNNING}


class Devices:
    """Every rented phone; implements `Phones`."""

    def __init__(
        self,
        runtime: Runtime,
        runtime_reason: str,
        fleet: Fleet,
        links: Links,
        metering: Metering,
        reconciler: Reconciler,
        clock: Clock,
        section: DevicesSection,
    ) -> None:
        self.runtime: Final = runtime
        self.runtime_reason: Final = runtime_reason
        self.images: Final = {
            image.name: image
            for image in section.images
            if runtime.name == "simulated" or image.reference  # a container needs an image
        }
        self.plans: Final = {plan.name: plan for plan in section.plans}
        self.bind_address: Final = section.bind_address
        self.max_file_mb: Final = section.max_file_mb
        self._fleet = fleet
        self._links = links
        self._metering = metering
        self._reconciler = reconciler
        self._clock = clock
        self._max_per_user = section.max_per_user
        self.is_public: Final = section.is_public
        self._ranges = (section.adb_ports, section.webrtc_ports, section.scrcpy_ports)
        self._owners = KeyedLocks[UUID]()  # guards: one user's quota and cover; taken before a device's lock

    # Looking

    def find(self, caller: Caller, device_id: UUID) -> Rented:
        """The caller's device; administrators see every device. Raises Problem(not_found)."""
        device = self._fleet.get(device_id)
        if device is None or not (device.owner_id == caller.user_id or caller.is_admin):
            raise not_found()
        return device

    def page(self, caller: Caller, query: DeviceQuery) -> tuple[Sequence[Rented], str | None]:
        """A part of the caller's devices, newest first, and the cursor of the next."""
        devices = self.of_owner(caller.user_id)
        if query.state is not None:
            devices = [device for device in devices if device.state is query.state]
        if query.cursor:
            before = tuple(from_cursor(query.cursor, int, UUID))
            devices = [device for device in devices if device.position < before]
        shown = devices[: query.page_size]
        if len(devices) == len(shown):
            return shown, None
        created_us, last_id = shown[-1].position
        return shown, to_cursor(created_us, str(last_id))

    def of_owner(self, owner_id: UUID) -> list[Rented]:
        """A user's devices, newest first."""
        return sorted(self._fleet.of_owner(owner_id), key=attrgetter("created_at", "id"), reverse=True)

    async def stats(self, caller: Caller, device_id: UUID) -> PhoneStats:
        """What a running phone uses now.

        Raises Problem: not_found, device_not_running, runtime_unavailable.
        """
        device = self.find(caller, device_id)
        _require_running(device)
        try:
            async with asyncio.timeout(ASK_DEADLINE_S):
                return await self.runtime.stats(str(device_id))
        except (RuntimeUnavailable, TimeoutError):
            raise _no_answer() from None
        except RuntimeFault:
            raise Problem(Code.DEVICE_NOT_RUNNING) from None

    async def log(self, caller: Caller, device_id: UUID) -> list[str]:
        """The last lines that the phone's program or container printed, also of a start that failed.

        Raises Problem: not_found, runtime_unavailable.
        """
        self.find(caller, device_id)
        try:
            async with asyncio.timeout(ASK_DEADLINE_S):
                return await self.runtime.log(str(device_id), LOG_LINES)
        except (RuntimeFault, TimeoutError):
            raise _no_answer() from None

    def waits_for(self, device: Rented) -> Detail:
        """What keeps a passing device waiting at this moment: its turn, its image, the machine."""
        return self._reconciler.waits_for(device)

    # For the plugins to the right

    async def rented(self, caller: Caller, device_id: UUID) -> RentedPhone:
        """The caller's device. Raises Problem(not_found)."""
        device = self.find(caller, device_id)
        return RentedPhone(device.id, device.owner_id, device.name, device.state is DeviceState.RUNNING)

    async def link(self, device_id: UUID) -> AdbClient:
        """The device's connection. Raises Problem: device_not_running, runtime_unavailable."""
        device = self._fleet.get(device_id)
        if device is None:
            raise not_found()
        _require_running(device)
        try:
            return await self._links.to(device)
        except AdbUnreachable:
            raise self.silence(device_id) from None

    def silence(self, device_id: UUID) -> Problem:
        """What to answer when a phone broke off: it was stopped meanwhile, or it just does not answer."""
        device = self._fleet.get(device_id)
        if device is None or device.state is not DeviceState.RUNNING:
            return Problem(Code.DEVICE_NOT_RUNNING)
        return Problem(Code.RUNTIME_UNAVAILABLE, N_("The phone does not answer; try again shortly."))

    # Changing

    async def rent(self, caller: Caller, wish: NewDevice, new_id: UUID) -> Rented:
        """Rent a phone; it comes up by itself.

        Raises Problem: invalid, quota_exceeded, insufficient_balance, ports_exhausted, runtime_unavailable.
        """
        image, plan = self._chosen(wish)
        await self._require_machine()
        async with self._owners.of(caller.user_id), self._fleet.holding(new_id) as known:
            if known is not None:
                return known
            return await _uncontested(lambda: self._rent(caller, wish, image, plan, new_id))

    async def _rent(
        self, caller: Caller, wish: NewDevice, image: ImageSection, plan: PlanSection, new_id: UUID
    ) -> Rented:
        if len(self._fleet.of_owner(caller.user_id)) >= self._max_per_user:
            raise Problem(
                Code.QUOTA_EXCEEDED,
                N_("You have {limit} phones, and no more are allowed."),
                limit=self._max_per_user,
            )
        with self._fleet.new_ports(new_id) as ports:
            now = self._clock.now()  # the row's own times replace it
            device = Rented(
                id=new_id,
                owner_id=caller.user_id,
                name=wish.name,
                image=image.name,
                plan=plan.name,
                price_per_hour=plan.price_per_hour,
                hardware=Hardware.chosen(image, plan),
                state=DeviceState.CREATING,
                wanted=Wanted.RUNNING,
                created_at=now,
                updated_at=now,
                ports=ports,
            )
            async with self._fleet.transaction(new_id) as tx:
                await self._metering.require_cover(tx, device)
                return await self._fleet.insert(tx, device)

    async def change(self, caller: Caller, device_id: UUID, changes: DeviceChanges) -> Rented:
        """Give a device another name, or one that is down another plan for its next start.

        Raises Problem: not_found, invalid, invalid_state.
        """
        async with self._fleet.holding(device_id):
            device = self.find(caller, device_id)
            if changes.name is not None:
                device = replace(device, name=changes.name)
            if changes.plan is not None and changes.plan != device.plan:
                device = self._on_plan(device, changes.plan)
            async with self._fleet.transaction(device_id) as tx:
                return await self._fleet.store(tx, device)

    def _on_plan(self, device: Rented, name: str) -> Rented:
        plan = self.plans.get(name)
        if plan is None:
            raise Problem(Code.INVALID, errors=[("plan", NO_SUCH_PLAN)])
        _require(device, _STARTABLE)
        hardware = device.hardware.on(plan)
        return replace(device, plan=plan.name, price_per_hour=plan.price_per_hour, hardware=hardware)

    async def start(self, caller: Caller, device_id: UUID) -> Rented:
        """Start a stopped or failed phone.

        Raises Problem: not_found, invalid_state, insufficient_balance, ports_exhausted, runtime_unavailable.
        """
        return await self._set_off(caller, device_id, DeviceState.STARTING, _STARTABLE)

    async def stop(self, caller: Caller, device_id: UUID) -> Rented:
        """Stop a phone and keep its data. Raises Problem: not_found, invalid_state."""
        return await self._intend(caller, device_id, DeviceState.STOPPING, Wanted.STOPPED, _STOPPABLE)

    async def restart(self, caller: Caller, device_id: UUID) -> Rented:
        """Stop a running phone and start it again.

        Raises Problem: not_found, invalid_state, runtime_unavailable.
        """
        running = frozenset({DeviceState.RUNNING})
        _require(self.find(caller, device_id), running)
        await self._require_machine()
        return await self._intend(caller, device_id, DeviceState.STOPPING, Wanted.RUNNING, running)

    async def reset(self, caller: Caller, device_id: UUID) -> Rented:
        """Throw a phone's data away. A running one runs again then, as does a failed one.

        Raises Problem: not_found, invalid_state, runtime_unavailable, and as `start` for a failed phone.
        """
        state = self.find(caller, device_id).state
        if state is DeviceState.FAILED:
            return await self._set_off(caller, device_id, DeviceState.RESETTING, frozenset({state}))
        wanted = Wanted.RUNNING if state is DeviceState.RUNNING else Wanted.STOPPED
        _require(self.find(caller, device_id), _RESETTABLE)
        await self._require_machine()
        return await self._intend(caller, device_id, DeviceState.RESETTING, wanted, _RESETTABLE & {state})

    async def delete(self, caller: Caller, device_id: UUID) -> Rented:
        """Delete a phone with its data, whatever it does now. Raises Problem(not_found)."""
        device = self.find(caller, device_id)
        if device.state is DeviceState.DELETING:
            return device
        return await self._intend(
            caller, device_id, DeviceState.DELETING, Wanted.DELETED, frozenset(DeviceState)
        )

    async def _intend(
        self,
        caller: Caller,
        device_id: UUID,
        state: DeviceState,
        wanted: Wanted,
        allowed: frozenset[DeviceState],
    ) -> Rented:
        """Write down what is wanted; the reconciler carries it out, once the machine answers."""
        is_seen = await self.is_seen()
        async with self._fleet.holding(device_id):
            device = self.find(caller, device_id)
            _require(device, allowed)
            async with self._fleet.transaction(device_id) as tx:
                await self._metering.end(tx, device, charge=is_seen)
                return await self._fleet.store(tx, _aimed(device, state, wanted))

    async def is_seen(self) -> bool:
        """Whether the machine vouches for its phones: time that nobody saw a phone run is not paid."""
        try:
            async with asyncio.timeout(ASK_DEADLINE_S):
                await self.runtime.check()
        except (RuntimeFault, TimeoutError):
            return False
        return self._reconciler.vouches()

    async def _set_off(
        self, caller: Caller, device_id: UUID, state: DeviceState, allowed: frozenset[DeviceState]
    ) -> Rented:
        """Write down that a phone that is down shall run: it needs ports, and its owner money."""
        device = self.find(caller, device_id)
        _require(device, allowed)
        await self._require_machine()
        async with self._owners.of(device.owner_id), self._fleet.holding(device_id):
            device = self.find(caller, device_id)
            _require(device, allowed)
            return await _uncontested(lambda: self._set_off_holding(device, state))

    async def _set_off_holding(self, device: Rented, state: DeviceState) -> Rented:
        with ExitStack() as stack:
            if device.ports is None or not self._in_range(device.ports):
                device = replace(device, ports=stack.enter_context(self._fleet.new_ports(device.id)))
            async with self._fleet.transaction(device.id) as tx:
                await self._metering.require_cover(tx, device)
                device = replace(device, deletion_warned=False, spent_at=None, revived_at=None, run=None)
                return await self._fleet.store(tx, _aimed(device, state, Wanted.RUNNING))

    async def _require_machine(self) -> None:
        try:
            async with asyncio.timeout(ASK_DEADLINE_S):
                await self.runtime.check()
        except (RuntimeFault, TimeoutError):
            raise _no_answer() from None

    def _chosen(self, wish: NewDevice) -> tuple[ImageSection, PlanSection]:
        image, plan = self.images.get(wish.image), self.plans.get(wish.plan)
        if image is not None and plan is not None:
            return image, plan
        errors = []
        if image is None:
            errors.append(("image", N_("There is no such image; see /api/v1/device-images.")))
        if plan is None:
            errors.append(("plan", NO_SUCH_PLAN))
        raise Problem(Code.INVALID, errors=errors)

    def _in_range(self, ports: PortTriple) -> bool:
        held = (ports.adb, ports.webrtc, ports.scrcpy)
        return all(first <= port <= last for port, (first, last) in zip(held, self._ranges, strict=True))


DEVICES: Final = web.AppKey("DEVICES", Devices)


async def _uncontested(attempt: Callable[[], Awaitable[Rented]]) -> Rented:
    """Try again with other ports where a row holds some that memory took for free."""
    for _ in range(PORT_TRIES):
        with suppress(UniqueViolation):
            return await attempt()
    raise Problem(Code.PORTS_EXHAUSTED)


def _aimed(device: Rented, state: DeviceState, wanted: Wanted) -> Rented:
    return replace(device, state=state, wanted=wanted, generation=device.generation + 1, detail=NOTHING)


def _require(device: Rented, allowed: frozenset[DeviceState]) -> None:
    if device.state not in allowed:
        raise Problem(
            Code.INVALID_STATE,
            N_("This is not possible while the phone is {state}."),
            state=device.state.value,
        )


def _require_running(device: Rented) -> None:
    if device.state is not DeviceState.RUNNING:
        raise Problem(Code.DEVICE_NOT_RUNNING, N_("Start the phone first."))


def _no_answer() -> Problem:
    return Problem(Code.RUNTIME_UNAVAILABLE, N_("The phones' machine does not answer; try again shortly."))
