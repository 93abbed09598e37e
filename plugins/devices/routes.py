"""Devices' operations and pages."""

from dataclasses import asdict
from typing import Any
from uuid import UUID

from aiohttp import web
from yarl import URL

from plugins.devices import bulk, control, files
from plugins.devices.model import (
    ActionResults,
    Device,
    DeviceActions,
    DeviceChanges,
    DeviceImage,
    DeviceLog,
    DevicePlan,
    DeviceQuery,
    DeviceState,
    DeviceStats,
    FileQuery,
    Gesture,
    NewDevice,
    PhoneFile,
    Rented,
    ShellAnswer,
    ShellCommand,
    show,
)
from plugins.devices.room import DEVICES, Devices
from server.api import Page, PageQuery, Routes, Upload
from server.auth import Access, Caller
from server.errors import Code
from server.files import receive_stream
from server.forms import submit
from server.i18n import N_, pick_locale, translate
from server.interfaces import LEDGER, RANDOMNESS
from server.pages import render
from server.request_keys import CALLER

START_PROBLEMS = (Code.INSUFFICIENT_BALANCE, Code.PORTS_EXHAUSTED, Code.RUNTIME_UNAVAILABLE)
TALK_PROBLEMS = (Code.DEVICE_NOT_RUNNING, Code.RUNTIME_UNAVAILABLE)

routes = Routes("devices")


PUBLIC_PORTS = N_(
    "Phones' ports are published on a public address. adb has no login: who reaches a port owns the phone."
)

EXPOSED = N_("Phones can reach this machine's own services: no firewall rule could be set for their network.")


def _shown(request: web.Request, device: Rented) -> Device:
    devices = request.app[DEVICES]
    return show(device, devices.runtime.name, pick_locale(request), devices.waits_for(device))


@routes.api("GET", "/device-images", access=Access.USER)
async def images(request: web.Request, query: PageQuery) -> Page[DeviceImage]:
    """The Androids that can be chosen."""
    return Page[DeviceImage](items=_images(request.app[DEVICES]))


@routes.api("GET", "/device-plans", access=Access.USER)
async def plans(request: web.Request, query: PageQuery) -> Page[DevicePlan]:
    """The sizes that can be chosen, and their prices."""
    return Page[DevicePlan](items=_plans(request.app))


@routes.api("GET", "/devices", access=Access.USER)
async def list_devices(request: web.Request, caller: Caller, query: DeviceQuery) -> Page[Device]:
    """Your devices, newest first."""
    devices, more = request.app[DEVICES].page(caller, query)
    shown = [_shown(request, device) for device in devices]
    return Page[Device].model_construct(items=shown, next_cursor=more)


@routes.api("POST", "/devices", access=Access.USER, status=202, location="/api/v1/devices/{id}",
            problems=(Code.QUOTA_EXCEEDED, *START_PROBLEMS))  # fmt: skip
async def rent(request: web.Request, caller: Caller, body: NewDevice, new_id: UUID) -> Device:
    """Rent a phone; it is made and started by itself."""
    return _shown(request, await request.app[DEVICES].rent(caller, body, new_id))


@routes.api("GET", "/devices/{device_id}", access=Access.USER)
async def get(request: web.Request, caller: Caller, device_id: UUID) -> Device:
    """One device."""
    return _shown(request, request.app[DEVICES].find(caller, device_id))


@routes.api("PATCH", "/devices/{device_id}", access=Access.USER, problems=(Code.INVALID_STATE,))
async def change(request: web.Request, caller: Caller, device_id: UUID, body: DeviceChanges) -> Device:
    """Give a device another name or another plan.

    Another plan is for a stopped or failed phone: its size and price hold from the next start on, its data
    stays.
    """
    return _shown(request, await request.app[DEVICES].change(caller, device_id, body))


@routes.api("DELETE", "/devices/{device_id}", access=Access.USER, status=202)
async def delete(request: web.Request, caller: Caller, device_id: UUID) -> Device:
    """Delete a phone and its data; it answers 404 once it is gone."""
    return _shown(request, await request.app[DEVICES].delete(caller, device_id))


@routes.api("POST", "/devices/{device_id}/start", access=Access.USER, status=202,
            problems=(Code.INVALID_STATE, *START_PROBLEMS))  # fmt: skip
async def start(request: web.Request, caller: Caller, device_id: UUID) -> Device:
    """Start a stopped or failed phone."""
    return _shown(request, await request.app[DEVICES].start(caller, device_id))


@routes.api("POST", "/devices/{device_id}/stop", access=Access.USER, status=202,
            problems=(Code.INVALID_STATE,))  # fmt: skip
async def stop(request: web.Request, caller: Caller, device_id: UUID) -> Device:
    """Stop a phone; its data is kept, and so are its ports."""
    return _shown(request, await request.app[DEVICES].stop(caller, device_id))


@routes.api("POST", "/devices/{device_id}/restart", access=Access.USER, status=202,
            problems=(Code.INVALID_STATE, Code.RUNTIME_UNAVAILABLE))  # fmt: skip
async def restart(request: web.Request, caller: Caller, device_id: UUID) -> Device:
    """Stop a running phone and start it again."""
    return _shown(request, await request.app[DEVICES].restart(caller, device_id))


@routes.api("POST", "/devices/{device_id}/reset", access=Access.USER, status=202,
            problems=(Code.INVALID_STATE, *START_PROBLEMS))  # fmt: skip
async def reset(request: web.Request, caller: Caller, device_id: UUID) -> Device:
    """Throw a phone's data away. A running or failed one is started then, a stopped one stays stopped."""
    return _shown(request, await request.app[DEVICES].reset(caller, device_id))


@routes.api("POST", "/devices/actions", access=Access.USER)
async def act(request: web.Request, caller: Caller, body: DeviceActions) -> ActionResults:
    """Start, stop, restart, reset or delete up to 100 phones at once.

    Each result has the `status` that the phone's single call would have answered, and its problem's `code`
    where that failed. Results come in the order asked; an id that is repeated is done and answered once.
    """
    return await bulk.act(request.app[DEVICES], caller, body.action, body.ids)


@routes.api("GET", "/devices/{device_id}/stats", access=Access.USER, problems=TALK_PROBLEMS)
async def stats(request: web.Request, caller: Caller, device_id: UUID) -> DeviceStats:
    """What a running phone uses now."""
    return DeviceStats(**asdict(await request.app[DEVICES].stats(caller, device_id)))


@routes.api("GET", "/devices/{device_id}/log", access=Access.USER, problems=(Code.RUNTIME_UNAVAILABLE,))
async def log(request: web.Request, caller: Caller, device_id: UUID) -> DeviceLog:
    """What the phone's container printed last, up to 200 lines; says why a start failed."""
    return DeviceLog(lines=await request.app[DEVICES].log(caller, device_id))


@routes.api("GET", "/devices/{device_id}/screenshot", access=Access.USER, media="image/png",
            problems=TALK_PROBLEMS)  # fmt: skip
async def screenshot(request: web.Request, caller: Caller, device_id: UUID) -> web.Response:
    """The phone's screen as it is now."""
    picture = await control.screenshot(request.app[DEVICES], caller, device_id)
    return web.Response(body=picture, content_type="image/png", headers={"Cache-Control": "no-store"})


@routes.api("POST", "/devices/{device_id}/input", access=Access.USER, problems=TALK_PROBLEMS)
async def touch(request: web.Request, caller: Caller, device_id: UUID, body: Gesture) -> None:
    """Tap, swipe, type or press a key."""
    await control.touch(request.app[DEVICES], caller, device_id, body)


@routes.api("POST", "/devices/{device_id}/shell", access=Access.USER,
            problems=(Code.COMMAND_ENDED, *TALK_PROBLEMS))  # fmt: skip
async def shell(request: web.Request, caller: Caller, device_id: UUID, body: ShellCommand) -> ShellAnswer:
    """Run a command on the phone to its end."""
    return await control.shell(request.app[DEVICES], caller, device_id, body)


@routes.api("GET", "/devices/{device_id}/files", access=Access.USER, media="application/octet-stream",
            problems=TALK_PROBLEMS)  # fmt: skip
async def read_file(
    request: web.Request, caller: Caller, device_id: UUID, query: FileQuery
) -> web.StreamResponse:
    """Read a file on the phone, streamed as it comes.

    A file of up to 64 KiB comes with its true length, a larger one with the length the phone says it has,
    and where the phone says none, in chunks. One that grows meanwhile ends at that length. Where the file
    becomes shorter or the phone goes away, the connection is cut: an answer that ends in order is whole.
    404 `not_found` where there is no such file; 422 `invalid` for a directory, for what is no regular file,
    and with the phone's reason where it refuses.
    """
    return await files.read(request.app[DEVICES], caller, device_id, query.path, request)


@routes.api("PUT", "/devices/{device_id}/files", access=Access.USER, upload=Upload.RAW,
            problems=(Code.TOO_LARGE, *TALK_PROBLEMS))  # fmt: skip
async def write_file(request: web.Request, caller: Caller, device_id: UUID, query: FileQuery) -> None:
    """Write a file on the phone: the body as it is, of any media type, streamed as it comes.

    Replaces the file that stands there; directories above it are made; it is sent with mode 0644. Of a body
    that breaks off, is too large or stays silent for 30 s nothing is kept, but Android may have let go of
    the file that stood there. 413 `too_large` above `devices.max_file_mb`; 422 `invalid` with the phone's
    reason where it refuses.
    """
    devices = request.app[DEVICES]
    content = receive_stream(request, limit_mb=devices.max_file_mb)
    await files.write(devices, caller, device_id, query.path, content)


@routes.api("GET", "/devices/{device_id}/files/list", access=Access.USER, problems=TALK_PROBLEMS)
async def list_files(
    request: web.Request, caller: Caller, device_id: UUID, query: FileQuery
) -> Page[PhoneFile]:
    """A directory of the phone, all of it: directories first, by name.

    404 `not_found` where there is nothing; 422 `invalid` for what is no directory, and for one of more than
    10,000 entries. A directory that the phone does not let us read shows as empty.
    """
    found = await files.list_directory(request.app[DEVICES], caller, device_id, query.path)
    return Page[PhoneFile](items=found)


# Pages


@routes.page("GET", "/devices", access=Access.USER)
async def list_page(request: web.Request, caller: Caller) -> web.Response:
    """The caller's phones."""
    devices = request.app[DEVICES]
    context = {
        "devices": [_shown(request, device) for device in devices.of_owner(caller.user_id)],
        "plans": devices.plans,
        "currency": request.app[LEDGER].currency,
    }
    return render(request, "devices/list.html", context)


@routes.page("GET", "/devices/new", access=Access.USER)
async def new_page(request: web.Request) -> web.Response:
    """What can be rented."""
    return render(request, "devices/new.html", {**_choices(request), "errors": {}, "values": {}})


@routes.page("POST", "/devices/new", access=Access.USER)
async def rent_on_page(request: web.Request, caller: Caller) -> web.StreamResponse:
    """Rent, and go to the phone's page."""

    async def act(wish: NewDevice) -> str:
        new_id = request.app[RANDOMNESS].uuid()
        return f"/devices/{(await request.app[DEVICES].rent(caller, wish, new_id)).id}"

    return await submit(request, NewDevice, act, "devices/new.html", _choices(request))


@routes.page("GET", "/devices/{device_id}", access=Access.USER)
async def device_page(request: web.Request, caller: Caller, device_id: UUID) -> web.Response:
    """One phone."""
    devices = request.app[DEVICES]
    device = devices.find(caller, device_id)
    context = {
        "device": _shown(request, device),
        "plan": {"price_per_hour": device.price_per_hour, **asdict(device.hardware)},
        "currency": request.app[LEDGER].currency,
        "adb_host": _adb_host(request, devices.bind_address),
    }
    return render(request, "devices/show.html", context)


def facts_of_page(request: web.Request) -> dict[str, object]:
    """What every page's header says of phones."""
    devices = request.app[DEVICES]
    facts: dict[str, object] = {
        "runtime": devices.runtime.name,
        "runtime_reason": translate(pick_locale(request), devices.runtime_reason),
    }
    caller = request.get(CALLER)
    if devices.runtime.trouble():
        facts["runtime_away"] = True
    if caller is not None and caller.is_admin:
        dangers = {PUBLIC_PORTS: devices.is_public, EXPOSED: devices.runtime.is_exposed()}
        facts["warnings"] = [
            translate(pick_locale(request), text) for text, holds in dangers.items() if holds
        ]
    if caller is not None:
        states = [device.state for device in devices.of_owner(caller.user_id)]
        facts["phones"] = {"total": len(states), "running": states.count(DeviceState.RUNNING)}
    return facts


def _choices(request: web.Request) -> dict[str, Any]:
    return {
        "images": _images(request.app[DEVICES]),
        "plans": _plans(request.app),
        "currency": request.app[LEDGER].currency,
    }


def _images(devices: Devices) -> list[DeviceImage]:
    return [
        DeviceImage(name=image.name, kind=image.kind, android_version=image.android_version)
        for image in devices.images.values()
    ]


def _plans(app: web.Application) -> list[DevicePlan]:
    currency = app[LEDGER].currency
    return [DevicePlan(**plan.model_dump(), currency=currency) for plan in app[DEVICES].plans.values()]


def _adb_host(request: web.Request, bind_address: str) -> str:
    """Where the reader's own adb finds the phones; published everywhere, they are where this page is."""
    if bind_address not in {"0.0.0.0", "::"}:  # noqa: S104  (compared, not bound)
        return bind_address
    return URL(f"http://{request.host}").host or bind_address
