"""What WeChat Pay's API v3 sends: notifications and answers, as far as we read them.

Sources, at pay.weixin.qq.com: docs/merchant/products/notification/introduction.html and
doc/v3/merchant/4013070356 (trades), doc/v3/merchant/4012552567 (errors).
"""

from collections.abc import Mapping
from typing import Any, Final, Literal

import orjson

from plugins.billing.model import PaymentEvent
from plugins.billing.providers import ProviderUnavailable
from server.api import Incoming
from server.errors import Code, Problem
from server.i18n import N_

PAID: Final = frozenset({"SUCCESS", "REFUND"})
"""States of a trade whose money came; from REFUND some of it went back since."""


class Resource(Incoming, extra="ignore"):
    """What a notification has encrypted."""

    algorithm: Literal["AEAD_AES_256_GCM"]
    ciphertext: str
    nonce: str
    associated_data: str = ""


class Notification(Incoming, extra="ignore"):
    """A notification; `id` is the same each time it is repeated."""

    id: str
    event_type: str
    resource: Resource


class Amount(Incoming, extra="ignore"):
    """What the order was for, in fen, whatever its payer's coupons took off."""

    total: int
    currency: str = "CNY"


class Trade(Incoming, extra="ignore"):
    """An order as WeChat Pay tells of it, in notifications and when asked; `amount` only once it is paid."""

    appid: str
    mchid: str
    out_trade_no: str
    trade_state: str
    transaction_id: str = ""
    amount: Amount | None = None


class Other(Incoming, extra="ignore"):
    """What a notification about anything else may have in common with one about an order."""

    mchid: str = ""
    out_trade_no: str = "-"


class Answer:
    """An answer of the API; `fields` is empty where it is no JSON object."""

    def __init__(self, status: int, body: bytes) -> None:
        try:
            fields = orjson.loads(body)
        except orjson.JSONDecodeError:
            fields = None
        self.status = status
        self.body = body
        self.fields: Mapping[str, Any] = fields if isinstance(fields, dict) else {}
        self.code = str(self.fields.get("code", ""))

    def unexpected(self) -> ProviderUnavailable:
        """Why nothing can be done with it."""
        said = (str(self.fields[name]) for name in ("code", "message", "status") if name in self.fields)
        return ProviderUnavailable(f"an unexpected answer: {self.status} {' '.join(said)}"[:500])


def event_of(event_id: str, trade: Trade) -> PaymentEvent:
    """What a trade's state means for its payment. Raises ValidationError, Problem(invalid)."""
    is_paid = trade.trade_state in PAID
    if is_paid and not (trade.amount and trade.transaction_id):
        raise Problem(Code.INVALID, errors=[("resource", N_("A payment without its amount or its name."))])
    has_failed = trade.trade_state == "PAYERROR" and trade.amount is not None
    return PaymentEvent(
        event_id=event_id,
        order_number=trade.out_trade_no,
        amount=trade.amount.total if trade.amount else 0,
        currency=trade.amount.currency if trade.amount else "CNY",
        status="succeeded" if is_paid else "failed" if has_failed else "other",
        payment_id=trade.transaction_id,
    )
