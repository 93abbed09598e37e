"""Apps' operations and pages."""

from uuid import UUID

from aiohttp import web

from plugins.apps.installations import INSTALLATIONS
from plugins.apps.library import APK_TYPE, LIBRARY
from plugins.apps.model import App, Installation, InstalledApps, NewInstallation
from server.api import Answer, Page, PageQuery, Routes, Upload
from server.auth import Access, Caller
from server.errors import Code
from server.pages import render

routes = Routes("apps")


@routes.api("POST", "/apps", access=Access.USER, status=201, upload=Upload.FORM,
            location="/api/v1/apps/{id}",
            problems=(Code.TOO_LARGE, Code.INVALID_APK, Code.UNSUPPORTED_MEDIA_TYPE))  # fmt: skip
async def upload(request: web.Request, caller: Caller, new_id: UUID) -> App | Answer:
    """Upload an APK; one you have already is answered with 200."""
    app, is_new = await request.app[LIBRARY].upload(caller, request, new_id)
    return app if is_new else Answer(app, 200)


@routes.api("GET", "/apps", access=Access.USER)
async def list_apps(request: web.Request, caller: Caller, query: PageQuery) -> Page[App]:
    """Your apps, newest first."""
    return await request.app[LIBRARY].page(caller, query)


@routes.api("GET", "/apps/{app_id}", access=Access.USER)
async def get(request: web.Request, caller: Caller, app_id: UUID) -> App:
    """One app."""
    return await request.app[LIBRARY].get(caller, app_id)


@routes.api("DELETE", "/apps/{app_id}", access=Access.USER, problems=(Code.INVALID_STATE,))
async def delete(request: web.Request, caller: Caller, app_id: UUID) -> None:
    """Delete an app; phones keep what is installed."""
    await request.app[LIBRARY].delete(caller, app_id)


@routes.api("GET", "/apps/{app_id}/icon", access=Access.USER, media="image/png")
async def icon(request: web.Request, caller: Caller, app_id: UUID) -> web.Response:
    """The app's icon."""
    return await request.app[LIBRARY].icon(caller, app_id)


@routes.api("GET", "/apps/{app_id}/download", access=Access.USER, media=APK_TYPE,
            problems=(Code.RANGE_NOT_SATISFIABLE,))  # fmt: skip
async def download(request: web.Request, caller: Caller, app_id: UUID) -> web.StreamResponse:
    """The APK itself; ranges are honoured."""
    return await request.app[LIBRARY].download(caller, app_id, request)


@routes.api("POST", "/devices/{device_id}/apps", access=Access.USER, status=202,
            problems=(Code.DEVICE_NOT_RUNNING,))  # fmt: skip
async def install(
    request: web.Request, caller: Caller, device_id: UUID, body: NewInstallation, new_id: UUID
) -> Installation:
    """Install an app on a phone."""
    return await request.app[INSTALLATIONS].install(caller, device_id, body.app_id, new_id)


@routes.api("GET", "/devices/{device_id}/installations", access=Access.USER)
async def installations(
    request: web.Request, caller: Caller, device_id: UUID, query: PageQuery
) -> Page[Installation]:
    """A phone's installations, newest first."""
    return await request.app[INSTALLATIONS].of_device(caller, device_id, query)


@routes.api("GET", "/devices/{device_id}/apps", access=Access.USER,
            problems=(Code.DEVICE_NOT_RUNNING, Code.RUNTIME_UNAVAILABLE))  # fmt: skip
async def on_phone(request: web.Request, caller: Caller, device_id: UUID) -> InstalledApps:
    """What the phone itself says is installed."""
    return await request.app[INSTALLATIONS].on_phone(caller, device_id)


@routes.api("POST", "/devices/{device_id}/apps/{package}/launch", access=Access.USER,
            problems=(Code.DEVICE_NOT_RUNNING, Code.RUNTIME_UNAVAILABLE))  # fmt: skip
async def launch(request: web.Request, caller: Caller, device_id: UUID, package: str) -> None:
    """Open an app on the phone."""
    await request.app[INSTALLATIONS].launch(caller, device_id, package)


@routes.api("DELETE", "/devices/{device_id}/apps/{package}", access=Access.USER,
            problems=(Code.DEVICE_NOT_RUNNING, Code.RUNTIME_UNAVAILABLE))  # fmt: skip
async def uninstall(request: web.Request, caller: Caller, device_id: UUID, package: str) -> None:
    """Remove an app from the phone."""
    await request.app[INSTALLATIONS].uninstall(caller, device_id, package)


@routes.page("GET", "/apps", access=Access.USER)
async def list_page(request: web.Request, caller: Caller) -> web.Response:
    """The library."""
    library = request.app[LIBRARY]
    apps = (await library.page(caller, PageQuery(limit=100))).items
    return render(request, "apps/list.html", {"apps": apps, "max_upload_mb": library.max_upload_mb})


@routes.page("GET", "/apps/{app_id}", access=Access.USER)
async def app_page(request: web.Request, caller: Caller, app_id: UUID) -> web.Response:
    """One app."""
    return render(request, "apps/show.html", {"app": await request.app[LIBRARY].get(caller, app_id)})
