"""Sessions: tokens, how they are renewed and end, and the tickets they give."""

import asyncio
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import aiohttp
import jwt
import pytest

from plugins.users.routes import USERS
from server.clock import SystemRandomness
from server.interfaces import CLOCK, DATABASE
from server.throttle import KEYS_KEPT, Throttle
from server.tokens import AccessTokens
from tests.house import Client, House, Reply
from tests.visiting import EMAIL, browser, log_in
from tests.visiting import house as house


def renewed(client: Client, house: House, reply: Reply) -> Client:
    """The client with the session of an answer."""
    assert reply.status == 200, reply.body
    return Client(house, reply.json)


async def close_code(stream: aiohttp.ClientWebSocketResponse[Any]) -> object:
    """How the server closed a stream, whatever it had sent before."""
    while (message := await stream.receive(timeout=5)).type is aiohttp.WSMsgType.TEXT:
        pass
    return message.data


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
    sessions._prolong = late.append  # type: ignore[method-assign, assignment]  # held back, to come late
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


# What runs out


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


# Sessions and their end


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


# Tickets


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
