"""Devices on a real Docker engine: what their containers are, and how rows and containers agree again."""

import asyncio
import json
import socket
from contextlib import closing
from datetime import timedelta
from ipaddress import ip_network
from typing import Any

import pytest

from plugins.devices import RECONCILER, repairs
from server.interfaces import DATABASE
from tests.apks import build_apk
from tests.containers import DockerHouse, OpenDocker, idle
from tests.engine import Engine
from tests.house import Client, port_ranges
from tests.realadb import RealAdb
from tests.renting import (
    WISH,
    act,
    balance,
    becomes_gone,
    held_ports,
    rented,
    restarted,
    settled,
    shell,
    told,
    until,
)

pytestmark = pytest.mark.timeout(300)


# What a container is


async def test_a_container_is_marked_limited_and_published_on_loopback_alone(
    docker_house: OpenDocker,
) -> None:
    there = await docker_house()
    owner = await there.house.sign_up()
    device = await rented(owner)
    assert (device["runtime"], device["simulated"]) == ("docker", True)
    found = await there.inspect(device["id"])
    labels, host = found["Config"]["Labels"], found["HostConfig"]
    assert labels["cloudphone.installation"] == there.installation
    assert labels["cloudphone.device"] == device["id"]
    assert labels["cloudphone.node"] == "local"
    adb = device["ports"]["adb"]
    assert host["PortBindings"] == {"5555/tcp": [{"HostIp": "127.0.0.1", "HostPort": str(adb)}]}
    assert await _listening_at(adb) == {"127.0.0.1"}
    assert (host["NanoCpus"], host["Memory"], host["PidsLimit"]) == (10**9, 512 << 20, 4096)
    assert host["LogConfig"]["Config"] == {"max-size": "5120k", "max-file": "2"}
    assert host["RestartPolicy"]["Name"] == "unless-stopped"
    assert (host["Privileged"], host["CapDrop"], host["ReadonlyRootfs"]) == (False, ["ALL"], True)
    assert host["SecurityOpt"] == ["no-new-privileges"]
    assert found["Config"]["User"] not in {"", "0", "root"}
    assert not host["Binds"]
    assert [mount["Type"] for mount in found["Mounts"]] == ["volume"]
    told_to_container = json.dumps([found["Config"]["Env"], labels])
    assert owner.token not in told_to_container
    stats = (await owner.get(f"/devices/{device['id']}/stats")).json
    assert 0 < stats["memory_bytes"] < stats["memory_limit_bytes"] == 512 << 20
    picture = await owner.get(f"/devices/{device['id']}/screenshot")
    assert picture.body.startswith(b"\x89PNG")


async def test_the_ports_that_an_image_has_are_published(docker_house: OpenDocker, engine: Engine) -> None:
    image = {"name": "android-12", "kind": "simulated", "reference": engine.image}
    there = await docker_house(images=[{**image, "adb_port": 5556, "webrtc_port": 8443}])
    owner = await there.house.sign_up()
    device = await rented(owner)
    bindings = (await there.inspect(device["id"]))["HostConfig"]["PortBindings"]
    published = {inner: places[0]["HostPort"] for inner, places in bindings.items()}
    ports = device["ports"]
    assert published == {"5556/tcp": str(ports["adb"]), "8443/tcp": str(ports["webrtc"])}
    assert ports["scrcpy"] not in published.values()


async def _listening_at(port: int) -> set[str]:
    process = await asyncio.create_subprocess_exec("ss", "-Hltn", stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    places = [line.split()[3].rpartition(":") for line in out.decode().splitlines()]
    return {address for address, _, number in places if number == str(port)}


CONNECT = "import socket, sys; socket.create_connection((sys.argv[1], int(sys.argv[2])), 1)"


async def _reaches(there: DockerHouse, device_id: str, address: str, port: int) -> bool:
    """Whether a phone that does what it likes in its container can connect."""
    python = ("/usr/bin/python3", "-S", "-c", CONNECT, address, str(port))
    try:
        await there.docker("exec", "--user", "0", there.name_of(device_id), *python)
    except RuntimeError as refused:
        assert "Error" in str(refused) or "timed out" in str(refused), refused
        return False
    return True


async def test_phones_reach_neither_each_other_nor_the_server(docker_house: OpenDocker) -> None:
    there = await docker_house()
    owner = await there.house.sign_up()
    first, second = [await rented(owner) for _ in range(2)]
    (network,) = (await there.inspect(second["id"]))["NetworkSettings"]["Networks"].values()
    with closing(socket.create_server(("0.0.0.0", 0))) as service:
        port = service.getsockname()[1]
        assert not await _reaches(there, first["id"], network["IPAddress"], 5555)
        assert not await _reaches(there, first["id"], network["Gateway"], port)
        for address in (await _own_addresses()) - {"127.0.0.1"}:
            assert not await _reaches(there, first["id"], address, port)
        assert await _reaches(there, first["id"], "127.0.0.1", 5555), "it does reach itself"
        # From any other container the same service is reached: what keeps phones out is their network.
        outside = f"{there.installation[:8]}-outside"
        image = (await there.inspect(first["id"]))["Config"]["Image"]
        (bridge,) = json.loads(await there.docker("network", "inspect", "bridge"))
        gateway = next(ip_network(bridge["IPAM"]["Config"][0]["Subnet"]).hosts())
        python = ("-S", "-c", CONNECT, str(gateway), str(port))
        await there.docker(
            "run", "--rm", "--name", outside, "--entrypoint", "/usr/bin/python3", image, *python
        )


async def _own_addresses() -> set[str]:
    process = await asyncio.create_subprocess_exec("hostname", "-I", stdout=asyncio.subprocess.PIPE)
    out, _ = await process.communicate()
    return {address for address in out.decode().split() if ":" not in address}


# What the owner sees


async def test_the_real_adb_installs_an_app_that_stays_until_the_phone_is_reset(
    docker_house: OpenDocker, real_adb: RealAdb, tmp_path: Any
) -> None:
    there = await docker_house()
    owner = await there.house.sign_up()
    device = await rented(owner)
    serial = await real_adb.connect(device["ports"]["adb"])
    apk = tmp_path / "app.apk"
    await asyncio.to_thread(apk.write_bytes, build_apk("org.example.kept"))
    assert (await real_adb.run("-s", serial, "install", str(apk)))[0] == 0

    async def installed() -> list[str]:
        return [str(app["package"]) for app in (await owner.get(f"/devices/{device['id']}/apps")).json]

    assert await installed() == ["org.example.kept"]
    await act(owner, device["id"], "stop", "stopped")
    await act(owner, device["id"], "start", "running")
    assert await installed() == ["org.example.kept"]
    await act(owner, device["id"], "restart", "running")
    assert await installed() == ["org.example.kept"]
    await act(owner, device["id"], "reset", "running")
    assert await installed() == []
    assert (await owner.delete(f"/devices/{device['id']}")).status == 202
    assert await becomes_gone(owner, device["id"], wait=True)
    assert await there.containers() == {}
    volumes = await there.docker("volume", "ls", "-q", "--filter", f"label=cloudphone.device={device['id']}")
    assert volumes == ""


async def test_those_who_wait_for_the_machine_see_their_place(docker_house: OpenDocker) -> None:
    there = await docker_house(operations_at_once=1)
    owner = await there.house.sign_up()
    ids = [(await owner.post("/devices", WISH)).json["id"] for _ in range(5)]
    seen: set[str] = set()

    async def all_run() -> bool:
        items = (await owner.get("/devices")).json["items"]
        seen.update(item["state_detail"] for item in items if item["state_detail"])
        chinese = (await owner.get("/devices", headers={"Accept-Language": "zh"})).json["items"]
        seen.update(item["state_detail"] for item in chinese if item["state_detail"])
        return {item["state"] for item in items} == {"running"}

    await until(all_run)
    assert {"queued, 1st", "queued, 2nd", "queued, 3rd"} <= seen
    assert any("第 3 位" in words for words in seen)
    assert len(ids) == len(await there.containers())


async def test_a_start_that_fails_costs_nothing_and_leaves_its_log_to_the_owner(
    docker_house: OpenDocker,
) -> None:
    there = await docker_house()
    owner, stranger = await there.house.sign_up(), await there.house.sign_up()
    before = await balance(owner)
    device = (await owner.post("/devices", {**WISH, "image": "broken-12"})).json
    failed = await settled(owner, device["id"], "failed")
    assert "ended while it was starting" in failed["state_detail"]
    assert (failed["ports"], failed["started_at"]) == (None, None)
    assert await held_ports(there.house) == 0
    assert await balance(owner) == before
    lines = (await owner.get(f"/devices/{device['id']}/log")).json["lines"]
    assert any(line.startswith("phones.simulator: error: ") for line in lines)
    assert (await stranger.get(f"/devices/{device['id']}/log")).status == 404
    found = await there.inspect(device["id"])
    assert found["HostConfig"]["Privileged"]
    assert found["State"]["Status"] == "exited"
    arguments = dict(argument.split("=") for argument in found["Config"]["Cmd"])
    assert arguments == {
        "androidboot.redroid_width": "720",
        "androidboot.redroid_height": "1280",
        "androidboot.redroid_dpi": "320",
        "androidboot.redroid_fps": "30",
        "androidboot.redroid_gpu_mode": "guest",
        "androidboot.use_memfd": "true",
    }


# Ports


async def test_more_creates_than_ports_give_exactly_as_many_phones_as_fit(docker_house: OpenDocker) -> None:
    first = int(port_ranges()["adb_ports"][0])  # type: ignore[index]  # a pair, kept as object
    ranges = {
        "adb_ports": [first, first + 49],
        "webrtc_ports": [first + 100, first + 149],
        "scrcpy_ports": [first + 200, first + 249],
    }
    there = await docker_house(
        max_per_user=100, sections={"billing": {"welcome_credit": 1_000_000}}, start_deadline_s=240, **ranges
    )
    owner = await there.house.sign_up()
    for _ in range(2):
        replies = await asyncio.gather(*(owner.post("/devices", WISH) for _ in range(60)))
        assert sorted(reply.status for reply in replies) == [202] * 50 + [503] * 10
        assert {reply.code for reply in replies if reply.status == 503} == {"ports_exhausted"}
        ids = [reply.json["id"] for reply in replies if reply.status == 202]
        ups = await asyncio.gather(*(_settled_slowly(owner, device_id, "running") for device_id in ids))
        assert len({port for up in ups for port in up["ports"].values()}) == 150
        assert sorted(await there.containers()) == sorted(there.name_of(device_id) for device_id in ids)
        assert set((await there.containers()).values()) == {"running"}
        await asyncio.gather(*(owner.delete(f"/devices/{device_id}") for device_id in ids))

        async def all_gone() -> bool:
            return not (await owner.get("/devices")).json["items"]

        await until(all_gone, deadline_s=120)
        assert await there.containers() == {}
        assert await held_ports(there.house) == 0


async def _settled_slowly(owner: Client, device_id: str, state: str) -> dict[str, Any]:
    """For many phones on a small machine."""
    device: dict[str, Any] = {}

    async def there() -> bool:
        device.update((await owner.get(f"/devices/{device_id}")).json)
        assert device["state"] != "failed", device["state_detail"]
        await asyncio.sleep(0.5)
        return bool(device["state"] == state)

    await until(there, deadline_s=240)
    return device


async def test_a_foreign_listener_costs_a_port_and_no_phone(docker_house: OpenDocker) -> None:
    there = await docker_house()
    owner = await there.house.sign_up()
    device = await rented(owner)
    adb = device["ports"]["adb"]
    await act(owner, device["id"], "stop", "stopped")
    with closing(socket.create_server(("127.0.0.1", adb))):
        again = await act(owner, device["id"], "start", "running")
        assert again["ports"]["adb"] != adb
        assert (await shell(owner, device["id"], "echo up"))["stdout"] == "up\n"
    assert await held_ports(there.house) == 3


async def test_a_port_that_a_foreign_container_has_is_exchanged(docker_house: OpenDocker) -> None:
    there = await docker_house()
    owner = await there.house.sign_up()
    device = await rented(owner)
    adb = device["ports"]["adb"]
    await act(owner, device["id"], "stop", "stopped")
    image = (await there.inspect(device["id"]))["Config"]["Image"]
    foreign = f"{there.installation[:8]}-foreign"
    await there.docker("run", "-d", "--name", foreign, "-p", f"127.0.0.1:{adb}:5555", *idle(image))
    try:
        assert (await act(owner, device["id"], "start", "running"))["ports"]["adb"] != adb
    finally:
        await there.docker("rm", "-f", foreign)


# What happens behind our back


async def test_a_killed_container_comes_back_and_its_owner_is_told(docker_house: OpenDocker) -> None:
    there = await docker_house()
    owner = await there.house.sign_up()
    device = await rented(owner)
    await shell(owner, device["id"], "echo kept > /sdcard/note")
    before = await balance(owner)
    await there.docker("kill", there.name_of(device["id"]))
    again = await restarted(owner, device)
    assert again["ports"] == device["ports"]
    assert (await shell(owner, device["id"], "cat /sdcard/note"))["stdout"] == "kept\n"
    heard = [(item["data"]["state"], item["data"]["detail"]) for item in await told(owner)]
    assert heard[2:] == [("starting", "The phone ended by itself and is started again."), ("running", None)]
    assert await there.repairs() == [("dead", device["id"])]
    assert await balance(owner) == before
    await there.docker("kill", there.name_of(device["id"]))
    failed = await settled(owner, device["id"], "failed")
    assert "twice" in failed["state_detail"]

    async def freed() -> bool:
        return await held_ports(there.house) == 0

    await until(freed)
    assert list((await there.containers()).values()) == ["exited"]


async def test_a_phone_that_dies_inside_its_container_is_seen_though_the_engine_restarts_it(
    docker_house: OpenDocker,
) -> None:
    there = await docker_house()
    owner = await there.house.sign_up()
    device = await rented(owner)
    pid = (await there.inspect(device["id"]))["State"]["Pid"]
    (await asyncio.create_subprocess_exec("kill", "-9", str(pid)))
    await restarted(owner, device)
    assert await there.repairs() == [("dead", device["id"])]
    assert (await there.inspect(device["id"]))["RestartCount"] == 0


async def test_a_removed_container_is_made_again_with_its_data(docker_house: OpenDocker) -> None:
    there = await docker_house()
    owner = await there.house.sign_up()
    device = await rented(owner)
    await shell(owner, device["id"], "echo kept > /sdcard/note")
    await there.docker("rm", "-f", there.name_of(device["id"]))
    await restarted(owner, device)
    assert (await shell(owner, device["id"], "cat /sdcard/note"))["stdout"] == "kept\n"
    assert await there.repairs() == [("dead", device["id"])]


async def test_limits_that_somebody_changed_are_set_again(docker_house: OpenDocker) -> None:
    there = await docker_house()
    owner = await there.house.sign_up()
    device = await rented(owner)
    await there.docker("update", "--cpus", "0.1", "--pids-limit", "50", there.name_of(device["id"]))

    async def as_before() -> bool:
        host = (await there.inspect(device["id"]))["HostConfig"]
        return bool((host["NanoCpus"], host["PidsLimit"]) == (10**9, 4096))

    await until(as_before)

    async def noted() -> bool:
        return await there.repairs() == [("altered", device["id"])]

    await until(noted)
    assert (await owner.get(f"/devices/{device['id']}")).json["started_at"] == device["started_at"]


async def test_a_stopped_phone_that_somebody_starts_is_stopped_again(docker_house: OpenDocker) -> None:
    there = await docker_house()
    owner = await there.house.sign_up()
    device = await rented(owner)
    await act(owner, device["id"], "stop", "stopped")
    await there.docker("start", there.name_of(device["id"]))

    async def stopped_again() -> bool:
        return await there.repairs() == [("loose", device["id"])]

    await until(stopped_again)
    assert list((await there.containers()).values()) == ["exited"]
    assert (await owner.get(f"/devices/{device['id']}")).json["state"] == "stopped"


async def test_orphans_of_ours_go_and_everybody_elses_containers_stay(
    docker_house: OpenDocker, monkeypatch: pytest.MonkeyPatch
) -> None:
    there = await docker_house()
    owner = await there.house.sign_up()
    device = await rented(owner)
    image = (await there.inspect(device["id"]))["Config"]["Image"]
    other = "11111111-2222-4333-8444-555555555555"
    ours, label = f"cloudphone.installation={there.installation}", "cloudphone.device"

    async def run(name: str, *labels: str) -> str:
        marks = [part for text in labels for part in ("--label", text)]
        await there.docker("run", "-d", "--name", name, *marks, *idle(image))
        return name

    orphans = [
        await run(there.name_of(other), ours, f"{label}={other}"),
        await run(f"{there.installation[:8]}-odd", ours, f"{label}=no-uuid/../x"),
        await run(f"{there.installation[:8]}-bare", ours),
        await run(f"{there.installation[:8]}-second", ours, f"{label}={device['id']}"),
    ]
    foreign = [
        await run(f"{there.name_of(other)}x", f"{label}={other}"),
        await run(f"cloudphone-{other}", f"cloudphone.installation={other}", f"{label}={device['id']}"),
    ]
    try:
        await there.house.app[RECONCILER].reconcile()
        names = set(await there.containers())
        assert set(orphans[:3]) <= names, "they are younger than a minute"
        monkeypatch.setattr(repairs, "ORPHAN_AGE", timedelta(0))
        await there.house.app[RECONCILER].reconcile()
        assert list(await there.containers()) == [there.name_of(device["id"])]
        left = (await there.docker("ps", "--format", "{{.Names}}")).split()
        assert set(foreign) <= set(left)
        assert sorted(fault for fault, _ in await there.repairs()) == ["orphan"] * 3 + ["stray"]
        assert (await owner.get(f"/devices/{device['id']}")).json == device
    finally:
        for name in (*orphans, *foreign):
            await there.docker("rm", "-f", name)


async def test_a_foreign_container_with_a_phones_name_is_not_touched(docker_house: OpenDocker) -> None:
    there = await docker_house()
    owner = await there.house.sign_up()
    device = await rented(owner)
    await act(owner, device["id"], "stop", "stopped")
    name = there.name_of(device["id"])
    image = (await there.inspect(device["id"]))["Config"]["Image"]
    await there.docker("rm", "-f", name)
    await there.docker("run", "-d", "--name", name, *idle(image))
    try:
        assert (await owner.post(f"/devices/{device['id']}/start")).status == 202
        failed = await settled(owner, device["id"], "failed")
        assert "not ours" in failed["state_detail"]
        assert (await owner.delete(f"/devices/{device['id']}")).status == 202
        assert await becomes_gone(owner, device["id"], wait=True)
        assert name in (await there.docker("ps", "--format", "{{.Names}}")).split()
    finally:
        await there.docker("rm", "-f", name)


async def test_two_installations_on_one_engine_leave_each_other_alone(docker_house: OpenDocker) -> None:
    one, other = await docker_house(), await docker_house()
    owner, neighbour = await one.house.sign_up(), await other.house.sign_up()
    device, next_door = await rented(owner), await rented(neighbour)
    for there in (one, other):
        await there.house.app[RECONCILER].reconcile()
    assert list(await one.containers()) == [one.name_of(device["id"])]
    assert list(await other.containers()) == [other.name_of(next_door["id"])]
    assert device["ports"] != next_door["ports"], "the engine itself refuses a port twice"


async def test_phones_outlive_the_server_and_are_adopted_as_they_run(docker_house: OpenDocker) -> None:
    there = await docker_house()
    owner = await there.house.sign_up()
    device = await rented(owner)
    before = (await there.inspect(device["id"]))["State"]["StartedAt"]
    passing = (await owner.post("/devices", WISH)).json
    await there.house.restart()
    assert (await settled(owner, passing["id"], "running"))["ports"] == passing["ports"]
    assert (await owner.get(f"/devices/{device['id']}")).json == device
    assert (await there.inspect(device["id"]))["State"]["StartedAt"] == before
    assert await there.repairs() == []


async def test_a_phone_that_restarted_while_the_server_was_away_is_started_anew(
    docker_house: OpenDocker,
) -> None:
    there = await docker_house()
    owner = await there.house.sign_up()
    device = await rented(owner)
    await there.house.stop()
    await there.docker("restart", "-t", "1", there.name_of(device["id"]))
    await there.house.start()
    await restarted(owner, device)
    assert await there.repairs() == [("dead", device["id"])]


async def test_a_row_that_memory_forgot_keeps_its_port(docker_house: OpenDocker) -> None:
    there = await docker_house()
    owner = await there.house.sign_up()
    device = await rented(owner)
    await act(owner, device["id"], "stop", "stopped")
    # The next port is held by a row of which the allocator knows nothing.
    await there.house.app[DATABASE].execute(
        "UPDATE device_ports SET port = port + 1 WHERE device_id = $1 AND role = 'webrtc'", device["id"]
    )
    other = await rented(owner)
    assert other["ports"]["webrtc"] not in {device["ports"]["webrtc"], device["ports"]["webrtc"] + 1}


async def test_phones_deleted_while_they_are_made_leave_nothing(docker_house: OpenDocker) -> None:
    there = await docker_house()
    owner = await there.house.sign_up()
    for pause_s in (0, 0.01, 0.03, 0.1, 0.2):
        device_id = (await owner.post("/devices", WISH)).json["id"]
        await asyncio.sleep(pause_s)
        assert (await owner.delete(f"/devices/{device_id}")).status == 202
        assert await becomes_gone(owner, device_id, wait=True)
        assert await there.containers() == {}
    assert await held_ports(there.house) == 0
    mine = f"label=cloudphone.installation={there.installation}"
    assert await there.docker("volume", "ls", "--quiet", "--filter", mine) == ""
