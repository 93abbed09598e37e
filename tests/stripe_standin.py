"""A stand-in for Stripe on this machine: the parts of its HTTP API that the `stripe` provider uses.

POST /v1/checkout/sessions, GET /v1/checkout/sessions/{id}, POST /v1/checkout/sessions/{id}/expire,
GET and POST /v1/refunds: form-encoded requests, JSON answers and errors of Stripe's shape, bearer keys,
idempotency keys. It checks what a session's limits are, and that no more is given back than was paid. Its
payer is `pay`, its network's faults are `fault`, and its webhooks are signed by code of its own. It has no
card, no page, no API version and no rate limit. After docs.stripe.com/api.
"""

import asyncio
import hashlib
import hmac
import itertools
import json
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from contextlib import asynccontextmanager
from typing import Any, Literal, Self
from urllib.parse import parse_qsl

import aiohttp
from aiohttp import web

SECRET_KEY = "sk_test_of_the_stand_in"
WEBHOOK_SECRET = "whsec_of_the_stand_in"
LEAST_AMOUNT = 50

Fault = Literal["", "down", "slow", "cut", "500", "429", "nonsense"]
Form = dict[str, Any]


class Refusal(Exception):
    """An error as Stripe answers it."""

    def __init__(self, status: int, message: str, code: str | None = None, kind: str = "") -> None:
        super().__init__(message)
        self.status = status
        self.body = {"error": {"type": kind or "invalid_request_error", "code": code, "message": message}}


class StripeStandin:
    """What it was asked, its sessions and its refunds; `fault` is how it behaves from now on.

    "cut" does what was asked and breaks the connection before it answers.
    """

    def __init__(self) -> None:
        self.url = ""
        self.fault: Fault = ""
        self.refund_status = "succeeded"
        self.page_most = 100
        self.asked: list[web.Request] = []
        self.forms: list[Form] = []
        self.sessions: dict[str, Form] = {}
        self.intents: dict[str, Form] = {}
        self.refunds: list[Form] = []
        self._kept: dict[str, tuple[str, str, web.Response]] = {}
        self._numbers = itertools.count(1)

    @classmethod
    @asynccontextmanager
    async def running(cls) -> AsyncIterator[Self]:
        """One that listens on a port of its own."""
        standin = cls()
        app = web.Application(middlewares=[standin._guard])
        app.router.add_post("/v1/checkout/sessions", standin._create_session)
        app.router.add_get("/v1/checkout/sessions/{id}", standin._get_session)
        app.router.add_post("/v1/checkout/sessions/{id}/expire", standin._expire_session)
        app.router.add_get("/v1/refunds", standin._list_refunds)
        app.router.add_post("/v1/refunds", standin._create_refund)
        runner = web.AppRunner(app, access_log=None, shutdown_timeout=0.1)
        await runner.setup()
        await web.TCPSite(runner, "127.0.0.1", 0).start()
        standin.url = f"http://127.0.0.1:{runner.addresses[0][1]}"
        yield standin
        await runner.cleanup()

    def session_of(self, number: str) -> Form:
        """The newest session of an order."""
        return [one for one in self.sessions.values() if one["client_reference_id"] == number][-1]

    def forget_keys(self) -> None:
        """What happens to idempotency keys after a day."""
        self._kept.clear()

    def pay(self, session_id: str, *, is_pending: bool = False) -> None:
        """The payer pays on the session's page; pending money may come later."""
        session = self.sessions[session_id]
        assert session["status"] == "open"
        intent = {
            "id": f"pi_{next(self._numbers)}", "status": "processing" if is_pending else "succeeded",
            "amount": session["amount_total"],
        }  # fmt: skip
        self.intents[intent["id"]] = intent
        session |= {"status": "complete", "url": None, "payment_intent": intent["id"]}
        session["payment_status"] = "unpaid" if is_pending else "paid"

    def settle(self, session_id: str, *, is_paid: bool) -> None:
        """Pending money comes, or will not."""
        session = self.sessions[session_id]
        session["payment_status"] = "paid" if is_paid else "unpaid"
        outcome = "succeeded" if is_paid else "requires_payment_method"
        self.intents[session["payment_intent"]]["status"] = outcome

    def event(self, session_id: str, kind: str = "checkout.session.completed") -> bytes:
        """An event about a session, as a webhook brings it; each is a new one."""
        event = {
            "id": f"evt_{next(self._numbers)}_{time.time_ns()}", "object": "event", "type": kind,
            "created": int(time.time()), "livemode": False, "data": {"object": self.sessions[session_id]},
        }  # fmt: skip
        return json.dumps(event, indent=2).encode()

    async def send(self, body: bytes, url: str) -> int:
        """Deliver a webhook; the answer's status."""
        headers = {"Stripe-Signature": signature(body), "Content-Type": "application/json"}
        async with aiohttp.ClientSession() as http, http.post(url, data=body, headers=headers) as answer:
            return answer.status

    @web.middleware
    async def _guard(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        self.asked.append(request)
        if self.fault == "slow":
            await asyncio.sleep(3600)
        if self.fault == "nonsense":
            return web.json_response([1])
        if self.fault in {"500", "429"}:
            kind = "api_error" if self.fault == "500" else "invalid_request_error"
            return _answer(Refusal(int(self.fault), "Not now.", kind=kind).body, int(self.fault))
        answer: web.StreamResponse | None = None
        if self.fault != "down":
            answer = await self._once(request, handler)
        if self.fault in {"down", "cut"} or answer is None:
            assert request.transport is not None
            request.transport.abort()
            return web.Response()
        return answer

    async def _once(
        self, request: web.Request, handler: Callable[[web.Request], Awaitable[web.StreamResponse]]
    ) -> web.StreamResponse:
        """Answer a request, or one with the same idempotency key as it was answered before."""
        key, body = request.headers.get("Idempotency-Key", ""), await request.text()
        try:
            if request.headers.get("Authorization") != f"Bearer {SECRET_KEY}":
                raise Refusal(401, "Invalid API Key provided: sk_test_****d_in")
            kept = self._kept.get(key) if request.method == "POST" else None
            if kept and kept[:2] != (request.path, body):
                raise Refusal(400, "Keys for idempotent requests ...", kind="idempotency_error")
            answer = kept[2] if kept else await handler(request)
        except Refusal as refusal:
            return _answer(refusal.body, refusal.status)
        assert isinstance(answer, web.Response)
        if request.method == "POST":
            self._kept[key] = request.path, body, answer
        return web.Response(body=answer.body, status=answer.status, content_type="application/json")

    async def _create_session(self, request: web.Request) -> web.Response:
        form = _form(await request.text())
        price = form["line_items"]["0"]["price_data"]
        amount, expires_at = int(price["unit_amount"]), int(form["expires_at"])
        if not 1800 <= expires_at - time.time() <= 86400:
            raise Refusal(400, "The `expires_at` timestamp must be 30 minutes to 24 hours from now.")
        if not re.fullmatch("[a-z]{3}", price["currency"]):
            raise Refusal(400, f"Invalid currency: {price['currency']}")
        if amount < LEAST_AMOUNT:
            raise Refusal(400, "The total amount due must add up to at least ...", "amount_too_small")
        self.forms.append(form)
        session_id = f"cs_test_{next(self._numbers)}"
        self.sessions[session_id] = session = {
            "id": session_id, "object": "checkout.session", "mode": form["mode"], "status": "open",
            "payment_status": "unpaid", "amount_total": amount, "currency": price["currency"],
            "client_reference_id": form["client_reference_id"], "metadata": form["metadata"],
            "payment_intent": None, "url": f"{self.url}/c/pay/{session_id}", "expires_at": expires_at,
        }  # fmt: skip
        return _answer(session)

    async def _get_session(self, request: web.Request) -> web.Response:
        session = self._session(request)
        if "payment_intent" in request.query.getall("expand[0]", []) and session["payment_intent"]:
            session = session | {"payment_intent": self.intents[session["payment_intent"]]}
        return _answer(session)

    async def _expire_session(self, request: web.Request) -> web.Response:
        session = self._session(request)
        if session["status"] != "open" or session.get("is_busy"):
            raise Refusal(400, 'Only Checkout Sessions with a status in ["open"] can be expired.')
        session |= {"status": "expired", "url": None}
        return _answer(session)

    async def _list_refunds(self, request: web.Request) -> web.Response:
        intent, after = request.query["payment_intent"], request.query.get("starting_after")
        found = [refund for refund in reversed(self.refunds) if refund["payment_intent"] == intent]
        if after:
            found = found[[refund["id"] for refund in found].index(after) + 1 :]
        most = min(int(request.query["limit"]), self.page_most)
        return _answer({"object": "list", "data": found[:most], "has_more": len(found) > most})

    async def _create_refund(self, request: web.Request) -> web.Response:
        form = _form(await request.text())
        intent, amount = self.intents.get(form["payment_intent"]), int(form["amount"])
        if intent is None:
            raise Refusal(404, f"No such payment_intent: '{form['payment_intent']}'", "resource_missing")
        given = [one for one in self.refunds if one["payment_intent"] == intent["id"]]
        left = intent["amount"] - sum(one["amount"] for one in given if one["status"] != "failed")
        if not left:
            raise Refusal(
                400, f"Charge of {intent['id']} has already been refunded.", "charge_already_refunded"
            )
        if amount > left:
            raise Refusal(400, f"Refund amount ({amount}) is greater than unrefunded amount ({left})")
        refund = {
            "id": f"re_{next(self._numbers)}", "object": "refund", "amount": amount,
            "payment_intent": intent["id"], "status": self.refund_status, "metadata": form["metadata"],
        }  # fmt: skip
        self.refunds.append(refund)
        return _answer(refund)

    def _session(self, request: web.Request) -> Form:
        session_id = request.match_info["id"]
        if session_id not in self.sessions:
            raise Refusal(404, f"No such checkout.session: {session_id}", "resource_missing")
        return self.sessions[session_id]


def signature(body: bytes, *, secret: str = WEBHOOK_SECRET, at: float | None = None) -> str:
    """The header of a webhook signed now, or at another Unix time."""
    signed_at = str(int(time.time() if at is None else at))
    return f"t={signed_at},v1={digest(body, signed_at, secret)},v0=0"


def digest(body: bytes, signed_at: str, secret: str = WEBHOOK_SECRET) -> str:
    """What a webhook's `v1` is (docs.stripe.com/webhooks/signature)."""
    return hmac.new(secret.encode(), signed_at.encode() + b"." + body, hashlib.sha256).hexdigest()


def _form(body: str) -> Form:
    """A form whose names nest by brackets: `line_items[0][quantity]`."""
    tree: Form = {}
    for name, value in parse_qsl(body):
        *path, last = re.findall(r"[^\[\]]+", name)
        place = tree
        for part in path:
            place = place.setdefault(part, {})
        place[last] = value
    return tree


def _answer(body: Mapping[str, Any], status: int = 200) -> web.Response:
    return web.json_response(body, status=status, headers={"Request-Id": "req_1"})
