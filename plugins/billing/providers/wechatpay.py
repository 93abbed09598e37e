"""WeChat Pay: Native payments, whose QR code a phone's WeChat reads, in CNY, over API v3.

Sources, at pay.weixin.qq.com: docs/merchant/products/native-payment/apilist.html (orders),
docs/merchant/products/notification/introduction.html (notifications and how they are answered),
doc/v3/merchant/4013070356 (queries), docs/merchant/products/close-order/introduction.html (closing),
doc/v3/merchant/4012552567 (refunds).

wechatpayv3 signs and sends what we ask. It verifies no more than the signature of what succeeded, so every
answer is verified here as well.
"""

import asyncio
from collections.abc import AsyncIterator, Awaitable, Mapping
from contextlib import asynccontextmanager
from datetime import timedelta, timezone
from typing import Final

import httpx
import orjson
from aiohttp import web
from pydantic import ValidationError
from wechatpayv3.async_ import AsyncWeChatPay, WeChatPayType

from plugins.billing.model import OrderState, PaymentEvent, WechatpaySection
from plugins.billing.providers import (
    PROVIDER_TIMEOUT_S,
    Checkout,
    Found,
    Payable,
    ProviderUnavailable,
    RefundProgress,
    RefundRefused,
    RefundWish,
)
from plugins.billing.providers.wechatpay_objects import (
    PAID,
    Answer,
    Notification,
    Other,
    Trade,
    event_of,
)
from plugins.billing.providers.wechatpay_seal import (
    API_V3_KEY_BYTES,
    SIGNATURE_HEADER,
    Seal,
    private_key_in,
    public_key_in,
    public_pem,
)
from server.api import invalid
from server.clock import Clock
from server.errors import Code, Problem
from server.i18n import N_
from server.observe import log

BEIJING: Final = timezone(timedelta(hours=8))
REASON_BYTES: Final = 80
NOT_OPEN: Final = frozenset({"ORDER_NOT_EXIST", "ORDERNOTEXIST", "ORDER_CLOSED", "ORDERCLOSED"})
REFUSALS: Final = frozenset(
    {
        "INVALID_REQUEST",
        "MCH_NOT_EXISTS",
        "NOT_ENOUGH",
        "NO_AUTH",
        "PARAM_ERROR",
        "RESOURCE_NOT_EXISTS",
        "USER_ACCOUNT_ABNORMAL",
    }
)
"""Errors after which a refund was not taken; after any other it is asked for again, under its number."""
ENDED: Final = {
    "CLOSED": "WeChat Pay closed the refund: the merchant's account could not cover it.",
    "ABNORMAL": "The payer's account takes no refund; the merchant platform shows what can be done.",
}


class Wechatpay:
    """Speaks to WeChat Pay's API for one merchant and one of its apps."""

    name: Final = "wechatpay"
    title: Final = N_("WeChat Pay")

    def __init__(self, section: WechatpaySection, seal: Seal, client: httpx.AsyncClient) -> None:
        self._owner = section.merchant_id, section.app_id
        self._seal = seal
        self._client = client
        self._api = AsyncWeChatPay(
            wechatpay_type=WeChatPayType.NATIVE,
            mchid=section.merchant_id,
            private_key=section.private_key,
            cert_serial_no=section.certificate_serial,
            appid=section.app_id,
            apiv3_key=section.api_v3_key,
            public_key=section.public_key,
            public_key_id=section.public_key_id,
        )
        # It has no parameter for either, and would make its client on the loop, reading files.
        self._api._core._gate_way = section.api_url.rstrip("/")
        self._api._core._client = client
        client.event_hooks = {"response": [self._verify]}

    async def checkout(self, order: Payable, *, back_url: str, callback_url: str) -> Checkout:
        """The order's QR code; asked for again with the same parameters, WeChat Pay answers one again."""
        async with _deadline():
            answer = await self._ask(
                self._api.pay(
                    description=f"Cloudphone {order.number}",
                    out_trade_no=order.number,
                    amount={"total": order.amount, "currency": order.currency},
                    time_expire=order.expires_at.astimezone(BEIJING).isoformat(timespec="seconds"),
                    notify_url=callback_url,
                )
            )
        code_url = answer.fields.get("code_url")
        if answer.status != 200 or not isinstance(code_url, str) or not code_url:
            raise answer.unexpected()
        return Checkout(qr_text=code_url)

    def read_callback(self, headers: Mapping[str, str], body: bytes) -> PaymentEvent:
        """What a notification says that bears the platform's seal and is about us.

        Raises Problem: bad_signature, malformed, invalid.
        """
        if not self._seal.is_on(headers, body):
            raise Problem(Code.BAD_SIGNATURE)
        try:
            notification = Notification.model_validate(orjson.loads(body))
            said = self._seal.opened(notification.resource)
            if notification.event_type.startswith("TRANSACTION."):
                trade = Trade.model_validate(said)
                if not self._is_ours(trade):
                    raise Problem(Code.BAD_SIGNATURE)
                return event_of(notification.id, trade)
            other = Other.model_validate(said)
            if other.mchid not in {"", self._owner[0]}:
                raise Problem(Code.BAD_SIGNATURE)
            return PaymentEvent(
                event_id=notification.id,
                order_number=other.out_trade_no,
                amount=0,
                currency="CNY",
                status="other",
            )
        except orjson.JSONDecodeError:
            raise Problem(Code.MALFORMED, N_("The body is not JSON.")) from None
        except ValidationError as error:
            raise invalid(error) from None

    def answer(self, outcome: OrderState | Code | None) -> web.Response:
        """No content ends the repetitions, which go on for a day; a failure keeps them coming."""
        if outcome is Code.UNKNOWN_ORDER:
            return web.json_response({"code": "FAIL", "message": "unknown order"}, status=outcome.status)
        return web.Response(status=204)

    async def query(self, order: Payable) -> Found | None:
        """The order's payment, also one that was given back since; or None."""
        async with _deadline():
            answer = await self._ask(self._api.query(out_trade_no=order.number))
        if answer.code in NOT_OPEN:
            return None
        try:
            trade = Trade.model_validate(answer.fields)
            if answer.status != 200 or not self._is_ours(trade) or trade.out_trade_no != order.number:
                raise answer.unexpected()
            if trade.trade_state not in PAID:
                return None
            return Found(event_of(f"query_{trade.transaction_id}", trade), answer.body)
        except (ValidationError, Problem):
            raise answer.unexpected() from None

    async def close(self, order: Payable) -> None:
        """Close the order. One that was paid meanwhile raises, so that its payment is looked for again."""
        async with _deadline():
            answer = await self._ask(self._api.close(order.number))
        if answer.status != 204 and answer.code not in NOT_OPEN:
            raise answer.unexpected()

    async def refund(self, wish: RefundWish) -> RefundProgress:
        """Give money back. WeChat Pay carries out one out_refund_no once, and answers it again.

        A refusal may be of the repetition alone, so it is not believed before that number was asked about.
        """
        async with _deadline():
            answer = await self._ask(
                self._api.refund(
                    out_refund_no=wish.id.hex,
                    out_trade_no=wish.order.number,
                    amount={"refund": wish.amount, "total": wish.paid, "currency": wish.order.currency},
                    reason=wish.reason.encode()[:REASON_BYTES].decode(errors="ignore"),
                )
            )
            if 400 <= answer.status < 500 and answer.code in REFUSALS:
                made = await self._ask(self._api.query_refund(wish.id.hex))
                if made.status == 404 and made.code:
                    raise RefundRefused(f"{answer.fields.get('message') or 'No reason'} ({answer.code}).")
                answer = made
        status = answer.fields.get("status")
        if answer.status != 200 or answer.fields.get("out_refund_no") != wish.id.hex:
            raise answer.unexpected()
        if status in ENDED:
            raise RefundRefused(ENDED[status])
        if status not in {"SUCCESS", "PROCESSING"}:
            raise answer.unexpected()
        return RefundProgress.DONE if status == "SUCCESS" else RefundProgress.UNDER_WAY

    async def aclose(self) -> None:
        """Close the connections."""
        await self._client.aclose()

    async def _ask(self, call: Awaitable[tuple[int, str | bytes]]) -> Answer:
        """Raises ProviderUnavailable."""
        try:
            status, text = await call
        except ProviderUnavailable:
            raise
        except Exception as error:  # the library raises plain ones
            raise ProviderUnavailable(f"{type(error).__name__}: {error}"[:500]) from None
        body = text.encode() if isinstance(text, str) else text
        return Answer(status, body)

    async def _verify(self, response: httpx.Response) -> None:
        """Refuse what is not sealed; only an error may come so, from before the platform's own doors."""
        body = await response.aread()
        is_sealed = SIGNATURE_HEADER in response.headers
        if (is_sealed or response.is_success) and not self._seal.is_on(response.headers, body):
            raise ProviderUnavailable(f"an answer that WeChat Pay did not sign: {response.status_code}")

    def _is_ours(self, trade: Trade) -> bool:
        return (trade.mchid, trade.appid) == self._owner


@asynccontextmanager
async def open_wechatpay(section: WechatpaySection, clock: Clock) -> AsyncIterator[Wechatpay | None]:
    """WeChat Pay, where its keys can be read; the log names those that cannot."""
    wechatpay = await asyncio.to_thread(_make, section, clock)
    try:
        yield wechatpay
    finally:
        if wechatpay is not None:
            await wechatpay.aclose()


def _make(section: WechatpaySection, clock: Clock) -> Wechatpay | None:
    """Blocks while it reads keys, ours and those of the authorities that this machine trusts."""
    own, theirs = private_key_in(section.private_key), public_key_in(section.public_key)
    shared = section.api_v3_key if len(section.api_v3_key.encode()) == API_V3_KEY_BYTES else None
    keys = {"private_key": own, "public_key": theirs, "api_v3_key": shared}
    unusable = ", ".join(f"billing.providers.wechatpay.{name}" for name, key in keys.items() if key is None)
    if unusable or theirs is None:
        log.warning("a payment provider stays closed", extra={"provider": "wechatpay", "unusable": unusable})
        return None
    spelled = section.model_copy(update={"private_key": own, "public_key": public_pem(theirs)})
    client = httpx.AsyncClient(timeout=PROVIDER_TIMEOUT_S, trust_env=False)
    return Wechatpay(spelled, Seal(section, theirs, clock), client)


@asynccontextmanager
async def _deadline() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(PROVIDER_TIMEOUT_S):
            yield
    except TimeoutError:
        raise ProviderUnavailable("no answer in time") from None
