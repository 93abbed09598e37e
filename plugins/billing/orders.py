"""Orders: how a user tops up, from the wish to paid, cancelled or expired."""

from typing import Any, Final
from uuid import UUID

from aiohttp import web

from plugins.billing.ledger import ACCOUNTS
from plugins.billing.model import BillingSection, Order, OrderQuery, OrderState
from plugins.billing.providers import PROVIDERS
from server.api import Page, from_cursor, to_cursor, whole_number
from server.auth import Caller
from server.db import Record
from server.errors import Code, Problem, not_found
from server.i18n import N_
from server.interfaces import CONFIGURATION, DATABASE, NOTIFIER, RANDOMNESS, Message, Topic

EXPIRE_AT_ONCE: Final = 500


class Orders:
    """Orders go from pending to paid, cancelled or expired, once; the UPDATE's WHERE sees to it."""

    def __init__(self, app: web.Application) -> None:
        section = app[CONFIGURATION].section("billing")
        assert isinstance(section, BillingSection)
        self.currency = section.currency
        self.least, self.most = section.min_order, section.max_order
        self._ttl_s = section.order_ttl_s
        self._database = app[DATABASE]
        self._randomness = app[RANDOMNESS]
        self._accounts = app[ACCOUNTS]
        self._notifier = app[NOTIFIER]
        self._providers = app[PROVIDERS]

    async def create(self, caller: Caller, amount: int, order_id: UUID, origin: str) -> Order:
        """Make an order, or find the one an earlier try has made under this id.

        Raises Problem: invalid, unavailable where no payment provider is configured.
        """
        if not self.least <= amount <= self.most:
            raise Problem(Code.INVALID, errors=[("amount", f"Between {self.least} and {self.most}.")])
        if not self._providers:
            raise Problem(Code.UNAVAILABLE, N_("No payment provider is configured on this server."))
        async with self._database.transaction() as tx:
            await self._accounts.open(tx, caller.user_id)
            row = await tx.fetchrow(
                """
                INSERT INTO orders (id, number, user_id, provider, amount, currency, expires_at)
                VALUES ($1, $2, $3, $4, $5, $6, now() + make_interval(secs => $7))
                ON CONFLICT (id) DO UPDATE SET number = orders.number
                RETURNING id, number, provider, amount, currency, state, created_at, expires_at, paid_at
                """,
                order_id,
                f"CP{self._randomness.uuid().hex[:20].upper()}",
                caller.user_id,
                next(iter(self._providers)),
                amount,
                self.currency,
                self._ttl_s,
            )
        assert row is not None
        return self._order(row, origin)

    async def page(self, caller: Caller, query: OrderQuery, origin: str) -> Page[Order]:
        """The caller's orders, newest first."""
        (before,) = from_cursor(query.cursor, whole_number) if query.cursor else (None,)
        rows = await self._database.fetch(
            """
            SELECT id, number, provider, amount, currency, state, created_at, expires_at, paid_at, position
            FROM orders
            WHERE user_id = $1 AND ($2::text IS NULL OR state = $2) AND ($3::bigint IS NULL OR position < $3)
            ORDER BY position DESC LIMIT $4
            """,
            caller.user_id,
            query.state,
            before,
            query.page_size + 1,
        )
        shown = rows[: query.page_size]
        more = to_cursor(shown[-1]["position"]) if len(rows) > len(shown) else None
        return Page[Order](items=[self._order(row, origin) for row in shown], next_cursor=more)

    async def get(self, caller: Caller, order_id: UUID, origin: str) -> Order:
        """The caller's order. Raises Problem(not_found)."""
        row = await self._database.fetchrow(
            """
            SELECT id, number, provider, amount, currency, state, created_at, expires_at, paid_at
            FROM orders WHERE id = $1 AND user_id = $2
            """,
            order_id,
            caller.user_id,
        )
        if row is None:
            raise not_found()
        return self._order(row, origin)

    async def numbered(self, provider: str, number: str, origin: str) -> tuple[Order, UUID]:
        """The order that whoever knows its number pays at this provider, and its owner.

        Raises Problem(not_found).
        """
        row = await self._database.fetchrow(
            """
            SELECT id, number, provider, amount, currency, state, created_at, expires_at, paid_at, user_id
            FROM orders WHERE number = $1 AND provider = $2
            """,
            number,
            provider,
        )
        if row is None:
            raise not_found()
        return self._order(row, origin), row["user_id"]

    async def cancel(self, caller: Caller, order_id: UUID, origin: str) -> Order:
        """Give up a pending order, or do nothing where that has been done.

        Raises Problem: not_found, invalid_state.
        """
        async with self._database.transaction() as tx:
            row = await tx.fetchrow(
                """
                UPDATE orders SET state = 'cancelled' WHERE id = $1 AND user_id = $2 AND state = 'pending'
                RETURNING id, number, provider, amount, currency, state, created_at, expires_at, paid_at,
                    user_id
                """,
                order_id,
                caller.user_id,
            )
            if row is not None:
                await self._notifier.publish_all(tx, [order_message(row, N_("Order {number} was cancelled"))])
                return self._order(row, origin)
        order = await self.get(caller, order_id, origin)
        if order.state is not OrderState.CANCELLED:
            raise Problem(
                Code.INVALID_STATE, N_("Only an order that waits for its payment can be cancelled.")
            )
        return order

    async def expire(self) -> None:
        """Close the orders nobody paid in time, each once."""
        expired = EXPIRE_AT_ONCE
        while expired == EXPIRE_AT_ONCE:
            async with self._database.transaction() as tx:
                rows = await tx.fetch(
                    """
                    UPDATE orders SET state = 'expired' WHERE state = 'pending' AND id IN (
                        SELECT id FROM orders WHERE state = 'pending' AND expires_at <= now()
                        ORDER BY expires_at LIMIT $1 FOR UPDATE SKIP LOCKED
                    )
                    RETURNING id, number, amount, currency, state, user_id
                    """,
                    EXPIRE_AT_ONCE,
                )
                title = N_("Order {number} expired")
                body = N_("It was not paid in time. Make a new one to top up.")
                await self._notifier.publish_all(tx, [order_message(row, title, body) for row in rows])
            expired = len(rows)

    def _order(self, row: Record, origin: str) -> Order:
        fields: dict[str, Any] = {name: row[name] for name in Order.model_fields if name != "checkout_url"}
        provider = self._providers.get(row["provider"])
        return Order.model_construct(
            **fields | {"state": OrderState(row["state"])},
            checkout_url=provider.checkout_url(row["number"], origin) if provider else "",
        )


ORDERS: Final = web.AppKey("ORDERS", Orders)


def order_message(row: Record, title: str, body: str = "", *, state: str | None = None) -> Message:
    """What the owner of an order hears of it; `title` and `body` may use {number}."""
    return Message(
        row["user_id"],
        Topic.BILLING_ORDER,
        title,
        body,
        {"number": row["number"]},
        {
            "order_id": str(row["id"]),
            "number": row["number"],
            "state": state or row["state"],
            "amount": row["amount"],
            "currency": row["currency"],
        },
    )
