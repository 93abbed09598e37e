"""What billing asks of a payment provider."""

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final, Protocol
from uuid import UUID

from aiohttp import web

from plugins.billing.model import OrderState, PaymentEvent
from server.errors import Code

PROVIDER_TIMEOUT_S: Final = 10.0
"""How long a provider may take to answer; every call of a `Provider` ends by then."""


class ProviderUnavailable(Exception):
    """The provider did not answer, or nothing that can be understood: ask again later."""


class RefundRefused(Exception):
    """The provider will not give this money back; says why in a sentence."""


@dataclass(frozen=True, slots=True)
class Payable:
    """An order as its provider has to know it; `amount` in minor units of `currency`."""

    number: str
    amount: int
    currency: str
    created_at: datetime
    expires_at: datetime
    reference: str
    """The provider's own name for this order's checkout; empty before the first one."""


@dataclass(frozen=True, slots=True)
class Checkout:
    """Where an order is paid: an address to go to, or the text of a QR code that a phone's wallet reads."""

    url: str = ""
    qr_text: str = ""
    reference: str = ""


@dataclass(frozen=True, slots=True)
class Found:
    """What a provider answered when it was asked about an order, and the bytes that said so."""

    event: PaymentEvent
    body: bytes


@dataclass(frozen=True, slots=True)
class RefundWish:
    """Money to give back. `id` is the same each time one refund is asked for."""

    id: UUID
    order: Payable
    payment_id: str
    paid: int
    amount: int
    reason: str


class RefundProgress(StrEnum):
    """How far a provider is with a refund."""

    UNDER_WAY = "under_way"
    DONE = "done"


class Provider(Protocol):
    """Somebody who takes users' money and says so in signed callbacks.

    What it is asked for can be asked again: one order is one payment, one refund's id one refund.
    The calls that leave this machine end within PROVIDER_TIMEOUT_S and raise ProviderUnavailable
    where the outcome is not known.
    """

    @property
    def name(self) -> str:
        """Its name in the callback's address, in orders and in config.toml."""

    @property
    def title(self) -> str:
        """What a person knows it by, an N_() message."""

    async def checkout(self, order: Payable, *, back_url: str, callback_url: str) -> Checkout:
        """Where this order is paid; the payer comes back to `back_url`. Raises ProviderUnavailable."""

    def read_callback(self, headers: Mapping[str, str], body: bytes) -> PaymentEvent:
        """What a callback says.

        Raises Problem(bad_signature); malformed or invalid where it is genuine and cannot be understood.
        """

    def answer(self, outcome: OrderState | Code | None) -> web.Response | None:
        """How this provider wants to be answered, where that differs from what our API says by itself.

        `outcome` is the order's state; or unknown_order, order_closed, amount_mismatch; or None where
        the callback was no order's affair. A provider repeats for days what is not acknowledged. What is
        kept for administrators (order_closed, amount_mismatch) needs no repetition; unknown_order does,
        its order may be on the way.
        """

    async def query(self, order: Payable) -> Found | None:
        """The order's payment, or None while there is none. Raises ProviderUnavailable."""

    async def close(self, order: Payable) -> None:
        """See to it that the order cannot be paid any more. Raises ProviderUnavailable."""

    async def refund(self, wish: RefundWish) -> RefundProgress:
        """Give money back, or ask how far that is. Raises ProviderUnavailable, RefundRefused."""


PROVIDERS: Final[web.AppKey[Mapping[str, Provider]]] = web.AppKey("PROVIDERS", Mapping)
"""The providers that are fully configured, by name; the first one is used where none is chosen."""
