"""What operators and programs ask of the host itself: health, readiness, metrics, the API's description."""

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

import orjson
from aiohttp import web

from server.api import API_PREFIX, Route
from server.auth import recognise
from server.config import Configuration
from server.interfaces import DATABASE, STORAGE
from server.observe import METRICS, metrics_response
from server.openapi import by_tag, describe
from server.pages import render, set_language
from server.plugin import Check, CheckFailed, Plugin

VERSION = "0.1.0"
CHECK_DEADLINE_S = 2.5


async def _ask_database(app: web.Application) -> None:
    await app[DATABASE].ping()


async def _ask_storage(app: web.Application) -> None:
    await app[STORAGE].ping()


CORE_CHECKS = (
    Check("database", _ask_database, "start PostgreSQL, or look into data_dir/logs"),
    Check("storage", _ask_storage, "start the S3 server, or look into data_dir/logs"),
)


@dataclass(frozen=True, slots=True)
class Finding:
    """What a check found: why it fails now, or None, what mends that, and what else is worth knowing."""

    failure: str | None
    mend: str = ""
    note: str = ""


def checks_of(plugins: Sequence[Plugin], configuration: Configuration) -> list[Check]:
    """The host's own checks and those of the plugins whose question arises in this configuration."""
    return [
        *CORE_CHECKS,
        *(
            check
            for plugin in plugins
            for check in plugin.checks
            if check.applies(configuration.section(plugin.name))
        ),
    ]


async def finding_of(app: web.Application, check: Check) -> Finding:
    """Ask a check, within its deadline."""
    try:
        async with asyncio.timeout(CHECK_DEADLINE_S):
            return Finding(None, note=await check.ask(app) or "")
    except Exception as error:
        mend = error.mend if isinstance(error, CheckFailed) else ""
        return Finding(why(error), mend or check.mend)


def why(error: Exception) -> str:
    """What an error says, in one line."""
    if isinstance(error, TimeoutError):
        return "no answer in time"
    return str(error).strip().partition("\n")[0] or type(error).__name__


def add_operations(app: web.Application, routes: Sequence[Route], checks: Sequence[Check]) -> None:
    """Route everything here."""
    document = describe(routes, VERSION)
    encoded = orjson.dumps(document)

    async def openapi(_request: web.Request) -> web.Response:
        return web.Response(body=encoded, content_type="application/json", charset="utf-8")

    async def docs(request: web.Request) -> web.Response:
        await recognise(request)
        return render(request, "docs.html", {"operations": by_tag(document), "version": VERSION})

    app.router.add_get("/healthz", _healthz)
    app.router.add_get("/readyz", _readyz([check for check in checks if check.in_readyz]))
    app.router.add_get("/metrics", _metrics)
    app.router.add_get(f"{API_PREFIX}/openapi.json", openapi)
    app.router.add_get("/api/docs", docs)
    app.router.add_post("/language", set_language)


async def _healthz(_request: web.Request) -> web.Response:
    return web.json_response({"status": "ok"})


async def _metrics(request: web.Request) -> web.Response:
    return metrics_response(request.app[METRICS])


def _readyz(checks: Sequence[Check]) -> Callable[[web.Request], Awaitable[web.Response]]:
    async def readyz(request: web.Request) -> web.Response:
        findings = await asyncio.gather(*(finding_of(request.app, check) for check in checks))
        parts: dict[str, Any] = {}
        for check, found in zip(checks, findings, strict=True):
            down = {"state": "down", "detail": found.failure}
            parts[check.name] = {"state": "ok"} if found.failure is None else down
        ready = all(found.failure is None for found in findings)
        return web.json_response(
            {"status": "ok" if ready else "down", "parts": parts},
            status=200 if ready else 503,
            headers={} if ready else {"Retry-After": "5"},
        )

    return readyz
