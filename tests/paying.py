"""What tests of money do again and again."""

import hashlib
import hmac
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, cast
from uuid import NAMESPACE_OID, UUID, uuid4, uuid5

import pytest
import pytest_asyncio

from plugins import billing, notify, users
from plugins.billing.checks import CHECKS
from plugins.billing.ledger import ACCOUNTS
from plugins.billing.providers import PROVIDERS, Checkout, Payable, Provider
from plugins.users.routes import USERS
from server.db import Database
from server.interfaces import DATABASE, LEDGER, Usage
from tests.house import Client, House, Reply
from tests.servers import Servers

SECRET = "a secret of the tests"
PLUGINS = (users.PLUGIN, notify.PLUGIN, billing.PLUGIN)
SANDBOX: dict[str, object] = {"providers": {"sandbox": {"secret": SECRET}}}
WELCOME = 1000

OpenBank = Callable[..., Awaitable[House]]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bank(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[House]:
    """A server without phones, whose sandbox signs with SECRET; the tests of this file share it."""
    house = await House.open(
        servers, tmp_path_factory.mktemp("bank") / "house", {"billing": SANDBOX}, PLUGINS
    )
    yield house
    await house.close()


@pytest_asyncio.fixture(loop_scope="module")
async def open_bank(servers: Servers, tmp_path: Path) -> AsyncIterator[OpenBank]:
    """Start servers of one's own: `await open_bank(billing={"min_order": 100})`."""
    houses: list[House] = []

    async def open_one(**sections: dict[str, object]) -> House:
        house = await House.open(servers, tmp_path / f"house{len(houses)}", sections, PLUGINS)
        houses.append(house)
        return house

    yield open_one
    for house in houses:
        await house.close()


def signature(body: bytes, *, secret: str = SECRET, off_s: float = 0) -> str:
    """The header of a callback signed `off_s` from now."""
    at = str(int(time.time() + off_s))
    return f"t={at},v1={hmac.new(secret.encode(), at.encode() + b'.' + body, hashlib.sha256).hexdigest()}"


def report(order: dict[str, Any], **changes: object) -> bytes:
    """A callback's body: the order's payment succeeded."""
    event = {
        "event_id": uuid4().hex,
        "order_number": order["number"],
        "amount": order["amount"],
        "currency": order["currency"],
        "status": "succeeded",
        "occurred_at": "2030-01-01T00:00:00Z",
    }
    return json.dumps({**event, **changes}).encode()


async def deliver(house: House, body: bytes, header: str | None = None) -> Reply:
    """Send a callback, signed unless another header is given."""
    headers = {"X-Signature": signature(body) if header is None else header}
    return await house.anyone.post("/billing/payments/sandbox", data=body, headers=headers)


async def order_of(client: Client, amount: int = 5000) -> dict[str, Any]:
    """A new order."""
    reply = await client.post("/billing/orders", {"amount": amount})
    assert reply.status == 201, reply.body
    return dict(reply.json)


async def state_of(client: Client, order: dict[str, Any]) -> str:
    """Where an order is."""
    return str((await client.get(f"/billing/orders/{order['id']}")).json["state"])


async def balance_of(client: Client) -> int:
    """What somebody has."""
    return int((await client.get("/billing/balance")).json["balance"])


async def entries_of(client: Client) -> list[dict[str, Any]]:
    """Somebody's ledger, newest first."""
    return list((await client.get("/billing/ledger?limit=100")).json["items"])


async def told(client: Client, topic: str) -> list[dict[str, Any]]:
    """The data of somebody's notifications on a topic, oldest first."""
    items = (await client.get("/notifications?limit=100")).json["items"]
    return [one["data"] for one in items if one["topic"] == topic]


async def complaints(admin: Client) -> list[dict[str, Any]]:
    """What an administrator heard of payments that do not fit."""
    return [data for data in await told(admin, "system") if "order_number" in data]


async def administrator(house: House) -> Client:
    """Somebody who hears of payments that do not fit, and may do something about them."""
    client = await house.sign_up()
    await house.app[DATABASE].execute("UPDATE users SET role = 'admin' WHERE id = $1", client.user["id"])
    await house.app[USERS].notice_administrators()
    return client


class Wallet:
    """As much of a payment provider as a checkout asks for: its payers scan a QR code."""

    name = "wallet"
    title = "Wallet"

    async def checkout(self, order: Payable, *, back_url: str, callback_url: str) -> Checkout:
        """A code to scan."""
        return Checkout(qr_text=f"wallet:{order.number}")


def open_wallet(house: House) -> Callable[[], None]:
    """Let a house have a second payment provider; answers what closes it again."""
    providers = cast("dict[str, Provider]", house.app[PROVIDERS])
    providers[Wallet.name] = cast("Provider", Wallet())
    return lambda: providers.__delitem__(Wallet.name)


async def charge(house: House, client: Client, amount: int, phone: str = "Test phone") -> None:
    """Let somebody pay for the time of a phone, which is known by its name alone."""
    usage = Usage(UUID(client.user["id"]), amount, str(uuid5(NAMESPACE_OID, phone)), phone)
    async with house.app[DATABASE].transaction() as tx:
        await house.app[LEDGER].charge(tx, [usage])


async def move_back(house: House, client: Client, days: int) -> None:
    """Let all that came to somebody's account and went have happened so many days earlier."""
    async with house.app[DATABASE].transaction() as tx:
        await tx.execute("SET LOCAL session_replication_role = replica")  # entries are final otherwise
        await tx.execute(
            "UPDATE ledger_entries SET created_at = created_at - make_interval(days => $2)"
            " WHERE account_id = (SELECT id FROM ledger_accounts WHERE user_id = $1)",
            UUID(client.user["id"]),
            days,
        )


async def events_of(house: House, order: dict[str, Any]) -> list[str]:
    """What was reported about an order, as it is kept."""
    rows = await house.app[DATABASE].fetch(
        "SELECT status FROM payment_events WHERE order_number = $1", order["number"]
    )
    return [row["status"] for row in rows]


async def booked(house: House, kind: str, order: dict[str, Any]) -> dict[str, int]:
    """The entries of one kind about an order, by account."""
    rows = await house.app[DATABASE].fetch(
        "SELECT a.kind, e.amount FROM ledger_accounts a JOIN ledger_entries e ON e.account_id = a.id"
        " WHERE e.kind = $1 AND e.reference = $2",
        kind,
        order["number"],
    )
    assert len(rows) == len({row["kind"] for row in rows})
    return {row["kind"]: row["amount"] for row in rows}


async def assert_sound(house: House) -> None:
    """The ledger's invariants, over all it holds, and what the server has in memory."""
    database = house.app[DATABASE]
    await assert_books_sound(database)
    rows = await database.fetch("SELECT user_id, balance FROM ledger_accounts WHERE kind = 'user'")
    for row in rows:
        assert house.app[ACCOUNTS].balance_of(row["user_id"]).balance == row["balance"]
    assert (await house.app[CHECKS].run()).findings == {}


async def assert_books_sound(database: Database) -> None:
    """The ledger's invariants, over all that is written."""
    assert not await database.fetch(
        "SELECT FROM ledger_entries GROUP BY transaction_id HAVING sum(amount) <> 0 OR count(*) <> 2"
    )
    assert not await database.fetchval("SELECT sum(balance) FROM ledger_accounts")
    assert not await database.fetch(
        "SELECT FROM ledger_accounts a LEFT JOIN ledger_entries e ON e.account_id = a.id"
        " GROUP BY a.id HAVING a.balance <> coalesce(sum(e.amount), 0)"
    )
    assert not await database.fetch(
        "SELECT FROM (SELECT balance_after, sum(amount) OVER (PARTITION BY account_id ORDER BY position) AS s"
        " FROM ledger_entries) h WHERE balance_after IS DISTINCT FROM s"
    )
    assert not await database.fetch(
        "SELECT FROM orders o FULL JOIN (SELECT * FROM ledger_entries WHERE kind = 'top_up' AND amount > 0) e"
        " ON e.reference = o.number WHERE (o.state = 'paid') <> (e.amount IS NOT NULL)"
        " OR o.id IS NULL OR o.amount <> e.amount"
    )
    assert not await database.fetch(
        "SELECT FROM ledger_entries WHERE kind = 'top_up' AND amount > 0"
        " GROUP BY reference HAVING count(*) > 1"
    )
