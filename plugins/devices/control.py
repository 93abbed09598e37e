"""Seeing and touching a running phone: its screen, a finger, a keyboard, a shell."""

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final
from uuid import UUID

from phones.adb import AdbFault, AdbOverflow, AdbTimeout, quote
from plugins.devices.model import Gesture, Key, Rented, ShellAnswer, ShellCommand, Swipe, Tap, Text
from plugins.devices.room import Devices
from server.auth import Caller
from server.errors import Code, Problem
from server.i18n import N_

SCREENSHOT_DEADLINE_S: Final = 15.0
GESTURE_DEADLINE_S: Final = 15.0
MAX_OUTPUT_BYTES: Final = 1 << 20


async def screenshot(devices: Devices, caller: Caller, device_id: UUID) -> bytes:
    """The screen as a PNG. Raises Problem: not_found, device_not_running, runtime_unavailable."""
    devices.find(caller, device_id)
    link = await devices.link(device_id)
    with _faults(devices, device_id):
        return await link.screencap(SCREENSHOT_DEADLINE_S)


async def touch(devices: Devices, caller: Caller, device_id: UUID, gesture: Gesture) -> None:
    """Do what a finger or a keyboard would.

    Raises Problem: not_found, device_not_running, runtime_unavailable, invalid for what the phone cannot.
    """
    device = devices.find(caller, device_id)
    command, field, refusal, lasts_s = _as_input(device, gesture)
    link = await devices.link(device_id)
    with _faults(devices, device_id):
        answer = await link.shell(command, timeout_s=GESTURE_DEADLINE_S + lasts_s)
    if answer.exit_code != 0:
        raise Problem(Code.INVALID, errors=[(field, refusal)])


async def shell(devices: Devices, caller: Caller, device_id: UUID, body: ShellCommand) -> ShellAnswer:
    """Run a command on the phone to its end.

    Raises Problem: not_found, device_not_running, runtime_unavailable, command_ended when it takes too
    long or writes too much.
    """
    devices.find(caller, device_id)
    link = await devices.link(device_id)
    with _faults(devices, device_id):
        try:
            answer = await link.shell(
                body.command, timeout_s=body.timeout_s, max_output_bytes=MAX_OUTPUT_BYTES
            )
        except AdbTimeout:
            seconds = f"{body.timeout_s:g}"
            late = N_("It did not finish within {seconds} s.")
            raise Problem(Code.COMMAND_ENDED, late, seconds=seconds) from None
        except AdbOverflow:
            long = N_("It wrote more than {limit} MiB.")
            raise Problem(Code.COMMAND_ENDED, long, limit=MAX_OUTPUT_BYTES >> 20) from None
    return ShellAnswer(
        exit_code=answer.exit_code,
        stdout=answer.stdout.decode(errors="replace"),
        stderr=answer.stderr.decode(errors="replace"),
    )


@contextmanager
def _faults(devices: Devices, device_id: UUID) -> Iterator[None]:
    try:
        yield
    except AdbFault:
        raise devices.silence(device_id) from None


def _as_input(device: Rented, gesture: Gesture) -> tuple[str, str, str, float]:
    """Android's command, the field and sentence for when the phone refuses it, and how long it lasts."""
    match gesture.root:
        case Tap(x=x, y=y):
            _require_on_screen(device, ("x", x, "y", y))
            return f"input tap {x} {y}", "x", N_("The phone did not take the touch."), 0
        case Swipe(x=x, y=y, to_x=to_x, to_y=to_y, duration_ms=duration_ms):
            _require_on_screen(device, ("x", x, "y", y), ("to_x", to_x, "to_y", to_y))
            command = f"input swipe {x} {y} {to_x} {to_y} {duration_ms}"
            return command, "x", N_("The phone did not take the touch."), duration_ms / 1000
        case Text(text=text):
            return _typing(text), "text", N_("The phone cannot type this text."), 0
        case Key(key=key):
            return quote(["input", "keyevent", key]), "key", N_("The phone has no such key."), 0


def _typing(text: str) -> str:
    """`input text` reads %s as a space and knows no way round it, so the two are never in one call."""
    parts = re.split(r"(?<=%)(?=s)", text)
    return " && ".join(quote(["input", "text", part]) for part in parts)


def _require_on_screen(device: Rented, *points: tuple[str, int, str, int]) -> None:
    """A phone that lies on its side has its screen turned with it."""
    upright = device.hardware.width, device.hardware.height
    for width, height in (upright, upright[::-1]):
        if all(x < width and y < height for _, x, _, y in points):
            return
    outside = N_("This is outside of the screen.")
    errors = [
        (name, outside)
        for x_name, x, y_name, y in points
        for name, value, size in ((x_name, x, upright[0]), (y_name, y, upright[1]))
        if value >= size
    ]
    raise Problem(Code.INVALID, errors=errors)
