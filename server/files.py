"""Files on their way in and out: uploads to disk or as they come, stored objects and streams to readers."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from aiohttp import BodyPartReader, hdrs, web

from server.errors import Code, Problem
from server.i18n import N_
from server.storage import Storage, content_disposition

CHUNK_BYTES = 256 << 10
STALL_S: Final = 30.0
_AHEAD_BYTES = 64 << 10
_MULTIPART_ROOM_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class ReceivedFile:
    """A file that arrived whole."""

    path: Path
    size_bytes: int
    sha256: str


async def receive_file(request: web.Request, path: Path, *, limit_mb: int) -> ReceivedFile:
    """Write the part `file` of a multipart body to `path`, which the caller removes.

    Raises Problem: malformed, unsupported_media_type, too_large (before reading where the length is said).
    """
    too_large = Problem(Code.TOO_LARGE, N_("The file is larger than {limit} MB."), limit=limit_mb)
    limit = limit_mb << 20
    if (request.content_length or 0) > limit + _MULTIPART_ROOM_BYTES:
        raise too_large
    part = await _file_part(request)
    digest, size_bytes = hashlib.sha256(), 0
    file = await asyncio.to_thread(path.open, "wb")
    try:
        while chunk := await part.read_chunk(CHUNK_BYTES):
            size_bytes += len(chunk)
            if size_bytes > limit:
                raise too_large
            digest.update(chunk)
            await asyncio.to_thread(file.write, chunk)
    finally:
        await asyncio.to_thread(file.close)
    return ReceivedFile(path, size_bytes, digest.hexdigest())


def receive_stream(request: web.Request, *, limit_mb: int) -> AsyncIterator[bytes]:
    """A raw body of any media type, piece by piece; its sender waits while a piece is used.

    Raises Problem: too_large (at once where the length is said), and while it is read, malformed for
    a sender that leaves or is silent for 30 s.
    """
    too_large = Problem(Code.TOO_LARGE, N_("The file is larger than {limit} MB."), limit=limit_mb)
    if (request.content_length or 0) > limit_mb << 20:
        raise too_large
    if hdrs.CONTENT_RANGE in request.headers:
        raise Problem(Code.MALFORMED, N_("Send the whole file, without Content-Range."))
    return _pieces(request, limit_mb << 20, too_large)


async def _pieces(request: web.Request, limit_bytes: int, too_large: Problem) -> AsyncIterator[bytes]:
    left = limit_bytes
    while True:
        try:
            async with asyncio.timeout(STALL_S):
                piece = await request.content.readany()
        except TimeoutError:
            raise Problem(Code.MALFORMED, N_("The rest of the file did not come in time.")) from None
        if not piece:
            return
        left -= len(piece)
        if left < 0:
            raise too_large
        yield piece


async def _file_part(request: web.Request) -> BodyPartReader:
    if request.content_type != "multipart/form-data":
        raise Problem(Code.UNSUPPORTED_MEDIA_TYPE, N_("Send the file as multipart/form-data."))
    try:
        part = await (await request.multipart()).next()
    except (ValueError, AssertionError):
        raise Problem(Code.MALFORMED, N_("The multipart body cannot be read.")) from None
    if not isinstance(part, BodyPartReader) or part.name != "file":
        raise Problem(Code.MALFORMED, N_("The body needs one part named file."))
    return part


async def read_file(path: Path) -> AsyncIterator[bytes]:
    """A file's content in pieces, read off the loop."""
    file = await asyncio.to_thread(path.open, "rb")
    try:
        while chunk := await asyncio.to_thread(file.read, CHUNK_BYTES):
            yield chunk
    finally:
        await asyncio.to_thread(file.close)


def empty_folder(folder: Path) -> None:
    """Make a folder and remove every file in it. Blocking."""
    folder.mkdir(parents=True, exist_ok=True)
    for left in folder.iterdir():
        left.unlink()


async def send_object(
    request: web.Request, storage: Storage, key: str, *, size_bytes: int, media: str, filename: str
) -> web.StreamResponse:
    """Stream a stored object, or the part of it that a Range header asks for (RFC 9110, section 14).

    Raises Problem(range_not_satisfiable).
    """
    start, end = _wanted_range(request, size_bytes)
    response = web.StreamResponse(status=206 if hdrs.RANGE in request.headers else 200)
    response.content_type = media
    response.content_length = end - start
    response.headers[hdrs.ACCEPT_RANGES] = "bytes"
    response.headers[hdrs.CONTENT_DISPOSITION] = content_disposition(filename)
    if response.status == 206:
        response.headers[hdrs.CONTENT_RANGE] = f"bytes {start}-{end - 1}/{size_bytes}"
    await response.prepare(request)
    async for chunk in storage.read(key, start=start, end=end):
        await response.write(chunk)
    await response.write_eof()
    return response


async def send_stream(
    request: web.Request, pieces: AsyncIterator[bytes], *, size_bytes: int, filename: str
) -> web.StreamResponse:
    """Stream a file that may be longer or shorter than it is said to be.

    One of up to 64 KiB is answered with its true length, a longer one with the length it is said to have:
    growing meanwhile does not make it longer, and where it ends before, the connection is cut. Where the
    said length cannot be true the answer is chunked. What `pieces` raise within the first 64 KiB comes
    before the answer begins, so that it can be answered. A reader who takes nothing for 30 s is cut off.
    """
    ahead, ended = await _read_ahead(pieces)
    response = web.StreamResponse()
    response.content_type = "application/octet-stream"
    response.headers[hdrs.CONTENT_DISPOSITION] = content_disposition(filename)
    response.headers[hdrs.CACHE_CONTROL] = "no-store"
    response.headers["Content-Security-Policy"] = "default-src 'none'; sandbox"
    if ended:
        response.content_length = len(ahead)
    elif size_bytes > len(ahead):
        response.content_length = size_bytes
    await response.prepare(request)
    await _send(response, ahead)
    if not ended:
        await _send_rest(response, pieces, sent_bytes=len(ahead))
    await response.write_eof()
    return response


async def _read_ahead(pieces: AsyncIterator[bytes]) -> tuple[bytes, bool]:
    """The first 64 KiB or more, and whether they are all there is."""
    ahead = bytearray()
    async for piece in pieces:
        ahead += piece
        if len(ahead) > _AHEAD_BYTES:
            return bytes(ahead), False
    return bytes(ahead), True


async def _send_rest(response: web.StreamResponse, pieces: AsyncIterator[bytes], *, sent_bytes: int) -> None:
    """Send up to the length that was promised. Raises ConnectionAbortedError where the file ends before."""
    promised = response.content_length
    async for piece in pieces:
        if promised is not None and sent_bytes + len(piece) >= promised:
            await _send(response, piece[: promised - sent_bytes])
            return
        await _send(response, piece)
        sent_bytes += len(piece)
    if promised is not None:
        raise ConnectionAbortedError("the file ended before its length")


async def _send(response: web.StreamResponse, piece: bytes) -> None:
    async with asyncio.timeout(STALL_S):
        await response.write(piece)


def _wanted_range(request: web.Request, size_bytes: int) -> tuple[int, int]:
    """First byte and the one after the last."""
    try:
        start, end, _ = request.http_range.indices(size_bytes)
    except ValueError:
        raise Problem(Code.RANGE_NOT_SATISFIABLE) from None
    if start >= end:
        raise Problem(Code.RANGE_NOT_SATISFIABLE)
    return start, end
