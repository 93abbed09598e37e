"""The simulated phone's adbd: what a real `adb`, or our own client, talks to.

It speaks without keys, so whoever reaches its port owns the phone: bind it to loopback. It reaches
nothing of the host: `tcp:` and `local:` services are refused, and forwarded ports exist on the
phone's side only as names. Source: AOSP packages/modules/adb, SERVICES.TXT and daemon/.
"""

import asyncio
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from phones.simulator.filesync import FileSync
from phones.wire import (
    FRAME_HEADER_BYTES,
    READ_BUFFER_BYTES,
    AdbRefused,
    Connection,
    Service,
    ShellChannel,
    ShellFrames,
    Stream,
    shell_frame,
)

if TYPE_CHECKING:
    from phones.simulator.phone import Phone

log = logging.getLogger(__name__)

FEATURES = "shell_v2,cmd,stat_v2,ls_v2,fixed_push_mkdir,sendrecv_v2"
CONNECTIONS_MAX = 64
REVERSES_MAX = 64
# adb exec-in closes as soon as its input is sent; the command then still has it to use.
_EXEC_LINGER_S = 5.0
_FIRST_FREE_PORT = 40000


class Adbd:
    """The phone's ADB daemon.

    `on_reboot` is told when a host asks for a restart, with the mode ("" or "recovery"); every
    connection is ended then.
    """

    def __init__(self, phone: "Phone", *, on_reboot: Callable[[str], None] | None = None) -> None:
        self.port = 0
        """The port it listens on, once it does."""
        self._phone = phone
        self._on_reboot = on_reboot
        self._server: asyncio.Server | None = None
        self._peers: dict[asyncio.Task[None], _Peer] = {}
        self._sockets: dict[str, Service] = {}
        self._last_serial = 0

    async def serve(self, host: str, port: int) -> None:
        """Start to listen; 0 picks a free port. Raises OSError when the port is taken."""
        self._server = await asyncio.start_server(
            self._welcome, host, port, limit=READ_BUFFER_BYTES, start_serving=False
        )
        await self._server.start_serving()
        self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        """Stop listening and hang up on everybody."""
        if self._server is not None:
            self._server.close()
        await self.hang_up()
        if self._server is not None:
            await self._server.wait_closed()
            self._server = None

    async def hang_up(self) -> None:
        """End every connection, as a restart of the phone does; who connects again is welcome."""
        leaving = list(self._peers)
        for task in leaving:
            task.cancel()
        if leaving:
            await asyncio.wait(leaving)

    def listen(self, name: str, service: Service) -> None:
        """Open the abstract socket `name` on the phone: hosts reach it as `localabstract:name`.

        Raises ValueError when the name is in use.
        """
        if name in self._sockets:
            raise ValueError(f"the phone's socket {name!r} is in use")
        self._sockets[name] = service

    def unlisten(self, name: str) -> None:
        """Close the abstract socket `name`; connections it has made go on."""
        self._sockets.pop(name, None)

    async def dial(self, local: str) -> Stream:
        """Connect from the phone to `local` (`localabstract:scrcpy`), which a host has reversed to itself.

        Raises AdbRefused when no host has, or when the host has nothing there.
        """
        for peer in self._peers.values():
            if (remote := peer.reverses.get(local)) is not None:
                return await peer.connection.open(remote)
        raise AdbRefused(f"nothing listens on {local!r}")

    def _welcome(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        if self._server is None or not self._server.is_serving() or len(self._peers) >= CONNECTIONS_MAX:
            writer.transport.abort()
            return
        self._last_serial += 1
        peer = _Peer(self, f"host-{self._last_serial}")
        peer.connection = Connection(
            reader, writer, role="device", banner=self._banner(), services=peer.service
        )
        attending = peer.connection.start()
        self._peers[attending] = peer
        attending.add_done_callback(self._part)

    def _part(self, attending: asyncio.Task[None]) -> None:
        del self._peers[attending]
        if not attending.cancelled() and (fault := attending.exception()) is not None:
            log.error("an adb connection failed", exc_info=fault)

    def _banner(self) -> str:
        names = ("ro.product.name", "ro.product.model", "ro.product.device")
        spaced = str.maketrans(";=\0", "   ")
        described = "".join(
            f"{name}={self._phone.properties.get(name, '').translate(spaced)};" for name in names
        )
        return f"device::{described}features={FEATURES}"

    def find(self, name: str, peer: "_Peer") -> Service | None:
        """The service a host asks for by name, or None to refuse it."""
        kind, _, argument = name.partition(":")
        kind, *options = kind.split(",")
        match kind:
            case "shell":
                return self._shell(argument, options)
            case "exec":
                return self._exec(argument)
            case "sync":
                return FileSync(self._phone.files).serve
            case "localabstract":
                return self._sockets.get(argument)
            case "reverse":
                return _say(peer.reverse(argument))
            case "reboot":
                return self._reboot(argument)
            case "root":
                return _say(b"adbd cannot run as root in production builds\n")
            case "unroot":
                return _say(b"adbd not running as root\n")
            case "remount":
                return _say(b'Not running as root. Try "adb root" first.\n')
            case _:
                return None

    def _shell(self, command: str, options: list[str]) -> Service:
        # A command without a terminal of its own gets one only when asked; a shell always does.
        typed = "pty" in options or (not command and "raw" not in options)

        async def serve(stream: Stream) -> None:
            terminal: RawTerminal | FramedTerminal
            if "v2" not in options:
                terminal = RawTerminal(stream)
            elif command and typed:
                terminal = TypedTerminal(stream)
            else:
                terminal = FramedTerminal(stream)
            if command:
                code = await self._phone.shell.run(command, terminal)
            else:
                code = await self._phone.shell.interact(terminal, echo=typed)
            await terminal.exit(code)

        return serve

    def _exec(self, command: str) -> Service:
        async def serve(stream: Stream) -> None:
            stream.linger_s = _EXEC_LINGER_S
            await self._phone.shell.run(command, RawTerminal(stream))

        return serve

    def _reboot(self, mode: str) -> Service:
        async def serve(stream: Stream) -> None:
            stream.close()
            if self._on_reboot is not None:
                self._on_reboot(mode)
            await self.hang_up()

        return serve


class _Peer:
    """One connected host: its name on the phone, and the phone's sockets it wants to itself."""

    connection: Connection

    def __init__(self, adbd: Adbd, serial: str) -> None:
        self.reverses: dict[str, str] = {}
        self._adbd = adbd
        self._serial = serial

    def service(self, name: str) -> Service | None:
        """The service this host asks for."""
        return self._adbd.find(name, self)

    def reverse(self, request: str) -> bytes:
        """Do what a `reverse:` service asks and return its answer."""
        verb, _, argument = request.partition(":")
        match verb:
            case "forward":
                return self._add_reverse(argument)
            case "killforward":
                if self.reverses.pop(argument, None) is None:
                    return _failure(f"listener '{argument}' not found")
                return b"OKAY"
            case "killforward-all":
                self.reverses.clear()
                return b"OKAY"
            case "list-forward":
                # Without an OKAY before it, unlike every other answer: adb would show nothing.
                return _counted("".join(f"{self._serial} {a} {b}\n" for a, b in self.reverses.items()))
            case _:
                return _failure(f"unknown reverse request '{verb}'")

    def _add_reverse(self, argument: str) -> bytes:
        norebind = argument.startswith("norebind:")
        local, separator, remote = argument.removeprefix("norebind:").partition(";")
        if not separator or not remote or ":" not in local:
            return _failure(f"bad reverse forward: {argument}")
        if norebind and local in self.reverses:
            return _failure("cannot rebind existing socket")
        if local not in self.reverses and len(self.reverses) >= REVERSES_MAX:
            return _failure("too many listeners")
        if local != "tcp:0":
            self.reverses[local] = remote
            return b"OKAY"
        port = next(free for free in range(_FIRST_FREE_PORT, 65536) if f"tcp:{free}" not in self.reverses)
        self.reverses[f"tcp:{port}"] = remote
        return b"OKAY" + _counted(str(port))


class RawTerminal:
    """A shell's terminal on a plain stream: output and errors are one."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream

    async def read(self) -> bytes:
        return await self._stream.read()

    async def write(self, output: bytes) -> None:
        await self._stream.write(output)

    async def write_error(self, output: bytes) -> None:
        await self._stream.write(output)

    async def exit(self, _code: int) -> None:
        """The end of the stream is all that tells of the command's end."""


class FramedTerminal:
    """A shell's terminal in shell,v2 frames: output, errors and exit code apart."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._frames = ShellFrames()
        self._typed: list[bytes] = []
        self._ended = False

    async def read(self) -> bytes:
        while not self._typed and not self._ended:
            piece = await self._stream.read()
            self._ended = not piece
            for channel, content in self._frames.feed(piece):
                if channel == ShellChannel.STDIN and content and not self._ended:
                    self._typed.append(content)
                elif channel == ShellChannel.CLOSE_STDIN:
                    self._ended = True
        typed = b"".join(self._typed)
        self._typed.clear()
        return typed

    async def write(self, output: bytes) -> None:
        await self._send(ShellChannel.STDOUT, output)

    async def write_error(self, output: bytes) -> None:
        await self._send(ShellChannel.STDERR, output)

    async def exit(self, code: int) -> None:
        """Tell how the command ended."""
        await self._stream.write(shell_frame(ShellChannel.EXIT, bytes([code & 0xFF])))

    async def _send(self, channel: ShellChannel, output: bytes) -> None:
        # A frame is one packet, so that output and errors written at once do not mix.
        room = self._stream.max_payload - FRAME_HEADER_BYTES
        for start in range(0, len(output), room):
            await self._stream.write(shell_frame(channel, output[start : start + room]))


class TypedTerminal(FramedTerminal):
    """The terminal of one command that a person watches (`adb shell -t`): their own terminal is raw."""

    async def write(self, output: bytes) -> None:
        await super().write(output.replace(b"\n", b"\r\n"))

    async def write_error(self, output: bytes) -> None:
        await self.write(output)


def _say(answer: bytes) -> Service:
    async def serve(stream: Stream) -> None:
        await stream.write(answer)

    return serve


def _counted(text: str) -> bytes:
    """ADB's host-side string: four hex digits of length, and the text."""
    content = text.encode("utf-8", "surrogateescape")[:0xFFFF]
    return b"%04x" % len(content) + content


def _failure(text: str) -> bytes:
    return b"FAIL" + _counted(text)
