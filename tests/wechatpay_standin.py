"""A stand-in for WeChat Pay's API v3: Native orders, queries, closing and refunds of one merchant.

It stands in for https://api.mch.weixin.qq.com in public-key mode: it verifies each request's signature with
the merchant's public key, signs its answers with the platform's key, and sends encrypted, signed
notifications where an order asked for them. Its cryptography is its own, not the client library's. It knows
one payer, who pays when a test says so; coupons, partners and the merchant platform it does not know.
"""

import asyncio
import base64
import json
import re
import secrets
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Self

import aiohttp
from aiohttp import web
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.padding import PKCS1v15
from cryptography.hazmat.primitives.asymmetric.rsa import RSAPrivateKey, RSAPublicKey
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256

MERCHANT, APP = "1900000109", "wxd678efh567hg6787"
SERIAL = "5157F09EFDC096DE15EBE81A47057A7232F1B8E1"
API_V3_KEY = "0123456789abcdef0123456789ABCDEF"
PUBLIC_KEY_ID = "PUB_KEY_ID_0119000001092024101100397200000006"
SCHEME = "WECHATPAY2-SHA256-RSA2048"

Fields = dict[str, Any]


@dataclass
class Fault:
    """What is wrong with it now."""

    is_down: bool = False
    is_slow_s: float = 0
    error: tuple[int, str] | None = None
    """Requests whose method and path begin with `only` are answered with this status and code."""
    only: str = ""
    seal: Fields = field(default_factory=dict)
    """What differs in how answers are signed: `key`, `serial`, `off_s`, or `left_out`."""
    payer: tuple[str, str] = "", ""
    """The end of a path, and the number of the order that is paid just before that is answered."""


def sealed(key: RSAPrivateKey, body: bytes, *, serial: str = PUBLIC_KEY_ID, off_s: int = 0) -> dict[str, str]:
    """The headers of what the platform signs `off_s` from now."""
    at, nonce = str(int(time.time()) + off_s), secrets.token_hex(16)
    signature = key.sign(f"{at}\n{nonce}\n".encode() + body + b"\n", PKCS1v15(), SHA256())
    return {
        "Wechatpay-Timestamp": at,
        "Wechatpay-Nonce": nonce,
        "Wechatpay-Serial": serial,
        "Wechatpay-Signature": base64.b64encode(signature).decode(),
        "Wechatpay-Signature-Type": SCHEME,
    }


def notification(
    content: Fields | bytes,
    *,
    event_type: str = "TRANSACTION.SUCCESS",
    key: str = API_V3_KEY,
    **changes: object,
) -> bytes:
    """A notification's body, as docs/merchant/products/notification/introduction.html shows it."""
    nonce, about = secrets.token_hex(6), "transaction"
    plain = content if isinstance(content, bytes) else json.dumps(content).encode()
    encrypted = AESGCM(key.encode()).encrypt(nonce.encode(), plain, about.encode())
    whole: Fields = {
        "id": secrets.token_hex(16),
        "create_time": "2030-01-01T00:00:00+08:00",
        "resource_type": "encrypt-resource",
        "event_type": event_type,
        "summary": "支付成功",
        "resource": {
            "original_type": about,
            "algorithm": "AEAD_AES_256_GCM",
            "ciphertext": base64.b64encode(encrypted).decode(),
            "associated_data": about,
            "nonce": nonce,
        },
    }
    return json.dumps(whole | changes, ensure_ascii=False).encode()


class WechatpayStandin:
    """The API and its one payer; what tests set is `fault`, what they read are `orders` and `refunds`."""

    def __init__(self, platform: RSAPrivateKey, merchant: RSAPublicKey) -> None:
        self._platform, self._merchant = platform, merchant
        self._http = aiohttp.ClientSession()
        self.fault = Fault()
        self.orders: dict[str, Fields] = {}
        self.refunds: dict[str, Fields] = {}
        self.asked: list[str] = []
        self.url = ""

    @classmethod
    @asynccontextmanager
    async def started(cls, platform: RSAPrivateKey, merchant: RSAPublicKey) -> AsyncIterator[Self]:
        """One that listens on a port of its own."""
        standin = cls(platform, merchant)
        app = web.Application(middlewares=[standin._door])
        order = "/v3/pay/transactions/out-trade-no/{number}"
        app.router.add_post("/v3/pay/transactions/native", standin._native)
        app.router.add_get(order, standin._query)
        app.router.add_post(f"{order}/close", standin._close)
        app.router.add_post("/v3/refund/domestic/refunds", standin._refund)
        app.router.add_get("/v3/refund/domestic/refunds/{number}", standin._query_refund)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        standin.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        try:
            yield standin
        finally:
            await standin._http.close()
            await runner.cleanup()

    def pay(self, number: str) -> Fields:
        """The payer pays; what the platform then says of it."""
        order = self.orders[number]
        assert order["trade_state"] == "NOTPAY"
        assert datetime.now().astimezone() < datetime.fromisoformat(order["asked"]["time_expire"])
        total = order["asked"]["amount"]["total"]
        order |= {"trade_state": "SUCCESS", "transaction_id": f"42{secrets.randbelow(10**26):026}"}
        order["amount"] = {"total": total, "payer_total": max(total - 5, 0), "currency": "CNY"}
        return self.told(number)

    def told(self, number: str) -> Fields:
        """An order as the platform tells of it."""
        return {name: value for name, value in self.orders[number].items() if name != "asked"}

    async def notify(self, number: str, body: bytes | None = None) -> tuple[int, bytes]:
        """Send a notification where the order asked for it; how it was answered."""
        body = body or notification(self.told(number))
        headers = sealed(self._platform, body) | {"Content-Type": "application/json"}
        url = self.orders[number]["asked"]["notify_url"]
        async with self._http.post(url, data=body, headers=headers) as answer:
            return answer.status, await answer.read()

    @web.middleware
    async def _door(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        asked = f"{request.method} {request.path}"
        self.asked.append(asked)
        if self.fault.is_down:
            assert request.transport is not None
            request.transport.abort()
        await asyncio.sleep(self.fault.is_slow_s)
        body = await request.read()
        if not self._is_genuine(request, body):
            return web.json_response({"code": "SIGN_ERROR", "message": "错误的签名"}, status=401)
        if self.fault.payer[1] and asked.endswith(self.fault.payer[0]):
            self.pay(self.fault.payer[1])
        if self.fault.error and asked.startswith(self.fault.only):
            answer = _error(*self.fault.error)
        else:
            answered = await handler(request)
            assert isinstance(answered, web.Response)
            answer = answered
        how = dict(self.fault.seal)
        if not how.pop("left_out", False):
            said = answer.body if isinstance(answer.body, bytes) else b""
            answer.headers.update(sealed(how.pop("key", self._platform), said, **how))
        return answer

    def _is_genuine(self, request: web.Request, body: bytes) -> bool:
        scheme, _, rest = request.headers["Authorization"].partition(" ")
        parts = dict(re.findall(r'(\w+)="([^"]*)"', rest))
        at, nonce = parts["timestamp"], parts["nonce_str"]
        message = f"{request.method}\n{request.path_qs}\n{at}\n{nonce}\n".encode() + body + b"\n"
        try:
            self._merchant.verify(base64.b64decode(parts["signature"]), message, PKCS1v15(), SHA256())
        except InvalidSignature:
            return False
        is_ours = (scheme, parts["mchid"], parts["serial_no"]) == (SCHEME, MERCHANT, SERIAL)
        is_asked_for = request.headers["Wechatpay-Serial"] == PUBLIC_KEY_ID
        return is_ours and is_asked_for and abs(time.time() - int(at)) < 300

    async def _native(self, request: web.Request) -> web.Response:
        asked = await request.json()
        number, expires = asked.get("out_trade_no", ""), asked.get("time_expire", "")
        if (
            (asked.get("appid"), asked.get("mchid")) != (APP, MERCHANT)
            or not re.fullmatch(r"[0-9A-Za-z_\-|*]{6,32}", number)
            or not re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+08:00", expires)
            or not 1 <= len(asked.get("description", "")) <= 127
            or not re.fullmatch(r"https?://[^?#]+", asked.get("notify_url", ""))
            or type(asked["amount"]["total"]) is not int
            or asked["amount"]["currency"] != "CNY"
        ):
            return _error(400, "PARAM_ERROR")
        fresh = {"appid": APP, "mchid": MERCHANT, "out_trade_no": number, "trade_state": "NOTPAY"}
        order = self.orders.setdefault(number, fresh | {"asked": asked})
        if order["asked"] != asked:
            return _error(400, "INVALID_REQUEST")
        if order["trade_state"] != "NOTPAY":
            return _error(400, "ORDERPAID" if order["trade_state"] == "SUCCESS" else "ORDER_CLOSED")
        return web.json_response({"code_url": f"weixin://wxpay/bizpayurl?pr={number[-9:]}"})

    async def _query(self, request: web.Request) -> web.Response:
        assert request.query["mchid"] == MERCHANT
        number = request.match_info["number"]
        return (
            web.json_response(self.told(number)) if number in self.orders else _error(404, "ORDER_NOT_EXIST")
        )

    async def _close(self, request: web.Request) -> web.Response:
        assert await request.json() == {"mchid": MERCHANT}
        order = self.orders.get(request.match_info["number"])
        if order is None:
            return _error(404, "ORDER_NOT_EXIST")
        if order["trade_state"] != "NOTPAY":
            return _error(400, "ORDERPAID" if order["trade_state"] == "SUCCESS" else "ORDER_CLOSED")
        order["trade_state"] = "CLOSED"
        return web.Response(status=204)

    async def _refund(self, request: web.Request) -> web.Response:
        asked = await request.json()
        order, amount = self.orders.get(asked["out_trade_no"]), asked["amount"]
        if order is None or "amount" not in order:
            return _error(404, "RESOURCE_NOT_EXISTS")
        made = self.refunds.get(asked["out_refund_no"])
        others = sum(one["amount"]["refund"] for one in self.refunds.values() if one is not made)
        if amount["total"] != order["amount"]["total"] or others + amount["refund"] > amount["total"]:
            return _error(400, "INVALID_REQUEST")
        if made is None:
            made = self.refunds[asked["out_refund_no"]] = asked | {"status": "PROCESSING"}
            order["trade_state"] = "REFUND"
        return web.json_response(made)

    async def _query_refund(self, request: web.Request) -> web.Response:
        made = self.refunds.get(request.match_info["number"])
        return web.json_response(made) if made else _error(404, "RESOURCE_NOT_EXISTS")


def _error(status: int, code: str) -> web.Response:
    return web.json_response({"code": code, "message": f"{code}!"}, status=status)
