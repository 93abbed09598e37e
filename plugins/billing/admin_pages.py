"""Billing's pages for administrators: how the house's money stands, and one user's account."""

from typing import Annotated, Final, Literal
from uuid import UUID

from aiohttp import web
from pydantic import BaseModel, Field

from plugins.billing.charts import revenue_chart
from plugins.billing.checks import CHECKS, FINDINGS, IN_MONEY
from plugins.billing.corrections import CORRECTIONS, NewCorrection
from plugins.billing.ledger import ACCOUNTS
from plugins.billing.model import MOST_AN_ORDER, Reason
from plugins.billing.overview import OVERVIEW
from plugins.billing.received import RECEIVED, MisfitQuery, Payment, PaymentQuery
from plugins.billing.refunds import REFUNDS, NewRefund, RefundQuery
from plugins.billing.routes import open_providers
from server.api import PageQuery, Query, Routes
from server.auth import Access, Caller
from server.errors import Code, Problem, not_found
from server.forms import sent_once, submit
from server.i18n import N_, parse_money, pick_locale
from server.interfaces import DIRECTORY, RANDOMNESS
from server.pages import render

WAITING: Final = 50
"""So many of what waits for an administrator are shown; the others follow once those are dealt with."""
FOUND: Final = 20
LATEST: Final = 10
ADMIN_PAGE: Final = "/admin/billing"

admin_pages = Routes("billing")


class OverviewQuery(Query):
    """Whose account is looked for, and what was done just before."""

    q: Annotated[str, Field(max_length=300)] = ""
    done: Annotated[str, Field(max_length=20)] = ""


class UserQuery(Query):
    """Which part of a user's movements and payments, and what was done just before."""

    cursor: str | None = None
    payments: str | None = None
    done: Annotated[str, Field(max_length=20)] = ""


class Decision(BaseModel):
    """The form on an unapplied payment."""

    action: Literal["apply", "return"]
    reason: Reason
    request_id: str = ""


class Press(BaseModel):
    """A form that is only a button."""


class RefundForm(BaseModel):
    """The form on a user's payment; `amount` as typed, in major units."""

    amount: str
    reason: Reason
    request_id: str = ""


class CorrectionForm(BaseModel):
    """The form that adds to a balance or takes from it; `amount` as typed, in major units."""

    direction: Literal["add", "take"]
    amount: str
    reason: Reason
    request_id: str = ""


def _address(request: web.Request) -> str:
    return request.remote or ""


def _typed_amount(request: web.Request, typed: str) -> int:
    """An amount above zero, in minor units. Raises Problem(invalid)."""
    try:
        amount = parse_money(typed, request.app[ACCOUNTS].currency, pick_locale(request))
    except ValueError:
        amount = 0
    if 0 < amount <= MOST_AN_ORDER:
        return amount
    raise Problem(Code.INVALID, errors=[("amount", N_("Enter an amount above zero, such as 12.50."))])


def _common(request: web.Request, failed: object, done: str) -> dict[str, object]:
    """What both pages show; `failed` names the form that is shown again with its errors."""
    return {
        "titles": {provider.name: provider.title for provider in open_providers(request)},
        "request_id": str(request.app[RANDOMNESS].uuid()),
        "failed": str(failed),
        "done": done,
        "errors": {},
        "values": {},
    }


async def _overview_context(
    request: web.Request, query: OverviewQuery, failed: object = ""
) -> dict[str, object]:
    app = request.app
    overview = await app[OVERVIEW].now()
    wanted = query.q.strip()
    return {
        "overview": overview,
        "chart": revenue_chart(overview.revenue_by_day),
        "finding_names": FINDINGS,
        "findings_in_money": IN_MONEY,
        "unapplied": (await app[RECEIVED].page(PaymentQuery(state="unapplied", limit=WAITING))).items,
        "misfits": (await app[RECEIVED].misfits(MisfitQuery(limit=WAITING))).items,
        "open_refunds": (await app[REFUNDS].page(RefundQuery(state="requested", limit=WAITING))).items,
        "refused_refunds": (await app[REFUNDS].page(RefundQuery(state="refused", limit=LATEST))).items,
        "found": await app[DIRECTORY].find(wanted, limit=FOUND) if wanted else [],
        "wanted": wanted,
        "path": ADMIN_PAGE if failed else request.path_qs,
        **_common(request, failed, query.done),
    }


@admin_pages.page("GET", "/admin/billing", access=Access.ADMIN)
async def overview_page(request: web.Request, query: OverviewQuery) -> web.Response:
    """How the house's money stands, and what waits for an administrator."""
    return render(request, "billing/admin_overview.html", await _overview_context(request, query))


@admin_pages.page("POST", "/admin/billing/check", access=Access.ADMIN)
async def check_on_page(request: web.Request) -> web.StreamResponse:
    """Check the whole ledger now."""
    await request.app[CHECKS].run()
    raise web.HTTPSeeOther(f"{ADMIN_PAGE}?done=checked")


@admin_pages.page("POST", "/admin/billing/payments/{payment_id}", access=Access.ADMIN)
async def decide(request: web.Request, caller: Caller, payment_id: UUID, new_id: UUID) -> web.StreamResponse:
    """Add an unapplied payment to its owner's balance, or give it back."""
    app, address = request.app, _address(request)
    payment = await app[RECEIVED].get(payment_id)

    async def act(form: Decision) -> str:
        if form.action == "apply":
            await app[RECEIVED].apply(caller, payment_id, form.reason, address)
            return f"{ADMIN_PAGE}?done=applied"
        if payment.state == "credited":
            raise Problem(Code.INVALID_STATE, N_("This payment has been added to the balance already."))
        wish = NewRefund(amount=payment.amount, reason=form.reason)
        refund_id = sent_once(caller.user_id, form.request_id or str(new_id), payment_id)
        await app[REFUNDS].request(caller, payment_id, wish, refund_id, address)
        return f"{ADMIN_PAGE}?done=returned"

    context = await _overview_context(request, OverviewQuery(), payment_id)
    return await submit(request, Decision, act, "billing/admin_overview.html", context)


@admin_pages.page("POST", "/admin/billing/callbacks/{event_id}", access=Access.ADMIN)
async def review_on_page(request: web.Request, caller: Caller, event_id: UUID) -> web.StreamResponse:
    """Say that a callback that did not fit has been looked at."""
    await request.app[RECEIVED].review(caller, event_id, _address(request))
    raise web.HTTPSeeOther(f"{ADMIN_PAGE}?done=reviewed")


async def _user_context(
    request: web.Request, user_id: UUID, query: UserQuery, failed: object = "", on: Payment | None = None
) -> dict[str, object]:
    """What the page shows; the payment that a form was `on` stands there wherever it is in the list.

    Raises Problem(not_found).
    """
    app = request.app
    emails = await app[DIRECTORY].emails([user_id])
    if user_id not in emails:
        raise not_found()
    payments = await app[RECEIVED].page(PaymentQuery(user_id=user_id, cursor=query.payments, limit=LATEST))
    ledger = await app[ACCOUNTS].page(user_id, PageQuery(cursor=query.cursor))
    own_page = f"{ADMIN_PAGE}/users/{user_id}"
    return {
        "user_id": user_id,
        "email": emails[user_id],
        "now": app[ACCOUNTS].balance_of(user_id),
        "payments": [on, *(one for one in payments.items if one != on)] if on else payments.items,
        "more_payments": payments.next_cursor,
        "orders": await app[OVERVIEW].latest_orders(user_id, limit=LATEST),
        "refunds": (await app[REFUNDS].page(RefundQuery(user_id=user_id, limit=LATEST))).items,
        "ledger": ledger.items,
        "next_cursor": ledger.next_cursor,
        "is_first": query.cursor is None and query.payments is None,
        "path": own_page if failed else request.path_qs,
        **_common(request, failed, query.done),
    }


@admin_pages.page("GET", "/admin/billing/users/{user_id}", access=Access.ADMIN)
async def user_page(request: web.Request, user_id: UUID, query: UserQuery) -> web.Response:
    """What a user has, paid and spent, and the forms that mend it."""
    return render(request, "billing/admin_user.html", await _user_context(request, user_id, query))


@admin_pages.page("POST", "/admin/billing/users/{user_id}/corrections", access=Access.ADMIN)
async def correct_on_page(
    request: web.Request, caller: Caller, user_id: UUID, new_id: UUID
) -> web.StreamResponse:
    """Add to a user's balance or take from it."""

    async def act(form: CorrectionForm) -> str:
        amount = _typed_amount(request, form.amount) * (1 if form.direction == "add" else -1)
        wish = NewCorrection(amount=amount, reason=form.reason)
        correction_id = sent_once(caller.user_id, form.request_id or str(new_id), user_id, amount)
        await request.app[CORRECTIONS].make(caller, user_id, wish, correction_id, _address(request))
        return f"{ADMIN_PAGE}/users/{user_id}?done=corrected"

    context = await _user_context(request, user_id, UserQuery(), "correction")
    return await submit(request, CorrectionForm, act, "billing/admin_user.html", context)


@admin_pages.page("POST", "/admin/billing/payments/{payment_id}/refunds", access=Access.ADMIN)
async def refund_on_page(
    request: web.Request, caller: Caller, payment_id: UUID, new_id: UUID
) -> web.StreamResponse:
    """Give a payment back, or part of it."""
    payment = await request.app[RECEIVED].get(payment_id)

    async def act(form: RefundForm) -> str:
        wish = NewRefund(amount=_typed_amount(request, form.amount), reason=form.reason)
        refund_id = sent_once(caller.user_id, form.request_id or str(new_id), payment_id, wish.amount)
        await request.app[REFUNDS].request(caller, payment_id, wish, refund_id, _address(request))
        return f"{ADMIN_PAGE}/users/{payment.user_id}?done=refunded"

    context = await _user_context(request, payment.user_id, UserQuery(), payment_id, payment)
    return await submit(request, RefundForm, act, "billing/admin_user.html", context)
