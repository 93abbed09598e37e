"""The rows of all devices, and their mirror in memory.

A row is written first; memory and the allocator follow once the transaction has committed. Where the
database broke off during a COMMIT, nobody knows whether the row stands: the device is read again before
anything else happens to it.
"""

from collections import defaultdict
from collections.abc import AsyncIterator, Callable, Collection, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict, astuple, replace
from functools import partial
from typing import Final
from uuid import UUID

from phones.ports import PortAllocator, PortsExhausted
from phones.runtime import PortTriple
from plugins.devices.model import NOTHING, PASSING, Detail, DeviceState, Rented
from server.db import CommitUnknown, Database, Tx, UniqueViolation
from server.errors import Code, Problem
from server.i18n import N_, SOURCE_LOCALE
from server.interfaces import Notifier, Topic
from server.locks import KeyedLocks
from server.observe import log

TITLES: Final = {
    DeviceState.CREATING: N_("{name} is being made"),
    DeviceState.STARTING: N_("{name} is starting"),
    DeviceState.RUNNING: N_("{name} is running"),
    DeviceState.STOPPING: N_("{name} is stopping"),
    DeviceState.STOPPED: N_("{name} is stopped"),
    DeviceState.RESETTING: N_("{name} is being reset"),
    DeviceState.DELETING: N_("{name} is being deleted"),
    DeviceState.FAILED: N_("{name} does not run"),
}


class Fleet:
    """Every device that is not deleted."""

    def __init__(self, database: Database, notifier: Notifier, ports: PortAllocator) -> None:
        self.ports: Final = ports
        self.doorbell: Callable[[UUID], None] = lambda _device_id: None
        self._locks = KeyedLocks[UUID]()  # guards: one device's row; taken after its owner's lock
        self._database = database
        self._notifier = notifier
        self._devices: dict[UUID, Rented] = {}
        self._by_owner: dict[UUID, dict[UUID, Rented]] = defaultdict(dict)
        self._doubtful: dict[UUID, list[PortTriple]] = {}

    # Reading, from memory

    def get(self, device_id: UUID) -> Rented | None:
        """The device, if there is one."""
        return self._devices.get(device_id)

    def all(self) -> Collection[Rented]:
        """Every device, at this moment."""
        return list(self._devices.values())

    def of_owner(self, owner_id: UUID) -> Collection[Rented]:
        """A user's devices."""
        return self._by_owner.get(owner_id, {}).values()

    # Writing, while holding the device

    @asynccontextmanager
    async def holding(self, device_id: UUID) -> AsyncIterator[Rented | None]:
        """Keep everybody else from changing this device; gives it as it is, or None where it is gone."""
        async with self._locks.of(device_id):
            if device_id in self._doubtful:
                await self._read_again(device_id)
            yield self._devices.get(device_id)

    @asynccontextmanager
    async def transaction(self, device_id: UUID) -> AsyncIterator[Tx]:
        """A transaction that changes this one device."""
        try:
            async with self._database.transaction() as tx:
                yield tx
        except CommitUnknown:
            self._doubtful.setdefault(device_id, [])
            raise

    @contextmanager
    def new_ports(self, device_id: UUID) -> Iterator[PortTriple]:
        """Three ports, given back at the end unless the device's row holds them then.

        Raises Problem(ports_exhausted). Where the block raises UniqueViolation, because a row holds one of
        them that memory does not know of, others are given next time.
        """
        try:
            ports = self.ports.take()
        except PortsExhausted as exhausted:
            raise Problem(
                Code.PORTS_EXHAUSTED,
                N_("All {range} ports of this server are taken; try again later."),
                range=exhausted.range_name,
            ) from None
        try:
            yield ports
        except UniqueViolation:
            log.error("ports are held that memory took for free", extra={"ports": astuple(ports)})
            for port in astuple(ports):
                self.ports.mark_foreign(port)
            raise
        finally:
            device = self._devices.get(device_id)
            if device_id in self._doubtful:
                self._doubtful[device_id].append(ports)
            elif device is None or device.ports != ports:
                self.ports.free(ports)

    async def insert(self, tx: Tx, device: Rented) -> Rented:
        """Write a new device with its ports, and tell its owner."""
        row = await tx.fetchrow(
            """
            INSERT INTO devices
                (id, owner_id, name, image, plan, price_per_hour, hardware, state, wanted_state, node)
            VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)
            RETURNING created_at, updated_at
            """,
            device.id,
            device.owner_id,
            device.name,
            device.image,
            device.plan,
            device.price_per_hour,
            asdict(device.hardware),
            device.state,
            device.wanted,
            device.node,
        )
        assert row is not None
        await self._write_ports(tx, device)
        device = replace(device, created_at=row["created_at"], updated_at=row["updated_at"], shown={})
        await self._tell_state(tx, device)
        tx.after_commit(partial(self._remember, device))
        return device

    async def store(self, tx: Tx, device: Rented) -> Rented:
        """Write a device's row as it shall be now; its owner is told of a new state or detail."""
        before = self._devices[device.id]
        updated_at = await tx.fetchval(
            """
            UPDATE devices SET name = $2, state = $3, detail = $4, detail_params = $5, wanted_state = $6,
                generation = $7, started_at = $8, deletion_warned = $9, spent_at = $10, revived_at = $11,
                run = $12, plan = $13, price_per_hour = $14, hardware = $15, updated_at = now()
            WHERE id = $1 RETURNING updated_at
            """,
            device.id,
            device.name,
            device.state,
            device.detail.message,
            device.detail.params,
            device.wanted,
            device.generation,
            device.started_at,
            device.deletion_warned,
            device.spent_at,
            device.revived_at,
            device.run,
            device.plan,
            device.price_per_hour,
            asdict(device.hardware),
        )
        if device.ports != before.ports:
            await tx.execute("DELETE FROM device_ports WHERE device_id = $1", device.id)
            await self._write_ports(tx, device)
        device = replace(device, updated_at=updated_at, shown={})
        if (device.state, device.detail) != (before.state, before.detail):
            await self._tell_state(tx, device)
        tx.after_commit(partial(self._remember, device))
        return device

    async def delete(self, tx: Tx, device: Rented) -> None:
        """Forget a device whose phone is gone, and tell its owner."""
        await tx.execute("DELETE FROM device_ports WHERE device_id = $1", device.id)
        await tx.execute("DELETE FROM devices WHERE id = $1", device.id)
        await self.tell(tx, device, N_("{name} is deleted"), NOTHING, state="deleted")
        tx.after_commit(partial(self._forget, device.id))

    async def _write_ports(self, tx: Tx, device: Rented) -> None:
        roles = asdict(device.ports) if device.ports else {}
        await tx.executemany(
            "INSERT INTO device_ports (node, port, role, device_id) VALUES ($1, $2, $3, $4)",
            [(device.node, port, role, device.id) for role, port in roles.items()],
        )

    async def _tell_state(self, tx: Tx, device: Rented) -> None:
        # Without words a passing state moves the pages and leaves the inbox alone.
        is_silent = device.state in PASSING and device.detail == NOTHING
        title = "" if is_silent else TITLES[device.state]
        await self.tell(tx, device, title, device.detail, state=device.state)

    async def tell(self, tx: Tx, device: Rented, title: str, detail: Detail, *, state: str) -> None:
        """Tell the owner something about a device; `title` is an N_() message with `{name}`."""
        await self._notifier.publish(
            tx,
            device.owner_id,
            Topic.DEVICE_STATE,
            title,
            detail.message,
            params={**detail.params, "name": device.name},
            data={
                "device_id": str(device.id),
                "name": device.name,
                "state": state,
                "detail": detail.text(SOURCE_LOCALE),
            },
        )

    # The mirror

    async def load(self) -> None:
        """Rebuild memory from the rows."""
        for device in await read_devices(self._database):
            if device.ports:
                self.ports.hold(device.ports)
            self._remember(device)

    async def refresh(self) -> None:
        """Read the devices again whose last COMMIT is in doubt."""
        for device_id in list(self._doubtful):
            async with self.holding(device_id):
                pass

    async def _read_again(self, device_id: UUID) -> None:
        found = await read_devices(self._database, device_id)
        if found:
            self._remember(found[0])
        else:
            self._forget(device_id)
        for ports in self._doubtful.pop(device_id):
            if not found or ports != found[0].ports:
                self.ports.free(ports)

    def _remember(self, device: Rented) -> None:
        before = self._devices.get(device.id)
        self._devices[device.id] = device
        self._by_owner[device.owner_id][device.id] = device
        if before and before.ports and before.ports != device.ports:
            self.ports.free(before.ports)
        if device.needs_work:
            self.doorbell(device.id)

    def _forget(self, device_id: UUID) -> None:
        device = self._devices.pop(device_id, None)
        if device is None:
            return
        devices = self._by_owner[device.owner_id]
        del devices[device_id]
        if not devices:
            del self._by_owner[device.owner_id]
        if device.ports:
            self.ports.free(device.ports)


async def read_devices(database: Database, device_id: UUID | None = None) -> list[Rented]:
    """One device, or all, as the rows have them."""
    ports = await database.fetch(
        "SELECT device_id, role, port FROM device_ports WHERE $1::uuid IS NULL OR device_id = $1",
        device_id,
    )
    rows = await database.fetch(
        """
        SELECT id, owner_id, name, image, plan, price_per_hour, hardware, state, detail, detail_params,
            wanted_state, generation, created_at, updated_at, started_at,
            deletion_warned, spent_at, revived_at, node, run
        FROM devices WHERE $1::uuid IS NULL OR id = $1
        """,
        device_id,
    )
    held: dict[UUID, dict[str, int]] = defaultdict(dict)
    for row in ports:
        held[row["device_id"]][row["role"]] = row["port"]
    return [
        Rented.from_row(row, PortTriple(**held[row["id"]]) if row["id"] in held else None) for row in rows
    ]
