"""Money: what users have, how they top up, and what a payment provider's callbacks may do."""

import asyncio
import base64
import hashlib
import hmac
import json
import random
import re
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
import pytest_asyncio

from plugins import billing, notify, users
from plugins.billing.ledger import ACCOUNTS
from plugins.billing.orders import ORDERS
from server.db import CheckViolation
from server.errors import Problem
from server.interfaces import DATABASE, LEDGER
from server.plugin import PluginFault
from tests.house import Client, House, Reply
from tests.servers import Servers

SECRET = "a secret of the tests"
PLUGINS = (users.PLUGIN, notify.PLUGIN, billing.PLUGIN)
SANDBOX: dict[str, object] = {"providers": {"sandbox": {"secret": SECRET}}}
WELCOME = 1000

OpenBank = Callable[..., Awaitable[House]]

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bank(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    """A server without phones, whose sandbox signs with SECRET; the tests of this file share it."""
    house = await House.open(
        servers, tmp_path_factory.mktemp("bank") / "house", {"billing": SANDBOX}, PLUGINS
    )
    yield house
    await house.close()


@pytest_asyncio.fixture(loop_scope="module")
async def open_bank(servers: Servers, tmp_path: Path) -> AsyncIterator[OpenBank]:
    """Start servers of one's own: `await open_bank(billing={"min_order": 100})`."""
    houses: list[House] = []

    async def open_one(**sections: dict[str, object]) -> House:
        house = await House.open(servers, tmp_path / f"house{len(houses)}", sections, PLUGINS)
        houses.append(house)
        return house

    yield open_one
    for house in houses:
        await house.close()


def signature(body: bytes, *, secret: str = SECRET, off_s: float = 0) -> str:
    """The header of a callback signed `off_s` from now."""
    at = str(int(time.time() + off_s))
    return f"t={at},v1={hmac.new(secret.encode(), at.encode() + b'.' + body, hashlib.sha256).hexdigest()}"


def report(order: dict[str, Any], **changes: object) -> bytes:
    """A callback's body: the order's payment succeeded."""
    event = {
        "event_id": uuid4().hex,
        "order_number": order["number"],
        "amount": order["amount"],
        "currency": order["currency"],
        "status": "succeeded",
        "occurred_at": "2030-01-01T00:00:00Z",
    }
    return json.dumps({**event, **changes}).encode()


async def deliver(house: House, body: bytes, header: str | None = None) -> Reply:
    """Send a callback, signed unless another header is given."""
    headers = {"X-Signature": signature(body) if header is None else header}
    return await house.anyone.post("/billing/payments/sandbox", data=body, headers=headers)


async def order_of(client: Client, amount: int = 5000) -> dict[str, Any]:
    """A new order."""
    reply = await client.post("/billing/orders", {"amount": amount})
    assert reply.status == 201, reply.body
    return dict(reply.json)


async def state_of(client: Client, order: dict[str, Any]) -> str:
    """Where an order is."""
    return str((await client.get(f"/billing/orders/{order['id']}")).json["state"])


async def balance_of(client: Client) -> int:
    """What somebody has."""
    return int((await client.get("/billing/balance")).json["balance"])


async def entries_of(client: Client) -> list[dict[str, Any]]:
    """Somebody's ledger, newest first."""
    return list((await client.get("/billing/ledger?limit=100")).json["items"])


async def told(client: Client, topic: str) -> list[dict[str, Any]]:
    """The data of somebody's notifications on a topic, oldest first."""
    items = (await client.get("/notifications?limit=100")).json["items"]
    return [one["data"] for one in items if one["topic"] == topic]


async def complaints(admin: Client) -> list[dict[str, Any]]:
    """What an administrator heard of payments that do not fit."""
    return [data for data in await told(admin, "system") if "order_number" in data]


async def administrator(house: House) -> Client:
    """Somebody who hears of payments that do not fit."""
    client = await house.sign_up()
    await house.app[DATABASE].execute("UPDATE users SET role = 'admin' WHERE id = $1", client.user["id"])
    return client


async def events_of(house: House, order: dict[str, Any]) -> list[str]:
    """What was reported about an order, as it is kept."""
    rows = await house.app[DATABASE].fetch(
        "SELECT status FROM payment_events WHERE order_number = $1", order["number"]
    )
    return [row["status"] for row in rows]


async def booked(house: House, kind: str, order: dict[str, Any]) -> dict[str, int]:
    """The entries of one kind about an order, by account."""
    rows = await house.app[DATABASE].fetch(
        "SELECT a.kind, e.amount FROM ledger_accounts a JOIN ledger_entries e ON e.account_id = a.id"
        " WHERE e.kind = $1 AND e.reference = $2",
        kind,
        order["number"],
    )
    assert len(rows) == len({row["kind"] for row in rows})
    return {row["kind"]: row["amount"] for row in rows}


async def assert_sound(house: House) -> None:
    """The ledger's invariants, over all it holds."""
    database = house.app[DATABASE]
    assert not await database.fetch(
        "SELECT FROM ledger_entries GROUP BY transaction_id HAVING sum(amount) <> 0 OR count(*) <> 2"
    )
    assert not await database.fetch(
        "SELECT FROM ledger_accounts a LEFT JOIN ledger_entries e ON e.account_id = a.id"
        " WHERE a.kind = 'user' GROUP BY a.id HAVING a.balance <> coalesce(sum(e.amount), 0)"
    )
    assert not await database.fetch(
        "SELECT FROM (SELECT e.balance_after, sum(e.amount) OVER (PARTITION BY a.id ORDER BY e.position) AS s"
        " FROM ledger_entries e JOIN ledger_accounts a ON a.id = e.account_id WHERE a.kind = 'user') h"
        " WHERE balance_after IS DISTINCT FROM s"
    )
    assert not await database.fetch(
        "SELECT FROM orders o FULL JOIN (SELECT * FROM ledger_entries WHERE kind = 'top_up' AND amount > 0) e"
        " ON e.reference = o.number WHERE (o.state = 'paid') <> (e.amount IS NOT NULL)"
        " OR o.id IS NULL OR o.amount <> e.amount"
    )
    rows = await database.fetch("SELECT user_id, balance FROM ledger_accounts WHERE kind = 'user'")
    for row in rows:
        assert house.app[ACCOUNTS].balance_of(row["user_id"]).balance == row["balance"]


# Balances and orders


async def test_a_new_account_has_the_welcome_credit(bank: House) -> None:
    client = await bank.sign_up()
    assert (await client.get("/billing/balance")).json == {"balance": WELCOME, "currency": "CNY"}
    (entry,) = await entries_of(client)
    assert (entry["amount"], entry["balance_after"], entry["kind"]) == (WELCOME, WELCOME, "welcome_credit")
    assert await told(client, "billing.balance") == [
        {"balance": WELCOME, "amount": WELCOME, "currency": "CNY", "kind": "welcome_credit"}
    ]
    await assert_sound(bank)


async def test_without_a_welcome_credit_an_account_starts_empty(open_bank: OpenBank) -> None:
    bank = await open_bank(billing={**SANDBOX, "welcome_credit": 0})
    client = await bank.sign_up()
    assert await balance_of(client) == 0
    assert await entries_of(client) == []


async def test_an_order_says_where_and_until_when_it_is_paid(bank: House) -> None:
    client = await bank.sign_up()
    reply = await client.post("/billing/orders", {"amount": 5000})
    order = reply.json
    assert reply.headers["Location"] == f"/api/v1/billing/orders/{order['id']}"
    assert set(order) == {
        "id", "number", "amount", "currency", "state", "checkout_url", "created_at", "expires_at", "paid_at",
    }  # fmt: skip
    assert re.fullmatch(r"CP[0-9A-F]{20}", order["number"])
    assert (order["amount"], order["currency"], order["state"]) == (5000, "CNY", "pending")
    assert order["checkout_url"] == f"{bank.url}/checkout/sandbox/{order['number']}"
    assert order["paid_at"] is None
    assert order["created_at"] < order["expires_at"]
    assert (await client.get(f"/billing/orders/{order['id']}")).json == order


async def test_an_amount_that_is_none_is_refused(bank: House) -> None:
    client = await bank.sign_up()
    headers = {"Content-Type": "application/json"}
    for amount in (
        "-1",
        "0",
        "0.5",
        "5.0",
        "true",
        '"5"',
        "null",
        "100000001",
        "1e2",
        f"{2**63}",
        f"{10**30}",
    ):
        reply = await client.post("/billing/orders", data=f'{{"amount": {amount}}}', headers=headers)
        assert (reply.status, reply.code) == (422, "invalid"), amount
        assert [error["field"] for error in reply.json["errors"]] == ["amount"]
    assert (await client.get("/billing/orders")).json["items"] == []


async def test_an_order_takes_nothing_but_an_amount(bank: House) -> None:
    client = await bank.sign_up()
    for extra in ({"state": "paid"}, {"currency": "USD"}, {"user_id": str(uuid4())}):
        assert (await client.post("/billing/orders", {"amount": 1, **extra})).status == 422


async def test_limits_of_an_order_come_from_the_configuration(open_bank: OpenBank) -> None:
    bank = await open_bank(billing={**SANDBOX, "min_order": 100, "max_order": 200})
    client = await bank.sign_up()
    statuses = [
        (await client.post("/billing/orders", {"amount": amount})).status for amount in (99, 100, 200, 201)
    ]
    assert statuses == [422, 201, 201, 422]


async def test_somebody_elses_order_is_not_there(bank: House) -> None:
    owner, other = await bank.sign_up(), await bank.sign_up()
    order = await order_of(owner)
    assert (await other.get(f"/billing/orders/{order['id']}")).code == "not_found"
    assert (await other.post(f"/billing/orders/{order['id']}/cancel")).code == "not_found"
    assert (await other.get("/billing/orders")).json["items"] == []
    assert (await other.get(f"//billing/orders/{order['id']}")).status == 404
    assert await state_of(owner, order) == "pending"


async def test_the_same_idempotency_key_makes_one_order(bank: House) -> None:
    client = await bank.sign_up()
    key = {"Idempotency-Key": "k1"}
    first = await client.post("/billing/orders", {"amount": 5000}, headers=key)
    again = await client.post("/billing/orders", {"amount": 5000}, headers=key)
    other = await client.post("/billing/orders", {"amount": 6000}, headers=key)
    assert first.json == again.json
    assert (other.status, other.code) == (422, "idempotency_mismatch")
    assert len((await client.get("/billing/orders")).json["items"]) == 1


async def test_an_order_made_twice_under_one_id_is_one_order(bank: House) -> None:
    client = await bank.sign_up()
    caller = bank.app[ORDERS]
    order = await order_of(client)
    who: Any = type("Caller", (), {"user_id": client.user["id"]})
    again = await caller.create(who, 5000, order["id"], "")
    assert again.number == order["number"]
    assert len((await client.get("/billing/orders")).json["items"]) == 1


async def test_orders_come_newest_first_by_page_and_state(bank: House) -> None:
    client = await bank.sign_up()
    made = [(await order_of(client, amount))["id"] for amount in range(1, 6)]
    await client.post(f"/billing/orders/{made[0]}/cancel")
    listed: list[str] = []
    cursor = ""
    while True:
        page = (await client.get(f"/billing/orders?limit=2{cursor}")).json
        listed += [order["id"] for order in page["items"]]
        if page["next_cursor"] is None:
            break
        cursor = f"&cursor={page['next_cursor']}"
    assert listed == made[::-1]
    cancelled = (await client.get("/billing/orders?state=cancelled")).json["items"]
    assert [order["id"] for order in cancelled] == made[:1]
    assert (await client.get("/billing/orders?state=lost")).status == 422


async def test_a_forged_cursor_is_malformed(bank: House) -> None:
    client = await bank.sign_up()
    for position in ("x", '["x"]', "[1e300]", "[-1]", "[18446744073709551615]", "[true, 1]"):
        cursor = base64.urlsafe_b64encode(position.encode()).decode()
        for path in ("/billing/orders", "/billing/ledger"):
            assert (await client.get(f"{path}?cursor={cursor}")).code == "malformed", position


async def test_a_pending_order_can_be_cancelled_and_a_paid_one_not(bank: House) -> None:
    client = await bank.sign_up()
    order, paid = await order_of(client), await order_of(client)
    await deliver(bank, report(paid))
    for _ in range(2):
        reply = await client.post(f"/billing/orders/{order['id']}/cancel")
        assert (reply.status, reply.json["state"]) == (200, "cancelled")
    reply = await client.post(f"/billing/orders/{paid['id']}/cancel")
    assert (reply.status, reply.code) == (409, "invalid_state")
    states = [(one["order_id"], one["state"]) for one in await told(client, "billing.order")]
    assert states == [(paid["id"], "paid"), (order["id"], "cancelled")]


async def test_an_unpaid_order_expires_once(open_bank: OpenBank) -> None:
    bank = await open_bank(billing={**SANDBOX, "order_ttl_s": 1, "expiry_interval_s": 0.2})
    client = await bank.sign_up()
    orders = [await order_of(client) for _ in range(3)]
    await deliver(bank, report(orders[0]))
    async with asyncio.timeout(10):
        while len(await told(client, "billing.order")) < 3:
            await asyncio.sleep(0.1)
    await asyncio.gather(*(bank.app[ORDERS].expire() for _ in range(3)))
    assert [await state_of(client, order) for order in orders] == ["paid", "expired", "expired"]
    assert sorted(one["state"] for one in await told(client, "billing.order")) == [
        "expired",
        "expired",
        "paid",
    ]


# Callbacks


async def test_a_succeeded_payment_credits_the_owner_and_says_so(bank: House) -> None:
    client = await bank.sign_up()
    order = await order_of(client)
    reply = await deliver(bank, report(order))
    assert (reply.status, reply.json) == (200, {"order_state": "paid"})
    assert await balance_of(client) == WELCOME + 5000
    assert (await client.get(f"/billing/orders/{order['id']}")).json["paid_at"] is not None
    entry = (await entries_of(client))[0]
    assert (entry["amount"], entry["balance_after"], entry["kind"], entry["reference"]) == (
        5000, WELCOME + 5000, "top_up", order["number"],
    )  # fmt: skip
    assert (await told(client, "billing.order"))[-1]["state"] == "paid"
    assert (await told(client, "billing.balance"))[-1] == {
        "balance": WELCOME + 5000, "amount": 5000, "currency": "CNY", "kind": "top_up",
    }  # fmt: skip
    await assert_sound(bank)


async def test_a_repeated_callback_gets_the_same_answer_and_no_second_credit(bank: House) -> None:
    client = await bank.sign_up()
    order = await order_of(client)
    body = report(order)
    replies = [await deliver(bank, body) for _ in range(3)] + [await deliver(bank, report(order))]
    assert [(reply.status, reply.json) for reply in replies] == [(200, {"order_state": "paid"})] * 4
    assert await balance_of(client) == WELCOME + 5000
    assert len(await told(client, "billing.order")) == 1
    kept = await bank.app[DATABASE].fetch(
        "SELECT body, deliveries FROM payment_events WHERE order_number = $1 ORDER BY deliveries DESC",
        order["number"],
    )
    assert [row["deliveries"] for row in kept] == [3, 1]
    assert kept[0]["body"] == body


async def test_a_failed_payment_leaves_the_order_to_be_paid(bank: House) -> None:
    client = await bank.sign_up()
    order = await order_of(client)
    assert (await deliver(bank, report(order, status="failed"))).json == {"order_state": "pending"}
    assert await state_of(client, order) == "pending"
    assert await balance_of(client) == WELCOME
    assert (await deliver(bank, report(order))).json == {"order_state": "paid"}
    assert (await deliver(bank, report(order, status="failed"))).json == {"order_state": "paid"}
    assert await balance_of(client) == WELCOME + 5000


async def test_a_callback_without_a_genuine_signature_is_refused(bank: House) -> None:
    client = await bank.sign_up()
    order = await order_of(client)
    body = report(order)
    genuine = signature(body)
    at, v1 = genuine.split(",")
    forged = [
        "",
        "nonsense",
        at,
        v1,
        f"{at},v1=",
        f"{at},v1={'0' * 64}",
        f"{at},v1={'é' * 64}",
        f"t=,{v1}",
        f"t={'9' * 5000},{v1}",
        f"t=-1,{v1}",
        f"t={int(at[2:]) + 1},{v1}",
        signature(body, secret="another"),
        signature(body, off_s=-310),
        signature(body, off_s=310),
        signature(body + b" "),
    ]
    for header in forged:
        reply = await deliver(bank, body, header)
        assert (reply.status, reply.code) == (401, "bad_signature"), header
    unsigned = await bank.anyone.post("/billing/payments/sandbox", data=body)
    assert unsigned.code == "bad_signature"
    assert await balance_of(client) == WELCOME
    assert await events_of(bank, order) == []
    for header in (signature(body, off_s=-290), signature(body, off_s=290), genuine):
        assert (await deliver(bank, body, header)).status == 200


async def test_a_signed_body_that_cannot_be_read_is_refused(bank: House) -> None:
    client = await bank.sign_up()
    order = await order_of(client)
    assert (await deliver(bank, b"{")).code == "malformed"
    assert (await deliver(bank, b"\xff\xfe")).code == "malformed"
    for wrong in (
        {"amount": 5000.0},
        {"amount": "5000"},
        {"amount": 10**30},
        {"status": "perhaps"},
        {"event_id": ""},
        {"event_id": "nul\0"},
        {"order_number": None},
    ):
        reply = await deliver(bank, report(order, **wrong))
        assert (reply.status, reply.code) == (422, "invalid"), wrong
    assert await balance_of(client) == WELCOME


async def test_a_payment_for_an_unknown_order_can_be_repeated_once_the_order_is_there(bank: House) -> None:
    admin, client = await administrator(bank), await bank.sign_up()
    order = await order_of(client)
    body = report(order)
    database = bank.app[DATABASE]
    await database.execute("UPDATE orders SET number = 'not yet' WHERE number = $1", order["number"])
    for _ in range(2):
        reply = await deliver(bank, body)
        assert (reply.status, reply.code) == (404, "unknown_order")
    assert [one["order_number"] for one in await complaints(admin)] == [order["number"]]
    await database.execute("UPDATE orders SET number = $1 WHERE number = 'not yet'", order["number"])
    assert (await deliver(bank, body)).json == {"order_state": "paid"}
    assert await balance_of(client) == WELCOME + 5000


async def test_a_payment_of_another_amount_or_currency_is_refused(bank: House) -> None:
    admin, client = await administrator(bank), await bank.sign_up()
    order = await order_of(client)
    changes: list[dict[str, Any]] = [
        {"amount": 4999},
        {"amount": 5001},
        {"amount": -5000},
        {"currency": "USD"},
    ]
    for number, change in enumerate(changes, 1):
        body = report(order, **change)
        for _ in range(2):
            reply = await deliver(bank, body)
            assert (reply.status, reply.code) == (422, "amount_mismatch")
        assert [one["order_number"] for one in await complaints(admin)] == [order["number"]] * number
    assert await state_of(client, order) == "pending"
    assert await balance_of(client) == WELCOME
    assert (await deliver(bank, report(order))).status == 200


async def test_a_payment_for_a_closed_order_is_set_aside_once(bank: House) -> None:
    admin, client = await administrator(bank), await bank.sign_up()
    order = await order_of(client)
    await client.post(f"/billing/orders/{order['id']}/cancel")
    body = report(order)
    for sent in (body, body, report(order)):
        reply = await deliver(bank, sent)
        assert (reply.status, reply.code) == (409, "order_closed")
    assert (await deliver(bank, report(order, status="failed"))).json == {"order_state": "cancelled"}
    assert await state_of(client, order) == "cancelled"
    assert await balance_of(client) == WELCOME
    assert len(await complaints(admin)) == 1
    assert len(await told(client, "billing.order")) == 2
    assert await booked(bank, "unapplied_payment", order) == {"unapplied": 5000, "clearing": -5000}
    assert await booked(bank, "top_up", order) == {}
    await assert_sound(bank)


async def test_an_unknown_provider_is_not_there(bank: House) -> None:
    body = b"{}"
    reply = await bank.anyone.post(
        "/billing/payments/nobody", data=body, headers={"X-Signature": signature(body)}
    )
    assert (reply.status, reply.code) == (404, "not_found")


async def test_a_storm_of_callbacks_credits_each_order_once(bank: House) -> None:
    clients = [await bank.sign_up() for _ in range(4)]
    orders = [await order_of(client, 100 + number) for number in range(5) for client in clients]
    storm = [report(order) for order in orders for _ in range(10)]
    storm += [body for order in orders for body in [report(order)] * 10]
    random.shuffle(storm)
    replies = await asyncio.gather(*(deliver(bank, body) for body in storm))
    assert {(reply.status, reply.body) for reply in replies} == {(200, b'{"order_state":"paid"}')}
    for client in clients:
        assert await balance_of(client) == WELCOME + sum(range(100, 105))
        assert [one["state"] for one in await told(client, "billing.order")] == ["paid"] * 5
    await assert_sound(bank)


async def test_a_callback_that_cannot_be_settled_does_not_spoil_the_others(open_bank: OpenBank) -> None:
    bank = await open_bank(billing=SANDBOX)
    client = await bank.sign_up()
    orders = [await order_of(client) for _ in range(5)]
    await bank.app[DATABASE].execute(
        "INSERT INTO ledger_entries (transaction_id, account_id, amount, kind, reference)"
        " SELECT t.id, a.id, CASE a.kind WHEN 'unapplied' THEN 1 ELSE -1 END, 'top_up', $1"
        " FROM (SELECT gen_random_uuid() AS id OFFSET 0) t, ledger_accounts a"
        " WHERE a.kind IN ('unapplied', 'clearing')",
        orders[2]["number"],
    )
    replies = await asyncio.gather(*(deliver(bank, report(order)) for order in orders))
    assert [reply.status for reply in replies] == [200, 200, 500, 200, 200]
    assert await balance_of(client) == WELCOME + 4 * 5000
    assert await state_of(client, orders[2]) == "pending"


# The ledger


async def test_entries_cannot_be_changed_or_deleted(bank: House) -> None:
    await bank.sign_up()
    database = bank.app[DATABASE]
    for statement in (
        "UPDATE ledger_entries SET amount = 1",
        "UPDATE ledger_entries SET reference = 'other' WHERE false",
        "DELETE FROM ledger_entries",
        "TRUNCATE ledger_entries",
    ):
        with pytest.raises(CheckViolation, match="never changed or deleted"):
            await database.execute(statement)
    await assert_sound(bank)


async def test_entries_that_do_not_sum_up_are_refused(bank: House) -> None:
    with pytest.raises(CheckViolation, match="sum up to zero"):
        await bank.app[DATABASE].execute(
            "INSERT INTO ledger_entries (transaction_id, account_id, amount, kind, reference)"
            " SELECT gen_random_uuid(), id, 5, 'gift', '' FROM ledger_accounts WHERE kind = 'revenue'"
        )


async def test_the_database_refuses_a_balance_below_zero(bank: House) -> None:
    await bank.sign_up()
    with pytest.raises(CheckViolation) as refused:
        await bank.app[DATABASE].execute("UPDATE ledger_accounts SET balance = -1 WHERE kind = 'user'")
    assert refused.value.constraint_name == "ledger_accounts_never_below_zero"


async def test_a_charge_takes_all_or_nothing(bank: House) -> None:
    client = await bank.sign_up()
    ledger, database = bank.app[LEDGER], bank.app[DATABASE]
    async with database.transaction() as tx:
        charged = await ledger.charge(tx, client.user["id"], 400, kind="device_time", reference="d")
    assert (charged.amount, charged.balance_after) == (400, 600)
    with pytest.raises(Problem, match="insufficient_balance"):
        async with database.transaction() as tx:
            await ledger.charge(tx, client.user["id"], 601, kind="device_time", reference="d")
    assert await balance_of(client) == 600
    entry = (await entries_of(client))[0]
    assert (entry["amount"], entry["balance_after"], entry["reference"]) == (-400, 600, "d")
    await assert_sound(bank)


async def test_a_refused_charge_leaves_its_transaction_usable(bank: House) -> None:
    client = await bank.sign_up()
    ledger = bank.app[LEDGER]
    async with bank.app[DATABASE].transaction() as tx:
        with pytest.raises(Problem):
            await ledger.charge(tx, client.user["id"], WELCOME + 1, kind="device_time", reference="d")
        await ledger.charge(tx, client.user["id"], 1, kind="device_time", reference="d")
    assert await balance_of(client) == WELCOME - 1


async def test_a_partial_charge_takes_what_there_is(bank: House) -> None:
    client = await bank.sign_up()
    ledger = bank.app[LEDGER]
    taken = []
    for amount in (900, 900, 900, 0):
        async with bank.app[DATABASE].transaction() as tx:
            charged = await ledger.charge(
                tx, client.user["id"], amount, kind="device_time", reference="d", partial=True
            )
            taken.append((charged.amount, charged.balance_after))
    assert taken == [(900, 100), (100, 0), (0, 0), (0, 0)]
    assert len(await entries_of(client)) == 3
    await assert_sound(bank)


async def test_charges_say_only_once_that_the_balance_is_spent(bank: House) -> None:
    client = await bank.sign_up()
    for amount in (100, 800, 10, 10, 70, 10, 5):
        async with bank.app[DATABASE].transaction() as tx:
            await bank.app[LEDGER].charge(
                tx, client.user["id"], amount, kind="device_time", reference="d", partial=True
            )
    heard = [(one["kind"], one["balance"]) for one in await told(client, "billing.balance")]
    assert heard == [("welcome_credit", WELCOME), ("spent", 0)]


async def test_many_charges_at_once_never_take_more_than_there_is(bank: House) -> None:
    client = await bank.sign_up()

    async def charge() -> bool:
        try:
            async with bank.app[DATABASE].transaction() as tx:
                await bank.app[LEDGER].charge(tx, client.user["id"], 300, kind="device_time", reference="d")
        except Problem:
            return False
        return True

    assert sum(await asyncio.gather(*(charge() for _ in range(50)))) == 3
    assert await balance_of(client) == WELCOME - 900
    await assert_sound(bank)


async def test_a_locked_balance_stands_still(bank: House) -> None:
    client = await bank.sign_up()
    order = await order_of(client)
    async with bank.app[DATABASE].transaction() as tx:
        assert await bank.app[LEDGER].lock_balance(tx, client.user["id"]) == WELCOME
        paying = asyncio.create_task(deliver(bank, report(order)))
        await asyncio.sleep(0.1)
        assert not paying.done()
        assert await bank.app[LEDGER].lock_balance(tx, client.user["id"]) == WELCOME
    assert (await paying).status == 200
    assert await balance_of(client) == WELCOME + 5000


async def test_a_user_without_an_account_gets_one_when_it_is_needed(open_bank: OpenBank) -> None:
    bank = await open_bank(billing={**SANDBOX, "welcome_credit": 0})
    locked, buyer, spender = [await bank.sign_up() for _ in range(3)]
    database, ledger = bank.app[DATABASE], bank.app[LEDGER]
    await database.execute("DELETE FROM ledger_accounts WHERE kind = 'user'")
    async with database.transaction() as tx:
        assert await ledger.lock_balance(tx, locked.user["id"]) == 0
    await deliver(bank, report(await order_of(buyer)))
    assert await balance_of(buyer) == 5000
    with pytest.raises(Problem, match="insufficient_balance"):
        async with database.transaction() as tx:
            await ledger.charge(tx, spender.user["id"], 1, kind="device_time", reference="d")
    await assert_sound(bank)


async def test_whatever_happens_the_ledger_stays_sound(open_bank: OpenBank) -> None:
    bank = await open_bank(billing=SANDBOX)
    chance = random.Random(7)
    clients = [await bank.sign_up() for _ in range(3)]
    expected = {client.user["id"]: WELCOME for client in clients}
    orders: list[tuple[Client, dict[str, Any], bytes]] = []
    paid: set[str] = set()
    closed: set[str] = set()
    for _ in range(120):
        client = chance.choice(clients)
        match chance.choice(["order", "pay", "pay", "repeat", "cancel", "charge", "charge"]):
            case "order":
                order = await order_of(client, chance.randint(1, 900))
                orders.append((client, order, report(order)))
            case "pay" | "repeat" if orders:
                owner, order, body = chance.choice(orders)
                await deliver(bank, chance.choice([body, report(order), report(order, status="failed")]))
                if await state_of(owner, order) == "paid" and order["id"] not in paid | closed:
                    paid.add(order["id"])
                    expected[owner.user["id"]] += order["amount"]
            case "cancel" if orders:
                owner, order, _ = chance.choice(orders)
                if (await owner.post(f"/billing/orders/{order['id']}/cancel")).status == 200:
                    closed.add(order["id"])
            case "charge":
                wish = chance.randint(1, 700)
                user_id = client.user["id"]
                async with bank.app[DATABASE].transaction() as tx:
                    charged = await bank.app[LEDGER].charge(
                        tx, user_id, wish, kind="device_time", reference="d", partial=True
                    )
                assert charged.amount == min(wish, expected[user_id])
                expected[user_id] -= charged.amount
    assert {client.user["id"]: await balance_of(client) for client in clients} == expected
    await assert_sound(bank)
    await bank.restart()
    assert {client.user["id"]: await balance_of(client) for client in clients} == expected


async def test_a_ledger_in_another_currency_stops_the_start(open_bank: OpenBank) -> None:
    bank = await open_bank(billing=SANDBOX)
    await bank.app[DATABASE].execute("UPDATE ledger_accounts SET currency = 'USD'")
    await bank.stop()
    with pytest.raises(PluginFault, match=r"billing\.currency is CNY, but this ledger is in USD"):
        await bank.start()


# The sandbox and the pages


async def test_paying_on_the_sandboxs_page_moves_the_balance(bank: House) -> None:
    client = await bank.sign_up()
    order = await order_of(client)
    page = f"//checkout/sandbox/{order['number']}"
    assert order["number"].encode() in (await bank.anyone.get(page)).body
    later = await client.post(page, data={"outcome": "later"})
    assert (later.status, later.headers["Location"]) == (303, f"/billing/orders/{order['id']}")
    await client.post(page, data={"outcome": "fail"})
    assert await state_of(client, order) == "pending"
    assert await events_of(bank, order) == ["failed"]
    for _ in range(2):
        assert (await client.post(page, data={"outcome": "pay"})).status == 303
    assert await state_of(client, order) == "paid"
    assert await balance_of(client) == WELCOME + 5000
    assert (await client.get(f"//billing/orders/{order['id']}")).status == 200


async def test_whoever_knows_the_number_can_pay_and_stays_on_the_sandboxs_page(bank: House) -> None:
    client = await bank.sign_up()
    order = await order_of(client)
    page = f"/checkout/sandbox/{order['number']}"
    for payer in (bank.anyone, await bank.sign_up()):
        reply = await payer.post(f"/{page}", data={"outcome": "pay"})
        assert (reply.status, reply.headers["Location"]) == (303, page)
    assert await state_of(client, order) == "paid"
    assert (await bank.anyone.get("//checkout/sandbox/CP0")).status == 404
    assert (await bank.anyone.post(f"/{page}", data={"outcome": "steal"})).status == 422


async def test_the_balance_page_takes_an_amount_as_it_is_written(bank: House) -> None:
    client = await bank.sign_up()
    reply = await client.post("//billing", data={"amount": "1,050.50"})
    assert reply.status == 303
    (order,) = (await client.get("/billing/orders")).json["items"]
    assert order["amount"] == 105050
    assert reply.headers["Location"] == f"/checkout/sandbox/{order['number']}"
    page = await client.get("//billing")
    assert f"/billing/orders/{order['id']}" in page.body.decode()
    assert "10.00" in page.body.decode()


async def test_an_amount_nobody_can_pay_shows_the_form_again(bank: House) -> None:
    client = await bank.sign_up()
    for typed in ("", "x", "-5", "0", "1.234", "NaN", "1e400", "9" * 40, "１２x", "<b>"):
        reply = await client.post("//billing", data={"amount": typed})
        assert reply.status == 422
        assert "Enter an amount between" in reply.body.decode()
    assert b"<b>" not in reply.body
    assert (await client.get("/billing/orders")).json["items"] == []


async def test_without_a_provider_nothing_can_be_ordered(open_bank: OpenBank) -> None:
    public = await open_bank(server={"host": "0.0.0.0"})
    client = await public.sign_up()
    reply = await client.post("/billing/orders", {"amount": 5000})
    assert (reply.status, reply.code) == (503, "unavailable")
    assert reply.json["detail"] == "No payment provider is configured on this server."
    assert (await client.get("//checkout/sandbox/CP0")).status == 404
    assert (await deliver(public, b"{}")).code == "not_found"
    page = await client.post("//billing", data={"amount": "5"})
    assert page.status == 503
    assert "No payment provider is configured" in page.body.decode()


async def test_a_server_behind_a_public_name_has_no_sandbox_by_itself(open_bank: OpenBank) -> None:
    public = await open_bank(server={"public_url": "https://phones.example.com"})
    client = await public.sign_up()
    assert (await client.post("/billing/orders", {"amount": 5000})).status == 503


async def test_links_lead_to_the_public_address(open_bank: OpenBank) -> None:
    public = await open_bank(server={"public_url": "https://phones.example.com"}, billing=SANDBOX)
    order = await order_of(await public.sign_up())
    assert order["checkout_url"] == f"https://phones.example.com/checkout/sandbox/{order['number']}"
