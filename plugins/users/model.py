"""What accounts look like to the outside: configuration, what comes in, what goes out."""

import unicodedata
from dataclasses import dataclass
from typing import Annotated, Final, Literal
from uuid import UUID

from aiohttp import web
from pydantic import AfterValidator, Field
from pydantic_core import PydanticKnownError

from server.api import Incoming, Moment, Outgoing
from server.i18n import N_
from server.plugin import Section

PASSWORD_CHARACTERS: Final = (10, 128)
TICKET_TTL_S: Final = 30


class UsersSection(Section):
    """[users]"""

    registration: Literal["open", "closed"] = "open"
    access_token_ttl_s: Annotated[int, Field(ge=10, le=86400)] = 900
    refresh_token_ttl_s: Annotated[int, Field(ge=60, le=365 * 86400)] = 2592000


def fold(email: str) -> str:
    """What two spellings of one address have in common: width, case and space around it do not count."""
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", email).casefold()).strip()


def _address(email: str) -> str:
    """The address without space around it. Raises ValueError where it is none, or hides characters."""
    email = unicodedata.normalize("NFC", email.strip())
    local, _, domain = fold(email).rpartition("@")
    hidden = any(unicodedata.category(character)[0] in "CZ" for character in email + local + domain)
    labels = [label.replace("-", "") for label in domain.split(".")]
    if hidden or not local or "@" in local or not all(label.isalnum() for label in labels):
        raise ValueError(N_("This is not an e-mail address."))
    return email


def _composed(password: str) -> str:
    """The same bytes for the same password, whatever keyboard it was typed on."""
    return unicodedata.normalize("NFC", password)


def _long_enough(password: str) -> str:
    if len(password) < PASSWORD_CHARACTERS[0]:
        raise PydanticKnownError("string_too_short", {"min_length": PASSWORD_CHARACTERS[0]})
    return password


def _one_line(name: str) -> str:
    if any(unicodedata.category(character) in {"Cc", "Zl", "Zp"} for character in name):
        raise ValueError(N_("A name is one line of text."))
    return name.strip()


Email = Annotated[str, Field(max_length=254), AfterValidator(_address)]
NewPassword = Annotated[
    str, Field(max_length=PASSWORD_CHARACTERS[1]), AfterValidator(_composed), AfterValidator(_long_enough)
]
DisplayName = Annotated[str, Field(max_length=80), AfterValidator(_one_line)]


class NewUser(Incoming):
    """Who wants an account."""

    email: Email
    password: NewPassword
    display_name: DisplayName = ""


class Credentials(Incoming):
    """Who says they have one."""

    email: Annotated[str, Field(max_length=1024)]
    password: Annotated[str, Field(max_length=1024), AfterValidator(_composed)]


class RefreshToken(Incoming):
    """The way on from an access token that ran out."""

    refresh_token: Annotated[str, Field(max_length=256)]


class UserChanges(Incoming):
    """What to change; what is left out stays."""

    display_name: DisplayName | None = None


class User(Outgoing):
    """An account."""

    id: UUID
    email: str
    display_name: str
    role: Literal["user", "admin"]
    status: Literal["active", "suspended"]
    created_at: Moment


class Session(Outgoing):
    """Signed in: what a program sends along from now on, and how it stays signed in."""

    access_token: str
    token_type: Literal["Bearer"] = "Bearer"  # noqa: S105  (a scheme's name)
    expires_in: int
    refresh_token: str
    user: User


class Ticket(Outgoing):
    """Opens one WebSocket, once, as `?ticket=`."""

    ticket: str
    expires_in: int = TICKET_TTL_S


class SignedInPlace(Outgoing):
    """A session as its owner sees it."""

    id: UUID
    created_at: Moment
    last_used_at: Moment | None
    user_agent: str
    address: str
    current: bool


@dataclass(frozen=True, slots=True)
class Place:
    """Where somebody signs in from."""

    address: str
    user_agent: str

    @classmethod
    def of(cls, request: web.Request) -> "Place":
        """The place a request comes from."""
        user_agent = request.headers.get("User-Agent", "")[:200]
        return cls(request.remote or "", user_agent.encode(errors="replace").decode())


@dataclass(frozen=True, slots=True)
class SignedIn:
    """A session that was opened or renewed."""

    user: User
    session_id: UUID
    refresh_token: str
