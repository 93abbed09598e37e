"""Billing's routes for administrators."""

from uuid import UUID

from aiohttp import web

from plugins.billing.checks import CHECKS, LedgerCheck
from plugins.billing.corrections import CORRECTIONS, NewCorrection
from plugins.billing.ledger import ACCOUNTS
from plugins.billing.model import Balance, Entry
from plugins.billing.overview import OVERVIEW, MoneyOverview
from plugins.billing.received import (
    RECEIVED,
    Application,
    Misfit,
    MisfitQuery,
    Payment,
    PaymentQuery,
)
from plugins.billing.refunds import REFUNDS, NewRefund, Refund, RefundQuery
from server.api import Page, PageQuery, Routes
from server.auth import Access, Caller
from server.errors import Code, not_found
from server.interfaces import DIRECTORY

admin_routes = Routes("billing")


def _address(request: web.Request) -> str:
    return request.remote or ""


async def _require_user(request: web.Request, user_id: UUID) -> None:
    if not await request.app[DIRECTORY].emails([user_id]):
        raise not_found()


@admin_routes.api("GET", "/billing/overview", access=Access.ADMIN)
async def overview(request: web.Request) -> MoneyOverview:
    """How the house's money stands."""
    return await request.app[OVERVIEW].now()


@admin_routes.api("POST", "/billing/checks", access=Access.ADMIN)
async def check(request: web.Request) -> LedgerCheck:
    """Check the whole ledger now, as it is checked every day."""
    return await request.app[CHECKS].run()


@admin_routes.api("GET", "/billing/payments", access=Access.ADMIN)
async def list_payments(request: web.Request, query: PaymentQuery) -> Page[Payment]:
    """Payments that came in, newest first; only those in one `state` or of one user where asked."""
    return await request.app[RECEIVED].page(query)


@admin_routes.api("POST", "/billing/payments/{payment_id}/apply", access=Access.ADMIN,
                  problems=(Code.INVALID_STATE,))  # fmt: skip
async def apply_payment(request: web.Request, caller: Caller, payment_id: UUID, body: Application) -> Payment:
    """Add an unapplied payment to its owner's balance."""
    return await request.app[RECEIVED].apply(caller, payment_id, body.reason, _address(request))


@admin_routes.api("POST", "/billing/payments/{payment_id}/refunds", access=Access.ADMIN, status=201,
                  problems=(Code.INVALID_STATE, Code.INSUFFICIENT_BALANCE))  # fmt: skip
async def refund(
    request: web.Request, caller: Caller, payment_id: UUID, body: NewRefund, new_id: UUID
) -> Refund:
    """Give a payment back, or part of it; its owner is told why."""
    return await request.app[REFUNDS].request(caller, payment_id, body, new_id, _address(request))


@admin_routes.api("GET", "/billing/refunds", access=Access.ADMIN)
async def list_refunds(request: web.Request, query: RefundQuery) -> Page[Refund]:
    """Refunds and how far they are, newest first; only those in one `state` or of one user where asked."""
    return await request.app[REFUNDS].page(query)


@admin_routes.api("GET", "/billing/callbacks", access=Access.ADMIN)
async def list_misfits(request: web.Request, query: MisfitQuery) -> Page[Misfit]:
    """Genuine callbacks that fitted no order, newest first."""
    return await request.app[RECEIVED].misfits(query)


@admin_routes.api("POST", "/billing/callbacks/{event_id}/review", access=Access.ADMIN)
async def review(request: web.Request, caller: Caller, event_id: UUID) -> None:
    """Say that a callback that did not fit has been looked at."""
    await request.app[RECEIVED].review(caller, event_id, _address(request))


@admin_routes.api("GET", "/billing/users/{user_id}/balance", access=Access.ADMIN)
async def balance_of_user(request: web.Request, user_id: UUID) -> Balance:
    """What a user has."""
    await _require_user(request, user_id)
    return request.app[ACCOUNTS].balance_of(user_id)


@admin_routes.api("GET", "/billing/users/{user_id}/ledger", access=Access.ADMIN)
async def ledger_of_user(request: web.Request, user_id: UUID, query: PageQuery) -> Page[Entry]:
    """What came to a user and went, newest first."""
    await _require_user(request, user_id)
    return await request.app[ACCOUNTS].page(user_id, query)


@admin_routes.api("POST", "/billing/users/{user_id}/corrections", access=Access.ADMIN, status=201,
                  problems=(Code.INSUFFICIENT_BALANCE,))  # fmt: skip
async def correct(
    request: web.Request, caller: Caller, user_id: UUID, body: NewCorrection, new_id: UUID
) -> Entry:
    """Add to a user's balance or take from it; the user is told why."""
    return await request.app[CORRECTIONS].make(caller, user_id, body, new_id, _address(request))
