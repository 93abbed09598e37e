"""Stripe: an order is paid on the page of a Checkout Session, and webhooks say so.

Sources: docs.stripe.com/api/checkout/sessions, /webhooks/signature, /api/idempotent_requests, /api/refunds
and /currencies. An idempotency key gives the first answer again for at least 24 hours, and an error where it
comes with other parameters: so what a session is made of follows from its order alone.
"""

import asyncio
import logging
from collections.abc import AsyncIterator, Mapping
from contextlib import asynccontextmanager
from typing import Final

import aiohttp
import orjson
import stripe
from aiohttp import web
from babel.numbers import get_currency_precision
from pydantic import ValidationError
from stripe.params import RefundListParams

from plugins.billing.model import OrderState, PaymentEvent, StripeSection
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
from plugins.billing.providers.stripe_objects import (
    ORDER_KEY,
    REFUND_KEY,
    Notice,
    Refund,
    Refunds,
    Session,
    bytes_of,
)
from server.api import invalid
from server.clock import Clock
from server.errors import Code, Problem
from server.i18n import N_
from server.observe import log

SIGNATURE_HEADER: Final = "Stripe-Signature"
TOLERANCE_S: Final = 300
SESSION_LEAST_S: Final = 31 * 60
"""A session lives for 30 minutes to 24 hours from its creation; a minute is left for unequal clocks."""
SESSION_MOST_S: Final = 24 * 3600 - 60
ZERO_DECIMAL: Final = frozenset(
    {"BIF", "CLP", "DJF", "GNF", "JPY", "KMF", "KRW", "PYG", "RWF", "VND", "VUV", "XAF", "XOF", "XPF"}
)
"""Currencies without decimals, here and at Stripe. There MGA is one as well, while ISK and UGX have two, and
of currencies with three it takes only multiples of ten: with none of these do our minor units go together.
"""


class Stripe:
    """Makes sessions, reads their webhooks and gives money back, with the keys of one account."""

    name: Final = "stripe"
    title: Final = N_("Card (Stripe)")

    def __init__(self, client: stripe.StripeClient, webhook_secret: str, clock: Clock) -> None:
        self._sessions = client.v1.checkout.sessions
        self._refunds = client.v1.refunds
        self._webhook_secret = webhook_secret
        self._clock = clock

    async def checkout(self, order: Payable, *, back_url: str, callback_url: str) -> Checkout:
        """The order's session; a new one where it has none, or one with which nothing can be paid any more.

        Raises ProviderUnavailable, Problem(invalid) for an amount that is too small or too large for Stripe.
        """
        async with _asking():
            session = await self._session(order.reference) if order.reference else None
            if session is None or session.is_spent:
                session = await self._open(order, back_url)
        # A completed session has no address any more: the order's own page waits for its callback.
        return Checkout(url=session.url or back_url, reference=session.id)

    def read_callback(self, headers: Mapping[str, str], body: bytes) -> PaymentEvent:
        """The event of a webhook whose signature fits and is at most 300 s off, either way.

        Raises Problem: bad_signature, malformed, invalid.
        """
        self._verify(headers.get(SIGNATURE_HEADER, ""), body)
        try:
            orjson.loads(body)
            return Notice.model_validate_json(body).event()
        except orjson.JSONDecodeError:
            raise Problem(Code.MALFORMED, N_("The body is not JSON.")) from None
        except ValidationError as error:
            raise invalid(error) from None

    def answer(self, outcome: OrderState | Code | None) -> web.Response | None:
        """200 for all that is kept: Stripe repeats what is answered otherwise for days, and then gives up."""
        return None if outcome is Code.UNKNOWN_ORDER else web.json_response({"received": True})

    async def query(self, order: Payable) -> Found | None:
        """The payment of the order's session, if it was paid. Raises ProviderUnavailable."""
        if not order.reference:
            return None
        async with _asking():
            body = bytes_of(await self._sessions.retrieve_async(order.reference))
            session = Session.model_validate_json(body)
            if session.payment_status != "paid":
                return None
            return Found(session.event(f"query_{session.id}", "succeeded"), body)

    async def close(self, order: Payable) -> None:
        """Expire the order's session. Raises ProviderUnavailable, also where it was paid just now."""
        if not order.reference:
            return
        async with _asking():
            try:
                Session.model_validate_json(bytes_of(await self._sessions.expire_async(order.reference)))
            except stripe.InvalidRequestError:
                session = await self._session(order.reference)
                if session.status == "open":
                    raise
                if session.payment_status == "paid":
                    raise ProviderUnavailable("Stripe: the order was paid before it was closed") from None

    async def refund(self, wish: RefundWish) -> RefundProgress:
        """Give money back, once however often it is asked for: a refund carries its wish's id.

        Raises ProviderUnavailable, RefundRefused.
        """
        if not wish.payment_id:
            raise RefundRefused("Stripe has given this payment no name.")
        async with _asking():
            try:
                refund = await self._refund_of(wish) or await self._give_back(wish)
            except (stripe.InvalidRequestError, stripe.CardError) as error:
                raise RefundRefused(f"Stripe: {error.user_message or error.code}") from None
        if refund.status in {"failed", "canceled"}:
            raise RefundRefused(f"Stripe: the refund {refund.status} ({refund.failure_reason or 'unknown'}).")
        return RefundProgress.DONE if refund.status == "succeeded" else RefundProgress.UNDER_WAY

    def _verify(self, header: str, body: bytes) -> None:
        try:
            stripe.WebhookSignature.verify_header(body, header, self._webhook_secret)
            signed_at = next(int(part[2:]) for part in header.split(",") if part.startswith("t="))
        except (stripe.SignatureVerificationError, ValueError, TypeError):
            # The library lets the latter two through, for bodies and signatures of strange bytes.
            raise Problem(Code.BAD_SIGNATURE) from None
        if abs(int(self._clock.now().timestamp()) - signed_at) > TOLERANCE_S:
            raise Problem(Code.BAD_SIGNATURE)

    async def _session(self, reference: str) -> Session:
        answer = await self._sessions.retrieve_async(reference, params={"expand": ["payment_intent"]})
        return Session.model_validate_json(bytes_of(answer))

    async def _open(self, order: Payable, back_url: str) -> Session:
        expires_at = self._session_end(order)
        try:
            answer = await self._sessions.create_async(
                params={
                    "mode": "payment",
                    "client_reference_id": order.number,
                    "metadata": {ORDER_KEY: order.number},
                    "payment_intent_data": {"metadata": {ORDER_KEY: order.number}},
                    "line_items": [
                        {
                            "quantity": 1,
                            "price_data": {
                                "currency": order.currency.lower(),
                                "unit_amount": order.amount,
                                "product_data": {"name": f"Cloudphone {order.number}"},
                            },
                        }
                    ],
                    # Else Stripe may charge, and give back, in the payer's own currency.
                    "adaptive_pricing": {"enabled": False},
                    "expires_at": expires_at,
                    "success_url": back_url,
                    "cancel_url": back_url,
                },
                options={"idempotency_key": f"{order.number}/{order.reference}/{expires_at}"},
            )
        except stripe.InvalidRequestError as error:
            if error.code not in {"amount_too_small", "amount_too_large"}:
                raise
            raise Problem(Code.INVALID, N_("This payment provider does not take this amount.")) from None
        return Session.model_validate_json(bytes_of(answer))

    def _session_end(self, order: Payable) -> int:
        """When the order's session ends by itself; the same each time, for long orders within an hour."""
        latest = int(self._clock.now().timestamp()) + SESSION_MOST_S
        return min(int(order.expires_at.timestamp()) + SESSION_LEAST_S, latest - latest % 3600)

    async def _refund_of(self, wish: RefundWish) -> Refund | None:
        """What an earlier try has made of a wish, though its idempotency key may be forgotten."""
        params: RefundListParams = {"payment_intent": wish.payment_id, "limit": 100}
        while True:
            page = Refunds.model_validate_json(bytes_of(await self._refunds.list_async(params)))
            for refund in page.data:
                if (refund.metadata or {}).get(REFUND_KEY) == str(wish.id):
                    return refund
            if not (page.has_more and page.data):
                return None
            params["starting_after"] = page.data[-1].id

    async def _give_back(self, wish: RefundWish) -> Refund:
        answer = await self._refunds.create_async(
            params={
                "payment_intent": wish.payment_id,
                "amount": wish.amount,
                "metadata": {REFUND_KEY: str(wish.id), ORDER_KEY: wish.order.number},
            },
            options={"idempotency_key": f"refund/{wish.id}"},
        )
        return Refund.model_validate_json(bytes_of(answer))


def open_stripe(
    section: StripeSection, currency: str, clock: Clock, http: aiohttp.ClientSession
) -> Stripe | None:
    """Stripe with a complete section; None, and a line in the log, for a currency it counts otherwise.

    Loads parts of the library from disk: for a thread.
    """
    if get_currency_precision(currency) != (0 if currency in ZERO_DECIMAL else 2):
        missing = f"billing.currency with the same minor units at Stripe, not {currency}"
        log.warning("a payment provider stays closed", extra={"provider": Stripe.name, "missing": missing})
        return None
    # Else each request tells what system this is, and an id for it is left in the home directory.
    stripe.enable_telemetry = False
    logging.getLogger("stripe").setLevel(logging.WARNING)
    client = stripe.StripeClient(
        section.secret_key,
        base_addresses={"api": section.api_url.rstrip("/")},
        http_client=stripe.AIOHTTPClient(aiohttp.ClientTimeout(PROVIDER_TIMEOUT_S), session=http),
        max_network_retries=1,
    )
    return Stripe(client, section.webhook_secret, clock)


@asynccontextmanager
async def _asking() -> AsyncIterator[None]:
    """What is asked within ends in time. Raises ProviderUnavailable, which repeats no text of Stripe's."""
    try:
        async with asyncio.timeout(PROVIDER_TIMEOUT_S):
            yield
    except stripe.StripeError as error:
        said = f"{type(error).__name__} {error.http_status} {error.code} {error.request_id}"
        raise ProviderUnavailable(f"Stripe: {said}") from None
    except (TimeoutError, aiohttp.ClientError, ValidationError) as error:
        raise ProviderUnavailable(f"Stripe: {type(error).__name__}") from None
