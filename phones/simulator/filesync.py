"""The `sync:` service of the simulated phone: push, pull and listings. Records in phones/sync.py."""

import errno
import stat
from collections.abc import AsyncIterator

from phones import sync
from phones.simulator.files import PhoneFile, PhoneFileError, PhoneFiles
from phones.wire import Stream

# One packet of DATA records. A packet each would wait for an answer each.
_BATCH_BYTES = 14 * sync.CHUNK_BYTES


class _Garbled(Exception):
    """A request that breaks the protocol: the phone says so and ends the session."""


class FileSync:
    """One session of the sync service: requests one after the other until QUIT or the stream's end."""

    def __init__(self, files: PhoneFiles) -> None:
        self._files = files

    async def serve(self, stream: Stream) -> None:
        """Answer requests. Raises AdbFault when the host goes away."""
        try:
            while await self._answer(stream):
                pass
        except _Garbled as fault:
            await _fail(stream, str(fault))

    async def _answer(self, stream: Stream) -> bool:
        word, length = sync.REQUEST.unpack(await stream.read_exactly(sync.REQUEST.size))
        if word == b"QUIT":
            return False
        if length > sync.PATH_MAX_BYTES:
            raise _Garbled("path too long")
        path = (await stream.read_exactly(length)).decode("utf-8", "surrogateescape")
        match word:
            case b"STAT":
                await self._stat(stream, path)
            case b"STA2" | b"LST2":
                await self._stat2(stream, word, path)
            case b"LIST":
                await self._list(stream, path)
            case b"LIS2":
                await self._list2(stream, path)
            case b"SEND":
                name, _, mode = path.rpartition(",")
                if not name or not mode.isascii() or not mode.isdigit():
                    raise _Garbled("bad mode")
                await self._receive(stream, name, int(mode))
            case b"SND2":
                _, file_mode, flags = sync.SEND2.unpack(await stream.read_exactly(sync.SEND2.size))
                _check_plain(flags)
                await self._receive(stream, path, file_mode)
            case b"RECV":
                await self._send(stream, path)
            case b"RCV2":
                _, flags = sync.RECV2.unpack(await stream.read_exactly(sync.RECV2.size))
                _check_plain(flags)
                await self._send(stream, path)
            case _:
                raise _Garbled(f"unknown command {word.decode('ascii', 'backslashreplace')}")
        return True

    async def _stat(self, stream: Stream, path: str) -> None:
        try:
            found = await self._files.stat(path, follow=False)
        except PhoneFileError:
            await stream.write(sync.STAT.pack(b"STAT", 0, 0, 0))
        else:
            await stream.write(sync.STAT.pack(b"STAT", *_short(found)))

    async def _stat2(self, stream: Stream, word: bytes, path: str) -> None:
        try:
            found = await self._files.stat(path, follow=word == b"STA2")
        except PhoneFileError as fault:
            await stream.write(sync.STAT2.pack(word, fault.errno or errno.EIO, *([0] * 10)))
        else:
            await stream.write(sync.STAT2.pack(word, *_long(found)))

    async def _list(self, stream: Stream, path: str) -> None:
        records = [
            sync.ENTRY.pack(b"DENT", *_short(file), len(name)) + name
            for file, name in await self._entries(path)
        ]
        await stream.write(b"".join(records) + sync.ENTRY.pack(b"DONE", 0, 0, 0, 0))

    async def _list2(self, stream: Stream, path: str) -> None:
        records = [
            sync.ENTRY2.pack(b"DNT2", *_long(file), len(name)) + name
            for file, name in await self._entries(path)
        ]
        await stream.write(b"".join(records) + sync.ENTRY2.pack(b"DONE", *([0] * 12)))

    async def _entries(self, path: str) -> list[tuple[PhoneFile, bytes]]:
        try:
            found = await self._files.list(path)
        except PhoneFileError:
            return []
        return [(file, file.name.encode("utf-8", "surrogateescape")) for file in found]

    async def _receive(self, stream: Stream, path: str, mode: int) -> None:
        incoming = _Incoming(stream)
        content = incoming.chunks()
        refusal = None
        try:
            if stat.S_IFMT(mode) not in (0, stat.S_IFREG):
                raise PhoneFileError(errno.EPERM, path)
            # adbd gives group and others what the owner has.
            shared = (mode >> 6 & 7) * 0o111
            await self._files.write(path, content, mode=shared, parents=True)
            await self._files.set_modified(path, incoming.modified_at)
        except PhoneFileError as fault:
            refusal = f"couldn't create file: {fault.strerror}"
        # The host reads no answer before it has sent everything.
        async for _ in content:
            pass
        if refusal is None:
            await stream.write(sync.REQUEST.pack(b"OKAY", 0))
        else:
            await _fail(stream, refusal)

    async def _send(self, stream: Stream, path: str) -> None:
        try:
            async for content in self._files.read(path, chunk_bytes=_BATCH_BYTES):
                await stream.write(sync.data_records(content))
        except PhoneFileError as fault:
            await _fail(stream, f"open failed: {fault.strerror}")
        else:
            await stream.write(sync.REQUEST.pack(b"DONE", 0))


class _Incoming:
    """The DATA records of one file, and the time in the DONE that ends them."""

    def __init__(self, stream: Stream) -> None:
        self.modified_at = 0
        self._stream = stream

    async def chunks(self) -> AsyncIterator[bytes]:
        """The content in large pieces. Raises _Garbled."""
        batch = bytearray()
        while True:
            word, number = sync.REQUEST.unpack(await self._stream.read_exactly(sync.REQUEST.size))
            if word == b"DATA" and number <= sync.CHUNK_BYTES:
                batch += await self._stream.read_exactly(number)
            elif word == b"DONE":
                self.modified_at = number
                break
            else:
                raise _Garbled("oversize data message" if word == b"DATA" else "invalid data message")
            if len(batch) >= _BATCH_BYTES:
                yield bytes(batch)
                batch.clear()
        if batch:
            yield bytes(batch)


def _check_plain(flags: int) -> None:
    if flags:
        raise _Garbled("compression is not supported")


def _short(file: PhoneFile) -> tuple[int, int, int]:
    return file.mode, min(file.size_bytes, 0xFFFFFFFF), file.modified_at & 0xFFFFFFFF


def _long(file: PhoneFile) -> tuple[int, ...]:
    return (
        *(0, 1, file.inode, file.mode, file.links, file.uid, file.gid, file.size_bytes),
        *(file.modified_at, file.modified_at, file.modified_at),
    )


async def _fail(stream: Stream, text: str) -> None:
    await stream.write(sync.request(b"FAIL", text.encode("utf-8", "replace")))
