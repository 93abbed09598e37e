"""What this machine has of what Android in containers needs: facts, and no judgement of them.

Everything here blocks briefly: it reads /proc, /sys and /dev, below `root` where one is given. What this
system does not tell is None.
"""

import gzip
import os
import re
import shutil
import sys
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Final, Literal

Binder = Literal["mounted", "file system", "devices"]
KernelBinder = Literal["built in", "installed", "packaged", "left out"]
Door = Literal["open", "closed", "absent"]
Address = IPv4Address | IPv6Address
PortRange = tuple[int, int]

ENGINE_SOCKET: Final = "/var/run/docker.sock"

_ROOT: Final = Path("/")
_ENGINE_PROGRAMS: Final = ("usr/bin/dockerd", "usr/sbin/dockerd", "usr/local/bin/dockerd")
_LISTENING: Final = "0A"
_BINDER_OPTION: Final = re.compile(r"^CONFIG_ANDROID_BINDER_IPC=([ym])$", re.MULTILINE)


# The engine


def engine_door(path: Path) -> Door:
    """Whether this user may speak to the engine whose socket this is."""
    if not path.is_socket():
        return "absent"
    return "open" if os.access(path, os.R_OK | os.W_OK) else "closed"


def has_engine(root: Path = _ROOT) -> bool:
    """Whether an engine is installed, running or not."""
    return any((root / program).exists() for program in _ENGINE_PROGRAMS)


def has_engine_settings(root: Path = _ROOT) -> bool:
    """Whether somebody wrote settings for the engine, which must not be overwritten."""
    return (root / "etc/docker/daemon.json").exists()


def free_disk_mb(folder: Path) -> int | None:
    """What is left on a folder's disk; None where this machine has no such folder."""
    try:
        return shutil.disk_usage(folder).free >> 20
    except OSError:
        return None


# The kernel


def kernel_release(root: Path = _ROOT) -> str:
    """Such as 6.8.0-45-generic; empty where this is no Linux."""
    return (_read(root / "proc/sys/kernel/osrelease") or "").strip()


def binder(root: Path = _ROOT) -> Binder | None:
    """How the kernel offers binder now, the best way first."""
    devices = root / "dev"
    if (devices / "binderfs/binder-control").exists():
        return "mounted"
    if "binder" in _file_systems(root):
        return "file system"
    return "devices" if any(path.name != "binderfs" for path in devices.glob("binder*")) else None


def kernel_binder(root: Path = _ROOT) -> KernelBinder | None:
    """What the kernel's builder chose for binder, whether it is loaded or not.

    A module is `installed`, or `packaged` by the distribution apart from the kernel.
    """
    release = kernel_release(root)
    if "/binder_linux.ko" in (_read(root / f"lib/modules/{release}/modules.dep") or ""):
        return "installed"
    options = _read(root / f"boot/config-{release}") or _read_packed(root / "proc/config.gz")
    if options is None:
        return None
    chosen = _BINDER_OPTION.search(options)
    if chosen is None:
        return "left out"
    return "built in" if chosen[1] == "y" else "packaged"


def has_memfd() -> bool:
    """Whether the kernel gives anonymous shared memory, as Linux does since 3.17."""
    try:
        os.close(os.memfd_create("probe"))
    except (AttributeError, OSError):
        return False
    return True


def has_ashmem(root: Path = _ROOT) -> bool:
    """Whether the kernel has Android's own shared memory, which memfd replaced."""
    return (root / "dev/ashmem").exists()


@dataclass(frozen=True, slots=True)
class InotifyLimits:
    """How many inotify instances and watches a user may have, over all containers."""

    instances: int
    watches: int


def inotify_limits(root: Path = _ROOT) -> InotifyLimits | None:
    """The limits now."""
    folder = root / "proc/sys/fs/inotify"
    instances, watches = _read(folder / "max_user_instances"), _read(folder / "max_user_watches")
    return InotifyLimits(int(instances), int(watches)) if instances and watches else None


@dataclass(frozen=True, slots=True)
class Cgroup:
    """Which version of control groups is mounted, and what they can limit."""

    version: Literal[1, 2]
    controllers: frozenset[str]


def cgroup(root: Path = _ROOT) -> Cgroup | None:
    """The machine's control groups."""
    unified = _read(root / "sys/fs/cgroup/cgroup.controllers")
    if unified is not None:
        return Cgroup(2, frozenset(unified.split()))
    table = _read(root / "proc/cgroups")
    if table is None:
        return None
    rows = [line.split() for line in table.splitlines() if not line.startswith("#")]
    return Cgroup(1, frozenset(row[0] for row in rows if row[-1] == "1"))


# Ports


@dataclass(frozen=True, slots=True)
class Listener:
    """A TCP port on which some program listens."""

    address: Address
    port: int

    def is_in_the_way_of(self, address: str) -> bool:
        """Whether nobody else can listen at this address on the same port."""
        wanted = ip_address(address)
        return _covers(self.address, wanted) or _covers(wanted, self.address)


def _covers(address: Address, other: Address) -> bool:
    """Whether who listens at `address` also does at `other`; at :: one usually hears IPv4 too."""
    return address == other or (address.is_unspecified and address.version >= other.version)


def listeners(root: Path = _ROOT) -> list[Listener]:
    """Every TCP port on which somebody listens, without opening one."""
    tables = (_read(root / "proc/net" / name) or "" for name in ("tcp", "tcp6"))
    rows = [line.split() for table in tables for line in table.splitlines()[1:]]
    return [_listener(row[1]) for row in rows if row[3] == _LISTENING]


def _listener(local: str) -> Listener:
    digits, _, port = local.partition(":")
    words = [int(digits[start : start + 8], 16) for start in range(0, len(digits), 8)]
    # The kernel prints each word of the address as its own processor reads it.
    address = ip_address(b"".join(word.to_bytes(4, sys.byteorder) for word in words))
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return Listener(mapped or address, int(port, 16))


def outgoing_ports(root: Path = _ROOT) -> PortRange | None:
    """The ports the kernel takes for connections to elsewhere."""
    bounds = (_read(root / "proc/sys/net/ipv4/ip_local_port_range") or "").split()
    return (int(bounds[0]), int(bounds[1])) if bounds else None


def reserved_ports(root: Path = _ROOT) -> list[PortRange]:
    """The ports among those that it leaves alone."""
    written = (_read(root / "proc/sys/net/ipv4/ip_local_reserved_ports") or "").strip()
    parts = [part.partition("-") for part in written.split(",") if part]
    return [(int(first), int(last or first)) for first, _, last in parts]


def _file_systems(root: Path) -> set[str]:
    return {line.split()[-1] for line in (_read(root / "proc/filesystems") or "").splitlines() if line}


def _read(path: Path) -> str | None:
    try:
        return path.read_text()
    except OSError:
        return None


def _read_packed(path: Path) -> str | None:
    try:
        return gzip.decompress(path.read_bytes()).decode()
    except OSError:
        return None
