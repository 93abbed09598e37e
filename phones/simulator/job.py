"""Runs what `syntax.parse` has read: walks the tree, joins the streams, calls the commands."""

import asyncio
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import AbstractAsyncContextManager
from typing import TYPE_CHECKING, Any, TypeVar

from phones.simulator import syntax
from phones.simulator.calls import (
    MAX_NESTING,
    Call,
    Session,
    Streams,
    UsageFault,
    open_source,
    reason,
    to_text,
)
from phones.simulator.commands.registry import COMMANDS
from phones.simulator.console import Console, ScriptInput
from phones.simulator.expansion import Expansion, ExpansionFault
from phones.simulator.files import PhoneFileError, resolve
from phones.simulator.shell_builtins import Exit, change_directory, complain, end_shell, export, unset
from phones.simulator.streams import (
    BrokenPipe,
    Collected,
    FileSink,
    FileSource,
    Nothing,
    Pipe,
    Sink,
    Source,
)

if TYPE_CHECKING:
    from phones.simulator.phone import Phone

MAX_COMMAND_LENGTH = 128 << 10
MAX_SUBSTITUTED_BYTES = 1 << 20
SIGPIPE_STATUS = 141
PROGRAM_DIRECTORIES = ("/system/bin", "/system/xbin", "/vendor/bin", "/product/bin")

Node = TypeVar("Node")
Place = Callable[[], AbstractAsyncContextManager[bool]]


class Job:
    """One shell at work. `place()` says whether one more command may run on the phone."""

    def __init__(self, phone: "Phone", streams: Streams, place: Place) -> None:
        self._phone = phone
        self._place = place
        self._streams = streams
        self._session = Session()
        self._background: set[asyncio.Task[int]] = set()
        self._builtins: dict[str, Callable[[Call], Awaitable[int]]] = {
            ".": self._source,
            "cd": change_directory,
            "command": self._command_builtin,
            "eval": self._eval,
            "exec": self._exec,
            "exit": end_shell,
            "export": export,
            "sh": self._sh,
            "source": self._source,
            "unset": unset,
            "wait": self._wait,
            "which": self._which,
        }

    # The three ways in.

    async def run(self, text: str) -> int:
        """Run a whole command line."""
        return await _contained(self._text(text, self._session, self._streams))

    async def run_lines(self, script: ScriptInput) -> int:
        """Run the input line by line, as a shell reads a script."""

        async def lines() -> int:
            while (line := await script.line()) is not None:
                self._session.status = await self._text(line, self._session, self._streams)
            return self._session.status

        return await _contained(lines())

    async def run_console(self, console: Console) -> int:
        """Prompt, read a line, run it."""
        while True:
            line = await console.line(f"{self._phone.device}:{self._session.directory} $ ")
            if line is None:
                return self._session.status
            running = asyncio.create_task(self._text(line, self._session, self._streams))
            try:
                self._session.status = await console.watch(running)
            except Exit as end:
                return end.status

    async def finish_background(self) -> None:
        """Wait for what `&` has left running."""
        while self._background:
            await asyncio.wait(set(self._background))

    async def end_background(self) -> None:
        """Cancel what is still running."""
        running = set(self._background)
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)

    # The tree.

    async def _text(self, text: str, session: Session, streams: Streams) -> int:
        if len(text) > MAX_COMMAND_LENGTH:
            return await complain(streams, "argument list too long", 126)
        try:
            script = syntax.parse(text)
        except syntax.ShellSyntaxError as fault:
            return await complain(streams, str(fault), 1)
        return await self._script(script, session, streams)

    async def _script(self, script: syntax.Script, session: Session, streams: Streams) -> int:
        status = 0
        for entry in script.entries:
            if entry.background:
                self._start_background(entry, session, streams)
                status = 0
            else:
                status = await self._and_or(entry, session, streams)
            session.status = status
        return status

    def _start_background(self, entry: syntax.AndOr, session: Session, streams: Streams) -> None:
        beside = Streams(Nothing(), streams.stdout, streams.stderr)
        task = asyncio.create_task(self._apart(self._and_or, entry, session, beside))
        self._background.add(task)
        task.add_done_callback(self._background.discard)

    async def _and_or(self, entry: syntax.AndOr, session: Session, streams: Streams) -> int:
        status = await self._pipeline(entry.first, session, streams)
        for operator, pipeline in entry.rest:
            session.status = status
            if (status == 0) == (operator == "&&"):
                status = await self._pipeline(pipeline, session, streams)
        return status

    async def _pipeline(self, pipeline: syntax.Pipeline, session: Session, streams: Streams) -> int:
        if len(pipeline.commands) == 1:
            status = await self._command(pipeline.commands[0], session, streams)
        else:
            status = await self._joined(pipeline.commands, session, streams)
        return int(status == 0) if pipeline.negated else status

    async def _joined(
        self, commands: tuple[syntax.Simple | syntax.Group, ...], session: Session, streams: Streams
    ) -> int:
        pipes = [Pipe() for _ in commands[1:]]
        sources: list[Source] = [streams.stdin, *pipes]
        sinks: list[Sink] = [*pipes, streams.stdout]
        return (
            await _together(
                [
                    self._stage(command, session, Streams(source, sink, streams.stderr))
                    for command, source, sink in zip(commands, sources, sinks, strict=True)
                ]
            )
        )[-1]

    async def _stage(self, command: syntax.Simple | syntax.Group, session: Session, streams: Streams) -> int:
        try:
            return await self._apart(self._command, command, session, streams)
        finally:
            if isinstance(streams.stdin, Pipe):
                streams.stdin.leave()
            if isinstance(streams.stdout, Pipe):
                streams.stdout.end()

    async def _apart(
        self,
        run: Callable[[Node, Session, Streams], Coroutine[Any, Any, int]],
        node: Node,
        session: Session,
        streams: Streams,
    ) -> int:
        """Run in a copy of the shell, out of which neither `exit` nor a variable comes."""
        inner = session.copy()
        if inner.depth > MAX_NESTING:
            return await complain(streams, "too many nested shells", 1)
        return await _contained(run(node, inner, streams))

    async def _command(self, node: syntax.Simple | syntax.Group, session: Session, streams: Streams) -> int:
        async def body(redirected: Streams) -> int:
            if isinstance(node, syntax.Simple):
                return await self._simple(node, session, redirected)
            if node.own_shell:
                return await self._apart(self._script, node.script, session, redirected)
            return await self._script(node.script, session, redirected)

        try:
            return await self._redirected(node.redirects, session, streams, body)
        except ExpansionFault as fault:
            return await complain(streams, str(fault), 126)

    async def _redirected(
        self,
        redirects: tuple[syntax.Redirect, ...],
        session: Session,
        streams: Streams,
        body: Callable[[Streams], Awaitable[int]],
    ) -> int:
        opened: list[FileSource | FileSink] = []
        try:
            for redirect in redirects:
                target = await self._expansion(session, streams).text(redirect.target)
                try:
                    streams = await self._open(redirect, target, session, streams, opened)
                except PhoneFileError as fault:
                    verb = "open" if redirect.kind == "<" else "create"
                    return await complain(streams, f"can't {verb} {target}: {reason(fault)}", 1)
                except UsageFault as fault:
                    return await complain(streams, str(fault), 1)
            ended: Exception | None = None
            status = 1
            try:
                status = await body(streams)
            except (Exit, BrokenPipe) as end:
                ended = end
            for file in opened:
                try:
                    await file.close()
                except PhoneFileError as fault:
                    status = await complain(self._streams, f"write error: {reason(fault)}", 1)
            if ended is not None:
                raise ended
            return status
        finally:
            for file in opened:
                await file.abandon()

    async def _open(
        self,
        redirect: syntax.Redirect,
        target: str,
        session: Session,
        streams: Streams,
        opened: list[FileSource | FileSink],
    ) -> Streams:
        if redirect.kind == ">&":
            sinks = {"1": streams.stdout, "2": streams.stderr}
            if target not in sinks:
                raise UsageFault(f"{target}: bad file descriptor")
            return _with_sink(streams, redirect.descriptor, sinks[target])
        path = resolve(target, session.directory)
        if redirect.kind == "<":
            source = await open_source(self._phone, path)
            if isinstance(source, FileSource):
                opened.append(source)
            return Streams(source, streams.stdout, streams.stderr)
        if path == "/dev/null":
            return _with_sink(streams, redirect.descriptor, Nothing())
        sink = FileSink(self._phone.files, path, append=redirect.kind == ">>")
        opened.append(sink)
        await sink.open()
        return _with_sink(streams, redirect.descriptor, sink)

    def _expansion(self, session: Session, streams: Streams) -> Expansion:
        async def substitute(script: syntax.Script) -> str:
            collected = Collected(MAX_SUBSTITUTED_BYTES)
            inner = Streams(streams.stdin, collected, streams.stderr)
            session.status = await self._apart(self._script, script, session, inner)
            return to_text(bytes(collected.content).replace(b"\0", b"")).rstrip("\n")

        return Expansion(self._phone.files, session, substitute)

    async def _simple(self, node: syntax.Simple, session: Session, streams: Streams) -> int:
        before = session.status
        session_status = 0
        expansion = self._expansion(session, streams)
        words = await expansion.arguments(node.words)
        values = {}
        for name, word in node.assignments:
            session.status = before
            values[name] = await expansion.text(word)
            substituted = any(isinstance(part, syntax.Substitution) for part in word)
            session_status = session.status if substituted else session_status
        if not words:
            session.variables.update(values)
            return session_status
        if values:
            session = _with_variables(session, values)
        return await self._run_words(words, session, streams)

    async def _run_words(self, words: tuple[str, ...], session: Session, streams: Streams) -> int:
        call = Call(self._phone, session, words[0], words[1:], streams)
        async with self._place() as may_run:
            if not may_run:
                return await complain(streams, "can't fork - try again", 1)
            try:
                return await self._run_call(call)
            except UsageFault as fault:
                return await call.fail(str(fault))
            except PhoneFileError as fault:
                return await call.fail(f"{fault.filename}: {reason(fault)}")
            except BrokenPipe:
                return SIGPIPE_STATUS

    async def _run_call(self, call: Call) -> int:
        builtin = self._builtins.get(call.name)
        if builtin is not None:
            return await builtin(call)
        name = call.name
        if "/" in name:
            directory, _, last = resolve(name, call.session.directory).rpartition("/")
            if directory not in PROGRAM_DIRECTORIES:
                return await self._run_file(call)
            name = last
        if name == "sh":
            return await self._sh(call)
        command = COMMANDS.get(name)
        if command is None:
            return await complain(call.streams, f"{call.name}: not found", 127)
        return await command(call.renamed(name, call.arguments))

    async def _run_file(self, call: Call) -> int:
        """A file that is executable is a script: the phone has no other programs."""
        try:
            file = await self._phone.files.stat(call.path(call.name))
        except PhoneFileError:
            return await complain(call.streams, f"{call.name}: not found", 127)
        if file.is_directory or not file.mode & 0o111:
            return await complain(call.streams, f"{call.name}: can't execute: Permission denied", 126)
        return await self._script_file(call, call.name, call.arguments)

    async def _script_file(self, call: Call, path: str, arguments: tuple[str, ...]) -> int:
        content = bytearray()
        async for chunk in call.chunks(path):
            content += chunk
            if len(content) > MAX_COMMAND_LENGTH:
                break
        if b"\0" in content:
            return await complain(call.streams, f"{path}: can't execute: Exec format error", 126)
        call.session.arguments, before = arguments, call.session.arguments
        try:
            return await self._apart(self._text, to_text(bytes(content)), call.session, call.streams)
        finally:
            call.session.arguments = before

    # The commands that are the shell's own, since they change it or run others.

    async def _sh(self, call: Call) -> int:
        arguments = call.arguments
        if not arguments:
            return await self._script_file(call, "-", ())
        if arguments[0] != "-c":
            try:
                return await self._script_file(call, arguments[0], arguments[1:])
            except PhoneFileError as fault:
                return await complain(call.streams, f"{arguments[0]}: {reason(fault)}", 127)
        if len(arguments) < 2:
            return await complain(call.streams, "-c: requires an argument", 1)
        return await self._apart(self._text, arguments[1], call.session, call.streams)

    async def _eval(self, call: Call) -> int:
        return await self._deeper(" ".join(call.arguments), call)

    async def _source(self, call: Call) -> int:
        if not call.arguments:
            return await call.fail("missing argument")
        content = b"".join([chunk async for chunk in call.chunks(call.arguments[0])])
        return await self._deeper(to_text(content), call)

    async def _deeper(self, text: str, call: Call) -> int:
        """Run text in this very shell, counting the nesting."""
        if call.session.depth >= MAX_NESTING:
            return await complain(call.streams, "too many nested shells", 1)
        call.session.depth += 1
        try:
            return await self._text(text, call.session, call.streams)
        finally:
            call.session.depth -= 1

    async def _exec(self, call: Call) -> int:
        if not call.arguments:
            return 0
        raise Exit(await self._nested(call))

    async def _command_builtin(self, call: Call) -> int:
        if call.arguments[:1] != ("-v",):
            return await self._nested(call) if call.arguments else 0
        status = 0
        for name in call.arguments[1:]:
            if name in self._builtins:
                await call.write(name + "\n")
            elif name in COMMANDS:
                await call.write(f"/system/bin/{name}\n")
            else:
                status = 1
        return status

    async def _which(self, call: Call) -> int:
        found = [name for name in call.arguments if name in COMMANDS or name == "sh"]
        await call.write("".join(f"/system/bin/{name}\n" for name in found))
        return 0 if found and len(found) == len(call.arguments) else 1

    async def _nested(self, call: Call) -> int:
        """Run the call's arguments as a command of their own."""
        inner = call.session.copy()
        if inner.depth > MAX_NESTING:
            return await complain(call.streams, "too many nested shells", 1)
        return await self._run_words(call.arguments, inner, call.streams)

    async def _wait(self, call: Call) -> int:
        await self.finish_background()
        return 0


def _with_variables(session: Session, values: dict[str, str]) -> Session:
    """A shell for one command that sees these variables; what the command changes stays in it."""
    inner = session.copy()
    inner.depth = session.depth
    inner.variables.update(values)
    inner.exported.update(values)
    return inner


def _with_sink(streams: Streams, descriptor: int, sink: Sink) -> Streams:
    if descriptor == 2:
        return Streams(streams.stdin, streams.stdout, sink)
    return Streams(streams.stdin, sink, streams.stderr)


async def _contained(running: Coroutine[Any, Any, int]) -> int:
    """A shell's exit code, however it ended."""
    try:
        return await running
    except Exit as end:
        return end.status
    except BrokenPipe:
        return SIGPIPE_STATUS


async def _together(stages: Sequence[Coroutine[Any, Any, int]]) -> list[int]:
    """Run all at once; when one fails or the caller is cancelled, the others end first."""
    tasks = [asyncio.create_task(stage) for stage in stages]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
