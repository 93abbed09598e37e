"""The main job, from a machine with nothing to a rented phone that outlives its server."""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any

import aiohttp
import pytest

from tests.apks import SAMPLES, build_apk
from tests.house import PASSWORD, port_ranges
from tests.process import ServerProcess, free_port, server_process
from tests.realadb import RealAdb

SHARED_APK = SAMPLES / "hello-world.apk"
PLAN = {
    "name": "by-the-second",
    "cpus": 1.0,
    "memory_mb": 512,
    "width": 720,
    "height": 1280,
    "dpi": 320,
    "price_per_hour": 36_000,
}
PACKAGE = "org.example.hello"


class Person:
    """Somebody with a session, a dashboard's socket and every notification it has shown."""

    def __init__(self, server: ServerProcess, http: aiohttp.ClientSession) -> None:
        self._server = server
        self._http = http
        self.headers: dict[str, str] = {}
        self.seen: list[dict[str, Any]] = []

    async def call(self, method: str, path: str, *, status: int, **more: Any) -> Any:
        """Call the API and insist on the status."""
        url = f"{self._server.url}/api/v1{path}"
        async with self._http.request(method, url, headers=self.headers, **more) as reply:
            body = await reply.read()
            assert reply.status == status, f"{method} {path}: {reply.status} {body[:500]!r}"
            return await reply.json() if reply.content_type.endswith("json") else body

    async def listen(self) -> None:
        """Read the notification stream from the last one seen, until cancelled."""
        since = self.seen[-1]["id"] if self.seen else 0
        url = f"{self._server.url}/api/v1/notifications/stream?since={since}"
        async with self._http.ws_connect(url, headers=self.headers) as stream:
            async for message in stream:
                frame = message.json()
                if frame["type"] == "notification":
                    self.seen.append(frame)

    async def told(self, topic: str, **wanted: object) -> dict[str, Any]:
        """The first notification of this topic whose data hold these values."""
        async with asyncio.timeout(30):
            while True:
                for frame in self.seen:
                    if frame["topic"] == topic and wanted.items() <= frame["data"].items():
                        return frame
                await asyncio.sleep(0.02)


@pytest.fixture
async def server() -> AsyncIterator[ServerProcess]:
    """A server on embedded defaults, ready."""
    sections: dict[str, dict[str, object]] = {
        "server": {"port": free_port()},
        "billing": {"welcome_credit": 100_000},
        "devices": {"runtime": "simulated", "plans": [PLAN], **port_ranges()},
    }
    async with server_process(sections) as started:
        await started.start()
        yield started


async def until(holds: Callable[[], Awaitable[bool]]) -> None:
    """Wait until it holds."""
    async with asyncio.timeout(30):
        while not await holds():
            await asyncio.sleep(0.1)


async def test_a_newcomer_rents_uses_pays_and_loses_nothing(
    server: ServerProcess, real_adb: RealAdb, tmp_path: Path
) -> None:
    async with aiohttp.ClientSession() as http:
        person = Person(server, http)
        session = await person.call(
            "POST", "/auth/register", status=201, json={"email": "new@example.com", "password": PASSWORD}
        )
        person.headers = {"Authorization": f"Bearer {session['access_token']}"}
        listening = asyncio.create_task(person.listen())

        device = await rents_a_phone(person)
        await touches_it(person, device["id"])
        await installs_an_app(person, device["id"])
        await tops_up(person)
        await uses_adb(real_adb, device["ports"]["adb"], tmp_path)
        await person.call("POST", f"/devices/{device['id']}/stop", status=202)
        await person.told("device.state", state="stopped")
        assert any(entry["kind"] == "device_time" for entry in await ledger(person))
        await person.call("POST", f"/devices/{device['id']}/start", status=202)

        async def runs() -> bool:
            found = await person.call("GET", f"/devices/{device['id']}", status=200)
            return bool(found["state"] == "running")

        await until(runs)
        before = await everything(person, device["id"])

        await server.kill()
        await asyncio.gather(listening, return_exceptions=True)
        await real_adb.connect(device["ports"]["adb"])  # the phone outlives its server
        await server.start()

        assert await everything(person, device["id"]) == before
        listening = asyncio.create_task(person.listen())
        await until(runs)
        await person.call("DELETE", f"/devices/{device['id']}", status=202)
        await person.told("device.state", state="deleting")
        await until(lambda: gone(person, device["id"]))
        listening.cancel()
        await asyncio.gather(listening, return_exceptions=True)
        ids = [frame["id"] for frame in person.seen]
        assert ids == list(range(1, len(ids) + 1)), "numbered without gaps, each once, also across the kill"


async def rents_a_phone(person: Person) -> dict[str, Any]:
    """Rent; it comes up and says so."""
    image = (await person.call("GET", "/device-images", status=200))["items"][0]["name"]
    plan = (await person.call("GET", "/device-plans", status=200))["items"][0]["name"]
    wish = {"name": "mine", "image": image, "plan": plan}
    device = await person.call("POST", "/devices", status=202, json=wish)
    assert device["state"] == "creating"
    await person.told("device.state", device_id=device["id"], state="running")
    device = await person.call("GET", f"/devices/{device['id']}", status=200)
    assert (device["state"], device["runtime"]) == ("running", "simulated")
    assert len(set(device["ports"].values())) == 3
    return dict(device)


async def touches_it(person: Person, device_id: str) -> None:
    """Look, tap, type: the picture changes; a command answers with its exit code."""
    pictures = {await person.call("GET", f"/devices/{device_id}/screenshot", status=200)}
    for gesture in (
        {"type": "swipe", "x": 300, "y": 900, "to_x": 300, "to_y": 500, "duration_ms": 100},
        {"type": "key", "key": "HOME"},
        {"type": "tap", "x": 359, "y": 1076},
        {"type": "text", "text": "hello 你好"},
    ):
        await person.call("POST", f"/devices/{device_id}/input", status=204, json=gesture)
    pictures.add(await person.call("GET", f"/devices/{device_id}/screenshot", status=200))
    assert len(pictures) == 2
    assert all(picture.startswith(b"\x89PNG") for picture in pictures)
    answer = await person.call(
        "POST", f"/devices/{device_id}/shell", status=200, json={"command": "echo out; echo err >&2; exit 7"}
    )
    assert answer == {"exit_code": 7, "stdout": "out\n", "stderr": "err\n"}


async def installs_an_app(person: Person, device_id: str) -> None:
    """Upload a real APK where there is one, install it, find it on the phone, launch it."""
    apk = SHARED_APK.read_bytes() if SHARED_APK.exists() else build_apk(package=PACKAGE, label="Hello")
    form = aiohttp.FormData()
    form.add_field("file", apk, filename="../../hello world.apk")
    app = await person.call("POST", "/apps", status=201, data=form)
    assert app["size_bytes"] == len(apk)
    icon = await person.call("GET", f"/apps/{app['id']}/icon", status=200)
    assert icon[:4] in {b"\x89PNG", b"<svg"}
    assert await person.call("GET", f"/apps/{app['id']}/download", status=200) == apk
    installation = await person.call(
        "POST", f"/devices/{device_id}/apps", status=202, json={"app_id": app["id"]}
    )
    assert installation["state"] == "queued"
    await person.told("app.installation", installation_id=installation["id"], state="installed")
    on_phone = await person.call("GET", f"/devices/{device_id}/apps", status=200)
    assert [(one["package"], one["version_code"]) for one in on_phone] == [
        (app["package"], app["version_code"])
    ]
    home = await person.call("GET", f"/devices/{device_id}/screenshot", status=200)
    await person.call("POST", f"/devices/{device_id}/apps/{app['package']}/launch", status=204)
    assert await person.call("GET", f"/devices/{device_id}/screenshot", status=200) != home


async def tops_up(person: Person) -> None:
    """Order, pay on the sandbox's page, see the balance move."""
    before = (await person.call("GET", "/billing/balance", status=200))["balance"]
    order = await person.call("POST", "/billing/orders", status=201, json={"amount": 5000})
    async with person._http.post(order["checkout_url"], data={"outcome": "pay"}) as page:
        assert page.status == 200
    await person.told("billing.order", order_id=order["id"], state="paid")
    await person.told("billing.balance", amount=5000)
    after = (await person.call("GET", "/billing/balance", status=200))["balance"]
    assert before + 5000 - 300 <= after <= before + 5000


async def uses_adb(adb: RealAdb, port: int, folder: Path) -> None:
    """The real adb against the phone's own port."""
    serial = await adb.connect(port)
    assert (await adb.run("-s", serial, "shell", "exit 3"))[0] == 3
    sent, back, apk = folder / "sent.bin", folder / "back.bin", folder / "app.apk"
    content = bytes(range(256)) * 4096
    sent.write_bytes(content)
    assert (await adb.run("-s", serial, "push", str(sent), "/sdcard/sent.bin"))[0] == 0
    assert (await adb.run("-s", serial, "pull", "/sdcard/sent.bin", str(back)))[0] == 0
    assert back.read_bytes() == content
    apk.write_bytes(build_apk(package="org.example.viaadb", label="Via adb"))
    code, out, error = await adb.run("-s", serial, "install", str(apk))
    assert (code, b"Success" in out) == (0, True), out + error
    code, out, _ = await adb.run("-s", serial, "uninstall", "org.example.viaadb")
    assert (code, out.strip()) == (0, b"Success")
    _, picture, _ = await adb.run("-s", serial, "exec-out", "screencap", "-p")
    assert picture.startswith(b"\x89PNG")
    code, log, _ = await adb.run("-s", serial, "logcat", "-d")
    assert (code, b"viaadb" in log) == (0, True)
    await adb.run("disconnect", serial)


async def ledger(person: Person) -> list[dict[str, Any]]:
    """The first hundred entries."""
    return list((await person.call("GET", "/billing/ledger?limit=100", status=200))["items"])


async def everything(person: Person, device_id: str) -> dict[str, Any]:
    """What a restart must not change, as far as a running phone lets it stand still."""
    device = await person.call("GET", f"/devices/{device_id}", status=200)
    entries = await ledger(person)
    stated = (await person.call("GET", "/notifications?limit=100", status=200))["items"]
    return {
        "device": {name: device[name] for name in ("id", "state", "ports", "started_at", "created_at")},
        "me": await person.call("GET", "/users/me", status=200),
        "apps": (await person.call("GET", "/apps", status=200))["items"],
        "orders": (await person.call("GET", "/billing/orders", status=200))["items"],
        "credits": [entry for entry in entries if entry["amount"] > 0],
        "notifications": [(one["id"], one["topic"], one["title"]) for one in stated],
        "on phone": await person.call("GET", f"/devices/{device_id}/apps", status=200),
    }


async def gone(person: Person, device_id: str) -> bool:
    """Whether a device answers 404."""
    async with person._http.get(
        f"{person._server.url}/api/v1/devices/{device_id}", headers=person.headers
    ) as reply:
        return reply.status == 404
