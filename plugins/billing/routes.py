"""Billing's routes and pages."""

from typing import Literal
from uuid import UUID

import segno
from aiohttp import web
from pydantic import BaseModel

from plugins.billing.ledger import ACCOUNTS
from plugins.billing.model import (
    Acknowledgement,
    Balance,
    Entry,
    NewOrder,
    OpenProvider,
    Order,
    OrderQuery,
    OrderState,
    Providers,
)
from plugins.billing.orders import ORDERS
from plugins.billing.payments import PAYMENTS
from plugins.billing.providers import PROVIDERS, Provider
from plugins.billing.providers.sandbox import Sandbox
from plugins.billing.usage import USAGE, PeriodQuery, UsageReport
from server.api import Page, PageQuery, Routes
from server.auth import PUBLIC_ORIGIN, Access, Caller
from server.errors import Code, Problem, not_found
from server.forms import submit
from server.i18n import pick_locale, translate
from server.interfaces import OWN_URL
from server.pages import render
from server.request_keys import CALLER

routes = Routes("billing")


def origin_of(request: web.Request) -> str:
    """This server as the reader reaches it, for addresses that go back to that reader alone."""
    return request.app[PUBLIC_ORIGIN] or f"{request.scheme}://{request.host}"


@routes.api("GET", "/billing/balance", access=Access.USER)
async def balance(request: web.Request, caller: Caller) -> Balance:
    """What you have."""
    return request.app[ACCOUNTS].balance_of(caller.user_id)


@routes.api("GET", "/billing/ledger", access=Access.USER)
async def ledger(request: web.Request, caller: Caller, query: PageQuery) -> Page[Entry]:
    """What came and went, newest first."""
    return await request.app[ACCOUNTS].page(caller.user_id, query)


@routes.api("GET", "/billing/usage", access=Access.USER)
async def usage(request: web.Request, caller: Caller, query: PeriodQuery) -> UsageReport:
    """What each of your phones cost on each day (UTC)."""
    return await request.app[USAGE].by_day(caller.user_id, query)


@routes.api("GET", "/billing/statement", access=Access.USER, media="text/csv")
async def statement(request: web.Request, caller: Caller, query: PeriodQuery) -> web.StreamResponse:
    """Everything that came and went, as a file for a spreadsheet."""
    return await send_statement(request, caller.user_id, query)


@routes.api("GET", "/billing/providers", access=Access.USER)
async def list_providers(request: web.Request, caller: Caller) -> Providers:
    """With whom a top-up can be paid."""
    return Providers(items=open_providers(request))


@routes.api("POST", "/billing/orders", access=Access.USER, status=201, problems=(Code.UNAVAILABLE,),
            location="/api/v1/billing/orders/{id}")  # fmt: skip
async def create(request: web.Request, caller: Caller, body: NewOrder, new_id: UUID) -> Order:
    """Order a top-up; it is paid at `checkout_url`."""
    return await request.app[ORDERS].create(caller, body, new_id, origin_of(request))


@routes.api("GET", "/billing/orders", access=Access.USER)
async def list_orders(request: web.Request, caller: Caller, query: OrderQuery) -> Page[Order]:
    """Your orders, newest first."""
    return await request.app[ORDERS].page(caller, query, origin_of(request))


@routes.api("GET", "/billing/orders/{order_id}", access=Access.USER)
async def get(request: web.Request, caller: Caller, order_id: UUID) -> Order:
    """One order."""
    return await request.app[ORDERS].get(caller, order_id, origin_of(request))


@routes.api("POST", "/billing/orders/{order_id}/cancel", access=Access.USER, problems=(Code.INVALID_STATE,))
async def cancel(request: web.Request, caller: Caller, order_id: UUID) -> Order:
    """Cancel an order that is not paid yet."""
    return await request.app[ORDERS].cancel(caller, order_id, origin_of(request))


@routes.api("POST", "/billing/payments/{provider}", access=Access.PUBLIC, is_logged=False, problems=(
    Code.BAD_SIGNATURE, Code.UNKNOWN_ORDER, Code.ORDER_CLOSED, Code.AMOUNT_MISMATCH))  # fmt: skip
async def payment(request: web.Request, provider: str) -> Acknowledgement | web.Response:
    """The payment provider's callback; it may be repeated.

    The sandbox signs with `X-Signature: t=<unix seconds>,v1=<hex HMAC-SHA256(secret, "<t>.<raw body>")>`
    and sends `{event_id, order_number, amount, currency, status: "succeeded"|"failed", occurred_at}`.
    Other providers sign and send, and are answered, as they document.
    """
    outcome = await request.app[PAYMENTS].take(provider, request.headers, await request.read())
    own_answer = request.app[PROVIDERS][provider].answer(outcome)
    if own_answer is not None:
        return own_answer
    if isinstance(outcome, OrderState):
        return Acknowledgement(order_state=outcome)
    raise Problem(outcome or Code.UNKNOWN_ORDER)


class Outcome(BaseModel):
    """Which button of the sandbox's page was pressed."""

    outcome: Literal["pay", "fail", "later"]


def _provider(request: web.Request, name: str) -> Provider:
    provider = request.app[PROVIDERS].get(name)
    if provider is None:
        raise not_found()
    return provider


def open_providers(request: web.Request) -> list[OpenProvider]:
    """Who takes payments here, in the reader's words."""
    locale = pick_locale(request)
    return [
        OpenProvider(name=provider.name, title=translate(locale, provider.title))
        for provider in request.app[PROVIDERS].values()
    ]


def _sandbox(request: web.Request) -> Sandbox:
    provider = _provider(request, Sandbox.name)
    assert isinstance(provider, Sandbox)
    return provider


def _next_page(caller: Caller | None, order: Order, owner_id: UUID, provider: str) -> str:
    """Where a payer sees that the order is paid: its page for its owner, the checkout for anybody else."""
    if caller is not None and caller.user_id == owner_id:
        return f"/billing/orders/{order.id}"
    return f"/checkout/{provider}/{order.number}"


@routes.page("GET", "/checkout/sandbox/{number}", access=Access.PUBLIC)
async def checkout_page(request: web.Request, caller: Caller | None, number: str) -> web.Response:
    """The sandbox's payment page, for whoever knows the order's number."""
    name = _sandbox(request).name
    order, owner_id = await request.app[ORDERS].numbered(name, number, origin_of(request))
    context = {"order": order, "next_page": _next_page(caller, order, owner_id, name), "errors": {}}
    return render(request, "billing/checkout_sandbox.html", context)


@routes.page("POST", "/checkout/sandbox/{number}", access=Access.PUBLIC)
async def pay(request: web.Request, caller: Caller | None, number: str) -> web.StreamResponse:
    """Let the sandbox report a payment, a failure or nothing, and go to where the order's state is seen."""
    sandbox = _sandbox(request)
    order, owner_id = await request.app[ORDERS].numbered(sandbox.name, number, origin_of(request))
    next_page = _next_page(caller, order, owner_id, sandbox.name)

    async def report(form: Outcome) -> str:
        own_url = request.app[OWN_URL]()
        if form.outcome == "pay" and order.state is OrderState.PENDING:
            await request.app[ORDERS].begin(sandbox.name, number)
            await sandbox.deliver(order, await sandbox.pay(order), "succeeded", own_url)
        elif form.outcome == "fail" and order.state is OrderState.PENDING:
            await sandbox.deliver(order, sandbox.new_event_id(), "failed", own_url)
        return next_page

    context = {"order": order, "next_page": next_page}
    return await submit(request, Outcome, report, "billing/checkout_sandbox.html", context)


@routes.page("GET", "/checkout/{provider}/{number}", access=Access.PUBLIC)
async def begin_page(request: web.Request, caller: Caller | None, provider: str, number: str) -> web.Response:
    """From here whoever knows an order's number goes on to its provider."""
    chosen = _provider(request, provider)
    order, owner_id = await request.app[ORDERS].numbered(provider, number, origin_of(request))
    context = {
        "order": order,
        "provider": chosen.title,
        "next_page": _next_page(caller, order, owner_id, provider),
    }
    return render(request, "billing/checkout.html", context)


@routes.page("POST", "/checkout/{provider}/{number}", access=Access.PUBLIC)
async def begin(request: web.Request, caller: Caller | None, provider: str, number: str) -> web.Response:
    """Begin the payment: the provider's page, or the QR code that a wallet reads."""
    chosen, origin = _provider(request, provider), origin_of(request)
    order, owner_id = await request.app[ORDERS].numbered(provider, number, origin)
    checkout = await request.app[ORDERS].open_checkout(chosen, number, origin)
    qr_code = segno.make(checkout.qr_text).svg_data_uri(scale=6) if checkout.qr_text else ""
    context = {
        "order": order,
        "provider": chosen.title,
        "url": checkout.url,
        "qr_code": qr_code,
        "checkout": f"/checkout/{provider}/{number}",
        "next_page": _next_page(caller, order, owner_id, provider),
    }
    return render(request, "billing/checkout_open.html", context)


async def send_statement(request: web.Request, user_id: UUID, query: PeriodQuery) -> web.StreamResponse:
    """A user's statement as a CSV file, streamed."""
    first, last = request.app[USAGE].period(query)
    response = web.StreamResponse(
        headers={
            "Content-Type": "text/csv; charset=utf-8; header=present",
            "Content-Disposition": f'attachment; filename="statement-{first}-{last}.csv"',
            "Cache-Control": "no-store",
        }
    )
    pieces = request.app[USAGE].csv(user_id, query)
    head = await anext(pieces)  # what fails so far is still answered as a problem
    await response.prepare(request)
    await response.write(head)
    async for piece in pieces:
        await response.write(piece)
    await response.write_eof()
    return response


def balance_of_page(request: web.Request) -> dict[str, object]:
    """What billing tells the header of every page."""
    caller: Caller | None = request.get(CALLER)
    return request.app[ACCOUNTS].balance_of(caller.user_id).model_dump() if caller else {}
