"""Serving: bind, start, say so, wait for a signal, stop in order."""

import asyncio
import contextlib
import gc
import os
import resource
import signal
import socket
import sys
from collections.abc import Sequence

from aiohttp import web

from server.app import build
from server.config import Configuration
from server.db import DatabaseUnavailable, MigrationFault, SecondInstance
from server.embedded import EmbeddedFault
from server.interfaces import DATABASE
from server.observe import log
from server.plugin import Plugin, PluginFault
from server.storage import StorageUnavailable

YOUNG_OBJECTS = 50_000
"""After how many new objects the garbage among them is looked for."""

START_FAULTS = (
    DatabaseUnavailable,
    EmbeddedFault,
    MigrationFault,
    OSError,
    PluginFault,
    SecondInstance,
    StorageUnavailable,
)


async def serve(configuration: Configuration, plugins: Sequence[Plugin]) -> int:
    """Serve until SIGTERM or SIGINT; the exit code. A second signal ends the process at once."""
    try:
        listener = _bind(configuration)
    except OSError as error:
        section = configuration.server
        return _refuse(f"cannot listen on {section.host} port {section.port}: {error.strerror}")
    _allow_many_files()
    url = _url(listener)
    app = await asyncio.to_thread(build, configuration, plugins, own_url=lambda: url)
    runner = web.AppRunner(
        app, access_log=None, handle_signals=False, shutdown_timeout=configuration.server.shutdown_grace_s
    )
    stopping = _on_signals()
    try:
        await runner.setup()
        await web.SockSite(runner, listener, backlog=1024).start()
    except START_FAULTS as fault:
        await runner.cleanup()
        return _refuse(str(fault))
    _leave_alone_what_stays()
    _greet(configuration.server.public_url or url)
    lost = asyncio.create_task(app[DATABASE].claim_lost.wait())
    told = asyncio.create_task(stopping.wait())
    await asyncio.wait({lost, told}, return_when=asyncio.FIRST_COMPLETED)
    told.cancel()
    lost.cancel()
    await runner.cleanup()
    if app[DATABASE].claim_lost.is_set():
        return _refuse("another server took over the database")
    log.info("stopped")
    return 0


def _bind(configuration: Configuration) -> socket.socket:
    section = configuration.server
    family, kind, protocol, _, address = socket.getaddrinfo(
        section.host, section.port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
    )[0]
    listener = socket.socket(family, kind, protocol)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.setblocking(False)
    try:
        listener.bind(address)
    except OSError:
        listener.close()
        raise
    return listener


def _allow_many_files() -> None:
    """Sockets and phones take a file descriptor each; the usual soft limit of 1,024 is soon spent."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _leave_alone_what_stays() -> None:
    """Spare the garbage collector what was loaded at start: it would look at it for a tenth of our time."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(YOUNG_OBJECTS)


def _url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    reachable = {"::1": "[::1]", "0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, host)  # noqa: S104  (a lookup, no bind)
    return f"http://{reachable}:{port}"


def _on_signals() -> asyncio.Event:
    stopping = asyncio.Event()

    def stop() -> None:
        if stopping.is_set():
            os._exit(1)
        stopping.set()

    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, stop)
    return stopping


def _greet(url: str) -> None:
    print(
        f"Cloudphone is ready: {url}\n"
        "To become administrator, sign up there and then run: "
        "python -m server create-admin --email YOUR-ADDRESS",
        flush=True,
    )


def _refuse(reason: str) -> int:
    print(f"cloudphone: {reason}", file=sys.stderr, flush=True)
    return 1
