"""A small stand-in for an image registry: one image made in memory, read-only, and as bad as a test wants.

An engine speaks plain HTTP to registries on its own loopback, so that one there needs no certificate.
"""

import asyncio
import hashlib
import io
import json
import secrets
import tarfile
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager, suppress
from typing import Final, Self

from aiohttp import web

REPOSITORY: Final = "phone"
MANIFEST_TYPE: Final = "application/vnd.docker.distribution.manifest.v2+json"
CONFIG_TYPE: Final = "application/vnd.docker.container.image.v1+json"
LAYER_TYPE: Final = "application/vnd.docker.image.rootfs.diff.tar"
TICK_S: Final = 0.02
PART: Final = 1 << 14


class Registry:
    """A registry with one image, tagged 1 and latest, of random bytes that no engine can have yet."""

    def __init__(self, layer_sizes: Sequence[int]) -> None:
        layers = [_layer(size) for size in layer_sizes]
        config = {
            "architecture": "amd64",
            "os": "linux",
            "config": {},
            "rootfs": {"type": "layers", "diff_ids": [_digest(layer) for layer in layers]},
        }
        self._blobs = {_digest(layer): layer for layer in layers}
        self.layers: Final = tuple(self._blobs)
        self._manifest = _json(
            {
                "schemaVersion": 2,
                "mediaType": MANIFEST_TYPE,
                "config": _described(CONFIG_TYPE, _json(config)),
                "layers": [_described(LAYER_TYPE, layer) for layer in layers],
            }
        )
        self._blobs[_digest(_json(config))] = _json(config)
        self.port = 0
        self.bytes_per_s: float | None = None
        """How fast each layer is sent; None for as fast as can be."""
        self.stalls_after: int | None = None
        """While set, nothing more comes of a layer after so many bytes, though the connection stays."""
        self.refuses_with: int | None = None
        """The status that every request gets."""
        self.asked_for: list[str] = []
        """The layers somebody asked for, in order."""
        self.sending = 0
        """How many layers are on their way now."""

    @classmethod
    @asynccontextmanager
    async def started(cls, *layer_sizes: int) -> AsyncIterator[Self]:
        """A registry on a free port of 127.0.0.1 until the block ends."""
        registry = cls(layer_sizes)
        app = web.Application()
        app.router.add_get("/v2/", registry._greet)
        app.router.add_get(f"/v2/{REPOSITORY}/manifests/{{name}}", registry._give_manifest)
        app.router.add_get(f"/v2/{REPOSITORY}/blobs/{{digest}}", registry._give_blob)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        try:
            site = web.TCPSite(runner, "127.0.0.1", 0)
            await site.start()
            registry.port = runner.addresses[0][1]
            yield registry
        finally:
            await runner.cleanup()

    @property
    def reference(self) -> str:
        """The image's name for an engine."""
        return f"127.0.0.1:{self.port}/{REPOSITORY}:1"

    async def _greet(self, _request: web.Request) -> web.Response:
        return self._refusal() or web.json_response({})

    async def _give_manifest(self, request: web.Request) -> web.Response:
        # By its tag first, then by its digest.
        if request.match_info["name"] not in {"1", "latest", _digest(self._manifest)}:
            return _error(404, "MANIFEST_UNKNOWN", "manifest unknown")
        return self._refusal() or web.Response(
            body=self._manifest,
            content_type=MANIFEST_TYPE,
            headers={"Docker-Content-Digest": _digest(self._manifest)},
        )

    async def _give_blob(self, request: web.Request) -> web.StreamResponse:
        digest = request.match_info["digest"]
        if refusal := self._refusal():
            return refusal
        blob = self._blobs[digest]
        if digest not in self.layers:
            return web.Response(body=blob)
        self.asked_for.append(digest)
        self.sending += 1
        try:
            return await self._send(request, blob)
        finally:
            self.sending -= 1

    async def _send(self, request: web.Request, blob: bytes) -> web.StreamResponse:
        response = web.StreamResponse(headers={"Content-Length": str(len(blob))})
        with suppress(ConnectionResetError):  # the engine wants no more
            await response.prepare(request)
            part = PART if self.bytes_per_s is None else max(1, int(self.bytes_per_s * TICK_S))
            for start in range(0, len(blob), part):
                while self.stalls_after is not None and start + part > self.stalls_after:
                    await asyncio.sleep(TICK_S)
                await response.write(blob[start : start + part])
                if self.bytes_per_s is not None:
                    await asyncio.sleep(TICK_S)
        return response

    def _refusal(self) -> web.Response | None:
        match self.refuses_with:
            case None:
                return None
            case 404:
                return _error(404, "MANIFEST_UNKNOWN", "manifest unknown")
            case 401:
                return _error(401, "UNAUTHORIZED", "authentication required")
            case status:
                return web.Response(status=status)


def _error(status: int, code: str, message: str) -> web.Response:
    return web.json_response({"errors": [{"code": code, "message": message}]}, status=status)


def _layer(size: int) -> bytes:
    content = io.BytesIO()
    with tarfile.open(fileobj=content, mode="w") as tar:
        entry = tarfile.TarInfo(f"noise-{secrets.token_hex(4)}")
        entry.size = size
        tar.addfile(entry, io.BytesIO(secrets.token_bytes(size)))
    return content.getvalue()


def _described(kind: str, blob: bytes) -> dict[str, object]:
    return {"mediaType": kind, "size": len(blob), "digest": _digest(blob)}


def _digest(blob: bytes) -> str:
    return f"sha256:{hashlib.sha256(blob).hexdigest()}"


def _json(value: object) -> bytes:
    return json.dumps(value).encode()
