"""Users: accounts, how they sign in, for how long, and what was done by whom.

Tables: `users`, `sessions`, `refresh_tokens`, `audit`.

Invariants: an address has one account, however it is written (`email_folded`). A session is a row; it
is dead everywhere once the row is gone, tokens, cookies and WebSockets alike. A refresh token works
once: a spent one that comes back ends its session, since somebody else has it too. Passwords and
refresh tokens are kept as hashes. Every account is announced (`UserRegistered`) once, in the
transaction that makes it, or that of its first sign-in where the command line made it. What stands in
the audit log stays there as it is.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from aiohttp import web

from plugins.users.accounts import Users
from plugins.users.administrators import create_admin
from plugins.users.audit import AUDIT_LOG, AuditLog
from plugins.users.model import UsersSection
from plugins.users.routes import USERS, routes
from plugins.users.schema import MIGRATIONS
from plugins.users.sessions import Sessions
from server.auth import AUTHENTICATOR
from server.interfaces import AUDIT, CONFIGURATION, DATABASE, DIRECTORY, RANDOMNESS
from server.passwords import Passwords
from server.plugin import Job, Plugin

__all__ = ["PLUGIN", "create_admin"]


async def _notice_administrators(app: web.Application) -> None:
    await app[USERS].notice_administrators()


async def _end_expired_sessions(app: web.Application) -> None:
    await app[USERS].sessions.end_expired()


@asynccontextmanager
async def lifespan(app: web.Application) -> AsyncIterator[None]:
    """Open the accounts, and remember who is signed in."""
    section = app[CONFIGURATION].section("users")
    assert isinstance(section, UsersSection)
    async with Passwords.open(app[RANDOMNESS].token()) as passwords:
        app[AUDIT] = app[AUDIT_LOG] = AuditLog(app[DATABASE])
        app[AUTHENTICATOR] = sessions = Sessions(app, section)
        await sessions.load()
        app[USERS] = app[DIRECTORY] = Users(app, section, sessions, passwords)
        yield


PLUGIN: Final = Plugin(
    name="users",
    config=UsersSection,
    lifespan=lifespan,
    provides=(AUTHENTICATOR, DIRECTORY, AUDIT),
    migrations=MIGRATIONS,
    routes=routes.declared,
    jobs=(
        Job("users.notice_administrators", every_s=1, deadline_s=5, run=_notice_administrators),
        Job("users.end_expired_sessions", every_s=30, deadline_s=10, run=_end_expired_sessions),
    ),
)
