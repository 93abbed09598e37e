"""The phone's log: a bounded memory of lines, Android's filters and formats, and following."""

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import datetime
from enum import IntEnum
from itertools import islice

from phones.simulator.clock import Clock

CAPACITY = 2000
BUFFERS = ("main", "system", "crash", "events", "radio", "kernel")
DEFAULT_BUFFERS = frozenset({"main", "system", "crash"})


class Priority(IntEnum):
    """How grave a line is, in Android's order."""

    VERBOSE = 2
    DEBUG = 3
    INFO = 4
    WARN = 5
    ERROR = 6
    FATAL = 7
    SILENT = 8

    @property
    def letter(self) -> str:
        return self.name[0]


LETTERS = {priority.letter: priority for priority in Priority} | {"*": Priority.VERBOSE}


@dataclass(frozen=True, slots=True)
class Entry:
    """One line of the log. `number` grows by one from line to line."""

    number: int
    at: datetime
    buffer: str
    priority: Priority
    tag: str
    process: int
    thread: int
    message: str


class Log:
    """The last lines of everything on the phone; the oldest fall out."""

    def __init__(self, clock: Clock, capacity: int = CAPACITY) -> None:
        self._clock = clock
        self._entries: deque[Entry] = deque(maxlen=capacity)
        self._followers: set[asyncio.Event] = set()
        self._last = 0

    def write(
        self,
        tag: str,
        message: str,
        *,
        priority: Priority = Priority.INFO,
        process: int = 1,
        buffer: str = "main",
    ) -> None:
        """Append a line and wake whoever follows."""
        self._last += 1
        at = self._clock.now()
        line = message.replace("\n", " ")[:1000]
        self._entries.append(Entry(self._last, at, buffer, priority, tag, process, process, line))
        for follower in self._followers:
            follower.set()

    def clear(self, buffers: frozenset[str]) -> None:
        kept = [entry for entry in self._entries if entry.buffer not in buffers]
        self._entries.clear()
        self._entries.extend(kept)

    def entries(self, after: int = 0) -> list[Entry]:
        """What is still held of the lines after number `after`."""
        newer = islice(reversed(self._entries), max(0, self._last - after))
        return [entry for entry in reversed(list(newer)) if entry.number > after]

    async def follow(self) -> AsyncIterator[list[Entry]]:
        """Everything held, then what comes, in batches; ends only by being left."""
        last = 0
        with self._following() as changed:
            while True:
                changed.clear()
                batch = self.entries(after=last)
                if batch:
                    last = batch[-1].number
                    yield batch
                else:
                    await changed.wait()

    @contextmanager
    def _following(self) -> Iterator[asyncio.Event]:
        changed = asyncio.Event()
        self._followers.add(changed)
        try:
            yield changed
        finally:
            self._followers.discard(changed)


@dataclass(frozen=True, slots=True)
class Filter:
    """`tag:priority` rules as logcat reads them; the last rule for a tag wins."""

    levels: dict[str, Priority]
    default: Priority = Priority.VERBOSE

    @classmethod
    def parse(cls, rules: Iterable[str]) -> "Filter":
        """Raises ValueError with the rule that cannot be read."""
        levels: dict[str, Priority] = {}
        default = Priority.VERBOSE
        for rule in rules:
            tag, colon, letter = rule.partition(":")
            priority = LETTERS.get(letter.upper()) if letter else Priority.VERBOSE
            if not tag or priority is None or (colon and len(letter) > 1):
                raise ValueError(rule)
            if tag == "*":
                default = priority if colon else Priority.DEBUG
            else:
                levels[tag] = priority
        return cls(levels, default)

    def passes(self, entry: Entry) -> bool:
        return entry.priority >= self.levels.get(entry.tag, self.default)


def _threadtime(entry: Entry) -> str:
    stamp = _stamp(entry)
    level = entry.priority.letter
    return f"{stamp} {entry.process:5d} {entry.thread:5d} {level} {entry.tag:<8}: {entry.message}"


def _stamp(entry: Entry) -> str:
    return f"{entry.at:%m-%d %H:%M:%S}.{entry.at.microsecond // 1000:03d}"


FORMATS: dict[str, Callable[[Entry], str]] = {
    "brief": lambda e: f"{e.priority.letter}/{e.tag:<8}({e.process:5d}): {e.message}",
    "long": lambda e: (
        f"[ {_stamp(e)} {e.process:5d}:{e.thread:5d} {e.priority.letter}/{e.tag:<8} ]\n{e.message}\n"
    ),
    "process": lambda e: f"{e.priority.letter}({e.process:5d}) {e.message}  ({e.tag})",
    "raw": lambda e: e.message,
    "tag": lambda e: f"{e.priority.letter}/{e.tag:<8}: {e.message}",
    "thread": lambda e: f"{e.priority.letter}({e.process:5d}:{e.thread:5d}) {e.message}",
    "threadtime": _threadtime,
    "time": lambda e: f"{_stamp(e)} {e.priority.letter}/{e.tag:<8}({e.process:5d}): {e.message}",
}
