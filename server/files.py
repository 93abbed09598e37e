"""Files on their way in and out: a multipart upload to disk, a stored object to the reader."""

import asyncio
import hashlib
from collections.abc import AsyncIterator
from dataclasses import dataclass
from pathlib import Path

from aiohttp import BodyPartReader, hdrs, web

from server.errors import Code, Problem
from server.i18n import N_
from server.storage import Storage, content_disposition

CHUNK_BYTES = 256 << 10
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


def _wanted_range(request: web.Request, size_bytes: int) -> tuple[int, int]:
    """First byte and the one after the last."""
    try:
        start, end, _ = request.http_range.indices(size_bytes)
    except ValueError:
        raise Problem(Code.RANGE_NOT_SATISFIABLE) from None
    if start >= end:
        raise Problem(Code.RANGE_NOT_SATISFIABLE)
    return start, end
