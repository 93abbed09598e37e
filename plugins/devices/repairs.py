"""Where the rows and the phones' machine disagree, and what would mend it.

Told apart here alone, for the reconciler, which mends, and for `doctor`, which lists.
"""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Final
from uuid import UUID

from phones.runtime import FoundPhone, PhoneStatus
from plugins.devices.model import DeviceState, Rented

ORPHAN_AGE: Final = timedelta(seconds=60)
"""A phone younger than this may belong to somebody whose row we have not seen."""


class Fault(StrEnum):
    """How a phone and its row disagree."""

    DEAD = "dead"
    """It should run and does not, or not as it came up."""
    LOOSE = "loose"
    """It runs and should not."""
    ALTERED = "altered"
    """Somebody changed its limits."""
    ORPHAN = "orphan"
    """Nobody rents it."""
    STRAY = "stray"
    """A second one under a device's id."""


MENDS: Final = {
    Fault.DEAD: "start it again",
    Fault.LOOSE: "stop it",
    Fault.ALTERED: "set its limits again",
    Fault.ORPHAN: "remove it",
    Fault.STRAY: "remove it",
}


@dataclass(frozen=True, slots=True)
class Repair:
    """One thing to mend. An orphan has no device; a dead phone may have left nothing behind."""

    fault: Fault
    device: Rented | None
    phone: FoundPhone | None

    def line(self) -> str:
        """The repair in one line, for an administrator."""
        known = self.device.id if self.device else (self.phone.id if self.phone else "")
        place = f" ({self.phone.place[:12]})" if self.phone and self.phone.place else ""
        return f"{self.fault} phone {known}{place}: {MENDS[self.fault]}"


def judge(device: Rented, phone: FoundPhone | None) -> Fault | None:
    """How a device that stands still disagrees with what the machine says of it, or None."""
    runs = phone is not None and phone.status is PhoneStatus.RUNNING
    if device.state is not DeviceState.RUNNING:
        return Fault.LOOSE if runs else None
    if not runs or phone is None or phone.has_restarted or phone.ports != device.ports:
        return Fault.DEAD
    if None not in (phone.run, device.run) and phone.run != device.run:
        return Fault.DEAD
    return Fault.ALTERED if phone.is_altered else None


def compare(
    devices: Iterable[Rented],
    found: Iterable[FoundPhone],
    now: datetime,
    is_known: Callable[[UUID], bool],
) -> list[Repair]:
    """Everything to mend. Devices that are being worked on are left to whoever does.

    `is_known` says whether there is a row, also one that came since the phones were listed.
    """
    repairs = []
    by_id: dict[str, FoundPhone] = {}
    for phone in found:
        device_id = _id_of(phone)
        if device_id is None or not is_known(device_id):
            if phone.created_at is None or now - phone.created_at > ORPHAN_AGE:
                repairs.append(Repair(Fault.ORPHAN, None, phone))
        elif phone.is_stray:
            repairs.append(Repair(Fault.STRAY, None, phone))
        else:
            by_id[phone.id] = phone
    return repairs + [repair for device in devices if (repair := _of_device(device, by_id)) is not None]


def _of_device(device: Rented, found: Mapping[str, FoundPhone]) -> Repair | None:
    phone = found.get(str(device.id))
    fault = None if device.needs_work else judge(device, phone)
    return None if fault is None else Repair(fault, device, phone)


def _id_of(phone: FoundPhone) -> UUID | None:
    """The device's id, unless it is spelled as we never spell one."""
    try:
        device_id = UUID(phone.id)
    except ValueError:
        return None
    return device_id if str(device_id) == phone.id else None
