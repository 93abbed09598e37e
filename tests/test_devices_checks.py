"""What the doctor says of the machine phones run on: each lack with the command that mends it."""

import asyncio
import socket
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from phones import engine, host
from phones.engine import Survey
from phones.runtime import RuntimeUnavailable
from plugins.devices import checks, schema
from plugins.devices.checks import CHECKS
from plugins.devices.section import DevicesSection, ImageSection
from plugins.users.schema import MIGRATIONS as USERS
from server.config import Configuration
from server.db import Database
from server.interfaces import CONFIGURATION, DATABASE
from server.operations import Finding, finding_of
from server.plugin import Check
from tests.engine import unavailable

REDROID = "redroid/redroid:12.0.0-latest"
ELSEWHERE = "tcp://10.0.0.7:2375"
RELEASE = "6.8.0-45-generic"
OPTIONS = f"boot/config-{RELEASE}"
MODULES = f"lib/modules/{RELEASE}/modules.dep"

GOOD = Survey(
    version="28.3.3",
    cgroup_version="2",
    live_restore=True,
    cpus=8,
    memory_bytes=16 << 30,
    data_root="/var/lib/docker",
    missing_images=(),
)

SOUND_MACHINE = {
    "proc/sys/kernel/osrelease": RELEASE,
    "proc/filesystems": "nodev\tbinder\n",
    "proc/sys/fs/inotify/max_user_instances": "8192",
    "proc/sys/fs/inotify/max_user_watches": "65536",
    "sys/fs/cgroup/cgroup.controllers": "cpu memory pids",
    "proc/sys/net/ipv4/ip_local_port_range": "32768\t60999",
    "proc/sys/net/ipv4/ip_local_reserved_ports": "",
}


class Clinic:
    """A made-up machine and engine to ask the checks about."""

    def __init__(self, root: Path, database: Database) -> None:
        self.root = root
        self.database = database
        self.answer: Survey | Exception | float = GOOD
        self.asked: list[tuple[str, Sequence[str]]] = []
        for path, text in SOUND_MACHINE.items():
            self.write(path, text)

    def write(self, path: str, text: str = "") -> None:
        """Put a file onto the machine."""
        file = self.root / path
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)

    async def survey(self, url: str, references: Sequence[str]) -> Survey:
        """Stand in for the engine; a number makes it hang for so many seconds."""
        self.asked.append((url, references))
        if isinstance(self.answer, Exception):
            raise self.answer
        if isinstance(self.answer, float):
            await asyncio.sleep(self.answer)
            return GOOD
        return self.answer

    async def find(self, name: str, **keys: Any) -> Finding:
        """What the check of this name finds with these keys of [devices]."""
        app = web.Application()
        app[CONFIGURATION] = Configuration.model_construct(devices=DevicesSection(**keys))
        app[DATABASE] = self.database
        return await finding_of(app, check_named(name))


@pytest.fixture
def clinic(tmp_path: Path, database: Database, monkeypatch: pytest.MonkeyPatch) -> Clinic:
    """A machine on which nothing is wrong."""
    clinic = Clinic(tmp_path / "machine", database)
    monkeypatch.setattr(checks, "ROOT", clinic.root)
    monkeypatch.setattr(checks, "survey", clinic.survey)
    monkeypatch.setattr(host, "free_disk_mb", lambda _folder: checks.PHONE_DISK_MB)
    return clinic


def check_named(name: str) -> Check:
    """One of the checks."""
    return next(check for check in CHECKS if check.name == name)


def names_for(section: DevicesSection) -> set[str]:
    """The checks whose question arises."""
    return {check.name for check in CHECKS if check.applies(section)}


# All of them


async def test_a_sound_machine_has_nothing_to_mend(clinic: Clinic) -> None:
    for check in CHECKS:
        found = await clinic.find(check.name)
        assert found.failure is None, (check.name, found)
        assert found.note


async def test_every_failing_line_is_one_line_with_its_mend(
    clinic: Clinic, monkeypatch: pytest.MonkeyPatch
) -> None:
    for path in SOUND_MACHINE:
        (clinic.root / path).unlink()
    clinic.write("proc/sys/fs/inotify/max_user_instances", "128")
    clinic.write("proc/sys/fs/inotify/max_user_watches", "8192")
    clinic.write("sys/fs/cgroup/cgroup.controllers", "cpu")
    clinic.write("proc/sys/net/ipv4/ip_local_port_range", "10000 60999")
    monkeypatch.setattr(host, "has_memfd", lambda: False)
    clinic.answer = replace(GOOD, version="27.0", live_restore=False, cpus=1, missing_images=(REDROID,))
    for check in CHECKS:
        found = await clinic.find(check.name, bind_address="0.0.0.0", allow_public_ports=True)
        assert found.failure, check.name
        assert found.mend, check.name
        assert "\n" not in found.failure + found.mend


def test_the_lines_are_the_doctors_alone_and_stop_nothing() -> None:
    assert not any(check.vital or check.in_readyz for check in CHECKS)


def test_a_server_that_simulates_its_phones_is_not_asked_for_an_engine() -> None:
    assert names_for(DevicesSection(runtime="simulated")) == {"ports", "public ports"}
    assert names_for(DevicesSection()) == {check.name for check in CHECKS}
    image = ImageSection(name="simulated-12", kind="simulated", reference="cloudphone/phone:1")
    simulated = names_for(DevicesSection(images=(image,)))
    assert {check.name for check in CHECKS} - simulated == {"binder", "memfd", "inotify"}


async def test_another_machines_kernel_is_not_judged_by_this_one(clinic: Clinic) -> None:
    (clinic.root / "proc/filesystems").unlink()
    for name in ("binder", "memfd", "inotify", "cgroup", "ports"):
        found = await clinic.find(name, docker_url=ELSEWHERE)
        assert (found.failure, found.note) == (None, "on another machine: not checked")
    assert "not checked" in (await clinic.find("plans", docker_url=ELSEWHERE)).note
    for here in (
        "",
        "unix:///run/docker.sock",
        "tcp://127.0.0.1:2375",
        "http://localhost:2375",
        "tcp://[::1]:1",
    ):
        assert (await clinic.find("binder", docker_url=here)).failure, here


# The engine


async def test_the_engine_tells_its_version(clinic: Clinic) -> None:
    assert (await clinic.find("engine", docker_url=ELSEWHERE)).note == "version 28.3.3"
    assert clinic.asked == [(ELSEWHERE, ())]
    for version in ("28.3.3-rc.1", "29.0.0", "28.10.0+dfsg1"):
        clinic.answer = replace(GOOD, version=version)
        assert (await clinic.find("engine")).failure is None, version


@pytest.mark.parametrize("version", ["20.10.24+dfsg1", "28.3.2", "28.3"])
async def test_an_old_engine_lets_the_segment_in(clinic: Clinic, version: str) -> None:
    clinic.answer = replace(GOOD, version=version)
    found = await clinic.find("engine")
    assert found.failure
    assert f"version {version}" in found.failure
    assert "network segment" in found.failure
    assert "28.3.3" in found.mend


async def test_an_engine_that_is_away_is_started_or_installed(
    clinic: Clinic, monkeypatch: pytest.MonkeyPatch
) -> None:
    clinic.answer = RuntimeUnavailable("no Docker engine answers")
    away = await clinic.find("engine")
    assert away.failure == "no Docker engine answers"
    assert away.mend.startswith("sudo apt-get install docker.io && ")
    clinic.write("usr/bin/dockerd")
    assert (await clinic.find("engine")).mend == "sudo systemctl enable --now docker"
    there = await clinic.find("engine", docker_url=ELSEWHERE)
    assert there.mend == f"start the engine at {ELSEWHERE}, or correct devices.docker_url in config.toml"
    doors = {clinic.root / "run/other.sock": "closed"}
    monkeypatch.setattr(host, "engine_door", doors.__getitem__)
    refused = await clinic.find("engine", docker_url="unix:///run/other.sock")
    assert refused.mend == "sudo usermod -aG docker $USER, then log in again"


async def test_an_engine_that_hangs_holds_up_no_line(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "SURVEY_DEADLINE_S", 0.05)
    clinic.answer = 60.0
    assert (await clinic.find("engine")).failure == "the Docker engine does not answer in time"
    for name in ("live-restore", "plans", "images"):
        found = await clinic.find(name)
        assert (found.failure, found.note) == (None, "not checked: no engine answers")


async def test_live_restore_is_written_only_where_no_setting_is_overwritten(clinic: Clinic) -> None:
    clinic.answer = replace(GOOD, live_restore=False)
    fresh = await clinic.find("live-restore")
    assert fresh.mend.startswith("""echo '{"live-restore": true}' | sudo tee /etc/docker/daemon.json && """)
    assert (await clinic.find("live-restore", docker_url=ELSEWHERE)).mend.startswith("add ")
    clinic.write("etc/docker/daemon.json", "{}")
    kept = await clinic.find("live-restore")
    assert kept.mend.startswith('add "live-restore": true to /etc/docker/daemon.json')


# The kernel


@pytest.mark.parametrize(
    ("path", "text", "note"),
    [
        ("dev/binderfs/binder-control", "", "mounted"),
        ("proc/filesystems", "nodev\tbinder\n", "file system"),
        ("dev/binder", "", "devices"),
    ],
)
async def test_binder_is_said_as_it_is_there(clinic: Clinic, path: str, text: str, note: str) -> None:
    (clinic.root / "proc/filesystems").unlink()
    clinic.write(path, text)
    found = await clinic.find("binder")
    assert found.failure is None
    assert note in found.note


@pytest.mark.parametrize(
    ("path", "text", "reason", "mend"),
    [
        ("boot/other", "", "neither", "linux-modules-extra-$(uname -r) && sudo modprobe binder_linux"),
        (OPTIONS, "CONFIG_ANDROID_BINDER_IPC=m", "neither", "linux-modules-extra-$(uname -r)"),
        (OPTIONS, "# CONFIG_ANDROID_BINDER_IPC is not set", "built without it", "sudo reboot"),
        (OPTIONS, "CONFIG_ANDROID_BINDER_IPC=y", "neither", "binder.devices=binder,hwbinder"),
        (MODULES, "kernel/binder_linux.ko:", "not loaded", "sudo modprobe binder_linux"),
    ],
)
async def test_binder_is_got_the_way_the_kernel_allows(
    clinic: Clinic, path: str, text: str, reason: str, mend: str
) -> None:
    clinic.write("proc/filesystems", "nodev\tproc\n")
    clinic.write(path, text)
    found = await clinic.find("binder")
    assert found.failure
    assert reason in found.failure
    assert mend in found.mend


async def test_either_kind_of_shared_memory_will_do(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(host, "has_memfd", lambda: False)
    assert (await clinic.find("memfd")).mend.endswith("sudo modprobe ashmem_linux")
    clinic.write("dev/ashmem")
    assert "ashmem" in (await clinic.find("memfd")).note


async def test_only_the_inotify_limits_that_are_low_are_raised(clinic: Clinic) -> None:
    folder = "proc/sys/fs/inotify"
    clinic.write(f"{folder}/max_user_instances", "128")
    low = await clinic.find("inotify")
    assert low.failure
    assert "max_user_instances 128" in low.failure
    assert low.mend == "sudo sysctl -w fs.inotify.max_user_instances=8192"
    clinic.write(f"{folder}/max_user_watches", "8192")
    both = await clinic.find("inotify")
    assert both.mend == f"{low.mend} fs.inotify.max_user_watches=65536"


async def test_phones_need_groups_that_limit_memory_and_processes(clinic: Clinic) -> None:
    clinic.write("sys/fs/cgroup/cgroup.controllers", "cpu pids")
    memory = await clinic.find("cgroup")
    assert memory.failure
    assert "without memory" in memory.failure
    assert "cgroup_enable=memory" in memory.mend
    clinic.write("sys/fs/cgroup/cgroup.controllers", "cpu memory")
    assert "CONFIG_CGROUP_PIDS" in (await clinic.find("cgroup")).mend


# What the configuration asks


async def test_a_plan_that_does_not_fit_names_its_key(clinic: Clinic) -> None:
    clinic.answer = replace(GOOD, cpus=2, memory_bytes=3500 << 20)
    found = await clinic.find("plans")
    assert found.failure == "large wants 4 CPUs; large wants 4096 MB; the engine has 2 CPUs and 3500 MB"
    assert found.mend == (
        "in config.toml under [[devices.plans]]: cpus = 2 for large; memory_mb = 3500 at most for large"
    )


async def test_a_full_disk_under_the_engine_is_told(clinic: Clinic, monkeypatch: pytest.MonkeyPatch) -> None:
    free = {clinic.root / "var/lib/docker": 1234}
    monkeypatch.setattr(host, "free_disk_mb", free.__getitem__)
    found = await clinic.find("plans")
    assert found.failure
    assert "1234 MB free under /var/lib/docker" in found.failure
    assert "data-root" in found.mend
    assert (await clinic.find("plans", docker_url=ELSEWHERE)).failure is None


async def test_a_missing_image_is_pulled_or_built(clinic: Clinic) -> None:
    android = ImageSection(name="android-12", reference=REDROID)
    ours = ImageSection(name="simulated-12", kind="simulated", reference="cloudphone/phone:1")
    local = ImageSection(name="local-12", kind="simulated")
    assert REDROID in (await clinic.find("images")).note
    clinic.answer = replace(GOOD, missing_images=(REDROID, "cloudphone/phone:1"))
    found = await clinic.find("images", images=(android, ours, local))
    assert clinic.asked[-1][1] == [REDROID, "cloudphone/phone:1"]
    assert found.failure == f"the engine has no {REDROID}, cloudphone/phone:1"
    assert found.mend == f"docker pull {REDROID} && make phone-image"
    clinic.answer = replace(GOOD, missing_images=(REDROID,))
    there = await clinic.find("images", docker_url=ELSEWHERE)
    assert there.mend == f"DOCKER_HOST={ELSEWHERE} docker pull {REDROID}"


# Ports


def listening(*ports: int, address: str = "0100007F") -> str:
    """/proc/net/tcp of programs that listen."""
    return "head\n" + "".join(f" 0: {address}:{port:04X} 00000000:0000 0A\n" for port in ports)


async def test_ports_that_others_use_are_counted(clinic: Clinic) -> None:
    clinic.write("proc/net/tcp", listening(20000, 20001, 24000, 30000))
    found = await clinic.find("ports")
    assert found.note == "20000-21999 free but for 2, 22000-23999 free, 24000-25999 free but for 1"
    other = await clinic.find("ports", bind_address="192.168.1.5")
    assert "but for" not in other.note, "another address has ports of its own"
    clinic.write("proc/net/tcp", listening(22000, address="00000000"))
    assert "22000-23999 free but for 1" in (await clinic.find("ports", bind_address="192.168.1.5")).note


async def test_our_own_phones_ports_are_no_others(clinic: Clinic) -> None:
    await clinic.database.migrate("users", USERS)
    await clinic.database.migrate("devices", schema.MIGRATIONS)
    await clinic.database.execute("ALTER TABLE device_ports DROP CONSTRAINT device_ports_device_id_fkey")
    await clinic.database.execute(
        "INSERT INTO device_ports (node, port, role, device_id)"
        " VALUES ('local', 20000, 'adb', gen_random_uuid())"
    )
    clinic.write("proc/net/tcp", listening(20000, 20001))
    assert "20000-21999 free but for 1" in (await clinic.find("ports")).note


async def test_a_range_that_others_fill_is_to_be_moved(clinic: Clinic) -> None:
    clinic.write("proc/net/tcp", listening(22000, 22001))
    found = await clinic.find("ports", webrtc_ports=(22000, 22001))
    assert found.failure == "other programs listen on all of 22000-22001"
    assert found.mend.startswith("set devices.webrtc_ports in config.toml")


async def test_ports_for_outgoing_connections_are_reserved(clinic: Clinic) -> None:
    clinic.write("proc/sys/net/ipv4/ip_local_port_range", "10000\t60999")
    found = await clinic.find("ports")
    assert found.failure
    assert "10000-60999" in found.failure
    assert found.mend == "sudo sysctl -w net.ipv4.ip_local_reserved_ports=20000-25999"
    clinic.write("proc/sys/net/ipv4/ip_local_reserved_ports", "8080,19990-20100")
    found = await clinic.find("ports", scrcpy_ports=(40000, 40001))
    assert found.mend.endswith("=8080,19990-23999,40000-40001"), "what was reserved stays so"
    clinic.write("proc/sys/net/ipv4/ip_local_reserved_ports", "20000-25999")
    assert (await clinic.find("ports")).failure is None


async def test_a_public_address_is_warned_of_in_plain_words(clinic: Clinic) -> None:
    for address in ("0.0.0.0", "::", "203.0.114.9"):
        found = await clinic.find("public ports", bind_address=address, allow_public_ports=True)
        assert found.failure
        assert "adb has no login" in found.failure
        assert "bind_address" in found.mend
    private = await clinic.find("public ports", bind_address="192.168.1.5", allow_public_ports=True)
    assert private.failure is None


# The real machine


async def test_this_machine_and_its_engine_are_examined(
    database: Database, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checks, "SURVEY_DEADLINE_S", 30)  # the machine may be busy with other tests
    monkeypatch.setattr("server.operations.CHECK_DEADLINE_S", 60)
    try:
        found = await engine.survey("", (REDROID, "nobody/has:this"))
    except RuntimeUnavailable as away:
        unavailable(f"there is no Docker engine to examine: {away}")
    assert "nobody/has:this" in found.missing_images
    app = web.Application()
    app[CONFIGURATION] = Configuration.model_construct(devices=DevicesSection())
    app[DATABASE] = database
    for check in CHECKS:
        line = await finding_of(app, check)
        assert line.note or line.mend, check.name
        assert "not checked" not in line.note
        if check.name == "engine":
            assert found.version in f"{line.failure} {line.note}"


async def test_a_real_listener_is_counted(database: Database) -> None:
    with socket.create_server(("127.0.0.1", 0)) as foreign:
        port = foreign.getsockname()[1]
        app = web.Application()
        section = DevicesSection(runtime="simulated", adb_ports=(port, port))
        app[CONFIGURATION] = Configuration.model_construct(devices=section)
        app[DATABASE] = database
        line = await finding_of(app, check_named("ports"))
    assert line.failure
    assert str(port) in line.failure + line.mend
