"""Billing: balances, the ledger behind them, orders and the payments that settle them.

Tables: `ledger_accounts`, `ledger_entries`, `orders`, `payment_events`.

Invariants: the entries of a transaction sum up to zero and are never changed or deleted; a user's
balance is the sum of their entries and never below zero; an order leaves `pending` once; a paid one
has exactly one credit of its own amount, however often and in whatever order its payment is
reported; money for a closed order is booked as unapplied. All amounts are integers in minor units.

Balances are read from memory, which follows each commit. Charges for running phones do not notify,
they would flood: users hear of credits and of a spent balance here, and ahead of that from the
devices, which know how long it lasts. Pages that want the figure in between ask `GET /billing/balance`.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from aiohttp import web

from plugins.billing.janitor import JANITOR, Janitor
from plugins.billing.ledger import ACCOUNTS, Accounts
from plugins.billing.model import BillingSection
from plugins.billing.orders import ORDERS, Orders
from plugins.billing.payments import PAYMENTS, Payments
from plugins.billing.providers import PROVIDERS
from plugins.billing.providers.opening import open_providers
from plugins.billing.routes import balance_of_page, routes
from plugins.billing.schema import MIGRATIONS
from server.db import Tx
from server.interfaces import AUDIT, DIRECTORY, LEDGER, NOTIFIER, SPENDING, UserRegistered
from server.observe import log
from server.pages import PAGE_CONTEXT
from server.plugin import Job, Plugin

ASK_EVERY_S: Final = 5.0
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


def _expiry_interval_s(section: BillingSection) -> float:
    return section.expiry_interval_s


@asynccontextmanager
async def lifespan(app: web.Application) -> AsyncIterator[None]:
    """Take the balances into memory and open the payment providers."""
    app[ACCOUNTS] = app[LEDGER] = accounts = Accounts(app)
    await accounts.load()
    app[SPENDING] = []
    async with open_providers(app) as providers:
        app[PROVIDERS] = providers
        app[ORDERS] = Orders(app)
        app[PAYMENTS] = payments = Payments(app)
        app[JANITOR] = Janitor(app)
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
    routes=routes.declared,
    jobs=(
        Job("billing.expire_orders", every_s=_expiry_interval_s, deadline_s=60, run=_expire_orders),
        Job(
            "billing.read_balances_again", every_s=READ_AGAIN_EVERY_S, deadline_s=30, run=_read_balances_again
        ),
        Job("billing.ask_providers", every_s=ASK_EVERY_S, deadline_s=300, run=_ask_providers),
    ),
    listens={UserRegistered: _welcome},
)
