"""The audit log: what is written stays, and administrators read it."""

from typing import Any
from uuid import UUID, uuid4

import pytest

from plugins import users
from server.api import to_cursor
from server.db import CheckViolation
from server.interfaces import AUDIT, DATABASE, RANDOMNESS
from tests.house import PASSWORD, Client, House
from tests.visiting import house as house
from tests.visiting import log_in

BOSS = "boss@example.com"


@pytest.fixture
async def boss(house: House) -> Client:
    """An administrator."""
    await users.create_admin(house.app[DATABASE], house.app[RANDOMNESS], BOSS, PASSWORD)
    return Client(house, (await log_in(house, BOSS)).json)


async def record(house: House, action: str, target: str, **more: Any) -> None:
    """Write an entry, as a plugin would."""
    async with house.app[DATABASE].transaction() as tx:
        await house.app[AUDIT].record(tx, action=action, target=target, **more)


async def listed(reader: Client, **query: str) -> list[dict[str, Any]]:
    """Entries without paging."""
    reply = await reader.get("/audit", params={"limit": "100", **query})
    assert reply.status == 200, reply.body
    return list(reply.json["items"])


async def test_an_entry_says_who_did_what_to_what_from_where(house: House, boss: Client) -> None:
    changed, now = {"role": "user", "limits": [1, None]}, {"role": "admin", "by": uuid4()}
    who = UUID(boss.user["id"])
    await record(house, "users.change", "u1", actor_id=who, address="192.0.2.7", before=changed, after=now)
    (entry,) = await listed(boss)
    assert entry.pop("at").endswith("Z")
    assert entry.pop("id") > 0
    assert entry == {
        "actor_id": boss.user["id"],
        "actor_email": BOSS,
        "action": "users.change",
        "target": "u1",
        "address": "192.0.2.7",
        "before": changed,
        "after": {**now, "by": str(now["by"])},
    }


async def test_the_server_is_nobody_and_a_closed_account_keeps_its_entries(
    house: House, boss: Client
) -> None:
    gone = uuid4()
    await record(house, "billing.expire", "o1")
    await record(house, "devices.start", "d1", actor_id=gone)
    closed, server = await listed(boss)
    assert (closed["actor_id"], closed["actor_email"]) == (str(gone), None)
    assert (server["actor_id"], server["actor_email"], server["address"]) == (None, None, "")
    assert (server["before"], server["after"]) == (None, None)


async def test_an_entry_shares_its_transactions_fate(house: House, boss: Client) -> None:
    with pytest.raises(RuntimeError, match="changed my mind"):
        async with house.app[DATABASE].transaction() as tx:
            await house.app[AUDIT].record(tx, action="devices.start", target="never")
            raise RuntimeError("changed my mind")
    await record(house, "devices.start", "done")
    assert [entry["target"] for entry in await listed(boss)] == ["done"]


async def test_entries_cannot_be_changed_or_deleted(house: House, boss: Client) -> None:
    await record(house, "devices.start", "d1")
    for statement in (
        "UPDATE audit SET action = 'nothing'",
        "UPDATE audit SET action = 'nothing' WHERE false",
        "DELETE FROM audit",
        "TRUNCATE audit",
    ):
        with pytest.raises(CheckViolation, match="never changed or deleted"):
            await house.app[DATABASE].execute(statement)
    assert [entry["action"] for entry in await listed(boss)] == ["devices.start"]


async def test_administrators_page_from_the_newest_to_the_oldest(house: House, boss: Client) -> None:
    for number in range(5):
        await record(house, "devices.start", f"d{number}")
    seen, cursor = [], ""
    for _ in range(3):
        page = (
            await boss.get("/audit", params={"limit": "2", **({"cursor": cursor} if cursor else {})})
        ).json
        seen += [entry["target"] for entry in page["items"]]
        cursor = page["next_cursor"]
    assert seen == ["d4", "d3", "d2", "d1", "d0"]
    assert cursor is None


async def test_one_action_or_target_is_asked_for_exactly(house: House, boss: Client) -> None:
    for action, target in (("devices.start", "a"), ("devices.stop", "a"), ("devices.start", "ab")):
        await record(house, action, target)
    assert [entry["target"] for entry in await listed(boss, action="devices.start")] == ["ab", "a"]
    assert [entry["action"] for entry in await listed(boss, target="a")] == ["devices.stop", "devices.start"]
    assert len(await listed(boss, action="devices.stop", target="a")) == 1
    assert await listed(boss, action="devices") == []
    assert await listed(boss, target="' OR true --") == []


async def test_a_forged_question_is_refused(house: House, boss: Client) -> None:
    for cursor in ("nonsense", "é", to_cursor(-1), to_cursor(2**63), to_cursor("1"), to_cursor(1, 2)):
        reply = await boss.get("/audit", params={"cursor": cursor})
        assert (reply.status, reply.code) == (400, "malformed"), cursor
    for query in ({"limit": "0"}, {"limit": "x"}, {"action": "x" * 101}, {"actor": "x"}):
        assert (await boss.get("/audit", params=query)).status == 422, query
    assert (await boss.get("/audit?action=%00")).status == 422


async def test_nobody_else_reads_it(house: House) -> None:
    ann = await house.sign_up()
    assert (await ann.get("/audit")).code == "forbidden"
    assert (await house.anyone.get("/audit")).code == "not_signed_in"
    assert (await ann.get("/audit")).status == 403
    assert (await house.anyone.get("/audit")).status == 401
