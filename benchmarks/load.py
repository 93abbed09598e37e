"""A load generator in a process of its own: keep-alive connections, each with one request under way.

`python -m benchmarks.load` reads a `Job` as JSON from standard input and prints a `Result` as JSON.
"""

import asyncio
import json
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import cycle
from typing import cast

import uvloop

GRACE_S = 30.0


@dataclass(frozen=True)
class Job:
    """What to send: each of `requests` (a whole HTTP request) once, or over and over for `seconds`."""

    host: str
    port: int
    connections: int
    seconds: float
    requests: list[str]
    once: bool = False


@dataclass(frozen=True)
class Result:
    """What came of it; times in milliseconds."""

    answers: int
    elapsed_s: float
    statuses: dict[str, int]
    p50_ms: float
    p99_ms: float

    @property
    def rate(self) -> float:
        """Answers a second."""
        return self.answers / self.elapsed_s


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of them do not exceed."""
    ordered = sorted(values)
    return ordered[min(int(len(ordered) * share), len(ordered) - 1)] if ordered else 0.0


class _Run:
    """What all connections share."""

    def __init__(self, job: Job) -> None:
        requests = [request.encode() for request in job.requests]
        self._requests: Iterator[bytes] = iter(requests) if job.once else cycle(requests)
        self._deadline = time.perf_counter() + job.seconds
        self.latencies_s: list[float] = []
        self.statuses: Counter[str] = Counter()

    def next(self) -> bytes | None:
        """The request to send now, or None when it is over."""
        return next(self._requests, None) if time.perf_counter() < self._deadline else None


class _Connection(asyncio.Protocol):
    def __init__(self, run: _Run) -> None:
        self._run = run
        self._transport: asyncio.Transport | None = None
        self._received = b""
        self._sent_at = 0.0
        self.closed = asyncio.get_running_loop().create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.Transport", transport)  # uvloop's has no such base class
        self._send()

    def _send(self) -> None:
        assert self._transport is not None
        request = self._run.next()
        if request is None:
            self._transport.close()
            return
        self._sent_at = time.perf_counter()
        self._transport.write(request)

    def data_received(self, data: bytes) -> None:
        self._received += data
        head, separator, body = self._received.partition(b"\r\n\r\n")
        if not separator:
            return
        _, _, after = head.lower().partition(b"content-length:")
        if len(body) < int(after.partition(b"\r\n")[0] or 0):
            return
        self._run.latencies_s.append(time.perf_counter() - self._sent_at)
        self._run.statuses[head[9:12].decode()] += 1
        self._received = b""
        self._send()

    def connection_lost(self, error: Exception | None) -> None:
        if error is not None:
            self._run.statuses[type(error).__name__] += 1
        self.closed.set_result(None)


async def drive(job: Job) -> Result:
    """Do the job."""
    loop = asyncio.get_running_loop()
    started = time.perf_counter()
    run = _Run(job)
    async with asyncio.timeout(job.seconds + GRACE_S):
        opened = await asyncio.gather(
            *(
                loop.create_connection(lambda: _Connection(run), job.host, job.port)
                for _ in range(job.connections)
            )
        )
        await asyncio.gather(*(connection.closed for _, connection in opened))
    elapsed_s = time.perf_counter() - started
    return Result(
        answers=len(run.latencies_s),
        elapsed_s=elapsed_s,
        statuses=dict(run.statuses),
        p50_ms=percentile(run.latencies_s, 0.5) * 1000,
        p99_ms=percentile(run.latencies_s, 0.99) * 1000,
    )


async def drive_apart(job: Job) -> Result:
    """Do the job in a process of its own, so that its work does not slow down who asks."""
    process = await asyncio.create_subprocess_exec(
        sys.executable,
        *("-m", "benchmarks.load"),
        stdin=asyncio.subprocess.PIPE,
        stdout=asyncio.subprocess.PIPE,
    )
    try:
        async with asyncio.timeout(job.seconds + 2 * GRACE_S):
            out, _ = await process.communicate(json.dumps(asdict(job)).encode())
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    if process.returncode:
        raise RuntimeError(f"the load generator ended with {process.returncode}")
    return Result(**json.loads(out))


if __name__ == "__main__":
    print(json.dumps(asdict(uvloop.run(drive(Job(**json.load(sys.stdin)))))))
