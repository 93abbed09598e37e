"""The sandbox: a payment provider of our own, without money, whose callbacks are as real as any.

Table: `sandbox_payments`, what was paid on its page; whether its callback arrived is another matter.
Signature: `X-Signature: t=<unix seconds>,v1=<hex HMAC-SHA256(secret, "<t>.<raw body>")>`.
"""

import asyncio
import hashlib
import hmac
from collections.abc import Mapping
from typing import Final, Literal

import aiohttp
import orjson
from aiohttp import web
from pydantic import ValidationError

from plugins.billing.model import Order, OrderState, PaymentEvent
from plugins.billing.providers import Checkout, Found, Payable, RefundProgress, RefundWish
from server.api import API_PREFIX, invalid
from server.clock import Clock, Randomness
from server.db import Database
from server.errors import Code, Problem
from server.i18n import N_
from server.interfaces import CLOCK, DATA_DIR, DATABASE, RANDOMNESS
from server.observe import log
from server.secret import kept_secret

SIGNATURE_HEADER: Final = "X-Signature"
TOLERANCE_S: Final = 300
DELIVERY_TIMEOUT_S: Final = 10.0


class Sandbox:
    """Signs, verifies and sends callbacks with one secret."""

    name: Final = "sandbox"
    title: Final = N_("Sandbox (no real money)")

    def __init__(
        self,
        secret: str,
        database: Database,
        clock: Clock,
        randomness: Randomness,
        http: aiohttp.ClientSession,
    ) -> None:
        self._secret = secret.encode()
        self._database = database
        self._clock = clock
        self._randomness = randomness
        self._http = http

    async def checkout(self, order: Payable, *, back_url: str, callback_url: str) -> Checkout:
        """Its own page on this server, which every order's checkout begins on anyway."""
        return Checkout(url=back_url)

    def read_callback(self, headers: Mapping[str, str], body: bytes) -> PaymentEvent:
        """The event of a callback whose signature fits and is at most 300 s off, either way.

        Raises Problem: bad_signature, malformed, invalid.
        """
        signed_at, signature = _parts(headers.get(SIGNATURE_HEADER, ""))
        is_genuine = hmac.compare_digest(self._signature(signed_at, body), signature)
        is_recent = abs(self._clock.now().timestamp() - int(signed_at or "0")) <= TOLERANCE_S
        if not (is_genuine and is_recent):
            raise Problem(Code.BAD_SIGNATURE)
        try:
            orjson.loads(body)
            return PaymentEvent.model_validate_json(body)
        except orjson.JSONDecodeError:
            raise Problem(Code.MALFORMED, N_("The body is not JSON.")) from None
        except ValidationError as error:
            raise invalid(error) from None

    def signature_header(self, body: bytes) -> str:
        """The header a callback with this body carries now."""
        signed_at = str(int(self._clock.now().timestamp()))
        return f"t={signed_at},v1={self._signature(signed_at, body).decode()}"

    def answer(self, outcome: OrderState | Code | None) -> web.Response | None:
        """What our API says by itself."""
        return None

    async def query(self, order: Payable) -> Found | None:
        """The payment made on the sandbox's page, if there is one."""
        event_id = await self._database.fetchval(
            "SELECT event_id FROM sandbox_payments WHERE order_number = $1", order.number
        )
        if event_id is None:
            return None
        body = self._report(event_id, order, "succeeded")
        return Found(PaymentEvent.model_validate_json(body), body)

    async def close(self, order: Payable) -> None:
        """Nothing: its page sees for itself where an order is."""

    async def refund(self, wish: RefundWish) -> RefundProgress:
        """Done at once: no money ever moved."""
        return RefundProgress.DONE

    async def pay(self, order: Order) -> str:
        """Note that an order was paid on the page; the event's id, the same each time.

        From here on the payment is made, whether or not its callback arrives.
        """
        event_id: str = await self._database.fetchval(
            """
            INSERT INTO sandbox_payments (order_number, event_id) VALUES ($1, $2)
            ON CONFLICT (order_number) DO UPDATE SET event_id = sandbox_payments.event_id
            RETURNING event_id
            """,
            order.number,
            self.new_event_id(),
        )
        return event_id

    def new_event_id(self) -> str:
        """Names one event of a payment."""
        return f"evt_{self._randomness.token(18)}"

    async def deliver(
        self, order: Order, event_id: str, status: Literal["succeeded", "failed"], own_url: str
    ) -> None:
        """Send the callback for an order to this server, as a provider elsewhere would.

        Raises Problem(unavailable) where it was not taken; a refusal of the payment itself is no fault.
        """
        body = self._report(event_id, order, status)
        headers = {SIGNATURE_HEADER: self.signature_header(body), "Content-Type": "application/json"}
        url = f"{own_url}{API_PREFIX}/billing/payments/{self.name}"
        try:
            async with (
                asyncio.timeout(DELIVERY_TIMEOUT_S),
                self._http.post(url, data=body, headers=headers) as answer,
            ):
                code = answer.status
        except (TimeoutError, aiohttp.ClientError) as error:
            log.warning("sandbox callback failed", extra={"error": f"{type(error).__name__}: {error}"})
            code = 503
        if code >= 500:
            raise Problem(Code.UNAVAILABLE, N_("The payment could not be reported; try again shortly."))

    def _report(self, event_id: str, order: Order | Payable, status: str) -> bytes:
        return orjson.dumps(
            {
                "event_id": event_id,
                "order_number": order.number,
                "amount": order.amount,
                "currency": order.currency,
                "status": status,
                "occurred_at": self._clock.now().isoformat().replace("+00:00", "Z"),
            }
        )

    def _signature(self, signed_at: str, body: bytes) -> bytes:
        digest = hmac.new(self._secret, signed_at.encode() + b"." + body, hashlib.sha256)
        return digest.hexdigest().encode()


def open_sandbox(
    app: web.Application, http: aiohttp.ClientSession, secret: str, *, is_private: bool
) -> Sandbox | None:
    """The sandbox where it may be used: with a configured secret, or on a server for this machine alone.

    Blocks briefly where its secret is made or read.
    """
    if not (secret or is_private):
        return None
    kept = kept_secret(app[DATA_DIR], "sandbox", app[RANDOMNESS], secret)
    return Sandbox(kept, app[DATABASE], app[CLOCK], app[RANDOMNESS], http)


def _parts(header: str) -> tuple[str, bytes]:
    """`t` (digits, or nothing where it does not read as a time) and `v1` of a signature header."""
    parts = dict(part.strip().partition("=")[::2] for part in header.split(","))
    signed_at = parts.get("t", "")
    is_time = signed_at.isascii() and signed_at.isdigit() and len(signed_at) <= 12
    return signed_at if is_time else "", parts.get("v1", "").encode(errors="replace")
