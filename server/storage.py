"""The one door to S3: put, get, sign and list objects, large ones in streams.

Nothing else imports aioboto3. Only what both AWS and small S3 servers do is used: no tagging and
no conditional writes. Every call has a deadline; what botocore and aiohttp raise when the storage
is away comes out as StorageUnavailable, an absent key as ObjectMissing.
"""

import asyncio
import logging
from collections.abc import AsyncGenerator, AsyncIterator, Coroutine, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timedelta
from email.utils import parsedate_to_datetime
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple
from urllib.parse import quote, urlsplit

import aioboto3
import aiohttp
from aiobotocore.config import AioConfig
from botocore.exceptions import BotoCoreError, ClientError

if TYPE_CHECKING:
    from types_aiobotocore_s3.client import S3Client

log = logging.getLogger(__name__)

CONNECT_TIMEOUT_S = 5.0
CALL_TIMEOUT_S = 10.0
PART_TIMEOUT_S = 30.0  # moving one part, or waiting for the next piece of a stream
PING_TIMEOUT_S = 2.0
PART_BYTES = 8 << 20  # S3 asks for at least 5 MiB; parts are numbered up to 10,000
CHUNK_BYTES = 256 << 10
GET_LIMIT_BYTES = 16 << 20
PAGE_KEYS = 1000
CONNECTIONS = 32

_MISSING = {"NoSuchKey", "NoSuchUpload", "NotFound", "404"}


class StorageUnavailable(Exception):
    """The storage did not answer, or refused; what was asked may be tried again later."""


class ObjectMissing(Exception):
    """There is no object under this key."""


class ObjectTooLarge(Exception):
    """The object is larger than the caller was ready to take into memory."""


class StoredObject(NamedTuple):
    """One object as a listing shows it."""

    key: str
    size_bytes: int
    modified_at: datetime


def content_disposition(filename: str) -> str:
    """`attachment` with any file name, harmless as a header (RFC 6266, RFC 8187).

    Control characters and path separators are dropped; old clients get an ASCII approximation.
    """
    name = "".join(char for char in filename if char.isprintable() and char not in '/\\"') or "download"
    plain = name.encode("ascii", "replace").decode().replace("?", "_").replace("%", "_")
    extended = quote(name.encode("utf-8", "replace"), safe="")
    return f"attachment; filename=\"{plain}\"; filename*=UTF-8''{extended}"


def _code(error: ClientError) -> str:
    return error.response.get("Error", {}).get("Code", "")


@contextmanager
def _translated(key: str = "") -> Iterator[None]:
    """Turn what the client raises into StorageUnavailable or ObjectMissing."""
    try:
        yield
    except ClientError as error:
        if key and _code(error) in _MISSING:
            raise ObjectMissing(key) from error
        raise StorageUnavailable(f"storage refused: {error}") from error
    except (BotoCoreError, aiohttp.ClientError, OSError) as error:  # TimeoutError is an OSError
        reason = str(error).split("\n")[0] or type(error).__name__
        raise StorageUnavailable(f"storage does not answer: {reason}") from error


@cache
def _session() -> aioboto3.Session:
    """Keeps what botocore has read of the service: a second client costs a twentieth of the first."""
    return aioboto3.Session()


def _make_client(endpoint_url: str, access_key: str, secret_key: str, region: str) -> "S3Client":
    """A client ready for use in any loop. Blocking: botocore reads megabytes of JSON.

    Making one is a coroutine, but with given keys it waits for nothing, so it runs without a loop.
    """
    is_local = urlsplit(endpoint_url).hostname in {"127.0.0.1", "localhost", "::1"}
    config = AioConfig(
        signature_version="s3v4",
        s3={"addressing_style": "path"} if endpoint_url else {},
        retries={"mode": "standard", "total_max_attempts": 2},
        connect_timeout=CONNECT_TIMEOUT_S,
        read_timeout=PART_TIMEOUT_S,
        max_pool_connections=CONNECTIONS,
        proxies={} if is_local else None,  # a proxy of the environment cannot reach this machine
        # The signature covers the body already; a second checksum costs a pass over each part.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
    )
    making = _session().client(
        "s3",
        endpoint_url=endpoint_url or None,
        aws_access_key_id=access_key or None,
        aws_secret_access_key=secret_key or None,
        region_name=region or None,
        config=config,
    )
    opening = making.__aenter__()
    try:
        opening.send(None)
    except StopIteration as done:
        client: S3Client = done.value
        return client
    opening.close()
    raise RuntimeError("making an S3 client waited for something")


class Storage:
    """One bucket, through one client for the whole process."""

    def __init__(self, client: "S3Client", bucket: str) -> None:
        self._client = client
        self._bucket = bucket
        self._removals: set[asyncio.Task[None]] = set()

    @classmethod
    async def open(
        cls,
        endpoint_url: str,
        bucket: str,
        access_key: str,
        secret_key: str,
        region: str,
        *,
        patience_s: float = 10.0,
    ) -> "Storage":
        """Connect, make the bucket where it is absent, and prove that it takes an object.

        Tries for `patience_s`, since a server that has just started lists before it writes.
        Raises StorageUnavailable with the last reason.
        """
        if not access_key or not secret_key:
            raise StorageUnavailable("storage.access_key and storage.secret_key are needed")
        with _translated():
            client = await asyncio.to_thread(_make_client, endpoint_url, access_key, secret_key, region)
        storage = cls(client, bucket)
        try:
            await storage._become_ready(region, patience_s)
        except BaseException:
            await storage.close()
            raise
        return storage

    async def _become_ready(self, region: str, patience_s: float) -> None:
        loop = asyncio.get_running_loop()
        deadline = loop.time() + patience_s
        while True:
            try:
                await self._make_bucket(region)
                await self.put(".probe", b"probe", "text/plain")  # an empty one needs no volume
                await self.delete(".probe")
                return
            except StorageUnavailable:
                if loop.time() >= deadline:
                    raise
            await asyncio.sleep(0.05)

    async def _make_bucket(self, region: str) -> None:
        with _translated():
            async with asyncio.timeout(CALL_TIMEOUT_S):
                try:
                    await self._client.head_bucket(Bucket=self._bucket)
                    return
                except ClientError as error:
                    if _code(error) not in {"404", "NoSuchBucket"}:
                        raise
                try:
                    if region == "us-east-1":  # the one region that must not be named
                        await self._client.create_bucket(Bucket=self._bucket)
                    else:
                        await self._client.create_bucket(
                            Bucket=self._bucket,
                            CreateBucketConfiguration={"LocationConstraint": region},  # type: ignore[typeddict-item]  # the stubs list regions
                        )
                except ClientError as error:
                    if _code(error) != "BucketAlreadyOwnedByYou":
                        raise

    async def put(self, key: str, body: bytes, content_type: str) -> None:
        """Store `body` under `key`, replacing what was there."""
        with _translated():
            async with asyncio.timeout(PART_TIMEOUT_S):
                await self._client.put_object(
                    Bucket=self._bucket, Key=key, Body=body, ContentType=content_type
                )

    async def get(self, key: str, *, limit_bytes: int = GET_LIMIT_BYTES) -> bytes:
        """The whole object. Raises ObjectMissing, and ObjectTooLarge above `limit_bytes`."""
        with _translated(key):
            async with asyncio.timeout(PART_TIMEOUT_S):
                answer = await self._client.get_object(Bucket=self._bucket, Key=key)
                async with (body := answer["Body"]):
                    if answer["ContentLength"] > limit_bytes:
                        raise ObjectTooLarge(f"{key} has {answer['ContentLength']} bytes")
                    return await body.read()

    async def head(self, key: str) -> int | None:
        """The object's size in bytes, or None where there is none."""
        try:
            with _translated(key):
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    answer = await self._client.head_object(Bucket=self._bucket, Key=key)
        except ObjectMissing:
            return None
        return answer["ContentLength"]

    async def delete(self, key: str) -> None:
        """Delete the object; an absent one is no error."""
        with _translated():
            async with asyncio.timeout(CALL_TIMEOUT_S):
                await self._client.delete_object(Bucket=self._bucket, Key=key)

    async def read(
        self, key: str, *, start: int | None = None, end: int | None = None
    ) -> AsyncGenerator[bytes, None]:
        """The object's bytes from `start` up to but not including `end`, piece by piece.

        Raises ObjectMissing before the first piece, StorageUnavailable at any, and ValueError for
        a range that begins past the object's end. Iterate inside `contextlib.aclosing` when the
        loop may be left early, or the connection is only freed by the garbage collector.
        """
        if start is not None and end is not None and start >= end:
            return
        wanted = {} if start is None and end is None else {"Range": f"bytes={start or 0}-{_last(end)}"}
        with _translated(key):
            try:
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    answer = await self._client.get_object(Bucket=self._bucket, Key=key, **wanted)  # type: ignore[arg-type]  # Range or nothing
            except ClientError as error:
                if _code(error) == "InvalidRange":
                    raise ValueError(f"{key} has no byte {start}") from error
                raise
        async with (body := answer["Body"]):
            while True:
                with _translated():
                    async with asyncio.timeout(PART_TIMEOUT_S):
                        piece = await body.read(CHUNK_BYTES)
                if not piece:
                    return
                yield piece

    async def upload(self, key: str, chunks: AsyncIterator[bytes], content_type: str) -> int:
        """Store a stream of any length under a new `key`; answers its size in bytes.

        Takes memory for one part, whatever the length. When the stream or the storage fails, or
        the caller is cancelled, nothing is left under `key`, so never overwrite with this.
        """
        upload = _Upload(self, key, content_type)
        try:
            async for part in _in_parts(chunks):
                await upload.add(part)
            await upload.finish()
            return upload.size_bytes
        except BaseException:
            removal = asyncio.create_task(upload.undo())
            self._removals.add(removal)
            removal.add_done_callback(self._removals.discard)
            await asyncio.shield(removal)
            raise

    async def sign(self, key: str, *, expires_s: int, filename: str) -> str:
        """A URL that lets anyone download the object as `filename` for `expires_s` seconds."""
        with _translated():
            return await self._client.generate_presigned_url(
                "get_object",
                Params={
                    "Bucket": self._bucket,
                    "Key": key,
                    "ResponseContentDisposition": content_disposition(filename),
                },
                ExpiresIn=expires_s,
            )

    async def list(self, prefix: str) -> AsyncIterator[StoredObject]:
        """Every object whose key starts with `prefix`, in the order of the keys."""
        token: str | None = None
        while True:
            resume = {"ContinuationToken": token} if token else {}
            with _translated():
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    page = await self._client.list_objects_v2(
                        Bucket=self._bucket,
                        Prefix=prefix,
                        MaxKeys=PAGE_KEYS,
                        **resume,  # type: ignore[arg-type]  # a token or nothing
                    )
            for entry in page.get("Contents", []):
                yield StoredObject(entry["Key"], entry["Size"], entry["LastModified"])
            token = page.get("NextContinuationToken")
            if token is None:
                return

    async def _abort(self, key: str, upload_id: str) -> None:
        try:
            with _translated(key):
                async with asyncio.timeout(CALL_TIMEOUT_S):
                    await self._client.abort_multipart_upload(
                        Bucket=self._bucket, Key=key, UploadId=upload_id
                    )
        except ObjectMissing:
            pass  # finished or aborted meanwhile

    async def abort_stale_uploads(self, older_than_s: float) -> int:
        """Abort multipart uploads nobody finished, by the storage's own clock; answers how many."""
        with _translated():
            async with asyncio.timeout(CALL_TIMEOUT_S):
                # One page of at most 1,000: the next sweep takes the rest.
                page = await self._client.list_multipart_uploads(Bucket=self._bucket)
        now = parsedate_to_datetime(page["ResponseMetadata"]["HTTPHeaders"]["date"])
        stale = [
            upload
            for upload in page.get("Uploads", [])
            if now - upload["Initiated"] >= timedelta(seconds=older_than_s)
        ]
        for upload in stale:
            await self._abort(upload["Key"], upload["UploadId"])
        return len(stale)

    async def ping(self) -> None:
        """Raises StorageUnavailable unless the bucket answers within two seconds."""
        with _translated():
            async with asyncio.timeout(PING_TIMEOUT_S):
                await self._client.head_bucket(Bucket=self._bucket)

    async def close(self) -> None:
        """Finish removing what broken uploads left, then let go of the connections."""
        if self._removals:
            await asyncio.wait(self._removals, timeout=CALL_TIMEOUT_S)
        await self._client.close()


class _Upload:
    """One upload under way, and what it takes to undo it.

    Its requests are carried to their end even when the caller is cancelled: what the storage does
    after nobody listens could not be undone.
    """

    def __init__(self, storage: Storage, key: str, content_type: str) -> None:
        self._storage = storage
        self._client = storage._client
        self._bucket = storage._bucket
        self._key = key
        self._content_type = content_type
        self._id = ""  # of the multipart upload, once there is one
        self._etags: list[str] = []
        self._short = b""  # all there is, when that is less than a part
        self._request: asyncio.Task[None] | None = None
        self.size_bytes = 0

    async def add(self, part: bytes) -> None:
        """Send a part; all but the last have PART_BYTES."""
        self.size_bytes += len(part)
        if not self._id and len(part) < PART_BYTES:
            self._short = part
        else:
            await self._carry(self._send(part))

    async def finish(self) -> None:
        """Make the parts an object."""
        await self._carry(self._complete())

    async def undo(self) -> None:
        """Remove whatever the storage has of it."""
        try:
            if self._request is not None:
                with suppress(StorageUnavailable):
                    await self._request
            if self._id:
                await self._storage._abort(self._key, self._id)
            await self._storage.delete(self._key)  # a request that failed for us may have been done
        except StorageUnavailable as error:
            log.warning("an upload left traces for the next sweep: %s", error)

    async def _carry(self, request: Coroutine[Any, Any, None]) -> None:
        self._request = asyncio.create_task(request)
        await asyncio.shield(self._request)

    async def _send(self, part: bytes) -> None:
        with _translated():
            async with asyncio.timeout(PART_TIMEOUT_S):
                if not self._id:
                    begun = await self._client.create_multipart_upload(
                        Bucket=self._bucket, Key=self._key, ContentType=self._content_type
                    )
                    self._id = begun["UploadId"]
                answer = await self._client.upload_part(
                    Bucket=self._bucket,
                    Key=self._key,
                    UploadId=self._id,
                    PartNumber=len(self._etags) + 1,
                    Body=part,
                )
        self._etags.append(answer["ETag"])

    async def _complete(self) -> None:
        if not self._id:
            await self._storage.put(self._key, self._short, self._content_type)
            return
        parts = [{"ETag": etag, "PartNumber": number} for number, etag in enumerate(self._etags, start=1)]
        with _translated():
            async with asyncio.timeout(PART_TIMEOUT_S):
                await self._client.complete_multipart_upload(
                    Bucket=self._bucket,
                    Key=self._key,
                    UploadId=self._id,
                    MultipartUpload={"Parts": parts},  # type: ignore[typeddict-item]  # dicts of the stubs' shape
                )


def _last(end: int | None) -> str:
    """The last byte of an HTTP range, which counts it in."""
    return "" if end is None else str(end - 1)


async def _in_parts(chunks: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    """The same bytes in pieces of PART_BYTES, the last one shorter and never empty."""
    waiting = bytearray()
    async for chunk in chunks:
        waiting += chunk
        while len(waiting) >= PART_BYTES:
            yield bytes(waiting[:PART_BYTES])
            del waiting[:PART_BYTES]
    if waiting:
        yield bytes(waiting)
