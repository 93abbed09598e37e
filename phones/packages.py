"""A phone's package manager, asked over ADB: what is installed, open it, remove it."""

import asyncio
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

from phones.adb import quote

DEADLINE_S = 20.0


class NoSuchPackage(Exception):
    """The phone has no such app, or it has nothing to open."""


@dataclass(frozen=True, slots=True)
class Package:
    """An app on the phone, as the phone names it."""

    package: str
    version_name: str | None
    version_code: int | None


class ShellAnswer(Protocol):
    """What a command left behind."""

    @property
    def exit_code(self) -> int:
        """0 to 255."""

    @property
    def stdout(self) -> bytes:
        """All it wrote."""


class Phone(Protocol):
    """Whatever runs commands on the phone, such as phones.adb.AdbClient."""

    async def shell(self, command: str, *, timeout_s: float) -> ShellAnswer:
        """Run a command to its end."""


async def installed(phone: Phone) -> list[Package]:
    """The apps people installed, without the system's own. Raises phones.adb.AdbFault."""
    listed = await phone.shell("pm list packages -3 --show-versioncode", timeout_s=DEADLINE_S)
    found = dict(_lines(listed.stdout.decode(errors="replace")))
    names = await asyncio.gather(*(_version_name(phone, package) for package in found))
    return [Package(package, name, code) for (package, code), name in zip(found.items(), names, strict=True)]


async def launch(phone: Phone, package: str) -> None:
    """Open an app as its icon would. Raises NoSuchPackage, phones.adb.AdbFault."""
    command = quote(["monkey", "-p", package, "-c", "android.intent.category.LAUNCHER", "1"])
    answer = await phone.shell(command, timeout_s=DEADLINE_S)
    if answer.exit_code != 0 or b"No activities found" in answer.stdout:
        raise NoSuchPackage(package)


async def uninstall(phone: Phone, package: str) -> None:
    """Remove an app with its data. Raises NoSuchPackage, phones.adb.AdbFault."""
    answer = await phone.shell(quote(["pm", "uninstall", package]), timeout_s=DEADLINE_S)
    if b"Success" not in answer.stdout:
        raise NoSuchPackage(package)


def _lines(listing: str) -> Iterator[tuple[str, int | None]]:
    """`package:org.example versionCode:7`, a line each."""
    for line in listing.splitlines():
        package, _, version = line.removeprefix("package:").partition(" versionCode:")
        if line.startswith("package:"):
            yield package.strip(), int(version) if version.strip().isdigit() else None


async def _version_name(phone: Phone, package: str) -> str | None:
    dumped = await phone.shell(quote(["dumpsys", "package", package]), timeout_s=DEADLINE_S)
    for line in dumped.stdout.decode(errors="replace").splitlines():
        if line.strip().startswith("versionName="):
            return line.strip().removeprefix("versionName=")
    return None
