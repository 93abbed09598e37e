"""Billing: balances, the ledger behind them, orders and the payments that settle them.

Tables: `ledger_accounts`, `ledger_entries`, `ledger_checks`, `orders`, `payment_events`, `payments`,
`refunds`, `sandbox_payments`.

Invariants: the entries of a transaction sum up to zero and are never changed or deleted; a user's
balance is the sum of their entries and never below zero; an order leaves `pending` once; a paid one
has exactly one credit of its own amount, however often and in whatever order its payment is
reported; money for a closed order, or a second time for a paid one, is unapplied until an administrator
adds it to the balance or gives it back; no more goes back than was paid. All amounts are integers in
minor units.

Balances are read from memory, which follows each commit. Charges for running phones do not notify,
they would flood: users hear of credits and of a spent balance here, and ahead of that from the
devices, which know how long it lasts. Pages that want the figure in between ask `GET /billing/balance`.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from aiohttp import web

from plugins.billing.admin_pages import admin_pages
from plugins.billing.admin_routes import admin_routes
from plugins.billing.checks import CHECK_EVERY_S, CHECK_TIMEOUT_S, CHECKS, Checks
from plugins.billing.corrections import CORRECTIONS, Corrections
from plugins.billing.janitor import JANITOR, Janitor
from plugins.billing.ledger import ACCOUNTS, Accounts
from plugins.billing.model import BillingSection
from plugins.billing.orders import ORDERS, Orders
from plugins.billing.overview import OVERVIEW, Overview
from plugins.billing.pages import pages
from plugins.billing.payments import PAYMENTS, Payments
from plugins.billing.providers import PROVIDERS
from plugins.billing.providers.opening import open_providers
from plugins.billing.received import RECEIVED, Received
from plugins.billing.refunds import REFUND_JOB, REFUNDS, Refunds
from plugins.billing.routes import balance_of_page, routes
from plugins.billing.schema import MIGRATIONS
from plugins.billing.usage import USAGE, Usage
from server.db import Tx
from server.interfaces import AUDIT, DIRECTORY, LEDGER, NOTIFIER, SPENDING, UserRegistered
from server.observe import log
from server.pages import PAGE_CONTEXT
from server.plugin import Job, Plugin

ASK_EVERY_S: Final = 5.0
REFUND_EVERY_S: Final = 15.0
READ_AGAIN_EVERY_S: Final = 1.0
ASK_FIRST_S: Final = 40.0
"""How long the last questions may keep the sweep of expired orders waiting."""


async def _welcome(app: web.Application, tx: Tx, event: UserRegistered) -> None:
    await app[ACCOUNTS].welcome(tx, event.user_id)


async def _expire_orders(app: web.Application) -> None:
    try:
        async with asyncio.timeout(ASK_FIRST_S):
            await app[JANITOR].ask()
    except TimeoutError:
        log.warning("orders expire while their payment providers do not answer")
    await app[ORDERS].expire()


async def _read_balances_again(app: web.Application) -> None:
    await app[ACCOUNTS].read_again()


async def _ask_providers(app: web.Application) -> None:
    await app[JANITOR].ask()


async def _refund(app: web.Application) -> None:
    await app[REFUNDS].carry_out()


async def _check_ledger(app: web.Application) -> None:
    await app[CHECKS].run_if_due()


def _expiry_interval_s(section: BillingSection) -> float:
    return section.expiry_interval_s


@asynccontextmanager
async def lifespan(app: web.Application) -> AsyncIterator[None]:
    """Take the balances into memory and open the payment providers."""
    app[SPENDING] = []
    app[ACCOUNTS] = app[LEDGER] = accounts = Accounts(app)
    await accounts.load()
    async with open_providers(app) as providers:
        app[PROVIDERS] = providers
        app[ORDERS] = Orders(app)
        app[PAYMENTS] = payments = Payments(app)
        app[JANITOR] = Janitor(app)
        app[RECEIVED] = Received(app)
        app[REFUNDS] = Refunds(app)
        app[CORRECTIONS] = Corrections(app)
        app[USAGE] = Usage(app)
        app[CHECKS] = Checks(app)
        app[OVERVIEW] = Overview(app)
        app[PAGE_CONTEXT].append(balance_of_page)
        yield
        await payments.close()


PLUGIN = Plugin(
    name="billing",
    config=BillingSection,
    lifespan=lifespan,
    needs=(NOTIFIER, DIRECTORY, AUDIT),
    provides=(LEDGER, SPENDING),
    migrations=MIGRATIONS,
    routes=[*routes.declared, *admin_routes.declared, *pages.declared, *admin_pages.declared],
    jobs=(
        Job("billing.expire_orders", every_s=_expiry_interval_s, deadline_s=60, run=_expire_orders),
        Job(
            "billing.read_balances_again", every_s=READ_AGAIN_EVERY_S, deadline_s=30, run=_read_balances_again
        ),
        Job("billing.ask_providers", every_s=ASK_EVERY_S, deadline_s=300, run=_ask_providers),
        Job(REFUND_JOB, every_s=REFUND_EVERY_S, deadline_s=600, run=_refund),
        Job("billing.check_ledger", every_s=CHECK_EVERY_S, deadline_s=2 * CHECK_TIMEOUT_S, run=_check_ledger),
    ),
    listens={UserRegistered: _welcome},
)
