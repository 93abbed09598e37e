"""What a forwarded header may change, and from whom."""

from collections.abc import Awaitable, Callable
from ipaddress import ip_network
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient

from server.proxies import believing

Connect = Callable[[web.Application], Awaitable[TestClient[Any, Any]]]


async def who(request: web.Request) -> web.Response:
    """Say who calls, as the server sees it."""
    return web.json_response([request.remote, request.scheme, request.host])


async def seen(connect: Connect, network: str, headers: list[tuple[str, str]]) -> list[str]:
    """What the server sees of a call from loopback."""
    app = web.Application(middlewares=[believing([ip_network(network)])])
    app.router.add_get("/", who)
    client = await connect(app)
    reply = await client.get("/", headers=headers)
    return list(await reply.json())


@pytest.mark.parametrize(
    ("chain", "real"),
    [
        (["203.0.113.7"], "203.0.113.7"),
        (["1.2.3.4, 203.0.113.7"], "203.0.113.7"),
        (["1.2.3.4", "203.0.113.7, 127.0.0.9"], "203.0.113.7"),
        (["2001:db8::1"], "2001:db8::1"),
        (["<script>"], "127.0.0.1"),
        ([], "127.0.0.1"),
    ],
)
async def test_a_trusted_proxy_says_who_calls(aiohttp_client: Connect, chain: list[str], real: str) -> None:
    headers = [("X-Forwarded-For", link) for link in chain] + [("X-Forwarded-Proto", "https")]
    remote, scheme, _ = await seen(aiohttp_client, "127.0.0.0/8", headers)
    assert (remote, scheme) == (real, "https")


async def test_anybody_else_is_not_believed(aiohttp_client: Connect) -> None:
    headers = [
        ("X-Forwarded-For", "203.0.113.7"),
        ("X-Forwarded-Proto", "https"),
        ("X-Forwarded-Host", "evil"),
    ]
    remote, scheme, host = await seen(aiohttp_client, "10.0.0.0/8", headers)
    assert (remote, scheme) == ("127.0.0.1", "http")
    assert host != "evil"


async def test_a_scheme_that_is_none_is_ignored(aiohttp_client: Connect) -> None:
    headers = [("X-Forwarded-Proto", "gopher"), ("X-Forwarded-Host", "phones.example")]
    assert (await seen(aiohttp_client, "127.0.0.0/8", headers))[1:] == ["http", "phones.example"]
