"""Accounts: making them, proving whose they are, changing them."""

from collections.abc import Collection
from typing import Final
from uuid import UUID

from aiohttp import web

from plugins.users.model import Credentials, NewUser, Place, SignedIn, User, UserChanges, UsersSection, fold
from plugins.users.sessions import Sessions, user_of
from server.auth import Caller
from server.db import Tx, UniqueViolation
from server.errors import Code, Problem
from server.i18n import N_
from server.interfaces import CLOCK, DATABASE, EVENTS, UserRegistered
from server.locks import KeyedLocks
from server.passwords import Passwords
from server.throttle import Throttle

FAILURES_WINDOW_S: Final = 900.0
FAILURES_OF_ACCOUNT: Final = 10
FAILURES_FROM_ADDRESS: Final = 50


class Users:
    """Everybody with an account. Provides the Directory."""

    def __init__(
        self, app: web.Application, section: UsersSection, sessions: Sessions, passwords: Passwords
    ) -> None:
        self.registration_open = section.registration == "open"
        self.sessions = sessions
        self._passwords = passwords
        self._database = app[DATABASE]
        self._events = app[EVENTS]
        self._failures_of_account = Throttle(
            app[CLOCK], limit=FAILURES_OF_ACCOUNT, window_s=FAILURES_WINDOW_S
        )
        self._failures_from_address = Throttle(
            app[CLOCK], limit=FAILURES_FROM_ADDRESS, window_s=FAILURES_WINDOW_S
        )
        self._changing = KeyedLocks[UUID]()  # guards: that a person's row and memory change in one order

    async def register(self, user_id: UUID, new: NewUser, place: Place) -> SignedIn:
        """Make an account and sign in. Raises Problem: registration_closed, email_taken."""
        if not self.registration_open:
            raise Problem(Code.REGISTRATION_CLOSED)
        async with self._passwords.turn():
            password_hash = await self._passwords.hash(new.password)
        async with self._database.transaction() as tx:
            try:
                await tx.execute(
                    """
                    INSERT INTO users (id, email, email_folded, display_name, password_hash, announced)
                    VALUES ($1, $2, $3, $4, $5, true)
                    """,
                    user_id,
                    new.email,
                    fold(new.email),
                    new.display_name,
                    password_hash,
                )
            except UniqueViolation:
                raise Problem(Code.EMAIL_TAKEN) from None
            await self._events.publish(tx, UserRegistered(user_id))
            return await self.sessions.open(tx, user_id, place)

    async def login(self, credentials: Credentials, place: Place) -> SignedIn:
        """Open a session. Raises Problem: invalid_credentials, too_many_attempts, forbidden."""
        email = fold(credentials.email)
        self._refuse_guessing(email, place.address)
        row = await self._database.fetchrow(
            "SELECT id, password_hash, status, announced FROM users WHERE email_folded = $1", email
        )
        async with self._passwords.turn():
            # Again: those who waited for a turn may all be guesses at one account.
            self._refuse_guessing(email, place.address)
            kept = row["password_hash"] if row else None
            if not await self._passwords.matches(kept, credentials.password):
                self._failures_of_account.count(email)
                self._failures_from_address.count(place.address)
                raise Problem(Code.INVALID_CREDENTIALS)
        assert row is not None
        if row["status"] != "active":
            raise Problem(Code.FORBIDDEN, N_("This account is suspended."))
        self._failures_of_account.forget(email)
        async with self._database.transaction() as tx:
            if not row["announced"]:
                await self._announce(tx, row["id"])
            return await self.sessions.open(tx, row["id"], place)

    def _refuse_guessing(self, email: str, address: str) -> None:
        wait_s = max(self._failures_of_account.wait_s(email), self._failures_from_address.wait_s(address))
        if wait_s > 0:
            raise Problem(
                Code.TOO_MANY_ATTEMPTS,
                N_("Try again in {minutes} min."),
                retry_after_s=int(wait_s) + 1,
                minutes=int(wait_s / 60) + 1,
            )

    async def _announce(self, tx: Tx, user_id: UUID) -> None:
        first = await tx.fetchval(
            "UPDATE users SET announced = true WHERE id = $1 AND NOT announced RETURNING true", user_id
        )
        if first:
            await self._events.publish(tx, UserRegistered(user_id))

    async def change(self, caller: Caller, changes: UserChanges) -> User:
        """Change the caller's own account."""
        async with self._changing.of(caller.user_id):
            row = await self._database.fetchrow(
                """
                UPDATE users SET display_name = coalesce($2, display_name), updated_at = now()
                WHERE id = $1
                RETURNING id, email, display_name, role, status, created_at
                """,
                caller.user_id,
                changes.display_name,
            )
            assert row is not None
            user = user_of(row)
            self.sessions.change(user)
        return user

    async def administrators(self, tx: Tx) -> list[UUID]:
        """The active administrators."""
        rows = await tx.fetch("SELECT id FROM users WHERE role = 'admin' AND status = 'active' ORDER BY id")
        return [row["id"] for row in rows]

    async def everyone(self, tx: Tx) -> list[UUID]:
        """Every active account."""
        return [row["id"] for row in await tx.fetch("SELECT id FROM users WHERE status = 'active'")]

    async def among(self, tx: Tx, user_ids: Collection[UUID]) -> set[UUID]:
        """Which of these are accounts."""
        rows = await tx.fetch("SELECT id FROM users WHERE id = ANY($1::uuid[])", list(user_ids))
        return {row["id"] for row in rows}

    async def emails(self, user_ids: Collection[UUID]) -> dict[UUID, str]:
        """By which address people know these accounts."""
        rows = await self._database.fetch("SELECT id, email FROM users WHERE id = ANY ($1)", list(user_ids))
        return {row["id"]: row["email"] for row in rows}

    async def find(self, text: str, *, limit: int) -> list[tuple[UUID, str]]:
        """Accounts whose address holds `text`, in the order of their addresses."""
        rows = await self._database.fetch(
            "SELECT id, email FROM users WHERE strpos(email_folded, $1) > 0 ORDER BY email_folded LIMIT $2",
            fold(text),
            limit,
        )
        return [(row["id"], row["email"]) for row in rows]

    async def notice_administrators(self) -> None:
        """Give those whom the command line made administrators their rights without a new sign-in."""
        for row in await self._database.fetch("SELECT id FROM users WHERE role = 'admin'"):
            self.sessions.promote(row["id"])
