"""Accounts and sessions, over HTTP as programs and browsers use them."""

import asyncio
import re
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import aiohttp
import jwt
import pytest

from plugins import notify, users
from plugins.users.routes import USERS
from server.clock import SystemRandomness
from server.db import Database
from server.errors import Code, Problem
from server.interfaces import CLOCK, DATABASE, DIRECTORY, RANDOMNESS, SECRET_KEY
from server.throttle import KEYS_KEPT, Throttle
from server.tokens import AccessTokens
from tests.conftest import Open
from tests.house import PASSWORD, Client, House, Reply

PLUGINS = (users.PLUGIN, notify.PLUGIN)
EMAIL = "ann@example.com"


@pytest.fixture
async def house(open_house: Open) -> House:
    """A server with accounts and notifications alone."""
    return await open_house(PLUGINS)


def renewed(client: Client, house: House, reply: Reply) -> Client:
    """The client with the session of an answer."""
    assert reply.status == 200, reply.body
    return Client(house, reply.json)


async def log_in(house: House, email: str = EMAIL, password: str = PASSWORD) -> Reply:
    """Try to sign in."""
    return await house.anyone.post("/auth/login", {"email": email, "password": password})


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


# Tokens


async def test_a_session_is_renewed_by_its_refresh_token(house: House) -> None:
    ann = await house.sign_up(EMAIL)
    reply = await house.anyone.post("/auth/refresh", {"refresh_token": ann.session["refresh_token"]})
    again = renewed(ann, house, reply)
    assert again.session["refresh_token"] != ann.session["refresh_token"]
    assert (await again.get("/users/me")).json == ann.user
    assert (await ann.get("/users/me")).status == 200, "the same session, also by its older access token"


async def test_a_spent_refresh_token_ends_the_whole_session(house: House) -> None:
    ann, other = await house.sign_up(EMAIL), Client(house, (await log_in(house)).json)
    spent = {"refresh_token": ann.session["refresh_token"]}
    again = renewed(ann, house, await house.anyone.post("/auth/refresh", spent))
    stream = await again.socket("/notifications/stream")
    stolen = await house.anyone.post("/auth/refresh", spent)
    assert (stolen.status, stolen.code) == (401, "invalid_token")
    assert (await again.get("/users/me")).status == 401
    rest = await house.anyone.post("/auth/refresh", {"refresh_token": again.session["refresh_token"]})
    assert rest.status == 401
    assert await close_code(stream) == 4401
    assert (await other.get("/users/me")).status == 200


async def test_of_two_renewals_at_once_one_wins_and_both_lose(house: House) -> None:
    ann = await house.sign_up(EMAIL)
    body = {"refresh_token": ann.session["refresh_token"]}
    replies = await asyncio.gather(*(house.anyone.post("/auth/refresh", body) for _ in range(6)))
    assert sorted(reply.status for reply in replies) == [200] + [401] * 5
    assert (await ann.get("/users/me")).status == 401


async def test_a_renewal_and_a_sign_out_at_once_leave_no_session(house: House) -> None:
    for _ in range(10):
        ann = await house.sign_up()
        body = {"refresh_token": ann.session["refresh_token"]}
        replies = await asyncio.gather(house.anyone.post("/auth/refresh", body), ann.post("/auth/logout"))
        assert {reply.status for reply in replies} <= {200, 204, 401}
        assert (await ann.get("/users/me")).status == 401


async def test_a_renewal_heard_of_after_the_sign_out_opens_nothing(house: House) -> None:
    ann = await house.sign_up(EMAIL)
    sessions = house.app[USERS].sessions
    prolong = sessions._prolong
    late: list[Any] = []
    sessions._prolong = late.append  # type: ignore[method-assign, assignment]
    reply = await house.anyone.post("/auth/refresh", {"refresh_token": ann.session["refresh_token"]})
    again = renewed(ann, house, reply)
    assert (await again.post("/auth/logout")).status == 204
    for row in late:
        prolong(row)
    assert len(late) == 1
    assert (await again.get("/users/me")).status == 401


async def test_a_forged_or_foreign_token_is_refused(house: House) -> None:
    for token, status in (("", 401), ("nonsense", 401), ("x" * 300, 422)):
        assert (await house.anyone.post("/auth/refresh", {"refresh_token": token})).status == status
    ann = await house.sign_up(EMAIL)
    claims = jwt.decode(ann.token, options={"verify_signature": False})
    header, payload, signature = ann.token.split(".")
    forged = [
        jwt.encode(claims, "another key that is long enough", algorithm="HS256"),
        jwt.encode(claims, "", algorithm="none"),
        f"{header}.{payload}.",
        f"{header}.{payload}.{signature[:-4]}",
        f"{header}.{payload}.{signature}x",
        ann.session["refresh_token"],
        "x" * 5000,
        "ünsinn",
    ]
    for token in forged:
        reply = await house.anyone.get("/users/me", headers={"Authorization": f"Bearer {token}"})
        assert (reply.status, reply.code) == (401, "invalid_token"), token
        assert reply.headers["WWW-Authenticate"] == 'Bearer error="invalid_token"'


@dataclass
class HeldClock:
    """Time stands still until it is moved."""

    at: datetime = datetime(2030, 1, 1, tzinfo=UTC)

    def now(self) -> datetime:
        """Wall time."""
        return self.at

    def monotonic(self) -> float:
        """The same in seconds."""
        return self.at.timestamp()

    async def sleep(self, seconds: float) -> None:
        """No time passes."""


def test_an_access_token_runs_out_also_when_it_was_verified_before() -> None:
    clock = HeldClock()
    tokens = AccessTokens("secret", clock, SystemRandomness(), ttl_s=900)
    session_id = uuid4()
    used, unused = tokens.issue(uuid4(), session_id), tokens.issue(uuid4(), session_id)
    clock.at += timedelta(seconds=899)
    assert tokens.session_of(used) == session_id
    clock.at += timedelta(seconds=1)
    assert tokens.session_of(used) is None
    assert tokens.session_of(unused) is None


def test_a_token_of_another_server_or_purpose_is_none_of_ours() -> None:
    clock, randomness = HeldClock(), SystemRandomness()
    tokens = AccessTokens("secret", clock, randomness, ttl_s=900)
    assert (
        AccessTokens("other", clock, randomness, ttl_s=900).session_of(tokens.issue(uuid4(), uuid4())) is None
    )
    claims = jwt.decode(tokens.issue(uuid4(), uuid4()), options={"verify_signature": False})
    for wrong in ({"aud": "else"}, {"iss": "else"}, {"sid": None}, {"exp": None}):
        changed = {name: value for name, value in {**claims, **wrong}.items() if value is not None}
        assert tokens.session_of(jwt.encode(changed, tokens._key, algorithm="HS256")) is None


def test_failures_are_forgotten_after_their_window_and_never_without_bound() -> None:
    clock = HeldClock()
    throttle = Throttle(clock, limit=2, window_s=60)
    throttle.count("a")
    clock.at += timedelta(seconds=10)
    throttle.count("a")
    assert throttle.wait_s("a") == 50
    clock.at += timedelta(seconds=50)
    assert throttle.wait_s("a") == 0
    throttle.count("a")
    assert throttle.wait_s("a") == 10
    throttle.forget("a")
    assert throttle.wait_s("a") == 0
    for number in range(KEYS_KEPT + 10):
        throttle.count(str(number))
    assert len(throttle._failures) == KEYS_KEPT


async def test_signing_out_needs_to_be_signed_in(house: House) -> None:
    for method, path in (("POST", "/auth/logout"), ("GET", "/users/me"), ("POST", "/auth/tickets")):
        reply = await house.anyone.call(method, path)
        assert (reply.status, reply.code) == (401, "not_signed_in")


async def test_sessions_outlive_a_restart_and_ended_ones_do_not(house: House) -> None:
    ann, gone = await house.sign_up(EMAIL), Client(house, (await log_in(house)).json)
    await gone.post("/auth/logout")
    async with browser(house) as visitor:
        await visitor.log_in()
        await house.restart()
        assert (await ann.get("/users/me")).json == ann.user
        assert (await gone.get("/users/me")).status == 401
        assert (await visitor.get("/account")).status == 200


async def test_a_session_that_ran_out_is_over_everywhere(house: House) -> None:
    ann = await house.sign_up(EMAIL)
    stream = await ann.socket("/notifications/stream")
    await house.app[DATABASE].execute("UPDATE sessions SET expires_at = now()")
    await house.app[USERS].sessions.end_expired()
    assert (await ann.get("/users/me")).status == 401
    refreshed = await house.anyone.post("/auth/refresh", {"refresh_token": ann.session["refresh_token"]})
    assert refreshed.status == 401
    assert await close_code(stream) == 4401
    assert await house.app[DATABASE].fetchval("SELECT count(*) FROM refresh_tokens") == 0


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


async def test_a_ticket_opens_one_socket_and_nothing_else(house: House) -> None:
    ann = await house.sign_up(EMAIL)
    drawn = await ann.post("/auth/tickets")
    assert drawn.status == 201
    assert drawn.json == {"ticket": drawn.json["ticket"], "expires_in": 30}
    path = f"/notifications/stream?ticket={drawn.json['ticket']}"
    assert (await house.anyone.get(f"/users/me?ticket={drawn.json['ticket']}")).status == 401
    stream = await house.anyone.socket(path)
    assert (await stream.receive_json(timeout=5))["type"] == "hello"
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await house.anyone.socket(path)
    assert refused.value.status == 401


async def test_a_ticket_ends_with_its_session_or_its_time(house: House) -> None:
    ann = await house.sign_up(EMAIL)
    sessions = house.app[USERS].sessions
    caller = sessions.caller_of_token(ann.token)
    assert caller is not None
    late, useless = sessions.draw_ticket(caller), sessions.draw_ticket(caller)
    sessions._tickets[late.ticket] = (caller.session_id, house.app[CLOCK].monotonic())
    assert sessions.redeem_ticket(late.ticket) is None
    await ann.post("/auth/logout")
    assert sessions.redeem_ticket(useless.ticket) is None
    assert sessions.redeem_ticket("never drawn") is None


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


# In a browser


@dataclass(frozen=True)
class PageReply:
    """A page, or where it sends the browser."""

    status: int
    location: str
    text: str

    @property
    def csrf_token(self) -> str:
        """What its forms carry."""
        found = re.search(r'name="csrf_token" value="([^"]*)"', self.text)
        assert found, self.text
        return found[1]


class Visitor:
    """A browser: keeps cookies, says which site its page is from, follows no redirect by itself."""

    def __init__(self, house: House, http: aiohttp.ClientSession) -> None:
        self._house = house
        self.http = http

    async def get(self, path: str) -> PageReply:
        """Open a page."""
        return await self._ask("GET", path, {}, None)

    async def post(self, path: str, origin: str | None = None, **fields: str) -> PageReply:
        """Send a form."""
        return await self._ask("POST", path, {"Origin": origin or self._house.url}, fields)

    async def log_in(self, email: str = EMAIL) -> PageReply:
        """Sign in by the form."""
        return await self.post("/login", email=email, password=PASSWORD)

    async def _ask(
        self, method: str, path: str, headers: dict[str, str], form: dict[str, str] | None
    ) -> PageReply:
        async with self.http.request(
            method,
            self._house.url + path,
            headers={"Accept": "text/html", **headers},
            data=form,
            allow_redirects=False,
        ) as reply:
            return PageReply(reply.status, reply.headers.get("Location", ""), await reply.text())


@asynccontextmanager
async def browser(house: House) -> AsyncIterator[Visitor]:
    """A browser of its own for a while."""
    async with aiohttp.ClientSession(cookie_jar=aiohttp.CookieJar(unsafe=True)) as http:
        yield Visitor(house, http)


@pytest.fixture
async def visitor(house: House) -> AsyncIterator[Visitor]:
    """A browser nobody is signed in with; Ann has an account."""
    await house.sign_up(EMAIL)
    async with browser(house) as opened:
        yield opened


async def test_a_person_signs_up_looks_around_and_signs_out(house: House) -> None:
    async with browser(house) as visitor:
        assert 'href="/signup"' in (await visitor.get("/")).text
        assert 'action="/signup"' in (await visitor.get("/signup")).text
        joined = await visitor.post("/signup", email=EMAIL, password=PASSWORD, display_name="Ann <b>")
        assert (joined.status, joined.location) == (303, "/devices")
        home = await visitor.get("/")
        assert "Hello, Ann &lt;b&gt;" in home.text
        assert "Welcome to Cloudphone" in home.text
        for form in ("/login", "/signup"):
            assert (await visitor.get(form)).location == "/devices"
        account = await visitor.get("/account")
        assert EMAIL in account.text
        assert "This one" in account.text
        left = await visitor.post("/logout", csrf_token=home.csrf_token)
        assert (left.status, left.location) == (303, "/")
        assert (await visitor.get("/account")).location == "/login?next=/account"


async def test_a_form_that_does_not_fit_says_so_where_it_does_not(visitor: Visitor) -> None:
    wrong = await visitor.post("/signup", email="nonsense", password="short", display_name="Ann")
    assert wrong.status == 422
    assert "This is not an e-mail address." in wrong.text
    assert "At least 10 characters, please." in wrong.text
    assert 'value="Ann"' in wrong.text
    assert "short" not in wrong.text.replace("shortly", "")
    taken = await visitor.post("/signup", email=EMAIL, password=PASSWORD, display_name="")
    assert taken.status == 409
    refused = await visitor.post("/login", email=EMAIL, password="a wrong password", next="/apps")
    assert refused.status == 401
    assert "E-mail or password is wrong" in refused.text
    assert 'name="next" value="/apps"' in refused.text


async def test_signing_in_goes_on_to_a_page_of_this_site_only(house: House, visitor: Visitor) -> None:
    for wanted in ("/apps?x=1", "//evil.example", "https://evil.example", "/\\evil.example", ""):
        local = wanted if wanted == "/apps?x=1" else ""
        async with browser(house) as other:
            shown = await other.get(f"/login?next={wanted}")
            assert f'name="next" value="{local}"' in shown.text
            entered = await other.post("/login", email=EMAIL, password=PASSWORD, next=wanted)
            assert (entered.status, entered.location) == (303, local or "/devices")


async def test_signing_in_again_ends_the_session_before(house: House, visitor: Visitor) -> None:
    await visitor.log_in()
    first = {cookie.key: cookie.value for cookie in visitor.http.cookie_jar}
    token = (await visitor.get("/account")).csrf_token
    await visitor.post("/login", email=EMAIL, password=PASSWORD, csrf_token=token)
    assert (await visitor.get("/account")).status == 200
    async with house.http.get(f"{house.url}/api/v1/users/me", cookies=first) as reply:
        assert reply.status == 401


async def test_a_cookie_changes_nothing_without_the_pages_token(house: House, visitor: Visitor) -> None:
    await visitor.log_in()
    token = (await visitor.get("/account")).csrf_token

    async def rename(**headers: str) -> int:
        url = f"{house.url}/api/v1/users/me"
        async with visitor.http.patch(url, json={"display_name": "x"}, headers=headers) as reply:
            return reply.status

    assert await rename() == 403
    assert await rename(**{"X-CSRF-Token": "guessed"}) == 403
    assert await rename(**{"X-CSRF-Token": token, "Origin": "https://evil.example"}) == 403
    assert await rename(**{"X-CSRF-Token": token, "Origin": "null"}) == 403
    assert await rename(**{"X-CSRF-Token": token, "Origin": house.url}) == 200
    assert (await visitor.post("/logout")).status == 403
    assert (await visitor.post("/logout", origin="https://evil.example", csrf_token=token)).status == 403
    assert (await visitor.get("/account")).status == 200


async def test_another_site_cannot_sign_a_browser_in(visitor: Visitor) -> None:
    tricked = await visitor.post("/login", origin="https://evil.example", email=EMAIL, password=PASSWORD)
    assert tricked.status == 403
    assert (await visitor.get("/account")).status == 303


async def test_a_cookie_and_a_token_of_two_people_are_refused(house: House, visitor: Visitor) -> None:
    await visitor.log_in()
    bob = await house.sign_up()
    async with visitor.http.get(f"{house.url}/api/v1/users/me", headers=bob.headers) as reply:
        assert (reply.status, (await reply.json())["code"]) == (400, "ambiguous_credentials")


async def test_no_secret_is_kept_as_it_is(house: House) -> None:
    ann = await house.sign_up(EMAIL)
    rows: list[Any] = []
    for table in ("users", "sessions", "refresh_tokens"):
        rows += await house.app[DATABASE].fetch(f"SELECT {table}::text AS kept FROM {table}")
    kept = "\n".join(row["kept"] for row in rows)
    assert "$argon2id$" in kept
    for secret in (PASSWORD, ann.token, ann.session["refresh_token"], house.app[SECRET_KEY]):
        assert secret not in kept


async def close_code(stream: aiohttp.ClientWebSocketResponse[Any]) -> object:
    """How the server closed a stream, whatever it had sent before."""
    while (message := await stream.receive(timeout=5)).type is aiohttp.WSMsgType.TEXT:
        pass
    return message.data
