"""`python -m phones.image`: a container image of the simulated phone, made of what this machine has.

No registry and no base image: the image holds this Python with the part of its library that a phone can
need, Pillow and the APK parser, our own `phones/`, a few fonts, and every shared library that these ask the
loader for. Where this machine has `iptables`, it comes along: who runs phones can then set firewall rules
from a container of the same image. There is no shell in it.

A container of it takes the simulator's options as its command and keeps everything in /data. It runs as
USER_ID with no capability, on a read-only root. The engine is spoken to directly, as this one call streams a
tar that no client library knows: https://docs.docker.com/reference/api/engine/ (ImageCreate).
"""

import argparse
import asyncio
import io
import json
import os
import platform
import py_compile
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from dataclasses import dataclass, field
from importlib import metadata
from importlib.util import MAGIC_NUMBER, cache_from_source
from pathlib import Path
from typing import IO, Final

import aiohttp

from phones.engine import DEFAULT_URL
from phones.simulator import fonts

DEFAULT_REFERENCE: Final = "cloudphone/simulated-phone:latest"
LABEL: Final = "cloudphone.phone=simulated"
USER_ID: Final = 2000

_ROOT: Final = Path(__file__).resolve().parent.parent
_OWN: Final = ("__init__.py", "apk.py", "sync.py", "wire.py", "simulator/**/*.py")
_PACKAGES: Final = ("pillow", "pyaxmlparser", "lxml", "asn1crypto")
# What no phone imports. TLS, for one, would come along with asyncio and cost each phone 4 MB of memory.
_NOT_FROM_PACKAGES: Final = re.compile(
    r"(^\.\.|\.libs/|\.dist-info/|__pycache__/|lxml/(html|includes|isoschematron|objectify)"
    r"|PIL/_(avif|imagingcms|imagingtk)\.|\.(pyi|pyx|pxd|pxi|h|c|rnc|rng|xsl)$)"
)
_NOT_FROM_LIBRARY: Final = re.compile(
    r"(config-.*|curses|dbm|dist-packages|distutils|ensurepip|idlelib|lib-dynload|lib2to3|pydoc_data"
    r"|site-packages|sqlite3|test|tests|tkinter|turtle\.py|turtledemo|unittest|venv|wsgiref|xmlrpc|__pycache__)"
)
_NOT_FROM_EXTENSIONS: Final = re.compile(
    r"_?(codecs_.*|crypt|ctypes_test|curses.*|dbm|gdbm|hashlib|sqlite3|ssl|test.*|tkinter|nis|ossaudiodev"
    r"|readline|spwd|xx.*)\..*"
)
_EXTENSION_PLACES: Final = ("/usr/lib/*/xtables", "/usr/lib64/xtables", "/usr/lib/xtables", "/lib/xtables")
_LDD_LINE: Final = re.compile(r"^\s+(?:\S+ => )?(/.+) \(0x[0-9a-f]+\)$", re.MULTILINE)
_ARCHITECTURES: Final = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "i686": "386"}
_CHUNK: Final = 1 << 20

_ANSWER_S: Final = 10.0
_COLLECT_S: Final = 180.0
_LOAD_S: Final = 300.0
_REMOVE_S: Final = 30.0


class ImageFault(Exception):
    """The image cannot be built; the text is one line for whoever asked for it."""


async def build(url: str, reference: str, report: Callable[[str], None]) -> None:
    """Build the image and load it into the engine at `url` under the name `reference`.

    `url` is unix://PATH, tcp://HOST:PORT or http://HOST:PORT. `report` gets a line for each step. An image
    that had the name before loses it, and goes unless something uses it. Raises ImageFault.
    """
    began = time.monotonic()
    base, connector = _door(url)
    async with aiohttp.ClientSession(
        connector=connector, timeout=aiohttp.ClientTimeout(total=None)
    ) as engine:
        await _check(engine, base, url)
        with await asyncio.to_thread(tempfile.TemporaryFile) as tar:
            report(f"collecting Python {platform.python_version()} and the simulated phone ...")
            size = await _collect(tar, report)
            report(f"loading {size / 1e6:.0f} MB into {url} ...")
            try:
                replaced = await _id_of(engine, base, reference)
                await _load(engine, base, reference, tar)
                await _remove_unused(engine, base, replaced)
            except (aiohttp.ClientError, ValueError, OSError, TimeoutError) as fault:
                raise ImageFault(f"the engine at {url} failed: {_told(fault)}") from fault
    report(f"{reference} is ready, after {time.monotonic() - began:.1f} s")


def sources() -> list[Path]:
    """Our own files that go into an image or decide what does, sorted."""
    phones = _ROOT / "phones"
    return sorted([Path(__file__), *(file for pattern in _OWN for file in phones.glob(pattern))])


# --- The engine ---------------------------------------------------------------------------------


def _door(url: str) -> tuple[str, aiohttp.BaseConnector]:
    scheme, _, place = url.partition("://")
    if scheme == "unix" and place.startswith("/"):
        return "http://engine", aiohttp.UnixConnector(place)
    if scheme in ("tcp", "http") and place:
        return f"http://{place.rstrip('/')}", aiohttp.TCPConnector()
    raise ImageFault(
        f"{url!r} is no engine this can speak to: unix://PATH, tcp://HOST:PORT or http://HOST:PORT"
    )


async def _check(engine: aiohttp.ClientSession, base: str, url: str) -> None:
    """Refuse at once where no engine answers, or one that could not run this machine's Python."""
    try:
        async with asyncio.timeout(_ANSWER_S), engine.get(f"{base}/version") as answer:
            answer.raise_for_status()
            version = await answer.json()
    except (aiohttp.ClientError, ValueError, OSError, TimeoutError) as fault:
        raise ImageFault(f"no Docker engine answers at {url}: {_told(fault)}") from fault
    ours = _ARCHITECTURES.get(platform.machine(), platform.machine())
    if sys.platform != "linux" or (version.get("Os"), version.get("Arch")) != ("linux", ours):
        raise ImageFault(
            f"the engine at {url} runs {version.get('Os')}/{version.get('Arch')} and cannot run the Python of"
            f" this machine ({sys.platform}/{ours}); build the image on a machine like the engine's"
        )


async def _load(engine: aiohttp.ClientSession, base: str, reference: str, tar: IO[bytes]) -> None:
    name, _, tag = reference.rpartition(":")
    if not name or "/" in tag:
        name, tag = reference, "latest"
    asked = [("fromSrc", "-"), ("repo", name), ("tag", tag), *(("changes", change) for change in _changes())]
    async with (
        asyncio.timeout(_LOAD_S),
        engine.post(f"{base}/images/create", params=asked, data=_read(tar)) as answer,
    ):
        said = await answer.text()
    # A failure in the middle comes as a line of an answer that has begun with 200.
    lines = [json.loads(line) for line in said.splitlines() if line]
    refusal = next((line.get("error") or line.get("message") for line in lines if "status" not in line), None)
    if refusal is not None or answer.status >= 400:
        raise ImageFault(f"the engine refuses the image: {' '.join(str(refusal).split())}")


async def _id_of(engine: aiohttp.ClientSession, base: str, reference: str) -> str:
    """Which image has this name now; "" where none has."""
    async with asyncio.timeout(_ANSWER_S), engine.get(f"{base}/images/{reference}/json") as answer:
        return str((await answer.json()).get("Id", ""))


async def _remove_unused(engine: aiohttp.ClientSession, base: str, image_id: str) -> None:
    """Remove an image that has no name any more; the engine keeps one that a container is made of."""
    if not image_id:
        return
    async with asyncio.timeout(_REMOVE_S):
        async with engine.get(f"{base}/images/{image_id}/json") as answer:
            names = (await answer.json()).get("RepoTags")
        if not names:
            async with engine.delete(f"{base}/images/{image_id}"):
                pass


def _changes() -> tuple[str, ...]:
    """What the engine is to know of the image, as lines of a Dockerfile."""
    return (
        # -S: nothing is installed where `site` would look, and every phone would pay for the looking.
        f"ENTRYPOINT {json.dumps(['/usr/bin/python3', '-P', '-s', '-S', '-m', 'phones.simulator'])}",
        "ENV PYTHONPATH=/app",
        "ENV PATH=/usr/bin:/usr/sbin",
        "ENV LANG=C.UTF-8",
        f"USER {USER_ID}:{USER_ID}",
        "WORKDIR /data",
        f"LABEL {LABEL}",
    )


async def _read(file: IO[bytes]) -> AsyncIterator[bytes]:
    while chunk := await asyncio.to_thread(file.read, _CHUNK):
        yield chunk


def _told(fault: Exception) -> str:
    if isinstance(fault, TimeoutError):
        return "it does not answer in time"
    if isinstance(fault, OSError) and fault.strerror:
        return fault.strerror
    return " ".join(str(fault).split()) or type(fault).__name__


# --- What goes in -------------------------------------------------------------------------------


@dataclass(slots=True)
class _Contents:
    """What the image is to hold. Keys are paths in it, without the leading slash."""

    compiled: Path  # a folder for byte code that this machine has not kept
    files: dict[str, Path] = field(default_factory=dict)
    links: dict[str, str] = field(default_factory=dict)

    def add_source(self, place: str, source: Path) -> None:
        """A module and its byte code: without it, a phone would compile for seconds at every start."""
        self.files[place] = source
        folder, _, name = place.rpartition("/")
        byte_code = Path(cache_from_source(name, optimization="")).name
        self.files[f"{folder}/__pycache__/{byte_code}"] = self._byte_code(source)

    def _byte_code(self, source: Path) -> Path:
        kept = Path(cache_from_source(str(source), optimization=""))
        if _is_current(kept, source):
            return kept
        made = self.compiled / f"{len(self.files)}.pyc"
        # By time: tar keeps the time of the source, to the second, as byte code does.
        by_time = py_compile.PycInvalidationMode.TIMESTAMP
        py_compile.compile(str(source), str(made), doraise=True, invalidation_mode=by_time)
        return made


async def _collect(tar: IO[bytes], report: Callable[[str], None]) -> int:
    """Write the image's root directory to `tar` and go back to its start; its size in bytes."""
    try:
        async with asyncio.timeout(_COLLECT_S):
            return await asyncio.to_thread(_write, tar, report)
    except TimeoutError:
        raise ImageFault("collecting the files takes too long") from None
    except (
        OSError,
        subprocess.SubprocessError,
        metadata.PackageNotFoundError,
        py_compile.PyCompileError,
    ) as fault:
        raise ImageFault(f"the files cannot be collected: {_told(fault)}") from fault


def _write(tar: IO[bytes], report: Callable[[str], None]) -> int:
    with tempfile.TemporaryDirectory() as compiled:
        contents = _Contents(Path(compiled))
        _add_python(contents)
        packages = _add_packages(contents)
        _add_own(contents)
        for font in fonts.carried():
            contents.files[f"usr/share/fonts/{font.name}"] = font
        if not _add_firewall(contents):
            report("iptables is not on this machine: this image will not set firewall rules")
        _add_libraries(contents, packages)
        _write_tar(contents, tar)
    size = tar.tell()
    tar.seek(0)
    return size


def _add_python(contents: _Contents) -> None:
    contents.files["usr/bin/python3"] = Path(sys.executable).resolve()
    library = Path(sysconfig.get_path("stdlib"))
    place = f"usr/lib/python{sysconfig.get_python_version()}"
    for folder, folders, names in os.walk(library):
        folders[:] = [name for name in folders if not _NOT_FROM_LIBRARY.fullmatch(name)]
        inside = Path(folder).relative_to(library)
        for name in names:
            if name.endswith(".py") and not _NOT_FROM_LIBRARY.fullmatch(name):
                contents.add_source(str(place / inside / name), Path(folder, name))
    for extension in (library / "lib-dynload").glob("*.so"):
        if not _NOT_FROM_EXTENSIONS.fullmatch(extension.name):
            contents.files[f"{place}/lib-dynload/{extension.name}"] = extension


def _add_packages(contents: _Contents) -> Path:
    """The Python packages from elsewhere. They lie beside ours, as the APK parser runs without PYTHONPATH."""
    for name in _PACKAGES:
        package = metadata.distribution(name)
        for file in package.files or ():
            if _NOT_FROM_PACKAGES.search(str(file)):
                continue
            source = Path(str(package.locate_file(file)))
            if file.suffix == ".py":
                contents.add_source(f"app/{file}", source)
            else:
                contents.files[f"app/{file}"] = source
    return Path(str(metadata.distribution(_PACKAGES[0]).locate_file(""))).resolve()


def _add_own(contents: _Contents) -> None:
    for source in sources():
        if source != Path(__file__):
            contents.add_source(f"app/{source.relative_to(_ROOT)}", source)


def _add_firewall(contents: _Contents) -> bool:
    """`iptables` and `ip6tables` with their extensions; False where this machine has none."""
    for name in ("iptables", "ip6tables"):
        found = shutil.which(name, path=os.pathsep.join(("/usr/sbin", "/sbin", os.environ.get("PATH", ""))))
        if found is None:
            return False
        program = Path(found).resolve()
        contents.files[f"usr/sbin/{program.name}"] = program
        if program.name != name:
            contents.links[f"usr/sbin/{name}"] = program.name
    for pattern in _EXTENSION_PLACES:
        for extension in Path("/").glob(f"{pattern[1:]}/lib*t_*.so"):
            contents.files[str(extension)[1:]] = extension
    return True


def _add_libraries(contents: _Contents, packages: Path) -> None:
    """What the loader needs to start each program and to load each library.

    Without a cache the loader looks into the folder of the C library, so all go there, but for those that a
    Python package has beside itself and finds from there.
    """
    needed = _asked_of_the_loader(contents.files.values())
    c_library = next((path for path in needed if path.name.startswith(("libc.so", "libc.musl"))), None)
    if c_library is None:
        raise ImageFault("ldd does not say which C library this Python uses")
    for library in needed:
        if library.name.startswith("ld-"):  # its place is written into every program
            contents.files[str(library)[1:]] = library
        elif library.is_relative_to(packages):
            contents.files[f"app/{library.relative_to(packages)}"] = library
        else:
            contents.files[str(c_library.with_name(library.name))[1:]] = library
    # The C library loads it by itself, when a thread ends before its work does.
    unwinder = c_library.with_name("libgcc_s.so.1")
    if unwinder.exists():
        contents.files[str(unwinder)[1:]] = unwinder


def _asked_of_the_loader(files: Iterable[Path]) -> list[Path]:
    binaries = [str(file) for file in files if file.suffix not in (".py", ".pyc") and _is_binary(file)]
    ran = subprocess.run(
        ["ldd", *binaries],
        capture_output=True,
        text=True,
        timeout=_COLLECT_S,
        check=False,
        env={"LC_ALL": "C"},
    )
    paths = {Path(os.path.normpath(path)) for path in _LDD_LINE.findall(ran.stdout)}
    return sorted(path.parent.resolve() / path.name if ".libs" in str(path) else path for path in paths)


def _is_binary(file: Path) -> bool:
    with file.open("rb") as opened:
        return opened.read(4) == b"\x7fELF"


def _is_current(byte_code: Path, source: Path) -> bool:
    """Whether Python would take this byte code for this source, going by time and size."""
    try:
        with byte_code.open("rb") as file:
            head = file.read(16)
    except OSError:
        return False
    found = source.stat()
    numbers = (0, int(found.st_mtime) & 0xFFFFFFFF, found.st_size & 0xFFFFFFFF)
    return head == MAGIC_NUMBER + b"".join(number.to_bytes(4, "little") for number in numbers)


# --- The tar ------------------------------------------------------------------------------------


def _write_tar(contents: _Contents, file: IO[bytes]) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for place in sorted(
            {parent for name in (*contents.files, "etc/passwd") for parent in _parents(name)}
        ):
            tar.addfile(_entry(place, tarfile.DIRTYPE, 0o755))
        tar.addfile(_entry("run", tarfile.DIRTYPE, 0o755))  # where iptables keeps its lock
        tar.addfile(_entry("tmp", tarfile.DIRTYPE, 0o1777))
        data = _entry("data", tarfile.DIRTYPE, 0o700)
        data.uid = data.gid = USER_ID
        tar.addfile(data)
        users = f"root:x:0:0::/:/\nphone:x:{USER_ID}:{USER_ID}::/data:/\n".encode()
        passwd = _entry("etc/passwd", tarfile.REGTYPE, 0o644)
        passwd.size = len(users)
        tar.addfile(passwd, io.BytesIO(users))
        for place, target in sorted(contents.links.items()):
            link = _entry(place, tarfile.SYMTYPE, 0o777)
            link.linkname = target
            tar.addfile(link)
        for place, source in sorted(contents.files.items()):
            with source.open("rb") as opened:
                found = os.fstat(opened.fileno())
                entry = _entry(place, tarfile.REGTYPE, 0o755 if found.st_mode & 0o100 else 0o644)
                entry.size, entry.mtime = found.st_size, int(found.st_mtime)
                tar.addfile(entry, opened)


def _entry(place: str, kind: bytes, mode: int) -> tarfile.TarInfo:
    entry = tarfile.TarInfo(place)
    entry.type, entry.mode = kind, mode
    return entry


def _parents(place: str) -> Iterator[str]:
    parts = place.split("/")
    for count in range(1, len(parts)):
        yield "/".join(parts[:count])


def main() -> None:
    """Build the image as the command line asks; exits with one line where that fails."""
    parser = argparse.ArgumentParser(prog="phones.image", description=__doc__.partition("\n")[0])
    parser.add_argument(
        "--url", default=os.environ.get("DOCKER_HOST") or DEFAULT_URL, help="the Docker engine"
    )
    parser.add_argument("--reference", default=DEFAULT_REFERENCE, help="the image's name and tag")
    options = parser.parse_args()
    try:
        asyncio.run(build(options.url, options.reference, lambda line: print(line, flush=True)))  # noqa: T201 - it speaks to a person at a terminal
    except ImageFault as fault:
        sys.exit(f"phones.image: {fault}")


if __name__ == "__main__":
    main()
