"""The books: usage, statements, the daily check and the overview, and how an older ledger comes along."""

import asyncio
import csv
import io
from datetime import UTC, date, datetime, timedelta
from uuid import UUID

import pytest

from plugins import notify, users
from plugins.billing.checks import CHECKS
from plugins.billing.schema import MIGRATIONS
from server.db import Database
from server.interfaces import DATABASE, LEDGER, Usage
from tests.house import Client, House
from tests.paying import (
    SANDBOX,
    WELCOME,
    OpenBank,
    administrator,
    assert_sound,
    deliver,
    order_of,
    report,
)
from tests.paying import bank as bank
from tests.paying import open_bank as open_bank
from tests.servers import Servers

pytestmark = pytest.mark.asyncio(loop_scope="module")


async def used(bank: House, client: Client, device: str, name: str, amount: int, days_ago: int = 0) -> None:
    """Charge for a phone, as if some days ago."""
    database = bank.app[DATABASE]
    async with database.transaction() as tx:
        await bank.app[LEDGER].charge(tx, [Usage(UUID(client.user["id"]), amount, device, name)])
        if days_ago:  # entries never change: only a test that owns its ledger may move them in time
            await tx.execute("ALTER TABLE ledger_entries DISABLE TRIGGER ledger_entries_are_final")
            await tx.execute(
                "UPDATE ledger_entries SET created_at = now() - make_interval(days => $1)"
                " WHERE created_at = now()",
                days_ago,
            )
            await tx.execute("ALTER TABLE ledger_entries ENABLE TRIGGER ledger_entries_are_final")


def today() -> date:
    """The database's day."""
    return datetime.now(UTC).date()


async def test_usage_is_summed_by_phone_and_day_for_its_owner_alone(open_bank: OpenBank) -> None:
    bank = await open_bank(billing=SANDBOX)
    ann, ben = await bank.sign_up(), await bank.sign_up()
    await used(bank, ann, "d1", "old name", 5, days_ago=3)
    await used(bank, ann, "d2", "tablet", 7, days_ago=3)
    await used(bank, ann, "d1", "old name", 11)
    await used(bank, ann, "d1", "new name", 13)
    await used(bank, ben, "d3", "bens", 100)
    report_of_ann = (await ann.get("/billing/usage")).json
    assert [(one["device_id"], one["name"], one["amount"]) for one in report_of_ann["items"]] == [
        ("d1", "new name", 24), ("d2", "tablet", 7), ("d1", "old name", 5),
    ]  # fmt: skip
    assert report_of_ann["total"] == 36
    assert report_of_ann["first_day"] == (today() - timedelta(days=29)).isoformat()
    that_day = today() - timedelta(days=3)
    some = (await ann.get(f"/billing/usage?from={that_day}&to={that_day}")).json
    assert [one["amount"] for one in some["items"]] == [7, 5]
    for wrong in ("from=x", "from=2026-01-02&to=2026-01-01", "from=2020-01-01&to=2026-01-01", "days=3"):
        assert (await ann.get(f"/billing/usage?{wrong}")).status == 422, wrong


async def test_a_statement_is_a_file_no_spreadsheet_takes_for_a_formula(open_bank: OpenBank) -> None:
    bank = await open_bank(billing=SANDBOX)
    client, other = await bank.sign_up(), await bank.sign_up()
    names = ['=HYPERLINK("http://evil")', "+1", "-1", "@SUM(A1)", "\tx", 'a "quoted", name\nnext', "ＡＢＣ"]
    for number, name in enumerate(names):
        await used(bank, client, f"d{number}", name, 1)
    await used(bank, other, "theirs", "theirs", 1)
    reply = await client.get("/billing/statement")
    assert reply.headers["Content-Type"].startswith("text/csv")
    assert "attachment" in reply.headers["Content-Disposition"]
    rows = list(csv.DictReader(io.StringIO(reply.body.decode())))
    assert [row["label"] for row in rows] == ["", *(f"'{name}" for name in names[:5]), *names[5:]]
    assert [row["amount"] for row in rows] == ["10.00"] + ["-0.01"] * len(names)
    assert rows[-1]["balance_after"] == f"{(WELCOME - len(names)) / 100:.2f}"
    assert "theirs" not in reply.body.decode()
    assert (await bank.anyone.get("/billing/statement")).status == 401


async def test_a_long_statement_comes_whole(open_bank: OpenBank) -> None:
    bank = await open_bank(billing={**SANDBOX, "welcome_credit": 5000})
    client = await bank.sign_up()
    usages = [Usage(UUID(client.user["id"]), 1, "d", "pixel")] * 2500
    async with bank.app[DATABASE].transaction() as tx:
        await bank.app[LEDGER].charge(tx, usages)
    rows = list(csv.DictReader(io.StringIO((await client.get("/billing/statement")).body.decode())))
    assert [row["balance_after"] for row in rows] == [f"{50 - n / 100:.2f}" for n in range(2501)]


async def test_the_overview_adds_up(open_bank: OpenBank) -> None:
    bank = await open_bank(billing=SANDBOX)
    admin, client = await administrator(bank), await bank.sign_up()
    for _ in range(2):
        await deliver(bank, report(await order_of(client)))
    late = await order_of(client, 300)
    await client.post(f"/billing/orders/{late['id']}/cancel")
    await deliver(bank, report(late))
    await deliver(bank, report(late, amount=1))
    await used(bank, client, "d", "pixel", 120)
    payment = (await admin.get("/billing/payments?state=credited")).json["items"][0]
    await admin.post(f"/billing/payments/{payment['id']}/refunds", {"amount": 50, "reason": "too much"})
    now = (await admin.get("/billing/overview")).json
    assert now["balances"] == 2 * WELCOME + 10000 - 120 - 50
    assert (now["revenue"], now["promotions"], now["unapplied"]) == (120, 2 * WELCOME, 300)
    assert now["clearing"] == 10300 - 50
    assert now["balances"] + now["revenue"] + now["unapplied"] == now["clearing"] + now["promotions"]
    assert (now["unapplied_payments"], now["misfit_callbacks"]) == (1, 1)
    assert now["providers"] == [{"provider": "sandbox", "payments": 3, "received": 10300, "refunded": 50}]
    assert now["refunded"] + now["refunds_open"] == 50
    assert [day["amount"] for day in now["revenue_by_day"]] == [0] * 29 + [120]
    assert now["last_check"]["sound"] is True


async def test_the_check_finds_what_cannot_be_and_alarms(open_bank: OpenBank) -> None:
    bank = await open_bank(billing=SANDBOX)
    admin, client = await administrator(bank), await bank.sign_up()
    order, other = await order_of(client), await order_of(client)
    await deliver(bank, report(order))
    await assert_sound(bank)
    database = bank.app[DATABASE]
    faults = {
        "wrong_balances": "UPDATE ledger_accounts SET balance = balance + 1 WHERE kind = 'revenue'",
        "paid_without_credit": "UPDATE orders SET state = 'paid', paid_at = now()"
        f" WHERE id = '{other['id']}'",
        "credit_without_order": "UPDATE orders SET state = 'expired', paid_at = NULL"
        f" WHERE id = '{order['id']}'",
        "clearing_difference": "UPDATE payments SET refunded = 7",
        "unapplied_difference": "UPDATE payments SET state = 'unapplied'",
    }
    for fault, statement in faults.items():
        await database.execute(statement)
        found = (await admin.post("/billing/checks")).json
        assert (found["sound"], fault in found["findings"]) == (False, True), fault
    assert found["findings"]["clearing_difference"] == -7
    assert found["findings"]["ledger_sum"] == 1
    assert (await admin.get("/billing/overview")).json["last_check"] == found
    alarms = [one["data"] for one in (await admin.get("/notifications?limit=100")).json["items"]]
    assert sum("findings" in data for data in alarms) == len(faults)
    metrics = (await bank.anyone.get("//metrics")).body.decode()
    assert f"cloudphone_ledger_findings {float(len(found['findings']))}" in metrics


async def test_the_check_runs_once_a_day_whatever_restarts(open_bank: OpenBank) -> None:
    bank = await open_bank(billing=SANDBOX)
    async with asyncio.timeout(10):
        while await bank.app[CHECKS].last() is None:
            await asyncio.sleep(0.01)
    await bank.app[CHECKS].run_if_due()
    await bank.restart()
    await bank.app[CHECKS].run_if_due()
    database = bank.app[DATABASE]
    assert await database.fetchval("SELECT count(*) FROM ledger_checks") == 1
    await database.execute("UPDATE ledger_checks SET at = at - interval '1 day'")
    await bank.app[CHECKS].run_if_due()
    assert await database.fetchval("SELECT count(*) FROM ledger_checks") == 2


async def test_a_ledger_of_the_first_version_comes_along(servers: Servers) -> None:
    sections = await servers.new_sections()
    url = str(sections["database"]["url"])
    database = await Database.open(url)
    try:
        await database.migrate("users", users.PLUGIN.migrations)
        await database.migrate("notify", notify.PLUGIN.migrations)
        await database.migrate("billing", MIGRATIONS[:1])
        await database.execute(
            """
            INSERT INTO users (id, email, email_folded, password_hash)
                VALUES ('00000000-0000-0000-0000-000000000001', 'a@b.cc', 'a@b.cc', 'x');
            INSERT INTO ledger_accounts (kind, user_id, currency, balance) VALUES
                ('user', '00000000-0000-0000-0000-000000000001', 'CNY', 70),
                ('revenue', NULL, 'CNY', NULL), ('clearing', NULL, 'CNY', NULL),
                ('unapplied', NULL, 'CNY', NULL);
            INSERT INTO orders (id, number, user_id, provider, amount, currency, state, expires_at, paid_at)
                SELECT gen_random_uuid(), number, '00000000-0000-0000-0000-000000000001', 'sandbox', amount,
                    'CNY', state, now(), CASE state WHEN 'paid' THEN now() END
                FROM (VALUES ('A', 100, 'paid'), ('B', 9, 'expired')) AS o (number, amount, state);
            INSERT INTO ledger_entries (transaction_id, account_id, amount, balance_after, kind, reference)
                SELECT t::uuid, a.id, e.amount, e.after, e.kind, e.reference FROM (VALUES
                    ('00000000-0000-0000-0000-00000000000a', 'clearing', -100, NULL, 'top_up', 'A'),
                    ('00000000-0000-0000-0000-00000000000a', 'user', 100, 100, 'top_up', 'A'),
                    ('00000000-0000-0000-0000-00000000000b', 'user', -30, 70, 'device_time', 'd'),
                    ('00000000-0000-0000-0000-00000000000b', 'revenue', 30, NULL, 'device_time', 'd'),
                    ('00000000-0000-0000-0000-00000000000c', 'unapplied', 9, NULL, 'unapplied_payment', 'B'),
                    ('00000000-0000-0000-0000-00000000000c', 'clearing', -9, NULL, 'unapplied_payment', 'B')
                ) AS e (t, account, amount, after, kind, reference)
                JOIN ledger_accounts a ON a.kind = e.account ORDER BY t;
            """
        )
        await database.migrate("billing", MIGRATIONS)
        balances = await database.fetch("SELECT kind, balance FROM ledger_accounts ORDER BY kind")
        assert {row["kind"]: row["balance"] for row in balances} == {
            "clearing": -109, "revenue": 30, "unapplied": 9, "user": 70,
        }  # fmt: skip
        clearing = await database.fetch(
            "SELECT balance_after FROM ledger_entries e JOIN ledger_accounts a ON a.id = e.account_id"
            " WHERE a.kind = 'clearing' ORDER BY position"
        )
        assert [row["balance_after"] for row in clearing] == [-100, -109]
        payments = await database.fetch(
            "SELECT o.number, p.state, p.amount FROM payments p JOIN orders o ON o.id = p.order_id"
        )
        assert {tuple(row) for row in payments} == {("A", "credited", 100), ("B", "unapplied", 9)}
    finally:
        await database.close()
        await servers.drop_database(url)
