"""Idempotency-Key: the same request again gives the first answer again, and its effect once.

Table `idempotency_keys`. A key is claimed before the effect together with the id that what is
created will have; where the process dies between effect and answer, the repetition runs the
handler anew with that same id, and its INSERT finds the row there. Answers below 500 are kept for
a day; keys are per caller.
"""

import hashlib
import re
from collections.abc import Awaitable, Callable
from typing import Final
from uuid import UUID

from aiohttp import web

from server.auth import Caller
from server.clock import Randomness
from server.db import Database
from server.errors import Code, Problem, problem_response
from server.i18n import N_

HEADER = "Idempotency-Key"
_KEY = re.compile(r"[\x21-\x7e]{1,255}")

MIGRATIONS: Final = (
    """
    CREATE TABLE idempotency_keys (
        caller      uuid NOT NULL,
        key         text NOT NULL,
        fingerprint bytea NOT NULL,
        new_id      uuid NOT NULL,
        status      integer,
        headers     jsonb,
        answer      bytea,
        created_at  timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (caller, key)
    );
    CREATE INDEX idempotency_keys_created_at ON idempotency_keys (created_at);
    """,
)


class Idempotency:
    """Remembers the answers to requests that carry a key."""

    def __init__(self, database: Database, randomness: Randomness) -> None:
        self._database = database
        self._randomness = randomness
        self._running: set[tuple[UUID, str]] = set()

    async def serve(
        self,
        request: web.Request,
        caller: Caller | None,
        body: bytes,
        act: Callable[[UUID], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        """Run `act` with the id to create under, or repeat the answer it gave to this key.

        Raises Problem: malformed, in_progress, idempotency_mismatch.
        """
        key = request.headers.get(HEADER)
        if key is None or caller is None:
            return await act(self._randomness.uuid())
        if not _KEY.fullmatch(key):
            raise Problem(Code.MALFORMED, N_("An Idempotency-Key has 1 to 255 visible ASCII characters."))
        claim = (caller.user_id, key)
        if claim in self._running:
            raise Problem(Code.IN_PROGRESS, retry_after_s=1)
        self._running.add(claim)
        try:
            return await self._serve_claimed(request, claim, body, act)
        finally:
            self._running.discard(claim)

    async def _serve_claimed(
        self,
        request: web.Request,
        claim: tuple[UUID, str],
        body: bytes,
        act: Callable[[UUID], Awaitable[web.StreamResponse]],
    ) -> web.StreamResponse:
        length = str(request.content_length or 0)
        spoken = "\n".join((request.method, request.path, length)).encode() + b"\n" + body
        fingerprint = hashlib.sha256(spoken).digest()
        row = await self._database.fetchrow(
            """
            INSERT INTO idempotency_keys (caller, key, fingerprint, new_id) VALUES ($1, $2, $3, $4)
            ON CONFLICT (caller, key) DO UPDATE SET key = excluded.key
            RETURNING fingerprint, new_id, status, headers, answer
            """,
            *claim,
            fingerprint,
            self._randomness.uuid(),
        )
        assert row is not None
        if row["fingerprint"] != fingerprint:
            raise Problem(Code.IDEMPOTENCY_MISMATCH)
        if row["status"] is not None:
            return web.Response(status=row["status"], body=row["answer"], headers=row["headers"])
        try:
            response = await act(row["new_id"])
        except Problem as problem:
            if problem.code.status in {429, 503}:
                raise
            response = problem_response(request, problem)
        await self._remember(claim, response)
        return response

    async def _remember(self, claim: tuple[UUID, str], response: web.StreamResponse) -> None:
        if not isinstance(response, web.Response):
            return
        headers = {
            name: response.headers[name] for name in ("Content-Type", "Location") if name in response.headers
        }
        await self._database.execute(
            "UPDATE idempotency_keys SET status = $3, headers = $4, answer = $5"
            " WHERE caller = $1 AND key = $2",
            *claim,
            response.status,
            headers,
            response.body if isinstance(response.body, bytes) else b"",
        )

    async def forget_old(self) -> None:
        """Delete what is older than a day."""
        await self._database.execute(
            "DELETE FROM idempotency_keys WHERE created_at < now() - interval '1 day'"
        )


IDEMPOTENCY: Final = web.AppKey("IDEMPOTENCY", Idempotency)
