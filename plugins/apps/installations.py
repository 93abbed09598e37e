"""Installations: the queue, the way onto the phone, and what is there already."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Final
from uuid import UUID

from aiohttp import web

from phones import packages
from phones.adb import AdbFault, InstallRefused
from plugins.apps.library import LIBRARY, object_key
from plugins.apps.model import Installation, InstallationState, InstalledApp, InstalledApps
from plugins.apps.refusals import REFUSALS
from server.api import Page, PageQuery, from_cursor, moment, to_cursor
from server.auth import Caller
from server.db import Record, Tx
from server.errors import Code, Problem
from server.i18n import N_
from server.interfaces import DATABASE, JOBS, NOTIFIER, PHONES, STORAGE, PhoneLink, Topic
from server.observe import log

INSTALL_JOB: Final = "apps.install"
INSTALLS_AT_ONCE: Final = 8
INSTALL_DEADLINE_S: Final = 600.0


class Installations:
    """The queue of installations, and what phones have installed."""

    def __init__(self, app: web.Application) -> None:
        self._app = app
        self._database = app[DATABASE]
        self._storage = app[STORAGE]
        self._library = app[LIBRARY]
        self._busy: set[UUID] = set()  # devices with an installation of this process under way

    async def reconcile(self) -> None:
        """Take up again what a dead process was installing."""
        await self._database.execute(
            "UPDATE installations SET state = 'queued', updated_at = now() WHERE state = 'installing'"
        )

    async def install(self, caller: Caller, device_id: UUID, app_id: UUID, new_id: UUID) -> Installation:
        """Queue an app for a phone. Raises Problem: not_found, device_not_running."""
        app = await self._library.get(caller, app_id)
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

    async def of_device(self, caller: Caller, device_id: UUID, query: PageQuery) -> Page[Installation]:
        """A phone's installations, newest first."""
        await self._app[PHONES].rented(caller, device_id)
        created_at, last_id = from_cursor(query.cursor, moment, UUID) if query.cursor else (None, None)
        rows = await self._database.fetch(
            """
            SELECT id, device_id, app_id, package, state, detail, created_at, updated_at
            FROM installations
            WHERE device_id = $1
                AND ($2::timestamptz IS NULL OR (created_at, id) < ($2, $3::uuid))
            ORDER BY created_at DESC, id DESC LIMIT $4
            """,
            device_id,
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
            size_bytes = await self._storage.head(object_key(app_id)) or 0
            chunks = self._storage.read(object_key(app_id))
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
        # The passing states move the page; only how it ended is worth a word.
        title, body = {
            "queued": ("", ""),
            "installing": ("", ""),
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


INSTALLATIONS: Final = web.AppKey("INSTALLATIONS", Installations)


def _installation(row: Record) -> Installation:
    return Installation(**{name: row[name] for name in Installation.model_fields})


@contextmanager
def _phone_faults() -> Iterator[None]:
    try:
        yield
    except packages.NoSuchPackage:
        raise Problem(Code.NOT_FOUND, N_("The phone has no such app, or it cannot be opened.")) from None
    except AdbFault:
        raise Problem(Code.RUNTIME_UNAVAILABLE, N_("The phone does not answer; try again shortly.")) from None
