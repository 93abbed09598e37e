"""Payments: what a payment provider's callbacks may do."""

import asyncio
import random
from typing import Any

import pytest

from server.interfaces import DATABASE
from tests.house import House
from tests.paying import (
    SANDBOX,
    WELCOME,
    OpenBank,
    administrator,
    assert_sound,
    balance_of,
    booked,
    complaints,
    deliver,
    entries_of,
    events_of,
    order_of,
    report,
    signature,
    state_of,
    told,
)
from tests.paying import bank as bank
from tests.paying import open_bank as open_bank

pytestmark = pytest.mark.asyncio(loop_scope="module")


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


async def forged_count(bank: House) -> float:
    """What the alarm counter says."""
    lines = (await bank.anyone.get("//metrics")).body.decode().splitlines()
    name = 'cloudphone_payment_callbacks_forged_total{provider="sandbox"} '
    return sum(float(line.removeprefix(name)) for line in lines if line.startswith(name))


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
    before = await forged_count(bank)
    for header in forged:
        reply = await deliver(bank, body, header)
        assert (reply.status, reply.code) == (401, "bad_signature"), header
    assert await forged_count(bank) == before + len(forged)
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
        "INSERT INTO ledger_entries (transaction_id, account_id, amount, balance_after, kind, reference)"
        " SELECT t.id, a.id, CASE a.kind WHEN 'unapplied' THEN 1 ELSE -1 END, 0, 'top_up', $1"
        " FROM (SELECT gen_random_uuid() AS id OFFSET 0) t, ledger_accounts a"
        " WHERE a.kind IN ('unapplied', 'clearing')",
        orders[2]["number"],
    )
    replies = await asyncio.gather(*(deliver(bank, report(order)) for order in orders))
    assert [reply.status for reply in replies] == [200, 200, 500, 200, 200]
    assert await balance_of(client) == WELCOME + 4 * 5000
    assert await state_of(client, orders[2]) == "pending"
    assert await events_of(bank, orders[2]) == ["succeeded"], "kept although nothing could follow"


async def test_a_callback_that_is_taken_leaves_a_row_and_no_line_in_the_log(
    bank: House, caplog: pytest.LogCaptureFixture
) -> None:
    client = await bank.sign_up()
    order = await order_of(client)
    body = report(order)
    with caplog.at_level("INFO", logger="cloudphone"):
        assert (await deliver(bank, body, "forged")).status == 401
        assert (await deliver(bank, body)).status == 200
        assert (await client.post(f"/billing/orders/{order['id']}/cancel")).status == 409
    lines = [vars(record) for record in caplog.records if record.message == "request"]
    assert [(line["path"].rpartition("/")[2], line["status"]) for line in lines] == [
        ("sandbox", 401),
        ("cancel", 409),
    ]
    assert await events_of(bank, order) == ["succeeded"]
