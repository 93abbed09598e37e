"""The janitor: a payment whose callback was lost is found all the same."""

import asyncio
import json
from typing import Any
from uuid import uuid4

import pytest

from plugins.billing.janitor import JANITOR
from plugins.billing.orders import ORDERS
from server.interfaces import DATABASE
from tests.house import Client, House
from tests.paying import (
    SANDBOX,
    WELCOME,
    OpenBank,
    assert_sound,
    balance_of,
    booked,
    state_of,
    told,
)
from tests.paying import bank as bank
from tests.paying import open_bank as open_bank
from tests.standin_provider import StandinProvider, install

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def opened(bank: House, client: Client, provider: StandinProvider) -> dict[str, Any]:
    """An order whose payment has begun."""
    order = (await client.post("/billing/orders", {"amount": 5000, "provider": provider.name})).json
    page = await client.post("//" + order["checkout_url"].removeprefix(bank.url).lstrip("/"))
    assert (page.status, f"pay.example.com/{order['number']}" in page.body.decode()) == (200, True)
    return dict(order)


async def later(bank: House, order: dict[str, Any], seconds: float) -> None:
    """Let time pass for one order, then let the janitor ask."""
    await bank.app[DATABASE].execute(
        "UPDATE orders SET created_at = created_at - make_interval(secs => $2),"
        " expires_at = expires_at - make_interval(secs => $2),"
        " next_ask_at = next_ask_at - make_interval(secs => $2) WHERE number = $1",
        order["number"],
        seconds,
    )
    await bank.app[JANITOR].ask()


async def test_a_provider_is_asked_after_one_five_and_thirty_minutes_and_when_the_order_is_over(
    open_bank: OpenBank,
) -> None:
    bank = await open_bank(billing={**SANDBOX, "order_ttl_s": 7200})
    provider = install(bank)
    client = await bank.sign_up()
    order = await opened(bank, client, provider)
    asked = []
    minutes_passed = 0.0
    for minutes in (0.9, 1.1, 4.9, 5.2, 29, 31, 119, 121):
        seconds = 60 * (minutes - minutes_passed)
        minutes_passed = minutes
        await later(bank, order, seconds)
        asked.append((minutes, len(provider.queried)))
    assert asked == [(0.9, 0), (1.1, 1), (4.9, 1), (5.2, 2), (29, 2), (31, 3), (119, 3), (121, 4)]
    assert provider.closed == [order["number"]], "what is over cannot be paid any more"
    await bank.app[ORDERS].expire()
    assert await state_of(client, order) == "expired"
    await later(bank, order, 90000)
    assert len(provider.queried) == 4


async def test_a_payment_whose_callback_was_lost_is_credited_once(bank: House) -> None:
    provider, client = install(bank), await bank.sign_up()
    order = await opened(bank, client, provider)
    provider.paid[order["number"]] = "p1"
    await asyncio.gather(*(later(bank, order, 61) for _ in range(5)))
    assert await state_of(client, order) == "paid"
    assert await balance_of(client) == WELCOME + 5000
    body = f'{{"event_id":"{order["id"]}","order_number":"{order["number"]}","amount":5000,"currency":"CNY"'
    late = await bank.anyone.post(
        "/billing/payments/standin",
        data=body + ',"status":"succeeded","payment_id":"p1"}',
        headers={"X-Standin": "genuine"},
    )
    assert (late.status, late.body) == (200, b"got paid"), "answered in the provider's own words"
    assert await balance_of(client) == WELCOME + 5000
    assert provider.queried.count(order["number"]) == 1
    await assert_sound(bank)


async def test_an_order_that_nobody_began_to_pay_is_not_asked_about(bank: House) -> None:
    provider, client = install(bank), await bank.sign_up()
    order = (await client.post("/billing/orders", {"amount": 5000, "provider": provider.name})).json
    await later(bank, order, 2000)
    await bank.app[ORDERS].expire()
    assert order["number"] not in provider.queried
    assert await state_of(client, order) == "expired"


async def test_the_sweep_waits_for_the_last_question_but_not_for_long(bank: House) -> None:
    provider, client = install(bank), await bank.sign_up()
    order = await opened(bank, client, provider)
    await later(bank, order, 850)
    provider.paid[order["number"]] = "p1"
    await bank.app[DATABASE].execute(
        "UPDATE orders SET expires_at = now() - interval '1 second',"
        " next_ask_at = now() - interval '1 second' WHERE number = $1",
        order["number"],
    )
    await bank.app[ORDERS].expire()
    assert await state_of(client, order) == "pending", "its provider was not asked yet"
    await bank.app[JANITOR].ask()
    assert await state_of(client, order) == "paid"
    forgotten = await opened(bank, client, provider)
    await bank.app[DATABASE].execute(
        "UPDATE orders SET expires_at = now() - interval '61 seconds',"
        " next_ask_at = now() - interval '61 seconds' WHERE number = $1",
        forgotten["number"],
    )
    await bank.app[ORDERS].expire()
    assert await state_of(client, forgotten) == "expired"


async def test_a_provider_that_is_away_is_asked_again_and_what_it_says_then_is_set_aside(bank: House) -> None:
    provider, client = install(bank), await bank.sign_up()
    order = await opened(bank, client, provider)
    other = await opened(bank, client, provider)
    provider.is_away = True
    for _ in range(2):
        await later(bank, order, 901)
    await bank.app[ORDERS].expire()
    assert await state_of(client, order) == "expired"
    provider.is_away = False
    provider.paid[order["number"]] = "p1"
    await later(bank, order, 3601)
    assert await state_of(client, order) == "expired"
    assert await balance_of(client) == WELCOME
    assert await booked(bank, "unapplied_payment", order) == {"unapplied": 5000, "clearing": -5000}
    assert other["number"] not in provider.queried
    await assert_sound(bank)


async def test_a_cancelled_order_is_closed_at_its_provider(bank: House) -> None:
    provider, client = install(bank), await bank.sign_up()
    order = await opened(bank, client, provider)
    assert (await client.post(f"/billing/orders/{order['id']}/cancel")).status == 200
    await bank.app[JANITOR].ask()
    assert provider.closed.count(order["number"]) == 1
    page = await client.post(f"//checkout/standin/{order['number']}")
    assert page.status == 409
    provider.paid[order["number"]] = "slipped-through"
    await later(bank, order, 901)
    assert await booked(bank, "unapplied_payment", order) == {"unapplied": 5000, "clearing": -5000}


async def test_a_provider_that_is_away_says_so_and_the_order_stays(bank: House) -> None:
    provider, client = install(bank), await bank.sign_up()
    provider.is_away = True
    order = (await client.post("/billing/orders", {"amount": 5000, "provider": provider.name})).json
    assert (await client.post(f"//checkout/standin/{order['number']}")).status == 503
    provider.is_away = False
    assert (await client.post(f"//checkout/standin/{order['number']}")).status == 200
    assert await state_of(client, order) == "pending"


async def test_a_second_payment_of_a_paid_order_is_set_aside(bank: House) -> None:
    provider, client = install(bank), await bank.sign_up()
    order = await opened(bank, client, provider)
    for payment_id in ("p1", "p2", "p1", "p2"):
        event = {
            **order,
            "event_id": f"{payment_id} of {order['id']}".replace(" ", "_"),
            "order_number": order["number"],
            "status": "succeeded",
        }
        found = json.dumps(event | {"payment_id": payment_id})
        reply = await bank.anyone.post(
            "/billing/payments/standin", data=found, headers={"X-Standin": "genuine"}
        )
        assert reply.body == b"got paid"
    assert await balance_of(client) == WELCOME + 5000
    assert await booked(bank, "unapplied_payment", order) == {"unapplied": 5000, "clearing": -5000}
    titles = [one["title"] for one in (await client.get("/notifications?limit=100")).json["items"]]
    assert sum("was paid twice" in title for title in titles) == 1
    assert len(await told(client, "billing.order")) == 2
    await assert_sound(bank)


async def test_of_two_payments_at_the_same_moment_one_is_credited(bank: House) -> None:
    provider, client = install(bank), await bank.sign_up()
    order = await opened(bank, client, provider)

    async def pay(payment_id: str) -> None:
        event = {**order, "event_id": uuid4().hex, "order_number": order["number"], "status": "succeeded"}
        reply = await bank.anyone.post(
            "/billing/payments/standin",
            data=json.dumps(event | {"payment_id": payment_id}),
            headers={"X-Standin": "genuine"},
        )
        assert reply.body == b"got paid"

    await asyncio.gather(*(pay(payment_id) for payment_id in ("p1", "p2") * 8))
    assert await balance_of(client) == WELCOME + 5000
    assert await booked(bank, "unapplied_payment", order) == {"unapplied": 5000, "clearing": -5000}
    await assert_sound(bank)


async def test_what_was_paid_on_the_sandboxs_page_counts_though_its_callback_fails(
    open_bank: OpenBank,
) -> None:
    bank = await open_bank(billing=SANDBOX)
    client = await bank.sign_up()
    order = (await client.post("/billing/orders", {"amount": 5000})).json
    real_url, bank.url = bank.url, "http://127.0.0.1:9"  # where callbacks go nobody listens
    path = f"//checkout/sandbox/{order['number']}"
    page = await bank.http.post(f"{real_url}{path[1:]}", data={"outcome": "pay"})
    bank.url = real_url
    assert page.status == 503
    assert await state_of(client, order) == "pending"
    await later(bank, order, 61)
    assert await state_of(client, order) == "paid"
    assert await balance_of(client) == WELCOME + 5000
    await assert_sound(bank)


async def test_only_open_providers_take_orders(bank: House) -> None:
    install(bank)
    client = await bank.sign_up()
    assert (await client.get("/billing/providers")).json == {
        "items": [
            {"name": "sandbox", "title": "Sandbox (no real money)"},
            {"name": "standin", "title": "Stand-in"},
        ]
    }
    reply = await client.post("/billing/orders", {"amount": 5000, "provider": "stripe"})
    assert (reply.status, reply.json["errors"][0]["field"]) == (422, "provider")
    assert (await bank.anyone.post("/billing/payments/stripe", data=b"{}")).status == 404
