"""The hallway: what plugins promise each other.

Keys are declared here once and imported: two AppKeys of equal names are not equal. A method that
writes takes the caller's transaction first, so that a ledger entry, a device's row and a
notification commit together.
"""

from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Final, Protocol
from uuid import UUID

from aiohttp import web

from server.auth import Caller
from server.clock import Clock, Randomness
from server.config import Configuration
from server.db import Database, Tx
from server.events import Events
from server.jobs import Jobs
from server.sockets import Sockets
from server.storage import Storage

DATABASE: Final = web.AppKey("DATABASE", Database)
STORAGE: Final = web.AppKey("STORAGE", Storage)
CLOCK: Final = web.AppKey("CLOCK", Clock)
RANDOMNESS: Final = web.AppKey("RANDOMNESS", Randomness)
EVENTS: Final = web.AppKey("EVENTS", Events)
JOBS: Final = web.AppKey("JOBS", Jobs)
SOCKETS: Final = web.AppKey("SOCKETS", Sockets)
DATA_DIR: Final = web.AppKey("DATA_DIR", Path)
CONFIGURATION: Final = web.AppKey("CONFIGURATION", Configuration)
SECRET_KEY: Final = web.AppKey("SECRET_KEY", str)
OWN_URL: Final[web.AppKey[Callable[[], str]]] = web.AppKey("OWN_URL")
"""Where this server listens, for requests it sends to itself; known once it listens."""


class Topic(StrEnum):
    """What a notification is about."""

    DEVICE_STATE = "device.state"
    APP_INSTALLATION = "app.installation"
    BILLING_ORDER = "billing.order"
    BILLING_BALANCE = "billing.balance"
    ACCOUNT_SECURITY = "account.security"
    SYSTEM = "system"


@dataclass(frozen=True)
class UserRegistered:
    """An account was made; published by users in the transaction that made it."""

    user_id: UUID


@dataclass(frozen=True)
class DeviceStopped:
    """A phone no longer runs, for whatever reason; published by devices."""

    device_id: UUID
    owner_id: UUID


@dataclass(frozen=True)
class DeviceDeleted:
    """A phone is gone for good; published by devices."""

    device_id: UUID
    owner_id: UUID


class Directory(Protocol):
    """Who has an account; provided by users."""

    async def administrators(self, tx: Tx) -> list[UUID]:
        """The active administrators."""

    async def everyone(self, tx: Tx) -> list[UUID]:
        """Every active account."""

    async def among(self, tx: Tx, user_ids: Collection[UUID]) -> set[UUID]:
        """Which of these are accounts."""

    async def emails(self, user_ids: Collection[UUID]) -> dict[UUID, str]:
        """By which address people know these accounts."""

    async def find(self, text: str, *, limit: int) -> list[tuple[UUID, str]]:
        """Accounts whose address holds `text`, as (id, address), in the order of their addresses."""


class Audit(Protocol):
    """The record of who did what; provided by users."""

    async def record(
        self,
        tx: Tx,
        *,
        action: str,
        target: str,
        actor_id: UUID | None = None,
        address: str = "",
        before: Mapping[str, object] | None = None,
        after: Mapping[str, object] | None = None,
    ) -> None:
        """Write down, in the caller's transaction, that something was done; for ever.

        `action` is the operation's name (`devices.start`), `target` the id of what it was done to. No
        `actor_id` says that the server did it by itself. `address` is where the request came from.
        `before` and `after` hold what changed, without secrets.
        """


@dataclass(frozen=True, slots=True)
class Message:
    """A notification that is not stored yet; its fields are those of `Notifier.publish`."""

    user_id: UUID
    topic: Topic
    title: str
    body: str
    params: Mapping[str, object]
    data: Mapping[str, object]


class Notifier(Protocol):
    """Tells a user something, now and for ever; provided by notify."""

    async def publish(
        self,
        tx: Tx,
        user_id: UUID,
        topic: Topic,
        title: str,
        body: str,
        *,
        params: Mapping[str, object] | None = None,
        data: Mapping[str, object] | None = None,
    ) -> None:
        """Store a notification in the caller's transaction; it is streamed once that commits.

        `title` and `body` are N_() messages with `{names}` from `params`, translated for each reader.
        `data` is for programs and goes out as it is. One without a title only moves what pages show,
        and counts as read.
        """

    async def broadcast(
        self,
        tx: Tx,
        user_ids: Collection[UUID],
        topic: Topic,
        title: str,
        body: str,
        *,
        params: Mapping[str, object] | None = None,
        data: Mapping[str, object] | None = None,
    ) -> None:
        """The same to several users: one statement, in an order in which two never wait for each other."""

    async def publish_all(self, tx: Tx, messages: Sequence[Message]) -> None:
        """Different notifications, several for the same user too, in order and as one statement."""


@dataclass(frozen=True, slots=True)
class Usage:
    """What a user shall pay for something they used; `label` is the name they know it by."""

    user_id: UUID
    amount: int
    reference: str
    label: str


@dataclass(frozen=True, slots=True)
class Charged:
    """What a charge took and what it left, in minor units."""

    amount: int
    balance_after: int


class Ledger(Protocol):
    """Users' money, in minor units of one currency; provided by billing.

    A transaction asks it before it publishes a notification: locks that are always taken in the same
    order never wait for each other in a circle. Whatever else a transaction locks comes before both.
    """

    currency: str

    async def lock_balance(self, tx: Tx, user_id: UUID) -> int:
        """The user's balance, which nobody else can change until the transaction ends."""

    async def charge(self, tx: Tx, usages: Sequence[Usage]) -> list[Charged]:
        """Take what was used from its users, all at once; an answer for each, in order.

        Each is cut to what its user still has: `Charged.amount` says how much that was. A transaction
        charges once.
        """


class ShellAnswer(Protocol):
    """What a command on a phone answered."""

    @property
    def exit_code(self) -> int:
        """0 to 255."""

    @property
    def stdout(self) -> bytes:
        """All it wrote."""


class PhoneLink(Protocol):
    """A running phone's ADB connection, as far as other plugins use it."""

    async def shell(self, command: str, *, timeout_s: float) -> ShellAnswer:
        """Run a command to its end."""

    async def install(self, apk: AsyncIterator[bytes], size_bytes: int, *, timeout_s: float) -> None:
        """Stream an APK into the phone's package manager."""


@dataclass(frozen=True, slots=True)
class RentedPhone:
    """What other plugins may know of a device."""

    id: UUID
    owner_id: UUID
    name: str
    running: bool


class Phones(Protocol):
    """Access to rented phones; provided by devices."""

    async def rented(self, caller: Caller, device_id: UUID) -> RentedPhone:
        """The caller's device. Raises Problem(not_found)."""

    async def link(self, device_id: UUID) -> PhoneLink:
        """The device's connection. Raises Problem(device_not_running)."""


DIRECTORY: Final = web.AppKey("DIRECTORY", Directory)
AUDIT: Final = web.AppKey("AUDIT", Audit)
NOTIFIER: Final = web.AppKey("NOTIFIER", Notifier)
LEDGER: Final = web.AppKey("LEDGER", Ledger)
PHONES: Final = web.AppKey("PHONES", Phones)

SpendingRate = Callable[[UUID], int]
SPENDING: Final[web.AppKey[list[SpendingRate]]] = web.AppKey("SPENDING", list)
"""What users spend now, in minor units an hour: who charges them adds a function; opened by billing."""
