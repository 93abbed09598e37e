"""The simulated phone's file system: Android's tree, kept in one directory of the host.

Paths are the phone's (`/sdcard/a.txt`) and never the host's. They are resolved here, by text alone,
and then walked one directory descriptor at a time without following a link of the host, so that no
name leads out of the tree. What goes wrong is a `PhoneFileError` with the words Android uses.
"""

import asyncio
import errno
import os
import secrets
import shutil
import stat
from collections.abc import AsyncIterable, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import ParamSpec, TypeVar

P = ParamSpec("P")
T = TypeVar("T")

PATH_MAX_BYTES = 4096
DEPTH_MAX = 128
NULL_DEVICE = "/dev/null"

LINKS: Mapping[str, str] = MappingProxyType(
    {
        "/sdcard": "/storage/emulated/0",
        "/mnt/sdcard": "/storage/emulated/0",
        "/storage/self/primary": "/storage/emulated/0",
        "/bin": "/system/bin",
        "/etc": "/system/etc",
        "/data/user/0": "/data/data",
    }
)
"""The system's symbolic links; nobody can make others."""

DIRECTORIES = (
    *("/system/app", "/system/bin", "/system/etc", "/system/fonts", "/system/framework", "/system/lib"),
    *("/system/priv-app", "/vendor", "/product", "/apex", "/odm", "/proc", "/sys", "/dev", "/mnt", "/cache"),
    *("/data/app", "/data/data", "/data/local/tmp", "/data/misc", "/data/system", "/data/user"),
    *("/storage/self", "/storage/emulated/0/Android/data", "/storage/emulated/0/Android/obb"),
    *(f"/storage/emulated/0/{name}" for name in ("Alarms", "DCIM", "Documents", "Download")),
    *(f"/storage/emulated/0/{name}" for name in ("Movies", "Music", "Notifications", "Pictures")),
)
# What Android itself never lets go of.
_FIXED = frozenset(str(path) for name in DIRECTORIES for path in (Path(name), *Path(name).parents))
_WRITABLE = ("/data/", "/storage/emulated/0/", "/cache/")
_FORBIDDEN = ("/storage/", "/proc/", "/sys/", "/dev/", "/mnt/")

_TEXTS = {
    errno.ENOENT: "No such file or directory",
    errno.EPERM: "Operation not permitted",
    errno.EACCES: "Permission denied",
    errno.EBUSY: "Device or resource busy",
    errno.EEXIST: "File exists",
    errno.ENOTDIR: "Not a directory",
    errno.EISDIR: "Is a directory",
    errno.EINVAL: "Invalid argument",
    errno.ENOSPC: "No space left on device",
    errno.EROFS: "Read-only file system",
    errno.ENAMETOOLONG: "File name too long",
    errno.ENOTEMPTY: "Directory not empty",
    errno.ELOOP: "Too many symbolic links encountered",
    errno.EILSEQ: "Illegal byte sequence",
    errno.EIO: "I/O error",
}


class PhoneFileError(OSError):
    """A file operation the phone refuses: `errno`, `strerror` in Android's words, `filename` on the phone."""

    def __init__(self, number: int | None, path: str) -> None:
        number = number if number in _TEXTS else errno.EIO
        super().__init__(number, _TEXTS[number], path)


@dataclass(frozen=True, slots=True)
class PhoneFile:
    """What the phone says of a file. `mode` is st_mode, type included; times are Unix seconds."""

    name: str
    mode: int
    size_bytes: int
    modified_at: int
    uid: int
    gid: int
    links: int
    inode: int
    link_target: str = ""

    @property
    def is_directory(self) -> bool:
        return stat.S_ISDIR(self.mode)


def _no_kernel(_path: str) -> None:
    return None


class PhoneFiles:
    """One phone's files under `root`, a directory of the host that belongs to this phone alone.

    `kernel` gives the content of a path that is made up when it is read, such as /proc/version, or None.
    Every operation raises PhoneFileError and does its work in a thread; one that is cancelled ends
    its thread's step first. `reserve_bytes` of the host's disk are never used up.
    """

    def __init__(
        self, root: Path, *, kernel: Callable[[str], str | None] = _no_kernel, reserve_bytes: int = 64 << 20
    ) -> None:
        self._kernel = kernel
        self._tree = root / "tree"
        self._incoming = root / "incoming"
        self._reserve_bytes = reserve_bytes

    async def prepare(self, fixed: Mapping[str, str] = MappingProxyType({})) -> None:
        """Lay out Android's directories and the `fixed` files, texts by path (`/system/build.prop`).

        Repeatable: keeps what the phone's user made, rewrites `fixed`, and clears away writes that a
        crash cut off.
        """
        await _in_thread(self._prepare, fixed)

    async def stat(self, path: str, *, follow: bool = True) -> PhoneFile:
        """What stands at `path`; with `follow=False` a link of the system is told as itself."""
        return await _in_thread(self._stat, resolve(path, follow=follow))

    async def list(self, path: str) -> list[PhoneFile]:
        """What a directory holds, by name, without `.` and `..`."""
        return list(await _in_thread(self._list, resolve(path)))

    async def read(self, path: str, *, chunk_bytes: int = 1 << 20) -> AsyncIterator[bytes]:
        """A file's content, piece by piece."""
        target = resolve(path)
        if (made_up := self._kernel(target)) is not None:
            yield made_up.encode()
            return
        source = _OpenFile()
        try:
            await _in_thread(self._open_to_read, source, target)
            while source.fd >= 0 and (chunk := await _in_thread(_read_chunk, source, chunk_bytes, path)):
                yield chunk
        finally:
            await _in_thread(source.close)

    async def write(
        self,
        path: str,
        chunks: AsyncIterable[bytes],
        *,
        mode: int = 0o644,
        modified_at: int | None = None,
        append: bool = False,
        parents: bool = False,
    ) -> int:
        """Write a file and return the number of bytes written.

        The file appears under its name when it is whole, in place of an older one; with `append` the
        bytes go to the end of what is there. `parents` makes the directories above it.
        """
        target = resolve(path)
        if target == NULL_DEVICE:
            return sum([len(chunk) async for chunk in chunks])
        _check_writable(target)
        if path.endswith("/"):
            raise PhoneFileError(errno.EISDIR, target)
        draft = _OpenFile()
        written = 0
        try:
            await _in_thread(self._open_to_write, draft, target, append, parents)
            async for chunk in chunks:
                await _in_thread(self._write_chunk, draft, chunk, target)
                written += len(chunk)
            await _in_thread(self._commit, draft, target, mode, modified_at)
        finally:
            await _in_thread(draft.close)
        return written

    async def mkdir(self, path: str, *, parents: bool = False) -> None:
        """Make a directory; with `parents` also those above it, and one that is there is no error."""
        await _in_thread(self._mkdir, resolve(path), parents)

    async def remove(self, path: str, *, recursive: bool = False) -> None:
        """Remove a file or an empty directory; with `recursive` whatever the directory holds."""
        await _in_thread(self._remove, resolve(path, follow=False), recursive)

    async def rename(self, source: str, target: str) -> None:
        """Move a file or directory, in place of a file that stands there."""
        await _in_thread(self._rename, resolve(source, follow=False), resolve(target))

    async def chmod(self, path: str, mode: int) -> None:
        """Set the permission bits."""
        await _in_thread(self._chmod, resolve(path), mode)

    async def set_modified(self, path: str, at: int) -> None:
        """Set when a file was last changed, in Unix seconds."""
        await _in_thread(self._set_modified, resolve(path), at)

    async def host_path(self, path: str) -> Path:
        """Where a regular file lies on the host, to hand to a program of the phone's own."""
        target = resolve(path)
        found = await _in_thread(self._stat, target)
        if not stat.S_ISREG(found.mode):
            raise PhoneFileError(errno.EISDIR if found.is_directory else errno.EINVAL, target)
        return self._tree / target[1:]

    # What follows runs in threads.

    def _prepare(self, fixed: Mapping[str, str]) -> None:
        self._tree.mkdir(mode=0o700, parents=True, exist_ok=True)
        shutil.rmtree(self._incoming, ignore_errors=True)
        self._incoming.mkdir(mode=0o700)
        for name in DIRECTORIES:
            (self._tree / name[1:]).mkdir(parents=True, exist_ok=True)
        for name, text in fixed.items():
            target = self._tree / resolve(name)[1:]
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(text, encoding="utf-8")

    @contextmanager
    def _parent(self, path: str) -> Iterator[tuple[int, str]]:
        """A descriptor of the directory that holds `path` (resolved, not the root), and the last name."""
        *above, name = _names(path)
        with _translated(path), _opened_directory(self._tree, above) as directory:
            yield directory, name

    def _stat(self, path: str) -> PhoneFile:
        if path in LINKS:
            return _link(path)
        if path == NULL_DEVICE:
            return PhoneFile("null", stat.S_IFCHR | 0o666, 0, 0, 0, 0, 1, 1)
        if self._kernel(path) is not None:
            # As the kernel does, it says no size of what it has not made up yet.
            return PhoneFile(path.rpartition("/")[2], stat.S_IFREG | 0o444, 0, 0, 0, 0, 1, 1)
        if path == "/":
            with _translated(path):
                return _described("/", "/", self._tree.stat())
        with self._parent(path) as (directory, name):
            found = os.stat(name, dir_fd=directory, follow_symlinks=False)
            if stat.S_ISLNK(found.st_mode):
                raise OSError(errno.ELOOP, "a link the phone did not make")
            return _described(path, name, found)

    def _list(self, path: str) -> Sequence[PhoneFile]:
        prefix = path.rstrip("/") + "/"
        found = [_link(link) for link in LINKS if link.startswith(prefix) and "/" not in link[len(prefix) :]]
        if prefix == "/dev/":
            found.append(self._stat(NULL_DEVICE))
        with (
            _translated(path),
            _opened_directory(self._tree, _names(path)) as directory,
            os.scandir(directory) as entries,
        ):
            found.extend(
                _described(prefix + entry.name, entry.name, entry.stat(follow_symlinks=False))
                for entry in entries
                if not entry.is_symlink()
            )
        return sorted(found, key=lambda file: file.name)

    def _open_to_read(self, source: "_OpenFile", path: str) -> None:
        if path == NULL_DEVICE:
            return
        if path == "/":
            raise PhoneFileError(errno.EISDIR, path)
        with self._parent(path) as (directory, name):
            source.fd = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
            _check_regular(os.fstat(source.fd).st_mode)

    def _open_to_write(self, draft: "_OpenFile", path: str, append: bool, parents: bool) -> None:
        if parents:
            self._mkdir(path.rpartition("/")[0], parents=True)
        with self._parent(path) as (directory, name):
            try:
                _check_regular(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
            except FileNotFoundError:
                append = False
            if append:
                draft.fd = os.open(name, os.O_WRONLY | os.O_APPEND | os.O_NOFOLLOW, dir_fd=directory)
                return
            # Asked now, so that a name the host cannot hold is refused before its content is sent.
            if len(os.fsencode(name)) > 255:
                raise OSError(errno.ENAMETOOLONG, name)
            draft.temporary = self._incoming / secrets.token_hex(12)
            draft.fd = os.open(draft.temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o600)

    def _write_chunk(self, draft: "_OpenFile", chunk: bytes, path: str) -> None:
        with _translated(path):
            disk = os.fstatvfs(draft.fd)
            if disk.f_bavail * disk.f_frsize < self._reserve_bytes + len(chunk):
                raise OSError(errno.ENOSPC, "the host's reserve")
            rest = memoryview(chunk)
            while rest:
                rest = rest[os.write(draft.fd, rest) :]

    def _commit(self, draft: "_OpenFile", path: str, mode: int, modified_at: int | None) -> None:
        if draft.temporary is None:
            return
        with self._parent(path) as (directory, name):
            # The phone's own process must be able to read on, whatever the sender asks for.
            os.fchmod(draft.fd, (mode & 0o777) | stat.S_IRUSR | stat.S_IWUSR)
            if modified_at is not None:
                os.utime(draft.fd, (modified_at, modified_at))
            os.replace(draft.temporary, name, dst_dir_fd=directory)
            draft.temporary = None

    def _mkdir(self, path: str, parents: bool) -> None:
        if parents:
            with _translated(path), _opened_directory(self._tree, _names(path), make=True):
                return
        if path == "/" or path in _FIXED:
            raise PhoneFileError(errno.EEXIST, path)
        _check_writable(path)
        with self._parent(path) as (directory, name):
            os.mkdir(name, 0o771, dir_fd=directory)

    def _remove(self, path: str, recursive: bool) -> None:
        _check_removable(path)
        with self._parent(path) as (directory, name):
            if not _is_directory(name, directory):
                os.unlink(name, dir_fd=directory)
            elif recursive:
                try:
                    shutil.rmtree(name, dir_fd=directory)
                except RecursionError:
                    raise OSError(errno.ELOOP, "too deep") from None
            else:
                os.rmdir(name, dir_fd=directory)

    def _rename(self, source: str, target: str) -> None:
        _check_removable(source)
        _check_removable(target)
        if target.startswith(source + "/"):
            raise PhoneFileError(errno.EINVAL, target)
        with self._parent(source) as (from_directory, from_name), self._parent(target) as (directory, name):
            os.replace(from_name, name, src_dir_fd=from_directory, dst_dir_fd=directory)

    def _chmod(self, path: str, mode: int) -> None:
        _check_writable(path)
        with self._parent(path) as (directory, name):
            kept = stat.S_IRWXU if _is_directory(name, directory) else stat.S_IRUSR | stat.S_IWUSR
            descriptor = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=directory)
            try:
                os.fchmod(descriptor, (mode & 0o777) | kept)
            finally:
                os.close(descriptor)

    def _set_modified(self, path: str, at: int) -> None:
        if path == NULL_DEVICE:
            return
        _check_writable(path)
        with self._parent(path) as (directory, name):
            os.utime(name, (at, at), dir_fd=directory, follow_symlinks=False)


def resolve(path: str, cwd: str = "/", *, follow: bool = True) -> str:
    """The absolute path on the phone that `path` means in `cwd`, the system's links followed.

    With `follow=False` a link that is the last name stays. Raises PhoneFileError for what can be no path.
    """
    if not path:
        raise PhoneFileError(errno.ENOENT, path)
    whole = path if path.startswith("/") else f"{cwd}/{path}"
    try:
        length = len(os.fsencode(whole))
    except UnicodeEncodeError:
        raise PhoneFileError(errno.EILSEQ, ascii(path)) from None
    if "\0" in whole:
        raise PhoneFileError(errno.EINVAL, path)
    if length >= PATH_MAX_BYTES:
        raise PhoneFileError(errno.ENAMETOOLONG, path)
    names = whole.split("/")
    resolved: list[str] = []
    for place, name in enumerate(names, start=1):
        if name == "..":
            del resolved[-1:]
        elif name not in ("", "."):
            resolved.append(name)
            link = LINKS.get("/" + "/".join(resolved)) if len(resolved) <= 3 else None
            if link and (follow or place < len(names)):
                resolved = link[1:].split("/")
    if len(resolved) > DEPTH_MAX:
        raise PhoneFileError(errno.ENAMETOOLONG, path)
    return "/" + "/".join(resolved)


class _OpenFile:
    """A descriptor, and the temporary file behind it, that must not outlive the operation.

    Threads put them here, and not in what they return, since a cancelled operation never sees that.
    """

    def __init__(self) -> None:
        self.fd = -1
        self.temporary: Path | None = None

    def close(self) -> None:
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1
        if self.temporary is not None:
            self.temporary.unlink(missing_ok=True)
            self.temporary = None


async def _in_thread(work: Callable[P, T], *args: P.args, **kwargs: P.kwargs) -> T:
    """Run blocking work; when cancelled, wait for its end, since it may be using a descriptor."""
    running = asyncio.ensure_future(asyncio.to_thread(work, *args, **kwargs))
    try:
        return await asyncio.shield(running)
    except asyncio.CancelledError:
        while not running.done():
            try:
                await asyncio.wait({running})
            except asyncio.CancelledError:
                continue
        if not running.cancelled():
            running.exception()
        raise


@contextmanager
def _translated(path: str) -> Iterator[None]:
    """Turn the host's errors into the phone's, which name the phone's path."""
    try:
        yield
    except PhoneFileError:
        raise
    except OSError as fault:
        raise PhoneFileError(fault.errno, path) from None


@contextmanager
def _opened_directory(tree: Path, names: Sequence[str], *, make: bool = False) -> Iterator[int]:
    """A descriptor of a directory below `tree`, reached without following a link; `make` adds what lacks."""
    descriptor = os.open(tree, os.O_RDONLY | os.O_DIRECTORY)
    try:
        for place, name in enumerate(names, start=1):
            try:
                below = _open_directory(name, descriptor)
            except FileNotFoundError:
                if not make:
                    raise
                _check_writable("/" + "/".join(names[:place]))
                # Another push into the same new directory may make it at this moment.
                with suppress(FileExistsError):
                    os.mkdir(name, 0o771, dir_fd=descriptor)
                below = _open_directory(name, descriptor)
            os.close(descriptor)
            descriptor = below
        yield descriptor
    finally:
        os.close(descriptor)


def _open_directory(name: str, above: int) -> int:
    return os.open(name, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW, dir_fd=above)


def _names(path: str) -> Sequence[str]:
    return [name for name in path.split("/") if name]


def _read_chunk(source: _OpenFile, size: int, path: str) -> bytes:
    with _translated(path):
        return os.read(source.fd, size)


def _is_directory(name: str, directory: int) -> bool:
    try:
        return stat.S_ISDIR(os.stat(name, dir_fd=directory, follow_symlinks=False).st_mode)
    except FileNotFoundError:
        return False


def _check_regular(mode: int) -> None:
    if stat.S_ISDIR(mode):
        raise OSError(errno.EISDIR, "a directory")
    if not stat.S_ISREG(mode):
        raise OSError(errno.ELOOP if stat.S_ISLNK(mode) else errno.EACCES, "no regular file")


def _check_writable(path: str) -> None:
    if path == "/" or path in _FIXED:
        raise PhoneFileError(errno.EISDIR, path)
    if not path.startswith(_WRITABLE):
        raise PhoneFileError(errno.EACCES if path.startswith(_FORBIDDEN) else errno.EROFS, path)


def _check_removable(path: str) -> None:
    if path == "/" or path in _FIXED:
        raise PhoneFileError(errno.EBUSY, path)
    if path in LINKS:
        raise PhoneFileError(errno.EROFS, path)
    _check_writable(path)


def _described(path: str, name: str, found: os.stat_result) -> PhoneFile:
    owner = 2000 if path.startswith(_WRITABLE) else 0  # Android's "shell" and "root"
    return PhoneFile(
        name=name,
        mode=found.st_mode,
        size_bytes=found.st_size,
        modified_at=int(found.st_mtime),
        uid=owner,
        gid=owner,
        links=found.st_nlink,
        inode=found.st_ino,
    )


def _link(path: str) -> PhoneFile:
    target = LINKS[path]
    name = path.rpartition("/")[2]
    return PhoneFile(name, stat.S_IFLNK | 0o777, len(target), 0, 0, 0, 1, 1, link_target=target)
