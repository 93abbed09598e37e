"""The runtime of local processes, with real processes."""

import asyncio
import json
import os
import signal
import socket
import sys
import time
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest

from phones import processes
from phones.processes import Process
from phones.runtime import (
    FoundPhone,
    PhoneSpec,
    PhoneStatus,
    PortTaken,
    PortTriple,
    Runtime,
    RuntimeFault,
    RuntimeUnavailable,
)
from phones.simulated import SimulatedRuntime

ROOT = Path(__file__).parent.parent
# An address of this process's own: tests that run beside it cannot take a port between probe and use.
LOOPBACK = "127.{}.{}.{}".format(*(1 + os.getpid() // 200**place % 200 for place in (2, 1, 0)))


@pytest.fixture
def data_dir(tmp_path: Path) -> Iterator[Path]:
    """A directory for phones, none of which runs on when the test is over."""
    place = tmp_path / "phones"
    yield place
    for process in running_below(place):
        process.send(signal.SIGKILL)
        process.let_go()


@pytest.fixture
async def runtime(data_dir: Path) -> AsyncIterator[SimulatedRuntime]:
    async with opened(data_dir) as runtime:
        yield runtime


class opened:
    """A runtime of stand-in phones, open within an `async with`."""

    def __init__(self, data_dir: Path, **options: float) -> None:
        self._runtime = SimulatedRuntime(data_dir, module="tests.standin_phone", **options)  # type: ignore[arg-type]  # the constructor's own options

    async def __aenter__(self) -> SimulatedRuntime:
        await self._runtime.open()
        return self._runtime

    async def __aexit__(self, *failure: object) -> None:
        await self._runtime.close()


def running_below(data_dir: Path) -> list[Process]:
    """The processes of all phones in this directory."""
    place = f"--data-dir={data_dir}/"
    found = processes.find(lambda command: any(word.startswith(place) for word in command))
    return [process for process, _ in found]


def pids_below(data_dir: Path) -> list[int]:
    found = running_below(data_dir)
    for process in found:
        process.let_go()
    return sorted(process.pid for process in found)


async def until_processes(data_dir: Path, count: int) -> None:
    """Return once so many phones have a process, listening or not."""
    async with asyncio.timeout(10):
        while True:
            if len(await asyncio.to_thread(pids_below, data_dir)) == count:
                return
            await asyncio.sleep(0.02)


def is_reaped(pid: int) -> bool:
    return not Path(f"/proc/{pid}").exists()


def new_spec(name: str = "phone", **changes: object) -> PhoneSpec:
    """A phone with ports that nobody uses now."""
    with socket.socket() as one, socket.socket() as two, socket.socket() as three:
        sockets = (one, two, three)
        for each in sockets:
            each.bind((LOOPBACK, 0))
        ports = PortTriple(*(each.getsockname()[1] for each in sockets))
    spec = PhoneSpec(
        id=str(uuid.uuid4()), name=name, image_kind="simulated", image_reference="", android_version="12",
        cpus=1.0, memory_mb=512, width=720, height=1280, dpi=320, bind_address=LOOPBACK, ports=ports,
    )  # fmt: skip
    return replace(spec, **changes)  # type: ignore[arg-type]  # named by the test


def answers(spec: PhoneSpec) -> bool:
    with suppress(OSError), socket.create_connection((LOOPBACK, spec.ports.adb), timeout=2):
        return True
    return False


def running(spec: PhoneSpec) -> FoundPhone:
    return FoundPhone(spec.id, PhoneStatus.RUNNING, spec.ports)


def stopped(spec: PhoneSpec) -> FoundPhone:
    return FoundPhone(spec.id, PhoneStatus.STOPPED, None)


async def test_a_phone_lives_through_all_its_states(runtime: SimulatedRuntime, data_dir: Path) -> None:
    spec = new_spec()
    kept = data_dir / spec.id / "kept"
    assert await runtime.inspect(spec.id) is None
    await runtime.create(spec)
    assert await runtime.inspect(spec.id) == stopped(spec)
    await runtime.start(spec)
    assert await runtime.inspect(spec.id) == running(spec)
    assert await runtime.list() == [running(spec)]
    assert await asyncio.to_thread(answers, spec)
    await asyncio.to_thread(kept.write_text, "x")
    await runtime.stop(spec.id)
    assert await runtime.inspect(spec.id) == stopped(spec)
    assert not await asyncio.to_thread(answers, spec)
    assert await asyncio.to_thread(kept.exists)
    await runtime.wipe(spec.id)
    assert await runtime.list() == [stopped(spec)]
    assert not await asyncio.to_thread(kept.exists)
    await runtime.start(spec)
    await runtime.remove(spec.id)
    assert await runtime.list() == []
    assert await asyncio.to_thread(lambda: list(data_dir.iterdir())) == []
    assert await asyncio.to_thread(pids_below, data_dir) == []


async def test_every_operation_may_be_repeated(runtime: SimulatedRuntime, data_dir: Path) -> None:
    spec = new_spec()
    for _ in range(2):
        await runtime.create(spec)
    await asyncio.gather(*(runtime.start(spec) for _ in range(3)))
    assert len(await asyncio.to_thread(pids_below, data_dir)) == 1
    for _ in range(2):
        await runtime.stop(spec.id)
    for _ in range(2):
        await runtime.wipe(spec.id)
    for _ in range(2):
        await runtime.remove(spec.id)
    assert await runtime.list() == []


async def test_a_running_phone_is_not_wiped(runtime: SimulatedRuntime) -> None:
    spec = new_spec()
    await runtime.start(spec)
    with pytest.raises(RuntimeFault, match="running"):
        await runtime.wipe(spec.id)
    assert await runtime.inspect(spec.id) == running(spec)


CONTROLLER = """
import asyncio, json, sys
from pathlib import Path
from tests.test_simulated import new_spec, opened
async def main():
    async with opened(Path(sys.argv[1])) as runtime:
        specs = [new_spec(bind_address=sys.argv[2]) for _ in range(3)]
        await asyncio.gather(*(runtime.start(spec) for spec in specs))
        print(json.dumps([spec.id for spec in specs]), flush=True)
        await asyncio.sleep(60)
asyncio.run(main())
"""


async def test_phones_outlive_a_killed_server_and_keep_their_ports(data_dir: Path) -> None:
    server = await asyncio.create_subprocess_exec(
        sys.executable, "-c", CONTROLLER, str(data_dir), LOOPBACK,
        stdout=asyncio.subprocess.PIPE, cwd=ROOT, start_new_session=True,
    )  # fmt: skip
    assert server.stdout is not None
    async with asyncio.timeout(20):
        ids = json.loads(await server.stdout.readline())
    before = await asyncio.to_thread(pids_below, data_dir)
    # The whole group, as a terminal or a service manager would do it.
    os.killpg(server.pid, signal.SIGKILL)
    await server.wait()
    async with opened(data_dir) as runtime:
        found = await runtime.list()
        assert {phone.id for phone in found} == set(ids)
        assert all(phone.status is PhoneStatus.RUNNING and phone.ports is not None for phone in found)
        assert await asyncio.to_thread(pids_below, data_dir) == before
        specs = [new_spec(id=phone.id, ports=phone.ports) for phone in found]
        assert all([await asyncio.to_thread(answers, spec) for spec in specs])
        await runtime.start(specs[0])
        assert await asyncio.to_thread(pids_below, data_dir) == before
        # Adopted ones are nobody's children here, and yet are heard of and ended.
        events = runtime.events()
        os.kill(before[0], signal.SIGKILL)
        async with asyncio.timeout(5):
            died = await anext(events)
        assert died in {spec.id for spec in specs}
        for spec in specs:
            await runtime.remove(spec.id)
    assert await asyncio.to_thread(pids_below, data_dir) == []


async def test_closing_leaves_the_phones_running(data_dir: Path) -> None:
    spec = new_spec()
    async with opened(data_dir) as runtime:
        await runtime.start(spec)
    assert await asyncio.to_thread(answers, spec)
    async with opened(data_dir) as runtime:
        assert await runtime.list() == [running(spec)]


async def test_a_process_that_only_has_the_number_of_a_phone_is_left_alone(data_dir: Path) -> None:
    spec = new_spec()
    async with opened(data_dir) as runtime:
        await runtime.create(spec)
    stranger = await asyncio.create_subprocess_exec("sleep", "60")
    try:
        announcement = json.dumps({"pid": stranger.pid, "id": spec.id})
        await asyncio.to_thread((data_dir / spec.id / "phone.json").write_text, announcement)
        async with opened(data_dir) as runtime:
            assert await runtime.list() == [stopped(spec)]
            await runtime.stop(spec.id)
            await runtime.remove(spec.id)
        assert stranger.returncode is None
        os.kill(stranger.pid, 0)
    finally:
        stranger.kill()
        await stranger.wait()


async def test_the_phones_of_another_installation_are_left_alone(data_dir: Path) -> None:
    spec = new_spec()
    async with opened(data_dir / "one") as one, opened(data_dir / "two") as other:
        await one.start(spec)
        assert await other.list() == []
        await other.remove(spec.id)
        assert await one.list() == [running(spec)]


async def test_an_adopted_phone_that_does_not_answer_is_ended(data_dir: Path) -> None:
    spec = new_spec("mute")
    async with opened(data_dir) as runtime:
        start = asyncio.create_task(runtime.start(spec))
        await until_processes(data_dir, 1)
        # Closed midway, as by a crash: the start below no longer holds the process.
        await runtime.close()
        async with opened(data_dir) as successor:
            assert await successor.list() == [stopped(spec)]
        start.cancel()
        with suppress(asyncio.CancelledError):
            await start
    assert await asyncio.to_thread(pids_below, data_dir) == []


async def test_a_port_of_another_program_is_named(runtime: SimulatedRuntime) -> None:
    spec = new_spec()
    with socket.socket() as foreign:
        foreign.bind((LOOPBACK, spec.ports.scrcpy))
        foreign.listen()
        with pytest.raises(PortTaken) as refusal:
            await runtime.start(spec)
    assert refusal.value.port == spec.ports.scrcpy
    assert await runtime.inspect(spec.id) == stopped(spec)
    await runtime.start(spec)


async def test_a_port_taken_while_the_phone_comes_up_is_named(
    runtime: SimulatedRuntime, data_dir: Path
) -> None:
    spec = new_spec("slow")
    start = asyncio.create_task(runtime.start(spec))
    await until_processes(data_dir, 1)
    with socket.socket() as foreign:
        foreign.bind((LOOPBACK, spec.ports.adb))
        foreign.listen()
        with pytest.raises(PortTaken) as refusal:
            await start
    assert refusal.value.port == spec.ports.adb
    assert await runtime.inspect(spec.id) == stopped(spec)


async def test_a_dying_phone_is_heard_of_and_can_be_started_again(
    runtime: SimulatedRuntime, data_dir: Path
) -> None:
    spec = new_spec()
    await runtime.start(spec)
    events = runtime.events()
    [pid] = await asyncio.to_thread(pids_below, data_dir)
    os.kill(pid, signal.SIGKILL)
    async with asyncio.timeout(5):
        assert await anext(events) == spec.id
    assert await runtime.inspect(spec.id) == stopped(spec)
    assert await asyncio.to_thread(is_reaped, pid)
    await runtime.start(spec)
    assert await runtime.inspect(spec.id) == running(spec)


async def test_a_phone_that_was_stopped_is_no_news(runtime: SimulatedRuntime) -> None:
    spec = new_spec()
    events = runtime.events()
    await runtime.start(spec)
    await runtime.stop(spec.id)
    await runtime.close()
    assert [event async for event in events] == []


async def test_a_phone_that_ignores_the_request_to_end_is_killed(data_dir: Path) -> None:
    spec = new_spec("stubborn")
    async with opened(data_dir, stop_grace_s=0.2) as runtime:
        await runtime.start(spec)
        began = time.monotonic()
        await runtime.stop(spec.id)
        assert 0.2 <= time.monotonic() - began < 3
        assert await runtime.inspect(spec.id) == stopped(spec)
    assert await asyncio.to_thread(pids_below, data_dir) == []


async def test_a_phone_that_ends_while_starting_says_so(runtime: SimulatedRuntime, data_dir: Path) -> None:
    spec = new_spec("stillborn")
    with pytest.raises(RuntimeFault, match="ended while it was starting"):
        await runtime.start(spec)
    log = await asyncio.to_thread((data_dir / spec.id / "phone.log").read_text)
    assert "no breath" in log
    assert await runtime.inspect(spec.id) == stopped(spec)


async def test_a_phone_that_never_listens_is_ended_at_its_deadline(data_dir: Path) -> None:
    spec = new_spec("mute")
    async with opened(data_dir, start_deadline_s=0.5) as runtime:
        with pytest.raises(RuntimeFault, match=r"did not come up within 0\.5 s"):
            await runtime.start(spec)
        assert await runtime.inspect(spec.id) == stopped(spec)
    assert await asyncio.to_thread(pids_below, data_dir) == []


async def test_a_cancelled_start_leaves_no_process(runtime: SimulatedRuntime, data_dir: Path) -> None:
    spec = new_spec("mute")
    start = asyncio.create_task(runtime.start(spec))
    await until_processes(data_dir, 1)
    start.cancel()
    with pytest.raises(asyncio.CancelledError):
        await start
    await until_processes(data_dir, 0)
    await runtime.start(replace(spec, name="phone"))
    assert len(await asyncio.to_thread(pids_below, data_dir)) == 1


async def test_a_phone_whose_directory_is_gone_is_found_and_can_be_removed(
    runtime: SimulatedRuntime, data_dir: Path
) -> None:
    spec = new_spec()
    await runtime.start(spec)
    await runtime.close()
    await asyncio.to_thread((data_dir / spec.id).rename, data_dir.parent / "elsewhere")
    async with opened(data_dir) as successor:
        assert await successor.list() == [running(spec)]
        await successor.remove(spec.id)
        assert await successor.list() == []


async def test_a_log_that_grew_too_long_starts_anew(runtime: SimulatedRuntime, data_dir: Path) -> None:
    spec = new_spec("noisy")
    log = data_dir / spec.id / "phone.log"
    await runtime.start(spec)
    await runtime.stop(spec.id)
    assert (await asyncio.to_thread(log.stat)).st_size == 2 << 20
    await runtime.list()
    assert (await asyncio.to_thread(log.stat)).st_size == 0


async def test_stats_tell_what_the_process_uses(runtime: SimulatedRuntime) -> None:
    spec = new_spec()
    with pytest.raises(RuntimeFault):
        await runtime.stats(spec.id)
    await runtime.start(spec)
    first = await runtime.stats(spec.id)
    assert 1 << 20 < first.memory_bytes < first.memory_limit_bytes == 512 << 20
    assert 0 < first.cpu_percent < 250
    await asyncio.sleep(0.3)
    # It does nothing now, so what counts is the interval and not the average since the start.
    assert (await runtime.stats(spec.id)).cpu_percent < 5


async def test_names_cannot_become_options_or_paths(runtime: SimulatedRuntime) -> None:
    spec = new_spec("--host=0.0.0.0 \0\n$(id)")
    await runtime.start(spec)
    assert await asyncio.to_thread(answers, spec)
    with pytest.raises(ValueError, match="no phone's id"):
        await runtime.remove("../elsewhere")


async def test_a_directory_that_cannot_be_used_is_told(tmp_path: Path) -> None:
    place = tmp_path / "file"
    await asyncio.to_thread(place.write_text, "")
    with pytest.raises(RuntimeUnavailable):
        await SimulatedRuntime(place / "phones").open()


async def test_a_simulated_phone_comes_up_is_adopted_and_goes_down(data_dir: Path) -> None:
    spec = new_spec('--name "it\'s mine"\n电话')
    runtime = SimulatedRuntime(data_dir)
    await runtime.open()
    await runtime.start(spec)
    assert await asyncio.to_thread(answers, spec)
    assert (await runtime.stats(spec.id)).memory_bytes < 60 << 20
    await runtime.close()
    successor = SimulatedRuntime(data_dir)
    await successor.open()
    assert await successor.list() == [running(spec)]
    began = time.monotonic()
    await successor.stop(spec.id)
    assert time.monotonic() - began < 4, "it was killed, not asked"
    await successor.remove(spec.id)
    assert await successor.list() == []
    await successor.close()


def test_it_is_a_runtime(tmp_path: Path) -> None:
    runtime: Runtime = SimulatedRuntime(tmp_path)
    assert runtime.name == "simulated"
