"""Notifications: numbered and stored in the publisher's transaction, then streamed."""

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Final
from uuid import UUID

import orjson
from aiohttp import WSCloseCode, web

from plugins.notify.model import LARGEST_ID, Draft, Letter, ListQuery, NewNotification, Notification
from plugins.notify.streams import Streams
from server.api import Page, from_cursor, to_cursor, whole_number
from server.auth import Caller
from server.batch import Lane
from server.db import DatabaseUnavailable, Record, Tx
from server.errors import not_found
from server.i18n import pick_locale
from server.interfaces import CLOCK, DATABASE, DIRECTORY, SOCKETS, Message, Topic
from server.request_keys import CALLER
from server.sockets import until_closed

RECENT: Final = 5
RECENT_LOADED: Final = 20_000
STORED_AT_ONCE: Final = 5000
DELETED_AT_ONCE: Final = 5000


@dataclass(slots=True)
class _Inbox:
    """What pages show of a user's notifications. `revision` rises with each change of the row."""

    revision: int = 0
    last_id: int = 0
    unread: int = 0
    recent: tuple[Letter, ...] = ()


class Notifications:
    """Everything users were told. Provides the Notifier."""

    def __init__(self, app: web.Application, *, heartbeat_s: float, retention_days: int) -> None:
        self._heartbeat_s = heartbeat_s
        self._retention_days = retention_days
        self._database = app[DATABASE]
        self._directory = app[DIRECTORY]
        self._sockets = app[SOCKETS]
        self._clock = app[CLOCK]
        self._streams = Streams(self._after)
        self._inboxes: dict[UUID, _Inbox] = defaultdict(_Inbox)
        self._lane = Lane(self._send_batch)

    async def load(self) -> None:
        """Remember everybody's counters, and the latest notifications."""
        for row in await self._database.fetch(
            "SELECT user_id, revision, last_id, unread FROM notification_counters"
        ):
            self._note_counters(row)
        for row in await self._database.fetch(
            """
            SELECT user_id, id, topic, title, body, params, data, created_at, read_at
            FROM notifications WHERE title <> '' ORDER BY created_at DESC LIMIT $1
            """,
            RECENT_LOADED,
        ):
            self._note_letter(row["user_id"], Letter.of(row))

    async def close(self) -> None:
        """Finish what is being sent."""
        await self._lane.close()

    def _note_counters(self, row: Record) -> None:
        """Changes of one row may be heard of in another order than they were made."""
        inbox = self._inboxes[row["user_id"]]
        if row["revision"] > inbox.revision:
            inbox.revision, inbox.last_id, inbox.unread = row["revision"], row["last_id"], row["unread"]

    def _note_letter(self, user_id: UUID, letter: Letter) -> None:
        if letter.title:
            inbox = self._inboxes[user_id]
            newest_first: Sequence[Letter] = (letter, *inbox.recent)
            if inbox.recent and inbox.recent[0].id > letter.id:
                newest_first = sorted(newest_first, key=lambda recent: recent.id, reverse=True)
            inbox.recent = tuple(newest_first[:RECENT])

    def facts_of_page(self, request: web.Request) -> Mapping[str, object]:
        """What every page's header shows, and the overview's news."""
        caller: Caller | None = request.get(CALLER)
        if caller is None:
            return {}
        inbox = self._inboxes.get(caller.user_id, _Inbox())
        facts: dict[str, object] = {"unread": inbox.unread, "last_notification_id": inbox.last_id}
        if request.path == "/":
            locale = pick_locale(request)
            facts["recent_notifications"] = [letter.translated(locale) for letter in inbox.recent]
        return facts

    # Publishing

    async def publish(
        self,
        tx: Tx,
        user_id: UUID,
        topic: Topic,
        title: str,
        body: str,
        *,
        params: Mapping[str, object] | None = None,
        data: Mapping[str, object] | None = None,
    ) -> None:
        """Store a notification in the caller's transaction; it is streamed once that commits."""
        await self.broadcast(tx, (user_id,), topic, title, body, params=params, data=data)

    async def broadcast(
        self,
        tx: Tx,
        user_ids: Collection[UUID],
        topic: Topic,
        title: str,
        body: str,
        *,
        params: Mapping[str, object] | None = None,
        data: Mapping[str, object] | None = None,
    ) -> None:
        """The same to several users."""
        filled, given = dict(params or {}), dict(data or {})
        await self._store(tx, [Draft(user_id, topic, title, body, filled, given) for user_id in user_ids])

    async def publish_all(self, tx: Tx, messages: Sequence[Message]) -> None:
        """Different notifications, several for the same user too, in order."""
        if messages:
            drafts = [
                Draft(one.user_id, one.topic, one.title, one.body, one.params, one.data) for one in messages
            ]
            await self._store(tx, drafts)

    async def send(self, new: NewNotification) -> int:
        """Tell one user, or all, what an administrator wrote; how many that were.

        Raises Problem(not_found).
        """
        if new.user_id == "all":
            async with self._database.transaction() as tx:
                user_ids = sorted(await self._directory.everyone(tx))
                drafts = [_written(new, user_id) for user_id in user_ids]
                for start in range(0, len(drafts), STORED_AT_ONCE):
                    await self._store(tx, drafts[start : start + STORED_AT_ONCE])
            return len(drafts)
        if not await self._lane.do(_written(new, new.user_id)):
            raise not_found()
        return 1

    async def _send_batch(self, drafts: Sequence[Draft]) -> Sequence[bool]:
        """Store what can be; for each whether its user exists."""
        async with self._database.transaction() as tx:
            known = await self._directory.among(tx, {draft.user_id for draft in drafts})
            await self._store(tx, [draft for draft in drafts if draft.user_id in known])
        return [draft.user_id in known for draft in drafts]

    async def _store(self, tx: Tx, drafts: Sequence[Draft]) -> None:
        """Number and store in one statement; users' counters are locked in one order by all."""
        rows = await tx.fetch(
            """
            WITH draft AS (
                SELECT user_id, topic, title, body, params, data,
                    row_number() OVER (PARTITION BY user_id ORDER BY position) AS place
                FROM unnest($1::uuid[], $2::text[], $3::text[], $4::text[], $5::jsonb[], $6::jsonb[])
                    WITH ORDINALITY AS one (user_id, topic, title, body, params, data, position)
            ), counter AS (
                INSERT INTO notification_counters AS kept (user_id, last_id, unread, revision)
                SELECT user_id, count(*), count(*) FILTER (WHERE title <> ''), 1
                FROM draft GROUP BY user_id ORDER BY user_id
                ON CONFLICT (user_id) DO UPDATE SET last_id = kept.last_id + excluded.last_id,
                    unread = kept.unread + excluded.unread, revision = kept.revision + 1
                RETURNING user_id, last_id, unread, revision
            ), added AS (
                SELECT user_id, max(place) AS letters FROM draft GROUP BY user_id
            ), stored AS (
                INSERT INTO notifications (user_id, id, topic, title, body, params, data, read_at)
                SELECT user_id, last_id - letters + place, topic, title, body, params, data,
                    CASE WHEN title = '' THEN now() END
                FROM draft JOIN counter USING (user_id) JOIN added USING (user_id)
                RETURNING user_id, id, created_at, read_at
            )
            SELECT user_id, id, created_at, read_at, last_id, unread, revision
            FROM stored JOIN counter USING (user_id) ORDER BY user_id, id
            """,
            [draft.user_id for draft in drafts],
            [draft.topic.value for draft in drafts],
            [draft.title for draft in drafts],
            [draft.body for draft in drafts],
            [draft.params for draft in drafts],
            [draft.data for draft in drafts],
        )
        in_order = sorted(drafts, key=lambda draft: draft.user_id)  # of one user's, the first stays first
        tx.after_commit(partial(self._deliver, list(zip(in_order, rows, strict=True))))

    def _deliver(self, rows: Iterable[tuple[Draft, Record]]) -> None:
        for draft, row in rows:
            letter = draft.numbered(row["id"], row["created_at"], row["read_at"])
            self._note_counters(row)
            self._note_letter(draft.user_id, letter)
            self._streams.ring(draft.user_id, letter)

    # Reading

    async def page(self, caller: Caller, query: ListQuery, locale: str) -> Page[Notification]:
        """The caller's notifications, oldest first."""
        (position,) = from_cursor(query.cursor, whole_number) if query.cursor else (0,)
        letters = await self._database.fetch(
            """
            SELECT id, topic, title, body, params, data, created_at, read_at FROM notifications
            WHERE user_id = $1 AND id > $2 AND (read_at IS NULL OR NOT $3) ORDER BY id LIMIT $4
            """,
            caller.user_id,
            min(max(position, query.since), LARGEST_ID),
            query.unread,
            query.page_size + 1,
        )
        shown = letters[: query.page_size]
        more = to_cursor(shown[-1]["id"]) if len(letters) > len(shown) else None
        items = [Letter.of(row).translated(locale) for row in shown]
        return Page[Notification](items=items, next_cursor=more)

    async def newest(self, caller: Caller, limit: int, locale: str) -> list[Notification]:
        """What a person reads, newest first."""
        rows = await self._database.fetch(
            """
            SELECT id, topic, title, body, params, data, created_at, read_at FROM notifications
            WHERE user_id = $1 AND title <> '' ORDER BY id DESC LIMIT $2
            """,
            caller.user_id,
            limit,
        )
        return [Letter.of(row).translated(locale) for row in rows]

    async def mark_read(self, caller: Caller, up_to_id: int) -> None:
        """Everything up to this number was read."""
        row = await self._database.fetchrow(
            """
            WITH marked AS (
                UPDATE notifications SET read_at = now()
                WHERE user_id = $1 AND id <= $2 AND read_at IS NULL
                RETURNING id
            )
            UPDATE notification_counters SET revision = revision + 1,
                unread = unread - (SELECT count(*) FROM marked)
            WHERE user_id = $1
            RETURNING user_id, revision, last_id, unread
            """,
            caller.user_id,
            up_to_id,
        )
        if row is not None:
            self._note_counters(row)

    async def stream(self, request: web.Request, caller: Caller, since: int | None) -> web.WebSocketResponse:
        """Everything after `since`, then everything new, until the reader goes."""
        async with self._sockets.open(request, caller, heartbeat_s=self._heartbeat_s) as outbox:
            reader = self._streams.join(outbox, pick_locale(request))
            try:
                last_id = await self._last_id(caller.user_id)
                outbox.push(orjson.dumps({"type": "hello", "last_id": last_id}))
                self._streams.begin(reader, since, last_id)
            except DatabaseUnavailable:
                outbox.end(WSCloseCode.TRY_AGAIN_LATER, b"database away")
            try:
                await until_closed(outbox, self._clock)
            finally:
                await self._streams.leave(reader)
        return outbox.socket

    async def _last_id(self, user_id: UUID) -> int:
        """From the database: what was committed there counts, heard of or not."""
        last_id = await self._database.fetchval(
            "SELECT last_id FROM notification_counters WHERE user_id = $1", user_id
        )
        return int(last_id or 0)

    async def _after(self, user_id: UUID, id: int, limit: int) -> list[Letter]:
        rows = await self._database.fetch(
            """
            SELECT id, topic, title, body, params, data, created_at, read_at FROM notifications
            WHERE user_id = $1 AND id > $2 ORDER BY id LIMIT $3
            """,
            user_id,
            id,
            limit,
        )
        return [Letter.of(row) for row in rows]

    # Recurring

    async def delete_old(self) -> None:
        """Delete what is older than it is kept."""
        while await self._delete_some() == DELETED_AT_ONCE:
            pass

    async def _delete_some(self) -> int:
        async with self._database.transaction() as tx:
            rows = await tx.fetch(
                """
                DELETE FROM notifications WHERE (user_id, id) IN (
                    SELECT user_id, id FROM notifications
                    WHERE created_at < now() - make_interval(days => $1) LIMIT $2
                    FOR UPDATE SKIP LOCKED
                )
                RETURNING user_id, read_at
                """,
                self._retention_days,
                DELETED_AT_ONCE,
            )
            unread = [row["user_id"] for row in rows if row["read_at"] is None]
            counters = await tx.fetch(
                """
                WITH gone AS (
                    SELECT user_id, count(*) AS letters FROM unnest($1::uuid[]) AS one (user_id)
                    GROUP BY user_id
                ), locked AS (
                    SELECT user_id, letters FROM notification_counters AS kept JOIN gone USING (user_id)
                    ORDER BY user_id FOR UPDATE OF kept
                )
                UPDATE notification_counters AS kept
                SET unread = kept.unread - locked.letters, revision = kept.revision + 1
                FROM locked WHERE kept.user_id = locked.user_id
                RETURNING kept.user_id, kept.revision, kept.last_id, kept.unread
                """,
                unread,
            )
        for counter in counters:
            self._note_counters(counter)
        return len(rows)


def _written(new: NewNotification, user_id: UUID) -> Draft:
    """An administrator's own words, which are not translated."""
    return Draft(user_id, new.topic, new.title, new.body, None, new.data)
