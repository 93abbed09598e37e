"""What the doctor asks about the machine phones run on, and the command that mends each lack.

Nothing here keeps the server from starting: where a machine cannot run Android, phones are simulated.
Facts come from `phones.host` and from the engine itself; an engine on another machine has a kernel and
ports that cannot be seen from here.
"""

import asyncio
import re
from collections.abc import Awaitable, Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from aiohttp import web

from phones import host
from phones.engine import Survey, host_of, survey
from phones.host import PortRange
from phones.runtime import RuntimeUnavailable
from plugins.devices.section import DevicesSection, ImageSection, PlanSection
from server.interfaces import CONFIGURATION, DATABASE
from server.plugin import Check, CheckFailed

ROOT: Final = Path("/")

SURVEY_DEADLINE_S: Final = 2.0

SAFE_VERSION: Final = (28, 3, 3)
"""Before 28.0.0 others on the network segment could reach ports that are bound to loopback, and until this
version they still could once the machine's firewall was reloaded."""

INOTIFY_INSTANCES: Final = 8192
"""The kernel counts them per user id, and all Androids have the same ids: with its usual 128, fifty phones
come up and no fifty-first, so one takes about three. The shipped ranges have ports for 2,000 phones."""

INOTIFY_WATCHES: Final = 65536
"""Older kernels start with 8,192 for all phones together. One takes about 1 KB, only while it is used."""

PHONE_DISK_MB: Final = 4096
"""Room for an Android image and the data of one phone, about 2 GB each."""

RANGES: Final = ("adb_ports", "webrtc_ports", "scrcpy_ports")

ELSEWHERE: Final = "on another machine: not checked"
UNKNOWN: Final = "this system does not say"
NO_ENGINE: Final = "not checked: no engine answers"

_START_ENGINE: Final = "sudo systemctl enable --now docker"
_INSTALL_ENGINE: Final = f"sudo apt-get install docker.io && {_START_ENGINE}"
_LIVE_RESTORE: Final = '"live-restore": true'
_ADD_LIVE_RESTORE: Final = (
    f"add {_LIVE_RESTORE} to /etc/docker/daemon.json, then sudo systemctl reload docker"
)
_WRITE_LIVE_RESTORE: Final = (
    f"echo '{{{_LIVE_RESTORE}}}' | sudo tee /etc/docker/daemon.json && sudo systemctl reload docker"
)
_GET_MODULES: Final = "sudo apt-get install linux-modules-extra-$(uname -r)"
_LOAD_BINDER: Final = "sudo modprobe binder_linux devices=binder,hwbinder,vndbinder"
_GET_BINDER: Final = f"{_GET_MODULES} && {_LOAD_BINDER}"
_GET_ASHMEM: Final = f"{_GET_MODULES} && sudo modprobe ashmem_linux"
_OTHER_KERNEL: Final = "sudo apt-get install linux-image-generic linux-modules-extra-generic && sudo reboot"
_RAISE_INOTIFY: Final = f"sudo sysctl -w fs.inotify.max_user_instances={INOTIFY_INSTANCES}"
_ON_KERNEL_LINE: Final = (
    "sudo sed -i 's/^GRUB_CMDLINE_LINUX=\"/&{option} /' /etc/default/grub && sudo update-grub && sudo reboot"
)
_LIMIT_MEMORY: Final = _ON_KERNEL_LINE.format(option="cgroup_enable=memory swapaccount=1")
_NAME_BINDER: Final = _ON_KERNEL_LINE.format(option="binder.devices=binder,hwbinder,vndbinder")


def _section(app: web.Application) -> DevicesSection:
    section = app[CONFIGURATION].section("devices")
    assert isinstance(section, DevicesSection)
    return section


def _uses_engine(section: DevicesSection) -> bool:
    return section.runtime != "simulated"


def _runs_android(section: DevicesSection) -> bool:
    return _uses_engine(section) and any(image.kind == "redroid" for image in section.images)


def _of_this_machine(
    ask: Callable[[DevicesSection], Awaitable[str]],
) -> Callable[[web.Application], Awaitable[str]]:
    """A check of what can be seen only on the engine's own machine."""

    async def asked(app: web.Application) -> str:
        section = _section(app)
        return ELSEWHERE if host_of(section.docker_url) else await ask(section)

    return asked


# The engine


async def _survey(section: DevicesSection, references: Sequence[str] = ()) -> Survey:
    """What the engine says, in time for a line of the doctor's. Raises RuntimeUnavailable."""
    try:
        async with asyncio.timeout(SURVEY_DEADLINE_S):
            return await survey(section.docker_url, references)
    except TimeoutError:
        raise RuntimeUnavailable("the Docker engine does not answer in time") from None


def _of_the_engine(
    ask: Callable[[DevicesSection, Survey], Awaitable[str]],
) -> Callable[[web.Application], Awaitable[str]]:
    """A check of what the engine says; that it says nothing is told by a line of its own."""

    async def asked(app: web.Application) -> str:
        section = _section(app)
        try:
            found = await _survey(section, [image.reference for image in section.images if image.reference])
        except RuntimeUnavailable:
            return NO_ENGINE
        return await ask(section, found)

    return asked


async def _engine(app: web.Application) -> str:
    section = _section(app)
    try:
        found = await _survey(section)
    except RuntimeUnavailable as away:
        raise CheckFailed(str(away), await asyncio.to_thread(_way_to_engine, section)) from None
    if _version(found.version) < SAFE_VERSION:
        safe = ".".join(map(str, SAFE_VERSION))
        raise CheckFailed(
            f"version {found.version}: before {safe} others on the same network segment can reach ports that"
            " are bound to loopback",
            f"install Docker Engine {safe} or newer: sudo apt-get update &&"
            " sudo apt-get install --only-upgrade docker-ce",
        )
    return f"version {found.version}"


def _way_to_engine(section: DevicesSection) -> str:
    if host_of(section.docker_url):
        return f"start the engine at {section.docker_url}, or correct devices.docker_url in config.toml"
    socket = section.docker_url.removeprefix("unix://") or host.ENGINE_SOCKET
    if socket.startswith("/") and host.engine_door(ROOT / socket.lstrip("/")) == "closed":
        return "sudo usermod -aG docker $USER, then log in again"
    if host.has_engine(ROOT):
        return _START_ENGINE
    return _INSTALL_ENGINE


def _version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text)[:3])


async def _live_restore(section: DevicesSection, found: Survey) -> str:
    if found.live_restore:
        return "on"
    may_write = not host_of(section.docker_url) and not await asyncio.to_thread(
        host.has_engine_settings, ROOT
    )
    raise CheckFailed(
        "off: phones stop when the engine is restarted or upgraded",
        _WRITE_LIVE_RESTORE if may_write else _ADD_LIVE_RESTORE,
    )


# The kernel


async def _binder(_section: DevicesSection) -> str:
    way = await asyncio.to_thread(host.binder, ROOT)
    match way:
        case "mounted":
            return "its file system is mounted at /dev/binderfs"
        case "file system":
            return "the kernel has its file system"
        case "devices":
            return "as devices, without its file system"
    release = await asyncio.to_thread(host.kernel_release, ROOT)
    match await asyncio.to_thread(host.kernel_binder, ROOT):
        case "left out":
            raise CheckFailed(
                f"the kernel {release} was built without it, so no module can bring it",
                f"{_OTHER_KERNEL}, or boot any with CONFIG_ANDROID_BINDER_IPC and CONFIG_ANDROID_BINDERFS",
            )
        case "built in":
            raise CheckFailed(
                f"the kernel {release} has it, but neither its file system nor a device", _NAME_BINDER
            )
        case "installed":
            raise CheckFailed("its module is not loaded", _LOAD_BINDER)
        case _:
            raise CheckFailed("neither /dev/binder nor its file system is there")


async def _memfd(_section: DevicesSection) -> str:
    if await asyncio.to_thread(host.has_memfd):
        return "usable"
    if await asyncio.to_thread(host.has_ashmem, ROOT):
        return "not usable, but /dev/ashmem is there"
    raise CheckFailed("neither memfd (Linux 3.17) nor /dev/ashmem is there")


async def _inotify(_section: DevicesSection) -> str:
    found = await asyncio.to_thread(host.inotify_limits, ROOT)
    if found is None:
        return UNKNOWN
    limits = (
        ("max_user_instances", found.instances, INOTIFY_INSTANCES),
        ("max_user_watches", found.watches, INOTIFY_WATCHES),
    )
    low = [(name, least) for name, now, least in limits if now < least]
    said = ", ".join(f"{name} {now}" for name, now, _ in limits)
    if low:
        wanted = " ".join(f"fs.inotify.{name}={least}" for name, least in low)
        raise CheckFailed(f"{said}: all phones share them", f"sudo sysctl -w {wanted}")
    return said


async def _cgroup(_section: DevicesSection) -> str:
    found = await asyncio.to_thread(host.cgroup, ROOT)
    if found is None:
        return UNKNOWN
    if "memory" not in found.controllers:
        raise CheckFailed(f"version {found.version} without memory: a phone could take all of the machine's")
    if "pids" not in found.controllers:
        raise CheckFailed(
            f"version {found.version} without pids: a phone could start processes without end",
            f"{_OTHER_KERNEL}, or boot any with CONFIG_CGROUP_PIDS",
        )
    return f"version {found.version} with memory and pids"


# What the configuration asks of the machine


async def _plans(section: DevicesSection, found: Survey) -> str:
    lacks = [lack for plan in section.plans for lack in _lacks(plan, found)]
    if lacks:
        raise CheckFailed(
            f"{'; '.join(reason for reason, _ in lacks)}; the engine has {_size(found)}",
            f"in config.toml under [[devices.plans]]: {'; '.join(mend for _, mend in lacks)}",
        )
    if host_of(section.docker_url):
        return f"each fits into {_size(found)}; the disk is {ELSEWHERE}"
    free = await asyncio.to_thread(host.free_disk_mb, ROOT / found.data_root.lstrip("/"))
    if free is not None and free < PHONE_DISK_MB:
        raise CheckFailed(
            f"{free} MB free under {found.data_root}; an Android and its data take {PHONE_DISK_MB}",
            'docker image prune, or set "data-root" in /etc/docker/daemon.json to a folder on a larger disk',
        )
    return f"each fits into {_size(found)}" + (f", {free} MB of disk free" if free is not None else "")


def _size(found: Survey) -> str:
    return f"{found.cpus} CPUs and {found.memory_bytes >> 20} MB"


def _lacks(plan: PlanSection, found: Survey) -> Iterable[tuple[str, str]]:
    """Why the plan does not fit into the engine's machine, and what to write instead."""
    memory_mb = found.memory_bytes >> 20
    if plan.cpus > found.cpus:
        yield f"{plan.name} wants {plan.cpus:g} CPUs", f"cpus = {found.cpus} for {plan.name}"
    if plan.memory_mb > memory_mb:
        yield f"{plan.name} wants {plan.memory_mb} MB", f"memory_mb = {memory_mb} at most for {plan.name}"


async def _images(section: DevicesSection, found: Survey) -> str:
    images = {image.reference: image for image in section.images if image.reference}
    missing = [images[reference] for reference in found.missing_images]
    if missing:
        raise CheckFailed(
            f"the engine has no {', '.join(image.reference for image in missing)}",
            " && ".join(dict.fromkeys(_way_to_image(image, section.docker_url) for image in missing)),
        )
    return f"{', '.join(images)} present" if images else "none is asked of the engine"


def _way_to_image(image: ImageSection, docker_url: str) -> str:
    engine = f"DOCKER_HOST={docker_url} " if docker_url else ""
    return engine + (f"docker pull {image.reference}" if image.kind == "redroid" else "make phone-image")


# Ports


async def _ports(app: web.Application) -> str:
    section = _section(app)
    if host_of(section.docker_url):
        return ELSEWHERE
    ranges = [getattr(section, name) for name in RANGES]
    outgoing = await asyncio.to_thread(host.outgoing_ports, ROOT)
    reserved = await asyncio.to_thread(host.reserved_ports, ROOT)
    if outgoing and any(_shared(ports, outgoing, reserved) for ports in ranges):
        kept = ",".join(_spelled(ports) for ports in _merged([*reserved, *ranges]))
        raise CheckFailed(
            f"the kernel takes {_spelled(outgoing)} for outgoing connections, so it may take a phone's",
            f"sudo sysctl -w net.ipv4.ip_local_reserved_ports={kept}",
        )
    listening = await asyncio.to_thread(host.listeners, ROOT)
    in_the_way = {one.port for one in listening if one.is_in_the_way_of(section.bind_address)}
    others = in_the_way - await _held(app)
    notes = []
    for name, (first, last) in zip(RANGES, ranges, strict=True):
        taken = sum(first <= port <= last for port in others)
        if taken > last - first:
            raise CheckFailed(
                f"other programs listen on all of {first}-{last}",
                f"set devices.{name} in config.toml to ports nobody uses; sudo ss -ltnp names who does",
            )
        notes.append(f"{_spelled((first, last))} free" + (f" but for {taken}" if taken else ""))
    return ", ".join(notes)


async def _held(app: web.Application) -> set[int]:
    """The ports that belong to our phones, which run on while no server does."""
    database = app[DATABASE]
    if await database.fetchval("SELECT to_regclass('device_ports')") is None:
        return set()
    return {row["port"] for row in await database.fetch("SELECT port FROM device_ports")}


def _shared(ports: PortRange, outgoing: PortRange, reserved: Sequence[PortRange]) -> bool:
    """Whether the kernel may take one of the ports for a connection."""
    first, last = max(ports[0], outgoing[0]), min(ports[1], outgoing[1])
    return any(not any(start <= port <= end for start, end in reserved) for port in range(first, last + 1))


def _merged(ranges: Iterable[PortRange]) -> list[PortRange]:
    """The same ports in as few ranges as there can be."""
    merged: list[PortRange] = []
    for first, last in sorted(ranges):
        if merged and first <= merged[-1][1] + 1:
            merged[-1] = (merged[-1][0], max(last, merged[-1][1]))
        else:
            merged.append((first, last))
    return merged


def _spelled(ports: PortRange) -> str:
    first, last = ports
    return str(first) if first == last else f"{first}-{last}"


async def _public_ports(app: web.Application) -> str:
    section = _section(app)
    if section.is_public:
        raise CheckFailed(
            f"phones' ports are open on {section.bind_address}: adb has no login, so whoever reaches a port"
            " owns the phone"
        )
    return f"none, phones listen on {section.bind_address}"


_check = partial(Check, vital=False, in_readyz=False)

CHECKS: Final = (
    _check("engine", _engine, _START_ENGINE, applies=_uses_engine),
    _check("live-restore", _of_the_engine(_live_restore), _ADD_LIVE_RESTORE, applies=_uses_engine),
    _check("binder", _of_this_machine(_binder), _GET_BINDER, applies=_runs_android),
    _check("memfd", _of_this_machine(_memfd), _GET_ASHMEM, applies=_runs_android),
    _check("inotify", _of_this_machine(_inotify), _RAISE_INOTIFY, applies=_runs_android),
    _check("cgroup", _of_this_machine(_cgroup), _LIMIT_MEMORY, applies=_uses_engine),
    _check("plans", _of_the_engine(_plans), "see [[devices.plans]] in config.toml", applies=_uses_engine),
    _check("images", _of_the_engine(_images), "see [[devices.images]] in config.toml", applies=_uses_engine),
    _check("ports", _ports, "see devices.adb_ports and the others in config.toml"),
    _check("public ports", _public_ports, 'set bind_address = "127.0.0.1" under [devices] in config.toml'),
)
