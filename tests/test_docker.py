"""Phones as containers, at the runtime's and the engine's own level, on a real engine."""

import asyncio
import json
import os
import socket
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import closing
from dataclasses import replace
from typing import Any
from uuid import uuid4

import pytest

from phones.docker import DEVICE_LABEL, INSTALLATION_LABEL, DockerRuntime
from phones.engine import Engine as EngineDoor
from phones.engine import NameTaken, NotThere
from phones.network import PhoneNetwork
from phones.ports import PortAllocator
from phones.runtime import PhoneSpec, PhoneStatus, PortTaken, PortTriple, RuntimeFault, RuntimeUnavailable
from tests.containers import sweep
from tests.engine import Engine, docker, unavailable
from tests.house import port_ranges
from tests.renting import until

pytestmark = pytest.mark.timeout(180)

PYTHON = ("--entrypoint", "/usr/bin/python3")


class CountingEngine(EngineDoor):
    """Counts the streams of statistics that it opens."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.streams = 0

    async def stats(self, name: str) -> AsyncIterator[dict[str, Any]]:
        self.streams += 1
        async for sample in super().stats(name):
            yield sample


class There:
    """One installation's runtime on the machine's engine, and what an outsider does and sees there."""

    def __init__(self, engine: Engine) -> None:
        self.url, self.image = engine.url, engine.image
        self.installation = str(uuid4())
        self.door = CountingEngine(engine.url)
        self.runtime = DockerRuntime(self.door, self.installation)
        ranges: dict[str, Any] = {name.removesuffix("_ports"): span for name, span in port_ranges().items()}
        self._ports = PortAllocator(bind_address="127.0.0.1", **ranges)

    def spec(self, **changes: Any) -> PhoneSpec:
        """A small simulated phone on ports of its own."""
        spec = PhoneSpec(
            id=str(uuid4()),
            name="mine",
            image_kind="simulated",
            image_reference=self.image,
            android_version="12",
            cpus=1.0,
            memory_mb=256,
            width=320,
            height=640,
            dpi=160,
            bind_address="127.0.0.1",
            ports=self._ports.take(),
        )
        return replace(spec, **changes)

    def other_ports(self) -> PortTriple:
        """Three more ports."""
        return self._ports.take()

    async def up(self, **changes: Any) -> PhoneSpec:
        """A running phone."""
        spec = self.spec(**changes)
        await self.runtime.create(spec)
        await self.runtime.start(spec)
        return spec

    def name_of(self, phone_id: str) -> str:
        """What a phone's container is called."""
        return f"cloudphone-{self.installation[:8]}-{phone_id}"

    async def docker(self, *arguments: str) -> str:
        """The docker command on the phones' engine."""
        return await docker(*arguments, url=self.url)

    async def container(self, spec: PhoneSpec) -> dict[str, Any]:
        """All the engine knows of a phone's container."""
        (found,) = json.loads(await self.docker("inspect", self.name_of(spec.id)))
        return dict(found)

    async def python(self, spec: PhoneSpec, program: str) -> str:
        """What a program prints inside a phone's container."""
        return await self.docker("exec", self.name_of(spec.id), "/usr/bin/python3", "-S", "-c", program)

    async def stand_in(self, program: str) -> str:
        """A phone whose container runs a program of the test's own; its id, once that has ended."""
        phone_id = str(uuid4())
        labels = (f"{INSTALLATION_LABEL}={self.installation}", f"{DEVICE_LABEL}={phone_id}")
        marks = [part for label in labels for part in ("--label", label)]
        await self.docker(
            "run", "--name", self.name_of(phone_id), *marks, *PYTHON, self.image, "-S", "-c", program
        )
        return phone_id


@pytest.fixture
async def there(engine: Engine) -> AsyncIterator[There]:
    """A runtime of the test's own; what it made is removed."""
    there = There(engine)
    await there.runtime.open()
    yield there
    await there.runtime.close()
    await sweep(there.url, there.installation)


@pytest.fixture
async def bare_image(engine: Engine) -> AsyncIterator[str]:
    """An image in which there is nothing. Ask for it before what makes containers of it."""
    name = f"cloudphone/bare:test-{uuid4().hex[:12]}"
    process = await asyncio.create_subprocess_exec(
        *("docker", "--host", engine.url, "import", "-", name),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.DEVNULL,
    )
    await process.communicate(b"\0" * 10240)  # an empty tar
    assert process.returncode == 0
    yield name
    await docker("image", "rm", name, url=engine.url)


# A phone's container and its data


async def test_a_create_may_be_repeated_and_leaves_a_running_phone_alone(there: There) -> None:
    spec = await there.up()
    before = await there.container(spec)
    await there.runtime.create(spec)
    await there.runtime.start(spec)
    after = await there.container(spec)
    assert (after["Id"], after["State"]["StartedAt"]) == (before["Id"], before["State"]["StartedAt"])
    found = await there.runtime.inspect(spec.id)
    assert found is not None
    assert (found.status, found.ports, found.place) == (PhoneStatus.RUNNING, spec.ports, before["Id"])
    assert await there.runtime.list() == [found]


async def test_other_ports_make_the_container_anew_and_keep_the_data(there: There) -> None:
    spec = await there.up()
    await there.python(spec, "open('/data/kept', 'w').write('yes')")
    before = await there.container(spec)
    moved = replace(spec, ports=there.other_ports())
    await there.runtime.create(moved)
    await there.runtime.start(moved)
    after = await there.container(spec)
    assert after["Id"] != before["Id"]
    assert [at["HostPort"] for at in after["NetworkSettings"]["Ports"]["5555/tcp"]] == [str(moved.ports.adb)]
    assert await there.python(spec, "print(open('/data/kept').read())") == "yes"
    assert [phone.ports for phone in await there.runtime.list()] == [moved.ports]


async def test_data_is_not_given_to_an_older_android(there: There) -> None:
    spec = there.spec(android_version="12.1")
    older, newer = replace(spec, android_version="11"), replace(spec, android_version="13")
    await there.runtime.create(spec)
    with pytest.raises(RuntimeFault, match="from Android 12, which Android 11 cannot read; reset it"):
        await there.runtime.create(older)
    await there.runtime.create(replace(spec, android_version="12"))
    await there.runtime.create(newer)
    with pytest.raises(RuntimeFault, match="from Android 13, which Android 12 cannot read"):
        await there.runtime.create(spec)
    assert (await there.container(spec))["Config"]["Labels"]["cloudphone.android"] == "13", "it stands"
    await there.runtime.wipe(spec.id)
    await there.runtime.create(older)


async def test_a_wipe_leaves_a_running_phone_alone_and_makes_a_stopped_one_new(there: There) -> None:
    spec = await there.up()
    await there.python(spec, "open('/data/gone', 'w')")
    with pytest.raises(RuntimeFault, match="running"):
        await there.runtime.wipe(spec.id)
    assert await there.python(spec, "import os; print(os.path.exists('/data/gone'))") == "True"
    await there.runtime.stop(spec.id)
    for _ in range(2):
        await there.runtime.wipe(spec.id)
    assert await there.runtime.inspect(spec.id) is None
    await there.runtime.create(spec)
    await there.runtime.start(spec)
    assert await there.python(spec, "import os; print(os.path.exists('/data/gone'))") == "False"


async def test_what_is_not_there_can_be_stopped_wiped_and_removed(there: There) -> None:
    phone_id = str(uuid4())
    await there.runtime.stop(phone_id)
    await there.runtime.wipe(phone_id)
    await there.runtime.remove(phone_id)
    assert await there.runtime.inspect(phone_id) is None
    assert await there.runtime.log(phone_id, 10) == []
    spec = await there.up()
    for _ in range(2):
        await there.runtime.stop(spec.id)
    for _ in range(2):
        await there.runtime.remove(spec.id)
    assert await there.runtime.list() == []
    mine = f"label={INSTALLATION_LABEL}={there.installation}"
    assert await there.docker("volume", "ls", "--quiet", "--filter", mine) == ""


async def test_a_paused_phone_answers_nobody_and_can_be_stopped_and_removed(there: There) -> None:
    spec = await there.up()
    await there.docker("pause", there.name_of(spec.id))
    found = await there.runtime.inspect(spec.id)
    assert found is not None
    assert found.status is PhoneStatus.STOPPED
    began = time.monotonic()
    await there.runtime.stop(spec.id)
    assert time.monotonic() - began < 8, "it was asked, not killed"
    state = (await there.container(spec))["State"]
    assert (state["Status"], state["Paused"]) == ("exited", False)
    await there.runtime.start(spec)
    await there.docker("pause", there.name_of(spec.id))
    await there.runtime.remove(spec.id)
    assert await there.runtime.list() == []


async def test_a_phone_whose_container_is_just_being_removed_is_to_be_asked_for_again(there: There) -> None:
    spec, asked_again = await there.up(), 0
    for _ in range(5):
        removing = asyncio.create_task(there.docker("rm", "--force", there.name_of(spec.id)))
        while not removing.done():
            try:
                await there.runtime.create(spec)
                await there.runtime.start(spec)
            except RuntimeUnavailable:
                asked_again += 1
        await removing
        await there.runtime.create(spec)
        await there.runtime.start(spec)
    assert asked_again
    (found,) = await there.runtime.list()
    assert found.status is PhoneStatus.RUNNING


async def test_a_volume_that_is_somebody_elses_is_not_used(there: There) -> None:
    for label in ("other=label", f"{INSTALLATION_LABEL}={there.installation}", f"{DEVICE_LABEL}=other"):
        spec = there.spec()
        volume = f"{there.name_of(spec.id)}-data"
        await there.docker("volume", "create", "--label", label, volume)
        try:
            with pytest.raises(RuntimeFault, match="not this phone's"):
                await there.runtime.create(spec)
            assert await there.runtime.inspect(spec.id) is None
        finally:
            await there.docker("volume", "rm", volume)


# What it uses, what it printed, what happened to it


async def test_many_who_ask_for_statistics_share_one_stream(there: There) -> None:
    spec = await there.up()
    stats = await asyncio.gather(*(there.runtime.stats(spec.id) for _ in range(20)))
    assert there.door.streams == 1
    assert {one.memory_limit_bytes for one in stats} == {256 << 20}
    assert all(0 < one.memory_bytes < one.memory_limit_bytes and one.cpu_percent >= 0 for one in stats)
    began = time.monotonic()
    await there.runtime.stats(spec.id)
    assert time.monotonic() - began < 0.1
    assert there.door.streams == 1
    other = await there.up()
    await asyncio.gather(there.runtime.stats(spec.id), there.runtime.stats(other.id))
    assert there.door.streams == 2


async def test_a_phone_that_is_down_has_no_statistics(there: There) -> None:
    spec = await there.up()
    await there.runtime.stats(spec.id)
    await there.runtime.stop(spec.id)
    for phone_id in (spec.id, str(uuid4())):
        with pytest.raises(RuntimeFault, match="does not run") as silence:
            await there.runtime.stats(phone_id)
        assert not isinstance(silence.value, RuntimeUnavailable)
    await there.runtime.start(spec)
    assert (await there.runtime.stats(spec.id)).memory_bytes > 0


async def test_a_log_is_plain_text_and_cut(there: There) -> None:
    program = r"""
import sys
write = sys.stdout.buffer.write
write(b"old\n\x1b[31mred\x1b[0m\x07 \xe6\x89\x8b \xff!\x1b]0;title\x07\n")
write(b"x" * 50000 + b"\n")
write(b"\x1b[2J\x9bcleared\r\n\n")
write("\N{RIGHT-TO-LEFT OVERRIDE}last\tline".encode())
"""
    phone_id = await there.stand_in(program)
    assert len(await there.runtime.log(phone_id, 2)) == 2
    _, *lines = await there.runtime.log(phone_id, 20)
    assert lines[0].startswith("red 手 ")
    assert "\x1b" not in "".join(lines)
    assert all(character >= " " or character == "\t" for line in lines for character in line)
    assert lines[1] == "x" * 2000
    assert lines[-1].endswith("last\tline")


async def heard(there: There, act: Callable[[], Awaitable[None]]) -> list[str | None]:
    """Whose events come while something happens."""
    events: list[str | None] = []

    source = there.runtime.events()

    async def listen() -> None:
        async for event in source:
            events.append(event)  # noqa: PERF401  (they are looked at while they come)

    listening = asyncio.create_task(listen())
    await asyncio.sleep(0)
    await act()
    # What came before is told before: a phone that is known to make itself heard.
    last = there.spec()
    await there.runtime.create(last)
    await there.runtime.start(last)

    async def done() -> bool:
        return last.id in events

    await until(done)
    listening.cancel()
    await asyncio.gather(listening, return_exceptions=True)
    return [event for event in events if event != last.id]


async def test_what_happens_to_our_containers_is_told_and_nothing_of_others(there: There) -> None:
    spec = await there.up()
    name, other = there.name_of(spec.id), f"{there.installation[:8]}-other"

    async def by_hand(*arguments: str) -> list[str | None]:
        async def act() -> None:
            await there.docker(*arguments)

        return await heard(there, act)

    await by_hand("ps")  # until its own start has been told
    assert await by_hand("ps") == []
    assert spec.id in await by_hand("update", "--cpus", "0.5", name)
    assert spec.id in await by_hand("kill", name)
    assert spec.id in await by_hand("start", name)
    assert spec.id in await by_hand("pause", name)
    assert spec.id in await by_hand("rm", "--force", name)
    label = f"{INSTALLATION_LABEL}={uuid4()}"
    theirs = ("--label", label, "--label", f"{DEVICE_LABEL}={spec.id}", "--rm", "--name", other)
    assert await by_hand("run", *theirs, *PYTHON, there.image, "-c", "") == []


# The network


async def test_a_network_that_lets_phones_meet_is_refused(there: There) -> None:
    name, spec = f"cloudphone-{there.installation[:8]}", there.spec()
    ours = ("--label", f"{INSTALLATION_LABEL}={there.installation}")
    apart = ("--opt", "com.docker.network.bridge.enable_icc=false")
    for options in ((), ours, apart):
        await there.docker("network", "create", *options, name)
        try:
            with pytest.raises(RuntimeFault, match=f"the Docker network {name} is not the one made"):
                await there.runtime.create(spec)
        finally:
            await there.docker("network", "rm", name)
    await there.runtime.create(spec)


async def rules(there: There) -> list[str]:
    """The firewall's rules about the phones' bridge."""
    found = []
    for tool in ("iptables", "ip6tables"):
        process = await asyncio.create_subprocess_exec(
            tool, "-w", "-S", "INPUT", stdout=asyncio.subprocess.PIPE
        )
        out, _ = await process.communicate()
        found += [line for line in out.decode().splitlines() if f"cph-{there.installation[:8]}" in line]
    return found


@pytest.fixture
def as_root() -> Iterator[None]:
    """For tests that look at the firewall."""
    if os.geteuid() != 0:
        unavailable("only root sees the firewall's rules: run the tests as root")
    yield


@pytest.mark.usefixtures("as_root")
@pytest.mark.parametrize("way", ["here", "in a container"])
async def test_the_rule_that_keeps_phones_from_the_machine_is_set_once(
    way: str, there: There, monkeypatch: pytest.MonkeyPatch
) -> None:
    if way == "in a container":
        monkeypatch.setattr(PhoneNetwork, "_tool_here", lambda *_: None)
    label = f"{INSTALLATION_LABEL}={there.installation}"
    for _ in range(2):
        network = PhoneNetwork(there.door, there.installation, label)
        for _ in range(2):
            await asyncio.gather(*(network.ensure(there.image) for _ in range(3)))
            assert network.is_closed
            network.forget()
    found = await rules(there)
    bridge = f"cph-{there.installation[:8]}"
    assert len(found) == 2, found
    for rule in found:
        assert rule.startswith(f"-A INPUT -i {bridge} -m conntrack ! --ctstate ")
        assert rule.endswith("-j DROP")
    gates = await there.docker("ps", "--all", "--quiet", "--filter", f"name={network.name}-gate")
    assert gates == ""


async def test_phones_that_could_not_be_kept_from_the_machine_are_told_of(
    bare_image: str, there: There, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(PhoneNetwork, "_tool_here", lambda *_: None)
    assert not there.runtime.is_exposed()
    await there.runtime.create(there.spec(image_kind="redroid", image_reference=bare_image))
    assert there.runtime.is_exposed()
    assert await there.docker("ps", "--all", "--quiet", "--filter", "name=-gate") == ""


# What goes wrong at the engine


async def refused(asked: Awaitable[object], kind: type[RuntimeFault] = RuntimeFault) -> str:
    """What a call says that fails, as exactly this kind of fault."""
    with pytest.raises(kind) as fault:
        await asked
    assert type(fault.value) is kind
    return str(fault.value)


async def test_an_image_that_is_missing_is_not_there(there: There) -> None:
    image = {"Image": f"cloudphone/missing:{uuid4().hex}"}
    assert "No such image" in await refused(there.door.create("cloudphone-x", image), NotThere)
    assert not await there.door.has_image(image["Image"])
    with pytest.raises(RuntimeFault, match="`make phone-image` builds it"):
        async for _ in there.runtime.fetch(there.spec(image_reference=image["Image"])):
            pass


async def test_a_container_that_is_missing_is_not_there(there: There) -> None:
    name = f"cloudphone-{uuid4()}"
    for call in (there.door.start(name), there.door.stop(name, 1), there.door.logs(name, 1)):
        assert "No such container" in await refused(call, NotThere)
    assert await there.door.inspect(name) is None
    await there.door.delete(name)
    await there.door.delete_volume(name)
    assert await there.door.network(name) is None


async def test_a_name_that_is_taken(there: There) -> None:
    spec = await there.up()
    name = there.name_of(spec.id)
    assert "already in use" in await refused(there.door.create(name, {"Image": there.image}), NameTaken)


async def test_a_port_that_another_container_has_is_named(there: There) -> None:
    first = await there.up()
    second = there.spec(ports=replace(there.other_ports(), adb=first.ports.adb))
    await there.runtime.create(second)
    with pytest.raises(PortTaken) as taken:
        await there.runtime.start(second)
    assert taken.value.port == first.ports.adb
    assert await there.runtime.inspect(second.id) is None, "the next try makes it anew"
    moved = replace(second, ports=there.other_ports())
    await there.runtime.create(moved)
    await there.runtime.start(moved)


async def test_a_port_on_which_somebody_listens_is_named(there: There) -> None:
    spec = there.spec()
    await there.runtime.create(spec)
    with closing(socket.create_server(("127.0.0.1", spec.ports.adb))), pytest.raises(PortTaken) as taken:
        await there.runtime.start(spec)
    assert taken.value.port == spec.ports.adb
    await there.runtime.create(spec)
    await there.runtime.start(spec)


async def test_more_cpus_than_there_are(there: There) -> None:
    assert "CPUs" in await refused(there.runtime.create(there.spec(cpus=10_000.0)))


async def test_a_program_that_is_not_in_the_image(bare_image: str, there: There) -> None:
    spec = there.spec(image_kind="redroid", image_reference=bare_image)
    await there.runtime.create(spec)
    reason = await refused(there.runtime.start(spec))
    assert reason == 'exec: "androidboot.redroid_width=320": executable file not found in $PATH'


@pytest.mark.parametrize("url", ["unix:///nowhere/docker.sock", "tcp://127.0.0.1:1", "http://127.0.0.1:1"])
async def test_an_engine_that_is_not_there_is_away(url: str) -> None:
    door = EngineDoor(url)
    try:
        for call in (door.ping(), door.survey([]), door.create("x", {}), door.inspect("x"), door.delete("x")):
            assert await refused(call, RuntimeUnavailable) == "no Docker engine answers"
        for stream in (door.events("x"), door.stats("x"), door.pull("x")):
            assert await refused(anext(stream), RuntimeUnavailable) == "no Docker engine answers"
    finally:
        await door.close()


async def test_a_runtime_without_its_engine_says_so_at_once() -> None:
    runtime = DockerRuntime(EngineDoor("unix:///nowhere/docker.sock"), str(uuid4()))
    await runtime.open()
    try:
        began = time.monotonic()
        assert runtime.trouble() == "no Docker engine answers"
        calls: list[Awaitable[object]] = [runtime.check(), runtime.list(), runtime.inspect("x")]
        calls += [runtime.stop("x"), runtime.remove("x"), runtime.wipe("x"), runtime.stats("x")]
        for call in calls:
            assert await refused(call, RuntimeUnavailable) == "no Docker engine answers"
        assert time.monotonic() - began < 0.5
    finally:
        await runtime.close()
