"""The phone's package manager: reads APKs, keeps what is installed, refuses in Android's words.

The phone calls itself x86_64 and, like phones with a translation layer, takes the ABIs in `ABIS` too:
it never runs native code, so an APK with code for any of them may be installed. Signatures are not
checked: an update may come from anybody.
"""

import asyncio
import errno
import secrets
from collections.abc import AsyncIterable, Awaitable, Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from phones.apk import ApkFacts, InvalidApk, inspect
from phones.simulator.clock import Clock
from phones.simulator.files import PhoneFileError, PhoneFiles
from phones.simulator.logcat import Log

ABIS = ("x86_64", "x86", "arm64-v8a", "armeabi-v7a")
MAX_SESSIONS = 16
MAX_SESSION_FILES = 100
FIRST_USER_ID = 10100

DANGEROUS_PERMISSIONS = frozenset(
    f"android.permission.{name}"
    for name in (
        "ACCESS_BACKGROUND_LOCATION",
        "ACCESS_COARSE_LOCATION",
        "ACCESS_FINE_LOCATION",
        "ACTIVITY_RECOGNITION",
        "BLUETOOTH_CONNECT",
        "BLUETOOTH_SCAN",
        "BODY_SENSORS",
        "CALL_PHONE",
        "CAMERA",
        "GET_ACCOUNTS",
        "POST_NOTIFICATIONS",
        "READ_CALENDAR",
        "READ_CALL_LOG",
        "READ_CONTACTS",
        "READ_EXTERNAL_STORAGE",
        "READ_MEDIA_AUDIO",
        "READ_MEDIA_IMAGES",
        "READ_MEDIA_VIDEO",
        "READ_PHONE_STATE",
        "READ_SMS",
        "RECEIVE_SMS",
        "RECORD_AUDIO",
        "SEND_SMS",
        "WRITE_CALENDAR",
        "WRITE_CONTACTS",
        "WRITE_EXTERNAL_STORAGE",
    )
)
"""What a user is asked for while an app runs, and `pm grant` changes."""


class InstallRefused(Exception):
    """Android's refusal: `code` such as INSTALL_FAILED_OLDER_SDK, and the sentence after it."""

    def __init__(self, code: str, sentence: str = "") -> None:
        super().__init__(f"{code}: {sentence}" if sentence else code)
        self.code = code


class UnknownSession(Exception):
    """No installation session has this number."""


@dataclass(frozen=True, slots=True)
class Package:
    """One installed app. Times are Unix seconds; `files` are the phone's paths, the base APK first."""

    name: str
    label: str
    version_name: str
    version_code: int
    min_sdk: int
    target_sdk: int
    permissions: tuple[str, ...] = ()
    granted: tuple[str, ...] = ()
    abi: str | None = None
    activity: str | None = None
    files: tuple[str, ...] = ()
    user_id: int = 1000
    installed_at: int = 0
    updated_at: int = 0
    is_system: bool = False

    @property
    def component(self) -> str | None:
        """`package/.Activity`, as Android shortens it."""
        if self.activity is None:
            return None
        short = self.activity.removeprefix(self.name) if self.activity.startswith(self.name + ".") else None
        return f"{self.name}/{short or self.activity}"


SETTINGS_APP = "com.android.settings"
NOTES_APP = "com.cloudphone.notes"
BROWSER_APP = "com.cloudphone.browser"
LAUNCHER_APP = "com.android.launcher3"

_SYSTEM = (
    ("android", "Android System", "/system/framework/framework-res.apk", None, 1000),
    ("com.android.shell", "Shell", "/system/priv-app/Shell/Shell.apk", None, 2000),
    ("com.android.systemui", "System UI", "/system/priv-app/SystemUI/SystemUI.apk", None, 10050),
    (LAUNCHER_APP, "Launcher", "/system/priv-app/Launcher3/Launcher3.apk", "Launcher", 10051),
    (SETTINGS_APP, "Settings", "/system/priv-app/Settings/Settings.apk", "Settings", 1000),
    (NOTES_APP, "Notes", "/system/app/Notes/Notes.apk", "NotesActivity", 10052),
    (BROWSER_APP, "Browser", "/system/app/Browser/Browser.apk", "BrowserActivity", 10053),
)


def _system_packages(android_version: str, sdk: int) -> dict[str, Package]:
    """What every phone has from the factory and nobody can remove."""
    return {
        name: Package(
            name=name,
            label=label,
            version_name=android_version,
            version_code=sdk,
            min_sdk=sdk,
            target_sdk=sdk,
            activity=f"{name}.{activity}" if activity else None,
            files=(file,),
            user_id=user_id,
            is_system=True,
        )
        for name, label, file, activity, user_id in _SYSTEM
    }


@dataclass(slots=True)
class InstallOptions:
    """What `pm install` may be told."""

    replace: bool = False
    downgrade: bool = False
    grant: bool = False
    expected_package: str | None = None


@dataclass(slots=True)
class _InstallSession:
    options: InstallOptions
    directory: str
    files: dict[str, str]


class Packages:
    """What is installed. `save` writes it down; it is awaited after every change."""

    def __init__(
        self,
        files: PhoneFiles,
        icons: Path,
        log: Log,
        clock: Clock,
        *,
        android_version: str,
        sdk: int,
        save: Callable[[], Awaitable[None]],
    ) -> None:
        self._files = files
        self._icons = icons
        self._log = log
        self._clock = clock
        self._sdk = sdk
        self._save = save
        self._system = _system_packages(android_version, sdk)
        self._installed: dict[str, Package] = {}
        self._icon_bytes: dict[str, bytes] = {}
        self._sessions: dict[int, _InstallSession] = {}
        self._lock = asyncio.Lock()  # guards: _installed, against two changes of one package at once
        self.removed: Callable[[str], None] = lambda package: None

    async def restore(self, saved: list[dict[str, Any]]) -> None:
        """Take over what was written down, but for what has lost its files; clear away cut installations."""
        kept = set()
        for fields in saved:
            lists = {key: tuple(value) for key, value in fields.items() if isinstance(value, list)}
            package = Package(**{**fields, **lists})
            if await self._is_whole(package):
                self._installed[package.name] = package
                kept.add(_top(package))
                await self._load_icon(package.name)
        for found in await self._files.list("/data/app"):
            path = f"/data/app/{found.name}"
            if path not in kept and found.is_directory:
                await self._remove_quietly(path)

    def saved(self) -> list[dict[str, Any]]:
        """What `restore` takes back."""
        return [asdict(package) for package in self._installed.values()]

    def get(self, name: str) -> Package | None:
        return self._installed.get(name) or self._system.get(name)

    def all(self) -> list[Package]:
        """Every package by its name."""
        return sorted([*self._system.values(), *self._installed.values()], key=lambda package: package.name)

    def shown(self) -> list[Package]:
        """The installed apps that a home screen shows, in the order of their installation."""
        return [package for package in self._installed.values() if package.activity is not None]

    def icon(self, name: str) -> bytes | None:
        """The app's own icon as PNG."""
        return self._icon_bytes.get(name)

    async def install(
        self, chunks: AsyncIterable[bytes], options: InstallOptions, size_bytes: int | None = None
    ) -> Package:
        """Install one APK from a stream of `size_bytes`. Raises InstallRefused."""
        number = await self.create_session(options)
        try:
            await self.write_session(number, "base.apk", chunks, size_bytes)
            return await self.commit_session(number)
        finally:
            await self.abandon_session(number)

    async def create_session(self, options: InstallOptions) -> int:
        """Open an installation that gathers files. Raises InstallRefused."""
        if len(self._sessions) >= MAX_SESSIONS:
            raise InstallRefused("INSTALL_FAILED_INTERNAL_ERROR", "Too many active sessions")
        number = secrets.randbelow(1 << 30) + 1
        self._sessions[number] = _InstallSession(options, f"/data/app/vmdl{number}.tmp", {})
        return number

    async def write_session(
        self, number: int, name: str, chunks: AsyncIterable[bytes], size_bytes: int | None = None
    ) -> int:
        """Add a file to a session and return its length. Raises InstallRefused, UnknownSession."""
        session = self._session(number)
        if "/" in name or name in ("", ".", "..") or len(session.files) >= MAX_SESSION_FILES:
            raise InstallRefused("INSTALL_FAILED_INVALID_APK", f"Invalid name: {name}")
        path = f"{session.directory}/{name}"
        try:
            written = await self._files.write(path, chunks, parents=True)
        except PhoneFileError as fault:
            if fault.errno == errno.ENOSPC:
                raise InstallRefused(
                    "INSTALL_FAILED_INSUFFICIENT_STORAGE",
                    f"Failed to allocate {size_bytes or 'enough'} bytes",
                ) from None
            raise InstallRefused("INSTALL_FAILED_INTERNAL_ERROR", str(fault.strerror)) from None
        if number not in self._sessions:
            await self._remove_quietly(session.directory)
            raise UnknownSession
        if size_bytes is not None and written != size_bytes:
            await self._remove_quietly(path)
            raise InstallRefused(
                "INSTALL_FAILED_INVALID_APK", f"Expected {size_bytes} bytes but only {written} came"
            )
        session.files[name] = path
        return written

    async def commit_session(self, number: int) -> Package:
        """Install what a session has gathered. Raises InstallRefused, UnknownSession."""
        session = self._session(number)
        try:
            async with self._lock:
                return await self._commit(session)
        finally:
            await self.abandon_session(number)

    async def abandon_session(self, number: int) -> None:
        """Throw a session and its files away; an unknown one is no error."""
        session = self._sessions.pop(number, None)
        if session is not None:
            await self._remove_quietly(session.directory)

    async def uninstall(self, name: str) -> bool:
        """Remove an app with its data; False for one that is not installed or belongs to the system."""
        async with self._lock:
            package = self._installed.pop(name, None)
            if package is None:
                return False
            self._icon_bytes.pop(name, None)
            self.removed(name)
            await self._save()
            await self._remove_quietly(_top(package))
            await self._remove_quietly(f"/data/data/{name}")
            await asyncio.to_thread((self._icons / f"{name}.png").unlink, missing_ok=True)
        self._log.write("PackageManager", f"Package {name} removed for user 0")
        return True

    async def clear(self, name: str) -> bool:
        """Throw away an app's data and its running state; False for an unknown one."""
        package = self.get(name)
        if package is None:
            return False
        self.removed(name)
        await self._remove_quietly(f"/data/data/{name}")
        await self._files.mkdir(f"/data/data/{name}", parents=True)
        return True

    async def grant(self, name: str, permission: str, *, granted: bool) -> None:
        """Give or take a permission the app has asked for. Raises ValueError in Android's words."""
        package = self._installed.get(name)
        if package is None:
            raise ValueError(f"Unknown package: {name}")
        if permission not in package.permissions:
            raise ValueError(f"Package {name} has not requested permission {permission}")
        if permission not in DANGEROUS_PERMISSIONS:
            raise ValueError(
                f"Permission {permission} requested by {name} is not a changeable permission type"
            )
        others = tuple(held for held in package.granted if held != permission)
        self._installed[name] = replace(package, granted=(*others, permission) if granted else others)
        await self._save()

    def _session(self, number: int) -> _InstallSession:
        session = self._sessions.get(number)
        if session is None:
            raise UnknownSession
        return session

    async def _commit(self, session: _InstallSession) -> Package:
        found = {name: await self._facts(path) for name, path in session.files.items()}
        bases = [name for name, facts in found.items() if facts.split is None]
        if not bases:
            named = next((facts.package for facts in found.values()), "the session")
            raise InstallRefused("INSTALL_FAILED_MISSING_SPLIT", f"Missing base APK for {named}")
        base = found[bases[0]]
        if len(bases) > 1:
            raise InstallRefused("INSTALL_FAILED_INVALID_APK", "Split null was defined multiple times")
        if any(facts.package != base.package for facts in found.values()):
            raise InstallRefused("INSTALL_FAILED_INVALID_APK", "Inconsistent package names")
        abis = {abi for facts in found.values() for abi in facts.abis}
        self._check(base, abis, session.options)
        names = [bases[0], *(name for name in found if name != bases[0])]
        before = self._installed.get(base.package)
        package = self._described(base, abis, session.options, before)
        directory = await self._move(session, package.name)
        package = replace(package, files=tuple(f"{directory}/{name}" for name in names))
        await self._keep(package, base.icon_png)
        if before is not None:
            self.removed(before.name)
            await self._remove_quietly(_top(before))
        self._log.write("PackageManager", f"Package {package.name} codePath is {directory}")
        return package

    async def _facts(self, path: str) -> ApkFacts:
        try:
            return await inspect(await self._files.host_path(path))
        except InvalidApk as refusal:
            raise InstallRefused(
                "INSTALL_PARSE_FAILED_NOT_APK", f"Failed to parse {path}: {refusal}"
            ) from None
        except PhoneFileError as fault:
            raise InstallRefused("INSTALL_FAILED_INVALID_APK", f"{path}: {fault.strerror}") from None

    def _check(self, facts: ApkFacts, abis: set[str], options: InstallOptions) -> None:
        """Android's own reasons to refuse, in its order. Raises InstallRefused."""
        current = self.get(facts.package)
        code = facts.version_code or 0
        if options.expected_package not in (None, facts.package):
            raise InstallRefused("INSTALL_FAILED_INVALID_APK", "Package name does not match")
        if facts.min_sdk is not None and facts.min_sdk > self._sdk:
            raise InstallRefused(
                "INSTALL_FAILED_OLDER_SDK",
                f"Requires newer sdk version #{facts.min_sdk} (current version is #{self._sdk})",
            )
        if current is not None and current.is_system:
            raise InstallRefused(
                "INSTALL_FAILED_UPDATE_INCOMPATIBLE",
                f"Package {facts.package} signatures do not match previously installed version; ignoring!",
            )
        if current is not None and not options.replace:
            raise InstallRefused(
                "INSTALL_FAILED_ALREADY_EXISTS",
                f"Attempt to re-install {facts.package} without first uninstalling.",
            )
        if current is not None and code < current.version_code and not options.downgrade:
            raise InstallRefused(
                "INSTALL_FAILED_VERSION_DOWNGRADE",
                "Downgrade detected: Update version code"
                f" {code} is older than current {current.version_code}",
            )
        if abis and not abis & set(ABIS):
            raise InstallRefused(
                "INSTALL_FAILED_NO_MATCHING_ABIS", "Failed to extract native libraries, res=-113"
            )

    def _described(
        self, facts: ApkFacts, abis: set[str], options: InstallOptions, before: Package | None
    ) -> Package:
        now = int(self._clock.now().timestamp())
        asked = tuple(name for name in facts.permissions if name in DANGEROUS_PERMISSIONS)
        kept = tuple(name for name in before.granted if name in asked) if before else ()
        return Package(
            name=facts.package,
            label=facts.label,
            version_name=facts.version_name or "",
            version_code=facts.version_code or 0,
            min_sdk=facts.min_sdk or 1,
            target_sdk=facts.target_sdk or facts.min_sdk or 1,
            permissions=facts.permissions,
            granted=asked if options.grant else kept,
            abi=next((abi for abi in ABIS if abi in abis), None),
            activity=facts.launcher_activity,
            user_id=before.user_id if before else self._next_user_id(),
            installed_at=before.installed_at if before else now,
            updated_at=now,
        )

    async def _move(self, session: _InstallSession, name: str) -> str:
        """Put a session's files where Android keeps an app's code, and return that directory."""
        above = f"/data/app/~~{secrets.token_urlsafe(12)}=="
        directory = f"{above}/{name}-{secrets.token_urlsafe(12)}=="
        try:
            await self._files.mkdir(above)
            await self._files.rename(session.directory, directory)
            await self._files.mkdir(f"/data/data/{name}", parents=True)
        except PhoneFileError as fault:
            await self._remove_quietly(above)
            raise InstallRefused("INSTALL_FAILED_INTERNAL_ERROR", str(fault.strerror)) from None
        return directory

    async def _keep(self, package: Package, icon: bytes | None) -> None:
        """Write the package down, its icon first, so that what is written down is whole."""
        path = self._icons / f"{package.name}.png"
        if icon is None:
            self._icon_bytes.pop(package.name, None)
            await asyncio.to_thread(path.unlink, missing_ok=True)
        else:
            self._icon_bytes[package.name] = icon
            await asyncio.to_thread(path.write_bytes, icon)
        self._installed[package.name] = package
        await self._save()

    async def _load_icon(self, name: str) -> None:
        try:
            self._icon_bytes[name] = await asyncio.to_thread((self._icons / f"{name}.png").read_bytes)
        except FileNotFoundError:
            return

    async def _is_whole(self, package: Package) -> bool:
        try:
            for path in package.files:
                await self._files.stat(path)
        except PhoneFileError:
            return False
        return True

    async def _remove_quietly(self, path: str) -> None:
        """Remove what may already be gone."""
        with suppress(PhoneFileError):
            await self._files.remove(path, recursive=True)

    def _next_user_id(self) -> int:
        return max((package.user_id for package in self._installed.values()), default=FIRST_USER_ID - 1) + 1


def _top(package: Package) -> str:
    """The directory right under /data/app that holds an app's files."""
    return "/".join(package.files[0].split("/")[:4])
