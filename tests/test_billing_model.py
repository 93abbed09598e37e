"""Any sequence of orders, callbacks, charges, breakdowns and restarts keeps the books of a plain model."""

import asyncio
import os
from collections import Counter
from collections.abc import Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, TypeVar
from unittest.mock import patch
from uuid import UUID

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    MultipleResults,
    RuleBasedStateMachine,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from plugins.billing.ledger import ACCOUNTS
from plugins.billing.orders import ORDERS
from server.db import CommitUnknown, Tx
from server.interfaces import DATABASE, LEDGER, Usage
from server.observe import METRICS
from server.pg import terminate
from tests.house import Client, House, Reply
from tests.paying import (
    PLUGINS,
    SANDBOX,
    WELCOME,
    OpenBank,
    administrator,
    assert_sound,
    balance_of,
    deliver,
    order_of,
    report,
    state_of,
)
from tests.paying import open_bank as open_bank
from tests.servers import Servers

USERS: Final = 3
START: Final = 1000
OVERDUE_S: Final = 61
DEADLINE_S: Final = 20
EXAMPLES: Final = int(os.environ.get("TEST_MODEL_EXAMPLES", "8"))
"""How many sequences are tried; CI tries more."""
STEPS: Final = 30
WHY: Final = {"reason": "a test wants it"}

Result = TypeVar("Result")

amounts = st.integers(1, 500)
users = st.integers(0, USERS - 1)


@dataclass
class KnownOrder:
    """What the model knows of an order: its state, and the payments that came for it."""

    made: dict[str, Any]
    user: int
    state: str = "pending"
    overdue: bool = False
    credited: set[str] = field(default_factory=set)
    unapplied: set[str] = field(default_factory=set)
    returned: set[str] = field(default_factory=set)
    refunded: Counter[str] = field(default_factory=Counter)
    reported: list[bytes] = field(default_factory=list)

    @property
    def amount(self) -> int:
        """In minor units."""
        return int(self.made["amount"])

    @property
    def id(self) -> UUID:
        """The order's id."""
        return UUID(self.made["id"])


class Books:
    """The model: everybody's money, and the house's accounts, as plain numbers."""

    def __init__(self, balances: list[int], house: dict[str, int]) -> None:
        self.balances = balances
        self.house = house
        self.orders: list[KnownOrder] = []

    def pay(self, order: KnownOrder, payment_id: str) -> tuple[int, str]:
        """A payment came. What is answered: status, and the order's state or the problem's code."""
        if payment_id not in order.credited | order.unapplied | order.returned:
            self.house["clearing"] -= order.amount
            if order.state == "pending":
                order.state = "paid"
                order.credited.add(payment_id)
                self.balances[order.user] += order.amount
            else:
                order.unapplied.add(payment_id)
                self.house["unapplied"] += order.amount
        return (200, "paid") if order.state == "paid" else (409, "order_closed")

    def refund(self, order: KnownOrder, payment_id: str, amount: int) -> int:
        """Money goes back; the status of the answer."""
        is_unapplied = payment_id in order.unapplied
        if amount > order.amount - order.refunded[payment_id] or (is_unapplied and amount != order.amount):
            return 409
        if is_unapplied:
            self.house["unapplied"] -= amount
            order.unapplied.remove(payment_id)
            order.returned.add(payment_id)
        elif self.balances[order.user] < amount:
            return 402
        else:
            self.balances[order.user] -= amount
        self.house["clearing"] += amount
        order.refunded[payment_id] += amount
        return 201

    def apply(self, order: KnownOrder, payment_id: str) -> int:
        """An unapplied payment is added to its owner's balance; the status of the answer."""
        if payment_id not in order.unapplied:
            return 409
        order.unapplied.remove(payment_id)
        order.credited.add(payment_id)
        self.house["unapplied"] -= order.amount
        self.balances[order.user] += order.amount
        return 200

    def correct(self, user: int, amount: int) -> int:
        """An administrator adds or takes; the status of the answer."""
        if self.balances[user] + amount < 0:
            return 402
        self.balances[user] += amount
        self.house["revenue"] -= amount
        return 201

    def charge(self, user: int, amount: int) -> int:
        """What a charge takes."""
        taken = min(amount, self.balances[user])
        self.balances[user] -= taken
        self.house["revenue"] += taken
        return taken


class Bookkeeping(RuleBasedStateMachine):
    """What may happen to money, in any order. The users and their money stay from example to example."""

    orders: Bundle[KnownOrder] = Bundle("orders")

    def __init__(self, bank: House, admin: Client, clients: list[Client], runner: asyncio.Runner) -> None:
        super().__init__()
        self.bank = bank
        self.admin = admin
        self.clients = clients
        self.runner = runner
        self.books: Books

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        """Let the server live until this is done."""
        return self.runner.run(work)

    @initialize(target=orders)
    def begin(self) -> MultipleResults[KnownOrder]:
        self.run(self._begin_alike())
        self.books = Books(*self.run(self._written()))
        return multiple(*(self._ordered(user, 100 + user) for user in range(USERS)))

    # Orders

    @rule(target=orders, user=users, amount=amounts)
    def order(self, user: int, amount: int) -> KnownOrder:
        return self._ordered(user, amount)

    def _ordered(self, user: int, amount: int) -> KnownOrder:
        known = KnownOrder(self.run(order_of(self.clients[user], amount)), user)
        self.books.orders.append(known)
        return known

    @rule(order=orders)
    def cancel(self, order: KnownOrder) -> None:
        reply = self.run(self.clients[order.user].post(f"/billing/orders/{order.id}/cancel"))
        if order.state == "pending":
            order.state = "cancelled"
        assert reply.status == (200 if order.state == "cancelled" else 409)

    @rule(order=orders)
    def let_its_time_pass(self, order: KnownOrder) -> None:
        past = "UPDATE orders SET expires_at = now() - make_interval(secs => $2) WHERE id = $1"
        self.run(self.bank.app[DATABASE].execute(past, order.id, OVERDUE_S))
        order.overdue = True

    @rule()
    def expire(self) -> None:
        self.run(self.bank.app[ORDERS].expire())
        self._note_expired()

    def _note_expired(self) -> None:
        for order in self.books.orders:
            if order.overdue and order.state == "pending":
                order.state = "expired"

    # Callbacks

    @rule(
        order=orders,
        events=st.integers(1, 3),
        copies=st.integers(1, 3),
        payment_id=st.sampled_from(["", "p2"]),
    )
    def pay(self, order: KnownOrder, events: int, copies: int, payment_id: str) -> None:
        bodies = [report(order.made, payment_id=payment_id) for _ in range(events)]
        order.reported.append(bodies[0])
        replies = self.run(self._deliver(bodies * copies))
        answer = self.books.pay(order, payment_id)
        assert [_answer(reply) for reply in replies] == [answer] * events * copies

    @rule(some=st.lists(orders, min_size=2, max_size=6))
    def pay_many_at_once(self, some: list[KnownOrder]) -> None:
        replies = self.run(self._deliver([report(order.made) for order in some]))
        answers = [self.books.pay(order, "") for order in some]
        assert [_answer(reply) for reply in replies] == answers

    @rule(order=orders, number=st.integers(0, 9))
    def repeat_what_was_reported_before(self, order: KnownOrder, number: int) -> None:
        if not order.reported:
            return
        body = order.reported[number % len(order.reported)]
        (reply,) = self.run(self._deliver([body]))
        assert _answer(reply) == ((200, "paid") if order.state == "paid" else (409, "order_closed"))

    @rule(order=orders)
    def fail(self, order: KnownOrder) -> None:
        (reply,) = self.run(self._deliver([report(order.made, status="failed")]))
        assert _answer(reply) == (200, order.state)

    @rule(order=orders, change=st.sampled_from([{"amount": 1}, {"amount": -1}, {"currency": "USD"}]))
    def report_what_does_not_fit(self, order: KnownOrder, change: dict[str, Any]) -> None:
        wrong = {"amount": order.amount + change["amount"]} if "amount" in change else change
        (reply,) = self.run(self._deliver([report(order.made, **wrong)]))
        assert _answer(reply) == (422, "amount_mismatch")

    @rule(amount=amounts)
    def report_an_unknown_order(self, amount: int) -> None:
        body = report({"number": "CP0", "amount": amount, "currency": "CNY"})
        (reply,) = self.run(self._deliver([body]))
        assert _answer(reply) == (404, "unknown_order")

    # What administrators do

    @rule(order=orders, which=st.integers(0, 1), much=st.sampled_from([1, 2, 3]), double=st.booleans())
    def refund(self, order: KnownOrder, which: int, much: int, double: bool) -> None:
        payment_id = self._payment_of(order, which)
        amount = max(1, order.amount * much // 2)
        path = f"/billing/payments/{self.run(self._payment(order, payment_id))}/refunds"
        replies = self.run(self._ask(path, {"amount": amount, **WHY}, times=2 if double else 1))
        wanted = [self.books.refund(order, payment_id, amount) for _ in replies]
        assert sorted(reply.status for reply in replies) == sorted(wanted)

    @rule(order=orders, which=st.integers(0, 1))
    def apply(self, order: KnownOrder, which: int) -> None:
        payment_id = self._payment_of(order, which)
        path = f"/billing/payments/{self.run(self._payment(order, payment_id))}/apply"
        (reply,) = self.run(self._ask(path, WHY))
        assert reply.status == self.books.apply(order, payment_id)

    def _payment_of(self, order: KnownOrder, which: int) -> str:
        """One of an order's payments, which is made where there is none."""
        payments = sorted(order.credited | order.unapplied | order.returned)
        if payments:
            return payments[which % len(payments)]
        (reply,) = self.run(self._deliver([report(order.made)]))
        assert _answer(reply) == self.books.pay(order, "")
        return ""

    @rule(user=users, amount=st.integers(-1500, 500).filter(bool))
    def correct(self, user: int, amount: int) -> None:
        path = f"/billing/users/{self.clients[user].user['id']}/corrections"
        (reply,) = self.run(self._ask(path, {"amount": amount, **WHY}))
        assert reply.status == self.books.correct(user, amount)

    # Charges

    @rule(wishes=st.lists(st.tuples(users, st.integers(0, 400)), min_size=1, max_size=3))
    def charge(self, wishes: list[tuple[int, int]]) -> None:
        ids = [UUID(client.user["id"]) for client in self.clients]
        usages = [Usage(ids[user], amount, "device", "phone") for user, amount in wishes]
        charged = self.run(self._charge(usages))
        wanted = [self.books.charge(user, amount) for user, amount in wishes]
        assert [one.amount for one in charged] == wanted

    # Breakdowns

    @rule(order=orders, stands=st.booleans())
    def lose_the_database_in_a_commit(self, order: KnownOrder, stands: bool) -> None:
        with _broken_commit(stands):
            (reply,) = self.run(self._deliver([report(order.made)]))
        assert reply.status == 503
        if stands:
            self.books.pay(order, "")
        self.run(self.bank.app[ACCOUNTS].read_again())

    @rule(user=users, amount=amounts, stands=st.booleans())
    def lose_the_database_in_a_charge(self, user: int, amount: int, stands: bool) -> None:
        usage = Usage(UUID(self.clients[user].user["id"]), amount, "device", "phone")
        with _broken_commit(stands), pytest.raises(CommitUnknown):
            self.run(self._charge([usage]))
        if stands:
            self.books.charge(user, amount)
        self.run(self.bank.app[ACCOUNTS].read_again())

    @rule()
    def restart(self) -> None:
        self.run(self._restart())
        self._note_expired()

    # What holds after each

    @invariant()
    def the_server_keeps_the_same_books(self) -> None:
        assert self.run(self._written()) == (self.books.balances, self.books.house)
        assert self.run(self._shown()) == self.books.balances
        known = {order.id: order for order in self.books.orders}
        states, payments = self.run(self._orders_and_payments(list(known)))
        assert states == {id: order.state for id, order in known.items()}
        assert payments == Counter(
            (id, payment_id, order.amount, state)
            for id, order in known.items()
            for state, ids in (
                ("credited", order.credited),
                ("unapplied", order.unapplied),
                ("returned", order.returned),
            )
            for payment_id in ids
        )

    def teardown(self) -> None:
        self.run(assert_sound(self.bank))

    # How it is asked

    async def _deliver(self, bodies: list[bytes]) -> list[Reply]:
        return await asyncio.gather(*(deliver(self.bank, body) for body in bodies))

    async def _ask(self, path: str, body: object, times: int = 1) -> list[Reply]:
        """An administrator's wish, sent at once so many times."""
        return await asyncio.gather(*(self.admin.post(path, body) for _ in range(times)))

    async def _payment(self, order: KnownOrder, payment_id: str) -> UUID:
        found: UUID = await self.bank.app[DATABASE].fetchval(
            "SELECT id FROM payments WHERE order_id = $1 AND payment_id = $2", order.id, payment_id
        )
        return found

    async def _charge(self, usages: list[Usage]) -> list[Any]:
        async with self.bank.app[DATABASE].transaction() as tx:
            return list(await self.bank.app[LEDGER].charge(tx, usages))

    async def _begin_alike(self) -> None:
        """Leave everybody START, whatever the last example left, so that one that failed fails again."""
        await self.bank.app[ACCOUNTS].load()
        await self._charge([Usage(UUID(one.user["id"]), 10**9, "device", "phone") for one in self.clients])
        await self._deliver([report(await order_of(client, START)) for client in self.clients])

    async def _restart(self) -> None:
        """Start again, and wait for the sweep of expired orders that every start begins with."""
        await self.bank.restart()
        swept = {"job": "billing.expire_orders", "outcome": "done"}
        async with asyncio.timeout(DEADLINE_S):
            while not self.bank.app[METRICS].registry.get_sample_value("cloudphone_jobs_total", swept):
                await asyncio.sleep(0.01)

    async def _written(self) -> tuple[list[int], dict[str, int]]:
        rows = await self.bank.app[DATABASE].fetch("SELECT kind, user_id, balance FROM ledger_accounts")
        of_user = {str(row["user_id"]): row["balance"] for row in rows}
        house = {row["kind"]: row["balance"] for row in rows if row["user_id"] is None}
        return [of_user[client.user["id"]] for client in self.clients], house

    async def _shown(self) -> list[int]:
        return [await balance_of(client) for client in self.clients]

    async def _orders_and_payments(self, ids: list[UUID]) -> tuple[dict[UUID, str], Counter[tuple[Any, ...]]]:
        database = self.bank.app[DATABASE]
        states = await database.fetch("SELECT id, state FROM orders WHERE id = ANY ($1)", ids)
        payments = await database.fetch(
            "SELECT order_id, payment_id, amount, state FROM payments WHERE order_id = ANY ($1)", ids
        )
        return {row["id"]: row["state"] for row in states}, Counter(map(tuple, payments))


def _answer(reply: Reply) -> tuple[int, str]:
    return reply.status, reply.json.get("order_state") or reply.code


@contextmanager
def _broken_commit(stands: bool) -> Iterator[None]:
    """Every COMMIT breaks off: before it is carried out, or when it `stands` and nobody is told."""

    async def break_off(tx: Tx, connection: Any) -> None:
        if stands:
            await connection.execute("COMMIT")
        terminate(connection)
        raise CommitUnknown("broken off by a test")

    with patch.object(Tx, "_send_commit", break_off):
        yield


@pytest.mark.timeout(600)  # what goes wrong is made smaller for some minutes
def test_any_sequence_of_events_keeps_the_books(servers: Servers, tmp_path: Path) -> None:
    async def open_bank() -> tuple[House, Client, list[Client]]:
        bank = await House.open(servers, tmp_path / "house", {"billing": SANDBOX}, PLUGINS)
        return bank, await administrator(bank), [await bank.sign_up() for _ in range(USERS)]

    with asyncio.Runner() as runner:
        bank, admin, clients = runner.run(open_bank())

        class InThisBank(Bookkeeping):
            def __init__(self) -> None:
                super().__init__(bank, admin, clients, runner)

        try:
            run_state_machine_as_test(
                InThisBank, settings=settings(max_examples=EXAMPLES, stateful_step_count=STEPS, deadline=None)
            )
        finally:
            runner.run(bank.close())


@pytest.mark.asyncio(loop_scope="module")
async def test_a_balance_that_was_in_doubt_is_shown_right_again(open_bank: OpenBank) -> None:
    bank = await open_bank(billing=SANDBOX)
    client = await bank.sign_up()
    order = await order_of(client)
    with _broken_commit(stands=True):
        assert (await deliver(bank, report(order))).status == 503
    assert await state_of(client, order) == "paid"
    async with asyncio.timeout(10):
        while await balance_of(client) != WELCOME + 5000:
            await asyncio.sleep(0.1)
