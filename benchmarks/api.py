"""How fast the server answers, and what that costs: `python -m benchmarks.api [seconds]`, or `make bench`.

Starts a real server on embedded defaults in a temporary folder, asks it over loopback from another
process, prints a table and stops what it started. Each row runs for the given seconds (default 5).
"""

import argparse
import asyncio
import hashlib
import hmac
import json
import os
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import aiohttp

from benchmarks.load import Job, Result, drive_apart, percentile
from tests.house import PASSWORD
from tests.process import ROOT, ServerProcess, server_process

CONNECTIONS = 64
DEVICES = 20
PAYERS = 16
ORDERS_PER_SECOND = 1500
NOTIFICATIONS = 500
SECRET = "a secret of the benchmark"
WARM_UP_S = 1.0
API = "/api/v1"


class Bench:
    """A running server, and how it is asked."""

    def __init__(self, server: ServerProcess, http: aiohttp.ClientSession, seconds: float) -> None:
        self._server = server
        self._http = http
        self._seconds = seconds

    async def call(self, method: str, path: str, token: str = "", body: object = None) -> Any:
        """Call the API and insist that it works."""
        headers = {"Authorization": f"Bearer {token}"} if token else {}
        url = f"{self._server.url}{API}{path}"
        async with self._http.request(method, url, headers=headers, json=body) as reply:
            answer = await reply.read()
            if reply.status >= 400:
                raise RuntimeError(f"{method} {path}: {reply.status} {answer[:300]!r}")
            return json.loads(answer) if answer else None

    async def sign_up(self) -> tuple[str, str]:
        """A new account's token and e-mail address."""
        email = f"{uuid4().hex}@example.com"
        session = await self.call("POST", "/auth/register", body={"email": email, "password": PASSWORD})
        return session["access_token"], email

    def request(self, method: str, path: str, headers: Mapping[str, str], body: str = "") -> str:
        """A whole HTTP request."""
        lines = [f"{method} {API}{path} HTTP/1.1", f"Host: {urlsplit(self._server.url).netloc}"]
        lines += [f"{name}: {value}" for name, value in headers.items()]
        if body:
            lines += ["Content-Type: application/json", f"Content-Length: {len(body.encode())}"]
        return "\r\n".join([*lines, "", body])

    async def measure(
        self, title: str, requests: list[str], *, once: bool = False, status: str = "200"
    ) -> None:
        """Send the requests over and over, or each once, and print a row."""
        if not once:
            await self._drive(requests, WARM_UP_S, once=False)
        before_s = self.cpu_s()
        result = await self._drive(requests, self._seconds, once=once)
        cpu_us = (self.cpu_s() - before_s) * 1e6 / max(result.answers, 1)
        row(title, f"{result.rate:,.0f}", result.p50_ms, result.p99_ms, f"{cpu_us:,.0f}")
        if set(result.statuses) != {status}:
            raise RuntimeError(f"{title}: unexpected answers: {result.statuses}")

    async def _drive(self, requests: list[str], seconds: float, *, once: bool) -> Result:
        parts = urlsplit(self._server.url)
        assert parts.hostname
        assert parts.port
        return await drive_apart(Job(parts.hostname, parts.port, CONNECTIONS, seconds, requests, once))

    def cpu_s(self) -> float:
        """The processor time the server has taken."""
        fields = Path(f"/proc/{self._server.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def resident_mb(self) -> float:
        """The memory the server occupies."""
        status = Path(f"/proc/{self._server.pid}/status").read_text()
        return int(status.partition("VmRSS:")[2].split()[0]) / 1024

    async def rent_phones(self, token: str) -> None:
        """Let somebody have twenty stopped phones."""
        image = (await self.call("GET", "/device-images", token))["items"][0]["name"]
        plan = (await self.call("GET", "/device-plans", token))["items"][0]["name"]
        for number in range(DEVICES):
            body = {"name": f"phone {number}", "image": image, "plan": plan}
            await self.call("POST", "/devices", token, body)
        for device in await self._devices_in("running", token):
            await self.call("POST", f"/devices/{device['id']}/stop", token)
        await self._devices_in("stopped", token)

    async def _devices_in(self, state: str, token: str) -> list[dict[str, Any]]:
        async with asyncio.timeout(120):
            while True:
                devices = (await self.call("GET", "/devices?limit=100", token))["items"]
                if all(device["state"] == state for device in devices):
                    return list(devices)
                await asyncio.sleep(0.2)

    async def order(self, tokens: list[str]) -> list[str]:
        """Make orders, measuring that too; a signed callback for each."""
        count = int(ORDERS_PER_SECOND * self._seconds)
        wish = json.dumps({"amount": 500})
        orders = [
            self.request("POST", "/billing/orders", {"Authorization": f"Bearer {token}"}, wish)
            for token in tokens
        ]
        await self.measure(
            "POST /billing/orders", (orders * (count // len(orders) + 1))[:count], once=True, status="201"
        )
        callbacks = []
        for token in tokens:
            cursor: str | None = ""
            while cursor is not None:
                page = await self.call("GET", f"/billing/orders?limit=100{cursor}", token)
                callbacks += [self._callback(order) for order in page["items"]]
                cursor = f"&cursor={page['next_cursor']}" if page["next_cursor"] else None
        return callbacks

    def _callback(self, order: Mapping[str, Any]) -> str:
        body = json.dumps(
            {
                "event_id": uuid4().hex,
                "order_number": order["number"],
                "amount": order["amount"],
                "currency": order["currency"],
                "status": "succeeded",
                "occurred_at": order["created_at"],
            }
        )
        at = str(int(time.time()))
        digest = hmac.new(SECRET.encode(), f"{at}.{body}".encode(), hashlib.sha256).hexdigest()
        return self.request("POST", "/billing/payments/sandbox", {"X-Signature": f"t={at},v1={digest}"}, body)

    async def measure_notifications(self, token: str, admin_token: str) -> None:
        """From an administrator's request to the frame on the user's WebSocket, one after the other."""
        user_id = (await self.call("GET", "/users/me", token))["id"]
        message = {"user_id": user_id, "topic": "system", "title": "Hello", "body": "World"}
        latencies_s: list[float] = []
        url = f"{self._server.url}{API}/notifications/stream"
        async with self._http.ws_connect(url, headers={"Authorization": f"Bearer {token}"}) as stream:
            await stream.receive_json()
            before_s = self.cpu_s()
            ends_at = time.perf_counter() + self._seconds
            while len(latencies_s) < NOTIFICATIONS and time.perf_counter() < ends_at:
                sent_at = time.perf_counter()
                sending = asyncio.create_task(self.call("POST", "/notifications", admin_token, message))
                async with asyncio.timeout(10):
                    await stream.receive_json()
                    latencies_s.append(time.perf_counter() - sent_at)
                    await sending
            cpu_us = (self.cpu_s() - before_s) * 1e6 / len(latencies_s)
        p50_ms, p99_ms = (percentile(latencies_s, share) * 1000 for share in (0.5, 0.99))
        row("one user's notification", "-", p50_ms, p99_ms, f"{cpu_us:,.0f}")

    async def administrator(self) -> str:
        """The token of a new administrator."""
        token, email = await self.sign_up()
        process = await asyncio.create_subprocess_exec(
            sys.executable,
            *("-m", "server", "create-admin", "--config", str(self._server.folder / "config.toml")),
            *("--email", email),
            cwd=ROOT,
            stdout=asyncio.subprocess.DEVNULL,
        )
        async with asyncio.timeout(30):
            if await process.wait():
                raise RuntimeError("create-admin failed")
            while (await self.call("GET", "/users/me", token))["role"] != "admin":
                await asyncio.sleep(0.2)
        return token


def row(title: str, rate: str, p50_ms: float, p99_ms: float, cpu_us: str) -> None:
    """Print a line of the table."""
    print(f"{title:<28}{rate:>10}{p50_ms:>10.2f}{p99_ms:>10.2f}{cpu_us:>12}", flush=True)


async def main(seconds: float) -> None:
    """Measure everything once."""
    sections: dict[str, dict[str, object]] = {
        "server": {"port": 0},
        "devices": {"runtime": "simulated", "max_per_user": DEVICES},
    }
    async with (
        server_process(sections, CLOUDPHONE_BILLING__PROVIDERS__SANDBOX__SECRET=SECRET) as server,
        aiohttp.ClientSession() as http,
    ):
        started = time.perf_counter()
        await server.start()
        print(f"ready after {time.perf_counter() - started:.1f} s (first start: embedded database made)")
        bench = Bench(server, http, seconds)
        token, _ = await bench.sign_up()
        payers = [(await bench.sign_up())[0] for _ in range(PAYERS)]
        admin_token = await bench.administrator()
        await bench.rent_phones(token)
        print(f"{CONNECTIONS} connections, {seconds:g} s each; server {bench.resident_mb():.0f} MB\n")
        print(f"{'':<28}{'answers/s':>10}{'p50 ms':>10}{'p99 ms':>10}{'CPU us each':>12}")
        signed = {"Authorization": f"Bearer {token}"}
        await bench.measure("GET /users/me", [bench.request("GET", "/users/me", signed)])
        await bench.measure(
            f"GET /devices ({DEVICES} rows)", [bench.request("GET", f"/devices?limit={DEVICES}", signed)]
        )
        callbacks = await bench.order(payers)
        await bench.measure("payment callback", callbacks, once=True)
        await bench.measure_notifications(token, admin_token)
        print(f"\nserver afterwards: {bench.resident_mb():.0f} MB resident")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Measure the API of a server of one's own.")
    parser.add_argument("seconds", nargs="?", type=float, default=5.0, help="how long each row runs")
    asyncio.run(main(parser.parse_args().seconds))
