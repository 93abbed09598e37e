"""100 phones rented at once on the simulated runtime: until all run, and what they weigh.

`python -m benchmarks.phones [COUNT]`. Starts a server of its own, stops and removes everything after.
"""

import asyncio
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp

from tests.process import ServerProcess, server_process

DEADLINE_S = 300.0


def resident_mb(pid: int) -> float:
    """Resident memory of one process, in MB."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) / 1024
    return 0.0


def processes() -> dict[int, tuple[int, str]]:
    """Every process's parent and command line."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            parent = int((folder / "stat").read_text().rpartition(")")[2].split()[1])
            found[int(folder.name)] = parent, (folder / "cmdline").read_text().replace("\0", " ")
        except OSError:
            continue
    return found


def weights(server: ServerProcess) -> dict[str, list[float]]:
    """Resident memory in MB by what the processes are."""
    groups: dict[str, list[float]] = {
        "server": [resident_mb(server.pid)],
        "postgres": [],
        "s3": [],
        "phone": [],
    }
    everyone = processes()
    children = {pid for pid, (parent, _) in everyone.items() if parent == server.pid}
    for pid, (parent, command) in everyone.items():
        if "phones.simulator" in command and str(server.data_dir) in command:
            groups["phone"].append(resident_mb(pid))
        elif pid in children and "weed" in command:
            groups["s3"].append(resident_mb(pid))
        elif (pid in children and "postgres" in command) or (parent in children and "postgres" in command):
            groups["postgres"].append(resident_mb(pid))
    return groups


async def rent(http: aiohttp.ClientSession, url: str, choice: dict[str, str], number: int) -> None:
    """Ask for one phone."""
    async with http.post(f"{url}/devices", json={"name": f"phone {number}", **choice}) as reply:
        assert reply.status == 202, await reply.text()


async def states(http: aiohttp.ClientSession, url: str) -> list[dict[str, Any]]:
    """All phones."""
    async with http.get(f"{url}/devices?limit=100") as reply:
        return list((await reply.json())["items"])


async def measure(count: int) -> None:
    """Rent `count` phones at once and report."""
    sections: dict[str, dict[str, object]] = {
        "server": {"port": 0},
        "billing": {"welcome_credit": 10_000_000},
        "devices": {"runtime": "simulated", "max_per_user": count},
    }
    async with server_process(sections) as server, aiohttp.ClientSession() as anyone:
        began = time.monotonic()
        await server.start()
        print(f"first start          {time.monotonic() - began:6.2f} s")
        await server.stop()
        began = time.monotonic()
        await server.start()
        print(f"second start         {time.monotonic() - began:6.2f} s")
        url = f"{server.url}/api/v1"
        body = {"email": "many@example.com", "password": "correct horse battery"}
        async with anyone.post(f"{url}/auth/register", json=body) as reply:
            token = (await reply.json())["access_token"]
        async with aiohttp.ClientSession(headers={"Authorization": f"Bearer {token}"}) as http:
            choice = {}
            for field in ("image", "plan"):
                async with http.get(f"{url}/device-{field}s") as reply:
                    choice[field] = (await reply.json())["items"][0]["name"]
            began = time.monotonic()
            await rent(http, url, choice, 0)
            while (await states(http, url))[0]["state"] != "running":
                await asyncio.sleep(0.01)
            print(f"POST to running      {time.monotonic() - began:6.2f} s (one phone)")
            before = resident_mb(server.pid)
            began = time.monotonic()
            await asyncio.gather(*(rent(http, url, choice, number) for number in range(1, count)))
            print(f"{count - 1} answered 202 in  {time.monotonic() - began:6.2f} s")
            async with asyncio.timeout(DEADLINE_S):
                while any(phone["state"] == "creating" for phone in await states(http, url)):
                    await asyncio.sleep(0.1)
            print(f"all settled after    {time.monotonic() - began:6.2f} s")
            phones = await states(http, url)
            running = [phone for phone in phones if phone["state"] == "running"]
            ports = [port for phone in running for port in phone["ports"].values()]
            print(f"running              {len(running):6} of {count}, {len(set(ports))} distinct ports")
        for name, found in weights(server).items():
            mean = sum(found) / max(1, len(found))
            print(f"{name:<10} resident  {sum(found):8.1f} MB in {len(found)} processes, {mean:.1f} MB each")
        print(f"server before        {before:8.1f} MB")


if __name__ == "__main__":
    asyncio.run(measure(int(sys.argv[1]) if len(sys.argv) > 1 else 100))
