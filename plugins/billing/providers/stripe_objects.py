"""What Stripe says, as far as billing reads it: sessions, events and refunds.

Sources: docs.stripe.com/api/checkout/sessions/object, /api/events/object, /api/refunds/object and
/payments/checkout/fulfill-orders.
"""

from typing import Any, Final, Literal

import stripe
from pydantic import BaseModel, ConfigDict

from plugins.billing.model import PaymentEvent
from plugins.billing.providers import ProviderUnavailable

ORDER_KEY: Final = "cloudphone_order"
"""The metadata that names our order. Other shops' sessions on the same account carry none."""
REFUND_KEY: Final = "cloudphone_refund"

Status = Literal["succeeded", "failed", "other"]


class _Object(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, frozen=True)


class Intent(_Object):
    """A session's payment, where it was asked for as a whole."""

    id: str
    status: str


class Session(_Object):
    """A Checkout Session: `amount_total` in minor units of `currency`, which Stripe writes in lower case."""

    id: str
    status: str | None = None
    payment_status: str
    amount_total: int | None = None
    currency: str | None = None
    payment_intent: str | Intent | None = None
    metadata: dict[str, str] | None = None
    url: str | None = None

    @property
    def is_spent(self) -> bool:
        """Whether nothing was nor can be paid with it: it expired, or a payment under way failed."""
        intent = self.payment_intent
        has_failed = isinstance(intent, Intent) and intent.status in {"requires_payment_method", "canceled"}
        return self.status == "expired" or (
            self.status == "complete" and self.payment_status == "unpaid" and has_failed
        )

    def event(self, event_id: str, status: Status) -> PaymentEvent:
        """What happened to its payment, as billing reads it; without an order of ours, no order's affair.

        Raises ValidationError.
        """
        number = (self.metadata or {}).get(ORDER_KEY)
        if number is None:
            return no_order_event(event_id)
        intent = self.payment_intent
        return PaymentEvent(
            event_id=event_id,
            order_number=number,
            amount=self.amount_total or 0,
            currency=(self.currency or "-").upper(),
            status=status,
            payment_id=(intent.id if isinstance(intent, Intent) else intent) or "",
        )


class _EventData(_Object):
    object: dict[str, Any]


class Notice(_Object):
    """An event that a webhook brings."""

    id: str
    type: str
    data: _EventData | None = None

    def event(self) -> PaymentEvent:
        """The event as billing reads it. Raises ValidationError."""
        if not self.type.startswith("checkout.session."):
            return no_order_event(self.id)
        session = Session.model_validate(self.data.object if self.data else {})
        return session.event(self.id, self._status(session))

    def _status(self, session: Session) -> Status:
        match self.type, session.payment_status:
            # A completed session may still wait for its money; then one of the other two follows.
            case ("checkout.session.completed", "paid") | ("checkout.session.async_payment_succeeded", _):
                return "succeeded"
            case ("checkout.session.async_payment_failed", _):
                return "failed"
            case _:
                return "other"


class Refund(_Object):
    """Money given back, or on its way."""

    id: str
    status: str | None = None
    failure_reason: str | None = None
    metadata: dict[str, str] | None = None


class Refunds(_Object):
    """A page of a list of refunds."""

    data: list[Refund]
    has_more: bool


def no_order_event(event_id: str) -> PaymentEvent:
    """An event that concerns no order of ours."""
    return PaymentEvent(event_id=event_id, order_number="-", amount=0, currency="-", status="other")


def bytes_of(answer: stripe.StripeObject) -> bytes:
    """What Stripe answered, before the library read it. Raises ProviderUnavailable where it was no object."""
    response = getattr(answer, "last_response", None)
    if response is None:
        raise ProviderUnavailable("Stripe: an answer that cannot be understood")
    return str(response.body).encode()
