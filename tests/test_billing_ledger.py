"""The ledger: what users have, what they are charged, and what always holds of it."""

import asyncio
import random
from typing import Any
from uuid import UUID

import pytest

from server.db import CheckViolation
from server.interfaces import DATABASE, LEDGER, SPENDING, Charged, Usage
from server.plugin import PluginFault
from tests.house import Client, House
from tests.paying import (
    SANDBOX,
    WELCOME,
    OpenBank,
    assert_sound,
    balance_of,
    deliver,
    entries_of,
    order_of,
    report,
    state_of,
    told,
)
from tests.paying import bank as bank
from tests.paying import open_bank as open_bank

pytestmark = pytest.mark.asyncio(loop_scope="module")


# Welcome credit


async def test_a_new_account_has_the_welcome_credit(bank: House) -> None:
    client = await bank.sign_up()
    assert (await client.get("/billing/balance")).json == {
        "balance": WELCOME, "currency": "CNY", "spending_per_hour": 0, "lasts_s": None,
    }  # fmt: skip
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


async def test_the_balance_says_how_long_it_lasts_at_the_present_rate(open_bank: OpenBank) -> None:
    bank = await open_bank(billing=SANDBOX)
    client = await bank.sign_up()
    bank.app[SPENDING].append(lambda user_id: 7 if user_id == UUID(client.user["id"]) else 0)
    bank.app[SPENDING].append(lambda user_id: 1)
    now = (await client.get("/billing/balance")).json
    assert (now["spending_per_hour"], now["lasts_s"]) == (8, WELCOME * 3600 // 8)


# Entries and charges


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
            "INSERT INTO ledger_entries (transaction_id, account_id, amount, balance_after, kind, reference)"
            " SELECT gen_random_uuid(), id, 5, 5, 'gift', '' FROM ledger_accounts WHERE kind = 'revenue'"
        )


async def test_the_database_refuses_a_balance_below_zero(bank: House) -> None:
    await bank.sign_up()
    with pytest.raises(CheckViolation) as refused:
        await bank.app[DATABASE].execute("UPDATE ledger_accounts SET balance = -1 WHERE kind = 'user'")
    assert refused.value.constraint_name == "ledger_accounts_never_below_zero"


async def charge(bank: House, client: Client, *amounts: int, label: str = "pixel") -> list[Charged]:
    """Take these amounts from somebody's balance, all at once."""
    usages = [Usage(UUID(client.user["id"]), amount, "d", label) for amount in amounts]
    async with bank.app[DATABASE].transaction() as tx:
        return await bank.app[LEDGER].charge(tx, usages)


async def test_a_charge_takes_what_there_is(bank: House) -> None:
    client = await bank.sign_up()
    assert await charge(bank, client, 900) == [Charged(900, 100)]
    entry = (await entries_of(client))[0]
    assert (entry["amount"], entry["balance_after"]) == (-900, 100)
    assert (entry["kind"], entry["reference"], entry["label"]) == ("device_time", "d", "pixel")
    assert [await charge(bank, client, amount) for amount in (900, 900, 0)] == [
        [Charged(100, 0)], [Charged(0, 0)], [Charged(0, 0)],
    ]  # fmt: skip
    assert len(await entries_of(client)) == 3
    await assert_sound(bank)


async def test_charges_for_many_things_at_once_go_down_to_nothing_in_order(bank: House) -> None:
    ann, ben = await bank.sign_up(), await bank.sign_up()
    wishes = [(ann, 400), (ben, 1), (ann, 700), (ann, 5), (ben, 0), (ben, 2)]
    usages = [Usage(UUID(who.user["id"]), amount, f"d{n}", "") for n, (who, amount) in enumerate(wishes)]
    async with bank.app[DATABASE].transaction() as tx:
        charged = await bank.app[LEDGER].charge(tx, usages)
    assert charged == [
        Charged(400, 600), Charged(1, WELCOME - 1), Charged(600, 0), Charged(0, 0),
        Charged(0, WELCOME - 1), Charged(2, WELCOME - 3),
    ]  # fmt: skip
    assert [entry["amount"] for entry in await entries_of(ann)] == [-600, -400, WELCOME]
    assert [entry["balance_after"] for entry in await entries_of(ann)] == [0, 600, WELCOME]
    assert [one["kind"] for one in await told(ann, "billing.balance")] == ["welcome_credit", "spent"]
    assert [one["kind"] for one in await told(ben, "billing.balance")] == ["welcome_credit"]
    await assert_sound(bank)


async def test_a_charge_never_gives(bank: House) -> None:
    client = await bank.sign_up()
    with pytest.raises(ValueError, match="does not give"):
        await charge(bank, client, -1)
    assert await balance_of(client) == WELCOME


async def test_charges_say_only_once_that_the_balance_is_spent(bank: House) -> None:
    client = await bank.sign_up()
    for amount in (100, 800, 10, 10, 70, 10, 5):
        await charge(bank, client, amount)
    heard = [(one["kind"], one["balance"]) for one in await told(client, "billing.balance")]
    assert heard == [("welcome_credit", WELCOME), ("spent", 0)]


async def test_many_charges_at_once_never_take_more_than_there_is(bank: House) -> None:
    client = await bank.sign_up()
    charged = await asyncio.gather(*(charge(bank, client, 300) for _ in range(50)))
    taken = sorted((one.amount for (one,) in charged), reverse=True)
    assert taken == [300, 300, 300, 100] + [0] * 46
    assert await balance_of(client) == 0
    await assert_sound(bank)


async def test_those_who_share_an_account_of_the_house_never_wait_in_a_circle(bank: House) -> None:
    clients = [await bank.sign_up() for _ in range(4)]
    orders = [await order_of(client, 10) for client in clients for _ in range(5)]

    async def charge_some(start: int) -> None:
        ordered = clients[start:] + clients[:start]
        usages = [Usage(UUID(client.user["id"]), 1, "d", "") for client in ordered]
        async with bank.app[DATABASE].transaction() as tx:
            await bank.app[LEDGER].charge(tx, usages)

    await asyncio.gather(
        *(charge_some(number % 4) for number in range(40)),
        *(deliver(bank, report(order)) for order in orders),
    )
    assert [await balance_of(client) for client in clients] == [WELCOME + 50 - 40] * 4
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
    assert await charge(bank, spender, 1) == [Charged(0, 0)]
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
                (charged,) = await charge(bank, client, wish)
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
