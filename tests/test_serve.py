"""The server as a process: how it starts, refuses to, and ends."""

import asyncio
import signal
import socket

import aiohttp

from tests.house import port_ranges
from tests.process import ServerProcess, server_process

SECTIONS: dict[str, dict[str, object]] = {
    "server": {"port": 0, "shutdown_grace_s": 5},
    "devices": {"runtime": "simulated", **port_ranges()},
}


async def said(server: ServerProcess) -> list[str]:
    """What it wrote for a person, without the log."""
    text = await asyncio.to_thread(server.log.read_text)
    return [line for line in text.splitlines() if not line.startswith("{")]


async def test_a_stop_is_clean_and_tells_open_sockets() -> None:
    async with server_process(SECTIONS) as server, aiohttp.ClientSession() as http:
        await server.start()
        assert "create-admin" in server.greeting
        body = {"email": "a@example.com", "password": "correct horse battery"}
        async with http.post(f"{server.url}/api/v1/auth/register", json=body) as reply:
            token = (await reply.json())["access_token"]
        headers = {"Authorization": f"Bearer {token}"}
        async with http.ws_connect(f"{server.url}/api/v1/notifications/stream", headers=headers) as stream:
            assert (await stream.receive_json())["type"] == "hello"
            stopping = asyncio.create_task(server.stop())
            while (message := await stream.receive(timeout=10)).type is not aiohttp.WSMsgType.CLOSE:
                assert message.type is aiohttp.WSMsgType.TEXT
            assert message.data == aiohttp.WSCloseCode.GOING_AWAY
        assert await stopping == 0
        assert await said(server) == []


async def test_a_second_server_names_the_first_and_leaves_it_alone() -> None:
    async with server_process(SECTIONS) as first, aiohttp.ClientSession() as http:
        await first.start()
        second = ServerProcess(first.folder)
        second.log = first.folder / "second.log"
        await second.launch()
        assert await second.wait() == 1
        (line,) = await said(second)
        assert str(first.pid) in line
        async with http.get(f"{first.url}/readyz") as ready:
            assert ready.status == 200


async def test_a_port_in_use_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as foreign:
        port = foreign.getsockname()[1]
        async with server_process({**SECTIONS, "server": {"port": port}}) as server:
            await server.launch()
            assert await server.wait() == 1
            (line,) = await said(server)
            assert str(port) in line
            assert "in use" in line


async def test_a_second_signal_ends_at_once() -> None:
    async with server_process({**SECTIONS, "server": {"port": 0, "shutdown_grace_s": 60}}) as server:
        await server.start()
        assert server._process is not None
        server._process.send_signal(signal.SIGTERM)
        server._process.send_signal(signal.SIGTERM)
        assert await server.wait() in {0, 1}


async def test_doctor_and_create_admin_work_beside_a_server_and_without_one() -> None:
    async with server_process(SECTIONS) as server:
        report = await output(server, "doctor")
        assert {line.split()[1].rstrip(":") for line in report} >= {"disk", "database", "storage", "runtime"}
        assert "is an administrator" in (await output(server, "create-admin", "--email", "a@example.com"))[0]
        await server.start()
        beside = ServerProcess(server.folder)
        assert str(server.pid) in (await output(beside, "doctor"))[-1]
        assert "is an administrator" in (await output(beside, "create-admin", "--email", "b@example.com"))[0]


async def output(server: ServerProcess, *arguments: str) -> list[str]:
    """What a command that succeeds prints."""
    await server.launch(*arguments)
    assert server._process is not None
    printed, _ = await server._process.communicate()
    assert server._process.returncode == 0, (printed, await said(server))
    return printed.decode().splitlines()
