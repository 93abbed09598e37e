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

import aiohttp
from aiohttp import web

from plugins.billing.ledger import ACCOUNTS, Accounts
from plugins.billing.model import BillingSection
from plugins.billing.orders import ORDERS, Orders
from plugins.billing.payments import PAYMENTS, Payments
from plugins.billing.providers import PROVIDERS, Provider
from plugins.billing.routes import balance_of_page, routes
from plugins.billing.sandbox import open_sandbox
from plugins.billing.schema import MIGRATIONS
from server.db import Tx
from server.interfaces import DIRECTORY, LEDGER, NOTIFIER, UserRegistered
from server.pages import PAGE_CONTEXT
from server.plugin import Job, Plugin


async def _welcome(app: web.Application, tx: Tx, event: UserRegistered) -> None:
    await app[ACCOUNTS].welcome(tx, event.user_id)


async def _expire_orders(app: web.Application) -> None:
    await app[ORDERS].expire()


def _expiry_interval_s(section: BillingSection) -> float:
    return section.expiry_interval_s


@asynccontextmanager
async def lifespan(app: web.Application) -> AsyncIterator[None]:
    """Take the balances into memory and open the payment providers."""
    app[ACCOUNTS] = app[LEDGER] = accounts = Accounts(app)
    await accounts.load()
    async with aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()) as http:
        sandbox = await asyncio.to_thread(open_sandbox, app, http)
        providers: dict[str, Provider] = {sandbox.name: sandbox} if sandbox else {}
        app[PROVIDERS] = providers
        app[ORDERS] = Orders(app)
        app[PAYMENTS] = payments = Payments(app)
        app[PAGE_CONTEXT].append(balance_of_page)
        yield
        await payments.close()


PLUGIN = Plugin(
    name="billing",
    config=BillingSection,
    lifespan=lifespan,
    needs=(NOTIFIER, DIRECTORY),
    provides=(LEDGER,),
    migrations=MIGRATIONS,
    routes=routes.declared,
    jobs=(Job("billing.expire_orders", every_s=_expiry_interval_s, deadline_s=60, run=_expire_orders),),
    listens={UserRegistered: _welcome},
)
