"""A stand-in for openapi.alipay.com/gateway.do and for whoever pays on its page.

It keeps trades in memory, refuses what the application has not signed, and answers page pay, query, close,
refund and the refund's query as opendocs.alipay.com documents them, signed with a key of its own. What it
does not have: accounts, risk checks, fees, a page to look at, and any clock: a trade never expires by itself.
It signs with `cryptography`, not with the library under test.
"""

import asyncio
import base64
import json
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from typing import Final, Self
from urllib.parse import urlencode

import aiohttp
from aiohttp import web
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.hashes import SHA256

APP_ID: Final = "2014072300007148"
PAID_AT: Final = "2030-01-01 10:00:00"


class Fault(StrEnum):
    """What is wrong with the gateway."""

    DOWN = "down"
    SLOW = "slow"
    WRONG_SIGNATURE = "wrong_signature"
    SYSTEM_ERROR = "system_error"
    CUT = "cut"
    """It does what it is asked, and the answer is lost."""


@dataclass
class Trade:
    """What somebody opened on the page."""

    number: str
    trade_no: str
    total: str
    notify_url: str
    time_expire: str
    status: str = "WAIT_BUYER_PAY"
    refunds: dict[str, Decimal] = field(default_factory=dict)

    @property
    def refunded(self) -> Decimal:
        """Yuan given back."""
        return sum(self.refunds.values(), Decimal("0.00"))


class Gateway:
    """The gateway, with Alipay's key and one application's public key."""

    def __init__(self, key: RSAPrivateKey, app_key: RSAPublicKey) -> None:
        self._key, self._app_key = key, app_key
        self.trades: dict[str, Trade] = {}
        self.asked: list[str] = []
        """The methods that were asked for with a good signature, in order."""
        self.fault: Fault | None = None
        self.refunds_wait = False
        """While set, refunds are taken and not carried out."""
        self.url = ""

    @classmethod
    @asynccontextmanager
    async def started(cls, key: RSAPrivateKey, app_key: RSAPublicKey) -> AsyncIterator[Self]:
        """A gateway on a free port of 127.0.0.1 until the block ends."""
        gateway = cls(key, app_key)
        app = web.Application()
        app.router.add_route("*", "/gateway.do", gateway._serve)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        try:
            await web.TCPSite(runner, "127.0.0.1", 0).start()
            gateway.url = f"http://127.0.0.1:{runner.addresses[0][1]}/gateway.do"
            yield gateway
        finally:
            await runner.cleanup()

    async def pay(self, number: str) -> tuple[int, str]:
        """Somebody pays on the page; what the application says to the notification."""
        assert self.trades[number].status == "WAIT_BUYER_PAY"
        self.trades[number].status = "TRADE_SUCCESS"
        return await self.notify(number)

    async def notify(self, number: str, **changes: str) -> tuple[int, str]:
        """Tell where a trade is, as often as one likes; what the application says to it."""
        trade = self.trades[number]
        form = signed_form(notification(trade) | changes, self._key)
        headers = {"Content-Type": "application/x-www-form-urlencoded; charset=utf-8"}
        async with (
            aiohttp.ClientSession() as http,
            http.post(trade.notify_url, data=form, headers=headers) as reply,
        ):
            return reply.status, await reply.text()

    async def _serve(self, request: web.Request) -> web.Response:
        if self.fault is Fault.DOWN:
            return web.Response(status=502, text="<html>Bad Gateway</html>", content_type="text/html")
        if self.fault is Fault.SLOW:
            await asyncio.sleep(60)
        params = {
            name: str(value) for name, value in (*request.query.items(), *(await request.post()).items())
        }
        method = params["method"]
        if not self._is_signed(params):
            facts = {"code": "40002", "msg": "Invalid Arguments", "sub_code": "isv.invalid-signature"}
            return web.json_response({f"{method.replace('.', '_')}_response": facts})
        self.asked.append(method)
        content = json.loads(params["biz_content"])
        if method == "alipay.trade.page.pay":
            return self._open(params, content)
        if self.fault is Fault.SYSTEM_ERROR:
            return self._answer(method, _refusal("ACQ.SYSTEM_ERROR"))
        facts = self._do(method, content)
        if self.fault is Fault.CUT and request.transport:
            request.transport.abort()
        return self._answer(method, facts)

    def _is_signed(self, params: Mapping[str, str]) -> bool:
        content = _content({name: value for name, value in params.items() if name != "sign"})
        try:
            signature = base64.b64decode(params["sign"])
            self._app_key.verify(signature, content.encode(), PKCS1v15(), SHA256())
        except InvalidSignature:
            return False
        return (params["app_id"], params["sign_type"], params["charset"]) == (APP_ID, "RSA2", "utf-8")

    def _open(self, params: Mapping[str, str], content: Mapping[str, str]) -> web.Response:
        assert content["product_code"] == "FAST_INSTANT_TRADE_PAY"
        trade = Trade(
            number=content["out_trade_no"],
            trade_no=f"20300101220014{len(self.trades):014}",
            total=content["total_amount"],
            notify_url=params["notify_url"],
            time_expire=content["time_expire"],
        )
        self.trades.setdefault(trade.number, trade)
        return web.Response(text="the page where it is paid")

    def _do(self, method: str, content: Mapping[str, str]) -> dict[str, str]:
        by_trade_no = {trade.trade_no: trade for trade in self.trades.values()}
        trade = by_trade_no.get(content.get("trade_no", "")) or self.trades.get(
            content.get("out_trade_no", "")
        )
        if trade is None:
            return _refusal("ACQ.TRADE_NOT_EXIST")
        done = {"code": "10000", "msg": "Success", "out_trade_no": trade.number, "trade_no": trade.trade_no}
        match method:
            case "alipay.trade.query":
                return {**done, "trade_status": trade.status, "total_amount": trade.total}
            case "alipay.trade.close" if trade.status == "WAIT_BUYER_PAY":
                trade.status = "TRADE_CLOSED"
                return done
            case "alipay.trade.refund":
                return self._refund(trade, content, done)
            case "alipay.trade.fastpay.refund.query":
                made = trade.refunds.get(content["out_request_no"])
                said = {"refund_status": "REFUND_SUCCESS", "refund_amount": str(made)} if made else {}
                return {**done, "out_request_no": content["out_request_no"], **said}
        return _refusal("ACQ.TRADE_STATUS_ERROR")

    def _refund(self, trade: Trade, content: Mapping[str, str], done: dict[str, str]) -> dict[str, str]:
        name, amount = content["out_request_no"], Decimal(content["refund_amount"])
        made = trade.refunds.get(name)
        if made is not None and made != amount:
            return _refusal("ACQ.DISCORDANT_REPEAT_REQUEST")
        if made is None and trade.status != "TRADE_SUCCESS":
            return _refusal("ACQ.TRADE_HAS_CLOSE")
        if made is None and trade.refunded + amount > Decimal(trade.total):
            return _refusal("ACQ.REASON_TRADE_REFUND_FEE_ERR")
        is_new = made is None and not self.refunds_wait
        if is_new:
            trade.refunds[name] = amount
            if trade.refunded == Decimal(trade.total):
                trade.status = "TRADE_CLOSED"
        return {**done, "fund_change": "Y" if is_new else "N", "refund_fee": str(trade.refunded)}

    def _answer(self, method: str, facts: Mapping[str, str]) -> web.Response:
        text = json.dumps(facts, ensure_ascii=False)
        signature = sign(text + "!" if self.fault is Fault.WRONG_SIGNATURE else text, self._key)
        body = f'{{"{method.replace(".", "_")}_response":{text},"sign":"{signature}"}}'
        return web.Response(text=body, content_type="text/html")


def notification(trade: Trade) -> dict[str, str]:
    """What Alipay tells of a trade, shortened after the example on the page of its signatures."""
    told = {
        "app_id": APP_ID,
        "buyer_id": "2088102116773037",
        "charset": "utf-8",
        "gmt_create": "2030-01-01 09:59:00",
        "notify_id": f"{trade.trade_no}-{trade.status}-{len(trade.refunds)}",
        "notify_time": PAID_AT,
        "notify_type": "trade_status_sync",
        "out_trade_no": trade.number,
        "seller_id": "2088102119685838",
        "subject": f"充值 {trade.number}",
        "total_amount": trade.total,
        "trade_no": trade.trade_no,
        "trade_status": trade.status,
        "version": "1.0",
    }
    if trade.status != "WAIT_BUYER_PAY" and (trade.status == "TRADE_SUCCESS" or trade.refunds):
        told |= {"gmt_payment": PAID_AT, "refund_fee": str(trade.refunded)}
    if trade.refunds:
        told |= {"gmt_refund": "2030-01-02 10:00:00.123", "out_biz_no": list(trade.refunds)[-1]}
    return told


def signed_form(facts: Mapping[str, str], key: RSAPrivateKey, sign_type: str = "RSA2") -> bytes:
    """A notification's body; neither `sign` nor `sign_type` is signed."""
    signature = sign(_content(facts), key)
    return urlencode({**facts, "sign": signature, "sign_type": sign_type}).encode()


def sign(text: str, key: RSAPrivateKey) -> str:
    """RSA2 (SHA256withRSA), as base64."""
    return base64.b64encode(key.sign(text.encode(), PKCS1v15(), SHA256())).decode()


def _content(params: Mapping[str, str]) -> str:
    return "&".join(f"{name}={value}" for name, value in sorted(params.items()))


def _refusal(code: str) -> dict[str, str]:
    return {"code": "40004", "msg": "Business Failed", "sub_code": code, "sub_msg": "业务处理失败"}
