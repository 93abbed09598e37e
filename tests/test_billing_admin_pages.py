"""Administrators' pages about money: the overview, what waits for a decision, one user's account."""

import asyncio
import html
import re
from decimal import Decimal

import pytest

from plugins.users.routes import USERS
from server.interfaces import DATABASE, SPENDING
from tests.house import Client, House, Reply
from tests.paying import (
    SANDBOX,
    OpenBank,
    administrator,
    assert_sound,
    balance_of,
    charge,
    deliver,
    entries_of,
    order_of,
    report,
    told,
)
from tests.paying import bank as bank
from tests.paying import open_bank as open_bank

pytestmark = pytest.mark.asyncio(loop_scope="module")

NASTY = """<script>alert(1)</script>"'&{{ 7*7 }}%s"""
OVERVIEW = "//admin/billing"
HTML = {"Accept": "text/html"}


async def admin_of(house: House) -> Client:
    """A new administrator, whose rights the server knows of."""
    client = await administrator(house)
    await house.app[USERS].notice_administrators()
    return client


async def html_of(client: Client, path: str, status: int = 200) -> str:
    """A page's HTML."""
    reply = await client.get(path, headers=HTML)
    assert reply.status == status, reply.body
    return reply.body.decode()


def text_of(page: str) -> str:
    """What a reader sees of a page."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def request_id_of(page: str) -> str:
    """What a page's forms carry so that they act once."""
    found = re.search(r'name="request_id" value="([^"]+)"', page)
    assert found
    return found[1]


async def paid(house: House, client: Client, amount: int = 5000) -> str:
    """A paid order's payment, by its id."""
    order = await order_of(client, amount)
    assert (await deliver(house, report(order))).status == 200
    return await payment_of(house, order["id"])


async def unapplied(house: House, client: Client, amount: int = 5000) -> str:
    """A payment that came after its order was cancelled, by its id."""
    order = await order_of(client, amount)
    await client.post(f"/billing/orders/{order['id']}/cancel")
    await deliver(house, report(order))
    return await payment_of(house, order["id"])


async def payment_of(house: House, order_id: str) -> str:
    """The id of an order's payment."""
    payment = await house.app[DATABASE].fetchval("SELECT id FROM payments WHERE order_id = $1", order_id)
    return str(payment)


async def state_of_payment(admin: Client, client: Client, payment: str) -> tuple[str, int]:
    """Where a payment is and how much of it went back."""
    items = (await admin.get(f"/billing/payments?user_id={client.user['id']}")).json["items"]
    (found,) = [one for one in items if one["id"] == payment]
    return found["state"], found["refunded"]


def account_of(client: Client) -> str:
    """The page of a user's money."""
    return f"{OVERVIEW}/users/{client.user['id']}"


def error_beside(reply: Reply, field: str) -> str:
    """What a page says beside a field that does not fit; the field's id may have its form before it."""
    found = re.findall(rf'id="f-[\w-]*?{field}-error" data-error-for="{field}">([^<]+)<', reply.body.decode())
    return html.unescape(found[0]) if found else ""


# Who may


async def test_pages_of_the_houses_money_are_for_administrators(bank: House) -> None:
    admin, user = await admin_of(bank), await bank.sign_up()
    payment = await unapplied(bank, user)
    gets = (OVERVIEW, account_of(user))
    posts = (
        f"{OVERVIEW}/check",
        f"{OVERVIEW}/payments/{payment}",
        f"{OVERVIEW}/payments/{payment}/refunds",
        f"{OVERVIEW}/callbacks/{payment}",
        f"{account_of(user)}/corrections",
    )
    form = {"action": "apply", "direction": "add", "amount": "5", "reason": "I want it"}
    for path in gets:
        assert (await user.get(path)).status == 403
        assert (await bank.anyone.get(path)).status == 401
        sent_on = await bank.anyone.get(path, headers=HTML)
        assert (sent_on.status, sent_on.headers["Location"]) == (303, f"/login?next={path[1:]}")
        assert (await admin.get(path)).status == 200
    for path in posts:
        assert (await user.post(path, data=form)).status == 403
        assert (await bank.anyone.post(path, data=form)).status == 401
    assert await state_of_payment(admin, user, payment) == ("unapplied", 0)
    assert len(await entries_of(user)) == 1


async def test_only_administrators_are_led_there(bank: House) -> None:
    admin, user = await admin_of(bank), await bank.sign_up()
    assert 'href="/admin/billing"' in await html_of(admin, "//billing")
    assert 'href="/admin/billing"' not in await html_of(user, "//billing")


async def test_what_is_not_there_is_not_found(bank: House) -> None:
    admin = await admin_of(bank)
    nobody = "00000000-0000-4000-8000-000000000000"
    form = {"action": "apply", "direction": "add", "amount": "5", "reason": "For nobody"}
    assert (await admin.get(f"{OVERVIEW}/users/{nobody}")).status == 404
    for path in (
        f"/users/{nobody}/corrections",
        f"/payments/{nobody}",
        f"/payments/{nobody}/refunds",
        f"/callbacks/{nobody}",
    ):
        assert (await admin.post(OVERVIEW + path, data=form)).status == 404


# The overview


async def test_the_overviews_figures_are_those_of_the_ledger(open_bank: OpenBank) -> None:
    house = await open_bank(billing=SANDBOX)
    admin, user = await admin_of(house), await house.sign_up()
    payment = await paid(house, user)
    await charge(house, user, 300)
    await unapplied(house, user, 700)
    form = {"amount": "10", "reason": "Asked for it"}
    assert (await admin.post(f"{OVERVIEW}/payments/{payment}/refunds", data=form)).status == 303
    await until_refunded(user)
    text = text_of(await html_of(admin, OVERVIEW))
    for figure in (
        "Users have CN¥57.00",  # twice 10.00 of welcome credit, 50.00 paid, 3.00 used, 10.00 given back
        "Earned CN¥3.00",
        "Paid in CN¥47.00",
        "Welcome credit CN¥20.00",
        "Waits for you CN¥7.00",
        "Given back CN¥10.00",
        "Earned in the last 30 days CN¥3.00",
        "Sandbox (no real money) 2 payments CN¥57.00 CN¥10.00",
    ):
        assert figure in text
    await assert_sound(house)


async def until_refunded(client: Client) -> None:
    """Wait for the news that a refund is done."""
    async with asyncio.timeout(10):
        while [data["kind"] for data in await told(client, "billing.balance")].count("refund") < 2:
            await asyncio.sleep(0.02)


async def test_a_check_is_asked_for_and_its_findings_are_told_in_words(open_bank: OpenBank) -> None:
    house = await open_bank(billing=SANDBOX)
    admin = await admin_of(house)
    reply = await admin.post(f"{OVERVIEW}/check")
    assert (reply.status, reply.headers["Location"]) == (303, "/admin/billing?done=checked")
    text = text_of(await html_of(admin, f"{OVERVIEW}?done=checked"))
    assert "The ledger was checked." in text
    assert "Yes: every sum was right at the last check." in text
    findings = {"ledger_sum": -125, "paid_without_credit": 2}
    await house.app[DATABASE].execute("INSERT INTO ledger_checks (findings) VALUES ($1)", findings)
    text = text_of(await html_of(admin, OVERVIEW))
    assert "No. The last check found what cannot be:" in text
    assert "What all accounts together differ from zero -CN¥1.25" in text
    assert "Paid orders without exactly one credit of their amount 2" in text


async def test_a_user_is_found_by_a_part_of_the_address(bank: House) -> None:
    admin = await admin_of(bank)
    user = await bank.sign_up("Wanted.Person@example.com")
    page = await html_of(admin, f"{OVERVIEW}?q=+wanted.pers+")
    assert f'href="/admin/billing/users/{user.user["id"]}"' in page
    assert admin.user["id"] not in page.partition("<main")[2]
    nobody = await admin.get(OVERVIEW, params={"q": NASTY}, headers=HTML)
    assert "No account has that in its address." in nobody.body.decode()
    assert b"<script>alert" not in nobody.body


async def test_a_callback_that_did_not_fit_is_shown_as_text_until_it_was_looked_at(bank: House) -> None:
    admin = await admin_of(bank)
    order = await order_of(await bank.sign_up())
    body = report(order, amount=1, event_id="evt_admin_pages", note=NASTY)
    assert (await deliver(bank, body)).status == 422
    page = await html_of(admin, OVERVIEW)
    assert "Its amount or currency is not the order" in page
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in page
    assert "<script>alert" not in page
    at = page.index(order["number"])
    found = re.search(r'action="(/admin/billing/callbacks/[\w-]+)"', page[at:])
    assert found
    for _ in range(2):
        reply = await admin.post(f"/{found[1]}")
        assert (reply.status, reply.headers["Location"]) == (303, "/admin/billing?done=reviewed")
    assert order["number"] not in await html_of(admin, OVERVIEW)


# Unapplied payments


async def test_an_unapplied_payment_is_added_to_the_balance_once(bank: House) -> None:
    admin, user = await admin_of(bank), await bank.sign_up()
    payment = await unapplied(bank, user)
    before = await balance_of(user)
    page = await html_of(admin, OVERVIEW)
    assert user.user["email"] in page
    path = f"{OVERVIEW}/payments/{payment}"
    assert f'action="{path[1:]}"' in page
    form = {"action": "apply", "reason": "It came late", "request_id": request_id_of(page)}
    replies = await asyncio.gather(*(admin.post(path, data=form) for _ in range(3)))
    assert sorted(reply.status for reply in replies) == [303, 409, 409]
    assert await balance_of(user) == before + 5000
    assert await state_of_payment(admin, user, payment) == ("credited", 0)
    assert f'action="{path[1:]}"' not in await html_of(admin, OVERVIEW)
    refused = next(reply for reply in replies if reply.status == 409)
    assert "Only an unapplied payment can be added to a balance." in refused.body.decode()
    stale = await admin.post(path, data=form | {"action": "return"})
    assert stale.status == 409
    assert "has been added to the balance already" in stale.body.decode()
    assert await balance_of(user) == before + 5000


async def test_an_unapplied_payment_is_given_back_once(bank: House) -> None:
    admin, user = await admin_of(bank), await bank.sign_up()
    payment = await unapplied(bank, user)
    before = await balance_of(user)
    path = f"{OVERVIEW}/payments/{payment}"
    form = {
        "action": "return",
        "reason": "Asked for it",
        "request_id": request_id_of(await html_of(admin, OVERVIEW)),
    }
    replies = await asyncio.gather(*(admin.post(path, data=form) for _ in range(3)))
    assert {(reply.status, reply.headers["Location"]) for reply in replies} == {
        (303, "/admin/billing?done=returned")
    }
    assert await state_of_payment(admin, user, payment) == ("returned", 5000)
    assert await balance_of(user) == before
    again = await admin.post(path, data=form | {"request_id": "of another page"})
    assert again.status == 409
    assert "That is more than is left of this payment." in again.body.decode()
    await assert_sound(bank)


async def test_nothing_is_decided_without_a_reason(bank: House) -> None:
    admin, user = await admin_of(bank), await bank.sign_up()
    payment = await unapplied(bank, user)
    for reason in ("", "  x  ", "x" * 301):
        reply = await admin.post(f"{OVERVIEW}/payments/{payment}", data={"action": "apply", "reason": reason})
        assert reply.status == 422
        assert "characters, please." in error_beside(reply, "reason")
    assert (await admin.post(f"{OVERVIEW}/payments/{payment}", data={"reason": "A reason"})).status == 422
    assert await state_of_payment(admin, user, payment) == ("unapplied", 0)


async def test_a_form_that_is_shown_again_does_not_lose_the_reader(bank: House) -> None:
    """The page of a refused form has an address of its own, which nothing but a form leads to."""
    admin, user = await admin_of(bank), await bank.sign_up()
    payment = await unapplied(bank, user)
    reply = await admin.post(f"{OVERVIEW}/payments/{payment}", data={"action": "apply", "reason": ""})
    assert 'name="next" value="/admin/billing"' in reply.body.decode()
    reply = await admin.post(f"{account_of(user)}/corrections", data={"reason": ""})
    assert f'name="next" value="{account_of(user)[1:]}"' in reply.body.decode()


# One user's account


async def test_a_users_page_shows_what_they_have_paid_and_spent(bank: House) -> None:
    admin, user = await admin_of(bank), await bank.sign_up()
    payment = await paid(bank, user)
    await order_of(user, 1234)
    await charge(bank, user, 250, NASTY)
    bank.app[SPENDING].append(lambda user_id: 100 if str(user_id) == user.user["id"] else 0)
    page = await html_of(admin, account_of(user))
    text = text_of(page)
    for words in (
        "Balance CN¥57.50 CN¥1.00 an hour goes out now. That lasts about 2 days 9 hr.",
        "CN¥12.34",
        "Waiting for payment",
        "-CN¥2.50",
        "+CN¥50.00",
        "Welcome credit",
        user.user["email"],
    ):
        assert words in text
    assert f"/admin/billing/payments/{payment}/refunds" in page
    assert "<script>alert" not in page
    assert "&lt;script&gt;alert(1)" in page


async def test_a_users_movements_and_payments_are_there_to_leaf_through(bank: House) -> None:
    admin, user = await admin_of(bank), await bank.sign_up()
    for amount in range(1, 13):
        await paid(bank, user, amount)
    for _ in range(10):
        await charge(bank, user, 1)
    seen: list[Decimal] = []
    address = account_of(user)
    while address:
        page = await html_of(admin, address)
        table = page.partition('aria-labelledby="entries"')[2].partition("</section>")[0]
        seen += [Decimal(one.replace("CN¥", "")) for one in re.findall(r"[+-]CN¥[\d.]+", table)]
        onward = re.search(r'href="([^"]+\?cursor=[^"]+)" rel="next"', page)
        address = f"/{onward[1]}" if onward else ""
    assert len(seen) == 23
    assert sum(seen) == Decimal(await balance_of(user)) / 100
    first = await html_of(admin, account_of(user))
    onward = re.search(r'href="([^"]+\?payments=[^"]+)" rel="next"', first)
    assert onward
    second = await html_of(admin, f"/{onward[1]}")
    forms = re.findall(r"/admin/billing/payments/([\w-]+)/refunds", first + second)
    assert len(forms) == len(set(forms)) == 12


async def test_a_balance_is_corrected_once_and_its_owner_reads_why(bank: House) -> None:
    admin, user = await admin_of(bank), await bank.sign_up()
    page = await html_of(admin, account_of(user))
    path = f"{account_of(user)}/corrections"
    form = {"direction": "add", "amount": "12.50", "reason": NASTY, "request_id": request_id_of(page)}
    replies = await asyncio.gather(*(admin.post(path, data=form) for _ in range(3)))
    assert {(reply.status, reply.headers["Location"]) for reply in replies} == {
        (303, f"{account_of(user)[1:]}?done=corrected")
    }
    assert await balance_of(user) == 2250
    assert (await admin.post(path, data=form | {"direction": "take", "amount": "1"})).status == 303
    assert await balance_of(user) == 2150
    for client, shown_on in ((user, "//billing/movements"), (admin, account_of(user))):
        shown = await html_of(client, shown_on)
        assert "<script>alert" not in shown
        assert "Correction : <script>alert(1)</script>" in text_of(shown)
        assert "-CN¥1.00" in shown
    assert "The user has been told." in await html_of(admin, f"{account_of(user)}?done=corrected")
    await assert_sound(bank)


async def test_a_correction_that_cannot_be_is_refused_beside_its_field(bank: House) -> None:
    admin, user = await admin_of(bank), await bank.sign_up()
    path = f"{account_of(user)}/corrections"
    form = {"direction": "add", "amount": "5", "reason": "A good reason"}
    for typed in ("", "0", "-5", "x", "1.234", "10,50", "9" * 20, "<b>"):
        reply = await admin.post(path, data=form | {"amount": typed})
        assert reply.status == 422
        assert error_beside(reply, "amount") == "Enter an amount above zero, such as 12.50."
        assert b"<b>" not in reply.body
    below = await admin.post(path, data=form | {"direction": "take", "amount": "10.01"})
    assert (below.status, error_beside(below, "amount")) == (402, "The user has less than that.")
    assert 'value="take" required checked' in below.body.decode()
    assert 'value="10.01"' in below.body.decode()
    assert (await admin.post(path, data=form | {"direction": "steal"})).status == 422
    assert "characters, please." in error_beside(await admin.post(path, data=form | {"reason": ""}), "reason")
    assert len(await entries_of(user)) == 1


async def test_a_payment_is_given_back_in_parts_and_never_beyond(bank: House) -> None:
    admin, user = await admin_of(bank), await bank.sign_up()
    payment = await paid(bank, user)
    path = f"{OVERVIEW}/payments/{payment}/refunds"
    page = await html_of(admin, account_of(user))
    assert "At most CN¥50.00." in page
    form = {"amount": "20", "reason": "Did not like it", "request_id": request_id_of(page)}
    replies = await asyncio.gather(*(admin.post(path, data=form) for _ in range(4)))
    assert {(reply.status, reply.headers["Location"]) for reply in replies} == {
        (303, f"{account_of(user)[1:]}?done=refunded")
    }
    assert await state_of_payment(admin, user, payment) == ("credited", 2000)
    assert await balance_of(user) == 4000
    beyond = await admin.post(path, data=form | {"amount": "30.01"})
    assert beyond.status == 409
    assert error_beside(beyond, "amount") == "That is more than is left of this payment."
    rest = form | {"amount": "30"}
    replies = await asyncio.gather(*(admin.post(path, data=rest) for _ in range(4)))
    assert {reply.status for reply in replies} == {303}
    assert await state_of_payment(admin, user, payment) == ("credited", 5000)
    assert await balance_of(user) == 1000
    text = text_of(await html_of(admin, account_of(user)))
    assert "CN¥50.00 given back" in text
    assert "Did not like it" in text
    await assert_sound(bank)


async def test_what_is_spent_is_not_given_back(bank: House) -> None:
    admin, user = await admin_of(bank), await bank.sign_up()
    payment = await paid(bank, user)
    await charge(bank, user, 5500)
    form = {"amount": "50", "reason": "Asked for it"}
    reply = await admin.post(f"{OVERVIEW}/payments/{payment}/refunds", data=form)
    assert reply.status == 402
    assert error_beside(reply, "amount") == "The user has spent more of it than that leaves."
    assert await state_of_payment(admin, user, payment) == ("credited", 0)


async def test_a_refused_refund_is_shown_whatever_page_its_payment_is_on(bank: House) -> None:
    admin, user = await admin_of(bank), await bank.sign_up()
    oldest = await paid(bank, user, 5000)
    for amount in range(1, 13):
        await paid(bank, user, amount)
    reply = await admin.post(
        f"{OVERVIEW}/payments/{oldest}/refunds", data={"amount": "51", "reason": "Asked for it"}
    )
    assert error_beside(reply, "amount") == "That is more than is left of this payment."


async def test_refunds_on_their_way_and_refused_ones_are_listed(bank: House) -> None:
    admin, user = await admin_of(bank), await bank.sign_up()
    payment = await paid(bank, user)
    rows = [("requested", "", None), ("refused", f"No: {NASTY}", "now"), ("done", "", "now")]
    for state, detail, settled in rows:
        await bank.app[DATABASE].execute(
            "INSERT INTO refunds (payment, id, amount, reason, state, detail, requested_by, settled_at,"
            " next_try_at) VALUES ($1, gen_random_uuid(), 1, $2, $3, $4, $5, $6::text::timestamptz,"
            " CASE WHEN $3 = 'requested' THEN 'infinity'::timestamptz END)",
            payment,
            f"reason of a {state} one",
            state,
            detail,
            admin.user["id"],
            settled,
        )
    page = await html_of(admin, OVERVIEW)
    for words in ("reason of a requested one", "On its way", "reason of a refused one", "Refused"):
        assert words in text_of(page)
    assert "reason of a done one" not in page
    assert "reason of a done one" in await html_of(admin, account_of(user))
    assert "The provider says: No: <script>alert(1)" in text_of(page)
    assert "<script>alert" not in page
