"""The web host with a plugin of the test's own: what is parsed, refused, encoded and remembered."""

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Annotated
from uuid import UUID

import aiohttp
import pytest
from aiohttp import web
from pydantic import Field

from server.api import Answer, Incoming, Outgoing, Page, PageQuery, Query, Routes, from_cursor, to_cursor
from server.auth import AUTHENTICATOR, Access, Caller
from server.errors import Code, Problem, not_found
from server.i18n import N_
from server.interfaces import DATABASE
from server.plugin import Plugin, PluginFault, Section, in_order
from tests.conftest import Open
from tests.house import Client, House

ALICE = Caller(UUID(int=1), "alice@example.com", "Alice", "user", UUID(int=11))
ADMIN = Caller(UUID(int=2), "admin@example.com", "Admin", "admin", UUID(int=12))


class Door:
    """Knows two tokens."""

    def caller_of_session(self, session_id: UUID) -> Caller | None:
        return None

    def caller_of_token(self, token: str) -> Caller | None:
        return {"alice": ALICE, "admin": ADMIN}.get(token)

    def redeem_ticket(self, ticket: str) -> Caller | None:
        return None


class NewNote(Incoming):
    text: Annotated[str, Field(min_length=1, max_length=100)]
    stars: Annotated[int, Field(ge=0, le=5)] = 0


class Note(Outgoing):
    id: UUID
    text: str
    stars: int


routes = Routes("notes")


@routes.api("POST", "/notes", access=Access.USER, status=201, location="/api/v1/notes/{id}")
async def create(request: web.Request, caller: Caller, body: NewNote, new_id: UUID) -> Note:
    """Write a note."""
    if body.text == "die":
        raise RuntimeError("a secret in a traceback")
    if body.text == "slow":
        await asyncio.sleep(0.3)
    if body.text == "full":
        raise Problem(Code.QUOTA_EXCEEDED, N_("No more than {limit}."), limit=3)
    await request.app[DATABASE].execute(
        "INSERT INTO notes (id, text) VALUES ($1, $2) ON CONFLICT (id) DO NOTHING", new_id, body.text
    )
    return Note(id=new_id, text=body.text, stars=body.stars)


@routes.api("GET", "/notes", access=Access.USER)
async def list_notes(request: web.Request, query: PageQuery) -> Page[Note]:
    """All notes."""
    (position,) = from_cursor(query.cursor, int) if query.cursor else (0,)
    note = Note(id=UUID(int=position), text="", stars=query.page_size)
    return Page[Note](items=[note], next_cursor=to_cursor(position + 1))


@routes.api("GET", "/notes/{note_id}", access=Access.USER)
async def get(request: web.Request, note_id: UUID) -> Note | Answer:
    """One note."""
    if note_id.int:
        raise not_found()
    return Answer(Note(id=note_id, text="zero", stars=0), 203)


@routes.api("GET", "/secret", access=Access.ADMIN)
async def secret(request: web.Request) -> None:
    """For administrators."""


class Tear(Query):
    length: int
    fault: str


@routes.api("GET", "/torn", access=Access.PUBLIC, media="text/plain")
async def torn(request: web.Request, query: Tear) -> web.StreamResponse:
    """Half an answer."""
    response = web.StreamResponse()
    response.content_length = query.length or None
    await response.prepare(request)
    await response.write(b"half")
    await asyncio.sleep(0.05)
    raise Problem(Code.UNAVAILABLE) if query.fault == "problem" else RuntimeError("a bug")


@asynccontextmanager
async def lifespan(app: web.Application) -> AsyncIterator[None]:
    app[AUTHENTICATOR] = Door()
    yield


NOTES = Plugin(
    name="notes",
    config=Section,
    lifespan=lifespan,
    provides=(AUTHENTICATOR,),
    migrations=("CREATE TABLE notes (id uuid PRIMARY KEY, text text)",),
    routes=routes.declared,
)


@pytest.fixture
async def host(open_house: Open) -> House:
    """The web host with the notes plugin alone."""
    return await open_house((NOTES,))


def client(house: House, token: str = "alice") -> Client:
    """A caller with one of the door's tokens."""
    return Client(house, {"access_token": token})


async def test_a_declared_route_parses_calls_and_encodes(host: House) -> None:
    reply = await client(host).post("/notes", {"text": "hello", "stars": 2})
    assert reply.status == 201
    assert reply.json["text"] == "hello"
    assert reply.headers["Location"] == f"/api/v1/notes/{reply.json['id']}"
    assert reply.headers["X-Request-ID"]


async def test_a_body_that_does_not_fit_names_every_field(host: House) -> None:
    reply = await client(host).post("/notes", {"text": "", "stars": "2", "more": 1})
    assert (reply.status, reply.code) == (422, "invalid")
    assert {error["field"] for error in reply.json["errors"]} == {"text", "stars", "more"}
    assert reply.headers["Content-Type"].startswith("application/problem+json")
    assert reply.json["request_id"] == reply.headers["X-Request-ID"]


@pytest.mark.parametrize(
    ("body", "content_type", "status"),
    [
        (b"{", "application/json", 400),
        (b"[]", "application/json", 422),
        (b"null", "application/json", 422),
        (b"", "application/json", 400),
        (b'{"text": NaN}', "application/json", 400),
        (b'{"text": "\xff"}', "application/json", 400),
        (b'{"text": "\\ud800"}', "application/json", 400),
        (b'{"text": "a\\u0000b"}', "application/json", 422),
        (b"[" * 100_000, "application/json", 400),
        (b'{"text": "x"}', "text/plain", 415),
        (b'{"text": "' + b"x" * (1 << 20) + b'"}', "application/json", 413),
    ],
)
async def test_bad_json_is_refused(host: House, body: bytes, content_type: str, status: int) -> None:
    reply = await client(host).call("POST", "/notes", data=body, headers={"Content-Type": content_type})
    assert reply.status == status


async def test_an_unforeseen_error_says_nothing(host: House) -> None:
    reply = await client(host).post("/notes", {"text": "die"})
    assert (reply.status, reply.code) == (500, "internal")
    assert b"secret" not in reply.body


async def test_a_detail_is_filled_in(host: House) -> None:
    reply = await client(host).post("/notes", {"text": "full"})
    assert (reply.status, reply.json["detail"]) == (409, "No more than 3.")


async def test_access_is_checked_before_anything_else(host: House) -> None:
    assert (await host.anyone.post("/notes", {})).status == 401
    refused = await client(host, "forged").get("/notes")
    assert (refused.status, refused.code) == (401, "invalid_token")
    assert "invalid_token" in refused.headers["WWW-Authenticate"]
    assert (await client(host).get("/secret")).code == "forbidden"
    assert (await client(host, "admin").get("/secret")).status == 204


async def test_what_is_not_there_is_404_and_what_is_not_allowed_405(host: House) -> None:
    alice = client(host)
    assert (await alice.get(f"/notes/{UUID(int=5)}")).code == "not_found"
    assert (await alice.get("/notes/..%2f")).status == 404
    assert (await alice.get(f"/notes/{UUID(int=0)}")).status == 203
    assert (await alice.get("/nothing")).code == "not_found"
    wrong = await alice.delete("/notes")
    assert (wrong.status, wrong.code, wrong.headers["Allow"]) == (405, "method_not_allowed", "GET,POST")


@pytest.mark.parametrize(("query", "status"), [("limit=0", 422), ("limit=x", 422), ("sort=id", 422),
                                               ("cursor=forged", 400), ("cursor=%00", 422),
                                               ("cursor=%ff", 422), ("%ff=1", 400), ("%00=1", 400),
                                               ("limit=1&limit=x", 200)])  # fmt: skip
async def test_a_bad_query_is_refused(host: House, query: str, status: int) -> None:
    assert (await client(host).get(f"/notes?{query}")).status == status


@pytest.mark.parametrize("fault", ["problem", "bug"])
@pytest.mark.parametrize("length", [0, 100])
async def test_an_answer_that_breaks_off_is_cut_and_not_finished_as_another(
    host: House, fault: str, length: int
) -> None:
    begun, received = False, b""
    with pytest.raises(aiohttp.ClientError):
        async with host.http.get(f"{host.url}/api/v1/torn?length={length}&fault={fault}") as response:
            begun = response.status == 200
            async for piece in response.content.iter_any():
                received += piece
    assert begun
    assert received in {b"", b"half"}
    assert (await client(host).get("/notes")).status == 200


async def test_a_page_is_at_most_100(host: House) -> None:
    first = await client(host).get("/notes?limit=1000000000")
    assert first.json["items"][0]["stars"] == 100
    second = await client(host).get(f"/notes?cursor={first.json['next_cursor']}")
    assert second.json["items"][0]["id"] == str(UUID(int=1))


async def test_the_same_key_gives_the_first_answer_again(host: House) -> None:
    alice, key = client(host), {"Idempotency-Key": "one"}
    first = await alice.post("/notes", {"text": "once"}, headers=key)
    again = await alice.post("/notes", {"text": "once"}, headers=key)
    other = await alice.post("/notes", {"text": "twice"}, headers=key)
    somebody_elses = await client(host, "admin").post("/notes", {"text": "once"}, headers=key)
    assert (first.status, again.status, again.json) == (201, 201, first.json)
    assert again.headers["Location"] == first.headers["Location"]
    assert (other.status, other.code) == (422, "idempotency_mismatch")
    assert somebody_elses.json["id"] != first.json["id"]
    assert await host.app[DATABASE].fetchval("SELECT count(*) FROM notes") == 2


async def test_a_repetition_after_a_crash_makes_nothing_twice(host: House) -> None:
    alice, key = client(host), {"Idempotency-Key": "crash"}
    first = await alice.post("/notes", {"text": "once"}, headers=key)
    await host.app[DATABASE].execute("UPDATE idempotency_keys SET status = NULL, answer = NULL")
    again = await alice.post("/notes", {"text": "once"}, headers=key)
    assert (again.status, again.json) == (201, first.json)
    assert await host.app[DATABASE].fetchval("SELECT count(*) FROM notes") == 1


async def test_a_key_in_use_is_said_so(host: House) -> None:
    alice, key = client(host), {"Idempotency-Key": "slow"}
    replies = await asyncio.gather(*(alice.post("/notes", {"text": "slow"}, headers=key) for _ in range(3)))
    assert sorted(reply.status for reply in replies) == [201, 409, 409]
    assert {reply.code for reply in replies if reply.status == 409} == {"in_progress"}


async def test_a_key_that_is_none_is_refused(host: House) -> None:
    for key in ("x" * 256, "a b"):
        reply = await client(host).post("/notes", {"text": "x"}, headers={"Idempotency-Key": key})
        assert reply.status == 400


async def test_the_api_describes_itself(host: House) -> None:
    document = (await host.anyone.get("/openapi.json")).json
    operation = document["paths"]["/api/v1/notes"]["post"]
    assert document["openapi"].startswith("3.1")
    assert operation["summary"] == "Write a note."
    assert operation["requestBody"]["content"]["application/json"]["schema"]["$ref"].endswith("/NewNote")
    assert set(operation["responses"]) >= {"201", "400", "401", "403", "409", "413", "415", "422", "503"}


async def test_operators_see_health_readiness_and_metrics(host: House) -> None:
    assert (await host.anyone.get("//healthz")).status == 200
    ready = await host.anyone.get("//readyz")
    assert ready.status == 200
    assert {name: part["state"] for name, part in ready.json["parts"].items()} == {
        "database": "ok", "storage": "ok",
    }  # fmt: skip
    assert b"cloudphone_requests_total" in (await host.anyone.get("//metrics")).body


def plugin(name: str, needs: tuple[web.AppKey[int], ...], provides: tuple[web.AppKey[int], ...]) -> Plugin:
    """A plugin that is nothing but its place in the order."""
    return Plugin(name=name, config=Section, lifespan=lifespan, needs=needs, provides=provides)


def test_plugins_start_after_those_they_need() -> None:
    one, two = web.AppKey("one", int), web.AppKey("two", int)
    a, b, c = plugin("a", (two,), ()), plugin("b", (one,), (two,)), plugin("c", (), (one,))
    assert [p.name for p in in_order((a, b, c))] == ["c", "b", "a"]


@pytest.mark.parametrize(
    ("declare", "said"),
    [
        (lambda k: (plugin("a", (k,), ()),), "needs"),
        (lambda k: (plugin("a", (k,), (k,)),), "circle"),
        (lambda k: (plugin("a", (), (k,)), plugin("b", (), (k,))), "both provide"),
        (lambda k: (plugin("a", (), ()), plugin("a", (), ())), "two plugins"),
    ],
)
def test_a_gap_or_a_circle_among_plugins_is_named(
    declare: Callable[[web.AppKey[int]], tuple[Plugin, ...]], said: str
) -> None:
    with pytest.raises(PluginFault, match=said):
        in_order(declare(web.AppKey("key", int)))


def test_a_route_without_access_does_not_load() -> None:
    with pytest.raises(TypeError, match="access"):
        Routes("x").api("GET", "/x")  # type: ignore[call-arg]  # that is the point
