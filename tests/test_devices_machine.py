"""Where phones run: what the configuration, the machine and the phones that are there already decide."""

import asyncio
import json
import re

import pytest

from plugins.devices import machine
from tests.containers import DockerHouse, OpenDocker
from tests.renting import WISH, Open, act, lives, process_of, rented, restarted, runtime_of, settled, until

pytestmark = pytest.mark.timeout(180)

NOWHERE = "unix:///nowhere/docker.sock"


async def set_again(there: DockerHouse, **keys: str) -> None:
    """Start the server again with other words in its configuration."""
    await there.house.stop()
    text = await asyncio.to_thread(there.house._file.read_text)
    for key, value in keys.items():
        text, found = re.subn(rf'\b{key} = "[^"]*"', f"{key} = {json.dumps(value)}", text)
        assert found == 1
    await asyncio.to_thread(there.house._file.write_text, text)
    await there.house.start()


async def test_auto_without_an_engine_simulates_and_says_why(open_house: Open) -> None:
    house = await open_house(devices={"runtime": "auto", "docker_url": NOWHERE})
    assert runtime_of(house).name == "simulated"
    owner = await house.sign_up()
    assert "No Docker engine answers on this machine." in (await owner.get("//devices/new")).body.decode()
    assert (await rented(owner))["runtime"] == "simulated"


@pytest.mark.parametrize(("binder", "runs_on"), [(None, "simulated"), ("mounted", "docker")])
async def test_auto_takes_the_engine_where_the_kernel_can_run_android(
    binder: str | None, runs_on: str, docker_house: OpenDocker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "binder", lambda: binder)
    there = await docker_house(runtime="auto")
    assert runtime_of(there.house).name == runs_on
    page = (await (await there.house.sign_up()).get("//devices/new")).body.decode()
    assert ("lacks binder" in page) == (binder is None)


async def test_auto_stays_with_the_engine_that_has_the_phones_though_it_is_away(
    docker_house: OpenDocker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "binder", lambda: None)
    there = await docker_house()
    owner = await there.house.sign_up()
    device = await rented(owner)
    await set_again(there, runtime="auto", docker_url=NOWHERE)
    assert runtime_of(there.house).name == "docker"
    seen = (await owner.get(f"/devices/{device['id']}")).json
    assert (seen["runtime"], seen["state"], seen["ports"]) == ("docker", "running", device["ports"])
    refused = await owner.post("/devices", WISH)
    assert (refused.status, refused.code) == (503, "runtime_unavailable")
    ready = await there.house.anyone.get("//readyz")
    assert (ready.status, ready.json["parts"]["runtime"]["state"]) == (503, "down")
    assert "does not answer at the moment" in (await owner.get("//devices")).body.decode()
    assert list((await there.containers()).values()) == ["running"]
    await set_again(there, docker_url=there.url)
    assert (await owner.get(f"/devices/{device['id']}")).json == device
    assert (await owner.post("/devices", WISH)).status == 202


async def test_auto_without_phones_is_free_to_choose_again(
    docker_house: OpenDocker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "binder", lambda: None)
    there = await docker_house()
    assert runtime_of(there.house).name == "docker"
    await set_again(there, runtime="auto")
    assert runtime_of(there.house).name == "simulated"


async def test_simulated_phones_give_way_to_containers(docker_house: OpenDocker) -> None:
    there = await docker_house(runtime="simulated")
    owner = await there.house.sign_up()
    running, stopped = await rented(owner), await rented(owner)
    await act(owner, stopped["id"], "stop", "stopped")
    pid = process_of(there.house, running["id"])
    await set_again(there, runtime="docker")
    assert not lives(pid)

    async def came_up() -> bool:
        return (await there.containers()).get(there.name_of(running["id"])) == "running"

    await until(came_up)
    again = await settled(owner, running["id"], "running")
    assert (again["runtime"], again["ports"]) == ("docker", running["ports"])
    assert (await owner.get(f"/devices/{stopped['id']}")).json["state"] == "stopped"
    assert list(await there.containers()) == [there.name_of(running["id"])]
    assert (await act(owner, stopped["id"], "start", "running"))["runtime"] == "docker"


async def test_containers_give_way_to_simulated_phones(docker_house: OpenDocker) -> None:
    there = await docker_house()
    owner = await there.house.sign_up()
    device = await rented(owner)
    await set_again(there, runtime="simulated")
    assert list((await there.containers()).values()) == ["exited"], "its data stays with it"
    again = await restarted(owner, device)
    assert (again["runtime"], again["ports"]) == ("simulated", device["ports"])
    assert lives(process_of(there.house, device["id"]))


async def test_a_server_that_simulates_starts_though_the_engine_of_its_phones_is_away(
    docker_house: OpenDocker,
) -> None:
    there = await docker_house()
    owner = await there.house.sign_up()
    device = await rented(owner)
    await set_again(there, runtime="simulated", docker_url=NOWHERE)
    again = await settled(owner, device["id"], "running")
    assert again["runtime"] == "simulated"
