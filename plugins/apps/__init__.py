"""Apps: the APKs people upload, and their installation on phones.

Tables: `apps`, `installations`.

Invariants: a row in state `ready` has its object in the storage, of the size and SHA-256 it says; an
upload that ended in any other way leaves no temporary file, object or row (the row is written before
the first byte and swept at start). One account holds the same bytes once. A phone has at most one
installation under way; each ends as `installed` or `failed`, also across a restart.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Final

from aiohttp import web

from plugins.apps.installations import INSTALL_JOB, INSTALLATIONS, Installations
from plugins.apps.library import LIBRARY, Library
from plugins.apps.model import AppsSection
from plugins.apps.routes import routes
from plugins.apps.schema import MIGRATIONS
from server.db import Tx
from server.interfaces import NOTIFIER, PHONES, DeviceDeleted, DeviceStopped
from server.plugin import Job, Plugin


async def _install_queued(app: web.Application) -> None:
    await app[INSTALLATIONS].dispatch()


async def _phone_ended(app: web.Application, tx: Tx, event: DeviceStopped | DeviceDeleted) -> None:
    await app[INSTALLATIONS].give_up(tx, event.device_id)


@asynccontextmanager
async def lifespan(app: web.Application) -> AsyncIterator[None]:
    """Open the library, then take up the queue."""
    app[LIBRARY] = library = Library(app)
    await library.reconcile()
    app[INSTALLATIONS] = installations = Installations(app)
    await installations.reconcile()
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
