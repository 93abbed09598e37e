"""One web.Application from a configuration and plugins: doors, plugins, routes, jobs, in this order.

Everything that starts is a cleanup context, so that a stop is the exact reverse and a failed start
closes what had opened.
"""

import asyncio
import hashlib
import os
import socket
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import aiohttp_session
from aiohttp import web
from aiohttp_session.cookie_storage import EncryptedCookieStorage

from server import idempotency
from server.answers import answer_problems, note_begun
from server.api import MAX_JSON_BYTES, endpoint
from server.auth import PUBLIC_ORIGIN
from server.clock import Clock, Randomness, SystemClock, SystemRandomness
from server.config import Configuration
from server.db import Database, SecondInstance, answers
from server.embedded import DataDirLock
from server.embedded_postgres import EmbeddedPostgres, known_url
from server.embedded_storage import EmbeddedStorage
from server.events import Events
from server.idempotency import IDEMPOTENCY, Idempotency
from server.interfaces import (
    CLOCK,
    CONFIGURATION,
    DATA_DIR,
    DATABASE,
    EVENTS,
    JOBS,
    OWN_URL,
    RANDOMNESS,
    SECRET_KEY,
    SOCKETS,
    STORAGE,
)
from server.jobs import Jobs
from server.observe import METRICS, Metrics, mark_answer, observing, watch_loop_lag
from server.operations import add_operations, checks_of
from server.pages import setup_pages
from server.plugin import Job, Plugin, PluginFault
from server.proxies import believing
from server.secret import kept_secret
from server.sockets import Sockets
from server.storage import Storage

COOKIE_MAX_AGE_S = 30 * 24 * 3600


def build(
    configuration: Configuration,
    plugins: Sequence[Plugin],
    *,
    own_url: Callable[[], str],
    clock: Clock | None = None,
    randomness: Randomness | None = None,
) -> web.Application:
    """The application, not yet started. `own_url` says where it listens, once it does. Blocks briefly."""
    clock, randomness = clock or SystemClock(), randomness or SystemRandomness()
    metrics = Metrics()
    section = configuration.server
    section.data_dir.mkdir(parents=True, exist_ok=True)
    secret_key = kept_secret(section.data_dir, "server", randomness, section.secret_key)
    app = web.Application(
        client_max_size=MAX_JSON_BYTES,
        middlewares=[
            believing(section.trusted_proxies),
            observing(metrics, clock, randomness),
            aiohttp_session.session_middleware(_cookie_storage(configuration, secret_key)),
            answer_problems,
        ],
    )
    app[CONFIGURATION] = configuration
    app[DATA_DIR] = section.data_dir
    app[SECRET_KEY] = secret_key
    app[CLOCK], app[RANDOMNESS], app[METRICS] = clock, randomness, metrics
    app[OWN_URL] = own_url
    app[PUBLIC_ORIGIN] = _origin(section.public_url)
    app[SOCKETS] = Sockets(metrics)
    app[JOBS] = Jobs(app, clock, metrics, grace_s=section.shutdown_grace_s)
    app[EVENTS] = Events(app, [plugin.listens for plugin in plugins])
    setup_pages(app)
    app.cleanup_ctx.append(_doors)
    for plugin in plugins:
        app.cleanup_ctx.append(_started(plugin))
    app.cleanup_ctx.append(_jobs(plugins))
    _add_routes(app, plugins)
    app.on_response_prepare.append(mark_answer)
    app.on_response_prepare.append(note_begun)
    app.on_shutdown.append(_close_sockets)
    return app


def _cookie_storage(configuration: Configuration, secret_key: str) -> EncryptedCookieStorage:
    key = hashlib.sha256(b"session cookie" + secret_key.encode()).digest()
    secure = configuration.server.public_url.startswith("https://")
    return EncryptedCookieStorage(
        key,
        cookie_name="__Host-cloudphone" if secure else "cloudphone",
        max_age=COOKIE_MAX_AGE_S,
        httponly=True,
        secure=secure,
        samesite="Lax",
    )


def _origin(public_url: str) -> str:
    parts = urlsplit(public_url)
    return f"{parts.scheme}://{parts.netloc}" if public_url else ""


def _add_routes(app: web.Application, plugins: Sequence[Plugin]) -> None:
    routes = [route for plugin in plugins for route in plugin.routes]
    for route in routes:
        app.router.add_route(route.method, route.path, endpoint(route))
    add_operations(app, routes, checks_of(plugins, app[CONFIGURATION]))


async def _doors(app: web.Application) -> AsyncIterator[None]:
    """The database and the storage, embedded ones started first; this process alone may use them."""
    async with AsyncExitStack() as stack:
        lock = DataDirLock(app[DATA_DIR])
        await asyncio.to_thread(lock.acquire, app[OWN_URL]())
        stack.callback(lock.release)
        opened = await asyncio.gather(
            _open_database(app, stack), _open_storage(app, stack), return_exceptions=True
        )
        for outcome in opened:
            if isinstance(outcome, BaseException):
                raise outcome
        database = app[DATABASE]
        await database.migrate("server", idempotency.MIGRATIONS)
        app[IDEMPOTENCY] = Idempotency(database, app[RANDOMNESS])
        yield


async def _open_database(app: web.Application, stack: AsyncExitStack) -> None:
    configuration = app[CONFIGURATION]
    url = configuration.database.url
    if not url:
        postgres = EmbeddedPostgres(app[DATA_DIR])
        url = await postgres.start()
        stack.push_async_callback(postgres.stop)
    app[DATABASE] = database = await Database.open(url)
    stack.push_async_callback(database.close)
    await database.claim(f"pid {os.getpid()} on {socket.gethostname()}, {app[OWN_URL]()}")


async def _open_storage(app: web.Application, stack: AsyncExitStack) -> None:
    section = app[CONFIGURATION].storage
    endpoint_url, access_key, secret_key = section.endpoint_url, section.access_key, section.secret_key
    if not endpoint_url:
        server = EmbeddedStorage(app[DATA_DIR])
        access = await server.start()
        endpoint_url, access_key, secret_key = access.endpoint_url, access.access_key, access.secret_key
        stack.push_async_callback(server.stop)
    app[STORAGE] = storage = await Storage.open(
        endpoint_url, section.bucket, access_key, secret_key, section.region
    )
    stack.push_async_callback(storage.close)


def _started(plugin: Plugin) -> Callable[[web.Application], AsyncIterator[None]]:
    async def start(app: web.Application) -> AsyncIterator[None]:
        await app[DATABASE].migrate(plugin.name, plugin.migrations)
        async with plugin.lifespan(app):
            for key in plugin.provides:
                if key not in app:
                    raise PluginFault(f"plugin {plugin.name!r} did not provide {key}")
            yield

    return start


def _jobs(plugins: Sequence[Plugin]) -> Callable[[web.Application], AsyncIterator[None]]:
    async def run(app: web.Application) -> AsyncIterator[None]:
        jobs = app[JOBS]
        await jobs.loop("server.watch_loop_lag", watch_loop_lag(app[METRICS], app[CLOCK]))
        await jobs.repeat("server.forget_idempotency_keys", 3600, 30, _forget_old_keys)
        for plugin in plugins:
            section = app[CONFIGURATION].section(plugin.name)
            for job in plugin.jobs:
                await jobs.repeat(job.name, _interval(job, section), job.deadline_s, job.run)
        yield
        await jobs.close()

    return run


def _interval(job: Job, section: Any) -> float:
    return job.every_s(section) if callable(job.every_s) else job.every_s


async def _forget_old_keys(app: web.Application) -> None:
    await app[IDEMPOTENCY].forget_old()


async def _own_url(stack: AsyncExitStack, data_dir: Path) -> str:
    """The private PostgreSQL of a running server, or one started for as long as the stack is open."""
    lock = DataDirLock(data_dir)
    try:
        await asyncio.to_thread(lock.acquire, "a command line")
    except SecondInstance:
        url = await asyncio.to_thread(known_url, data_dir)
        if url is None or not await answers(url):
            raise
        return url
    stack.callback(lock.release)
    postgres = EmbeddedPostgres(data_dir)
    stack.push_async_callback(postgres.stop)
    return await postgres.start()


@asynccontextmanager
async def open_beside(configuration: Configuration) -> AsyncIterator[Database]:
    """The database for a command line, whether a server runs on it or not."""
    async with AsyncExitStack() as stack:
        url = configuration.database.url or await _own_url(stack, configuration.server.data_dir)
        database = await Database.open(url)
        stack.push_async_callback(database.close)
        yield database


async def _close_sockets(app: web.Application) -> None:
    await app[SOCKETS].close_all()
