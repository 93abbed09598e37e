"""What containers use: one stream of statistics a phone, open for as long as somebody asks."""

import asyncio
import time
from collections.abc import Mapping
from typing import Any, Final

from phones.engine import Engine, NotThere
from phones.runtime import PhoneStats, RuntimeFault, RuntimeUnavailable

IDLE_S: Final = 30.0
"""How long a stream stays open after it was last asked."""
FIRST_DEADLINE_S: Final = 4.0
"""An engine sends a sample a second; the second one is the first that knows the use of CPU."""
STALE_S: Final = 10.0


class _Meter:
    """One phone's stream."""

    def __init__(self, engine: Engine, name: str) -> None:
        self._engine = engine
        self._name = name
        self.asked_at = time.monotonic()
        self._sampled_at = 0.0
        self._latest: PhoneStats | None = None
        self._arrived = asyncio.Event()
        self.task = asyncio.create_task(self._stream())

    async def read(self) -> PhoneStats:
        """The latest sample, waiting for the first. Raises RuntimeFault, RuntimeUnavailable."""
        self.asked_at = time.monotonic()
        if self._latest is None or time.monotonic() - self._sampled_at > STALE_S:
            self._arrived.clear()
            arriving = asyncio.ensure_future(self._arrived.wait())
            try:
                await asyncio.wait(
                    {arriving, self.task},
                    timeout=FIRST_DEADLINE_S,
                    return_when=asyncio.FIRST_COMPLETED,
                )
            finally:
                arriving.cancel()
            if not self._arrived.is_set():
                raise self._silence()
        assert self._latest is not None
        return self._latest

    def _silence(self) -> RuntimeFault:
        if self.task.done() and not self.task.cancelled():
            fault = self.task.exception()
            if isinstance(fault, RuntimeFault) and not isinstance(fault, NotThere):
                return fault
            return RuntimeFault("the phone does not run")
        return RuntimeUnavailable("the Docker engine sent no statistics in time")

    async def _stream(self) -> None:
        samples = self._engine.stats(self._name)
        async for sample in samples:
            if time.monotonic() - self.asked_at > IDLE_S:
                return
            if not sample.get("memory_stats", {}).get("usage"):
                return  # the container is down: an engine goes on with empty samples
            if "system_cpu_usage" in sample["precpu_stats"]:
                self._latest, self._sampled_at = as_stats(sample), time.monotonic()
                self._arrived.set()


class Meters:
    """The open streams. Close it before the engine."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._meters: dict[str, _Meter] = {}

    async def read(self, phone_id: str, name: str) -> PhoneStats:
        """What the phone in container `name` uses now. Raises RuntimeFault where it does not run."""
        meter = self._meters.get(phone_id)
        if meter is None or meter.task.done():
            meter = self._meters[phone_id] = _Meter(self._engine, name)
            meter.task.add_done_callback(lambda task: self._ended(phone_id, task))
        return await meter.read()

    def drop(self, phone_id: str) -> None:
        """Close a phone's stream."""
        if meter := self._meters.pop(phone_id, None):
            meter.task.cancel()

    async def close(self) -> None:
        """Close every stream."""
        tasks = [meter.task for meter in self._meters.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self._meters.clear()

    def _ended(self, phone_id: str, task: asyncio.Task[None]) -> None:
        if not task.cancelled():
            task.exception()  # told to whoever asked
        meter = self._meters.get(phone_id)
        if meter is not None and meter.task is task:
            del self._meters[phone_id]


def as_stats(sample: Mapping[str, Any]) -> PhoneStats:
    """An engine's sample in our terms; 100 percent is one whole core.

    Memory is what cannot be given back at once: page cache that nobody uses is left out, as `docker stats`
    does. Its field differs between the two versions of cgroups.
    """
    cpu, before = sample["cpu_stats"], sample["precpu_stats"]
    used = cpu["cpu_usage"]["total_usage"] - before["cpu_usage"]["total_usage"]
    passed = cpu["system_cpu_usage"] - before["system_cpu_usage"]
    cores = cpu.get("online_cpus") or len(cpu["cpu_usage"].get("percpu_usage") or [0])
    memory = sample["memory_stats"]
    detail = memory.get("stats", {})
    cache = detail.get("total_inactive_file", detail.get("inactive_file", 0))
    networks = (sample.get("networks") or {}).values()
    return PhoneStats(
        cpu_percent=100 * cores * used / passed if passed > 0 else 0.0,
        memory_bytes=max(memory["usage"] - cache, 0),
        memory_limit_bytes=memory["limit"],
        rx_bytes=sum(network["rx_bytes"] for network in networks),
        tx_bytes=sum(network["tx_bytes"] for network in networks),
    )
