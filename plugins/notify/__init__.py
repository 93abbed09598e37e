"""Notifications: what users are told, stored first, then streamed.

Tables: `notification_counters`, `notifications`.

Invariants: a user's notifications are numbered 1, 2, 3 … without gaps, in the order in which they
commit: the number is taken under the lock of the user's counter, in the publisher's transaction. A
stream sends each number once and ascending. What is in memory (counters, the latest few, how far a
stream has come) never decides what a reader gets: a number that is missing is read from the table.
Words are stored as message and parameters and put into each reader's language when they are sent.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from aiohttp import web

from plugins.notify.model import NotifySection
from plugins.notify.room import Notifications
from plugins.notify.routes import NOTIFICATIONS, routes
from plugins.notify.schema import MIGRATIONS
from server.auth import AUTHENTICATOR
from server.db import Tx
from server.i18n import N_
from server.interfaces import CONFIGURATION, DIRECTORY, NOTIFIER, Topic, UserRegistered
from server.pages import PAGE_CONTEXT
from server.plugin import Job, Plugin


async def _greet(app: web.Application, tx: Tx, event: UserRegistered) -> None:
    await app[NOTIFIER].publish(
        tx,
        event.user_id,
        Topic.SYSTEM,
        N_("Welcome to Cloudphone"),
        N_("Rent a phone, and it is ready in a moment: then put your apps on it."),
    )


async def _delete_old(app: web.Application) -> None:
    await app[NOTIFICATIONS].delete_old()


@asynccontextmanager
async def lifespan(app: web.Application) -> AsyncIterator[None]:
    """Open the notifications, and remember the latest."""
    section = app[CONFIGURATION].section("notify")
    assert isinstance(section, NotifySection)
    room = Notifications(app, heartbeat_s=section.heartbeat_s, retention_days=section.retention_days)
    app[NOTIFICATIONS] = app[NOTIFIER] = room
    await room.load()
    app[PAGE_CONTEXT].append(room.facts_of_page)
    yield
    await room.close()


PLUGIN: Final = Plugin(
    name="notify",
    config=NotifySection,
    lifespan=lifespan,
    needs=(AUTHENTICATOR, DIRECTORY),
    provides=(NOTIFIER,),
    migrations=MIGRATIONS,
    routes=routes.declared,
    jobs=(Job("notify.delete_old", every_s=3600, deadline_s=60, run=_delete_old),),
    listens={UserRegistered: _greet},
)
