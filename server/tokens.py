"""Access tokens: JWTs (RFC 7519) that say which session they belong to, signed by this server."""

import hmac
from typing import Final
from uuid import UUID

import jwt

from server.clock import Clock, Randomness

ALGORITHM: Final = "HS256"
ISSUER: Final = "cloudphone"
AUDIENCE: Final = "cloudphone-api"
LONGEST: Final = 2048
CACHED: Final = 10_000
_REQUIRED: Final = ["iss", "aud", "exp", "iat", "jti", "sid", "sub"]


class AccessTokens:
    """Issues tokens and reads them back.

    A signature that was checked once is not checked again; the session has to be looked up each
    time by whoever asks, or its end would come too late.
    """

    def __init__(self, secret_key: str, clock: Clock, randomness: Randomness, *, ttl_s: int) -> None:
        self.ttl_s = ttl_s
        self._key = hmac.digest(secret_key.encode(), b"access token", "sha256")
        self._clock = clock
        self._randomness = randomness
        self._verified: dict[str, tuple[UUID, float]] = {}  # token → session, expiry

    def issue(self, user_id: UUID, session_id: UUID) -> str:
        """A token for a session, valid for `ttl_s`."""
        issued_at = int(self._clock.now().timestamp())
        claims = {
            "iss": ISSUER,
            "aud": AUDIENCE,
            "sub": str(user_id),
            "sid": str(session_id),
            "jti": self._randomness.token(12),
            "iat": issued_at,
            "exp": issued_at + self.ttl_s,
        }
        return jwt.encode(claims, self._key, algorithm=ALGORITHM)

    def session_of(self, token: str) -> UUID | None:
        """The session an unexpired token of ours names; whether it lives is another question."""
        found = self._verified.get(token) or self._verify(token)
        if found is None:
            return None
        session_id, expires_at = found
        if expires_at <= self._clock.now().timestamp():
            self._verified.pop(token, None)
            return None
        return session_id

    def _verify(self, token: str) -> tuple[UUID, float] | None:
        if len(token) > LONGEST or not token.isascii():
            return None
        try:
            claims = jwt.decode(
                token,
                self._key,
                algorithms=[ALGORITHM],
                audience=AUDIENCE,
                issuer=ISSUER,
                # The times are compared by `session_of`, on our own clock and also for known tokens.
                options={"require": _REQUIRED, "verify_exp": False, "verify_iat": False},
            )
        except jwt.InvalidTokenError:
            return None
        found = UUID(claims["sid"]), float(claims["exp"])
        if len(self._verified) >= CACHED:
            del self._verified[next(iter(self._verified))]
        self._verified[token] = found
        return found
