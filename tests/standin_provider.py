"""A payment provider that does as a test says.

It stands in for what no provider's stand-in can be made to do on one's word: stay silent, refuse, take
its time. Real providers' own stand-ins are beside their tests.
"""

from collections.abc import Mapping
from typing import Final

from aiohttp import web

from plugins.billing.model import OrderState, PaymentEvent
from plugins.billing.providers import (
    PROVIDERS,
    Checkout,
    Found,
    Payable,
    ProviderUnavailable,
    RefundProgress,
    RefundRefused,
    RefundWish,
)
from server.errors import Code, Problem
from tests.house import House


class StandinProvider:
    """What tests set: `is_away`, `refusal`, `is_slow`, `paid`. What they read: what it was asked."""

    name: Final = "standin"
    title: Final = "Stand-in"

    def __init__(self) -> None:
        self.is_away = False
        self.is_slow = False
        self.refusal = ""
        self.paid: dict[str, str] = {}  # payments' ids by order number
        self.queried: list[str] = []
        self.closed: list[str] = []
        self.refunds: dict[str, int] = {}  # by refund id: one id is one refund

    async def checkout(self, order: Payable, *, back_url: str, callback_url: str) -> Checkout:
        """A page that is not there."""
        self._answer()
        return Checkout(url=f"https://pay.example.com/{order.number}", reference=f"ref-{order.number}")

    def read_callback(self, headers: Mapping[str, str], body: bytes) -> PaymentEvent:
        """Whoever says so sent it."""
        if headers.get("X-Standin") != "genuine":
            raise Problem(Code.BAD_SIGNATURE)
        return PaymentEvent.model_validate_json(body)

    def answer(self, outcome: OrderState | Code | None) -> web.Response | None:
        """In its own words."""
        return web.Response(text=f"got {outcome.value if outcome else 'nothing'}")

    async def query(self, order: Payable) -> Found | None:
        """Whether a test has paid it."""
        self.queried.append(order.number)
        self._answer()
        payment_id = self.paid.get(order.number)
        if payment_id is None:
            return None
        event = PaymentEvent(
            event_id=f"query_{order.number}_{payment_id}",
            order_number=order.number,
            amount=order.amount,
            currency=order.currency,
            status="succeeded",
            payment_id=payment_id,
        )
        return Found(event, event.model_dump_json().encode())

    async def close(self, order: Payable) -> None:
        """Note it."""
        self._answer()
        self.closed.append(order.number)

    async def refund(self, wish: RefundWish) -> RefundProgress:
        """Give back, refuse, or take its time."""
        self._answer()
        if self.refusal:
            raise RefundRefused(self.refusal)
        self.refunds[str(wish.id)] = wish.amount
        return RefundProgress.UNDER_WAY if self.is_slow else RefundProgress.DONE

    def _answer(self) -> None:
        if self.is_away:
            raise ProviderUnavailable("the stand-in is away")


def install(house: House) -> StandinProvider:
    """Open one beside the house's own providers, until the house stops."""
    provider = StandinProvider()
    providers = house.app[PROVIDERS]
    assert isinstance(providers, dict)
    providers[provider.name] = provider
    return provider
