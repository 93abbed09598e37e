"""Payments: what providers' callbacks do to orders and balances, many in one transaction.

Every callback whose signature fits is kept as it came before anything follows from it. An order is
credited once: the lane takes one batch at a time, the order's state guards the UPDATE, and a unique
index on the ledger has the last word. No answer leaves before its commit.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from aiohttp import web

from plugins.billing.ledger import ACCOUNTS, Posting
from plugins.billing.model import AccountKind, Acknowledgement, OrderState, PaymentEvent
from plugins.billing.orders import order_message
from plugins.billing.providers import PROVIDERS
from server.batch import Lane, LaneClosed
from server.db import DatabaseUnavailable, Record, Tx
from server.errors import Code, Problem, not_found
from server.i18n import N_
from server.interfaces import DATABASE, DIRECTORY, NOTIFIER, Message, Topic
from server.observe import log

BATCH_LIMIT: Final = 128


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
class _Report:
    """A payment that did not fit, for administrators."""

    title: str
    params: dict[str, object]


@dataclass(slots=True)
class _Batch:
    """What one transaction has to do for its callbacks."""

    answers: dict[tuple[str, str], OrderState | Code] = field(default_factory=dict)
    paid: dict[str, Record] = field(default_factory=dict)  # orders by number
    late: dict[str, Record] = field(default_factory=dict)  # closed orders that were paid for
    to_users: list[Message] = field(default_factory=list)
    to_administrators: list[_Report] = field(default_factory=list)


class Payments:
    """Takes callbacks."""

    def __init__(self, app: web.Application) -> None:
        self._database = app[DATABASE]
        self._directory = app[DIRECTORY]
        self._accounts = app[ACCOUNTS]
        self._notifier = app[NOTIFIER]
        self._providers = app[PROVIDERS]
        self._lane: Lane[Callback, OrderState] = Lane(self._settle, limit=BATCH_LIMIT)

    async def take(self, provider: str, headers: Mapping[str, str], body: bytes) -> Acknowledgement:
        """Verify a callback, settle it, and say where its order is then.

        Raises Problem: not_found, bad_signature, unknown_order, order_closed, amount_mismatch.
        """
        if provider not in self._providers:
            raise not_found()
        event = self._providers[provider].read_callback(headers, body)
        try:
            state = await self._lane.do(Callback(provider, event, body))
        except LaneClosed:
            raise Problem(Code.UNAVAILABLE) from None
        return Acknowledgement(order_state=state)

    async def close(self) -> None:
        """Settle what has come in, and take nothing more."""
        await self._lane.close()

    async def _settle(self, callbacks: Sequence[Callback]) -> Sequence[OrderState | Exception]:
        try:
            async with self._database.transaction() as tx:
                answers = await self._settle_within(tx, callbacks)
        except DatabaseUnavailable:
            raise
        except Exception:
            if len(callbacks) == 1:
                raise
            log.exception("callbacks could not be settled together", extra={"callbacks": len(callbacks)})
            return [await self._settle_alone(callback) for callback in callbacks]
        return [_answer(answers[callback.key]) for callback in callbacks]

    async def _settle_alone(self, callback: Callback) -> OrderState | Exception:
        try:
            return (await self._settle([callback]))[0]
        except Exception as error:
            return error

    async def _settle_within(
        self, tx: Tx, callbacks: Sequence[Callback]
    ) -> Mapping[tuple[str, str], OrderState | Code]:
        events = await self._keep(tx, callbacks)
        orders = await self._lock_orders(tx, [event["order_number"] for event, _ in events])
        batch = _Batch()
        for event, is_new in events:
            self._decide(batch, event, is_new, orders.get((event["provider"], event["order_number"])))
        await self._credit(tx, batch)
        await self._set_aside(tx, batch)
        await self._tell(tx, batch)
        return batch.answers

    async def _keep(self, tx: Tx, callbacks: Sequence[Callback]) -> list[tuple[Record, bool]]:
        """Store each event once; what its first delivery said, and whether that is among these."""
        times = Counter(callback.key for callback in callbacks)
        first = {callback.key: callback for callback in reversed(callbacks)}
        rows = await tx.fetch(
            """
            INSERT INTO payment_events AS e
                (provider, event_id, order_number, amount, currency, status, body, deliveries)
            SELECT * FROM unnest($1::text[], $2::text[], $3::text[], $4::bigint[], $5::text[], $6::text[],
                $7::bytea[], $8::integer[])
            ON CONFLICT (provider, event_id) DO UPDATE SET deliveries = e.deliveries + excluded.deliveries
            RETURNING provider, event_id, order_number, amount, currency, status, deliveries
            """,
            [provider for provider, _ in first],
            [event_id for _, event_id in first],
            [callback.event.order_number for callback in first.values()],
            [callback.event.amount for callback in first.values()],
            [callback.event.currency for callback in first.values()],
            [callback.event.status for callback in first.values()],
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
        succeeded = event["status"] == "succeeded"
        answer: OrderState | Code
        if order is None:
            answer = Code.UNKNOWN_ORDER
            if is_new and succeeded:
                batch.to_administrators.append(self._report(N_("A payment names an unknown order"), event))
        elif (event["amount"], event["currency"]) != (order["amount"], order["currency"]):
            answer = Code.AMOUNT_MISMATCH
            if is_new:
                batch.to_administrators.append(self._report(N_("A payment does not match its order"), event))
        elif not succeeded:
            answer = OrderState.PAID if order["number"] in batch.paid else OrderState(order["state"])
            if is_new and answer is OrderState.PENDING:
                title = N_("The payment of order {number} failed")
                body = N_("Nothing was charged. You can try again until the order expires.")
                batch.to_users.append(order_message(order, title, body))
        elif order["state"] in {OrderState.PENDING, OrderState.PAID}:
            answer = OrderState.PAID
            if order["state"] == OrderState.PENDING:
                batch.paid[order["number"]] = order
        else:
            answer = Code.ORDER_CLOSED
            batch.late[order["number"]] = order
        batch.answers[event["provider"], event["event_id"]] = answer

    async def _credit(self, tx: Tx, batch: _Batch) -> None:
        """Mark orders paid and give their owners the money."""
        if not batch.paid:
            return
        orders = list(batch.paid.values())
        await tx.execute(
            "UPDATE orders SET state = 'paid', paid_at = now() WHERE id = ANY ($1) AND state = 'pending'",
            [order["id"] for order in orders],
        )
        credits = [
            Posting(order["user_id"], order["amount"], AccountKind.CLEARING, "top_up", order["number"])
            for order in orders
        ]
        title, body, added = (
            N_("Order {number} is paid"),
            N_("The amount is in your balance."),
            N_("{amount} were added."),
        )
        for order, posted in zip(orders, await self._accounts.post(tx, credits), strict=True):
            batch.to_users.append(order_message(order, title, body, state=OrderState.PAID))
            batch.to_users.append(self._accounts.moved(posted, "top_up", added))

    async def _set_aside(self, tx: Tx, batch: _Batch) -> None:
        """Book what came for closed orders as unapplied; the first time, say so."""
        if not batch.late:
            return
        booked = await self._accounts.set_aside(
            tx, [(number, order["amount"]) for number, order in batch.late.items()]
        )
        for number in booked:
            order = batch.late[number]
            title = N_("The payment of order {number} came too late")
            body = N_("The order is closed. An administrator will add or return the money.")
            batch.to_users.append(order_message(order, title, body))
            closed = {"order_number": number, "amount": order["amount"], "currency": order["currency"]}
            batch.to_administrators.append(self._report(N_("A payment came for a closed order"), closed))

    def _report(self, title: str, payment: Mapping[str, Any] | Record) -> _Report:
        params = {name: payment[name] for name in ("order_number", "amount", "currency")}
        return _Report(title, params)

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


def _answer(outcome: OrderState | Code) -> OrderState | Exception:
    return outcome if isinstance(outcome, OrderState) else Problem(outcome)
