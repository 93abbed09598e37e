"""Accounts: registering, signing in, one's own account and administrators, as programs do it."""

import asyncio
from typing import Any
from uuid import UUID, uuid4

import pytest

from plugins import users
from server.clock import SystemRandomness
from server.db import Database
from server.errors import Code, Problem
from server.interfaces import DATABASE, DIRECTORY, RANDOMNESS, SECRET_KEY
from tests.conftest import Open
from tests.house import PASSWORD, Client, House
from tests.visiting import EMAIL, PLUGINS, browser, log_in
from tests.visiting import house as house

# Registering


async def test_a_new_account_is_signed_in(house: House) -> None:
    ann = await house.sign_up(EMAIL)
    assert set(ann.session) == {"access_token", "token_type", "expires_in", "refresh_token", "user"}
    assert (ann.session["token_type"], ann.session["expires_in"]) == ("Bearer", 900)
    me = (await ann.get("/users/me")).json
    assert me == ann.user
    assert set(me) == {"id", "email", "display_name", "role", "status", "created_at"}
    assert (me["email"], me["display_name"], me["role"], me["status"]) == (EMAIL, "", "user", "active")
    assert me["created_at"].endswith("Z")


async def test_one_address_has_one_account_however_it_is_written(house: House) -> None:
    await house.sign_up(EMAIL)
    for spelling in ("ANN@Example.com", " ann@example.com ", "ａｎｎ@example.com", "Ann＠example.com"):
        again = await house.anyone.post("/auth/register", {"email": spelling, "password": PASSWORD})
        assert (again.status, again.code) == (409, "email_taken")
        assert (await log_in(house, spelling)).status == 200


async def test_of_many_who_register_an_address_at_once_one_gets_it(house: House) -> None:
    body = {"email": EMAIL, "password": PASSWORD}
    replies = await asyncio.gather(*(house.anyone.post("/auth/register", body) for _ in range(8)))
    assert sorted(reply.status for reply in replies) == [201] + [409] * 7


UNFIT: tuple[tuple[str, object], ...] = (
    ("email", "no address"),
    ("email", "a@b@c.example"),
    ("email", "@example.com"),
    ("email", "ann@"),
    ("email", "ann@example..com"),
    ("email", "an\u202en@example.com"),
    ("email", "an\u200bn@example.com"),
    ("email", "a nn@example.com"),
    ("email", "an\nn@example.com"),
    ("email", "a" * 250 + "@example.com"),
    ("email", 7),
    ("password", "short"),
    ("password", "e\u0301" * 9),
    ("password", "x" * 129),
    ("display_name", "two\nlines"),
    ("display_name", "x" * 81),
    ("role", "admin"),
    ("id", str(uuid4())),
    ("balance", 1000),
)


async def test_what_does_not_fit_is_refused_by_name(house: House) -> None:
    for field, value in UNFIT:
        body = {"email": EMAIL, "password": PASSWORD, field: value}
        reply = await house.anyone.post("/auth/register", body)
        assert (reply.status, reply.code) == (422, "invalid"), value
        assert [error["field"] for error in reply.json["errors"]] == [field], value
        assert PASSWORD.encode() not in reply.body
    with_nul = {"email": EMAIL, "password": "with a \x00 in it"}
    assert (await house.anyone.post("/auth/register", with_nul)).status == 422
    assert await house.app[DATABASE].fetchval("SELECT count(*) FROM users") == 0


async def test_a_closed_registration_takes_nobody(open_house: Open) -> None:
    house = await open_house(PLUGINS, users={"registration": "closed"})
    reply = await house.anyone.post("/auth/register", {"email": EMAIL, "password": PASSWORD})
    assert (reply.status, reply.code) == (403, "registration_closed")
    async with browser(house) as visitor:
        assert 'action="/signup"' not in (await visitor.get("/signup")).text


# Signing in


async def test_signing_in_gives_a_session_of_its_own(house: House) -> None:
    ann = await house.sign_up(EMAIL)
    other = Client(house, (await log_in(house)).json)
    assert other.user == ann.user
    assert (await other.post("/auth/logout")).status == 204
    assert (await other.get("/users/me")).status == 401
    assert (await ann.get("/users/me")).status == 200


async def test_a_password_typed_in_parts_is_the_same_password(house: House) -> None:
    composed, in_parts = "ünïcödé wörd", "u\u0308ni\u0308co\u0308de\u0301 wo\u0308rd"
    await house.anyone.post("/auth/register", {"email": EMAIL, "password": composed})
    assert (await log_in(house, password=in_parts)).status == 200


async def test_nobody_learns_which_addresses_have_accounts(house: House) -> None:
    await house.sign_up(EMAIL)
    loop = asyncio.get_running_loop()
    took: dict[str, list[float]] = {EMAIL: [], "nobody@example.com": []}
    answers = set()
    for _ in range(5):
        for email, times in took.items():
            began = loop.time()
            reply = await log_in(house, email, "a wrong password")
            times.append(loop.time() - began)
            answers.add((reply.status, reply.code, reply.json["detail"]))
    assert len(answers) == 1
    assert answers.pop()[:2] == (401, "invalid_credentials")
    known, unknown = (min(times) for times in took.values())
    assert unknown > known / 2, "an unknown address takes as long"


async def test_guessing_at_an_account_is_stopped_and_its_owner_not_disturbed(house: House) -> None:
    ann = await house.sign_up(EMAIL)
    await house.sign_up("bob@example.com")
    wrong = await asyncio.gather(*(log_in(house, password=f"a wrong password {n}") for n in range(30)))
    refused = [reply for reply in wrong if reply.status == 429]
    assert {reply.code for reply in refused} == {"too_many_attempts"}
    assert 10 <= 30 - len(refused) <= 11, "two are tried at once"
    last = await log_in(house)
    assert last.status == 429
    assert 0 < int(last.headers["Retry-After"]) <= 901
    assert (await ann.get("/users/me")).status == 200
    assert (await ann.post("/auth/refresh", {"refresh_token": ann.session["refresh_token"]})).status == 200
    assert (await log_in(house, "bob@example.com")).status == 200


async def test_guessing_at_many_accounts_from_one_address_is_stopped(house: House) -> None:
    await house.sign_up(EMAIL)
    names = [f"user{n}@example.com" for n in range(52)]
    wrong = await asyncio.gather(*(log_in(house, name, "a wrong password") for name in names))
    assert 50 <= sum(reply.status == 401 for reply in wrong) <= 51
    assert (await log_in(house)).status == 429


async def test_a_password_of_a_megabyte_is_not_hashed(house: House) -> None:
    assert (await log_in(house, password="x" * 2000)).status == 422
    assert (await log_in(house, password="x" * (1 << 20))).status == 413


async def test_a_suspended_account_cannot_sign_in(house: House) -> None:
    await house.sign_up(EMAIL)
    await house.app[DATABASE].execute("UPDATE users SET status = 'suspended'")
    reply = await log_in(house)
    assert (reply.status, reply.code) == (403, "forbidden")
    assert (await log_in(house, password="a wrong password")).status == 401


# One's own account


async def test_a_name_can_be_changed_and_everything_else_stays(house: House) -> None:
    ann, other = await house.sign_up(EMAIL), Client(house, (await log_in(house)).json)
    changed = await ann.patch("/users/me", {"display_name": " Ann <b>"})
    assert changed.json == {**ann.user, "display_name": "Ann <b>"}
    assert (await other.get("/users/me")).json == changed.json
    assert (await ann.patch("/users/me", {})).json == changed.json
    for refused in (
        {"role": "admin"},
        {"email": "x@example.com"},
        {"display_name": "a\nb"},
        {"display_name": 1},
    ):
        assert (await ann.patch("/users/me", refused)).status == 422
    await house.restart()
    assert (await ann.get("/users/me")).json == changed.json


# Administrators


async def test_an_administrator_is_made_beside_the_running_server(house: House) -> None:
    database, randomness = house.app[DATABASE], house.app[RANDOMNESS]
    said = await users.create_admin(database, randomness, "Boss@example.com", None)
    assert said.startswith("Boss@example.com is an administrator now.")
    boss = Client(house, (await log_in(house, "boss@example.com", said.split()[-1])).json)
    assert boss.user["role"] == "admin"
    assert (await boss.get("/notifications")).json["items"][0]["id"] == 1, "greeted at the first sign-in"
    assert "already" in await users.create_admin(database, randomness, "boss@example.com", None)
    again = Client(house, (await log_in(house, "boss@example.com", said.split()[-1])).json)
    assert len((await again.get("/notifications")).json["items"]) == 1, "and at no other"


async def test_a_promotion_is_noticed_without_a_new_sign_in(house: House) -> None:
    ann = await house.sign_up(EMAIL)
    message = {"user_id": ann.user["id"], "topic": "system", "title": "x", "body": ""}
    assert (await ann.post("/notifications", message)).status == 403
    database, randomness = house.app[DATABASE], house.app[RANDOMNESS]
    assert EMAIL in await users.create_admin(database, randomness, EMAIL, "never used password")
    async with asyncio.timeout(2):
        while (await ann.post("/notifications", message)).status != 202:
            await asyncio.sleep(0.05)
    assert (await ann.get("/users/me")).json["role"] == "admin"
    assert (await log_in(house)).status == 200, "the password stays as it was"
    async with database.transaction() as tx:
        directory = house.app[DIRECTORY]
        assert await directory.administrators(tx) == [UUID(ann.user["id"])]
        assert await directory.everyone(tx) == [UUID(ann.user["id"])]
        assert await directory.among(tx, {uuid4(), UUID(ann.user["id"])}) == {UUID(ann.user["id"])}


async def test_create_admin_says_what_is_wrong(database: Database) -> None:
    await database.migrate("users", users.PLUGIN.migrations)
    with pytest.raises(Problem, match=r"email: .*not an e-mail") as refused:
        await users.create_admin(database, SystemRandomness(), "nonsense", "short")
    assert refused.value.code is Code.INVALID
    assert await database.fetchval("SELECT count(*) FROM users") == 0


# What is kept


async def test_no_secret_is_kept_as_it_is(house: House) -> None:
    ann = await house.sign_up(EMAIL)
    rows: list[Any] = []
    for table in ("users", "sessions", "refresh_tokens"):
        rows += await house.app[DATABASE].fetch(f"SELECT {table}::text AS kept FROM {table}")
    kept = "\n".join(row["kept"] for row in rows)
    assert "$argon2id$" in kept
    for secret in (PASSWORD, ann.token, ann.session["refresh_token"], house.app[SECRET_KEY]):
        assert secret not in kept
