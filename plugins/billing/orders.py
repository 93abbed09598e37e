"""Orders: how a user tops up, from the wish to paid, cancelled or expired."""

from typing import Any, Final
from uuid import UUID

from aiohttp import web

from plugins.billing.ledger import ACCOUNTS
from plugins.billing.model import BillingSection, NewOrder, Order, OrderQuery, OrderState
from plugins.billing.providers import PROVIDERS, Checkout, Payable, Provider, ProviderUnavailable
from server.api import API_PREFIX, Page, from_cursor, to_cursor, whole_number
from server.auth import Caller
from server.db import Record
from server.errors import Code, Problem, not_found
from server.i18n import N_
from server.interfaces import CONFIGURATION, DATABASE, NOTIFIER, RANDOMNESS, Message, Topic
from server.observe import log

EXPIRE_AT_ONCE: Final = 500
FIRST_ASK_S: Final = 60
LAST_ASK_WITHIN_S: Final = 60
"""An order whose payment has begun is not expired before its provider was asked, or this long."""


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

    async def create(self, caller: Caller, wish: NewOrder, order_id: UUID, origin: str) -> Order:
        """Make an order, or find the one an earlier try has made under this id.

        Raises Problem: invalid, unavailable where no payment provider is configured.
        """
        if not self.least <= wish.amount <= self.most:
            raise Problem(Code.INVALID, errors=[("amount", f"Between {self.least} and {self.most}.")])
        if not self._providers:
            raise Problem(Code.UNAVAILABLE, N_("No payment provider is configured on this server."))
        provider = wish.provider or next(iter(self._providers))
        if provider not in self._providers:
            raise Problem(Code.INVALID, errors=[("provider", N_("This is no payment provider here."))])
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
                provider,
                wish.amount,
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

    async def begin(self, provider: str, number: str) -> tuple[Payable, UUID]:
        """Note that an order is about to be paid, and that its provider is asked should no callback come.

        Raises Problem: not_found, invalid_state where the order waits for no payment.
        """
        row = await self._database.fetchrow(
            """
            UPDATE orders SET next_ask_at = coalesce(next_ask_at,
                least(now() + make_interval(secs => $3), expires_at))
            WHERE number = $1 AND provider = $2 AND state = 'pending' AND expires_at > now()
            RETURNING id, number, amount, currency, created_at, expires_at, provider_reference
            """,
            number,
            provider,
            FIRST_ASK_S,
        )
        if row is not None:
            return payable(row), row["id"]
        await self.numbered(provider, number, "")
        raise Problem(Code.INVALID_STATE, N_("This order waits for no payment any more."))

    async def open_checkout(self, provider: Provider, number: str, origin: str) -> Checkout:
        """Where the provider takes the payment of an order.

        Raises Problem: not_found, invalid_state, unavailable while the provider does not answer.
        """
        order, order_id = await self.begin(provider.name, number)
        try:
            checkout = await provider.checkout(
                order,
                back_url=f"{origin}/billing/orders/{order_id}",
                callback_url=f"{origin}{API_PREFIX}/billing/payments/{provider.name}",
            )
        except ProviderUnavailable as error:
            log.warning("checkout failed", extra={"provider": provider.name, "error": str(error)})
            raise Problem(
                Code.UNAVAILABLE, N_("The payment provider does not answer; try again shortly.")
            ) from None
        if checkout.reference != order.reference:
            await self._database.execute(
                "UPDATE orders SET provider_reference = $2 WHERE id = $1", order_id, checkout.reference
            )
        return checkout

    async def cancel(self, caller: Caller, order_id: UUID, origin: str) -> Order:
        """Give up a pending order, or do nothing where that has been done.

        Raises Problem: not_found, invalid_state.
        """
        async with self._database.transaction() as tx:
            row = await tx.fetchrow(
                """
                UPDATE orders SET state = 'cancelled',
                    next_ask_at = CASE WHEN next_ask_at IS NOT NULL THEN now() END
                WHERE id = $1 AND user_id = $2 AND state = 'pending'
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
                        SELECT id FROM orders WHERE state = 'pending' AND expires_at <= now() AND (
                            next_ask_at IS NULL OR next_ask_at > expires_at
                            OR expires_at <= now() - make_interval(secs => $2)
                        )
                        ORDER BY expires_at LIMIT $1 FOR UPDATE SKIP LOCKED
                    )
                    RETURNING id, number, amount, currency, state, user_id
                    """,
                    EXPIRE_AT_ONCE,
                    LAST_ASK_WITHIN_S,
                )
                title = N_("Order {number} expired")
                body = N_("It was not paid in time. Make a new one to top up.")
                await self._notifier.publish_all(tx, [order_message(row, title, body) for row in rows])
            expired = len(rows)

    def _order(self, row: Record, origin: str) -> Order:
        fields: dict[str, Any] = {name: row[name] for name in Order.model_fields if name != "checkout_url"}
        is_open = row["provider"] in self._providers
        return Order.model_construct(
            **fields | {"state": OrderState(row["state"])},
            checkout_url=f"{origin}/checkout/{row['provider']}/{row['number']}" if is_open else "",
        )


ORDERS: Final = web.AppKey("ORDERS", Orders)


def payable(row: Record) -> Payable:
    """An order's row as its provider has to know it."""
    return Payable(
        number=row["number"],
        amount=row["amount"],
        currency=row["currency"],
        created_at=row["created_at"],
        expires_at=row["expires_at"],
        reference=row["provider_reference"],
    )


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
