"""Phones as local processes, for machines without an engine that can run Android.

Each phone is a `python -m phones.simulator` with a directory of its own below `data_dir`:

    <id>/spec.json    what it was last started with, written before it starts
    <id>/phone.json   written by the phone once it listens, with its `pid`
    <id>/phone.log    what it prints

A phone belongs to no parent: it lives on when this process ends, however that happens. It is found again by
its command line, which names its directory, id and ports.
"""

import asyncio
import json
import logging
import os
import shutil
import signal
import sys
import time
import uuid
import weakref
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, astuple, dataclass, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Final, ParamSpec, TypeVar

from phones import processes
from phones.ports import port_is_free
from phones.processes import CommandLine, Process, Usage
from phones.runtime import (
    FoundPhone,
    PhoneSpec,
    PhoneStats,
    PhoneStatus,
    PortTaken,
    PortTriple,
    RuntimeFault,
    RuntimeName,
    RuntimeUnavailable,
)

_ROOT: Final = Path(__file__).resolve().parent.parent
_PASSED_ON: Final = ("PATH", "LANG", "LC_ALL", "TZ")
_LOG_LIMIT: Final = 1 << 20
_TRASH: Final = ".trash-"
_LOST: Final = "lost-"
_POLL_S: Final = 0.03
_KILL_DEADLINE_S: Final = 10.0
_ADOPTION_DEADLINE_S: Final = 3.0
_ADOPTIONS_AT_ONCE: Final = 32

log = logging.getLogger(__name__)

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(eq=False, slots=True)
class _Phone:
    """A phone's process and where it listens. A memory limit of 0 is one that is not known any more."""

    id: str
    process: Process
    host: str
    ports: PortTriple
    memory_limit_bytes: int
    settled: bool = False  # up, and meant to be: its end is news
    sample: tuple[float, float] | None = None  # when, and the CPU seconds used until then

    def found(self) -> FoundPhone:
        return FoundPhone(self.id, PhoneStatus.RUNNING, self.ports)


class SimulatedRuntime:
    """One installation's simulated phones; implements `phones.runtime.Runtime`."""

    name: RuntimeName = "simulated"
    epoch = 0

    def __init__(
        self,
        data_dir: Path,
        *,
        starts_at_once: int | None = None,
        start_deadline_s: float = 30.0,
        stop_grace_s: float = 5.0,
        module: str = "phones.simulator",
    ) -> None:
        """`data_dir` is this runtime's alone. `start_deadline_s` counts from a phone's own turn to start."""
        self._dir = data_dir.absolute()
        self._command = [sys.executable, "-P", "-s", "-m", module]
        self._start_deadline_s = start_deadline_s
        self._stop_grace_s = stop_grace_s
        self._starting = asyncio.Semaphore(starts_at_once or 2 * (os.cpu_count() or 1))
        self._phones: dict[str, _Phone] = {}
        # Each guards one phone's process and directory.
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self._listeners: set[asyncio.Queue[str | None]] = set()

    async def open(self) -> None:
        """Adopt the phones that run; one that does not answer on its port is killed."""
        try:
            await asyncio.to_thread(self._tidy)
        except OSError as failure:
            raise RuntimeUnavailable(f"the phones' directory cannot be used: {failure}") from failure
        await self._adopt()
        turn = asyncio.Semaphore(_ADOPTIONS_AT_ONCE)
        await asyncio.gather(
            *(self._kill_unless_it_answers(phone, turn) for phone in [*self._phones.values()])
        )

    async def close(self) -> None:
        """Stop watching and end every `events()`. Phones keep running."""
        for phone in self._phones.values():
            phone.process.let_go()
        self._phones.clear()
        for listener in self._listeners:
            listener.put_nowait(None)

    async def check(self) -> None:
        """Nothing to ask: this machine is here."""

    def trouble(self) -> str:
        """Nothing, ever."""
        return ""

    def is_exposed(self) -> bool:
        """Never: simulated phones run nobody's code."""
        return False

    async def fetch(self, spec: PhoneSpec) -> AsyncIterator[int]:
        """Nothing to fetch: the simulated phone comes with this program."""
        return
        yield 0  # what makes this an iterator

    async def create(self, spec: PhoneSpec) -> None:
        """Make the phone's directory, unless it is there."""
        async with self._lock(spec.id):
            await self._on_disk(self._make_directory, spec)

    async def start(self, spec: PhoneSpec) -> None:
        """Start the phone's process and wait until it listens. Raises PortTaken, RuntimeFault."""
        async with self._lock(spec.id):
            if await self._runs(spec.id):
                return
            async with self._starting:
                await self._start(spec)

    async def stop(self, phone_id: str) -> None:
        """SIGTERM, and SIGKILL when the grace is over."""
        async with self._lock(phone_id):
            await self._stop(phone_id)

    async def wipe(self, phone_id: str) -> None:
        """Empty a stopped phone's directory. Raises RuntimeFault where the phone runs."""
        async with self._lock(phone_id):
            if await self._runs(phone_id):
                raise RuntimeFault("a running phone cannot be wiped")
            await self._on_disk(self._empty_directory, phone_id)

    async def remove(self, phone_id: str) -> None:
        """End the phone and delete its directory."""
        async with self._lock(phone_id):
            await self._stop(phone_id)
            await self._on_disk(self._delete_directory, phone_id)

    async def discard(self, found: FoundPhone) -> None:
        """End the phone's process; its directory is moved aside, so that nobody takes it for a phone."""
        async with self._lock(found.id):
            await self._stop(found.id)
            await self._on_disk(self._set_aside, found.id)

    async def limit(self, spec: PhoneSpec) -> None:
        """Nothing: a process here has no limits that somebody could change."""

    async def log(self, phone_id: str, lines: int) -> list[str]:
        """What the phone's process printed last."""
        return await self._on_disk(_last_lines, self._log(phone_id), lines)

    async def inspect(self, phone_id: str) -> FoundPhone | None:
        """What is known here of this phone."""
        phone = self._phones.get(phone_id)
        if phone is not None:
            return phone.found()
        known = await self._on_disk(self._place(phone_id).is_dir)
        return FoundPhone(phone_id, PhoneStatus.STOPPED, None) if known else None

    async def list(self) -> list[FoundPhone]:
        """Every phone that has a directory or a process here; processes not known yet are adopted."""
        await self._adopt()
        made_at = await self._on_disk(self._look_through_directories)
        running = {phone.id: phone.found() for phone in self._phones.values()}
        stopped = [FoundPhone(name, PhoneStatus.STOPPED, None) for name in made_at if name not in running]
        return [replace(phone, created_at=made_at.get(phone.id)) for phone in (*running.values(), *stopped)]

    async def stats(self, phone_id: str) -> PhoneStats:
        """CPU since the last call, or since the start on the first; 100 percent is one whole core.

        Network figures are 0: the kernel counts none for a process.
        """
        phone = self._phones.get(phone_id)
        if phone is None:
            raise RuntimeFault("the phone does not run")
        try:
            used = await asyncio.to_thread(processes.usage, phone.process.pid)
        except OSError:
            raise RuntimeFault("the phone does not run") from None
        return PhoneStats(
            cpu_percent=_cpu_percent(phone, used),
            memory_bytes=used.memory_bytes,
            memory_limit_bytes=phone.memory_limit_bytes,
            rx_bytes=0,
            tx_bytes=0,
        )

    def events(self) -> AsyncIterator[str | None]:
        """Phones that ended by themselves from this call on; ends when the runtime is closed."""
        listener: asyncio.Queue[str | None] = asyncio.Queue()
        self._listeners.add(listener)
        return self._listen(listener)

    async def _listen(self, listener: asyncio.Queue[str | None]) -> AsyncIterator[str]:
        try:
            while (event := await listener.get()) is not None:
                yield event
        finally:
            self._listeners.discard(listener)

    def _lock(self, phone_id: str) -> asyncio.Lock:
        return self._locks.setdefault(phone_id, asyncio.Lock())

    # --- Processes ------------------------------------------------------------------------------

    async def _runs(self, phone_id: str) -> bool:
        """Whether the phone is up; what is left of a start that was broken off is ended."""
        phone = self._phones.get(phone_id)
        if phone is None or phone.settled:
            return phone is not None
        await self._kill(phone)
        return False

    async def _start(self, spec: PhoneSpec) -> None:
        await self._on_disk(self._prepare_directory, spec)
        for port in astuple(spec.ports):
            if not port_is_free(spec.bind_address, port):
                raise PortTaken(port)
        phone = self._spawn(spec)
        try:
            async with asyncio.timeout(self._start_deadline_s):
                while not await asyncio.to_thread(self._has_announced_itself, phone):
                    if phone.process.ended.is_set():
                        raise await self._why_it_ended(spec)
                    await asyncio.sleep(_POLL_S)
        except TimeoutError:
            await self._kill(phone)
            raise RuntimeFault(f"the phone did not come up within {self._start_deadline_s:g} s") from None
        except BaseException:
            phone.process.send(signal.SIGKILL)
            raise
        phone.settled = True

    def _spawn(self, spec: PhoneSpec) -> _Phone:
        """Start the process. No coroutine: one cancelled midway would leave a process nobody knows."""
        options = {
            "data-dir": self._place(spec.id),
            "host": spec.bind_address,
            "adb-port": spec.ports.adb,
            "webrtc-port": spec.ports.webrtc,
            "scrcpy-port": spec.ports.scrcpy,
            "id": spec.id,
            "name": spec.name.replace("\0", ""),
            "width": spec.width,
            "height": spec.height,
            "dpi": spec.dpi,
            "android-version": spec.android_version,
        }
        command = [*self._command, *(f"--{option}={value}" for option, value in options.items())]
        env = {name: os.environ[name] for name in _PASSED_ON if name in os.environ}
        env["PYTHONPATH"] = str(_ROOT)
        try:
            process = processes.spawn(command, env, self._log(spec.id))
        except OSError as failure:
            raise RuntimeFault(f"the phone's process could not be started: {failure}") from failure
        return self._take_in(
            _Phone(spec.id, process, spec.bind_address, spec.ports, memory_limit_bytes=spec.memory_mb << 20)
        )

    def _take_in(self, phone: _Phone) -> _Phone:
        self._phones[phone.id] = phone
        phone.process.watch(partial(self._on_end, phone))
        return phone

    def _on_end(self, phone: _Phone) -> None:
        del self._phones[phone.id]
        if phone.settled:
            log.warning("phone %s ended by itself", phone.id)
            for listener in self._listeners:
                listener.put_nowait(phone.id)

    async def _why_it_ended(self, spec: PhoneSpec) -> RuntimeFault:
        """What to say of a phone whose process ended before it listened."""
        for port in astuple(spec.ports):
            if not port_is_free(spec.bind_address, port):
                return PortTaken(port)
        last_words = await asyncio.to_thread(_last_lines, self._log(spec.id), 1)
        log.error("phone %s ended while starting: %s", spec.id, "".join(last_words))
        return RuntimeFault("the phone's program ended while it was starting")

    async def _stop(self, phone_id: str) -> None:
        phone = self._phones.get(phone_id)
        if phone is None:
            return
        phone.settled = False
        phone.process.send(signal.SIGTERM)
        try:
            async with asyncio.timeout(self._stop_grace_s):
                await phone.process.ended.wait()
        except TimeoutError:
            await self._kill(phone)

    async def _kill(self, phone: _Phone) -> None:
        phone.settled = False
        phone.process.send(signal.SIGKILL)
        try:
            async with asyncio.timeout(_KILL_DEADLINE_S):
                await phone.process.ended.wait()
        except TimeoutError:
            raise RuntimeFault("the phone's process cannot be ended") from None

    async def _adopt(self) -> None:
        """Take in the processes of ours that are not known here."""
        for phone in await asyncio.to_thread(self._find_phones):
            known = self._phones.get(phone.id)
            # Whoever holds a phone's lock is about to know better.
            if (known and known.process.pid == phone.process.pid) or self._lock(phone.id).locked():
                phone.process.let_go()
            elif known:
                log.error("phone %s runs twice; process %d is ended", phone.id, phone.process.pid)
                phone.process.send(signal.SIGKILL)
                phone.process.let_go()
            else:
                self._take_in(phone)

    def _find_phones(self) -> Sequence[_Phone]:
        return [
            self._described(process, self._options(command))
            for process, command in processes.find(self._is_ours)
        ]

    def _described(self, process: Process, options: dict[str, str]) -> _Phone:
        spec = self._read_spec(options["id"])
        return _Phone(
            id=options["id"],
            process=process,
            host=options["host"],
            ports=PortTriple(*(int(options[f"{name}-port"]) for name in ("adb", "webrtc", "scrcpy"))),
            memory_limit_bytes=spec.memory_mb << 20 if spec else 0,
            settled=True,
        )

    def _is_ours(self, command: CommandLine) -> bool:
        options = self._options(command)
        return (
            {"host", "adb-port", "webrtc-port", "scrcpy-port"} <= options.keys()
            and _is_uuid(options.get("id", ""))
            and options.get("data-dir") == str(self._place(options["id"]))
        )

    def _options(self, command: CommandLine) -> dict[str, str]:
        """The options of a phone's command line; none where it is that of another program."""
        # Whatever the interpreter: it may have been replaced while the phone runs on.
        start = len(self._command)
        if command[1:start] != self._command[1:]:
            return {}
        pairs = (argument.removeprefix("--").partition("=") for argument in command[start:])
        return {name: value for name, _, value in pairs}

    async def _kill_unless_it_answers(self, phone: _Phone, turn: asyncio.Semaphore) -> None:
        async with turn:
            try:
                async with asyncio.timeout(_ADOPTION_DEADLINE_S):
                    await _until_answered(phone.host, phone.ports.adb)
            except TimeoutError:
                log.warning("phone %s does not answer on its port; it is ended", phone.id)
                with suppress(RuntimeFault):
                    await self._kill(phone)

    # --- Directories ----------------------------------------------------------------------------

    async def _on_disk(self, work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
        try:
            return await asyncio.to_thread(work, *args, **kwargs)
        except OSError as failure:
            raise RuntimeFault(f"the phone's directory cannot be used: {failure.strerror}") from failure

    def _place(self, phone_id: str) -> Path:
        if not _is_uuid(phone_id):
            raise ValueError(f"{phone_id!r} is no phone's id")
        return self._dir / phone_id

    def _log(self, phone_id: str) -> Path:
        return self._place(phone_id) / "phone.log"

    def _tidy(self) -> None:
        self._dir.mkdir(mode=0o700, parents=True, exist_ok=True)
        # A phone is known by this path: it must not depend on the way here.
        self._dir = self._dir.resolve()
        for trash in self._dir.glob(f"{_TRASH}*"):
            shutil.rmtree(trash)

    def _look_through_directories(self) -> dict[str, datetime]:
        """When each phone that has a directory was made or last wiped; cuts their logs on the way."""
        made_at: dict[str, datetime] = {}
        for entry in self._dir.iterdir():
            if _is_uuid(entry.name):
                with suppress(FileNotFoundError):
                    made_at[entry.name] = datetime.fromtimestamp(entry.stat().st_mtime, UTC)
                    _cut_log(self._log(entry.name))
        return made_at

    def _make_directory(self, spec: PhoneSpec) -> None:
        self._place(spec.id).mkdir(mode=0o700, exist_ok=True)
        if self._read_spec(spec.id) is None:
            self._write_spec(spec)

    def _prepare_directory(self, spec: PhoneSpec) -> None:
        self._place(spec.id).mkdir(mode=0o700, exist_ok=True)
        self._write_spec(spec)
        (self._place(spec.id) / "phone.json").unlink(missing_ok=True)
        _cut_log(self._log(spec.id))

    def _empty_directory(self, phone_id: str) -> None:
        spec = self._read_spec(phone_id)
        self._delete_directory(phone_id)
        self._place(phone_id).mkdir(mode=0o700)
        if spec is not None:
            self._write_spec(spec)

    def _delete_directory(self, phone_id: str) -> None:
        # Under another name first: half a directory must never be taken for a phone.
        trash = self._dir / f"{_TRASH}{uuid.uuid4()}"
        with suppress(FileNotFoundError):
            self._place(phone_id).rename(trash)
            shutil.rmtree(trash)

    def _set_aside(self, phone_id: str) -> None:
        with suppress(FileNotFoundError):
            self._place(phone_id).rename(self._dir / f"{_LOST}{phone_id}-{uuid.uuid4()}")

    def _write_spec(self, spec: PhoneSpec) -> None:
        written = self._place(spec.id) / "spec.json.new"
        written.write_text(json.dumps(asdict(spec), indent=1))
        written.replace(self._place(spec.id) / "spec.json")

    def _read_spec(self, phone_id: str) -> PhoneSpec | None:
        try:
            fields = json.loads((self._place(phone_id) / "spec.json").read_text())
            for name in ("ports", "inner_ports"):
                fields[name] = PortTriple(**fields[name])
            return PhoneSpec(**fields)
        except (OSError, ValueError, TypeError, KeyError):
            return None

    def _has_announced_itself(self, phone: _Phone) -> bool:
        try:
            announcement = json.loads((self._place(phone.id) / "phone.json").read_text())
            return bool(announcement["pid"] == phone.process.pid)
        except (OSError, ValueError, TypeError, KeyError):
            return False


async def _until_answered(host: str, port: int) -> None:
    """Return once somebody accepts connections there."""
    while True:
        with suppress(OSError):
            _, writer = await asyncio.open_connection(host, port)
            writer.close()
            return
        await asyncio.sleep(_POLL_S)


def _cpu_percent(phone: _Phone, used: Usage) -> float:
    now = time.monotonic()
    since, cpu_s = phone.sample or (now - used.age_s, 0.0)
    phone.sample = (now, used.cpu_s)
    return 100 * (used.cpu_s - cpu_s) / (now - since) if now > since else 0.0


def _cut_log(path: Path) -> None:
    """Start a log that has grown too long anew; its writers append, so they go on at the start."""
    with suppress(FileNotFoundError):
        if path.stat().st_size > _LOG_LIMIT:
            os.truncate(path, 0)


def _last_lines(path: Path, count: int) -> list[str]:
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 1000 * count))
        return file.read().decode(errors="replace").strip().splitlines()[-count:]
    return []


def _is_uuid(text: str) -> bool:
    try:
        return str(uuid.UUID(text)) == text
    except ValueError:
        return False
