"""The private servers under the data folder: what PostgreSQL and the S3 server have in common.

Each is a direct child of this process: started by exec with an argument list, in a session of its
own so that Ctrl-C reaches this process alone, watched and started again when it dies, and told by
the kernel to end when this process is killed (Linux; elsewhere the next start ends what was left).
The kernel's promise hangs on the *thread* that started the child, so run the loop that calls
`Child.start` in a thread that lives as long as the process: the main one.

DataDirLock keeps a second server off the same folder.
"""

import asyncio
import ctypes
import fcntl
import logging
import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import orjson

from server.claim import SecondInstance
from server.clock import SystemClock

log = logging.getLogger(__name__)

CLOCK = SystemClock()

READY_TIMEOUT_S = 60.0  # PostgreSQL may have to replay its log after a crash
LOG_LIMIT_BYTES = 5 << 20
LOG_CHECK_S = 60.0
FIRST_PAUSE_S = 0.1
LONGEST_PAUSE_S = 5.0
PORTS = range(10240, 20000)
STEADY_S = 60.0  # a child that ran this long failed anew, not again

_PR_SET_PDEATHSIG = 1
_OUR_PROBE = "the database system is starting up"
_WHY = re.compile(r"FATAL|PANIC|^F\d{4} |rror:|could not|cannot|denied|No space")


class EmbeddedFault(Exception):
    """A private server could not be started; one line that names its log file."""


@dataclass(frozen=True, slots=True)
class Account:
    """The user a child runs as, when this process is root and the child refuses to be."""

    uid: int
    gid: int


@dataclass(frozen=True, slots=True)
class Command:
    """A program, its arguments, and everything it inherits: nothing but this."""

    arguments: Sequence[str]
    cwd: Path
    environment: Mapping[str, str]
    account: Account | None = None
    death_signal: signal.Signals = signal.SIGKILL  # from the kernel, when this process is gone


async def spawn(command: Command, output: IO[bytes]) -> asyncio.subprocess.Process:
    """Start `command` with its output in `output`. Call it from a thread that stays."""
    return await asyncio.create_subprocess_exec(
        *command.arguments,
        stdin=asyncio.subprocess.DEVNULL,
        stdout=output,
        stderr=output,
        cwd=command.cwd,
        env=dict(command.environment),
        start_new_session=True,
        preexec_fn=_before_exec(command.account, command.death_signal),
    )


def _before_exec(account: Account | None, death_signal: signal.Signals) -> Callable[[], None]:
    # Neither loop's subprocesses know death signals, and uvloop's know no user either.
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    parent = os.getpid()

    def prepare() -> None:
        if account is not None:
            os.setgroups([])
            os.setgid(account.gid)
            os.setuid(account.uid)
        os.umask(0o077)
        if libc is not None:
            libc.prctl(_PR_SET_PDEATHSIG, int(death_signal), 0, 0, 0)  # setuid would clear it
            if os.getppid() != parent:
                os._exit(1)  # killed in between: no signal will come

    return prepare


class Child:
    """One program kept running until `stop`: started again when it dies, with growing pauses."""

    def __init__(
        self,
        name: str,
        *,
        log_file: Path,
        pid_file: Path,
        stop_signal: signal.Signals,
        stop_grace_s: float,
    ) -> None:
        self._name = name
        self._log_file = log_file
        self._pid_file = pid_file
        self._stop_signal = stop_signal
        self._stop_grace_s = stop_grace_s
        self._command: Command
        self._is_ready: Callable[[], Awaitable[bool]]
        self._process: asyncio.subprocess.Process | None = None
        self._watcher: asyncio.Task[None] | None = None

    @property
    def pid(self) -> int | None:
        """The process id while it runs."""
        running = self._process is not None and self._process.returncode is None
        return self._process.pid if self._process is not None and running else None

    async def start(self, command: Command, is_ready: Callable[[], Awaitable[bool]]) -> None:
        """Return when `is_ready` says so. Raises EmbeddedFault when it does not come up."""
        self._command = command
        self._is_ready = is_ready
        try:
            await self._launch()
        except BaseException:
            await self._end()
            raise
        self._watcher = asyncio.create_task(self._watch())

    async def stop(self) -> None:
        """End the program: politely, after its grace by force."""
        if self._watcher is not None:
            self._watcher.cancel()
            await asyncio.wait([self._watcher])
            self._watcher = None
        await self._end()
        await asyncio.to_thread(self._pid_file.unlink, missing_ok=True)

    async def _launch(self) -> None:
        offset, output = await asyncio.to_thread(open_log, self._log_file)
        with output:
            self._process = process = await spawn(self._command, output)
        await asyncio.to_thread(self._note_pid, process.pid)
        try:
            async with asyncio.timeout(READY_TIMEOUT_S):
                while not await self._is_ready():
                    if process.returncode is not None:
                        raise await asyncio.to_thread(fault, self._name, "stopped", self._log_file, offset)
                    await asyncio.sleep(0.01)
        except TimeoutError:
            await self._end()
            raise await asyncio.to_thread(
                fault, self._name, f"did not answer within {READY_TIMEOUT_S:.0f} s", self._log_file, offset
            ) from None

    def _note_pid(self, pid: int) -> None:
        self._pid_file.write_text(f"{pid} {_birth(pid)}")

    async def _end(self) -> None:
        process = self._process
        if process is None:
            return
        if process.returncode is None:
            with suppress(ProcessLookupError):
                process.send_signal(self._stop_signal)
            with suppress(TimeoutError):
                async with asyncio.timeout(self._stop_grace_s):
                    await process.wait()
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, signal.SIGKILL)  # it leads its own group; this takes its children too
        await process.wait()

    async def _watch(self) -> None:
        pause = FIRST_PAUSE_S
        while True:
            started = CLOCK.monotonic()
            code = await self._until_exit()
            if CLOCK.monotonic() - started > STEADY_S:
                pause = FIRST_PAUSE_S
            log.error("%s ended with code %s; starting it again, see %s", self._name, code, self._log_file)
            while True:
                await asyncio.sleep(pause)
                pause = min(pause * 2, LONGEST_PAUSE_S)
                try:
                    await self._launch()
                except (EmbeddedFault, OSError) as error:
                    log.error("%s", error)
                    continue
                log.info("%s runs again", self._name)
                break

    async def _until_exit(self) -> int:
        assert self._process is not None
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(LOG_CHECK_S):
                    return await self._process.wait()
            await asyncio.to_thread(_bound_log, self._log_file)

    def end_leftover(self) -> None:
        """End what a killed server left running. Blocking."""
        try:
            pid_text, _, birth = self._pid_file.read_text().partition(" ")
            pid = int(pid_text)
        except (OSError, ValueError):
            return
        stop_at = CLOCK.monotonic() + self._stop_grace_s
        with suppress(ProcessLookupError, PermissionError):
            if _birth(pid) == birth:
                os.kill(pid, self._stop_signal)
            while _birth(pid) == birth:
                if CLOCK.monotonic() > stop_at:
                    os.killpg(pid, signal.SIGKILL)
                time.sleep(0.02)


def _birth(pid: int) -> str:
    """What tells a process from a later one of the same id; "" when it is gone."""
    if sys.platform != "linux":
        answer = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, check=False)
        return answer.stdout.decode().strip()
    try:
        after_name = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if after_name[0] == "Z" else after_name[19]  # proc(5): state and starttime


def open_log(log_file: Path) -> tuple[int, IO[bytes]]:
    """The log, open for appending, and where the next line will begin. Blocking."""
    log_file.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    _bound_log(log_file)
    output = os.fdopen(os.open(log_file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600), "ab")
    return log_file.stat().st_size, output


def _bound_log(log_file: Path) -> None:
    """Keep one old log beside the new one; the child goes on appending to the same file."""
    if log_file.exists() and log_file.stat().st_size > LOG_LIMIT_BYTES:
        shutil.copy(log_file, log_file.with_suffix(".log.1"))
        os.truncate(log_file, 0)


def fault(name: str, what: str, log_file: Path, offset: int = 0) -> EmbeddedFault:
    """One line: what went wrong, the log's own reason, and where to read more. Blocking."""
    with log_file.open("rb") as lines:
        lines.seek(offset)
        said = [line.decode(errors="replace").strip() for line in lines.read(1 << 20).splitlines()]
    said = [line for line in said if line and _OUR_PROBE not in line]
    reason = next((line for line in said if _WHY.search(line)), said[-1] if said else "it said nothing")
    return EmbeddedFault(f"{name} {what}: {reason} (log: {log_file})")


def recall(path: Path) -> dict[str, Any]:
    """What `keep` wrote, or nothing. Blocking."""
    try:
        return dict(orjson.loads(path.read_bytes()))
    except FileNotFoundError:
        return {}
    except ValueError as error:
        raise EmbeddedFault(f"{path} is damaged: {error}") from error


def keep(path: Path, facts: Mapping[str, Any]) -> None:
    """Write a small private JSON file as a whole or not at all. Blocking."""
    keep_text(path, orjson.dumps(dict(facts), option=orjson.OPT_INDENT_2).decode())


def keep_text(path: Path, text: str) -> None:
    """Write a small private file as a whole or not at all. Blocking."""
    fresh = path.with_name(f"{path.name}.{secrets.token_hex(4)}")
    with os.fdopen(os.open(fresh, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        out.write(text)
        out.flush()
        os.fsync(out.fileno())
    fresh.replace(path)


def free_ports(count: int, preferred: Sequence[int] = ()) -> list[int]:
    """`preferred` where all of them are free on the loopback, else `count` others. Blocking.

    Not from the range the kernel gives to outgoing connections: one of those could sit on a port
    when it is wanted again.
    """
    with ExitStack() as held:
        if len(preferred) == count:
            if all(_bound(held, port) for port in preferred):
                return list(preferred)
            log.warning("one of the ports %s is in use; choosing others", list(preferred))
        start = secrets.randbelow(len(PORTS))  # far from where another server begins to look
        candidates = (*PORTS[start:], *PORTS[:start])
        found = list(islice((port for port in candidates if _bound(held, port)), count))
    if len(found) < count:
        raise EmbeddedFault(f"no {count} free ports from {PORTS.start} to {PORTS.stop - 1}")
    return found


def _bound(held: ExitStack, port: int) -> bool:
    probe = held.enter_context(socket.socket())
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        probe.bind(("127.0.0.1", port))
    except OSError:
        return False
    return True


class DataDirLock:
    """Keeps the data folder for one server; the kernel frees it when that is killed.

    All methods block briefly: call them before the loop runs, or in a thread.
    """

    def __init__(self, data_dir: Path) -> None:
        self._data_dir = data_dir
        self._file: IO[bytes] | None = None

    def acquire(self, address: str) -> None:
        """Take the folder, making it where it is absent. Raises SecondInstance naming the first.

        `address` tells the next one that tries where this one listens.
        """
        self._data_dir.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._data_dir / "server.lock", os.O_RDWR | os.O_CREAT, 0o600)
        lock_file = os.fdopen(descriptor, "r+b", buffering=0)
        try:
            fcntl.flock(lock_file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            with lock_file:
                holder = lock_file.read(1000).decode(errors="replace").strip() or "just starting"
            raise SecondInstance(f"another server uses {self._data_dir}: {holder}") from None
        self._file = lock_file
        self.announce(address)

    def announce(self, address: str) -> None:
        """Say where this server really listens, once that is known."""
        assert self._file is not None
        since = CLOCK.now()
        text = f"pid {os.getpid()}, {address}, since {since:%Y-%m-%d %H:%M:%S} UTC\n"
        self._file.seek(0)
        self._file.truncate()
        self._file.write(text.encode())

    def release(self) -> None:
        """Let the next server in."""
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> "DataDirLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()
