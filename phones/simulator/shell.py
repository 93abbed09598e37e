"""The phone's `sh`, as its ADB daemon sees it.

Nothing here starts a program of the host: every command is a coroutine from `commands/`, and every file
is one of the phone's own.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from phones.simulator.calls import Streams
from phones.simulator.console import Console, ScriptInput
from phones.simulator.job import Job
from phones.simulator.streams import Sink, Terminal

if TYPE_CHECKING:
    from phones.simulator.phone import Phone

__all__ = ["Shell", "Terminal"]

MAX_RUNNING = 256


class Shell:
    """The phone's `sh`."""

    def __init__(self, phone: "Phone") -> None:
        self._phone = phone
        self._running = 0

    async def run(self, command: str, terminal: Terminal) -> int:
        """Run one command line to its end, with what it leaves in the background, and return its exit code.

        Raises nothing but what the terminal itself raises.
        """
        async with self._job(terminal, _Errors(terminal)) as job:
            return await job.run(command)

    async def interact(self, terminal: Terminal, *, echo: bool) -> int:
        """Run lines as they are typed, until `exit` or the end of input; the last exit code.

        With `echo` the terminal is one where a person types: it is shown a prompt and what it sends,
        a line can be mended, and Ctrl-C ends the running command. Without, the input is a script.
        """
        if not echo:
            script = ScriptInput(terminal)
            async with self._job(script, _Errors(terminal)) as job:
                return await job.run_lines(script)
        console = Console(terminal)
        async with console.typing(), self._job(console, console) as job:
            return await job.run_console(console)

    @asynccontextmanager
    async def _job(self, terminal: "_Interactive", errors: Sink) -> AsyncIterator["Job"]:
        job = Job(self._phone, Streams(terminal, terminal, errors), self._place)
        try:
            yield job
            await job.finish_background()
        finally:
            await job.end_background()

    @asynccontextmanager
    async def _place(self) -> AsyncIterator[bool]:
        """Whether one more command may run at once: a phone that forks for ever stops here."""
        self._running += 1
        try:
            yield self._running <= MAX_RUNNING
        finally:
            self._running -= 1


_Interactive = Terminal | ScriptInput | Console


class _Errors:
    """A terminal's error output as a sink."""

    def __init__(self, terminal: Terminal) -> None:
        self._terminal = terminal

    async def write(self, output: bytes) -> None:
        await self._terminal.write_error(output)
