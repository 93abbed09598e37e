"""Counting failures, so that guessing takes for ever."""

from collections import deque

from server.clock import Clock

KEYS_KEPT = 20_000


class Throttle:
    """Failures by key over a sliding window, in memory: after `limit` of them a key has to wait."""

    def __init__(self, clock: Clock, *, limit: int, window_s: float) -> None:
        self._clock = clock
        self._limit = limit
        self._window_s = window_s
        self._failures: dict[str, deque[float]] = {}  # the key that failed last is the last one

    def wait_s(self, key: str) -> float:
        """How long until the key may try again; 0 where it may now."""
        failures = self._failures.get(key)
        if failures is None or len(failures) < self._limit:
            return 0.0
        return max(0.0, failures[0] + self._window_s - self._clock.monotonic())

    def count(self, key: str) -> None:
        """Note a failure. Where there are too many keys, the one that failed longest ago is forgotten."""
        failures = self._failures.pop(key, None) or deque(maxlen=self._limit)
        failures.append(self._clock.monotonic())
        self._failures[key] = failures
        if len(self._failures) > KEYS_KEPT:
            del self._failures[next(iter(self._failures))]

    def forget(self, key: str) -> None:
        """Start anew for a key that succeeded."""
        self._failures.pop(key, None)
