"""Apps: the APKs people upload, and their installation on phones.

Tables: `apps`, `installations`.

Invariants: a row in state `ready` has its object in the storage, of the size and SHA-256 it says; an
upload that ended in any other way leaves no temporary file, object or row (the row is written before
the first byte and swept at start). One account holds the same bytes once. A phone has at most one
installation under way; each ends as `installed` or `failed`, also across a restart.
"""

import asyncio
import hashlib
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Final
from uuid import UUID
from xml.sax.saxutils import escape

from aiohttp import web
from pydantic import Field, RootModel

from phones import packages
from phones.adb import AdbFault, InstallRefused
from phones.apk import ApkFacts, InvalidApk, inspect
from server.api import Answer, Incoming, Moment, Outgoing, Page, PageQuery, Routes, from_cursor, to_cursor
from server.auth import Access, Caller
from server.db import Database, Record, Tx, UniqueViolation
from server.errors import Code, Problem, not_found
from server.files import ReceivedFile, empty_folder, read_file, receive_file, send_object
from server.i18n import N_
from server.interfaces import (
    CONFIGURATION,
    DATA_DIR,
    DATABASE,
    JOBS,
    NOTIFIER,
    PHONES,
    STORAGE,
    DeviceDeleted,
    DeviceStopped,
    PhoneLink,
    Topic,
)
from server.observe import log
from server.pages import render
from server.plugin import Job, Plugin, Section
from server.storage import ObjectMissing, Storage

APK_TYPE: Final = "application/vnd.android.package-archive"
INSTALL_JOB: Final = "apps.install"
INSTALLS_AT_ONCE: Final = 8
INSTALL_DEADLINE_S: Final = 600.0


class AppsSection(Section):
    """[apps]"""

    max_upload_mb: Annotated[int, Field(ge=1, le=65536)] = 4096


class InstallationState(StrEnum):
    """How far an installation is."""

    QUEUED = "queued"
    INSTALLING = "installing"
    INSTALLED = "installed"
    FAILED = "failed"


class App(Outgoing):
    """An uploaded APK."""

    id: UUID
    owner_id: UUID
    package: str
    label: str
    version_name: str | None
    version_code: int | None
    min_sdk: int | None
    target_sdk: int | None
    permissions: list[str]
    size_bytes: int
    sha256: str
    created_at: Moment


class NewInstallation(Incoming):
    """Which app to install."""

    app_id: UUID


class Installation(Outgoing):
    """An app's way onto a phone."""

    id: UUID
    device_id: UUID
    app_id: UUID
    package: str
    state: InstallationState
    detail: str
    created_at: Moment
    updated_at: Moment


class InstalledApp(Outgoing):
    """What the phone itself says is installed."""

    package: str
    version_name: str | None
    version_code: int | None


class InstalledApps(RootModel[list[InstalledApp]]):
    """Everything people installed on one phone."""


MIGRATIONS: Final = (
    """
    CREATE TABLE apps (
        id           uuid PRIMARY KEY,
        owner_id     uuid NOT NULL REFERENCES users (id),
        state        text NOT NULL CHECK (state IN ('uploading', 'ready', 'deleting')),
        package      text NOT NULL DEFAULT '',
        label        text NOT NULL DEFAULT '',
        version_name text,
        version_code bigint,
        min_sdk      integer,
        target_sdk   integer,
        permissions  text[] NOT NULL DEFAULT '{}',
        has_icon     boolean NOT NULL DEFAULT false,
        size_bytes   bigint NOT NULL DEFAULT 0,
        sha256       text NOT NULL DEFAULT '',
        created_at   timestamptz NOT NULL DEFAULT now()
    );
    CREATE UNIQUE INDEX apps_same_bytes ON apps (owner_id, sha256) WHERE state = 'ready';
    CREATE INDEX apps_newest ON apps (owner_id, created_at DESC, id);
    CREATE TABLE installations (
        id         uuid PRIMARY KEY,
        device_id  uuid NOT NULL,
        owner_id   uuid NOT NULL REFERENCES users (id),
        app_id     uuid NOT NULL REFERENCES apps (id) ON DELETE CASCADE,
        package    text NOT NULL,
        state      text NOT NULL CHECK (state IN ('queued', 'installing', 'installed', 'failed')),
        detail     text NOT NULL DEFAULT '',
        created_at timestamptz NOT NULL DEFAULT now(),
        updated_at timestamptz NOT NULL DEFAULT now()
    );
    CREATE INDEX installations_of_device ON installations (device_id, created_at DESC);
    CREATE INDEX installations_of_app ON installations (app_id);
    CREATE INDEX installations_open ON installations (created_at) WHERE state IN ('queued', 'installing');
    CREATE UNIQUE INDEX installations_one_at_a_time ON installations (device_id) WHERE state = 'installing';
    """,
)

REFUSALS: Final = {
    "INSTALL_FAILED_OLDER_SDK": N_("The app needs a newer Android than this phone has."),
    "INSTALL_FAILED_VERSION_DOWNGRADE": N_("The phone has a newer version of this app."),
    "INSTALL_FAILED_NO_MATCHING_ABIS": N_("The app is built for another kind of processor."),
    "INSTALL_FAILED_MISSING_SPLIT": N_("This file is only a part of an app and cannot be installed alone."),
    "INSTALL_FAILED_INSUFFICIENT_STORAGE": N_("The phone has too little free space."),
    "INSTALL_FAILED_UPDATE_INCOMPATIBLE": N_(
        "The phone has this app with another signature; uninstall it first."
    ),
}


def _object_key(app_id: UUID) -> str:
    return f"apps/{app_id}.apk"


def _icon_key(app_id: UUID) -> str:
    return f"apps/{app_id}.png"


class Apps:
    """The library and the queue of installations."""

    def __init__(self, app: web.Application) -> None:
        section = app[CONFIGURATION].section("apps")
        assert isinstance(section, AppsSection)
        self.max_upload_mb = section.max_upload_mb
        self._app = app
        self._database: Database = app[DATABASE]
        self._storage: Storage = app[STORAGE]
        self._uploads = app[DATA_DIR] / "uploads"
        self._busy: set[UUID] = set()  # devices with an installation of this process under way

    async def reconcile(self) -> None:
        """Sweep what a dead process left half done, and take up its installations again."""
        await asyncio.to_thread(empty_folder, self._uploads)
        rows = await self._database.fetch("SELECT id FROM apps WHERE state IN ('uploading', 'deleting')")
        for row in rows:
            await self._erase(row["id"])
        await self._storage.abort_stale_uploads(0)
        await self._database.execute(
            "UPDATE installations SET state = 'queued', updated_at = now() WHERE state = 'installing'"
        )

    # The library

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
            await self._storage.upload(_object_key(app_id), read_file(spool), APK_TYPE)
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
        await self._storage.delete(_object_key(app_id))
        await self._storage.delete(_icon_key(app_id))
        await self._database.execute("DELETE FROM apps WHERE id = $1 AND state <> 'ready'", app_id)

    async def page(self, caller: Caller, query: PageQuery) -> Page[App]:
        """The caller's apps, newest first."""
        created_at, last_id = from_cursor(query.cursor, str, UUID) if query.cursor else (None, None)
        rows = await self._database.fetch(
            """
            SELECT id, owner_id, package, label, version_name, version_code, min_sdk, target_sdk,
                permissions, size_bytes, sha256, created_at, created_at::text AS position
            FROM apps
            WHERE owner_id = $1 AND state = 'ready'
                AND ($2::text IS NULL OR (created_at, id) < ($2::text::timestamptz, $3::uuid))
            ORDER BY created_at DESC, id DESC LIMIT $4
            """,
            caller.user_id,
            created_at,
            last_id,
            query.page_size + 1,
        )
        shown = rows[: query.page_size]
        more = to_cursor(shown[-1]["position"], str(shown[-1]["id"])) if len(rows) > len(shown) else None
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
            _object_key(app_id),
            size_bytes=app.size_bytes,
            media=APK_TYPE,
            filename=f"{app.label}-{app.version_name or app.version_code or ''}.apk",
        )

    # Installations

    async def install(self, caller: Caller, device_id: UUID, app_id: UUID, new_id: UUID) -> Installation:
        """Queue an app for a phone. Raises Problem: not_found, device_not_running."""
        app = await self.get(caller, app_id)
        phone = await self._app[PHONES].rented(caller, device_id)
        if not phone.running:
            raise Problem(Code.DEVICE_NOT_RUNNING, N_("Start the phone first."))
        async with self._database.transaction() as tx:
            row = await tx.fetchrow(
                """
                INSERT INTO installations (id, device_id, owner_id, app_id, package, state)
                VALUES ($1, $2, $3, $4, $5, 'queued')
                ON CONFLICT (id) DO UPDATE SET package = excluded.package
                RETURNING id, device_id, owner_id, app_id, package, state, detail, created_at, updated_at
                """,
                new_id,
                device_id,
                phone.owner_id,
                app_id,
                app.package,
            )
            assert row is not None
            await self._tell(tx, row)
            tx.after_commit(lambda: self._app[JOBS].ring(INSTALL_JOB))
        return _installation(row)

    async def installations(self, caller: Caller, device_id: UUID, query: PageQuery) -> Page[Installation]:
        """A phone's installations, newest first."""
        await self._app[PHONES].rented(caller, device_id)
        created_at, last_id = from_cursor(query.cursor, str, UUID) if query.cursor else (None, None)
        rows = await self._database.fetch(
            """
            SELECT id, device_id, app_id, package, state, detail, created_at, updated_at,
                created_at::text AS position
            FROM installations
            WHERE device_id = $1
                AND ($2::text IS NULL OR (created_at, id) < ($2::text::timestamptz, $3::uuid))
            ORDER BY created_at DESC, id DESC LIMIT $4
            """,
            device_id,
            created_at,
            last_id,
            query.page_size + 1,
        )
        shown = rows[: query.page_size]
        more = to_cursor(shown[-1]["position"], str(shown[-1]["id"])) if len(rows) > len(shown) else None
        return Page[Installation](items=[_installation(row) for row in shown], next_cursor=more)

    async def dispatch(self) -> None:
        """Start what is queued: one installation a phone, eight at once in all."""
        rows = await self._database.fetch(
            """
            SELECT DISTINCT ON (device_id) id, device_id FROM installations
            WHERE state = 'queued' AND device_id <> ALL ($1::uuid[])
            ORDER BY device_id, created_at
            """,
            list(self._busy),
        )
        for row in rows[: INSTALLS_AT_ONCE - len(self._busy)]:
            self._busy.add(row["device_id"])
            await self._app[JOBS].work(INSTALL_JOB, self._run(row["id"], row["device_id"]))

    async def _run(self, installation_id: UUID, device_id: UUID) -> None:
        try:
            row = await self._advance(installation_id, "queued", InstallationState.INSTALLING)
            if row is not None:
                failure = await self._stream_to_phone(row)
                ended = InstallationState.FAILED if failure else InstallationState.INSTALLED
                await self._advance(installation_id, "installing", ended, failure)
        finally:
            self._busy.discard(device_id)
            self._app[JOBS].ring(INSTALL_JOB)

    async def _stream_to_phone(self, row: Record) -> str:
        """Install; the reason where it failed, or nothing."""
        app_id: UUID = row["app_id"]
        try:
            link = await self._app[PHONES].link(row["device_id"])
            size_bytes = await self._storage.head(_object_key(app_id)) or 0
            chunks = self._storage.read(_object_key(app_id))
            await link.install(chunks, size_bytes, timeout_s=INSTALL_DEADLINE_S)
        except InstallRefused as refusal:
            return REFUSALS.get(refusal.code, str(refusal))
        except Problem as problem:
            return problem.detail
        except AdbFault as fault:
            log.info("installation broke off", extra={"installation": str(row["id"]), "error": str(fault)})
            return N_("The phone went away during the installation.")
        return ""

    async def _advance(
        self, installation_id: UUID, before: str, state: InstallationState, detail: str = ""
    ) -> Record | None:
        async with self._database.transaction() as tx:
            row = await tx.fetchrow(
                """
                UPDATE installations SET state = $3, detail = $4, updated_at = now()
                WHERE id = $1 AND state = $2
                RETURNING id, device_id, owner_id, app_id, package, state, detail, created_at, updated_at
                """,
                installation_id,
                before,
                state,
                detail,
            )
            if row is not None:
                await self._tell(tx, row)
            return row

    async def give_up(self, tx: Tx, device_id: UUID) -> None:
        """Fail what is open for a phone that stopped or is gone."""
        rows = await tx.fetch(
            """
            UPDATE installations SET state = 'failed', detail = $2, updated_at = now()
            WHERE device_id = $1 AND state IN ('queued', 'installing')
            RETURNING id, device_id, owner_id, app_id, package, state, detail, created_at, updated_at
            """,
            device_id,
            N_("The phone was stopped."),
        )
        for row in rows:
            await self._tell(tx, row)

    async def _tell(self, tx: Tx, row: Record) -> None:
        title, body = {
            "queued": (N_("{package} waits to be installed"), ""),
            "installing": (N_("{package} is being installed"), ""),
            "installed": (N_("{package} is installed"), N_("It is on the phone's home screen now.")),
            "failed": (N_("{package} could not be installed"), row["detail"]),
        }[row["state"]]
        data = {name: str(row[name]) for name in ("device_id", "app_id", "package", "state", "detail")}
        await self._app[NOTIFIER].publish(
            tx,
            row["owner_id"],
            Topic.APP_INSTALLATION,
            title,
            body,
            params={"package": row["package"]},
            data={"installation_id": str(row["id"]), **data},
        )

    # What is on a phone

    async def on_phone(self, caller: Caller, device_id: UUID) -> InstalledApps:
        """What the phone says people installed on it. Raises Problem: not_found, device_not_running."""
        link = await self._link(caller, device_id)
        with _phone_faults():
            found = await packages.installed(link)
        return InstalledApps([InstalledApp(**asdict(package)) for package in found])

    async def launch(self, caller: Caller, device_id: UUID, package: str) -> None:
        """Open an app on the phone. Raises Problem(not_found) where the phone cannot."""
        link = await self._link(caller, device_id)
        with _phone_faults():
            await packages.launch(link, package)

    async def uninstall(self, caller: Caller, device_id: UUID, package: str) -> None:
        """Remove an app from the phone. Raises Problem(not_found) where the phone has none."""
        link = await self._link(caller, device_id)
        with _phone_faults():
            await packages.uninstall(link, package)

    async def _link(self, caller: Caller, device_id: UUID) -> PhoneLink:
        await self._app[PHONES].rented(caller, device_id)
        return await self._app[PHONES].link(device_id)


APPS: Final = web.AppKey("APPS", Apps)


def _app(row: Record) -> App:
    return App.model_construct(**{name: row[name] for name in App.model_fields})


def _installation(row: Record) -> Installation:
    return Installation.model_construct(**{name: row[name] for name in Installation.model_fields})


async def _facts(spool: Path) -> ApkFacts:
    try:
        facts = await inspect(spool)
    except InvalidApk as error:
        raise Problem(Code.INVALID_APK, str(error)) from None
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


@contextmanager
def _phone_faults() -> Iterator[None]:
    try:
        yield
    except packages.NoSuchPackage:
        raise Problem(Code.NOT_FOUND, N_("The phone has no such app, or it cannot be opened.")) from None
    except AdbFault:
        raise Problem(Code.RUNTIME_UNAVAILABLE, N_("The phone does not answer; try again shortly.")) from None


async def _install_queued(app: web.Application) -> None:
    await app[APPS].dispatch()


routes = Routes("apps")


@routes.api("POST", "/apps", access=Access.USER, status=201, upload=True, location="/api/v1/apps/{id}",
            problems=(Code.TOO_LARGE, Code.INVALID_APK, Code.UNSUPPORTED_MEDIA_TYPE))  # fmt: skip
async def upload(request: web.Request, caller: Caller, new_id: UUID) -> App | Answer:
    """Upload an APK; one you have already is answered with 200."""
    app, is_new = await request.app[APPS].upload(caller, request, new_id)
    return app if is_new else Answer(app, 200)


@routes.api("GET", "/apps", access=Access.USER)
async def list_apps(request: web.Request, caller: Caller, query: PageQuery) -> Page[App]:
    """Your apps, newest first."""
    return await request.app[APPS].page(caller, query)


@routes.api("GET", "/apps/{app_id}", access=Access.USER)
async def get(request: web.Request, caller: Caller, app_id: UUID) -> App:
    """One app."""
    return await request.app[APPS].get(caller, app_id)


@routes.api("DELETE", "/apps/{app_id}", access=Access.USER, problems=(Code.INVALID_STATE,))
async def delete(request: web.Request, caller: Caller, app_id: UUID) -> None:
    """Delete an app; phones keep what is installed."""
    await request.app[APPS].delete(caller, app_id)


@routes.api("GET", "/apps/{app_id}/icon", access=Access.USER, media="image/png")
async def icon(request: web.Request, caller: Caller, app_id: UUID) -> web.Response:
    """The app's icon."""
    return await request.app[APPS].icon(caller, app_id)


@routes.api("GET", "/apps/{app_id}/download", access=Access.USER, media=APK_TYPE,
            problems=(Code.RANGE_NOT_SATISFIABLE,))  # fmt: skip
async def download(request: web.Request, caller: Caller, app_id: UUID) -> web.StreamResponse:
    """The APK itself; ranges are honoured."""
    return await request.app[APPS].download(caller, app_id, request)


@routes.api("POST", "/devices/{device_id}/apps", access=Access.USER, status=202,
            problems=(Code.DEVICE_NOT_RUNNING,))  # fmt: skip
async def install(
    request: web.Request, caller: Caller, device_id: UUID, body: NewInstallation, new_id: UUID
) -> Installation:
    """Install an app on a phone."""
    return await request.app[APPS].install(caller, device_id, body.app_id, new_id)


@routes.api("GET", "/devices/{device_id}/installations", access=Access.USER)
async def installations(
    request: web.Request, caller: Caller, device_id: UUID, query: PageQuery
) -> Page[Installation]:
    """A phone's installations, newest first."""
    return await request.app[APPS].installations(caller, device_id, query)


@routes.api("GET", "/devices/{device_id}/apps", access=Access.USER,
            problems=(Code.DEVICE_NOT_RUNNING, Code.RUNTIME_UNAVAILABLE))  # fmt: skip
async def on_phone(request: web.Request, caller: Caller, device_id: UUID) -> InstalledApps:
    """What the phone itself says is installed."""
    return await request.app[APPS].on_phone(caller, device_id)


@routes.api("POST", "/devices/{device_id}/apps/{package}/launch", access=Access.USER,
            problems=(Code.DEVICE_NOT_RUNNING, Code.RUNTIME_UNAVAILABLE))  # fmt: skip
async def launch(request: web.Request, caller: Caller, device_id: UUID, package: str) -> None:
    """Open an app on the phone."""
    await request.app[APPS].launch(caller, device_id, package)


@routes.api("DELETE", "/devices/{device_id}/apps/{package}", access=Access.USER,
            problems=(Code.DEVICE_NOT_RUNNING, Code.RUNTIME_UNAVAILABLE))  # fmt: skip
async def uninstall(request: web.Request, caller: Caller, device_id: UUID, package: str) -> None:
    """Remove an app from the phone."""
    await request.app[APPS].uninstall(caller, device_id, package)


@routes.page("GET", "/apps", access=Access.USER)
async def list_page(request: web.Request, caller: Caller) -> web.Response:
    """The library."""
    apps = request.app[APPS]
    library = await apps.page(caller, PageQuery(limit=100))
    return render(request, "apps/list.html", {"apps": library.items, "max_upload_mb": apps.max_upload_mb})


@routes.page("GET", "/apps/{app_id}", access=Access.USER)
async def app_page(request: web.Request, caller: Caller, app_id: UUID) -> web.Response:
    """One app."""
    return render(request, "apps/show.html", {"app": await request.app[APPS].get(caller, app_id)})


async def _phone_ended(app: web.Application, tx: Tx, event: DeviceStopped | DeviceDeleted) -> None:
    await app[APPS].give_up(tx, event.device_id)


@asynccontextmanager
async def lifespan(app: web.Application) -> AsyncIterator[None]:
    """Open the library."""
    app[APPS] = apps = Apps(app)
    await apps.reconcile()
    yield


PLUGIN: Final = Plugin(
    name="apps",
    config=AppsSection,
    lifespan=lifespan,
    needs=(NOTIFIER, PHONES),
    migrations=MIGRATIONS,
    routes=routes.declared,
    jobs=(Job(INSTALL_JOB, every_s=30, deadline_s=10, run=_install_queued),),
    listens={DeviceStopped: _phone_ended, DeviceDeleted: _phone_ended},
)
