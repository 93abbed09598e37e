"""Small valid APKs, and hostile ones, made without any Android SDK.

Formats: AndroidManifest.xml and resources.arsc are chunks as declared in AOSP's
`frameworks/base/libs/androidfw/include/androidfw/ResourceTypes.h`. The same arguments give the same bytes.
"""

import io
import struct
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from PIL import Image

_STRING_POOL, _TABLE, _XML = 0x0001, 0x0002, 0x0003
_START_NAMESPACE, _END_NAMESPACE, _START_ELEMENT, _END_ELEMENT = 0x0100, 0x0101, 0x0102, 0x0103
_RESOURCE_MAP = 0x0180
_PACKAGE, _TYPE, _TYPE_SPEC = 0x0200, 0x0201, 0x0202
_REFERENCE, _STRING, _INTEGER = 0x01, 0x03, 0x10
_NONE: Final = 0xFFFFFFFF
_UTF8: Final = 1 << 8

_ANDROID: Final = "http://schemas.android.com/apk/res/android"
_ATTRIBUTE_IDS: Final = {
    "label": 0x01010001,
    "icon": 0x01010002,
    "name": 0x01010003,
    "minSdkVersion": 0x0101020C,
    "versionCode": 0x0101021B,
    "versionName": 0x0101021C,
    "targetSdkVersion": 0x01010270,
}

_ICON_TYPE, _STRING_TYPE = 1, 2
_ICON_ID, _LABEL_ID, _VERSION_ID = 0x7F010000, 0x7F020000, 0x7F020001
_ICON_FILES: Final = {160: ("res/drawable-mdpi/icon.png", 48), 320: ("res/drawable-xhdpi/icon.png", 96)}

SAMPLES = Path(__file__).parent.parent.parent / "shared" / "apks"
"""Real APKs, where the checkout stands beside some."""


@dataclass(frozen=True, slots=True)
class Reference:
    """A value that stands in resources.arsc under this id."""

    id: int


Value = str | int | Reference
Element = tuple[str, dict[str, Value], list["Element"]]


def build_apk(
    package: str = "com.example.app",
    label: str = "Example",
    version_name: str | None = "1.0",
    version_code: int = 1,
    min_sdk: int | str | None = 21,
    target_sdk: int | str | None = 33,
    permissions: Sequence[str] = (),
    abis: Sequence[str] = (),
    icon_rgb: tuple[int, int, int] | None = (61, 220, 132),
    split: str | None = None,
    activity: str | None = ".MainActivity",
    by_reference: bool = False,
    icon: bytes | None = None,
) -> bytes:
    """An APK that says these things of itself.

    `by_reference` puts label and version name into resources.arsc, as real ones do. `icon` replaces the drawn
    PNG by other bytes; `icon_rgb=None` leaves the icon out.
    """
    has_icon = icon_rgb is not None or icon is not None
    manifest = _manifest(
        package, label, version_name, version_code, min_sdk, target_sdk, permissions, split, activity,
        by_reference, has_icon,
    )  # fmt: skip
    members = {"AndroidManifest.xml": manifest}
    if has_icon or by_reference:
        members["resources.arsc"] = _resources(package, label, version_name or "", has_icon)
    for name, size in _ICON_FILES.values():
        if has_icon:
            members[name] = icon if icon is not None else draw_icon(size, icon_rgb or (0, 0, 0))
    for abi in abis:
        members[f"lib/{abi}/libexample.so"] = b"\x7fELF"
    return build_zip(members)


def draw_icon(size: int, rgb: tuple[int, int, int], file_format: str = "PNG") -> bytes:
    """A square bitmap of one colour, `size` pixels wide."""
    out = io.BytesIO()
    Image.new("RGB", (size, size), rgb).save(out, file_format)
    return out.getvalue()


def build_zip(members: dict[str, bytes]) -> bytes:
    """A zip archive without anything that depends on the clock or the machine."""
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, content in members.items():
            archive.writestr(zipfile.ZipInfo(name), content, zipfile.ZIP_DEFLATED)
    return out.getvalue()


def unpack(archive: bytes) -> dict[str, bytes]:
    """The members of an archive by name, for `build_zip` to pack again when they have been changed."""
    with zipfile.ZipFile(io.BytesIO(archive)) as opened:
        return {name: opened.read(name) for name in opened.namelist()}


def manifest_bomb(unpacked_bytes: int = 1 << 30) -> bytes:
    """An archive of about a thousandth of `unpacked_bytes`, whose manifest unpacks to that many zeros."""
    return _packed_zeros("AndroidManifest.xml", unpacked_bytes, declared_bytes=unpacked_bytes)


def lying_sizes(unpacked_bytes: int = 64 << 20) -> bytes:
    """Like `manifest_bomb`, but the directory says the manifest has 1,000 bytes."""
    return _packed_zeros("AndroidManifest.xml", unpacked_bytes, declared_bytes=1000)


def slow_resources(unpacked_bytes: int = 60 << 20) -> bytes:
    """A small APK that takes seconds to read: its string table claims a string for every four bytes."""
    pool = struct.pack("<HHI5I", _STRING_POOL, 28, unpacked_bytes, unpacked_bytes // 4 - 7, 0, _UTF8, 28, 0)
    table = struct.pack("<HHII", _TABLE, 12, 12 + unpacked_bytes, 1)
    members = unpack(build_apk())
    members["resources.arsc"] = table + pool + bytes(unpacked_bytes - len(pool))
    return build_zip(members)


def many_entries(count: int = 200_000) -> bytes:
    """An archive with `count` empty files and an honest end record (ZIP64 where the count needs it)."""
    apk = build_apk()
    end = apk.rindex(b"PK\5\6")
    known, size, offset = struct.unpack_from("<HII", apk, end + 10)
    directory = apk[offset : offset + size] + b"".join(
        _directory_entry(b"f%07d" % number, 0, 0, 0, 0, offset=0) for number in range(count)
    )
    return apk[:offset] + directory + _end_records(known + count, len(directory), offset)


def encrypted() -> bytes:
    """A valid APK whose directory says that the manifest is encrypted."""
    apk = bytearray(build_apk())
    flags_at = apk.index(b"PK\1\2") + 8
    apk[flags_at] |= 1
    return bytes(apk)


def doubled_manifest() -> bytes:
    """Two manifests under one name: programs differ in which of them they believe."""
    out = io.BytesIO(build_apk(package="com.example.first"))
    other = unpack(build_apk(package="com.example.second"))["AndroidManifest.xml"]
    with zipfile.ZipFile(out, "a") as archive:
        # A name of the same length, exchanged below: zipfile warns of a double name.
        archive.writestr("AndroidManifest.XML", other)
    return out.getvalue().replace(b"AndroidManifest.XML", b"AndroidManifest.xml")


def with_member(name: str, content: bytes = b"x", *, mode: int = 0) -> bytes:
    """A valid APK with one more file under any name, such as `../../escape`; `mode` is its Unix mode."""
    out = io.BytesIO(build_apk())
    member = zipfile.ZipInfo(name)
    member.filename = name
    member.external_attr = mode << 16
    with zipfile.ZipFile(out, "a") as archive:
        archive.writestr(member, content)
    return out.getvalue()


def truncated() -> bytes:
    """The first half of a valid APK."""
    apk = build_apk()
    return apk[: len(apk) // 2]


def _manifest(
    package: str,
    label: str,
    version_name: str | None,
    version_code: int,
    min_sdk: int | str | None,
    target_sdk: int | str | None,
    permissions: Iterable[str],
    split: str | None,
    activity: str | None,
    by_reference: bool,
    has_icon: bool,
) -> bytes:
    root: dict[str, Value] = {"versionCode": version_code, "package": package}
    if version_name is not None:
        root["versionName"] = Reference(_VERSION_ID) if by_reference else version_name
    if split is not None:
        root["split"] = split
    sdk: dict[str, Value] = {}
    if min_sdk is not None:
        sdk["minSdkVersion"] = min_sdk
    if target_sdk is not None:
        sdk["targetSdkVersion"] = target_sdk
    application: dict[str, Value] = {"label": Reference(_LABEL_ID) if by_reference else label}
    if has_icon:
        application["icon"] = Reference(_ICON_ID)
    children: list[Element] = [("uses-sdk", sdk, [])]
    children += [("uses-permission", {"name": name}, []) for name in permissions]
    children += [("application", application, [_launcher(activity)] if activity else [])]
    return build_axml(("manifest", root, children))


def _launcher(activity: str) -> Element:
    return (
        "activity",
        {"name": activity},
        [
            (
                "intent-filter",
                {},
                [
                    ("action", {"name": "android.intent.action.MAIN"}, []),
                    ("category", {"name": "android.intent.category.LAUNCHER"}, []),
                ],
            )
        ],
    )


def build_axml(root: Element) -> bytes:
    """Binary XML. Attributes known to Android get its namespace and id, the others have neither."""
    strings = list(_ATTRIBUTE_IDS)
    places = {text: place for place, text in enumerate(strings)}

    def place(text: str) -> int:
        if text not in places:
            places[text] = len(strings)
            strings.append(text)
        return places[text]

    def attribute(name: str, value: Value) -> bytes:
        namespace = place(_ANDROID) if name in _ATTRIBUTE_IDS else _NONE
        match value:
            case str():
                raw, kind, content = place(value), _STRING, place(value)
            case int():
                raw, kind, content = _NONE, _INTEGER, value & _NONE
            case Reference():
                raw, kind, content = _NONE, _REFERENCE, value.id
        return struct.pack("<IIIHBBI", namespace, place(name), raw, 8, 0, kind, content)

    def element(name: str, attributes: dict[str, Value], children: list[Element]) -> bytes:
        # Android looks attributes up by id and expects them in its order.
        ordered = sorted(attributes.items(), key=lambda item: _ATTRIBUTE_IDS.get(item[0], _NONE))
        packed = b"".join(attribute(key, value) for key, value in ordered)
        start = struct.pack("<IIHHHHHH", _NONE, place(name), 20, 20, len(ordered), 0, 0, 0)
        return (
            _node(_START_ELEMENT, start + packed)
            + b"".join(element(*child) for child in children)
            + _node(_END_ELEMENT, struct.pack("<II", _NONE, place(name)))
        )

    namespace = struct.pack("<II", place("android"), place(_ANDROID))
    body = _node(_START_NAMESPACE, namespace) + element(*root) + _node(_END_NAMESPACE, namespace)
    ids = struct.pack(f"<{len(_ATTRIBUTE_IDS)}I", *_ATTRIBUTE_IDS.values())
    return _chunk(_XML, b"", _string_pool(strings) + _chunk(_RESOURCE_MAP, b"", ids) + body)


def _resources(package: str, label: str, version_name: str, has_icon: bool) -> bytes:
    """resources.arsc: drawable/icon for two densities, string/app_name and string/version."""
    values = [name for name, _ in _ICON_FILES.values()] + [label, version_name]
    chunks = b""
    if has_icon:
        chunks += _type_spec(_ICON_TYPE, 1)
        for place, density in enumerate(_ICON_FILES):
            chunks += _type(_ICON_TYPE, density, [(0, place)])
    chunks += _type_spec(_STRING_TYPE, 2) + _type(_STRING_TYPE, 0, [(1, 2), (2, 3)])
    types, keys = _string_pool(["drawable", "string"]), _string_pool(["icon", "app_name", "version"])
    header_size = 288
    header = struct.pack(
        "<I256sIIIII", 0x7F, package[:127].encode("utf-16-le"), header_size, 2, header_size + len(types), 3, 0
    )
    return _chunk(
        _TABLE, struct.pack("<I", 1), _string_pool(values) + _chunk(_PACKAGE, header, types + keys + chunks)
    )


def _type_spec(type_id: int, count: int) -> bytes:
    return _chunk(_TYPE_SPEC, struct.pack("<BBHI", type_id, 0, 0, count), bytes(4 * count))


def _type(type_id: int, density: int, entries: list[tuple[int, int]]) -> bytes:
    """The entries of one resource type for one density: (place of the key, place of the string)."""
    config = struct.pack("<IIIHH", 64, 0, 0, 0, density) + bytes(48)
    offsets = struct.pack(f"<{len(entries)}I", *(16 * number for number in range(len(entries))))
    start = 8 + 12 + len(config) + len(offsets)
    header = struct.pack("<BBHII", type_id, 0, 0, len(entries), start) + config
    packed = b"".join(struct.pack("<HHIHBBI", 8, 0, key, 8, 0, _STRING, value) for key, value in entries)
    return _chunk(_TYPE, header, offsets + packed)


def _string_pool(strings: Sequence[str]) -> bytes:
    packed, offsets = b"", []
    for text in strings:
        offsets.append(len(packed))
        encoded = text.encode()
        packed += _length(len(text.encode("utf-16-le")) // 2) + _length(len(encoded)) + encoded + b"\0"
    packed += bytes(-len(packed) % 4)
    header = struct.pack("<IIIII", len(strings), 0, _UTF8, 28 + 4 * len(strings), 0)
    return _chunk(_STRING_POOL, header, struct.pack(f"<{len(offsets)}I", *offsets) + packed)


def _length(count: int) -> bytes:
    return bytes([count]) if count < 0x80 else struct.pack(">H", 0x8000 | count)


def _node(kind: int, body: bytes) -> bytes:
    return _chunk(kind, struct.pack("<II", 1, _NONE), body)


def _chunk(kind: int, header: bytes, body: bytes) -> bytes:
    return struct.pack("<HHI", kind, 8 + len(header), 8 + len(header) + len(body)) + header + body


def _packed_zeros(name: str, unpacked_bytes: int, *, declared_bytes: int) -> bytes:
    block = bytes(1 << 20)
    packer = zlib.compressobj(9, zlib.DEFLATED, -15)
    packed, checksum = bytearray(), 0
    for left in range(unpacked_bytes, 0, -len(block)):
        part = block[:left]
        packed += packer.compress(part)
        checksum = zlib.crc32(part, checksum)
    packed += packer.flush()
    raw = name.encode()
    local = struct.pack(
        "<4sHHHHHIIIHH", b"PK\3\4", 20, 0, 8, 0, 33, checksum, len(packed), declared_bytes, len(raw), 0
    )
    directory = _directory_entry(raw, 8, checksum, len(packed), declared_bytes, offset=0)
    body = local + raw + bytes(packed)
    return body + directory + _end_records(1, len(directory), len(body))


def _directory_entry(
    name: bytes, method: int, checksum: int, packed: int, size: int, *, offset: int
) -> bytes:
    return (
        struct.pack(
            "<4sHHHHHHIIIHHHHHII",
            b"PK\1\2", 20, 20, 0, method, 0, 33, checksum, packed, size, len(name), 0, 0, 0, 0, 0, offset,
        )
        + name
    )  # fmt: skip


def _end_records(count: int, size: int, offset: int) -> bytes:
    zip64 = b""
    if count >= 0xFFFF:
        zip64 = struct.pack("<4sQHHIIQQQQ", b"PK\6\6", 44, 45, 45, 0, 0, count, count, size, offset)
        zip64 += struct.pack("<4sIQI", b"PK\6\7", 0, offset + size, 1)
    shown = min(count, 0xFFFF)
    return zip64 + struct.pack("<4sHHHHIIH", b"PK\5\6", 0, 0, shown, shown, size, offset, 0)
