"""Which payment providers are open: those whose section of config.toml is complete.

A provider's module is loaded where it is opened: their libraries are large, and most servers use one or none.
"""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web

from plugins.billing.model import BillingSection
from plugins.billing.providers import Provider
from plugins.billing.providers.sandbox import open_sandbox
from server.interfaces import CLOCK, CONFIGURATION
from server.observe import log
from server.plugin import Section

OPTIONAL: Final = frozenset({"api_url", "gateway_url"})


@dataclass(frozen=True)
class _Server:
    """What providers are opened on. `is_private`: only this machine reaches it."""

    app: web.Application
    billing: BillingSection
    http: aiohttp.ClientSession
    is_private: bool
    is_reachable: bool

    def takes(self, name: str, section: Section, *, currency: str = "") -> bool:
        """Whether a provider can be used; what a half configured one lacks is logged."""
        keys: dict[str, str] = section.model_dump(exclude=set(OPTIONAL))
        if not any(keys.values()):
            return False
        missing = [f"billing.providers.{name}.{key}" for key, value in keys.items() if not value]
        if not self.is_reachable:
            missing.append("server.public_url")
        if currency and self.billing.currency != currency:
            missing.append(f"billing.currency = {currency}")
        if missing:
            log.warning(
                "a payment provider stays closed", extra={"provider": name, "missing": ", ".join(missing)}
            )
        return not missing


@asynccontextmanager
async def open_providers(app: web.Application) -> AsyncIterator[Mapping[str, Provider]]:
    """The open providers by name, in the order of config.toml; one that is half configured is logged."""
    configuration = app[CONFIGURATION]
    billing = configuration.section("billing")
    assert isinstance(billing, BillingSection)
    # Behind a proxy, listening on loopback does not mean that only this machine can reach us.
    public_host = urlsplit(configuration.server.public_url).hostname
    is_private = _is_loopback(configuration.server.host) and _is_loopback(public_host or "localhost")
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()))
        server = _Server(app, billing, http, is_private, is_reachable=bool(public_host) or is_private)
        providers = [
            await _stripe(server),
            await _alipay(server),
            await _wechatpay(server, stack),
            await _sandbox(server),
        ]
        yield {provider.name: provider for provider in providers if provider is not None}


async def _stripe(server: _Server) -> Provider | None:
    section = server.billing.providers.stripe
    if not server.takes("stripe", section):
        return None
    from plugins.billing.providers.stripe import open_stripe

    currency, clock = server.billing.currency, server.app[CLOCK]
    return await asyncio.to_thread(open_stripe, section, currency, clock, server.http)


async def _alipay(server: _Server) -> Provider | None:
    section = server.billing.providers.alipay
    if not server.takes("alipay", section, currency="CNY"):
        return None
    from plugins.billing.providers.alipay import open_alipay

    return await asyncio.to_thread(open_alipay, section, server.app[CLOCK], server.http)


async def _wechatpay(server: _Server, stack: AsyncExitStack) -> Provider | None:
    section = server.billing.providers.wechatpay
    if not server.takes("wechatpay", section, currency="CNY"):
        return None
    from plugins.billing.providers.wechatpay import open_wechatpay

    return await stack.enter_async_context(open_wechatpay(section, server.app[CLOCK]))


async def _sandbox(server: _Server) -> Provider | None:
    secret = server.billing.providers.sandbox.secret
    return await asyncio.to_thread(
        open_sandbox, server.app, server.http, secret, is_private=server.is_private
    )


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
