"""The HTTP API of notifications, their stream, and the inbox."""

from typing import Final
from uuid import UUID

from aiohttp import web

from plugins.notify.model import (
    Accepted,
    ListQuery,
    NewNotification,
    Notification,
    ReadForm,
    ReadUpTo,
    StreamQuery,
)
from plugins.notify.room import Notifications
from server.api import Page, Routes
from server.auth import Access, Caller
from server.forms import submit
from server.i18n import pick_locale
from server.pages import render

SHOWN: Final = 100

NOTIFICATIONS: Final = web.AppKey("NOTIFICATIONS", Notifications)
routes: Final = Routes("notify")


@routes.api("GET", "/notifications", access=Access.USER)
async def list_notifications(request: web.Request, caller: Caller, query: ListQuery) -> Page[Notification]:
    """One's notifications after `since`, oldest first; with `unread=true` only the unread ones."""
    return await request.app[NOTIFICATIONS].page(caller, query, pick_locale(request))


@routes.api("POST", "/notifications/read", access=Access.USER)
async def read(request: web.Request, caller: Caller, body: ReadUpTo) -> None:
    """Mark as read everything up to a number."""
    await request.app[NOTIFICATIONS].mark_read(caller, body.up_to_id)


@routes.api("POST", "/notifications", access=Access.ADMIN, status=202)
async def send(request: web.Request, body: NewNotification, new_id: UUID) -> Accepted:
    """Tell one user or all of them something, in the words given."""
    return Accepted(recipients=await request.app[NOTIFICATIONS].send(body))


@routes.socket("/notifications/stream", access=Access.USER)
async def stream(request: web.Request, caller: Caller, query: StreamQuery) -> web.WebSocketResponse:
    """Notifications as they happen, as JSON in text frames.

    First `{"type": "hello", "last_id"}`, then every notification after `since`, then new ones, each
    `{"type": "notification", …}`. Come back with the last `id` seen and nothing is missed or doubled.
    """
    return await request.app[NOTIFICATIONS].stream(request, caller, query.since)


@routes.page("GET", "/notifications", access=Access.USER)
async def inbox_page(request: web.Request, caller: Caller) -> web.Response:
    """The inbox."""
    newest = await request.app[NOTIFICATIONS].newest(caller, SHOWN, pick_locale(request))
    return render(request, "notifications/index.html", {"notifications": newest})


@routes.page("POST", "/notifications", access=Access.USER)
async def read_form(request: web.Request, caller: Caller) -> web.StreamResponse:
    """Mark as read what the inbox showed."""
    room = request.app[NOTIFICATIONS]

    async def act(form: ReadForm) -> str:
        await room.mark_read(caller, form.up_to_id)
        return "/notifications"

    context = {"notifications": await room.newest(caller, SHOWN, pick_locale(request))}
    return await submit(request, ReadForm, act, "notifications/index.html", context)
