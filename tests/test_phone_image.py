"""The container image of the simulated phone, and the engines that the tests run it on."""

import asyncio
import io
import json
import os
import time
import uuid
from collections.abc import AsyncIterator
from pathlib import Path

import aiohttp
import pytest
from PIL import Image

from phones import image
from tests.apks import build_apk
from tests.engine import Engine, PrivateEngine, Proxy, StartEngine, docker
from tests.realadb import RealAdb
from tests.renting import until

HARDENED = (
    "--init",  # a first process that passes signals on, as the runtime has it
    *("--cap-drop", "ALL", "--security-opt", "no-new-privileges"),
    *("--read-only", "--tmpfs", "/tmp"),
    *("--publish", "127.0.0.1::5555"),
)
OPTIONS = ("--data-dir", "/data", "--host", "0.0.0.0", "--adb-port", "5555")
FIREWALL = ("--cap-drop", "ALL", "--cap-add", "NET_ADMIN", "--cap-add", "NET_RAW", "--user", "0")
PACKAGE = "com.example.contained"


@pytest.fixture
async def name(engine: Engine) -> AsyncIterator[str]:
    """A name for a container and its volume on the machine's engine; both are removed."""
    name = f"test-phone-{uuid.uuid4().hex[:12]}"
    yield name
    await docker("rm", "--force", name, url=engine.url)
    await docker("volume", "rm", "--force", name, url=engine.url)


async def run_phone(engine: Engine | PrivateEngine, name: str, *options: str) -> None:
    """Start a phone as the runtime does, with what must survive in a volume of its name."""
    await docker(
        *("run", "--detach", "--name", name, "--volume", f"{name}:/data", *HARDENED, *options),
        *(engine.image, *OPTIONS, "--id", str(uuid.uuid4())),
        url=engine.url,
    )


async def port_of(engine: Engine | PrivateEngine, name: str) -> int:
    """Where its adb is published now; another one after each start."""
    return int((await docker("port", name, "5555/tcp", url=engine.url)).rpartition(":")[2])


async def connected(adb: RealAdb, engine: Engine | PrivateEngine, name: str) -> str:
    """The phone's serial, once adb gets through to it."""
    port = await port_of(engine, name)
    async with asyncio.timeout(20):
        while True:
            _, out, _ = await adb.run("connect", f"127.0.0.1:{port}")
            if out.startswith((b"connected to", b"already connected")):
                return f"127.0.0.1:{port}"
            await asyncio.sleep(0.05)


async def shell(adb: RealAdb, serial: str, command: str) -> str:
    """What a command on the phone prints."""
    code, out, err = await adb.run("-s", serial, "shell", command)
    assert code == 0, (out, err)
    return out.decode().strip()


async def installed(adb: RealAdb, serial: str) -> str:
    """The packages that somebody has installed."""
    return await shell(adb, serial, "pm list packages -3")


async def test_a_phone_in_a_container_keeps_its_apps_through_restarts_and_kills(
    engine: Engine, name: str, real_adb: RealAdb, tmp_path: Path
) -> None:
    await run_phone(engine, name)
    serial = await connected(real_adb, engine, name)
    assert await shell(real_adb, serial, "getprop sys.boot_completed") == "1"
    assert await shell(real_adb, serial, "getprop ro.cloudphone.simulated") == "1"
    (tmp_path / "app.apk").write_bytes(build_apk(PACKAGE, "Contained"))
    code, out, err = await real_adb.run("-s", serial, "install", str(tmp_path / "app.apk"))
    assert (code, out[-8:]) == (0, b"Success\n"), err
    code, picture, _ = await real_adb.run("-s", serial, "exec-out", "screencap", "-p")
    assert code == 0
    assert Image.open(io.BytesIO(picture)).format == "PNG"

    await docker("restart", name, url=engine.url)
    serial = await connected(real_adb, engine, name)
    assert await installed(real_adb, serial) == f"package:{PACKAGE}"

    await docker("kill", name, url=engine.url)
    await docker("start", name, url=engine.url)
    serial = await connected(real_adb, engine, name)
    assert await installed(real_adb, serial) == f"package:{PACKAGE}"


async def test_a_phone_in_a_container_is_nobody_in_particular(engine: Engine, name: str) -> None:
    await run_phone(engine, name)
    inspected = json.loads(await docker("inspect", name, url=engine.url))[0]
    assert inspected["Config"]["User"] == f"{image.USER_ID}:{image.USER_ID}"
    assert inspected["Config"]["Labels"] == {"cloudphone.phone": "simulated"}
    status = await docker(
        *("exec", name, "/usr/bin/python3", "-S", "-c", "print(open('/proc/1/status').read())"),
        url=engine.url,
    )
    lines = dict(line.split(":\t", 1) for line in status.splitlines() if ":\t" in line)
    assert set(lines["Uid"].split()) == {str(image.USER_ID)}
    assert int(lines["CapEff"], 16) == 0


@pytest.mark.parametrize("after_s", [0, 0.1, 1])
async def test_a_phone_in_a_container_stops_at_once_however_young(
    engine: Engine, name: str, after_s: float
) -> None:
    await run_phone(engine, name)

    async def is_born() -> bool:
        # The kernel drops what is sent to a first process that does not listen yet; this one listens before
        # it has a child.
        _, *processes = (await docker("top", name, url=engine.url)).splitlines()
        return len(processes) == 2

    await until(is_born)
    await asyncio.sleep(after_s)
    began = time.monotonic()
    await docker("stop", "--time", "10", name, url=engine.url)
    assert time.monotonic() - began < 3
    code = await docker("inspect", "--format", "{{.State.ExitCode}}", name, url=engine.url)
    assert code in {"0", "143"}, "it closed what it had open, or had nothing open yet"


async def test_a_container_of_the_image_sees_the_firewall(engine: Engine) -> None:
    ran = ("run", "--rm", "--network", "none", *FIREWALL, "--entrypoint")
    for program in ("iptables", "ip6tables"):
        rules = await docker(*ran, program, engine.image, "-w", "-S", "INPUT", url=engine.url)
        assert rules == "-P INPUT ACCEPT"
        matched = ("-A", "INPUT", "-p", "tcp", "--dport", "5555", "-m", "conntrack", "--ctstate", "NEW")
        await docker(*ran, program, engine.image, "-w", *matched, "-j", "DROP", url=engine.url)


async def test_building_again_replaces_an_image_that_nothing_uses(engine: Engine) -> None:
    reference = f"cloudphone/simulated-phone:again-{uuid.uuid4().hex[:8]}"
    told: list[str] = []
    try:
        await image.build(engine.url, reference, told.append)
        first = await docker("image", "inspect", "--format", "{{.Id}}", reference, url=engine.url)
        await image.build(engine.url, reference, told.append)
        second = await docker("image", "inspect", "--format", "{{.Id}}", reference, url=engine.url)
        assert first != second
        with pytest.raises(RuntimeError, match="No such image"):
            await docker("image", "inspect", first, url=engine.url)
    finally:
        await docker("image", "rm", reference, url=engine.url)
    assert f"{reference} is ready" in told[-1]


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        (
            "unix:///nowhere/engine.sock",
            "no Docker engine answers at unix:///nowhere/engine.sock: No such file",
        ),
        ("tcp://127.0.0.1:1", "no Docker engine answers at tcp://127.0.0.1:1: "),
        ("ssh://somewhere", "is no engine this can speak to"),
    ],
)
async def test_an_absent_engine_is_said_in_one_line(url: str, reason: str) -> None:
    with pytest.raises(image.ImageFault, match=reason) as raised:
        await image.build(url, image.DEFAULT_REFERENCE, lambda line: None)
    assert "\n" not in str(raised.value)


async def test_a_name_that_the_engine_refuses_is_said_in_one_line(engine: Engine) -> None:
    with pytest.raises(image.ImageFault, match="the engine refuses the image: invalid reference format"):
        await image.build(engine.url, "Capitals/forbidden", lambda line: None)


# --- The engines of the tests themselves --------------------------------------------------------


async def test_a_killed_engines_phone_goes_on_and_is_found_again(
    private_engine: StartEngine, real_adb: RealAdb
) -> None:
    engine = await private_engine(live_restore=True)
    await engine.load_image()
    await docker("network", "create", "phones", url=engine.url)
    await run_phone(engine, "phone", "--network", "phones")
    assert (await docker("port", "phone", url=engine.url)).startswith("5555/tcp -> 127.0.0.1:")
    inspected = ("inspect", "--format", "{{.Id}} {{.State.StartedAt}} {{.State.Running}}", "phone")
    before = await docker(*inspected, url=engine.url)
    serial = await connected(real_adb, engine, "phone")

    await engine.kill()
    with pytest.raises(RuntimeError, match="Cannot connect to the Docker daemon"):
        await docker("ps", url=engine.url)
    assert await shell(real_adb, serial, "echo still here") == "still here"
    await real_adb.run("disconnect", serial)
    assert await real_adb.connect(int(serial.rpartition(":")[2])) == serial

    await engine.start()
    assert await docker(*inspected, url=engine.url) == before
    assert await connected(real_adb, engine, "phone") == serial
    await docker("rm", "--force", "phone", url=engine.url)
    _, refused, _ = await real_adb.run("connect", serial)
    assert b"failed to connect" in refused or b"refused" in refused


@pytest.mark.parametrize("live_restore", [False, True])
async def test_an_engine_of_ones_own_leaves_the_machines_network_alone(
    private_engine: StartEngine, live_restore: bool
) -> None:
    def docker0() -> str:
        # A number that no later interface of the name would have.
        number = Path("/sys/class/net/docker0/ifindex")
        return number.read_text() if number.exists() else "none"

    before = docker0()
    engine = await private_engine(live_restore=live_restore)
    for end in (engine.kill, engine.stop):
        await end()
        await engine.start()
        assert os.stat(f"/proc/{engine.pid}/ns/net") != os.stat("/proc/self/ns/net")
        assert docker0() == before


async def test_a_paused_engine_does_not_answer_until_it_is_resumed(private_engine: StartEngine) -> None:
    engine = await private_engine()
    engine.pause()
    with pytest.raises(TimeoutError):
        await docker("ps", url=engine.url, deadline_s=1)
    engine.resume()
    assert await docker("ps", "--quiet", url=engine.url) == ""


def client(proxy: Proxy) -> aiohttp.ClientSession:
    """Somebody who speaks to the engine through the proxy."""
    return aiohttp.ClientSession(connector=aiohttp.UnixConnector(proxy.url.removeprefix("unix://")))


async def ping(proxy: Proxy) -> str:
    """Ask the engine behind the proxy whether it is there, on a connection of its own."""
    async with client(proxy) as session, session.get("http://e/_ping") as answer:
        return await answer.text()


async def test_a_proxy_passes_a_whole_stream_on(engine: Engine) -> None:
    async with Proxy.started(engine.url) as proxy:
        assert await ping(proxy) == "OK"
        ran = ("run", "--rm", "--entrypoint", "/usr/bin/python3", engine.image, "-S", "-c")
        assert len(await docker(*ran, "print('x' * 300_000)", url=proxy.url)) == 300_000


async def test_a_hanging_proxy_is_silent_until_it_heals(engine: Engine) -> None:
    async with Proxy.started(engine.url) as proxy, client(proxy) as session:
        async with session.get("http://e/events") as events:
            assert events.status == 200
            proxy.hang()
            for waiting in (ping(proxy), events.content.readany()):
                with pytest.raises(TimeoutError):
                    async with asyncio.timeout(0.5):
                        await waiting
        await proxy.heal()
        assert await ping(proxy) == "OK"


async def test_a_request_swallowed_by_a_proxy_never_arrives(engine: Engine) -> None:
    volume = f"test-proxy-{uuid.uuid4().hex[:12]}"
    async with Proxy.started(engine.url) as proxy, client(proxy) as session:
        proxy.hang()
        creating = asyncio.create_task(session.post("http://e/volumes/create", json={"Name": volume}))
        await asyncio.sleep(0.3)
        assert not creating.done()
        await proxy.heal()
        with pytest.raises(aiohttp.ClientError):
            async with asyncio.timeout(10):
                await creating
    assert await docker("volume", "ls", "--quiet", "--filter", f"name={volume}", url=engine.url) == ""


async def test_a_refusing_proxy_ends_streams_and_takes_none(engine: Engine) -> None:
    async with Proxy.started(engine.url) as proxy, client(proxy) as session:
        async with session.get("http://e/events") as events:
            await proxy.refuse()
            with pytest.raises(aiohttp.ClientPayloadError):
                async with asyncio.timeout(5):
                    await events.content.read()
        with pytest.raises(aiohttp.ClientConnectorError):
            await ping(proxy)
        await proxy.heal()
        assert await ping(proxy) == "OK"
