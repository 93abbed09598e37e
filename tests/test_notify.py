"""Notifications: numbered, stored, streamed once and in order."""

import asyncio
import json
import random
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any
from uuid import UUID, uuid4

import aiohttp
import pytest

from plugins import notify, users
from plugins.notify.model import Letter
from plugins.notify.routes import NOTIFICATIONS
from plugins.notify.streams import Streams
from server.db import Tx
from server.interfaces import DATABASE, NOTIFIER, RANDOMNESS, Topic
from server.sockets import Outbox
from tests.conftest import Open
from tests.house import PASSWORD, Client, House, Reply

PLUGINS = (users.PLUGIN, notify.PLUGIN)
ENGLISH = {"Accept-Language": "en"}
CHINESE = {"Accept-Language": "zh-CN"}
HELLO = "Welcome to Cloudphone"


@pytest.fixture
async def house(open_house: Open) -> House:
    """A server with accounts and notifications alone."""
    return await open_house(PLUGINS)


@pytest.fixture
async def ann(house: House) -> Client:
    """Somebody with an account, and so one notification."""
    return await house.sign_up()


async def make_admin(house: House, client: Client) -> None:
    """Promote, and wait until it counts."""
    await users.create_admin(house.app[DATABASE], house.app[RANDOMNESS], client.user["email"], None)
    async with asyncio.timeout(5):
        while (await client.get("/users/me")).json["role"] != "admin":
            await asyncio.sleep(0.05)


async def tell(house: House, client: Client, title: str, body: str = "", **params: object) -> None:
    """Publish as another plugin does, in a transaction of its own."""
    async with house.app[DATABASE].transaction() as tx:
        await publish(house, tx, client, title, body, params)


async def publish(
    house: House, tx: Tx, client: Client, title: str, body: str, params: Mapping[str, object] | None = None
) -> None:
    """Publish within a transaction."""
    user_id = UUID(client.user["id"])
    await house.app[NOTIFIER].publish(tx, user_id, Topic.SYSTEM, title, body, params=params)


async def stored(client: Client, query: str = "") -> list[dict[str, Any]]:
    """What the API lists."""
    return list((await client.get(f"/notifications?limit=100{query}")).json["items"])


async def read_until(stream: aiohttp.ClientWebSocketResponse[Any], last_id: int) -> list[dict[str, Any]]:
    """The notifications of a stream up to a number."""
    found: list[dict[str, Any]] = []
    while not found or found[-1]["id"] < last_id:
        frame = await stream.receive_json(timeout=20)
        if frame["type"] == "notification":
            found.append(frame)
    return found


async def code_of_close(stream: aiohttp.ClientWebSocketResponse[Any]) -> int:
    """How a stream ended."""
    async with asyncio.timeout(20):
        async for _ in stream:
            pass
    assert stream.close_code is not None
    return stream.close_code


# The list


async def test_a_new_account_is_greeted_in_the_readers_language(ann: Client) -> None:
    (greeting,) = (await ann.get("/notifications", headers=ENGLISH)).json["items"]
    assert set(greeting) == {"id", "topic", "title", "body", "data", "created_at", "read_at"}
    assert (greeting["id"], greeting["topic"], greeting["title"]) == (1, "system", HELLO)
    assert (greeting["data"], greeting["read_at"]) == ({}, None)
    assert greeting["created_at"].endswith("Z")
    (greeting,) = (await ann.get("/notifications", headers=CHINESE)).json["items"]
    assert greeting["title"] == "欢迎使用 Cloudphone"


async def test_the_list_is_oldest_first_in_parts_and_after_a_number(house: House, ann: Client) -> None:
    for number in range(2, 8):
        await tell(house, ann, "Number {n}", n=number)
    first = (await ann.get("/notifications?limit=3")).json
    assert [item["id"] for item in first["items"]] == [1, 2, 3]
    second = (await ann.get(f"/notifications?limit=3&cursor={first['next_cursor']}")).json
    third = (await ann.get(f"/notifications?limit=3&cursor={second['next_cursor']}")).json
    assert [item["title"] for item in second["items"]] == ["Number 4", "Number 5", "Number 6"]
    assert [item["id"] for item in third["items"]] == [7]
    assert third["next_cursor"] is None
    assert [item["id"] for item in await stored(ann, "&since=5")] == [6, 7]
    assert await stored(ann, f"&since={10**30}") == []
    for wrong in ("since=-1", "since=x", "limit=0", "unread=perhaps", "else=1"):
        assert (await ann.get(f"/notifications?{wrong}")).status == 422, wrong
    assert (await ann.get("/notifications?cursor=nonsense")).status == 400
    huge = "WzEwMDAwMDAwMDAwMDAwMDAwMDAwMDAwXQ"  # [100000000000000000000000]
    assert (await ann.get(f"/notifications?cursor={huge}")).status == 400


async def test_reading_marks_everything_up_to_a_number(house: House, ann: Client) -> None:
    for number in range(2, 6):
        await tell(house, ann, f"number {number}")
    assert (await ann.post("/notifications/read", {"up_to_id": 3})).status == 204
    assert [item["id"] for item in await stored(ann, "&unread=true")] == [4, 5]
    assert [item["read_at"] is not None for item in await stored(ann)] == [True] * 3 + [False] * 2
    at_first = await stored(ann)
    assert (await ann.post("/notifications/read", {"up_to_id": 4})).status == 204
    assert (await stored(ann))[:3] == at_first[:3], "what was read stays read since then"
    assert (await ann.post("/notifications/read", {"up_to_id": 2**63 - 1})).status == 204
    assert await stored(ann, "&unread=true") == []
    for wrong in ({"up_to_id": -1}, {"up_to_id": "3"}, {"up_to_id": 2**63}, {}, {"up_to_id": 1, "else": 1}):
        assert (await ann.post("/notifications/read", wrong)).status == 422, wrong


async def test_what_has_no_words_is_not_waiting_to_be_read(house: House, ann: Client) -> None:
    await tell(house, ann, "")
    assert [item["id"] for item in await stored(ann, "&unread=true")] == [1]
    assert [item["id"] for item in await stored(ann)] == [1, 2]
    assert unread_on_page(await page(ann, "//notifications")) == 1


async def test_everybody_has_their_own(house: House, ann: Client) -> None:
    bob = await house.sign_up()
    await tell(house, bob, "for Bob")
    assert [item["id"] for item in await stored(ann)] == [1]
    await ann.post("/notifications/read", {"up_to_id": 100})
    assert [item["id"] for item in await stored(bob, "&unread=true")] == [1, 2]


async def test_a_publisher_that_fails_leaves_no_notification_and_no_gap(house: House, ann: Client) -> None:
    with pytest.raises(ZeroDivisionError):
        async with house.app[DATABASE].transaction() as tx:
            await publish(house, tx, ann, "never said", "")
            raise ZeroDivisionError
    await tell(house, ann, "said")
    assert [(item["id"], item["title"]) for item in await stored(ann)][1:] == [(2, "said")]


async def test_nobody_else_gets_anything(house: House, ann: Client) -> None:
    for method, path in (("GET", ""), ("POST", "/read"), ("POST", ""), ("GET", "/stream")):
        assert (await house.anyone.call(method, f"/notifications{path}")).status == 401
    message = {"user_id": ann.user["id"], "topic": "system", "title": "x", "body": ""}
    reply = await ann.post("/notifications", message)
    assert (reply.status, reply.code) == (403, "forbidden")
    with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
        await house.anyone.socket("/notifications/stream")
    assert refused.value.status == 401


# What administrators say


async def test_an_administrator_tells_one_or_all(house: House, ann: Client) -> None:
    bob, boss = await house.sign_up(), await house.sign_up()
    await make_admin(house, boss)
    message = {"topic": "system", "title": HELLO, "body": "{n} 100%", "data": {"a": [1]}}
    told = await boss.post("/notifications", {"user_id": ann.user["id"], **message})
    assert (told.status, told.json) == (202, {"recipients": 1})
    assert (await boss.post("/notifications", {"user_id": "all", **message})).json == {"recipients": 3}
    listed = (await ann.get("/notifications?since=1", headers=CHINESE)).json["items"]
    assert [item["id"] for item in listed] == [2, 3]
    assert (listed[0]["title"], listed[0]["body"]) == (HELLO, "{n} 100%"), "own words are not translated"
    assert listed[0]["data"] == {"a": [1]}
    assert [item["id"] for item in await stored(bob)] == [1, 2]


async def test_what_an_administrator_says_has_to_fit(house: House, ann: Client) -> None:
    await make_admin(house, ann)
    deep: Any = {}
    for _ in range(300):
        deep = {"a": deep}
    message = {"user_id": ann.user["id"], "topic": "system", "title": "x", "body": ""}
    unfit: tuple[dict[str, Any], ...] = (
        {"topic": "else"},
        {"title": ""},
        {"title": "x" * 201},
        {"body": "x" * 2001},
        {"user_id": "everybody"},
        {"user_id": None},
        {"data": {"x": "y" * 9000}},
        {"data": {"x": 10**30}},
        {"data": deep},
        {"data": []},
        {"read_at": None},
    )
    for wrong in unfit:
        reply = await ann.post("/notifications", {**message, **wrong})
        assert (reply.status, reply.code) == (422, "invalid"), wrong
    reply = await ann.post("/notifications", {**message, "user_id": str(uuid4())})
    assert (reply.status, reply.code) == (404, "not_found")
    replies = await asyncio.gather(
        *(
            ann.post("/notifications", {**message, "user_id": str(uuid4()) if n % 2 else ann.user["id"]})
            for n in range(20)
        )
    )
    assert [reply.status for reply in replies] == [202, 404] * 10
    assert len(await stored(ann)) == 11


async def test_a_repeated_request_tells_once(house: House, ann: Client) -> None:
    await make_admin(house, ann)
    message = {"user_id": ann.user["id"], "topic": "system", "title": "x", "body": ""}
    for _ in range(2):
        reply = await ann.post("/notifications", message, headers={"Idempotency-Key": "one"})
        assert (reply.status, reply.json) == (202, {"recipients": 1})
    assert len(await stored(ann)) == 2


async def test_many_who_are_told_by_many_never_wait_for_each_other_in_a_circle(house: House) -> None:
    people = [await house.sign_up() for _ in range(6)]
    ids = [UUID(person.user["id"]) for person in people]

    async def tell_all() -> None:
        async with house.app[DATABASE].transaction() as tx:
            some = random.sample(ids, len(ids))
            await house.app[NOTIFIER].broadcast(tx, some, Topic.SYSTEM, "{n} of you", "", params={"n": 6})

    await asyncio.gather(*(tell_all() for _ in range(90)))
    for person in people:
        assert [item["id"] for item in await stored(person)] == list(range(1, 92))


# The stream


async def test_the_stream_says_hello_then_what_was_missed_then_what_comes(house: House, ann: Client) -> None:
    await tell(house, ann, "missed")
    stream = await ann.socket("/notifications/stream?since=0")
    assert await stream.receive_json(timeout=5) == {"type": "hello", "last_id": 2}
    await tell(house, ann, "new", "of {n}", n=1)
    frames = await read_until(stream, 3)
    assert [frame["id"] for frame in frames] == [1, 2, 3]
    assert [{**item, "type": "notification"} for item in await stored(ann)] == frames
    assert (frames[2]["title"], frames[2]["body"]) == ("new", "of 1")


async def test_a_stream_begins_where_its_reader_says(house: House, ann: Client) -> None:
    await tell(house, ann, "two")
    begins = {"": 3, "?since=1": 2, "?since=2": 3, "?since=99999999999999999999": 3}
    streams = {since: await ann.socket(f"/notifications/stream{since}") for since in begins}
    await tell(house, ann, "three")
    for since, first in begins.items():
        frames = await read_until(streams[since], 3)
        assert [frame["id"] for frame in frames] == list(range(first, 4)), since


async def test_a_stream_that_cannot_begin_is_refused_before_it_opens(house: House, ann: Client) -> None:
    for query in ("since=-1", "since=x", "since=", "else=1"):
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await ann.socket(f"/notifications/stream?{query}")
        assert refused.value.status == 422
    assert (await ann.get("/notifications/stream")).status == 400


async def test_each_reader_reads_their_own_language(house: House, ann: Client) -> None:
    streams = [
        await ann.socket("/notifications/stream?since=0", headers=headers) for headers in (ENGLISH, CHINESE)
    ]
    titles = [(await read_until(stream, 1))[0]["title"] for stream in streams]
    assert titles == [HELLO, "欢迎使用 Cloudphone"]


async def test_a_doorbell_that_never_rang_loses_nothing(house: House, ann: Client) -> None:
    stream = await ann.socket("/notifications/stream")
    assert (await stream.receive_json(timeout=5))["last_id"] == 1
    room = house.app[NOTIFICATIONS]
    deliver, room._deliver = room._deliver, lambda rows: None  # type: ignore[method-assign]  # a doorbell that does not ring
    await tell(house, ann, "committed, and nobody heard")
    room._deliver = deliver  # type: ignore[method-assign]  # rings again
    await tell(house, ann, "heard")
    assert [frame["id"] for frame in await read_until(stream, 3)] == [2, 3]


async def test_doorbells_that_ring_in_another_order_change_nothing(house: House, ann: Client) -> None:
    stream = await ann.socket("/notifications/stream")
    assert (await stream.receive_json(timeout=5))["last_id"] == 1
    room = house.app[NOTIFICATIONS]
    rung: list[Any] = []
    deliver, room._deliver = room._deliver, rung.append  # type: ignore[method-assign, assignment]  # rung later, out of order
    for title in ("<two>", "<three>"):
        await tell(house, ann, title)
    for rows in reversed(rung):
        deliver(rows)
    assert [frame["id"] for frame in await read_until(stream, 3)] == [2, 3]
    home = await page(ann, "//")
    assert unread_on_page(home) == 3
    assert 'data-since="3"' in home
    assert home.find("&lt;three&gt;") < home.find("&lt;two&gt;")


class Basket(Outbox):
    """Keeps what is pushed."""

    def __init__(self) -> None:
        self.user_id = uuid4()
        self.frames: list[dict[str, Any]] = []

    @property
    def ended(self) -> bool:
        """It takes everything."""
        return False

    @property
    def behind(self) -> bool:
        """At once."""
        return False

    def push(self, frame: bytes) -> None:
        """Keep it."""
        self.frames.append(json.loads(frame))


async def test_what_comes_while_the_past_is_read_is_neither_lost_nor_doubled() -> None:
    def letter(number: int) -> Letter:
        return Letter(number, "system", "x", "", None, {}, datetime.now(UTC), None)

    basket, past = Basket(), [letter(number) for number in range(1, 4)]

    async def after(user_id: UUID, id: int, limit: int) -> list[Letter]:
        found = [old for old in past if old.id > id][:limit]
        if len(past) < 6:  # committed just after this was read; its doorbell rings before the answer is here
            past.append(letter(len(past) + 1))
            streams.ring(user_id, past[-1])
        await asyncio.sleep(0)
        return found

    streams = Streams(after)
    reader = streams.join(basket, "en")
    streams.ring(basket.user_id, past[-1])
    assert not basket.frames, "nothing before the hello"
    streams.begin(reader, 0, 2)
    async with asyncio.timeout(5):
        while reader.replaying:
            await asyncio.sleep(0)
    past.append(letter(7))
    streams.ring(basket.user_id, past[-1])
    assert [frame["id"] for frame in basket.frames] == list(range(1, 8))
    await streams.leave(reader)


async def reconnecting(client: Client, last_id: int, chance: random.Random) -> list[int]:
    """The numbers a reader sees who loses the connection again and again."""
    seen = [0]
    while seen[-1] < last_id:
        stream = await client.socket(f"/notifications/stream?since={seen[-1]}")
        for _ in range(chance.randrange(1, 30)):
            frame = await stream.receive_json(timeout=20)
            if frame["type"] == "notification":
                seen.append(frame["id"])
            if seen[-1] == last_id:
                break
        await stream.close()
    return seen[1:]


async def test_under_concurrency_numbers_have_no_gap_and_every_reader_gets_each_once(
    house: House, ann: Client
) -> None:
    count = 200
    live = await ann.socket("/notifications/stream?since=0")
    readers = [asyncio.create_task(reconnecting(ann, count + 1, random.Random(seed))) for seed in range(3)]
    await asyncio.gather(*(tell(house, ann, "number {n}", n=n) for n in range(count)))
    everything = list(range(1, count + 2))
    assert [frame["id"] for frame in await read_until(live, count + 1)] == everything
    for reader in readers:
        assert await asyncio.wait_for(reader, 30) == everything
    assert await house.app[DATABASE].fetchval("SELECT count(*) FROM notifications") == count + 1


async def test_the_count_of_the_unread_is_right_after_a_crowd(house: House, ann: Client) -> None:
    await asyncio.gather(
        *(tell(house, ann, "x") for _ in range(60)),
        *(ann.post("/notifications/read", {"up_to_id": up_to}) for up_to in range(0, 60, 4)),
    )
    unread = len(await stored(ann, "&unread=true"))
    assert unread_on_page(await page(ann, "//notifications")) == unread
    assert await house.app[DATABASE].fetchval("SELECT unread FROM notification_counters") == unread


async def test_a_reader_who_does_not_read_is_dropped_and_others_are_not(house: House, ann: Client) -> None:
    slow = await ann.socket("/notifications/stream")
    quick = await ann.socket("/notifications/stream")
    assert slow._response.connection is not None
    transport = slow._response.connection.transport
    assert transport is not None
    transport.pause_reading()
    text = "x" * 500_000
    reading = asyncio.create_task(read_until(quick, 31))
    for _ in range(30):
        await tell(house, ann, "long", text)
    assert [frame["id"] for frame in await reading] == list(range(2, 32))
    sockets = house.app[NOTIFICATIONS]._streams._readers[UUID(ann.user["id"])]
    async with asyncio.timeout(10):
        while len(sockets) > 1:
            await asyncio.sleep(0.05)
    again = await ann.socket("/notifications/stream?since=1")
    assert [frame["id"] for frame in await read_until(again, 31)] == list(range(2, 32))


async def test_signing_out_closes_the_sessions_streams(house: House, ann: Client) -> None:
    stream = await ann.socket("/notifications/stream")
    credentials = {"email": ann.user["email"], "password": PASSWORD}
    other = Client(house, (await house.anyone.post("/auth/login", credentials)).json)
    others = await other.socket("/notifications/stream")
    assert (await ann.post("/auth/logout")).status == 204
    assert await code_of_close(stream) == 4401
    assert (await others.receive_json(timeout=5))["type"] == "hello"
    await tell(house, ann, "still here")
    assert (await read_until(others, 2))[0]["title"] == "still here"


async def test_a_stop_of_the_server_says_that_it_goes(house: House, ann: Client) -> None:
    stream = await ann.socket("/notifications/stream")
    closing = asyncio.create_task(code_of_close(stream))
    await house.restart()
    assert await closing == 1001
    again = await ann.socket("/notifications/stream?since=0")
    assert [frame["id"] for frame in await read_until(again, 1)] == [1]


async def test_the_oldest_stream_makes_room_for_one_too_many(ann: Client) -> None:
    streams = [await ann.socket("/notifications/stream") for _ in range(21)]
    assert await code_of_close(streams[0]) == 1008
    for stream in streams[1:]:
        assert (await stream.receive_json(timeout=5))["type"] == "hello"
    assert not any(stream.closed for stream in streams[1:])


async def test_a_reader_may_speak_a_little_and_is_not_answered(house: House, ann: Client) -> None:
    stream = await ann.socket("/notifications/stream")
    for _ in range(5):
        await stream.send_str("hello?")
    await tell(house, ann, "still here")
    assert [frame["id"] for frame in await read_until(stream, 2)] == [2]
    for _ in range(40):
        await stream.send_str("hello?")
    assert await code_of_close(stream) == 1008


async def test_what_a_reader_must_not_send_ends_the_stream(ann: Client) -> None:
    binary = await ann.socket("/notifications/stream")
    await binary.send_bytes(b"\x00")
    assert await code_of_close(binary) == 1003
    long = await ann.socket("/notifications/stream")
    await long.send_str("x" * 5000)
    assert await code_of_close(long) == 1009
    garbled = await ann.socket("/notifications/stream")
    await garbled.send_frame(b"\xff\xfe", aiohttp.WSMsgType.TEXT)
    assert await code_of_close(garbled) == 1007


async def cookie_of(house: House, client: Client) -> dict[str, str]:
    """The cookie of a browser that signs in."""
    form = {"email": client.user["email"], "password": PASSWORD}
    async with house.http.post(
        f"{house.url}/login", data=form, headers={"Origin": house.url}, allow_redirects=False
    ) as reply:
        return {"Cookie": f"cloudphone={reply.cookies['cloudphone'].value}"}


async def test_another_site_cannot_listen_in(house: House, ann: Client) -> None:
    cookie = await cookie_of(house, ann)
    for origin in ({"Origin": "https://evil.example"}, {"Origin": "null"}, {}):
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            await house.anyone.socket("/notifications/stream", headers={**cookie, **origin})
        assert refused.value.status == 403
    stream = await house.anyone.socket("/notifications/stream", headers={**cookie, "Origin": house.url})
    assert (await stream.receive_json(timeout=5))["type"] == "hello"


# Pages


async def page(client: Client, path: str) -> str:
    """A page's text."""
    reply: Reply = await client.get(path, headers=ENGLISH)
    assert reply.status == 200
    return reply.body.decode()


def unread_on_page(text: str) -> int:
    """What the bell shows."""
    return int(text.partition('data-unread="')[2].partition('"')[0])


async def test_pages_know_what_is_new_also_after_a_restart(house: House, ann: Client) -> None:
    for number in range(2, 9):
        await tell(house, ann, f"<news {number}>")
    await tell(house, ann, "")
    for _ in range(2):
        home = await page(ann, "//")
        assert unread_on_page(home) == 8
        assert 'data-since="9"' in home
        positions = [home.find(f"&lt;news {number}&gt;") for number in range(8, 1, -1)]
        assert positions[:5] == sorted(positions[:5])
        assert min(positions[:5]) > 0
        assert positions[5:] == [-1, -1], "five are enough"
        await house.restart()


async def test_the_inbox_is_newest_first_and_is_read_without_a_script(house: House, ann: Client) -> None:
    await tell(house, ann, "later")
    text = await page(ann, "//notifications")
    assert 0 < text.find("later") < text.find(HELLO)
    assert 'name="up_to_id" value="2"' in text
    cookie = await cookie_of(house, ann)
    async with house.http.get(f"{house.url}/notifications", headers=cookie) as shown:
        token = (await shown.text()).partition('name="csrf_token" value="')[2].partition('"')[0]
    for form, status in (({"up_to_id": "2"}, 403), ({"up_to_id": "x", "csrf_token": token}, 422),
                         ({"up_to_id": "2", "csrf_token": token}, 303)):  # fmt: skip
        headers = {**cookie, "Origin": house.url}
        async with house.http.post(
            f"{house.url}/notifications", data=form, headers=headers, allow_redirects=False
        ) as reply:
            assert reply.status == status
    assert unread_on_page(await page(ann, "//notifications")) == 0


async def test_what_is_too_old_is_deleted_and_numbers_go_on(house: House, ann: Client) -> None:
    for number in range(2, 5):
        await tell(house, ann, f"number {number}")
    await ann.post("/notifications/read", {"up_to_id": 1})
    await house.app[DATABASE].execute(
        "UPDATE notifications SET created_at = now() - interval '91 days' WHERE id IN (1, 2, 3)"
    )
    await house.app[NOTIFICATIONS].delete_old()
    assert [item["id"] for item in await stored(ann)] == [4]
    assert unread_on_page(await page(ann, "//notifications")) == 1
    stream = await ann.socket("/notifications/stream?since=0")
    await tell(house, ann, "number 5")
    assert [frame["id"] for frame in await read_until(stream, 5)] == [4, 5]
