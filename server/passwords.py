"""Password hashes: argon2id (RFC 9106), in two threads of their own."""

import asyncio
from collections.abc import AsyncIterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Self

from argon2 import PasswordHasher
from argon2.exceptions import InvalidHashError, VerificationError

from server.errors import Code, Problem
from server.i18n import N_

AT_ONCE = 2  # each takes 19 MiB and a core
TURN_DEADLINE_S = 15.0


class Passwords:
    """Hashes and compares passwords without holding up anything else."""

    def __init__(self) -> None:
        self._hasher = PasswordHasher(time_cost=2, memory_cost=19 * 1024, parallelism=1)
        self._threads = ThreadPoolExecutor(max_workers=AT_ONCE, thread_name_prefix="passwords")
        self._turns = asyncio.Semaphore(AT_ONCE)
        self._decoy = ""

    @classmethod
    @asynccontextmanager
    async def open(cls, decoy: str) -> AsyncIterator[Self]:
        """Ready to compare; `decoy` is any text nobody can guess."""
        passwords = cls()
        try:
            async with passwords.turn():
                passwords._decoy = await passwords.hash(decoy)
            yield passwords
        finally:
            passwords._threads.shutdown(wait=False, cancel_futures=True)

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """One of the places in which passwords are hashed, for one of them.

        Raises Problem(unavailable) where waiting and hashing take too long.
        """
        try:
            async with asyncio.timeout(TURN_DEADLINE_S), self._turns:
                yield
        except TimeoutError:
            raise Problem(
                Code.UNAVAILABLE, N_("Too many people sign in at this moment; try again shortly.")
            ) from None

    async def hash(self, password: str) -> str:
        """The text to keep instead of the password. Some 30 ms; take a turn before."""
        return await asyncio.get_running_loop().run_in_executor(self._threads, self._hasher.hash, password)

    async def matches(self, kept: str | None, password: str) -> bool:
        """Whether this is the password; takes as long where there is none to compare with."""
        same = await asyncio.get_running_loop().run_in_executor(
            self._threads, self._same, kept or self._decoy, password
        )
        return same and kept is not None

    def _same(self, kept: str, password: str) -> bool:
        try:
            return self._hasher.verify(kept, password)
        except (VerificationError, InvalidHashError):
            return False
