"""The library: uploads, what is known of each app, icons and downloads."""

import asyncio
import hashlib
from pathlib import Path
from typing import Final
from uuid import UUID
from xml.sax.saxutils import escape

from aiohttp import web

from phones.apk import ApkFacts, InvalidApk, inspect
from plugins.apps.model import App, AppsSection
from plugins.apps.refusals import REFUSALS
from server.api import Page, PageQuery, from_cursor, moment, to_cursor
from server.auth import Caller
from server.db import Record, UniqueViolation
from server.errors import Code, Problem, not_found
from server.files import ReceivedFile, empty_folder, read_file, receive_file, send_object
from server.i18n import N_
from server.interfaces import CONFIGURATION, DATA_DIR, DATABASE, STORAGE
from server.storage import ObjectMissing

APK_TYPE: Final = "application/vnd.android.package-archive"


def object_key(app_id: UUID) -> str:
    """Where an app's APK is in the storage."""
    return f"apps/{app_id}.apk"


def _icon_key(app_id: UUID) -> str:
    return f"apps/{app_id}.png"


class Library:
    """The apps people uploaded: rows here, APKs and icons in the storage."""

    def __init__(self, app: web.Application) -> None:
        section = app[CONFIGURATION].section("apps")
        assert isinstance(section, AppsSection)
        self.max_upload_mb = section.max_upload_mb
        self._database = app[DATABASE]
        self._storage = app[STORAGE]
        self._uploads = app[DATA_DIR] / "uploads"

    async def reconcile(self) -> None:
        """Sweep what a dead process left half done."""
        await asyncio.to_thread(empty_folder, self._uploads)
        rows = await self._database.fetch("SELECT id FROM apps WHERE state IN ('uploading', 'deleting')")
        for row in rows:
            await self._erase(row["id"])
        await self._storage.abort_stale_uploads(0)

    async def upload(self, caller: Caller, request: web.Request, app_id: UUID) -> tuple[App, bool]:
        """Take the file of a multipart body; the app, and whether it is new to the caller.

        Raises Problem: malformed, unsupported_media_type, too_large, invalid_apk.
        """
        await self._database.execute(
            "INSERT INTO apps (id, owner_id, state) VALUES ($1, $2, 'uploading') ON CONFLICT (id) DO NOTHING",
            app_id,
            caller.user_id,
        )
        spool = self._uploads / f"{app_id}.apk"
        try:
            received = await receive_file(request, spool, limit_mb=self.max_upload_mb)
            if known := await self._same_bytes(caller.user_id, received.sha256):
                return known, False
            facts = await _facts(spool)
            await self._storage.upload(object_key(app_id), read_file(spool), APK_TYPE)
            if facts.icon_png:
                await self._storage.put(_icon_key(app_id), facts.icon_png, "image/png")
            return await self._shelve(caller.user_id, app_id, facts, received)
        finally:
            await self._clear_away(app_id, spool)

    async def _shelve(
        self, owner_id: UUID, app_id: UUID, facts: ApkFacts, received: ReceivedFile
    ) -> tuple[App, bool]:
        try:
            row = await self._database.fetchrow(
                """
                UPDATE apps SET state = 'ready', package = $2, label = $3, version_name = $4,
                    version_code = $5, min_sdk = $6, target_sdk = $7, permissions = $8, has_icon = $9,
                    size_bytes = $10, sha256 = $11
                WHERE id = $1 AND state = 'uploading'
                RETURNING id, owner_id, package, label, version_name, version_code, min_sdk, target_sdk,
                    permissions, size_bytes, sha256, created_at
                """,
                app_id,
                facts.package,
                facts.label,
                facts.version_name,
                facts.version_code,
                facts.min_sdk,
                facts.target_sdk,
                facts.permissions,
                facts.icon_png is not None,
                received.size_bytes,
                received.sha256,
            )
        except UniqueViolation:
            known = await self._same_bytes(owner_id, received.sha256)
            assert known is not None
            return known, False
        assert row is not None
        return _app(row), True

    async def _same_bytes(self, owner_id: UUID, sha256: str) -> App | None:
        row = await self._database.fetchrow(
            """
            SELECT id, owner_id, package, label, version_name, version_code, min_sdk, target_sdk,
                permissions, size_bytes, sha256, created_at
            FROM apps WHERE owner_id = $1 AND sha256 = $2 AND state = 'ready'
            """,
            owner_id,
            sha256,
        )
        return _app(row) if row else None

    async def _clear_away(self, app_id: UUID, spool: Path) -> None:
        await asyncio.to_thread(spool.unlink, missing_ok=True)
        state = await self._database.fetchval("SELECT state FROM apps WHERE id = $1", app_id)
        if state == "uploading":
            await self._erase(app_id)

    async def _erase(self, app_id: UUID) -> None:
        await self._storage.delete(object_key(app_id))
        await self._storage.delete(_icon_key(app_id))
        await self._database.execute("DELETE FROM apps WHERE id = $1 AND state <> 'ready'", app_id)

    async def page(self, caller: Caller, query: PageQuery) -> Page[App]:
        """The caller's apps, newest first."""
        created_at, last_id = from_cursor(query.cursor, moment, UUID) if query.cursor else (None, None)
        rows = await self._database.fetch(
            """
            SELECT id, owner_id, package, label, version_name, version_code, min_sdk, target_sdk,
                permissions, size_bytes, sha256, created_at
            FROM apps
            WHERE owner_id = $1 AND state = 'ready'
                AND ($2::timestamptz IS NULL OR (created_at, id) < ($2, $3::uuid))
            ORDER BY created_at DESC, id DESC LIMIT $4
            """,
            caller.user_id,
            created_at,
            last_id,
            query.page_size + 1,
        )
        shown = rows[: query.page_size]
        more = (
            to_cursor(shown[-1]["created_at"].isoformat(), str(shown[-1]["id"]))
            if len(rows) > len(shown)
            else None
        )
        return Page[App](items=[_app(row) for row in shown], next_cursor=more)

    async def get(self, caller: Caller, app_id: UUID) -> App:
        """The caller's app; administrators see every app. Raises Problem(not_found)."""
        row = await self._database.fetchrow(
            """
            SELECT id, owner_id, package, label, version_name, version_code, min_sdk, target_sdk,
                permissions, size_bytes, sha256, created_at
            FROM apps WHERE id = $1 AND (owner_id = $2 OR $3) AND state = 'ready'
            """,
            app_id,
            caller.user_id,
            caller.is_admin,
        )
        if row is None:
            raise not_found()
        return _app(row)

    async def delete(self, caller: Caller, app_id: UUID) -> None:
        """Throw an app away. Raises Problem: not_found, invalid_state while it is being installed."""
        async with self._database.transaction() as tx:
            found = await tx.fetchval(
                """
                SELECT EXISTS (
                    SELECT FROM installations WHERE app_id = apps.id AND state IN ('queued', 'installing')
                ) FROM apps WHERE id = $1 AND (owner_id = $2 OR $3) AND state = 'ready' FOR UPDATE
                """,
                app_id,
                caller.user_id,
                caller.is_admin,
            )
            if found is None:
                raise not_found()
            if found:
                raise Problem(
                    Code.INVALID_STATE, N_("The app is being installed on a phone; try again then.")
                )
            await tx.execute("UPDATE apps SET state = 'deleting' WHERE id = $1", app_id)
        await self._erase(app_id)

    async def icon(self, caller: Caller, app_id: UUID) -> web.Response:
        """The app's icon, or a drawn letter where it has no picture we can show."""
        app = await self.get(caller, app_id)
        headers = {"Cache-Control": "private, max-age=86400"}
        try:
            picture = await self._storage.get(_icon_key(app_id))
        except ObjectMissing:
            return web.Response(text=_letter_icon(app.label), content_type="image/svg+xml", headers=headers)
        return web.Response(body=picture, content_type="image/png", headers=headers)

    async def download(self, caller: Caller, app_id: UUID, request: web.Request) -> web.StreamResponse:
        """Stream the APK, or the part of it that a Range header asks for."""
        app = await self.get(caller, app_id)
        return await send_object(
            request,
            self._storage,
            object_key(app_id),
            size_bytes=app.size_bytes,
            media=APK_TYPE,
            filename=f"{app.label}-{app.version_name or app.version_code or ''}.apk",
        )


LIBRARY: Final = web.AppKey("LIBRARY", Library)


def _app(row: Record) -> App:
    return App(**{name: row[name] for name in App.model_fields})


async def _facts(spool: Path) -> ApkFacts:
    try:
        facts = await inspect(spool)
    except InvalidApk as error:
        raise Problem(Code.INVALID_APK, error.message, **error.params) from None
    if facts.split:
        raise Problem(Code.INVALID_APK, REFUSALS["INSTALL_FAILED_MISSING_SPLIT"])
    return facts


def _letter_icon(label: str) -> str:
    letter = escape(next((character for character in label if character.isalnum()), "?").upper())
    hue = int.from_bytes(hashlib.sha256(label.encode()).digest()[:2]) % 360
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 96 96">'
        f'<rect width="96" height="96" rx="22" fill="hsl({hue} 45% 42%)"/>'
        '<text x="48" y="50" fill="white" font-family="sans-serif" font-size="48" font-weight="600"'
        f' text-anchor="middle" dominant-baseline="central">{letter}</text></svg>'
    )
