"""Processes that outlive whoever starts them, on Linux.

A number alone never says which process is meant, because the kernel gives numbers out again. So a process
is found by its command line and owner, and from then on held by a pidfd, which stays with that one process:
signals cannot reach another one, and its end is heard of, child or not (`man 2 pidfd_open`).
"""

import asyncio
import os
import resource
import signal
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

_PROC = Path("/proc")
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")

CommandLine = list[str]


class Process:
    """A process, held so that its number cannot come to mean another one. Costs one file descriptor."""

    def __init__(self, pid: int) -> None:
        """Hold the process that has this number now. Raises ProcessLookupError, OSError."""
        self.pid = pid
        self.ended = asyncio.Event()
        self._pidfd = os.pidfd_open(pid)
        self._on_end: Callable[[], None] | None = None

    def watch(self, on_end: Callable[[], None]) -> None:
        """Set `ended` and call `on_end` once the process ends; a child is reaped then."""
        self._on_end = on_end
        asyncio.get_running_loop().add_reader(self._pidfd, self._end)

    def send(self, number: signal.Signals) -> None:
        """Send it a signal; one that has ended gets none."""
        if self._pidfd >= 0:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._pidfd, number)

    def let_go(self) -> None:
        """Hold and watch it no more. The process goes on."""
        if self._on_end is not None:
            asyncio.get_running_loop().remove_reader(self._pidfd)
            self._on_end = None
        if self._pidfd >= 0:
            os.close(self._pidfd)
            self._pidfd = -1

    def _end(self) -> None:
        on_end = self._on_end
        with suppress(ChildProcessError):
            os.waitid(os.P_PIDFD, self._pidfd, os.WEXITED | os.WNOHANG)
        self.let_go()
        self.ended.set()
        if on_end is not None:
            on_end()


@dataclass(frozen=True, slots=True)
class Usage:
    """What a process has used: CPU seconds, seconds since it started, resident bytes now."""

    cpu_s: float
    age_s: float
    memory_bytes: int


def spawn(command: CommandLine, env: Mapping[str, str], log: Path) -> Process:
    """Start a program in a session of its own, reading nothing and appending its output to `log`.

    Takes about a millisecond, however large this process is; the program inherits no open file. Raises
    OSError.
    """
    pid = os.posix_spawn(
        command[0],
        command,
        env,
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 0, "/dev/null", os.O_RDONLY, 0),
            (os.POSIX_SPAWN_OPEN, 1, log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600),
            (os.POSIX_SPAWN_DUP2, 1, 2),
        ],
        setsid=True,
        setsigmask=(),
    )
    try:
        return Process(pid)
    except OSError:
        # Safe by its number: a child keeps it until it is waited for.
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        raise


def find(is_wanted: Callable[[CommandLine], bool]) -> list[tuple[Process, CommandLine]]:
    """The living processes of this user whose command line is wanted, each held. Blocks: reads /proc."""
    found = []
    for entry in os.scandir(_PROC):
        if entry.name.isdecimal() and is_wanted(_command_line(int(entry.name))):
            with suppress(ProcessLookupError):
                process = Process(int(entry.name))
                # Asked again, as the number may have changed hands before it was held.
                command = _command_line(process.pid)
                if is_wanted(command):
                    found.append((process, command))
                else:
                    process.let_go()
    return found


def usage(pid: int) -> Usage:
    """What a process has used so far. Blocks: reads /proc. Raises OSError where it is gone."""
    # The second field is the program's name in brackets, which may hold anything.
    fields = (_PROC / str(pid) / "stat").read_text().rpartition(")")[2].split()
    up_s = float((_PROC / "uptime").read_text().split()[0])
    return Usage(
        cpu_s=(int(fields[11]) + int(fields[12])) / _TICKS_PER_S,
        age_s=max(up_s - int(fields[19]) / _TICKS_PER_S, 0.0),
        memory_bytes=int(fields[21]) * resource.getpagesize(),
    )


def _command_line(pid: int) -> CommandLine:
    """Empty for a process that is gone, dead but not yet reaped, or somebody else's."""
    place = _PROC / str(pid)
    try:
        if place.stat().st_uid != os.geteuid():
            return []
        content = (place / "cmdline").read_bytes()
    except OSError:
        return []
    return content.decode(errors="replace").split("\0")[:-1]
