"""What a machine says of itself, read from made-up machines, and from this one."""

import gzip
import os
import shutil
import socket
import tempfile
from collections.abc import Iterator
from ipaddress import ip_address
from pathlib import Path

import pytest

from phones import host
from phones.host import Cgroup, InotifyLimits, Listener

RELEASE = "6.8.0-45-generic"


class Machine:
    """A root of files to make up."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.write("proc/sys/kernel/osrelease", f"{RELEASE}\n")

    def write(self, path: str, text: str | bytes = "") -> None:
        """Make a file and the folders above it."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(text if isinstance(text, bytes) else text.encode())


@pytest.fixture
def machine(tmp_path: Path) -> Machine:
    """A machine with a kernel and nothing else."""
    return Machine(tmp_path)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """A folder whose path leaves room for a socket's name."""
    folder = Path(tempfile.mkdtemp(prefix="host-"))
    yield folder
    shutil.rmtree(folder)


def test_a_system_that_says_nothing_is_no_fault(tmp_path: Path) -> None:
    assert host.kernel_release(tmp_path) == ""
    assert host.binder(tmp_path) is None
    assert host.kernel_binder(tmp_path) is None
    assert not host.has_ashmem(tmp_path)
    assert host.inotify_limits(tmp_path) is None
    assert host.cgroup(tmp_path) is None
    assert host.listeners(tmp_path) == []
    assert host.outgoing_ports(tmp_path) is None
    assert host.reserved_ports(tmp_path) == []
    assert not host.has_engine(tmp_path)
    assert not host.has_engine_settings(tmp_path)
    assert host.free_disk_mb(tmp_path / "nowhere") is None


def test_this_machine_is_read() -> None:
    assert host.kernel_release() == os.uname().release
    assert host.has_memfd()
    limits, groups, outgoing = host.inotify_limits(), host.cgroup(), host.outgoing_ports()
    assert limits is not None
    assert limits.instances > 0
    assert groups is not None
    assert outgoing is not None
    assert 0 < outgoing[0] <= outgoing[1] < 65536
    assert (host.free_disk_mb(Path("/")) or 0) > 0
    for family, address in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET6, "::1")):
        with socket.socket(family) as ours:
            ours.bind((address, 0))
            port = ours.getsockname()[1]
            assert Listener(ip_address(address), port) not in host.listeners(), "it does not listen yet"
            ours.listen()
            assert Listener(ip_address(address), port) in host.listeners()


# Binder and shared memory


def test_binder_is_found_the_best_way_first(machine: Machine) -> None:
    machine.write("proc/filesystems", "nodev\tproc\n\text4\n")
    assert host.binder(machine.root) is None
    machine.write("dev/vndbinder")
    assert host.binder(machine.root) is None
    machine.write("dev/binder")
    assert host.binder(machine.root) == "devices"
    machine.write("proc/filesystems", "nodev\tproc\nnodev\tbinder\n\text4\n")
    assert host.binder(machine.root) == "file system"
    machine.write("dev/binderfs/binder-control")
    assert host.binder(machine.root) == "mounted"


def test_an_empty_mount_point_is_no_binder(machine: Machine) -> None:
    machine.write("dev/binderfs/nothing")
    assert host.binder(machine.root) is None


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ("CONFIG_X=y\nCONFIG_ANDROID_BINDER_IPC=y\n", "built in"),
        ("CONFIG_ANDROID_BINDER_IPC=m\nCONFIG_X=y\n", "packaged"),
        ("# CONFIG_ANDROID_BINDER_IPC is not set\n", "left out"),
        ("CONFIG_ANDROID_BINDER_IPC_RUST=y\n", "left out"),
    ],
)
def test_the_kernels_options_say_whether_it_can_have_binder(
    machine: Machine, options: str, chosen: str
) -> None:
    machine.write("proc/config.gz", gzip.compress(options.encode()))
    assert host.kernel_binder(machine.root) == chosen
    machine.write(f"boot/config-{RELEASE}", options)
    machine.write("proc/config.gz", b"no gzip")
    assert host.kernel_binder(machine.root) == chosen


def test_a_module_at_hand_counts_more_than_how_the_kernel_was_built(machine: Machine) -> None:
    machine.write(f"boot/config-{RELEASE}", "# CONFIG_ANDROID_BINDER_IPC is not set\n")
    machine.write("lib/modules/5.4.0/modules.dep", "kernel/drivers/android/binder_linux.ko:\n")
    assert host.kernel_binder(machine.root) == "left out", "the module of another kernel does not help"
    machine.write(f"lib/modules/{RELEASE}/modules.dep", "updates/dkms/binder_linux.ko.zst:\n")
    assert host.kernel_binder(machine.root) == "installed"


def test_shared_memory_is_tried(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuses(name: str) -> int:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(os, "memfd_create", refuses)
    assert not host.has_memfd()
    monkeypatch.delattr(os, "memfd_create")
    assert not host.has_memfd()
    machine.write("dev/ashmem")
    assert host.has_ashmem(machine.root)


# Limits


def test_inotify_limits_are_read(machine: Machine) -> None:
    machine.write("proc/sys/fs/inotify/max_user_instances", "128\n")
    assert host.inotify_limits(machine.root) is None
    machine.write("proc/sys/fs/inotify/max_user_watches", "65536\n")
    assert host.inotify_limits(machine.root) == InotifyLimits(128, 65536)


def test_control_groups_are_of_the_version_that_is_mounted(machine: Machine) -> None:
    table = "#subsys_name\thierarchy\tnum_cgroups\tenabled\nmemory\t4\t11\t0\npids\t8\t2\t1\n"
    machine.write("proc/cgroups", table)
    assert host.cgroup(machine.root) == Cgroup(1, frozenset({"pids"}))
    machine.write("sys/fs/cgroup/cgroup.controllers", "cpu memory pids\n")
    assert host.cgroup(machine.root) == Cgroup(2, frozenset({"cpu", "memory", "pids"}))


# The engine


def test_an_engine_is_installed_before_it_runs(machine: Machine) -> None:
    machine.write("usr/sbin/dockerd")
    machine.write("etc/docker/daemon.json", "{}")
    assert host.has_engine(machine.root)
    assert host.has_engine_settings(machine.root)


def test_an_engines_door_may_be_absent_or_closed(short_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = short_folder / "docker.sock"
    assert host.engine_door(path) == "absent"
    with socket.socket(socket.AF_UNIX) as engine:
        engine.bind(str(path))
        assert host.engine_door(path) == "open"
        monkeypatch.setattr(os, "access", lambda _path, _mode: False)  # root would be let in
        assert host.engine_door(path) == "closed"


# Ports


def test_listeners_are_told_from_connections(machine: Machine) -> None:
    head = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid\n"
    machine.write(
        "proc/net/tcp",
        head
        + "   0: 00000000:4E20 00000000:0000 0A 0:0 0:0 0 0\n"
        + "   1: 0100007F:4E21 00000000:0000 0A 0:0 0:0 0 0\n"
        + "   2: 0100007F:4E22 0100007F:AF91 01 0:0 0:0 0 0\n",
    )
    machine.write(
        "proc/net/tcp6",
        head
        + f"   0: {'0' * 32}:4E23 {'0' * 32}:0000 0A 0:0 0:0 0 0\n"
        + f"   1: {'0' * 24}01000000:4E24 {'0' * 32}:0000 0A 0:0 0:0 0 0\n"
        + f"   2: {'0' * 16}FFFF00000100007F:4E25 {'0' * 32}:0000 0A 0:0 0:0 0 0\n",
    )
    assert [(str(one.address), one.port) for one in host.listeners(machine.root)] == [
        ("0.0.0.0", 20000),
        ("127.0.0.1", 20001),
        ("::", 20003),
        ("::1", 20004),
        ("127.0.0.1", 20005),
    ]


@pytest.mark.parametrize(
    ("listens", "wanted", "in_the_way"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("127.0.0.1", "192.168.1.5", False),
        ("0.0.0.0", "127.0.0.1", True),
        ("127.0.0.1", "0.0.0.0", True),
        ("::", "127.0.0.1", True),
        ("0.0.0.0", "::1", False),
        ("127.0.0.1", "::1", False),
        ("127.0.0.1", "::", True),
        ("::1", "0.0.0.0", False),
    ],
)
def test_a_listener_is_in_the_way_at_its_own_addresses(listens: str, wanted: str, in_the_way: bool) -> None:
    assert Listener(ip_address(listens), 20000).is_in_the_way_of(wanted) is in_the_way


def test_reserved_ports_are_numbers_and_ranges(machine: Machine) -> None:
    machine.write("proc/sys/net/ipv4/ip_local_port_range", "32768\t60999\n")
    assert host.outgoing_ports(machine.root) == (32768, 60999)
    machine.write("proc/sys/net/ipv4/ip_local_reserved_ports", "\n")
    assert host.reserved_ports(machine.root) == []
    machine.write("proc/sys/net/ipv4/ip_local_reserved_ports", "8080,20000-25999\n")
    assert host.reserved_ports(machine.root) == [(8080, 8080), (20000, 25999)]
