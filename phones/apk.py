"""What an APK says about itself.

The file comes from a stranger, so this process never reads it: a child with limits on memory, time and disk
does (`python -m phones.apk FILE`), and answers with one JSON object. This is the only door to pyaxmlparser;
it is imported in the child alone, as is Pillow.

Formats: https://developer.android.com/guide/topics/manifest/manifest-intro and AOSP's ResourceTypes.h.
"""

import asyncio
import base64
import json
import os
import re
import resource
import stat
import struct
import sys
import unicodedata
import weakref
import zipfile
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final, TypeVar

CHILDREN_AT_ONCE: Final = 2
MAX_ENTRIES: Final = 20_000
MAX_DIRECTORY_BYTES: Final = 4 << 20
MAX_MANIFEST_BYTES: Final = 4 << 20
MAX_RESOURCES_BYTES: Final = 64 << 20
MAX_MANIFEST_DEPTH: Final = 64
MAX_ICON_BYTES: Final = 4 << 20
MAX_ICON_PIXELS: Final = 2048 * 2048
MAX_ICON_CANDIDATES: Final = 24
MAX_PERMISSIONS: Final = 500
MAX_TEXT: Final = 128
ICON_SIZE: Final = 192

_MEMORY_LIMIT: Final = 1 << 30
_CPU_LIMIT_S: Final = 10
_ANSWER_LIMIT: Final = 1 << 20
_ROOT: Final = Path(__file__).resolve().parent.parent
_ANDROID: Final = "{http://schemas.android.com/apk/res/android}"
_PACKAGE: Final = re.compile(r"[A-Za-z]\w*(\.[A-Za-z]\w*)+", re.ASCII)
_COMPONENT: Final = re.compile(r"[\w$]+(\.[\w$]+)+")
_PERMISSION: Final = re.compile(r"[\w.-]{1,255}", re.ASCII)
_NATIVE_LIBRARY: Final = re.compile(r"lib/([\w-]{1,32})/[^/]+\.so", re.ASCII)
_REFERENCE: Final = re.compile(r"[@?](?:android:)?[0-9A-Fa-f]{8}")
_BIDI_CONTROLS: Final = frozenset("\u200e\u200f\u061c\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")
# Binary XML: the start and the end of a namespace, and of an element.
_NESTING: Final = {0x0100: 1, 0x0101: -1, 0x0102: 1, 0x0103: -1}
# Preview versions name themselves by a word, which became this API level.
_CODENAMES: Final = {
    "L": 21, "M": 23, "N": 24, "O": 26, "P": 28, "Q": 29, "R": 30, "S": 31, "Sv2": 32, "Tiramisu": 33,
    "UpsideDownCake": 34, "VanillaIceCream": 35, "Baklava": 36,
}  # fmt: skip

T = TypeVar("T")


class InvalidApk(Exception):
    """The file is no APK we take; the text is fit for the person who sent it.

    `message` is the text before `params` are put into its `{names}`, so that it can be translated.
    """

    def __init__(self, message: str, **params: str | int) -> None:
        super().__init__(message.format_map(params))
        self.message = message
        self.params: dict[str, Any] = params


@dataclass(frozen=True, slots=True)
class ApkFacts:
    """What the manifest and the resources of an APK say.

    Strings are free of control characters and short. `package` is a valid Android package name; the names
    in `permissions` hold letters, digits, `_`, `.` and `-`. `launcher_activity` is a full class name and may
    hold `$`. `label` falls back to the package name. `split` names a part of a set, which cannot be
    installed alone. `icon_png` is at most 192 pixels wide and high.
    """

    package: str
    label: str
    version_name: str | None
    version_code: int | None
    min_sdk: int | None
    target_sdk: int | None
    permissions: tuple[str, ...]
    abis: tuple[str, ...]
    launcher_activity: str | None
    split: str | None
    icon_png: bytes | None


# One semaphore a loop: a semaphore belongs to the loop it first waits in.
_children: weakref.WeakKeyDictionary[asyncio.AbstractEventLoop, asyncio.Semaphore] = (
    weakref.WeakKeyDictionary()
)


async def inspect(path: Path, *, deadline_s: float = 10.0) -> ApkFacts:
    """Read the APK at `path` in a child process; at most two run at once, the others wait their turn.

    `deadline_s` counts from the child's start. Raises InvalidApk.
    """
    turn = _children.setdefault(asyncio.get_running_loop(), asyncio.Semaphore(CHILDREN_AT_ONCE))
    async with turn:
        try:
            async with asyncio.timeout(deadline_s):
                answer = await _ask_child(path)
        except TimeoutError:
            raise InvalidApk("the file takes too long to read") from None
    if message := answer.get("refused"):
        raise InvalidApk(message, **answer["params"])
    facts = answer["facts"]
    icon = answer["icon"]
    return ApkFacts(
        **{
            **facts,
            "permissions": tuple(facts["permissions"]),
            "abis": tuple(facts["abis"]),
            "icon_png": None if icon is None else base64.b64decode(icon),
        }
    )


async def _ask_child(path: Path) -> dict[str, Any]:
    child = await asyncio.create_subprocess_exec(
        *_child_command(path),
        stdin=asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.DEVNULL,
        cwd=_ROOT,
        env={"LANG": "C.UTF-8", "PATH": os.defpath},
        start_new_session=True,
    )
    assert child.stdout is not None
    try:
        answer = await _read_at_most(child.stdout, _ANSWER_LIMIT)
        await child.wait()
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode != 0 or answer is None:
        raise InvalidApk("the file cannot be read within the limits on memory and time")
    parsed: dict[str, Any] = json.loads(answer)
    return parsed


def _child_command(path: Path) -> list[str]:
    # -B: RLIMIT_FSIZE forbids the child to write any file, its byte code too.
    return [sys.executable, "-B", "-s", "-m", "phones.apk", str(path.absolute())]


async def _read_at_most(stream: asyncio.StreamReader, limit: int) -> bytes | None:
    """All that comes until the end, or None where that is more than `limit` bytes."""
    read = bytearray()
    while chunk := await stream.read(64 << 10):
        read += chunk
        if len(read) > limit:
            return None
    return bytes(read)


# --- From here on everything runs in the child. -------------------------------------------------


def main(path: Path) -> None:
    """Print what the file says, or why it is refused, as JSON."""
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_LIMIT, _MEMORY_LIMIT))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_LIMIT_S, _CPU_LIMIT_S))
    resource.setrlimit(resource.RLIMIT_FSIZE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        answer = _read(path)
    except InvalidApk as refusal:
        answer = _refused(refusal)
    except MemoryError:
        answer = _refused(InvalidApk("reading the file takes too much memory"))
    # Parsers of a format without checks raise whatever the damage leads to.
    except Exception:
        answer = _refused(InvalidApk("the file is damaged or is not an APK"))
    json.dump(answer, sys.stdout)


def _read(path: Path) -> dict[str, Any]:
    with _open_archive(path) as archive:
        manifest = _parse_manifest(_member(archive, "AndroidManifest.xml", MAX_MANIFEST_BYTES))
        apk = _Apk(archive, manifest)
        facts = apk.facts()
        icon = _or_none(apk.icon)
    listed = asdict(replace(facts, icon_png=None))
    return {"facts": listed, "icon": None if icon is None else base64.b64encode(icon).decode()}


def _refused(refusal: InvalidApk) -> dict[str, Any]:
    return {"refused": refusal.message, "params": refusal.params}


def _open_archive(path: Path) -> zipfile.ZipFile:
    """The archive, once its directory has shown itself to be harmless. No member is read for that."""
    _check_end_record(path)
    try:
        archive = zipfile.ZipFile(path)
    # NotImplementedError is what zipfile says of a version of the format that it does not know.
    except (zipfile.BadZipFile, NotImplementedError, struct.error, OSError, ValueError):
        raise InvalidApk("the file is damaged: its zip directory cannot be read") from None
    entries = archive.infolist()
    names = [entry.filename for entry in entries]
    if len(entries) > MAX_ENTRIES:
        raise InvalidApk("the archive holds more than {limit} files", limit=MAX_ENTRIES)
    if any(_leaves_its_folder(entry) for entry in entries):
        raise InvalidApk("the archive holds file names that lead out of it")
    if any(entry.flag_bits & 0x1 for entry in entries):
        raise InvalidApk("the archive is encrypted")
    for single in ("AndroidManifest.xml", "resources.arsc"):
        if names.count(single) > 1:
            raise InvalidApk("the archive holds {name} more than once", name=single)
    if "AndroidManifest.xml" not in names:
        if any(name.endswith(".apk") for name in names):
            raise InvalidApk("this is a bundle of several APKs; send the base APK alone")
        raise InvalidApk("the file is a zip archive, but no APK: it has no AndroidManifest.xml")
    if archive.getinfo("AndroidManifest.xml").file_size > MAX_MANIFEST_BYTES:
        raise InvalidApk("its {name} is too large", name="AndroidManifest.xml")
    if "resources.arsc" in names and archive.getinfo("resources.arsc").file_size > MAX_RESOURCES_BYTES:
        raise InvalidApk("its {name} is too large", name="resources.arsc")
    return archive


def _check_end_record(path: Path) -> None:
    """Refuse by the 22 bytes at the end what zipfile would read as a whole before it can be counted."""
    with path.open("rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - 22 - 0xFFFF))
        tail = file.read()
    place = tail.rfind(b"PK\5\6")
    if place < 0 or len(tail) < place + 22:
        raise InvalidApk("the file is not an APK, or was cut off: it has no zip directory")
    count, directory_bytes = struct.unpack_from("<HI", tail, place + 10)
    # 0xFFFF announces ZIP64, which Android does not read.
    if count > MAX_ENTRIES or directory_bytes > MAX_DIRECTORY_BYTES:
        raise InvalidApk(
            "the archive holds more than {limit} files, or their names are too long", limit=MAX_ENTRIES
        )


def _leaves_its_folder(entry: zipfile.ZipInfo) -> bool:
    # orig_filename: zipfile cuts the other one at a NUL.
    name = entry.orig_filename
    return (
        name.startswith("/")
        or "\\" in name
        or "\0" in name
        or ".." in name.split("/")
        or stat.S_ISLNK(entry.external_attr >> 16)
    )


def _member(archive: zipfile.ZipFile, name: str, limit: int) -> bytes:
    """A member's content; InvalidApk where it is damaged or larger than `limit` bytes."""
    try:
        # bzip2 and LZMA cannot be unpacked in measured pieces, and Android knows neither.
        if archive.getinfo(name).compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise InvalidApk("its {name} is packed in a way Android does not know", name=name)
        with archive.open(name) as file:
            content = file.read(limit + 1)
    # NotImplementedError is what zipfile says of encryption and patches that it does not know.
    except (zipfile.BadZipFile, EOFError, zlib.error, NotImplementedError, RuntimeError, OSError, KeyError):
        raise InvalidApk("the file is damaged: its {name} cannot be unpacked", name=name) from None
    if len(content) > limit:
        raise InvalidApk("its {name} is too large", name=name)
    return content


def _parse_manifest(content: bytes) -> Any:
    """The manifest's root element, as lxml has it."""
    _check_depth(content)
    _silence_parsers()
    from pyaxmlparser.axmlprinter import AXMLPrinter

    root = _or_none(lambda: AXMLPrinter(content).get_xml_obj())
    if root is None or root.tag != "manifest":
        raise InvalidApk("its AndroidManifest.xml cannot be read")
    return root


def _check_depth(content: bytes) -> None:
    """Refuse what nests deeper than any real manifest: the parser's time grows with its square."""
    place, depth = 8, 0
    while place + 8 <= len(content):
        kind, _, size = struct.unpack_from("<HHI", content, place)
        depth += _NESTING.get(kind, 0)
        if depth > MAX_MANIFEST_DEPTH:
            raise InvalidApk("its AndroidManifest.xml is nested too deeply")
        place += max(size, 8)


def _silence_parsers() -> None:
    import logging

    logging.disable()


def _or_none(read: Callable[[], T | None]) -> T | None:
    """What `read` gives; None where the damage reaches it, so that one field does not lose the others."""
    try:
        return read()
    except Exception:
        return None


class _Apk:
    """An APK's parsed manifest beside its archive, whose resources are read when first needed."""

    def __init__(self, archive: zipfile.ZipFile, manifest: Any) -> None:
        self._archive = archive
        self._manifest = manifest
        self._resources: Any = None
        self._resources_read = False
        self._package = manifest.get("package") or ""
        if len(self._package) > 255 or not _PACKAGE.fullmatch(self._package):
            raise InvalidApk("its AndroidManifest.xml names no valid package")

    def facts(self) -> ApkFacts:
        """Everything but the icon."""
        names = self._archive.namelist()
        return ApkFacts(
            package=self._package,
            label=_or_none(self._label) or self._package,
            version_name=_or_none(lambda: _clean(self._text(self._manifest, "versionName"))),
            version_code=_or_none(self._version_code),
            min_sdk=_or_none(lambda: self._sdk("minSdkVersion")),
            target_sdk=_or_none(lambda: self._sdk("targetSdkVersion")),
            permissions=_or_none(self._permissions) or (),
            abis=tuple(sorted({found[1] for name in names if (found := _NATIVE_LIBRARY.fullmatch(name))})),
            launcher_activity=_or_none(self._launcher_name),
            split=_clean(self._manifest.get("split")),
            icon_png=None,
        )

    def icon(self) -> bytes | None:
        """The largest bitmap of the icon as PNG; None where it is drawn by XML alone, or missing."""
        for element in (self._manifest.find("application"), self._launcher()):
            value = _attribute(element, "icon")
            if value is not None and (bitmap := self._largest_bitmap(value)):
                return _as_png(bitmap)
        return None

    def _label(self) -> str | None:
        for element in (self._manifest.find("application"), self._launcher()):
            if label := _clean(self._text(element, "label")):
                return label
        return None

    def _version_code(self) -> int | None:
        return _integer(self._text(self._manifest, "versionCode"))

    def _sdk(self, name: str) -> int | None:
        """An API level; a preview's codename may carry a fingerprint after a dot."""
        value = self._text(self._manifest.find("uses-sdk"), name)
        if value is None:
            return None
        codename = _CODENAMES.get(value.partition(".")[0])
        return codename if codename is not None else _integer(value)

    def _permissions(self) -> tuple[str, ...]:
        tags = ("uses-permission", "uses-permission-sdk-23")
        names = {
            _attribute(element, "name") or "" for tag in tags for element in self._manifest.iterfind(tag)
        }
        return tuple(sorted(name for name in names if _PERMISSION.fullmatch(name))[:MAX_PERMISSIONS])

    def _launcher_name(self) -> str | None:
        name = _attribute(self._launcher(), "name")
        if name is None:
            return None
        if name.startswith("."):
            name = self._package + name
        elif "." not in name:
            name = f"{self._package}.{name}"
        return name if len(name) <= 255 and _COMPONENT.fullmatch(name) else None

    def _launcher(self) -> Any:
        """The first enabled activity that a home screen shows, or None."""
        for activity in self._activities():
            for intents in activity.iterfind("intent-filter"):
                actions = {_attribute(action, "name") for action in intents.iterfind("action")}
                categories = {_attribute(category, "name") for category in intents.iterfind("category")}
                if (
                    "android.intent.action.MAIN" in actions
                    and "android.intent.category.LAUNCHER" in categories
                ):
                    return activity
        return None

    def _activities(self) -> Iterator[Any]:
        for application in self._manifest.iterfind("application"):
            for element in application:
                if (
                    element.tag in ("activity", "activity-alias")
                    and _attribute(element, "enabled") != "false"
                ):
                    yield element

    def _text(self, element: Any, name: str) -> str | None:
        """An attribute's text, looked up in the resources where it is a reference."""
        value = _attribute(element, name)
        if value is None or not _REFERENCE.fullmatch(value):
            return value
        from pyaxmlparser.arscutil import ARSCResTableConfig

        found = self._configured(value, ARSCResTableConfig.default_config())
        return next((text for _, text in found if isinstance(text, str)), None)

    def _configured(self, reference: str, wanted: Any = None) -> list[tuple[Any, Any]]:
        """Pairs of configuration and value for a reference to our own resources; all where none is wanted."""
        resources = self._own_resources()
        if resources is None or not reference.startswith("@") or reference.startswith("@android:"):
            return []
        found: list[tuple[Any, Any]] = resources.get_resolved_res_configs(int(reference[1:], 16), wanted)
        return found

    def _own_resources(self) -> Any:
        if not self._resources_read:
            self._resources_read = True
            self._resources = _or_none(self._parse_resources)
        return self._resources

    def _parse_resources(self) -> Any:
        from pyaxmlparser.arscparser import ARSCParser

        return ARSCParser(_member(self._archive, "resources.arsc", MAX_RESOURCES_BYTES))

    def _largest_bitmap(self, reference: str) -> Any:
        """The widest PNG or WebP that the reference means for any screen, opened but not yet decoded."""
        files = {name for _, name in self._configured(reference) if isinstance(name, str)}
        bitmaps = [
            bitmap
            for name in sorted(files)[:MAX_ICON_CANDIDATES]
            if (bitmap := _or_none(lambda name=name: self._open_bitmap(name))) is not None  # type: ignore[misc]  # mypy cannot infer a lambda with a default
        ]
        return max(bitmaps, key=lambda bitmap: int(bitmap.width), default=None)

    def _open_bitmap(self, name: str) -> Any:
        import io

        from PIL import Image

        if name.endswith(".xml"):
            return None
        bitmap = Image.open(io.BytesIO(_member(self._archive, name, MAX_ICON_BYTES)), formats=("PNG", "WEBP"))
        return bitmap if 0 < bitmap.width * bitmap.height <= MAX_ICON_PIXELS else None


def _as_png(bitmap: Any) -> bytes:
    import io

    shown = bitmap.convert("RGBA")
    shown.thumbnail((ICON_SIZE, ICON_SIZE))
    out = io.BytesIO()
    shown.save(out, "PNG")
    return out.getvalue()


def _attribute(element: Any, name: str) -> str | None:
    """An android: attribute; some packers leave its namespace out."""
    if element is None:
        return None
    value: str | None = element.get(_ANDROID + name)
    return element.get(name) if value is None else value


def _integer(text: str | None) -> int | None:
    """A 32-bit number as aapt writes it, decimal or hexadecimal."""
    if text is None:
        return None
    number = int(text, 16) if text.startswith("0x") else int(text)
    return number if -(1 << 31) <= number < 1 << 31 else None


def _clean(text: str | None) -> str | None:
    """A stranger's text on one line: no control characters, nothing that turns the reading direction."""
    if text is None:
        return None
    line = " ".join(text[: MAX_TEXT * 4].split())
    kept = "".join(
        sign for sign in line if sign not in _BIDI_CONTROLS and unicodedata.category(sign) not in ("Cc", "Cs")
    )
    return kept[:MAX_TEXT].strip() or None


if __name__ == "__main__":
    main(Path(sys.argv[1]))
