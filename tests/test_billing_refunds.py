"""What administrators do with money: unapplied payments, refunds, corrections, callbacks that did not fit."""

import asyncio
from collections.abc import AsyncIterator
from typing import Any
from uuid import UUID, uuid4

import pytest
import pytest_asyncio

from plugins.billing.corrections import CORRECTIONS, NewCorrection
from plugins.billing.refunds import REFUNDS
from server.interfaces import DATABASE
from tests.house import Client, House, Reply
from tests.paying import (
    SANDBOX,
    WELCOME,
    OpenBank,
    administrator,
    assert_sound,
    balance_of,
    booked,
    deliver,
    entries_of,
    order_of,
    report,
    signature,
    told,
)
from tests.paying import bank as bank
from tests.paying import open_bank as open_bank
from tests.standin_provider import StandinProvider, install

pytestmark = pytest.mark.asyncio(loop_scope="module")

WHY = {"reason": "they asked for it"}


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def admin(bank: House) -> AsyncIterator[Client]:
    """An administrator of the file's bank."""
    yield await administrator(bank)


async def paid_by(bank: House, client: Client, amount: int = 5000) -> dict[str, Any]:
    """A payment that is in somebody's balance, as administrators see it."""
    order = await order_of(client, amount)
    assert (await deliver(bank, report(order))).status == 200
    return order


async def payment_of(admin: Client, client: Client) -> dict[str, Any]:
    """Somebody's newest payment."""
    path = f"/billing/payments?user_id={client.user['id']}"
    return dict((await admin.get(path)).json["items"][0])


async def late_payment(bank: House, admin: Client, client: Client) -> dict[str, Any]:
    """A payment that came for a cancelled order."""
    order = await order_of(client)
    await client.post(f"/billing/orders/{order['id']}/cancel")
    assert (await deliver(bank, report(order))).code == "order_closed"
    return await payment_of(admin, client)


async def give_back(admin: Client, payment: dict[str, Any], amount: int, **more: Any) -> Reply:
    """Ask for a refund."""
    return await admin.post(f"/billing/payments/{payment['id']}/refunds", {"amount": amount, **WHY}, **more)


async def paid_at(bank: House, client: Client, provider: StandinProvider) -> None:
    """Have a payment at the stand-in."""
    order = (await client.post("/billing/orders", {"amount": 5000, "provider": provider.name})).json
    body = report(order, payment_id=f"pay-{order['number']}")
    headers = {"X-Standin": "genuine"}
    await bank.anyone.post("/billing/payments/standin", data=body, headers=headers)


async def refund_state(admin: Client, refund_id: str) -> str:
    """How far a refund is."""
    items = (await admin.get("/billing/refunds?limit=100")).json["items"]
    return str(next(item["state"] for item in items if item["id"] == refund_id))


async def carried_out(bank: House) -> None:
    """Let everything that waits for its provider be asked for now."""
    await bank.app[DATABASE].execute("UPDATE refunds SET next_try_at = now() WHERE state = 'requested'")
    await bank.app[REFUNDS].carry_out()


# Unapplied payments


async def test_an_unapplied_payment_is_seen_and_added_once(bank: House, admin: Client) -> None:
    client = await bank.sign_up()
    payment = await late_payment(bank, admin, client)
    assert (payment["state"], payment["reason"], payment["amount"]) == ("unapplied", "order_closed", 5000)
    assert (payment["email"], payment["user_id"]) == (client.user["email"], client.user["id"])
    waiting = (await admin.get("/billing/payments?state=unapplied")).json["items"]
    assert payment["id"] in [one["id"] for one in waiting]
    replies = await asyncio.gather(
        *(admin.post(f"/billing/payments/{payment['id']}/apply", WHY) for _ in range(5))
    )
    assert sorted(reply.status for reply in replies) == [200, 409, 409, 409, 409]
    assert await balance_of(client) == WELCOME + 5000
    assert (await entries_of(client))[0]["kind"] == "applied_payment"
    assert (await payment_of(admin, client))["state"] == "credited"
    assert (await told(client, "billing.balance"))[-1]["kind"] == "applied_payment"
    audit = (await admin.get(f"/audit?target={payment['id']}")).json["items"]
    assert [(one["action"], one["actor_id"]) for one in audit] == [
        ("billing.apply_payment", admin.user["id"])
    ]
    assert audit[0]["after"]["reason"] == WHY["reason"]
    await assert_sound(bank)


async def test_an_unapplied_payment_goes_back_whole(bank: House, admin: Client) -> None:
    client = await bank.sign_up()
    payment = await late_payment(bank, admin, client)
    assert (await give_back(admin, payment, 4999)).code == "invalid_state"
    refund = await give_back(admin, payment, 5000)
    assert refund.status == 201
    assert (await give_back(admin, payment, 5000)).code == "invalid_state"
    assert (await admin.post(f"/billing/payments/{payment['id']}/apply", WHY)).code == "invalid_state"
    await carried_out(bank)
    assert await refund_state(admin, refund.json["id"]) == "done"
    assert await balance_of(client) == WELCOME
    assert (await payment_of(admin, client))["state"] == "returned"
    await assert_sound(bank)


# Refunds


async def test_never_more_goes_back_than_was_paid(bank: House, admin: Client) -> None:
    client = await bank.sign_up()
    await paid_by(bank, client)
    payment = await payment_of(admin, client)
    assert (await give_back(admin, payment, 5001)).code == "invalid_state"
    replies = await asyncio.gather(*(give_back(admin, payment, 2000) for _ in range(5)))
    assert sorted(reply.status for reply in replies) == [201, 201, 409, 409, 409]
    assert (await give_back(admin, payment, 1000)).status == 201
    assert (await give_back(admin, payment, 1)).code == "invalid_state"
    assert await balance_of(client) == WELCOME
    await carried_out(bank)
    assert (await payment_of(admin, client))["refunded"] == 5000
    kinds = [entry["kind"] for entry in await entries_of(client)]
    assert kinds == ["refund", "refund", "refund", "top_up", "welcome_credit"]
    await assert_sound(bank)


async def test_what_a_user_has_spent_cannot_go_back(bank: House, admin: Client) -> None:
    client = await bank.sign_up()
    await paid_by(bank, client)
    correction = {"amount": -(WELCOME + 1), "reason": "used up elsewhere"}
    assert (await admin.post(f"/billing/users/{client.user['id']}/corrections", correction)).status == 201
    payment = await payment_of(admin, client)
    refused = await give_back(admin, payment, 5000)
    assert (refused.status, refused.code) == (402, "insufficient_balance")
    assert (await payment_of(admin, client))["refunded"] == 0
    assert (await give_back(admin, payment, 4999)).status == 201
    assert await balance_of(client) == 0


async def test_a_refund_is_told_audited_and_done_once_for_one_key(bank: House, admin: Client) -> None:
    client = await bank.sign_up()
    await paid_by(bank, client)
    payment = await payment_of(admin, client)
    key = {"Idempotency-Key": uuid4().hex}
    first, again = [await give_back(admin, payment, 2000, headers=key) for _ in range(2)]
    assert (first.status, again.body) == (201, first.body)
    assert await balance_of(client) == WELCOME + 3000
    await carried_out(bank)
    await carried_out(bank)
    titles = [one["title"] for one in (await client.get("/notifications?limit=100")).json["items"]]
    assert sum("goes back to you" in title for title in titles) == 1
    assert sum("were returned" in title for title in titles) == 1
    bodies = [one["body"] for one in (await client.get("/notifications?limit=100")).json["items"]]
    assert any(WHY["reason"] in body for body in bodies)
    audit = (await admin.get(f"/audit?target={payment['id']}")).json["items"]
    assert [one["action"] for one in audit] == ["billing.refund"]
    assert audit[0]["after"] == {
        "refunded": 2000, "order": payment["order_number"], "reason": WHY["reason"],
    }  # fmt: skip


async def test_a_refund_waits_for_its_provider_and_asks_under_one_id(bank: House, admin: Client) -> None:
    provider, client = install(bank), await bank.sign_up()
    await paid_at(bank, client, provider)
    provider.is_away = True
    refund = (await give_back(admin, await payment_of(admin, client), 3000)).json
    await carried_out(bank)
    assert (await refund_state(admin, refund["id"]), provider.refunds) == ("requested", {})
    provider.is_away, provider.is_slow = False, True
    await carried_out(bank)
    assert await refund_state(admin, refund["id"]) == "requested", "under way is not done"
    provider.is_slow = False
    await asyncio.gather(carried_out(bank), carried_out(bank))
    assert await refund_state(admin, refund["id"]) == "done"
    assert provider.refunds == {refund["id"]: 3000}
    assert await balance_of(client) == WELCOME + 2000
    await assert_sound(bank)


async def test_a_refused_refund_puts_the_money_back(bank: House, admin: Client) -> None:
    provider, client = install(bank), await bank.sign_up()
    await paid_at(bank, client, provider)
    provider.refusal = "the card is closed"
    refund = (await give_back(admin, await payment_of(admin, client), 5000)).json
    assert await balance_of(client) == WELCOME
    await carried_out(bank)
    await carried_out(bank)
    assert await balance_of(client) == WELCOME + 5000
    assert await refund_state(admin, refund["id"]) == "refused"
    assert (await payment_of(admin, client))["refunded"] == 0
    heard = (await admin.get("/notifications?limit=100")).json["items"]
    assert any("standin says: the card is closed" in one["body"] for one in heard)
    provider.refusal = ""
    assert (await give_back(admin, await payment_of(admin, client), 5000)).status == 201
    await carried_out(bank)
    assert await balance_of(client) == WELCOME
    await assert_sound(bank)


async def test_a_refused_refund_of_an_unapplied_payment_leaves_it_unapplied(
    bank: House, admin: Client
) -> None:
    provider, client = install(bank), await bank.sign_up()
    await paid_at(bank, client, provider)
    order = (await client.get("/billing/orders?limit=1")).json["items"][0]
    again = report(order, payment_id="second")
    await bank.anyone.post("/billing/payments/standin", data=again, headers={"X-Standin": "genuine"})
    payment = await payment_of(admin, client)
    assert (payment["state"], payment["reason"]) == ("unapplied", "paid_twice")
    provider.refusal = "no"
    assert (await give_back(admin, payment, 5000)).status == 201
    await carried_out(bank)
    assert (await payment_of(admin, client))["state"] == "unapplied"
    assert await booked(bank, "refund_refused", order) == {"unapplied": 5000, "clearing": -5000}
    await assert_sound(bank)


# Corrections


async def test_a_correction_is_booked_told_and_audited(bank: House, admin: Client) -> None:
    client = await bank.sign_up()
    path = f"/billing/users/{client.user['id']}/corrections"
    key = {"Idempotency-Key": uuid4().hex}
    for _ in range(2):
        given = await admin.post(path, {"amount": 250, "reason": "sorry for yesterday"}, headers=key)
    assert given.status == 201
    taken = await admin.post(path, {"amount": -1250, "reason": "given to the wrong one"})
    assert (taken.json["amount"], taken.json["balance_after"], taken.json["kind"]) == (
        -1250, 0, "correction",
    )  # fmt: skip
    entries = [(one["amount"], one["label"]) for one in await entries_of(client)]
    assert entries[:2] == [(-1250, "given to the wrong one"), (250, "sorry for yesterday")]
    refused = await admin.post(path, {"amount": -1, "reason": "one too many"})
    assert (refused.status, refused.code) == (402, "insufficient_balance")
    audit = (await admin.get(f"/audit?target={client.user['id']}&action=billing.correct")).json["items"]
    assert [one["after"]["balance"] for one in audit] == [0, WELCOME + 250]
    bodies = [one["body"] for one in (await client.get("/notifications?limit=100")).json["items"]]
    assert "2.50 CNY were added. Reason: sorry for yesterday" in bodies
    assert (await admin.post(f"/billing/users/{uuid4()}/corrections", {"amount": 1, **WHY})).status == 404
    await assert_sound(bank)


async def test_a_correction_made_twice_under_one_id_is_one(bank: House, admin: Client) -> None:
    client = await bank.sign_up()
    who: Any = type("Caller", (), {"user_id": UUID(admin.user["id"])})
    wish, correction_id = NewCorrection(amount=5, reason="a crash came between"), uuid4()
    made = [
        await bank.app[CORRECTIONS].make(who, UUID(client.user["id"]), wish, correction_id, "")
        for _ in range(2)
    ]
    assert made[0] == made[1]
    assert await balance_of(client) == WELCOME + 5


@pytest.mark.parametrize(
    "amount", ["0", "1.5", "1e3", '"5"', "true", "null", "1000000000001", str(2**63), "NaN", "-1000000000001"]
)
async def test_an_amount_that_is_none_moves_nothing(bank: House, admin: Client, amount: str) -> None:
    client = await bank.sign_up()
    await paid_by(bank, client)
    payment = await payment_of(admin, client)
    body = f'{{"amount": {amount}, "reason": "no good reason"}}'
    headers = {"Content-Type": "application/json"}
    for path in (
        f"/billing/users/{client.user['id']}/corrections",
        f"/billing/payments/{payment['id']}/refunds",
    ):
        reply = await admin.call("POST", path, data=body, headers=headers)
        assert reply.status in {400, 409, 422}, path
    assert await balance_of(client) == WELCOME + 5000


async def test_money_moves_for_a_reason(bank: House, admin: Client) -> None:
    client = await bank.sign_up()
    for reason in ("", "  ", "x" * 301, 5, None):
        reply = await admin.post(
            f"/billing/users/{client.user['id']}/corrections", {"amount": 1, "reason": reason}
        )
        assert reply.status == 422, reason
    assert await balance_of(client) == WELCOME


# Callbacks that did not fit


async def test_administrators_see_what_did_not_fit_until_they_have_looked(bank: House, admin: Client) -> None:
    client = await bank.sign_up()
    order = await order_of(client)
    wrong = report(order, amount=4999)
    await deliver(bank, wrong)
    await deliver(bank, wrong)
    unknown = report({**order, "number": f"CP{uuid4().hex}"})
    await deliver(bank, unknown)
    unreadable = b'{"event_id": "<b>1</b>", "amount": 5.5}' + uuid4().hex.encode()
    assert (await deliver(bank, unreadable)).status in {400, 422}
    seen = {one["body"]: one for one in (await admin.get("/billing/callbacks?limit=100")).json["items"]}
    found = [seen[body.decode()] for body in (wrong, unknown, unreadable)]
    assert [(one["misfit"], one["deliveries"]) for one in found] == [
        ("amount_mismatch", 2), ("unknown_order", 1), ("unreadable", 1),
    ]  # fmt: skip
    for one in found:
        assert (await admin.post(f"/billing/callbacks/{one['id']}/review")).status == 204
    left = {one["id"] for one in (await admin.get("/billing/callbacks?limit=100")).json["items"]}
    assert left.isdisjoint(one["id"] for one in found)
    everything = (await admin.get("/billing/callbacks?limit=100&reviewed=true")).json["items"]
    assert {one["id"] for one in found} <= {one["id"] for one in everything}
    assert (await admin.post(f"/billing/callbacks/{uuid4()}/review")).status == 404


async def test_an_unreadable_callback_is_kept_and_told_once(bank: House, admin: Client) -> None:
    body = b'{"event_id": "' + uuid4().hex.encode() + b'", "amount": "5000"}'
    for _ in range(3):
        assert (await deliver(bank, body)).status == 422
    kept = await bank.app[DATABASE].fetch("SELECT deliveries FROM payment_events WHERE body = $1", body)
    assert [row["deliveries"] for row in kept] == [3]
    assert (await deliver(bank, body, signature(body, secret="another"))).status == 401


async def test_callbacks_that_did_not_fit_come_by_page(open_bank: OpenBank) -> None:
    bank = await open_bank(billing=SANDBOX)
    admin, client = await administrator(bank), await bank.sign_up()
    order = await order_of(client)
    for number in range(5):
        await deliver(bank, report(order, amount=number + 1))
    amounts: list[int] = []
    path = "/billing/callbacks?limit=2"
    while path:
        page = (await admin.get(path)).json
        amounts += [one["amount"] for one in page["items"]]
        path = f"/billing/callbacks?limit=2&cursor={page['next_cursor']}" if page["next_cursor"] else ""
    assert amounts == [5, 4, 3, 2, 1]


# Who may


async def test_only_administrators_may(bank: House, admin: Client) -> None:
    client = await bank.sign_up()
    payment = await late_payment(bank, admin, client)
    user = client.user["id"]
    asked = [
        ("GET", "/billing/overview", None),
        ("POST", "/billing/checks", None),
        ("GET", "/billing/payments", None),
        ("POST", f"/billing/payments/{payment['id']}/apply", WHY),
        ("POST", f"/billing/payments/{payment['id']}/refunds", {"amount": 1, **WHY}),
        ("GET", "/billing/refunds", None),
        ("GET", "/billing/callbacks", None),
        ("POST", f"/billing/callbacks/{uuid4()}/review", None),
        ("GET", f"/billing/users/{user}/balance", None),
        ("GET", f"/billing/users/{user}/ledger", None),
        ("POST", f"/billing/users/{user}/corrections", {"amount": 1, **WHY}),
    ]
    for method, path, body in asked:
        assert (await client.call(method, path, json=body)).status == 403, path
        assert (await bank.anyone.call(method, path, json=body)).status == 401, path
    assert await balance_of(client) == WELCOME


async def test_administrators_read_any_users_ledger(bank: House, admin: Client) -> None:
    client = await bank.sign_up()
    await paid_by(bank, client)
    path = f"/billing/users/{client.user['id']}"
    assert (await admin.get(f"{path}/balance")).json["balance"] == WELCOME + 5000
    assert (await admin.get(f"{path}/ledger")).json["items"] == await entries_of(client)
    for what in ("balance", "ledger"):
        assert (await admin.get(f"/billing/users/{uuid4()}/{what}")).status == 404
