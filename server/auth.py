"""Who is calling, what they may do, and whether a browser was tricked into calling."""

import hmac
from dataclasses import dataclass
from enum import IntEnum
from typing import Final, Literal, Protocol
from urllib.parse import urlsplit
from uuid import UUID

import aiohttp_session
from aiohttp import hdrs, web

from server.errors import Code, Problem
from server.i18n import N_
from server.request_keys import CALLER, PAGE_CSRF

SAFE_METHODS = frozenset({"GET", "HEAD", "OPTIONS"})
SESSION_ID = "sid"
CSRF_TOKEN = "csrf"  # noqa: S105  (the name of a field, not a secret)


class Access(IntEnum):
    """Who may call a route; every route says one."""

    PUBLIC = 0
    USER = 1
    ADMIN = 2


@dataclass(frozen=True, slots=True)
class Caller:
    """A signed-in person or their program, with what is known of them from memory."""

    user_id: UUID
    email: str
    display_name: str
    role: Literal["user", "admin"]
    session_id: UUID

    @property
    def is_admin(self) -> bool:
        """Whether administrators' routes are open to the caller."""
        return self.role == "admin"


class Authenticator(Protocol):
    """Turns credentials into callers, from memory; provided by the plugin that owns accounts."""

    def caller_of_session(self, session_id: UUID) -> Caller | None:
        """Whose live session this is."""

    def caller_of_token(self, token: str) -> Caller | None:
        """Who holds this access token or API token, if it is valid and its session lives."""

    def redeem_ticket(self, ticket: str) -> Caller | None:
        """Who drew this ticket; it is spent by asking."""


AUTHENTICATOR: Final = web.AppKey("AUTHENTICATOR", Authenticator)
PUBLIC_ORIGIN: Final = web.AppKey("PUBLIC_ORIGIN", str)


async def authenticate(request: web.Request, access: Access, *, is_socket: bool) -> Caller | None:
    """The caller of a request, checked against what the route asks for.

    Raises Problem: not_signed_in, invalid_token, ambiguous_credentials, forbidden, csrf.
    """
    bearer = _bearer_caller(request)
    ticket = _ticket_caller(request) if is_socket else None
    cookie = await _cookie_caller(request)
    if bearer and cookie and bearer.user_id != cookie.user_id:
        raise Problem(Code.AMBIGUOUS_CREDENTIALS)
    caller = bearer or ticket or cookie
    request[CALLER] = caller
    if caller is cookie or caller is None:
        await _refuse_foreign_pages(request, signed_in=cookie is not None, is_socket=is_socket)
    if access is not Access.PUBLIC and caller is None:
        raise Problem(Code.NOT_SIGNED_IN)
    if access is Access.ADMIN and caller is not None and not caller.is_admin:
        raise Problem(Code.FORBIDDEN)
    return caller


async def recognise(request: web.Request) -> None:
    """Note who looks at a page that anybody may see, for its header."""
    if CALLER not in request:
        request[CALLER] = await _cookie_caller(request)


def _bearer_caller(request: web.Request) -> Caller | None:
    headers = request.headers.getall(hdrs.AUTHORIZATION, [])
    if not headers:
        return None
    if len(headers) > 1:
        raise Problem(Code.MALFORMED, N_("There are two Authorization headers."))
    scheme, _, token = headers[0].partition(" ")
    caller = request.app[AUTHENTICATOR].caller_of_token(token) if scheme.lower() == "bearer" else None
    if caller is None:
        raise Problem(Code.INVALID_TOKEN)
    return caller


def _ticket_caller(request: web.Request) -> Caller | None:
    ticket = request.query.get("ticket")
    if ticket is None:
        return None
    caller = request.app[AUTHENTICATOR].redeem_ticket(ticket)
    if caller is None:
        raise Problem(Code.INVALID_TOKEN)
    return caller


async def _cookie_caller(request: web.Request) -> Caller | None:
    if not request.headers.get(hdrs.COOKIE):
        return None
    session = await aiohttp_session.get_session(request)
    request[PAGE_CSRF] = session.get(CSRF_TOKEN, "")
    session_id = session.get(SESSION_ID)
    if session_id is None:
        return None
    return request.app[AUTHENTICATOR].caller_of_session(UUID(session_id))


async def _refuse_foreign_pages(request: web.Request, *, signed_in: bool, is_socket: bool) -> None:
    """Stop another site from acting through the reader's browser.

    A browser names the page's origin on every unsafe request and every WebSocket; programs send none.
    A signed-in browser must also return the token its page carries.
    """
    unsafe = request.method not in SAFE_METHODS
    if not (unsafe or is_socket):
        return
    origin = request.headers.get(hdrs.ORIGIN)
    if origin is not None and not _is_ours(request, origin):
        raise Problem(Code.CSRF, N_("The request came from another site."))
    if origin is None and is_socket and signed_in:
        raise Problem(Code.CSRF, N_("The request does not say which site it came from."))
    if unsafe and signed_in:
        sent = request.headers.get("X-CSRF-Token") or await _form_token(request)
        expected = request[PAGE_CSRF]
        if not expected or not hmac.compare_digest(sent.encode(), expected.encode()):
            raise Problem(Code.CSRF, N_("Reload the page and try again."))


def _is_ours(request: web.Request, origin: str) -> bool:
    return origin == request.app[PUBLIC_ORIGIN] or urlsplit(origin).netloc == request.host


async def _form_token(request: web.Request) -> str:
    if request.content_type != "application/x-www-form-urlencoded":
        return ""
    token = (await request.post()).get("csrf_token", "")
    return token if isinstance(token, str) else ""
