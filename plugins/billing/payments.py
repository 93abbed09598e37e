"""Payments: what providers' callbacks do to orders and balances, many in one transaction.

Every callback whose signature fits is kept as it came before anything follows from it. A payment is
booked once: `payments` has one row for each, which the database lets nobody insert twice. It is credited
where its order waits for it; what comes for a closed order, or a second time, is unapplied until an
administrator adds it to the balance or gives it back. No answer leaves before its commit.
"""

import hashlib
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final
from uuid import UUID

import prometheus_client
from aiohttp import web

from plugins.billing.ledger import ACCOUNTS, Posting
from plugins.billing.model import AccountKind, OrderState, PaymentEvent
from plugins.billing.orders import order_message
from plugins.billing.providers import PROVIDERS
from server.batch import Lane, LaneClosed
from server.db import DatabaseUnavailable, Record, Tx
from server.errors import Code, Problem, not_found
from server.i18n import N_
from server.interfaces import DATABASE, DIRECTORY, NOTIFIER, Message, Topic
from server.observe import METRICS, log

BATCH_LIMIT: Final = 128

Outcome = OrderState | Code | None
"""Where an order is after a callback, why it did not fit, or None where it was none of an order's affairs."""


@dataclass(frozen=True, slots=True)
class Callback:
    """A genuine callback: who sent it, what it says, and the bytes that said so."""

    provider: str
    event: PaymentEvent
    body: bytes

    @property
    def key(self) -> tuple[str, str]:
        """What a repetition has in common with the first delivery."""
        return self.provider, self.event.event_id


@dataclass(frozen=True, slots=True)
class _Payment:
    """Money that came for an order, and why it cannot be credited where it cannot."""

    order: Record
    payment_id: str
    reason: str


@dataclass(frozen=True, slots=True)
class _Report:
    """A payment that did not fit, for administrators."""

    title: str
    params: dict[str, object]


@dataclass(slots=True)
class _Batch:
    """What one transaction has to do for its callbacks."""

    answers: dict[tuple[str, str], Outcome] = field(default_factory=dict)
    payments: dict[tuple[str, str], _Payment] = field(default_factory=dict)  # by order's number, payment's id
    funded: set[str] = field(default_factory=set)  # numbers of the orders that become paid
    misfits: dict[str, list[UUID]] = field(default_factory=dict)  # ids of events
    to_users: list[Message] = field(default_factory=list)
    to_administrators: list[_Report] = field(default_factory=list)

    def take_money(self, event: Record, order: Record) -> Outcome:
        """Note a payment that fits its order; whether it was booked before is for the database to say."""
        is_open = order["state"] in {OrderState.PENDING, OrderState.PAID}
        key = order["number"], event["payment_id"]
        if key not in self.payments:
            is_first = order["state"] == OrderState.PENDING and order["number"] not in self.funded
            reason = "" if is_first else "paid_twice" if is_open else "order_closed"
            self.payments[key] = _Payment(order, event["payment_id"], reason)
            if is_first:
                self.funded.add(order["number"])
        return OrderState.PAID if is_open else Code.ORDER_CLOSED


class Payments:
    """Takes callbacks."""

    def __init__(self, app: web.Application) -> None:
        self._database = app[DATABASE]
        self._directory = app[DIRECTORY]
        self._accounts = app[ACCOUNTS]
        self._notifier = app[NOTIFIER]
        self._providers = app[PROVIDERS]
        self._lane: Lane[Callback, Outcome] = Lane(self._settle, limit=BATCH_LIMIT)
        self._forged = prometheus_client.Counter(
            "cloudphone_payment_callbacks_forged",
            "Payment callbacks whose signature did not fit.",
            ["provider"],
            registry=app[METRICS].registry,
        )

    async def take(self, name: str, headers: Mapping[str, str], body: bytes) -> Outcome:
        """Verify a callback, settle it, and say what became of it.

        Raises Problem: not_found, bad_signature, malformed, invalid, unavailable.
        """
        provider = self._providers.get(name)
        if provider is None:
            raise not_found()
        try:
            event = provider.read_callback(headers, body)
        except Problem as problem:
            if problem.code is Code.BAD_SIGNATURE:
                self._forged.labels(name).inc()
            else:
                await self._keep_unreadable(name, body)
            raise
        return await self.settle(name, event, body)

    async def settle(self, provider: str, event: PaymentEvent, body: bytes) -> Outcome:
        """Do what a genuine event asks for, together with those that come meanwhile.

        Raises Problem(unavailable) while the server stops.
        """
        try:
            return await self._lane.do(Callback(provider, event, body))
        except LaneClosed:
            raise Problem(Code.UNAVAILABLE) from None

    async def close(self) -> None:
        """Settle what has come in, and take nothing more."""
        await self._lane.close()

    async def _settle(self, callbacks: Sequence[Callback]) -> Sequence[Outcome | Exception]:
        try:
            async with self._database.transaction() as tx:
                answers = await self._settle_within(tx, callbacks)
        except DatabaseUnavailable:
            raise
        except Exception:
            if len(callbacks) == 1:
                await self._keep_unsettled(callbacks)
                raise
            log.exception("callbacks could not be settled together", extra={"callbacks": len(callbacks)})
            return [await self._settle_alone(callback) for callback in callbacks]
        return [answers[callback.key] for callback in callbacks]

    async def _settle_alone(self, callback: Callback) -> Outcome | Exception:
        try:
            return (await self._settle([callback]))[0]
        except Exception as error:
            return error

    async def _keep_unsettled(self, callbacks: Sequence[Callback]) -> None:
        """What nothing could follow from is kept all the same; the provider repeats it."""
        async with self._database.transaction() as tx:
            await self._keep(tx, callbacks)

    async def _settle_within(
        self, tx: Tx, callbacks: Sequence[Callback]
    ) -> Mapping[tuple[str, str], Outcome]:
        events = await self._keep(tx, callbacks)
        orders = await self._lock_orders(tx, [event["order_number"] for event, _ in events])
        batch = _Batch()
        for event, is_new in events:
            self._decide(batch, event, is_new, orders.get((event["provider"], event["order_number"])))
        await self._mark_misfits(tx, batch)
        await self._book(tx, batch)
        await self._tell(tx, batch)
        return batch.answers

    async def _keep(self, tx: Tx, callbacks: Sequence[Callback]) -> list[tuple[Record, bool]]:
        """Store each event once; what its first delivery said, and whether that is among these."""
        times = Counter(callback.key for callback in callbacks)
        first = {callback.key: callback for callback in reversed(callbacks)}
        rows = await tx.fetch(
            """
            INSERT INTO payment_events AS e
                (provider, event_id, order_number, amount, currency, status, payment_id, body, deliveries)
            SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::text[], $6::text[],
                $7::text[], $8::bytea[], $9::integer[])
            ON CONFLICT (provider, event_id) DO UPDATE SET deliveries = e.deliveries + excluded.deliveries
            RETURNING id, provider, event_id, order_number, amount, currency, status, payment_id, misfit,
                deliveries
            """,
            [provider for provider, _ in first],
            [event_id for _, event_id in first],
            [callback.event.order_number for callback in first.values()],
            [callback.event.amount for callback in first.values()],
            [callback.event.currency for callback in first.values()],
            [callback.event.status for callback in first.values()],
            [callback.event.payment_id for callback in first.values()],
            [callback.body for callback in first.values()],
            [times[key] for key in first],
        )
        return [(row, row["deliveries"] == times[row["provider"], row["event_id"]]) for row in rows]

    async def _lock_orders(self, tx: Tx, numbers: Sequence[str]) -> dict[tuple[str, str], Record]:
        rows = await tx.fetch(
            """
            SELECT id, number, user_id, provider, amount, currency, state FROM orders
            WHERE number = ANY ($1) ORDER BY user_id FOR NO KEY UPDATE
            """,
            numbers,
        )
        return {(row["provider"], row["number"]): row for row in rows}

    def _decide(self, batch: _Batch, event: Record, is_new: bool, order: Record | None) -> None:
        """What an event asks for; the same each time it is repeated."""
        answer: Outcome
        misfit = ""
        if event["status"] == "other":
            answer = OrderState(order["state"]) if order else None
        elif order is None:
            answer = Code.UNKNOWN_ORDER
            if event["status"] == "succeeded":
                misfit = Code.UNKNOWN_ORDER.value
                self._report(batch, is_new, N_("A payment names an unknown order"), event)
        elif (event["amount"], event["currency"]) != (order["amount"], order["currency"]):
            answer = Code.AMOUNT_MISMATCH
            misfit = Code.AMOUNT_MISMATCH.value
            self._report(batch, is_new, N_("A payment does not match its order"), event)
        elif event["status"] == "succeeded":
            answer = batch.take_money(event, order)
        else:
            answer = OrderState.PAID if order["number"] in batch.funded else OrderState(order["state"])
            if is_new and answer is OrderState.PENDING:
                title = N_("The payment of order {number} failed")
                body = N_("Nothing was charged. You can try again until the order expires.")
                batch.to_users.append(order_message(order, title, body))
        if misfit != event["misfit"]:
            batch.misfits.setdefault(misfit, []).append(event["id"])
        batch.answers[event["provider"], event["event_id"]] = answer

    async def _mark_misfits(self, tx: Tx, batch: _Batch) -> None:
        for misfit, ids in batch.misfits.items():
            await tx.execute("UPDATE payment_events SET misfit = $1 WHERE id = ANY ($2)", misfit, ids)

    async def _book(self, tx: Tx, batch: _Batch) -> None:
        """Give payments to those whose orders wait for them, and set the others aside; each once."""
        if not batch.payments:
            return
        wanted = list(batch.payments.values())
        rows = await tx.fetch(
            """
            WITH booked AS (
                INSERT INTO payments (order_id, payment_id, amount, state, reason)
                SELECT w.order_id, w.payment_id, w.amount,
                    CASE w.reason WHEN '' THEN 'credited' ELSE 'unapplied' END, w.reason
                FROM unnest($1::uuid[], $2::text[], $3::bigint[], $4::text[])
                    AS w (order_id, payment_id, amount, reason)
                ON CONFLICT (order_id, payment_id) DO NOTHING
                RETURNING order_id, payment_id, state
            ), paid AS (
                UPDATE orders o SET state = 'paid', paid_at = now(), next_ask_at = NULL
                FROM booked b WHERE o.id = b.order_id AND b.state = 'credited' AND o.state = 'pending'
            )
            SELECT order_id, payment_id FROM booked
            """,
            [payment.order["id"] for payment in wanted],
            [payment.payment_id for payment in wanted],
            [payment.order["amount"] for payment in wanted],
            [payment.reason for payment in wanted],
        )
        booked = {(row["order_id"], row["payment_id"]) for row in rows}
        new = [payment for payment in wanted if (payment.order["id"], payment.payment_id) in booked]
        credited = [payment.order for payment in new if not payment.reason]
        posted = await self._accounts.post(tx, [_posting(payment) for payment in new])
        title, body, added = (
            N_("Order {number} is paid"),
            N_("The amount is in your balance."),
            N_("{amount} were added."),
        )
        for order, one in zip(credited, posted, strict=True):
            batch.to_users.append(order_message(order, title, body, state=OrderState.PAID))
            batch.to_users.append(self._accounts.moved(one, "top_up", added))
        for payment in new:
            if payment.reason:
                self._tell_unapplied(batch, payment)

    def _tell_unapplied(self, batch: _Batch, payment: _Payment) -> None:
        order = payment.order
        if payment.reason == "order_closed":
            title = N_("The payment of order {number} came too late")
            body = N_("The order is closed. An administrator will add or return the money.")
            report = N_("A payment came for a closed order")
        else:
            title = N_("Order {number} was paid twice")
            body = N_("An administrator will add or return the second payment.")
            report = N_("An order was paid a second time")
        batch.to_users.append(order_message(order, title, body))
        facts = {"order_number": order["number"], "amount": order["amount"], "currency": order["currency"]}
        self._report(batch, True, report, facts)

    async def _keep_unreadable(self, provider: str, body: bytes) -> None:
        """Store a genuine callback that says nothing we understand, and tell administrators once."""
        async with self._database.transaction() as tx:
            is_new = await tx.fetchval(
                """
                INSERT INTO payment_events AS e
                    (provider, event_id, order_number, amount, currency, status, body, deliveries, misfit)
                VALUES ($1, $2, '', 0, '', 'unreadable', $3, 1, 'unreadable')
                ON CONFLICT (provider, event_id) DO UPDATE SET deliveries = e.deliveries + 1
                RETURNING deliveries = 1
                """,
                provider,
                f"unreadable:{hashlib.sha256(body).hexdigest()}",
                body,
            )
            if is_new:
                await self._notifier.broadcast(
                    tx,
                    await self._directory.administrators(tx),
                    Topic.SYSTEM,
                    N_("A payment callback cannot be read"),
                    N_("It is signed by {provider}, and kept."),
                    params={"provider": provider},
                )

    def _report(self, batch: _Batch, is_new: bool, title: str, payment: Mapping[str, Any] | Record) -> None:
        if is_new:
            params = {name: payment[name] for name in ("order_number", "amount", "currency")}
            batch.to_administrators.append(_Report(title, params))

    async def _tell(self, tx: Tx, batch: _Batch) -> None:
        messages = batch.to_users
        if batch.to_administrators:
            body = N_("Order {order_number}: {amount} minor units of {currency}. The callback is kept.")
            messages = messages + [
                Message(administrator, Topic.SYSTEM, report.title, body, report.params, report.params)
                for administrator in await self._directory.administrators(tx)
                for report in batch.to_administrators
            ]
        await self._notifier.publish_all(tx, messages)


PAYMENTS: Final = web.AppKey("PAYMENTS", Payments)


def _posting(payment: _Payment) -> Posting:
    order = payment.order
    if payment.reason:
        return Posting(
            None,
            order["amount"],
            AccountKind.CLEARING,
            "unapplied_payment",
            order["number"],
            account=AccountKind.UNAPPLIED,
        )
    return Posting(order["user_id"], order["amount"], AccountKind.CLEARING, "top_up", order["number"])
