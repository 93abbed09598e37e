"""Paying in a browser: a wallet's page that goes on by itself, and forms that ask before they act."""

from uuid import UUID

from playwright.async_api import expect

from server.interfaces import DATABASE, SPENDING
from tests.browser.conftest import Visitor
from tests.conftest import Open
from tests.house import PASSWORD
from tests.paying import PLUGINS, SANDBOX, charge, open_wallet, order_of, state_of


async def test_a_wallets_page_goes_on_when_the_order_is_paid(open_house: Open, visitor: Visitor) -> None:
    house = await open_house(PLUGINS, billing=SANDBOX)
    open_wallet(house)
    owner = await house.sign_up()
    order = (await owner.post("/billing/orders", {"amount": 700, "provider": "wallet"})).json
    page = await visitor.context.new_page()
    await page.goto(order["checkout_url"])
    await page.get_by_role("button", name="Pay with Wallet").click()
    await expect(page.get_by_text("This page goes on by itself.")).to_be_visible()
    await expect(page.get_by_alt_text("QR code of the payment")).to_be_visible()
    await house.app[DATABASE].execute(
        "UPDATE orders SET state = 'paid', paid_at = now() WHERE id = $1", UUID(order["id"])
    )
    await expect(page.get_by_text("The money has arrived.")).to_be_visible()
    assert visitor.complaints == []


async def test_the_balance_follows_and_an_order_is_cancelled_once_that_is_confirmed(
    open_house: Open, visitor: Visitor
) -> None:
    house = await open_house(PLUGINS, billing=SANDBOX)
    owner = await house.sign_up("owner@example.com")
    page = await visitor.context.new_page()
    await page.clock.install()
    await page.goto(f"{house.url}/login?next=/billing")
    await page.get_by_label("E-mail").fill("owner@example.com")
    await page.get_by_label("Password").fill(PASSWORD)
    await page.get_by_role("main").get_by_role("button").first.click()
    await expect(page.get_by_text("Nothing that costs money is running.")).to_be_visible()
    await charge(house, owner, 250)
    house.app[SPENDING].append(lambda user_id: 20)
    await page.clock.fast_forward(31_000)
    await expect(page.locator("[data-spending]")).to_have_text(
        "You spend CN¥0.20 an hour now. That lasts about 1 day 13 hr."
    )
    await expect(page.locator("main [data-balance]")).to_have_text("CN¥7.50")

    order = await order_of(owner)
    await page.goto(f"{house.url}/billing/orders/{order['id']}")
    await page.get_by_role("button", name="Cancel the order").first.click()
    await page.get_by_role("button", name="Keep as it is").click()
    assert await state_of(owner, order) == "pending"
    await page.get_by_role("button", name="Cancel the order").first.click()
    await page.locator("dialog [data-yes]").click()
    await expect(page.get_by_text("You cancelled this order.")).to_be_visible()
    assert await state_of(owner, order) == "cancelled"
    assert visitor.complaints == []
