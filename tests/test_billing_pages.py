"""Users' pages about money: balance, top-up, checkout, usage, statements; and who has a sandbox."""

import asyncio
import csv
import html
import io
import re
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from uuid import UUID

import pytest

from server.interfaces import SPENDING
from tests.house import Client, House
from tests.paying import (
    SANDBOX,
    WELCOME,
    OpenBank,
    balance_of,
    charge,
    deliver,
    events_of,
    move_back,
    open_wallet,
    order_of,
    report,
    state_of,
)
from tests.paying import bank as bank
from tests.paying import open_bank as open_bank

pytestmark = pytest.mark.asyncio(loop_scope="module")

NASTY = """<script>alert(1)</script>"'&{{ 7*7 }}%s"""
FORMULA = "=cmd|' /C calc'!A0"
HTML = {"Accept": "text/html"}
OWN_PAGES = (
    "/billing",
    "/billing/orders",
    "/billing/movements",
    "/billing/usage",
    "/billing/statement",
)


@pytest.fixture
def wallet(bank: House) -> Iterator[None]:
    """A second provider."""
    close = open_wallet(bank)
    yield
    close()


async def page_of(client: Client, path: str, status: int = 200) -> str:
    """A page's HTML."""
    reply = await client.get(f"/{path}", headers=HTML)
    assert reply.status == status, reply.body
    return reply.body.decode()


def text_of(page: str) -> str:
    """What a reader sees of a page."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def rows_of(page: str) -> list[list[str]]:
    """The cells of a page's table rows, without its head."""
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", page, re.DOTALL)
    cells = [[text_of(cell) for cell in re.findall(r"<td[^>]*>(.*?)</td>", row, re.DOTALL)] for row in rows]
    return [row for row in cells if row]


def yuan(text: str) -> Decimal:
    """An amount as a page writes it."""
    return Decimal(text.replace("CN¥", "").replace(",", ""))


def request_id_of(page: str) -> str:
    """What a page's form carries so that it acts once."""
    found = re.search(r'name="request_id" value="([^"]+)"', page)
    assert found
    return found[1]


def today(days: int = 0) -> str:
    """A day near this one (UTC), as addresses have it."""
    return (datetime.now(UTC).date() + timedelta(days=days)).isoformat()


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


# Who sees what


@pytest.mark.parametrize("path", OWN_PAGES)
async def test_pages_about_money_are_for_who_is_signed_in(bank: House, path: str) -> None:
    assert (await bank.anyone.get(f"/{path}")).status == 401
    sent_on = await bank.anyone.get(f"/{path}", headers=HTML)
    assert (sent_on.status, sent_on.headers["Location"]) == (303, f"/login?next={path}")
    assert "Money" not in text_of(await page_of(await bank.sign_up(), path))


async def test_nobody_sees_what_another_has_and_spends(bank: House) -> None:
    owner, other = await bank.sign_up(), await bank.sign_up()
    await charge(bank, owner, 123, "A secret phone")
    order = await order_of(owner)
    assert "A secret phone" in await page_of(owner, "/billing/usage")
    for path in OWN_PAGES:
        page = await page_of(other, path)
        assert "A secret phone" not in page
        assert order["id"] not in page
    assert "A secret phone" not in (await other.get("/billing/statement")).body.decode()
    assert "A secret phone" not in (await other.get("/billing/usage")).body.decode()
    assert (await other.get(f"//billing/orders/{order['id']}")).status == 404
    assert (await other.post(f"//billing/orders/{order['id']}/cancel")).status == 404
    assert await state_of(owner, order) == "pending"


async def test_what_people_typed_is_text_on_every_page(bank: House) -> None:
    client = await bank.sign_up()
    await charge(bank, client, 5, NASTY)
    for path in OWN_PAGES:
        page = await page_of(client, path)
        assert "<script>alert" not in page
        assert (html.escape(NASTY, quote=False)[:20] in page) == (path != "/billing/orders")


# The balance's page


async def test_the_balance_page_says_how_long_the_balance_lasts(bank: House) -> None:
    client = await bank.sign_up()
    assert "Nothing that costs money is running." in await page_of(client, "/billing")
    user_id = UUID(client.user["id"])
    bank.app[SPENDING].append(lambda other: 20 if other == user_id else 0)
    text = text_of(await page_of(client, "/billing"))
    assert "You have CN¥10.00 You spend CN¥0.20 an hour now. That lasts about 2 days 2 hr." in text
    assert "Nothing that costs money is running." in await page_of(await bank.sign_up(), "/billing")


async def test_a_provider_is_chosen_where_there_is_more_than_one(bank: House, wallet: None) -> None:
    client = await bank.sign_up()
    page = await page_of(client, "/billing")
    assert re.findall(r'type="radio" name="provider" value="(\w+)"', page) == ["sandbox", "wallet"]
    reply = await client.post("//billing", data={"amount": "5", "provider": "wallet"})
    assert (reply.status, reply.headers["Location"][:17]) == (303, "/checkout/wallet/")
    refused = await client.post("//billing", data={"amount": "5", "provider": "nobody"})
    assert refused.status == 422
    beside = r'id="f-provider-error"[^>]*>This is no payment provider here.<'
    assert re.search(beside, refused.body.decode())


async def test_one_provider_is_no_choice(bank: House) -> None:
    assert 'name="provider"' not in await page_of(await bank.sign_up(), "/billing")


async def test_a_form_sent_twice_makes_one_order(bank: House) -> None:
    client = await bank.sign_up()
    form = {"amount": "5", "request_id": request_id_of(await page_of(client, "/billing"))}
    replies = await asyncio.gather(*(client.post("//billing", data=form) for _ in range(4)))
    assert {reply.status for reply in replies} == {303}
    assert len({reply.headers["Location"] for reply in replies}) == 1
    assert len((await client.get("/billing/orders")).json["items"]) == 1
    other_amount = await client.post("//billing", data=form | {"amount": "6"})
    assert other_amount.headers["Location"] != replies[0].headers["Location"]
    somebody_else = await (await bank.sign_up()).post("//billing", data=form)
    assert somebody_else.headers["Location"] != replies[0].headers["Location"]
    another_page = {"amount": "5", "request_id": request_id_of(await page_of(client, "/billing"))}
    await client.post("//billing", data=another_page)
    assert len((await client.get("/billing/orders")).json["items"]) == 3


# Orders and movements


async def test_all_orders_and_movements_are_there_to_leaf_through(bank: House) -> None:
    client = await bank.sign_up()
    orders = [await order_of(client, amount) for amount in (100, 200, 300)]
    for amount in (1, 2):
        await charge(bank, client, amount)
    for path, count in (("/billing/orders", 3), ("/billing/movements", 3)):
        seen: list[str] = []
        address = f"{path}?limit=1"
        while address:
            page = await page_of(client, address)
            seen += re.findall(r'data-order-id="([^"]+)"', page) or [
                row[1].split()[0] for row in rows_of(page)
            ]
            onward = re.search(r'href="([^"]+)" rel="next"', page)
            address = f"{onward[1]}&limit=1" if onward else ""
        assert len(seen) == len(set(seen)) == count
        if path == "/billing/orders":
            assert seen == [order["id"] for order in reversed(orders)]
        else:
            assert seen == ["-CN¥0.02", "-CN¥0.01", "+CN¥10.00"]


async def test_movements_are_named_in_words(bank: House) -> None:
    client = await bank.sign_up()
    order = await order_of(client)
    await deliver(bank, report(order))
    await charge(bank, client, 7, "Left phone")
    text = text_of(await page_of(client, "/billing/movements"))
    for words in ("Welcome credit", f"Top-up {order['number']}", "Phone time : Left phone"):
        assert words in text


async def test_an_order_is_given_up_without_any_script(bank: House) -> None:
    client = await bank.sign_up()
    order = await order_of(client)
    address = f"/billing/orders/{order['id']}"
    assert f'action="{address}/cancel" method="post"' in await page_of(client, address)
    for _ in range(2):
        reply = await client.post(f"/{address}/cancel")
        assert (reply.status, reply.headers["Location"]) == (303, address)
    assert await state_of(client, order) == "cancelled"
    paid = await order_of(client)
    await deliver(bank, report(paid))
    refused = await client.post(f"//billing/orders/{paid['id']}/cancel")
    assert refused.status == 409
    assert "Only an order that waits for its payment can be cancelled." in refused.body.decode()


async def test_an_order_waits_for_the_providers_word(bank: House) -> None:
    client = await bank.sign_up()
    order = await order_of(client)
    text = text_of(await page_of(client, f"/billing/orders/{order['id']}"))
    assert "we wait for the payment provider's word" in text


# Checkout


async def test_a_wallets_code_waits_for_its_payment_and_knows_where_to_go_on(
    bank: House, wallet: None
) -> None:
    client = await bank.sign_up()
    placed = await client.post("/billing/orders", {"amount": 700, "provider": "wallet"})
    order = placed.json
    checkout = f"/checkout/wallet/{order['number']}"
    for payer, then in (
        (client, f"/billing/orders/{order['id']}"),
        (await bank.sign_up(), checkout),
        (bank.anyone, checkout),
    ):
        assert 'data-checkout-state="pending"' in await page_of(payer, checkout)
        page = (await payer.post(f"/{checkout}")).body.decode()
        assert f'data-watch="{checkout}" data-then="{then}"' in page
        assert f'href="{then}">I have paid' in page
        assert 'src="data:image/svg+xml' in page
        assert "js/checkout.js" in page


async def test_a_strangers_checkout_says_that_the_money_arrived(bank: House) -> None:
    client = await bank.sign_up()
    order = await order_of(client)
    await deliver(bank, report(order))
    checkout = f"/checkout/sandbox/{order['number']}"
    page = await page_of(bank.anyone, checkout)
    assert 'data-checkout-state="paid"' in page
    assert "The money has arrived." in page
    assert "/billing/orders/" not in page
    assert f'href="/billing/orders/{order["id"]}"' in await page_of(client, checkout)


async def test_the_sandbox_says_that_it_is_one(bank: House) -> None:
    order = await order_of(await bank.sign_up())
    text = text_of(await page_of(bank.anyone, f"/checkout/sandbox/{order['number']}"))
    assert "No real money moves." in text
    assert "not real money" in text


# Usage and statements


async def test_usage_is_shown_by_day_and_phone_and_summed_up(bank: House) -> None:
    client = await bank.sign_up()
    await charge(bank, client, 30, "Left")
    await move_back(bank, client, 2)
    await charge(bank, client, 12, "Left")
    await charge(bank, client, 8, "Left")
    await charge(bank, client, 50, "Right")
    page = await page_of(client, f"/billing/usage?from={today(-2)}&to={today()}")
    found = [(row[1], yuan(row[2])) for row in rows_of(page)]
    assert found == [("Right", Decimal("0.50")), ("Left", Decimal("0.20")), ("Left", Decimal("0.30"))]
    text = text_of(page)
    assert "Right CN¥0.50 Left CN¥0.50" in text
    assert "CN¥1.00" in text
    assert "CN¥0.30" not in await page_of(client, f"/billing/usage?from={today(-1)}&to={today()}")
    balance_page = text_of(await page_of(client, "/billing"))
    assert "CN¥1.00 in the last 30 days" in balance_page


async def test_the_chart_stacks_what_its_table_says(bank: House) -> None:
    client = await bank.sign_up()
    await charge(bank, client, 30, "Small")
    await charge(bank, client, 90, "Large")
    page = await page_of(client, f"/billing/usage?from={today(-3)}&to={today()}")
    drawn = re.findall(r'<rect class="(c\d)" x="(\d+)" y="([\d.]+)" width="8" height="([\d.]+)"', page)
    assert drawn == [("c0", "31", "25.0", "75.0"), ("c1", "31", "0.0", "25.0")]
    assert 'viewBox="0 0 40 100"' in page
    assert 'role="img" aria-label=' in page


async def test_phones_beyond_the_colours_share_one(bank: House) -> None:
    client = await bank.sign_up()
    for number in range(7):
        await charge(bank, client, 10 + number, f"Phone {number}")
    text = text_of(await page_of(client, "/billing"))
    assert "Phone 2 CN¥0.12 Other phones CN¥0.21" in text
    every_one = text_of(await page_of(client, "/billing/usage"))
    assert "Phone 2 CN¥0.12 Phone 1 CN¥0.11 Phone 0 CN¥0.10" in every_one


async def test_a_period_that_is_none_is_refused_beside_its_form(bank: House) -> None:
    client = await bank.sign_up()
    for path in ("/billing/usage", "/billing/statement"):
        wrong = await page_of(client, f"{path}?from=nonsense&to={today()}", 422)
        assert re.search(r'id="f-from-error"[^>]*>This does not fit here.<', wrong)
        assert 'value="nonsense"' in wrong
        turned = await page_of(client, f"{path}?from={today()}&to={today(-1)}", 422)
        assert "A period has 1 to 366 days." in turned
        for edge in ("?from=9999-12-30", "?to=0001-01-02", "?from=&to=", f"?from={today(-365)}&to={today()}"):
            await page_of(client, path + edge)


async def test_a_statement_adds_up(bank: House) -> None:
    client = await bank.sign_up()
    await charge(bank, client, 100, "Left")
    await move_back(bank, client, 3)
    await deliver(bank, report(await order_of(client)))
    for amount in (1, 2, 4):
        await charge(bank, client, amount, "Left")
    await charge(bank, client, 8, "Right")
    await move_back(bank, client, 3)
    await charge(bank, client, 16, "Left")
    page = await page_of(client, f"/billing/statement?from={today(-3)}&to={today(-1)}")
    opening, *lines, closing = [yuan(row[1]) for row in rows_of(page)]
    assert (opening, lines, closing) == (
        Decimal("9.00"),
        [Decimal("50.00"), Decimal("-0.07"), Decimal("-0.08")],
        Decimal("58.85"),
    )
    assert opening + sum(lines) == closing
    assert client.user["email"] in page
    assert f"/api/v1/billing/statement?from={today(-3)}&amp;to={today(-1)}" in page
    whole = [yuan(row[1]) for row in rows_of(await page_of(client, "/billing/statement"))]
    assert sum(whole[:-1]) == whole[-1] == Decimal(await balance_of(client)) / 100


async def test_a_statement_for_a_spreadsheet_holds_no_formula(bank: House) -> None:
    client = await bank.sign_up()
    for name in (FORMULA, "+1", "-1", "@SUM(A1)", 'plain, "quoted"'):
        await charge(bank, client, 1, name)
    reply = await client.get("/billing/statement")
    assert reply.headers["Content-Type"].startswith("text/csv")
    head, *rows = csv.reader(io.StringIO(reply.body.decode()))
    labels = [row[head.index("label")] for row in rows]
    assert labels == ["", f"'{FORMULA}", "'+1", "'-1", "'@SUM(A1)", 'plain, "quoted"']
    amounts = [Decimal(row[head.index("amount")]) for row in rows]
    assert sum(amounts) == Decimal(await balance_of(client)) / 100
