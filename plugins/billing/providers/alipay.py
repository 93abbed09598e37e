"""Alipay: payments on its own page (page pay), in CNY, signed with RSA2.

Sources: opendocs.alipay.com, the pages of the methods named below and of page pay's notifications
(open/270/105902); for signatures docs.open.alipay.com/200/106120.

python-alipay-sdk signs what we send and verifies what we get. Its own requests are not used: they hold up
a thread with a timeout that begins anew with each packet and so never ends a slow answer, and follow
redirects. Its stamps are the machine's local time, where Alipay reads Beijing's; ours replace them.

No notification is too old: Alipay documents no limit, and repeats one under the same notify_id for 25 hours.
"""

import asyncio
import base64
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from datetime import datetime, timedelta, timezone
from decimal import Decimal
from typing import Any, Final, Literal
from urllib.parse import parse_qsl

import aiohttp
from aiohttp import web
from alipay import AliPay
from cryptography.exceptions import UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.serialization import load_der_private_key, load_der_public_key

from plugins.billing.model import AlipaySection, OrderState, PaymentEvent
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
from server.clock import Clock
from server.errors import Code, Problem
from server.i18n import N_
from server.observe import log

BEIJING: Final = timezone(timedelta(hours=8))
LONGEST_WAIT: Final = timedelta(days=14)
"""Alipay takes no expiry more than 15 days ahead by its own clock."""
YUAN: Final = re.compile(r"[0-9]{1,13}(\.[0-9]{1,2})?")
FORM: Final = {"Content-Type": "application/x-www-form-urlencoded;charset=utf-8"}
PAID: Final = frozenset({"TRADE_SUCCESS", "TRADE_FINISHED"})
SUCCESS: Final = "10000"
NO_TRADE: Final = frozenset({"ACQ.TRADE_NOT_EXIST", "TRADE_NOT_EXIST"})
NOT_WAITING: Final = frozenset(
    {"ACQ.TRADE_STATUS_ERROR", "ACQ.REASON_TRADE_STATUS_INVALID", "ACQ.REASON_ILLEGAL_STATUS"}
)
"""Why a trade is not closed: it is already, or it is paid."""
UNDECIDED: Final = frozenset({"ACQ.SYSTEM_ERROR", "ACQ.REFUND_CHARGE_ERROR"})
"""Answers to a refund after which Alipay wants to be asked again."""

Status = Literal["succeeded", "failed", "other"]


class Alipay:
    """Speaks to Alipay's gateway for one application."""

    name: Final = "alipay"
    title: Final = N_("Alipay")

    def __init__(self, gateway_url: str, sdk: AliPay, clock: Clock, http: aiohttp.ClientSession) -> None:
        self._gateway_url = gateway_url
        self._sdk = sdk
        self._clock = clock
        self._http = http

    async def checkout(self, order: Payable, *, back_url: str, callback_url: str) -> Checkout:
        """Alipay's page for this order; nothing is asked, the address is signed."""
        expires_at = min(order.expires_at, self._clock.now() + LONGEST_WAIT)
        trade = {
            "out_trade_no": order.number,
            "product_code": "FAST_INSTANT_TRADE_PAY",
            "subject": f"Cloudphone {order.number}",
            "total_amount": _yuan(order.amount),
            "time_expire": _beijing(expires_at),
        }
        signed = await self._signed(
            "alipay.trade.page.pay", trade, return_url=back_url, notify_url=callback_url
        )
        return Checkout(url=f"{self._gateway_url}?{signed}")

    def read_callback(self, headers: Mapping[str, str], body: bytes) -> PaymentEvent:
        """What a notification says; one of a refund is "other", whatever became of the trade.

        Raises Problem: bad_signature, invalid.
        """
        try:
            facts = _form(body)
            signature = facts.pop("sign")
            is_genuine = (
                facts.pop("sign_type") == "RSA2"
                and facts["charset"].lower() == "utf-8"
                and facts["app_id"] == self._sdk.appid
                and self._sdk.verify(facts, signature)
            )
        except (KeyError, ValueError):
            is_genuine = False
        if not is_genuine:
            raise Problem(Code.BAD_SIGNATURE)
        try:
            return _event(facts["notify_id"], facts, _status(facts))
        except (KeyError, ValueError):
            raise Problem(Code.INVALID) from None

    def answer(self, outcome: OrderState | Code | None) -> web.Response:
        """The word that ends the repetitions, and another where they are wanted."""
        if outcome is Code.UNKNOWN_ORDER:
            return web.Response(text="failure", status=outcome.status)
        return web.Response(text="success")

    async def query(self, order: Payable) -> Found | None:
        """The order's payment; a trade that is closed, unpaid or returned in full, is none."""
        async with _deadline():
            answer, body = await self._ask("alipay.trade.query", {"out_trade_no": order.number})
        if answer.get("sub_code") in NO_TRADE:
            return None
        if not _is_done(answer, order):
            raise _not_understood(answer)
        if answer.get("trade_status") not in PAID:
            return None
        try:
            return Found(_event(f"query_{answer['trade_no']}", answer, "succeeded"), body)
        except (KeyError, ValueError):
            raise ProviderUnavailable("a payment that cannot be understood") from None

    async def close(self, order: Payable) -> None:
        """Close the trade. One that was paid meanwhile raises, so that its payment is looked for again."""
        async with _deadline():
            answer, _ = await self._ask("alipay.trade.close", {"out_trade_no": order.number})
            if _is_done(answer, order) or answer.get("sub_code") in NO_TRADE:
                return
            if answer.get("sub_code") not in NOT_WAITING:
                raise _not_understood(answer)
            if await self.query(order) is not None:
                raise ProviderUnavailable("the trade was paid while it was to be closed")

    async def refund(self, wish: RefundWish) -> RefundProgress:
        """Give money back. Alipay carries out one out_request_no once, and answers it again.

        What was not paid out by this very request (fund_change) may have been by an earlier one; neither
        that nor a refusal is believed before Alipay was asked about the refund itself.
        """
        trade = {"trade_no": wish.payment_id} if wish.payment_id else {"out_trade_no": wish.order.number}
        refund = {**trade, "out_request_no": str(wish.id)}
        wanted = {**refund, "refund_amount": _yuan(wish.amount)}
        if wish.reason:
            wanted["refund_reason"] = wish.reason[:256]
        async with _deadline():
            answer, _ = await self._ask("alipay.trade.refund", wanted)
            is_taken = _is_done(answer, wish.order)
            if is_taken and answer.get("fund_change") == "Y":
                return RefundProgress.DONE
            code = str(answer.get("sub_code"))
            if not is_taken and (not code.startswith("ACQ.") or code in UNDECIDED):
                raise _not_understood(answer)
            made, _ = await self._ask("alipay.trade.fastpay.refund.query", refund)
        if made.get("code") != SUCCESS and made.get("sub_code") not in NO_TRADE:
            raise _not_understood(made)
        if made.get("refund_status") == "REFUND_SUCCESS" and made.get("out_request_no") == str(wish.id):
            return RefundProgress.DONE
        if is_taken:
            return RefundProgress.UNDER_WAY
        raise RefundRefused(f"{answer.get('sub_msg') or 'No reason was given'} ({code}).")

    async def _ask(self, method: str, content: dict[str, str]) -> tuple[dict[str, Any], bytes]:
        """What the gateway answers, verified, and the whole answer as it came.

        Raises ProviderUnavailable.
        """
        form = await self._signed(method, content)
        try:
            async with self._http.post(
                self._gateway_url, data=form, headers=FORM, allow_redirects=False
            ) as response:
                body = await response.read()
        except aiohttp.ClientError as error:
            raise ProviderUnavailable(f"{method}: {type(error).__name__}: {error}") from None
        # Verifies the part of the text that is signed, and reads that part alone.
        read, name = self._sdk._verify_and_return_sync_response, f"{method.replace('.', '_')}_response"
        try:
            return await asyncio.to_thread(read, body.decode(), name), body
        except Exception as error:  # the library stumbles in many ways over what is no signed answer
            raise ProviderUnavailable(f"{method}: no genuine answer: {error!r}"[:500]) from None

    async def _signed(self, method: str, content: dict[str, str], **more: str) -> str:
        """A request as a query string, or a form's body."""
        stamp = _beijing(self._clock.now())
        signed: str = await asyncio.to_thread(self._sdk.client_api, method, content, timestamp=stamp, **more)
        return signed


def open_alipay(section: AlipaySection, clock: Clock, http: aiohttp.ClientSession) -> Alipay | None:
    """Alipay, where both keys can be read; the log names one that cannot. Blocks while it reads them."""
    read = "private_key"
    try:
        own = load_der_private_key(_der(section.private_key), None)
        if not isinstance(own, RSAPrivateKey):
            raise ValueError("not an RSA key")
        read = "alipay_public_key"
        theirs = load_der_public_key(_der(section.alipay_public_key))
        # The console shows the application's own public key right beside Alipay's.
        if not isinstance(theirs, RSAPublicKey) or theirs == own.public_key():
            raise ValueError("not Alipay's RSA key")
        sdk = AliPay(
            section.app_id,
            app_private_key_string=_der(section.private_key),
            alipay_public_key_string=_der(section.alipay_public_key),
        )
    except (ValueError, TypeError, UnsupportedAlgorithm):
        unusable = f"billing.providers.alipay.{read}"
        log.warning("a payment provider stays closed", extra={"provider": "alipay", "unusable": unusable})
        return None
    return Alipay(section.gateway_url, sdk, clock, http)


@asynccontextmanager
async def _deadline() -> AsyncIterator[None]:
    try:
        async with asyncio.timeout(PROVIDER_TIMEOUT_S):
            yield
    except TimeoutError:
        raise ProviderUnavailable("no answer in time") from None


def _form(body: bytes) -> dict[str, str]:
    """A form whose names come once each. Raises ValueError."""
    pairs = parse_qsl(body.decode(), keep_blank_values=True, strict_parsing=True, errors="strict")
    form = dict(pairs)
    if len(form) != len(pairs):
        raise ValueError("a name comes twice")
    return form


def _status(facts: Mapping[str, str]) -> Status:
    """What a notification tells of the payment itself.

    Each refund repeats the trade's status, TRADE_SUCCESS or at last TRADE_CLOSED, with the time and the sum
    of what was returned. A payment's first notification may say that 0.00 were.
    """
    if facts.get("gmt_refund") or facts.get("refund_fee", "").strip("0."):
        return "other"
    if facts["trade_status"] in PAID:
        return "succeeded"
    is_unpaid = facts["trade_status"] == "TRADE_CLOSED" and not facts.get("gmt_payment")
    return "failed" if is_unpaid else "other"


def _event(event_id: str, facts: Mapping[str, Any], status: Status) -> PaymentEvent:
    """A notification's or an answer's facts. Raises KeyError, ValueError."""
    return PaymentEvent(
        event_id=event_id,
        order_number=facts["out_trade_no"],
        amount=_fen(facts["total_amount"]),
        currency="CNY",
        status=status,
        payment_id=facts["trade_no"],
    )


def _is_done(answer: Mapping[str, Any], order: Payable) -> bool:
    """Whether it is this order's answer, and no other's sent again, and says that it was done."""
    return answer.get("code") == SUCCESS and answer.get("out_trade_no") == order.number


def _not_understood(answer: Mapping[str, Any]) -> ProviderUnavailable:
    facts = (answer.get(name) for name in ("code", "sub_code", "sub_msg", "out_trade_no"))
    return ProviderUnavailable("an unexpected answer: " + " ".join(str(fact) for fact in facts if fact))


def _yuan(fen: int) -> str:
    return f"{Decimal(fen) / 100:.2f}"


def _fen(yuan: object) -> int:
    """Yuan as Alipay writes them, a text with at most two decimals. Raises ValueError."""
    if not isinstance(yuan, str) or not YUAN.fullmatch(yuan):
        raise ValueError("no amount in yuan")
    return int(Decimal(yuan) * 100)


def _beijing(moment: datetime) -> str:
    return moment.astimezone(BEIJING).strftime("%Y-%m-%d %H:%M:%S")


def _der(key: str) -> bytes:
    """A key in PEM, or its base64 alone. Raises ValueError."""
    lines = (line.strip() for line in key.splitlines())
    return base64.b64decode("".join(line for line in lines if not line.startswith("-----")), validate=True)
