"""The HTTP API of accounts, and the pages."""

from typing import Final
from uuid import UUID

import aiohttp_session
from aiohttp import web

from plugins.users.accounts import Users
from plugins.users.audit import AUDIT_LOG, AuditEntry, AuditQuery
from plugins.users.model import (
    Credentials,
    NewUser,
    Place,
    RefreshToken,
    Session,
    SignedIn,
    Ticket,
    User,
    UserChanges,
)
from server.api import Page, Routes
from server.auth import CSRF_TOKEN, SESSION_ID, Access, Caller
from server.errors import Code
from server.forms import submit
from server.interfaces import RANDOMNESS
from server.pages import is_local, render

USERS: Final = web.AppKey("USERS", Users)
routes: Final = Routes("users")


@routes.api("POST", "/auth/register", access=Access.PUBLIC, status=201,
            problems=(Code.EMAIL_TAKEN, Code.REGISTRATION_CLOSED))  # fmt: skip
async def register(request: web.Request, body: NewUser, new_id: UUID) -> Session:
    """Make an account and sign in."""
    users = request.app[USERS]
    return users.sessions.answer(await users.register(new_id, body, Place.of(request)))


@routes.api("POST", "/auth/login", access=Access.PUBLIC,
            problems=(Code.INVALID_CREDENTIALS, Code.FORBIDDEN, Code.TOO_MANY_ATTEMPTS))  # fmt: skip
async def login(request: web.Request, body: Credentials) -> Session:
    """Sign in."""
    users = request.app[USERS]
    return users.sessions.answer(await users.login(body, Place.of(request)))


@routes.api("POST", "/auth/refresh", access=Access.PUBLIC, problems=(Code.INVALID_TOKEN,))
async def refresh(request: web.Request, body: RefreshToken) -> Session:
    """Stay signed in: new tokens for a refresh token, which is spent by this.

    A spent one used again ends the whole session.
    """
    users = request.app[USERS]
    return users.sessions.answer(await users.sessions.renew(body.refresh_token))


@routes.api("POST", "/auth/logout", access=Access.USER)
async def logout(request: web.Request, caller: Caller) -> None:
    """Sign out: the session's tokens are dead at once."""
    await request.app[USERS].sessions.end(caller.session_id)


@routes.api("POST", "/auth/tickets", access=Access.USER, status=201)
async def draw_ticket(request: web.Request, caller: Caller) -> Ticket:
    """A ticket for a WebSocket, where a browser cannot send a header."""
    return request.app[USERS].sessions.draw_ticket(caller)


@routes.api("GET", "/users/me", access=Access.USER)
async def me(request: web.Request, caller: Caller) -> User:
    """Who one is."""
    return request.app[USERS].sessions.me(caller)


@routes.api("PATCH", "/users/me", access=Access.USER)
async def change_me(request: web.Request, caller: Caller, body: UserChanges) -> User:
    """Change one's own account."""
    return await request.app[USERS].change(caller, body)


@routes.api("GET", "/audit", access=Access.ADMIN)
async def list_audit(request: web.Request, query: AuditQuery) -> Page[AuditEntry]:
    """Who did what, when and from where, newest first; only one `action` or `target` where asked."""
    return await request.app[AUDIT_LOG].page(query)


class LoginForm(Credentials):
    """What /login posts."""

    next: str = ""


def _next(address: str) -> str:
    return address if is_local(address) else ""


async def _remember(request: web.Request, signed_in: SignedIn) -> None:
    """Give the browser a cookie for its new session and nothing of the one before."""
    cookie = await aiohttp_session.new_session(request)
    cookie[SESSION_ID] = str(signed_in.session_id)
    cookie[CSRF_TOKEN] = request.app[RANDOMNESS].token()


@routes.page("GET", "/", access=Access.PUBLIC)
async def home_page(request: web.Request) -> web.Response:
    """What this is, or how things stand."""
    return render(request, "users/home.html", {})


@routes.page("GET", "/signup", access=Access.PUBLIC)
async def signup_page(request: web.Request, caller: Caller | None) -> web.Response:
    """The form for a new account."""
    if caller is not None:
        raise web.HTTPSeeOther("/devices")
    is_open = request.app[USERS].registration_open
    return render(request, "users/signup.html", {"errors": {}, "values": {}, "registration_open": is_open})


@routes.page("POST", "/signup", access=Access.PUBLIC)
async def signup(request: web.Request, new_id: UUID) -> web.StreamResponse:
    """Make an account and go on to the phones."""
    users = request.app[USERS]

    async def act(new: NewUser) -> str:
        await _remember(request, await users.register(new_id, new, Place.of(request)))
        return "/devices"

    context = {"registration_open": users.registration_open}
    return await submit(request, NewUser, act, "users/signup.html", context)


@routes.page("GET", "/login", access=Access.PUBLIC)
async def login_page(request: web.Request, caller: Caller | None) -> web.Response:
    """The form to sign in."""
    if caller is not None:
        raise web.HTTPSeeOther("/devices")
    context = {"errors": {}, "values": {}, "next": _next(request.query.get("next", ""))}
    return render(request, "users/login.html", context)


@routes.page("POST", "/login", access=Access.PUBLIC)
async def login_form(request: web.Request, caller: Caller | None) -> web.StreamResponse:
    """Sign in and go on to where one wanted to be."""
    users = request.app[USERS]

    async def act(form: LoginForm) -> str:
        signed_in = await users.login(form, Place.of(request))
        if caller is not None:
            await users.sessions.end(caller.session_id)
        await _remember(request, signed_in)
        return _next(form.next) or "/devices"

    sent = (await request.post()).get("next", "")
    context = {"next": _next(sent) if isinstance(sent, str) else ""}
    return await submit(request, LoginForm, act, "users/login.html", context)


@routes.page("POST", "/logout", access=Access.PUBLIC)
async def logout_form(request: web.Request, caller: Caller | None) -> web.Response:
    """Sign out and go home."""
    if caller is not None:
        await request.app[USERS].sessions.end(caller.session_id)
    (await aiohttp_session.get_session(request)).invalidate()
    raise web.HTTPSeeOther("/")


@routes.page("GET", "/account", access=Access.USER)
async def account_page(request: web.Request, caller: Caller) -> web.Response:
    """One's account and where one is signed in."""
    users = request.app[USERS]
    return render(
        request,
        "users/account.html",
        {"user": users.sessions.me(caller), "sessions": users.sessions.places(caller)},
    )
