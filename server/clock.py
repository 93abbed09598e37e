"""The doors to time and to chance, so that tests can hold either still."""

import asyncio
import secrets
import time
from datetime import UTC, datetime
from typing import Protocol
from uuid import UUID


class Clock(Protocol):
    """Wall time for what is written down, monotonic time for waiting."""

    def now(self) -> datetime:
        """Wall time, aware, UTC."""

    def monotonic(self) -> float:
        """Seconds that only ever rise."""

    async def sleep(self, seconds: float) -> None:
        """Wait on the monotonic clock."""


class SystemClock:
    """The machine's own clock."""

    def now(self) -> datetime:
        """Wall time, aware, UTC."""
        return datetime.now(UTC)

    def monotonic(self) -> float:
        """Seconds that only ever rise."""
        return time.monotonic()

    async def sleep(self, seconds: float) -> None:
        """Wait on the monotonic clock."""
        await asyncio.sleep(seconds)


async def sleep_unless(rung: asyncio.Event, clock: Clock, seconds: float) -> None:
    """Wait, but no longer than until `rung` is set."""
    ringing = asyncio.ensure_future(rung.wait())
    sleeping = asyncio.ensure_future(clock.sleep(seconds))
    try:
        await asyncio.wait({ringing, sleeping}, return_when=asyncio.FIRST_COMPLETED)
    finally:
        ringing.cancel()
        sleeping.cancel()


class Randomness(Protocol):
    """Where ids and secrets come from."""

    def uuid(self) -> UUID:
        """A random id (RFC 9562, version 4)."""

    def token(self, entropy_bytes: int = 32) -> str:
        """An unguessable text that is safe in an address."""


class SystemRandomness:
    """The operating system's generator."""

    def uuid(self) -> UUID:
        """A random id (RFC 9562, version 4)."""
        return UUID(bytes=secrets.token_bytes(16), version=4)

    def token(self, entropy_bytes: int = 32) -> str:
        """An unguessable text that is safe in an address."""
        return secrets.token_urlsafe(entropy_bytes)
