"""The balance page, the sandbox's page, and which servers have a sandbox."""

import pytest

from tests.house import House
from tests.paying import (
    SANDBOX,
    WELCOME,
    OpenBank,
    balance_of,
    deliver,
    events_of,
    order_of,
    state_of,
)
from tests.paying import bank as bank
from tests.paying import open_bank as open_bank

pytestmark = pytest.mark.asyncio(loop_scope="module")


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
