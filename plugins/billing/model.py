"""Billing's configuration, wire models and states."""

from enum import StrEnum
from typing import Annotated, Final, Literal, Self
from uuid import UUID

from pydantic import Field, StringConstraints, model_validator

from server.api import Incoming, Moment, Outgoing, PageQuery
from server.plugin import Section

MOST_AN_ORDER: Final = 10**12
"""Where configured limits end: in minor units, far below what a bigint sums up to."""


class SandboxSection(Section):
    """[billing.providers.sandbox]"""

    secret: str = ""


class StripeSection(Section):
    """[billing.providers.stripe]; open where both secrets are given."""

    secret_key: str = ""
    webhook_secret: str = ""
    api_url: str = "https://api.stripe.com"


class AlipaySection(Section):
    """[billing.providers.alipay]; open where all but the address is given. Keys are PEM or bare base64."""

    app_id: str = ""
    private_key: str = ""
    alipay_public_key: str = ""
    gateway_url: str = "https://openapi.alipay.com/gateway.do"


class WechatpaySection(Section):
    """[billing.providers.wechatpay]; open where all but the address is given. Keys are PEM."""

    app_id: str = ""
    merchant_id: str = ""
    certificate_serial: str = ""
    private_key: str = ""
    api_v3_key: str = ""
    public_key: str = ""
    public_key_id: str = ""
    api_url: str = "https://api.mch.weixin.qq.com"


class ProvidersSection(Section):
    """[billing.providers]"""

    stripe: StripeSection = StripeSection()
    alipay: AlipaySection = AlipaySection()
    wechatpay: WechatpaySection = WechatpaySection()
    sandbox: SandboxSection = SandboxSection()


class BillingSection(Section):
    """[billing]; amounts in minor units of `currency`."""

    currency: Annotated[str, Field(pattern=r"^[A-Z]{3}$")] = "CNY"
    order_ttl_s: Annotated[int, Field(ge=1, le=30 * 86400)] = 900
    expiry_interval_s: Annotated[float, Field(gt=0, le=86400)] = 300
    welcome_credit: Annotated[int, Field(ge=0, le=MOST_AN_ORDER)] = 1000
    min_order: Annotated[int, Field(ge=1, le=MOST_AN_ORDER)] = 1
    max_order: Annotated[int, Field(ge=1, le=MOST_AN_ORDER)] = 100_000_000
    providers: ProvidersSection = ProvidersSection()

    @model_validator(mode="after")
    def _limits_in_order(self) -> Self:
        if self.min_order > self.max_order:
            raise ValueError("min_order is above max_order")
        return self


Reason = Annotated[str, StringConstraints(strip_whitespace=True, min_length=3, max_length=300)]
"""Why an administrator moves money; the user reads it."""


class OrderState(StrEnum):
    """Where an order is; only pending ones move."""

    PENDING = "pending"
    PAID = "paid"
    CANCELLED = "cancelled"
    EXPIRED = "expired"


class AccountKind(StrEnum):
    """Whose money an account counts."""

    USER = "user"
    REVENUE = "revenue"
    CLEARING = "clearing"
    PROMOTIONS = "promotions"
    UNAPPLIED = "unapplied"


class Balance(Outgoing):
    """What a user has, spends an hour now, and for how long that lasts; null where nothing is spent."""

    balance: int
    currency: str
    spending_per_hour: int
    lasts_s: int | None


class Entry(Outgoing):
    """One movement on the user's account; `label` names what it was for where a person would want that."""

    id: UUID
    amount: int
    balance_after: int
    kind: str
    reference: str
    label: str
    created_at: Moment


class NewOrder(Incoming):
    """How much to top up, in minor units, and with which provider; without one, the server's first."""

    amount: int
    provider: Annotated[str, Field(max_length=100)] | None = None


class Order(Outgoing):
    """A top-up and how far its payment is."""

    id: UUID
    number: str
    amount: int
    currency: str
    state: OrderState
    checkout_url: str
    created_at: Moment
    expires_at: Moment
    paid_at: Moment | None


class OpenProvider(Outgoing):
    """A payment provider that takes orders here."""

    name: str
    title: str


class Providers(Outgoing):
    """Who takes payments here; the first is used where none is chosen."""

    items: list[OpenProvider]


class OrderQuery(PageQuery):
    """Which orders."""

    state: OrderState | None = None


class Acknowledgement(Outgoing):
    """The answer to a payment provider's callback."""

    order_state: OrderState


PrintableAscii = Annotated[str, Field(pattern=r"^[\x21-\x7e]{1,255}$")]


class PaymentEvent(Incoming, extra="ignore"):
    """What a provider says happened to a payment; every provider's callback is read into this.

    `payment_id` is the provider's own name for the payment, empty where an order has only one. What tells
    of neither success nor failure is "other": it is kept, and nothing follows from it.
    """

    event_id: PrintableAscii
    order_number: PrintableAscii
    amount: Annotated[int, Field(gt=-(2**63), lt=2**63)]
    currency: PrintableAscii
    status: Literal["succeeded", "failed", "other"]
    payment_id: Annotated[str, Field(pattern=r"^[\x21-\x7e]{0,255}$")] = ""
