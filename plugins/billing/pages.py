"""Billing's pages for users: what they have, what it goes on, top-ups, statements."""

from typing import Final
from uuid import UUID

from aiohttp import web
from pydantic import BaseModel, Field, ValidationError

from plugins.billing.charts import usage_chart
from plugins.billing.ledger import ACCOUNTS
from plugins.billing.model import NewOrder, OrderQuery
from plugins.billing.orders import ORDERS
from plugins.billing.routes import open_providers, origin_of
from plugins.billing.usage import USAGE, PeriodQuery
from server.api import PageQuery, Query, Routes
from server.auth import Access, Caller
from server.errors import Code, Problem
from server.forms import sent_once, sentences, submit
from server.i18n import N_, money, parse_money, pick_locale, translate
from server.interfaces import RANDOMNESS
from server.pages import render

SHOWN: Final = PageQuery(limit=8)

pages = Routes("billing")


class TopUp(BaseModel):
    """The form on the balance's page."""

    amount: str
    provider: str | None = None
    request_id: str = ""


class TypedPeriod(Query):
    """A period as it stands in a page's address or was typed into its form; nothing for a usual one."""

    first: str = Field(default="", alias="from")
    last: str = Field(default="", alias="to")


class Cancellation(BaseModel):
    """The form that gives up an order: a button."""


async def _balance_context(request: web.Request, caller: Caller) -> dict[str, object]:
    accounts, orders = request.app[ACCOUNTS], request.app[ORDERS]
    shown = await orders.page(caller, OrderQuery(limit=SHOWN.limit), origin_of(request))
    entries = await accounts.page(caller.user_id, SHOWN)
    return {
        "now": accounts.balance_of(caller.user_id),
        "chart": usage_chart(await request.app[USAGE].by_day(caller.user_id, PeriodQuery())),
        "orders": shown.items,
        "ledger": entries.items,
        "providers": open_providers(request),
        "request_id": str(request.app[RANDOMNESS].uuid()),
        "errors": {},
        "values": {},
    }


def _typed_amount(request: web.Request, typed: str) -> int:
    """An amount in minor units. Raises Problem(invalid) in the reader's words."""
    orders, locale = request.app[ORDERS], pick_locale(request)
    try:
        amount = parse_money(typed, orders.currency, locale)
    except ValueError:
        amount = 0
    if orders.least <= amount <= orders.most:
        return amount
    limits = {
        "least": money(orders.least, orders.currency, locale),
        "most": money(orders.most, orders.currency, locale),
    }
    sentence = translate(locale, N_("Enter an amount between {least} and {most}."), limits)
    raise Problem(Code.INVALID, errors=[("amount", sentence)])


@pages.page("GET", "/billing", access=Access.USER)
async def billing_page(request: web.Request, caller: Caller) -> web.Response:
    """Balance, top-up, orders and ledger."""
    return render(request, "billing/index.html", await _balance_context(request, caller))


@pages.page("POST", "/billing", access=Access.USER)
async def top_up(request: web.Request, caller: Caller, new_id: UUID) -> web.StreamResponse:
    """Order a top-up and go on to its payment."""

    async def order(form: TopUp) -> str:
        amount = _typed_amount(request, form.amount)
        wish = NewOrder(amount=amount, provider=form.provider)
        order_id = sent_once(caller.user_id, form.request_id or str(new_id), amount, form.provider)
        made = await request.app[ORDERS].create(caller, wish, order_id, "")
        return made.checkout_url

    context = await _balance_context(request, caller)
    return await submit(request, TopUp, order, "billing/index.html", context)


@pages.page("GET", "/billing/orders", access=Access.USER)
async def orders_page(request: web.Request, caller: Caller, query: OrderQuery) -> web.Response:
    """All one's orders."""
    found = await request.app[ORDERS].page(caller, query, origin_of(request))
    context = {"orders": found.items, "next_cursor": found.next_cursor, "is_first": query.cursor is None}
    return render(request, "billing/orders.html", context)


@pages.page("GET", "/billing/orders/{order_id}", access=Access.USER)
async def order_page(request: web.Request, caller: Caller, order_id: UUID) -> web.Response:
    """One order."""
    order = await request.app[ORDERS].get(caller, order_id, origin_of(request))
    return render(request, "billing/order.html", {"order": order, "errors": {}})


@pages.page("POST", "/billing/orders/{order_id}/cancel", access=Access.USER)
async def cancel_on_page(request: web.Request, caller: Caller, order_id: UUID) -> web.StreamResponse:
    """Give an order up and show that."""

    async def cancel(form: Cancellation) -> str:
        await request.app[ORDERS].cancel(caller, order_id, "")
        return f"/billing/orders/{order_id}"

    order = await request.app[ORDERS].get(caller, order_id, origin_of(request))
    context = {"order": order, "path": f"/billing/orders/{order_id}"}
    return await submit(request, Cancellation, cancel, "billing/order.html", context)


@pages.page("GET", "/billing/movements", access=Access.USER)
async def movements_page(request: web.Request, caller: Caller, query: PageQuery) -> web.Response:
    """All that came and went."""
    accounts = request.app[ACCOUNTS]
    found = await accounts.page(caller.user_id, query)
    context = {
        "ledger": found.items,
        "currency": accounts.currency,
        "next_cursor": found.next_cursor,
        "is_first": query.cursor is None,
    }
    return render(request, "billing/movements.html", context)


@pages.page("GET", "/billing/usage", access=Access.USER)
async def usage_page(request: web.Request, caller: Caller, query: TypedPeriod) -> web.Response:
    """What each phone cost, by day."""
    period, errors = _period(request, query)
    report = await request.app[USAGE].by_day(caller.user_id, period)
    context = {"report": report, "chart": usage_chart(report), **_period_context(request, query, errors)}
    return render(request, "billing/usage.html", context, status=_status(errors))


@pages.page("GET", "/billing/statement", access=Access.USER)
async def statement_page(request: web.Request, caller: Caller, query: TypedPeriod) -> web.Response:
    """A period's movements, to print."""
    period, errors = _period(request, query)
    statement = await request.app[USAGE].statement(caller.user_id, period)
    context = {"statement": statement, "email": caller.email, **_period_context(request, query, errors)}
    return render(request, "billing/statement.html", context, status=_status(errors))


def _period(request: web.Request, typed: TypedPeriod) -> tuple[PeriodQuery, dict[str, str]]:
    """The days asked for; or the usual ones, and what to say beside the form's fields."""
    days = {name: text for name, text in (("from", typed.first), ("to", typed.last)) if text}
    try:
        return PeriodQuery.model_validate(days), {}
    except ValidationError as error:
        return PeriodQuery(), sentences(error, pick_locale(request))


def _period_context(request: web.Request, typed: TypedPeriod, errors: dict[str, str]) -> dict[str, object]:
    usage = request.app[USAGE]
    return {
        "errors": errors,
        "values": {"from": typed.first, "to": typed.last} if errors else {},
        "months": usage.latest_months(),
    }


def _status(errors: dict[str, str]) -> int:
    return Code.INVALID.status if errors else 200
