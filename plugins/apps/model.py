"""Apps' configuration, wire models and states."""

from enum import StrEnum
from typing import Annotated
from uuid import UUID

from pydantic import Field, RootModel

from server.api import Incoming, Moment, Outgoing
from server.plugin import Section


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
