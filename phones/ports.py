"""Which host ports belong to which phone.

The allocator answers from memory and never waits, so that within one process nothing comes between
choosing a port and holding it. What it holds must be told to it again after a restart (`hold`).
"""

import heapq
import itertools
import socket
import time
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import astuple

from phones.runtime import PortTriple

PortRange = tuple[int, int]

FOREIGN_FOR_S = 60.0


class PortsExhausted(Exception):
    """No port of this range is free; `range_name` is adb, webrtc or scrcpy."""

    def __init__(self, range_name: str) -> None:
        super().__init__(f"no {range_name} port is free")
        self.range_name = range_name


def port_is_free(address: str, port: int) -> bool:
    """Whether a phone could listen here now.

    Binds as the phones' own listeners do, with SO_REUSEADDR: without it connections of the port's last
    user that linger in TIME_WAIT would count as taken. Linux refuses all the same where somebody listens.
    """
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((address, port))
        except OSError:
            return False
    return True


class PortAllocator:
    """Hands out triples of ports, one of each range, none twice.

    A freed port is given out again after all others, so that a client which comes late does not reach
    somebody else's phone. A port on which another program listens is left alone for a minute.
    """

    def __init__(
        self,
        *,
        adb: PortRange,
        webrtc: PortRange,
        scrcpy: PortRange,
        bind_address: str | None = "127.0.0.1",
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Ranges are inclusive. Raises ValueError where one is impossible or two overlap.

        Where the ports are another machine's, `bind_address` is None and nobody tries whether they are free.
        """
        self._ranges = {"adb": adb, "webrtc": webrtc, "scrcpy": scrcpy}
        _check_ranges(self._ranges)
        self._bind_address = bind_address
        self._clock = clock
        self._free = {
            name: OrderedDict.fromkeys(range(low, high + 1)) for name, (low, high) in self._ranges.items()
        }
        self._holders: dict[int, PortTriple] = {}
        self._foreign_until: dict[int, float] = {}
        self._foreign_queue: list[tuple[float, int]] = []

    def hold(self, triple: PortTriple) -> None:
        """Hold ports that a phone has from before; ports outside the ranges are held as well.

        Raises ValueError where another triple holds one of them.
        """
        for port in astuple(triple):
            if self._holders.get(port, triple) != triple:
                raise ValueError(f"port {port} is held already")
        for port in astuple(triple):
            self._holders[port] = triple
            self._forget_free(port)

    def take(self) -> PortTriple:
        """Hold three ports that nobody uses. Raises PortsExhausted."""
        self._return_foreign()
        taken: list[int] = []
        try:
            for name in self._ranges:
                taken.append(self._take_one(name))  # noqa: PERF401 (what was taken must outlive a failure)
        except PortsExhausted:
            for port in taken:
                self._add_free(port)
            raise
        triple = PortTriple(*taken)
        self._holders.update(dict.fromkeys(taken, triple))
        return triple

    def free(self, triple: PortTriple) -> None:
        """Give ports back. A triple that is not held, or no more, is no error and frees nothing."""
        for port in astuple(triple):
            if self._holders.get(port) == triple:
                del self._holders[port]
                self._add_free(port)

    def mark_foreign(self, port: int, for_s: float = FOREIGN_FOR_S) -> None:
        """Leave a port alone for a while, because another program was found to use it."""
        until = self._clock() + for_s
        self._foreign_until[port] = until
        heapq.heappush(self._foreign_queue, (until, port))
        self._forget_free(port)

    def free_counts(self) -> dict[str, int]:
        """How many ports each range still has to give, by the range's name."""
        self._return_foreign()
        return {name: len(ports) for name, ports in self._free.items()}

    def _take_one(self, name: str) -> int:
        ports = self._free[name]
        while ports:
            port, _ = ports.popitem(last=False)
            if self._bind_address is None or port_is_free(self._bind_address, port):
                return port
            self.mark_foreign(port)
        raise PortsExhausted(name)

    def _add_free(self, port: int) -> None:
        name = self._range_of(port)
        if name is not None and port not in self._foreign_until:
            self._free[name][port] = None

    def _forget_free(self, port: int) -> None:
        name = self._range_of(port)
        if name is not None:
            self._free[name].pop(port, None)

    def _return_foreign(self) -> None:
        now = self._clock()
        while self._foreign_queue and self._foreign_queue[0][0] <= now:
            until, port = heapq.heappop(self._foreign_queue)
            # A port marked again meanwhile stands in the queue twice.
            if self._foreign_until.get(port) == until:
                del self._foreign_until[port]
                if port not in self._holders:
                    self._add_free(port)

    def _range_of(self, port: int) -> str | None:
        return next((name for name, (low, high) in self._ranges.items() if low <= port <= high), None)


def _check_ranges(ranges: dict[str, PortRange]) -> None:
    for name, (low, high) in ranges.items():
        if not 1 <= low <= high <= 65535:
            raise ValueError(f"the {name} ports {low}-{high} are no range between 1 and 65535")
    ordered = sorted(ranges.items(), key=lambda item: item[1])
    for (left, (_, end)), (right, (start, _)) in itertools.pairwise(ordered):
        if start <= end:
            raise ValueError(f"the {left} ports and the {right} ports overlap")
