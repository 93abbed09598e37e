"""One simulated phone as a program: its options, its start and its end.

It outlives whoever has started it. Ready is when `DIR/phone.json` is there. SIGTERM ends it within a second.
"""

import argparse
import asyncio
import ctypes
import fcntl
import logging
import os
import signal
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any
from uuid import UUID

from phones.simulator.adbd import Adbd
from phones.simulator.phone import Model, Phone, write_json

CLOSE_WITHIN_S = 0.8
THREADS = 2
_M_MMAP_THRESHOLD = -3


def main() -> int:
    """Run the phone until a signal ends it; the process's exit code."""
    options = _options()
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s %(name)s: %(message)s")
    # Without a session of its own the phone would die with the terminal or the server that started it.
    with suppress(PermissionError):
        os.setsid()
    _keep_memory_small()
    directory: Path = options.data_dir
    try:
        directory.mkdir(mode=0o700, parents=True, exist_ok=True)
        lock = (directory / "lock").open("w")
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return _refuse(f"{directory} is in use by another simulated phone")
    except OSError as fault:
        return _refuse(f"cannot use {directory}: {fault.strerror}")
    with lock:
        return asyncio.run(_run(options, directory))


async def _run(options: argparse.Namespace, directory: Path) -> int:
    ended = asyncio.Event()
    # Every thread keeps memory of its own; two are enough to read a file while a picture is drawn.
    asyncio.get_running_loop().set_default_executor(ThreadPoolExecutor(THREADS))
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, ended.set)
    model = Model(
        id=str(options.id),
        name=options.name,
        width=options.width,
        height=options.height,
        dpi=options.dpi,
        android_version=options.android_version,
    )
    phone = Phone(directory, model)
    adbd = Adbd(phone, on_reboot=lambda mode: phone.reboot())
    announcement = directory / "phone.json"
    try:
        await asyncio.to_thread(announcement.unlink, missing_ok=True)
        await phone.open()
        await adbd.serve(options.host, options.adb_port)
        await asyncio.to_thread(write_json, announcement, _announced(options, phone))
    except (OSError, ValueError, KeyError, TypeError) as fault:
        await adbd.close()
        return _refuse(_told(fault, options))
    await ended.wait()
    with suppress(TimeoutError):
        async with asyncio.timeout(CLOSE_WITHIN_S):
            await adbd.close()
    await asyncio.to_thread(announcement.unlink, missing_ok=True)
    return 0


def _keep_memory_small() -> None:
    """Give pictures back to the system at once: left alone, glibc keeps some 10 MB of them for later."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 128 << 10)


def _announced(options: argparse.Namespace, phone: Phone) -> dict[str, Any]:
    return {
        "id": phone.model.id,
        "pid": os.getpid(),
        "host": options.host,
        "ports": {"adb": options.adb_port, "webrtc": options.webrtc_port, "scrcpy": options.scrcpy_port},
        "started_at": f"{phone.clock.now():%Y-%m-%dT%H:%M:%S.%fZ}",
    }


def _told(fault: Exception, options: argparse.Namespace) -> str:
    """One line on why the phone cannot start."""
    if isinstance(fault, OSError) and fault.filename is None:
        return f"cannot listen on {options.host}:{options.adb_port}: {os.strerror(fault.errno or 0)}"
    if isinstance(fault, OSError):
        return f"cannot use {fault.filename}: {fault.strerror}"
    return f"cannot read {options.data_dir / 'state.json'}: {fault}"


def _refuse(reason: str) -> int:
    print(f"phones.simulator: {reason}".replace("\n", " "), file=sys.stderr)  # noqa: T201 - the answer to whoever starts it
    return 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="phones.simulator", description="A simulated Android phone.")
    parser.add_argument("--data-dir", type=Path, required=True, help="where the phone keeps everything")
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen on; ADB has no login")
    parser.add_argument("--adb-port", type=_port, required=True)
    parser.add_argument("--webrtc-port", type=_port, help="told in phone.json, not listened on")
    parser.add_argument("--scrcpy-port", type=_port, help="told in phone.json, not listened on")
    parser.add_argument("--id", type=UUID, required=True)
    parser.add_argument("--name", default="phone")
    parser.add_argument("--width", type=_side, default=720)
    parser.add_argument("--height", type=_side, default=1280)
    parser.add_argument("--dpi", type=_side, default=320)
    parser.add_argument("--android-version", default="12")
    return parser.parse_args()


def _port(text: str) -> int:
    port = int(text)
    if not 0 < port < 65536:
        raise ValueError
    return port


def _side(text: str) -> int:
    side = int(text)
    if not 72 <= side <= 4096:
        raise ValueError
    return side
