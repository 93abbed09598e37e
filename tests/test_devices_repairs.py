"""Where rows and phones disagree, told apart case by case."""

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from uuid import UUID

import pytest

from phones.runtime import FoundPhone, PhoneStatus, PortTriple
from plugins.devices.model import DeviceState, Hardware, Rented, Wanted
from plugins.devices.repairs import MENDS, ORPHAN_AGE, Fault, Repair, compare, judge

NOW = datetime(2026, 1, 2, tzinfo=UTC)
ID = UUID("11111111-2222-4333-8444-555555555555")
OTHER = UUID("99999999-2222-4333-8444-555555555555")
PORTS = PortTriple(20000, 22000, 24000)
OTHER_PORTS = PortTriple(20001, 22001, 24001)

DEVICE = Rented(
    id=ID,
    owner_id=OTHER,
    name="mine",
    image="android-12",
    plan="basic",
    price_per_hour=20,
    hardware=Hardware("redroid", "redroid:12", "12", 1.0, 512, 720, 1280, 320),
    state=DeviceState.RUNNING,
    wanted=Wanted.RUNNING,
    created_at=NOW,
    updated_at=NOW,
    run="first",
    ports=PORTS,
)
PHONE = FoundPhone(str(ID), PhoneStatus.RUNNING, PORTS, place="0123456789abcdef", run="first")
DOWN = replace(PHONE, status=PhoneStatus.STOPPED, ports=None, run=None)


@pytest.mark.parametrize(
    ("phone", "fault"),
    [
        (PHONE, None),
        (None, Fault.DEAD),
        (DOWN, Fault.DEAD),
        (replace(PHONE, has_restarted=True), Fault.DEAD),
        (replace(PHONE, ports=OTHER_PORTS), Fault.DEAD),
        (replace(PHONE, ports=None), Fault.DEAD),
        (replace(PHONE, run="second"), Fault.DEAD),
        # A machine that does not tell runs apart says nothing of a new one.
        (replace(PHONE, run=None), None),
        (replace(PHONE, is_altered=True), Fault.ALTERED),
        (replace(PHONE, is_altered=True, run="second"), Fault.DEAD),
    ],
)
def test_a_phone_that_should_run(phone: FoundPhone | None, fault: Fault | None) -> None:
    assert judge(DEVICE, phone) == fault


def test_a_phone_that_came_up_before_runs_were_told_apart_lives_on() -> None:
    assert judge(replace(DEVICE, run=None), PHONE) is None


@pytest.mark.parametrize("state", [DeviceState.STOPPED, DeviceState.FAILED])
def test_a_phone_that_should_not_run(state: DeviceState) -> None:
    device = replace(DEVICE, state=state, run=None)
    assert judge(device, PHONE) == Fault.LOOSE
    assert judge(device, replace(PHONE, is_altered=True, has_restarted=True)) == Fault.LOOSE
    assert judge(device, DOWN) is None
    assert judge(device, None) is None


def compared(*found: FoundPhone, device: Rented | None = DEVICE) -> list[tuple[Fault, str]]:
    """What there is to mend: faults, and the places or devices they are at."""
    devices = {device.id: device} if device else {}
    repairs = compare(devices.values(), found, NOW, devices.__contains__)
    return [
        (repair.fault, str(repair.device.id) if repair.device else repair.phone.place if repair.phone else "")
        for repair in repairs
    ]


def test_where_rows_and_phones_agree_nothing_is_mended() -> None:
    assert compared(PHONE) == []
    assert compared(device=None) == []
    assert compared(DOWN, device=replace(DEVICE, state=DeviceState.STOPPED)) == []


def test_a_phone_without_a_container_is_dead() -> None:
    assert compared() == [(Fault.DEAD, str(ID))]


@pytest.mark.parametrize(
    "device",
    [
        *(
            replace(DEVICE, state=state)
            for state in DeviceState
            if state not in {DeviceState.RUNNING, DeviceState.STOPPED, DeviceState.FAILED}
        ),
        replace(DEVICE, state=DeviceState.FAILED),  # it still has ports, so it is being ended
    ],
)
def test_a_device_that_is_being_worked_on_is_left_alone(device: Rented) -> None:
    assert compared(DOWN, device=device) == []
    assert compared(PHONE, device=device) == []
    assert compared(device=device) == []


@pytest.mark.parametrize(
    ("created_at", "is_orphan"),
    [
        (NOW, False),
        (NOW - ORPHAN_AGE, False),
        (NOW - ORPHAN_AGE - timedelta(seconds=1), True),
        (NOW + timedelta(hours=1), False),  # by a clock that is ahead of ours
        (None, True),
    ],
)
def test_a_phone_that_nobody_rents_is_an_orphan_once_it_is_old(
    created_at: datetime | None, *, is_orphan: bool
) -> None:
    phone = replace(PHONE, created_at=created_at)
    assert compared(phone, device=None) == ([(Fault.ORPHAN, phone.place)] if is_orphan else [])


@pytest.mark.parametrize("spelled", ["", "no-uuid/../x", str(ID).replace("-", ""), f"{{{ID}}}", f"{ID} "])
def test_a_phone_whose_id_is_spelled_as_none_of_ours_is_an_orphan(spelled: str) -> None:
    assert compared(PHONE, replace(PHONE, id=spelled, place="odd")) == [(Fault.ORPHAN, "odd")]


def test_an_id_in_capitals_is_none_of_ours() -> None:
    device = replace(DEVICE, id=UUID("abcdefab-2222-4333-8444-555555555555"))
    phone = replace(PHONE, id=str(device.id))
    assert compared(phone, device=device) == []
    shouted = replace(phone, id=phone.id.upper(), place="odd")
    assert compared(phone, shouted, device=device) == [(Fault.ORPHAN, "odd")]


def test_a_second_phone_of_a_device_is_a_stray_however_young() -> None:
    stray = replace(PHONE, is_stray=True, place="second", created_at=NOW)
    assert compared(PHONE, stray) == [(Fault.STRAY, "second")]
    assert compared(stray, PHONE) == [(Fault.STRAY, "second")]
    assert compared(stray) == [(Fault.STRAY, "second"), (Fault.DEAD, str(ID))], "it does not stand in"


def test_a_row_that_came_since_the_phones_were_listed_keeps_its_phone() -> None:
    assert compare([], [PHONE], NOW, lambda device_id: device_id == ID) == []


@pytest.mark.parametrize(
    ("repair", "line"),
    [
        (Repair(Fault.DEAD, DEVICE, None), f"dead phone {ID}: start it again"),
        (Repair(Fault.LOOSE, DEVICE, PHONE), f"loose phone {ID} (0123456789ab): stop it"),
        (Repair(Fault.ALTERED, DEVICE, PHONE), f"altered phone {ID} (0123456789ab): set its limits again"),
        (Repair(Fault.ORPHAN, None, PHONE), f"orphan phone {ID} (0123456789ab): remove it"),
        (Repair(Fault.STRAY, None, replace(PHONE, place="")), f"stray phone {ID}: remove it"),
    ],
)
def test_a_repair_in_one_line(repair: Repair, line: str) -> None:
    assert repair.line() == line


def test_every_fault_has_its_mend() -> None:
    assert set(MENDS) == set(Fault)
