"""Which payment providers are open: those whose section of config.toml is complete."""

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from ipaddress import ip_address
from typing import Final
from urllib.parse import urlsplit

import aiohttp
from aiohttp import web

from plugins.billing.model import BillingSection
from plugins.billing.providers import Provider
from plugins.billing.providers.sandbox import open_sandbox
from plugins.billing.providers.wechatpay import open_wechatpay
from server.interfaces import CLOCK, CONFIGURATION
from server.observe import log
from server.plugin import Section

OPTIONAL: Final = frozenset({"api_url", "gateway_url"})


@asynccontextmanager
async def open_providers(app: web.Application) -> AsyncIterator[Mapping[str, Provider]]:
    """The open providers by name, in the order of config.toml; one that is half configured is logged."""
    configuration = app[CONFIGURATION]
    section = configuration.section("billing")
    assert isinstance(section, BillingSection)
    # Behind a proxy, listening on loopback does not mean that only this machine can reach us.
    public_host = urlsplit(configuration.server.public_url).hostname
    is_private = _is_loopback(configuration.server.host) and _is_loopback(public_host or "localhost")
    is_reachable = bool(public_host) or is_private
    async with AsyncExitStack() as stack:
        http = await stack.enter_async_context(aiohttp.ClientSession(cookie_jar=aiohttp.DummyCookieJar()))
        providers: list[Provider] = []
        wechatpay = section.providers.wechatpay
        if _is_complete(
            "wechatpay", wechatpay, section.currency, needs_currency="CNY", is_reachable=is_reachable
        ) and (wallet := await stack.enter_async_context(open_wechatpay(wechatpay, app[CLOCK]))):
            providers.append(wallet)
        sandbox = await asyncio.to_thread(
            open_sandbox, app, http, section.providers.sandbox.secret, is_private=is_private
        )
        if sandbox:
            providers.append(sandbox)
        yield {provider.name: provider for provider in providers}


def _is_complete(
    name: str, section: Section, currency: str, *, needs_currency: str, is_reachable: bool
) -> bool:
    """Whether a provider can be used; what is missing of one that somebody began to configure is logged."""
    keys: dict[str, str] = section.model_dump(exclude=set(OPTIONAL))
    if not any(keys.values()):
        return False
    missing = [f"billing.providers.{name}.{key}" for key, value in keys.items() if not value]
    if not is_reachable:
        missing.append("server.public_url")
    if needs_currency and currency != needs_currency:
        missing.append(f"billing.currency = {needs_currency}")
    if missing:
        log.warning(
            "a payment provider stays closed", extra={"provider": name, "missing": ", ".join(missing)}
        )
    return not missing


def _is_loopback(host: str) -> bool:
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
