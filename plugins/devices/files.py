"""Files on a running phone: read, written and listed over ADB, streamed both ways with constant memory."""

import stat
from collections.abc import AsyncIterator, Iterator
from contextlib import aclosing, contextmanager
from datetime import UTC, datetime
from typing import Final
from uuid import UUID

from aiohttp import web

from phones.adb import AdbClient, AdbFault, AdbOverflow, FileRefused, RemoteFile
from plugins.devices.model import FileKind, PhoneFile
from plugins.devices.room import Devices
from server.auth import Caller
from server.errors import Code, Problem, not_found
from server.files import send_stream
from server.i18n import N_

MAX_ENTRIES: Final = 10_000

_FIRST_MOMENT_S = int(datetime.min.replace(tzinfo=UTC).timestamp())
_LAST_MOMENT_S = int(datetime.max.replace(tzinfo=UTC, microsecond=0).timestamp())


async def read(
    devices: Devices, caller: Caller, device_id: UUID, path: str, request: web.Request
) -> web.StreamResponse:
    """Answer with a file's content.

    Raises Problem: not_found, invalid for what is no file or is not given, device_not_running,
    runtime_unavailable. What breaks off later cuts the connection.
    """
    devices.find(caller, device_id)
    with _refusals(devices, device_id):
        link = await devices.link(device_id)
        found = await _stat(link, path)
        if found.is_directory:
            raise _not_on(N_("This is a directory; GET files/list shows what it holds."))
        if not stat.S_ISREG(found.mode):
            raise _not_on(N_("This is no regular file."))
        async with aclosing(link.pull(path)) as pieces:
            return await send_stream(request, pieces, size_bytes=found.size_bytes, filename=found.name)


async def write(
    devices: Devices, caller: Caller, device_id: UUID, path: str, content: AsyncIterator[bytes]
) -> None:
    """Write a file, whatever stood there; what the phone is sent only in part it does not keep.

    Raises Problem: not_found, invalid with the phone's reason, device_not_running,
    runtime_unavailable, and what `content` raises.
    """
    devices.find(caller, device_id)
    with _refusals(devices, device_id):
        link = await devices.link(device_id)
        await link.push(content, path)


async def list_directory(devices: Devices, caller: Caller, device_id: UUID, path: str) -> list[PhoneFile]:
    """What a directory holds, directories first, by name; nothing where the phone keeps it to itself.

    Raises Problem: not_found, invalid for what is no directory or holds too much, device_not_running,
    runtime_unavailable.
    """
    devices.find(caller, device_id)
    with _refusals(devices, device_id):
        link = await devices.link(device_id)
        if not (await _stat(link, path)).is_directory:
            raise _not_on(N_("This is no directory."))
        try:
            # With a slash at its end a link to a directory is the directory.
            found = await link.list(path.rstrip("/") + "/", max_entries=MAX_ENTRIES)
        except AdbOverflow:
            raise _not_on(N_("This directory holds more than 10,000 entries; use the shell.")) from None
    return sorted(map(_shown, found), key=lambda file: (file.kind is not FileKind.DIRECTORY, file.name))


async def _stat(link: AdbClient, path: str) -> RemoteFile:
    found = await link.stat(path)
    if found is None:
        raise not_found()
    return found


def _not_on(reason: str) -> Problem:
    return Problem(Code.INVALID, errors=[("path", reason)])


@contextmanager
def _refusals(devices: Devices, device_id: UUID) -> Iterator[None]:
    """Turn what goes wrong with the phone into problems."""
    try:
        yield
    except FileRefused as refused:
        reason = str(refused)
        said = N_("The phone refuses: {reason}")
        raise Problem(Code.INVALID, said, errors=[("path", reason)], reason=reason) from None
    except AdbFault:
        raise devices.silence(device_id) from None


def _shown(file: RemoteFile) -> PhoneFile:
    seconds = min(max(file.modified_at, _FIRST_MOMENT_S), _LAST_MOMENT_S)
    return PhoneFile(
        name=file.name.encode("utf-8", "surrogateescape").decode("utf-8", "replace"),
        kind=_kind(file.mode),
        size_bytes=file.size_bytes,
        modified_at=datetime.fromtimestamp(seconds, UTC),
    )


def _kind(mode: int) -> FileKind:
    match stat.S_IFMT(mode):
        case stat.S_IFREG:
            return FileKind.FILE
        case stat.S_IFDIR:
            return FileKind.DIRECTORY
        case stat.S_IFLNK:
            return FileKind.LINK
        case _:
            return FileKind.OTHER
