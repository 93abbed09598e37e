"""Orders: how users ask to top up, and what becomes of an order nobody pays."""

import asyncio
import base64
import re
from typing import Any
from uuid import uuid4

import pytest

from plugins.billing.model import NewOrder
from plugins.billing.orders import ORDERS
from tests.house import House
from tests.paying import (
    SANDBOX,
    OpenBank,
    deliver,
    order_of,
    report,
    state_of,
    told,
)
from tests.paying import bank as bank
from tests.paying import open_bank as open_bank

pytestmark = pytest.mark.asyncio(loop_scope="module")


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
    again = await caller.create(who, NewOrder(amount=5000), order["id"], "")
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
