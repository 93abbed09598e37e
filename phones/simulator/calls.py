"""How the phone's commands are called: their arguments, streams and the words of common complaints."""

from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from phones.simulator.files import PhoneFileError, resolve
from phones.simulator.streams import FileSource, Nothing, Sink, Source

if TYPE_CHECKING:
    from phones.simulator.phone import Phone

MAX_NESTING = 24
MAX_LINE_BYTES = 1 << 20

DEFAULT_ENVIRONMENT = {
    "ANDROID_DATA": "/data",
    "ANDROID_ROOT": "/system",
    "ANDROID_STORAGE": "/storage",
    "EXTERNAL_STORAGE": "/sdcard",
    "HOME": "/",
    "HOSTNAME": "localhost",
    "LOGNAME": "shell",
    "PATH": "/product/bin:/apex/com.android.runtime/bin:/system/bin:/system/xbin:/vendor/bin",
    "SHELL": "/bin/sh",
    "TERM": "xterm",
    "TMPDIR": "/data/local/tmp",
    "USER": "shell",
}


class UsageFault(Exception):
    """A command was called wrongly; the text follows its name on stderr."""


@dataclass(slots=True)
class Session:
    """What one running shell remembers. `depth` counts the shells around it."""

    directory: str = "/"
    variables: dict[str, str] = field(default_factory=lambda: dict(DEFAULT_ENVIRONMENT))
    exported: set[str] = field(default_factory=lambda: set(DEFAULT_ENVIRONMENT))
    arguments: tuple[str, ...] = ()
    status: int = 0
    depth: int = 0

    def copy(self) -> "Session":
        """A shell inside this one, which changes nothing out here."""
        return Session(
            self.directory,
            dict(self.variables),
            set(self.exported),
            self.arguments,
            self.status,
            self.depth + 1,
        )


@dataclass(frozen=True, slots=True)
class Streams:
    """A command's input, output and error output."""

    stdin: Source
    stdout: Sink
    stderr: Sink


@dataclass(frozen=True, slots=True)
class Call:
    """One command as it is called. `arguments` are without its name."""

    phone: "Phone"
    session: Session
    name: str
    arguments: tuple[str, ...]
    streams: Streams

    async def write(self, output: str | bytes) -> None:
        await self.streams.stdout.write(output if isinstance(output, bytes) else to_bytes(output))

    async def complain(self, message: str) -> None:
        """Write the message to stderr as it stands, with a newline."""
        await self.streams.stderr.write(to_bytes(message + "\n"))

    async def fail(self, message: str, code: int = 1) -> int:
        """Complain in the command's own name."""
        await self.complain(f"{self.name}: {message}")
        return code

    async def complain_of(self, path: str, fault: PhoneFileError) -> int:
        """Complain of a file by the name it was called, and return 1."""
        return await self.fail(f"{path}: {reason(fault)}")

    def path(self, argument: str) -> str:
        """The phone's absolute path for an argument. Raises PhoneFileError."""
        return resolve(argument, self.session.directory, follow=False)

    def renamed(self, name: str, arguments: tuple[str, ...]) -> "Call":
        """The same call with another name and arguments."""
        return Call(self.phone, self.session, name, arguments, self.streams)

    async def chunks(self, path: str) -> AsyncGenerator[bytes, None]:
        """A file's content, or the input's for `-`. Raises PhoneFileError."""
        if path == "-":
            while chunk := await self.streams.stdin.read():
                yield chunk
            return
        source = await open_source(self.phone, self.path(path))
        try:
            while chunk := await source.read():
                yield chunk
        finally:
            if isinstance(source, FileSource):
                await source.close()

    async def lines(self, path: str) -> AsyncGenerator[bytes, None]:
        """A file's lines with their line ends; one longer than 1 MiB comes in pieces."""
        rest = b""
        async with aclosing(self.chunks(path)) as chunks:
            async for chunk in chunks:
                *whole, rest = (rest + chunk).split(b"\n")
                for line in whole:
                    yield line + b"\n"
                if len(rest) > MAX_LINE_BYTES:
                    yield rest
                    rest = b""
        if rest:
            yield rest


Command = Callable[[Call], Awaitable[int]]


async def open_source(phone: "Phone", path: str) -> Source:
    """Open a file of the phone. Raises PhoneFileError."""
    path = resolve(path)
    if path == "/dev/null":
        return Nothing()
    source = FileSource(phone.files, path)
    await source.open()
    return source


def to_bytes(text: str) -> bytes:
    """UTF-8; bytes that were no UTF-8 when they came in go out as they were."""
    try:
        return text.encode("utf-8", "surrogateescape")
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace")


def to_text(content: bytes) -> str:
    """The reverse of `to_bytes`."""
    return content.decode("utf-8", "surrogateescape")


def reason(fault: PhoneFileError) -> str:
    """Android's words for what went wrong, without the path."""
    return fault.strerror or "I/O error"


def parse_options(
    arguments: tuple[str, ...], flags: str, valued: str = ""
) -> tuple[set[str], dict[str, str], list[str]]:
    """Split a toybox command's arguments into its one-letter flags, its options with a value, and the rest.

    Raises UsageFault in toybox's words.
    """
    found: set[str] = set()
    values: dict[str, str] = {}
    rest: list[str] = []
    waiting = list(arguments)
    while waiting:
        argument = waiting.pop(0)
        if argument == "--":
            return found, values, rest + waiting
        if len(argument) < 2 or not argument.startswith("-"):
            rest.append(argument)
            continue
        for place, letter in enumerate(argument[1:], start=1):
            if letter in flags:
                found.add(letter)
                continue
            if letter not in valued:
                raise UsageFault(f"Unknown option '{argument.lstrip('-') if place == 1 else letter}'")
            value = argument[place + 1 :]
            if not value and not waiting:
                raise UsageFault(f"Missing argument to '{letter}'")
            values[letter] = value or waiting.pop(0)
            break
    return found, values, rest


def count_of(text: str) -> int:
    """A whole number from an argument. Raises UsageFault."""
    if not (text.isascii() and text.lstrip("+-").isdigit()) or len(text) > 18 or text[1:].count("-"):
        raise UsageFault(f"not integer: {text}")
    try:
        return int(text)
    except ValueError:
        raise UsageFault(f"not integer: {text}") from None
