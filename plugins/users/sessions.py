"""Sessions: who is signed in, from memory; opened, renewed and ended in the database first."""

import hashlib
from dataclasses import dataclass, field
from functools import partial
from uuid import UUID

from aiohttp import web

from plugins.users.model import (
    TICKET_TTL_S,
    Place,
    Session,
    SignedIn,
    SignedInPlace,
    Ticket,
    User,
    UsersSection,
)
from server.auth import Caller
from server.db import Record, Tx
from server.errors import Code, Problem
from server.interfaces import CLOCK, DATABASE, RANDOMNESS, SECRET_KEY, SOCKETS
from server.tokens import AccessTokens


@dataclass(slots=True)
class _LiveSession:
    caller: Caller
    row: Record
    expires_at: float


@dataclass(slots=True)
class _Person:
    """Somebody with a live session."""

    user: User
    session_ids: set[UUID] = field(default_factory=set)


class Sessions:
    """Every live session and whose it is. Provides the Authenticator."""

    def __init__(self, app: web.Application, section: UsersSection) -> None:
        self._refresh_token_ttl_s = section.refresh_token_ttl_s
        self._database = app[DATABASE]
        self._clock = app[CLOCK]
        self._randomness = app[RANDOMNESS]
        self._sockets = app[SOCKETS]
        self._tokens = AccessTokens(
            app[SECRET_KEY], self._clock, self._randomness, ttl_s=section.access_token_ttl_s
        )
        self._sessions: dict[UUID, _LiveSession] = {}
        self._people: dict[UUID, _Person] = {}
        self._tickets: dict[str, tuple[UUID, float]] = {}  # ticket → session, deadline; oldest first

    async def load(self) -> None:
        """Remember every live session."""
        rows = await self._database.fetch(
            """
            SELECT sessions.id AS session_id, sessions.user_agent, sessions.address,
                sessions.created_at AS opened_at, sessions.last_used_at, sessions.expires_at,
                users.id, users.email, users.display_name, users.role, users.status, users.created_at
            FROM sessions JOIN users ON users.id = sessions.user_id
            WHERE sessions.expires_at > now() AND users.status = 'active'
            """
        )
        for row in rows:
            self._admit(row)

    # From memory

    def caller_of_session(self, session_id: UUID) -> Caller | None:
        """Whose live session this is."""
        session = self._sessions.get(session_id)
        if session is None or session.expires_at <= self._clock.now().timestamp():
            return None
        return session.caller

    def caller_of_token(self, token: str) -> Caller | None:
        """Who holds this access token, if it is valid and its session lives."""
        session_id = self._tokens.session_of(token)
        return self.caller_of_session(session_id) if session_id is not None else None

    def draw_ticket(self, caller: Caller) -> Ticket:
        """A ticket for the caller's session."""
        now = self._clock.monotonic()
        while self._tickets and self._tickets[oldest := next(iter(self._tickets))][1] <= now:
            del self._tickets[oldest]
        ticket = Ticket(ticket=self._randomness.token())
        self._tickets[ticket.ticket] = (caller.session_id, now + TICKET_TTL_S)
        return ticket

    def redeem_ticket(self, ticket: str) -> Caller | None:
        """Who drew this ticket; it is spent by asking."""
        session_id, deadline = self._tickets.pop(ticket, (None, 0.0))
        if session_id is None or deadline <= self._clock.monotonic():
            return None
        return self.caller_of_session(session_id)

    def me(self, caller: Caller) -> User:
        """The caller's account."""
        return self._person(caller).user

    def places(self, caller: Caller) -> list[SignedInPlace]:
        """Where the caller is signed in, the latest first."""
        rows = [self._sessions[id].row for id in self._person(caller).session_ids]
        return [
            SignedInPlace(
                id=row["session_id"],
                created_at=row["opened_at"],
                last_used_at=row["last_used_at"],
                user_agent=row["user_agent"],
                address=row["address"],
                current=row["session_id"] == caller.session_id,
            )
            for row in sorted(rows, key=lambda row: row["opened_at"], reverse=True)
        ]

    def _person(self, caller: Caller) -> _Person:
        person = self._people.get(caller.user_id)
        if person is None:  # signed out while the request was under way
            raise Problem(Code.NOT_SIGNED_IN)
        return person

    def _admit(self, row: Record) -> None:
        """Remember a new session."""
        user, session_id = user_of(row), row["session_id"]
        person = self._people.setdefault(user.id, _Person(user))
        person.session_ids.add(session_id)
        self._sessions[session_id] = _LiveSession(
            _caller(person.user, session_id), row, row["expires_at"].timestamp()
        )

    def _prolong(self, row: Record) -> None:
        """Remember that a session was renewed, unless it has ended since."""
        if session := self._sessions.get(row["session_id"]):
            session.row, session.expires_at = row, row["expires_at"].timestamp()

    def change(self, user: User) -> None:
        """Remember what has become of somebody."""
        person = self._people.get(user.id)
        if person is None:
            return
        person.user = user
        for session_id in person.session_ids:
            self._sessions[session_id].caller = _caller(user, session_id)

    def promote(self, user_id: UUID) -> None:
        """Give somebody who is signed in an administrator's rights, if they have not got them."""
        person = self._people.get(user_id)
        if person is not None and person.user.role != "admin":
            self.change(person.user.model_copy(update={"role": "admin"}))

    def _forget(self, session_id: UUID) -> None:
        """A session is over: nothing it opened stays open."""
        session = self._sessions.pop(session_id, None)
        if session is None:
            return
        user_id = session.caller.user_id
        person = self._people[user_id]
        person.session_ids.discard(session_id)
        if not person.session_ids:
            del self._people[user_id]
        self._sockets.end_session(user_id, session_id)

    # In the database first

    async def open(self, tx: Tx, user_id: UUID, place: Place) -> SignedIn:
        """Sign somebody in; it counts once the transaction commits."""
        session_id, refresh_token = self._randomness.uuid(), self._randomness.token()
        await tx.execute(
            """
            WITH session AS (
                INSERT INTO sessions (id, user_id, user_agent, address, expires_at)
                VALUES ($1, $2, $3, $4, now() + make_interval(secs => $5))
                RETURNING id
            )
            INSERT INTO refresh_tokens (hash, session_id) SELECT $6, session.id FROM session
            """,
            session_id,
            user_id,
            place.user_agent,
            place.address,
            self._refresh_token_ttl_s,
            _hash(refresh_token),
        )
        row = await self._row(tx, session_id)
        tx.after_commit(partial(self._admit, row))
        return SignedIn(user_of(row), session_id, refresh_token)

    async def _row(self, tx: Tx, session_id: UUID) -> Record:
        row = await tx.fetchrow(
            """
            SELECT sessions.id AS session_id, sessions.user_agent, sessions.address,
                sessions.created_at AS opened_at, sessions.last_used_at, sessions.expires_at,
                users.id, users.email, users.display_name, users.role, users.status, users.created_at
            FROM sessions JOIN users ON users.id = sessions.user_id
            WHERE sessions.id = $1
            """,
            session_id,
        )
        assert row is not None
        return row

    async def renew(self, refresh_token: str) -> SignedIn:
        """A new refresh token for the old one. Raises Problem(invalid_token)."""
        async with self._database.transaction() as tx:
            session_id = await tx.fetchval(
                """
                SELECT id FROM sessions
                WHERE id = (SELECT session_id FROM refresh_tokens WHERE hash = $1) AND expires_at > now()
                FOR UPDATE
                """,
                _hash(refresh_token),
            )
            if session_id is not None and await self._spend(tx, refresh_token):
                return await self._prolonged(tx, session_id)
        if session_id is not None:
            await self.end(session_id)
        raise Problem(Code.INVALID_TOKEN)

    async def _spend(self, tx: Tx, refresh_token: str) -> bool:
        """Whether the token was still good; it is not any more."""
        spent = await tx.fetchval(
            "UPDATE refresh_tokens SET spent_at = now() WHERE hash = $1 AND spent_at IS NULL RETURNING true",
            _hash(refresh_token),
        )
        return spent is True

    async def _prolonged(self, tx: Tx, session_id: UUID) -> SignedIn:
        refresh_token = self._randomness.token()
        await tx.execute(
            """
            WITH fresh AS (INSERT INTO refresh_tokens (hash, session_id) VALUES ($2, $1))
            UPDATE sessions SET last_used_at = now(), expires_at = now() + make_interval(secs => $3)
            WHERE id = $1
            """,
            session_id,
            _hash(refresh_token),
            self._refresh_token_ttl_s,
        )
        row = await self._row(tx, session_id)
        tx.after_commit(partial(self._prolong, row))
        return SignedIn(user_of(row), session_id, refresh_token)

    async def end(self, session_id: UUID) -> None:
        """Sign out: the session's tokens are dead at once and its WebSockets closed."""
        await self._database.execute("DELETE FROM sessions WHERE id = $1", session_id)
        self._forget(session_id)

    def answer(self, signed_in: SignedIn) -> Session:
        """What the API answers to somebody who signed in."""
        return Session(
            access_token=self._tokens.issue(signed_in.user.id, signed_in.session_id),
            expires_in=self._tokens.ttl_s,
            refresh_token=signed_in.refresh_token,
            user=signed_in.user,
        )

    async def end_expired(self) -> None:
        """End what ran out, and forget spent refresh tokens too old to matter."""
        rows = await self._database.fetch("DELETE FROM sessions WHERE expires_at <= now() RETURNING id")
        for row in rows:
            self._forget(row["id"])
        await self._database.execute(
            "DELETE FROM refresh_tokens WHERE spent_at < now() - make_interval(secs => $1)",
            self._refresh_token_ttl_s,
        )


def _hash(refresh_token: str) -> bytes:
    return hashlib.sha256(refresh_token.encode()).digest()


def user_of(row: Record) -> User:
    """The account a row describes."""
    return User(
        id=row["id"],
        email=row["email"],
        display_name=row["display_name"],
        role=row["role"],
        status=row["status"],
        created_at=row["created_at"],
    )


def _caller(user: User, session_id: UUID) -> Caller:
    return Caller(user.id, user.email, user.display_name, user.role, session_id)
