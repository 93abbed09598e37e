"""Events: what a plugin tells those to its right, inside the transaction of what it reports."""

from collections import defaultdict
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from aiohttp import web

from server.db import Tx

Listener = Callable[[web.Application, Tx, Any], Awaitable[None]]


class Events:
    """Delivers each event to its listeners in plugin order; a listener that raises undoes it all."""

    def __init__(self, app: web.Application, listens: Iterable[Mapping[type[object], Listener]]) -> None:
        self._app = app
        self._listeners: dict[type[object], list[Listener]] = defaultdict(list)
        for listeners in listens:
            for event_type, listener in listeners.items():
                self._listeners[event_type].append(listener)

    async def publish(self, tx: Tx, event: object) -> None:
        """Run every listener within the publisher's transaction: rows only, no outside effects."""
        for listener in self._listeners[type(event)]:
            await listener(self._app, tx, event)
