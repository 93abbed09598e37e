"""The simulated phone's file system: what it keeps, what it refuses, and that nothing leads out of it."""

import asyncio
import errno
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from phones.simulator.files import PhoneFileError, PhoneFiles, resolve
from tests.smallphone import eventually


@pytest.fixture
async def files(tmp_path: Path) -> PhoneFiles:
    files = PhoneFiles(tmp_path / "phone")
    await files.prepare({"/system/build.prop": "ro.x=1\n"})
    return files


async def some(*chunks: bytes) -> AsyncIterator[bytes]:
    for chunk in chunks:
        yield chunk


async def content(files: PhoneFiles, path: str) -> bytes:
    return b"".join([chunk async for chunk in files.read(path)])


def code(refusal: pytest.ExceptionInfo[PhoneFileError]) -> tuple[int | None, str | None]:
    return refusal.value.errno, refusal.value.strerror


async def test_a_file_is_written_listed_read_moved_and_removed(files: PhoneFiles) -> None:
    assert await files.write("/sdcard/a/b.txt", some(b"one", b"two"), parents=True, mode=0o640) == 6
    found = await files.stat("/storage/emulated/0/a/b.txt")
    assert (found.name, found.size_bytes, found.mode & 0o777, found.uid) == ("b.txt", 6, 0o640, 2000)
    await files.write("/sdcard/a/b.txt", some(b"!"), append=True)
    assert await content(files, "/sdcard/a/../a/./b.txt") == b"onetwo!"
    await files.mkdir("/sdcard/c")
    await files.rename("/sdcard/a/b.txt", "/sdcard/c/d.txt")
    assert [file.name for file in await files.list("/sdcard/c")] == ["d.txt"]
    await files.chmod("/sdcard/c/d.txt", 0o755)
    await files.set_modified("/sdcard/c/d.txt", 7)
    found = await files.stat("/sdcard/c/d.txt")
    assert (found.mode & 0o777, found.modified_at) == (0o755, 7)
    assert (await files.host_path("/sdcard/c/d.txt")).read_bytes() == b"onetwo!"
    await files.remove("/sdcard/c/d.txt")
    await files.remove("/sdcard/a")
    await files.remove("/sdcard/c", recursive=True)
    names = {file.name for file in await files.list("/sdcard")}
    assert "Download" in names and not names & {"a", "c"}


async def test_android_s_tree_is_there_and_outlives_a_restart(files: PhoneFiles, tmp_path: Path) -> None:
    names = {file.name for file in await files.list("/")}
    assert {"data", "sdcard", "storage", "system", "vendor", "proc"} <= names
    assert (await files.stat("/sdcard")).is_directory
    assert (await files.stat("/sdcard", follow=False)).link_target == "/storage/emulated/0"
    await files.write("/sdcard/kept", some(b"x"))
    (tmp_path / "phone" / "incoming" / "cut off").write_bytes(b"half")
    again = PhoneFiles(tmp_path / "phone")
    await again.prepare({"/system/build.prop": "ro.x=2\n"})
    assert await content(again, "/sdcard/kept") == b"x"
    assert await content(again, "/system/build.prop") == b"ro.x=2\n"
    assert list((tmp_path / "phone" / "incoming").iterdir()) == []


@pytest.mark.parametrize(
    ("path", "number", "text"),
    [
        ("/x", errno.EROFS, "Read-only file system"),
        ("/system/app/x.apk", errno.EROFS, "Read-only file system"),
        ("/sdcard/../../../../etc/passwd", errno.EROFS, "Read-only file system"),
        ("../../../../../../../../tmp/x", errno.EROFS, "Read-only file system"),
        ("/storage/x", errno.EACCES, "Permission denied"),
        ("/proc/self/mem", errno.EACCES, "Permission denied"),
        ("/data", errno.EISDIR, "Is a directory"),
        ("/sdcard/Download", errno.EISDIR, "Is a directory"),
        ("/sdcard/x/", errno.EISDIR, "Is a directory"),
        ("/sdcard/none/x", errno.ENOENT, "No such file or directory"),
        ("", errno.ENOENT, "No such file or directory"),
        ("/system/build.prop/x", errno.EROFS, "Read-only file system"),
        ("/sdcard/" + "n" * 256, errno.ENAMETOOLONG, "File name too long"),
        ("/sdcard/" + "电" * 86, errno.ENAMETOOLONG, "File name too long"),
        ("/sdcard" + "/n" * 3000, errno.ENAMETOOLONG, "File name too long"),
        ("/sdcard" + "/n" * 200, errno.ENAMETOOLONG, "File name too long"),
        ("/sdcard/a\0b", errno.EINVAL, "Invalid argument"),
        ("/sdcard/\ud800", errno.EILSEQ, "Illegal byte sequence"),
    ],
)
async def test_a_refused_write_has_androids_words(
    files: PhoneFiles, path: str, number: int, text: str
) -> None:
    with pytest.raises(PhoneFileError) as refusal:
        await files.write(path, some(b"x"))
    assert code(refusal) == (number, text)


async def test_other_refusals_have_androids_words_too(files: PhoneFiles) -> None:
    await files.write("/sdcard/d/file", some(b"x"), parents=True)
    for refused, number in (
        (files.stat("/sdcard/none"), errno.ENOENT),
        (files.stat("/sdcard/d/file/x"), errno.ENOTDIR),
        (files.list("/sdcard/d/file"), errno.ENOTDIR),
        (content(files, "/sdcard"), errno.EISDIR),
        (content(files, "/"), errno.EISDIR),
        (files.mkdir("/sdcard/d"), errno.EEXIST),
        (files.mkdir("/data"), errno.EEXIST),
        (files.mkdir("/sdcard/d/file", parents=True), errno.ENOTDIR),
        (files.mkdir("/system/x", parents=True), errno.EROFS),
        (files.mkdir("/sdcard/no/no"), errno.ENOENT),
        (files.remove("/sdcard/d"), errno.ENOTEMPTY),
        (files.remove("/sdcard/none"), errno.ENOENT),
        (files.remove("/data", recursive=True), errno.EBUSY),
        (files.remove("/", recursive=True), errno.EBUSY),
        (files.remove("/sdcard"), errno.EROFS),
        (files.remove("/system/build.prop"), errno.EROFS),
        (files.rename("/sdcard/d", "/sdcard/d/e"), errno.EINVAL),
        (files.rename("/sdcard/d/file", "/system/file"), errno.EROFS),
        (files.rename("/system/build.prop", "/sdcard/b"), errno.EROFS),
        (files.chmod("/system/build.prop", 0o777), errno.EROFS),
        (files.host_path("/sdcard"), errno.EISDIR),
    ):
        with pytest.raises(PhoneFileError) as refusal:
            await refused
        assert refusal.value.errno == number, refusal.value
    await files.mkdir("/sdcard/d", parents=True)


async def test_no_link_of_the_host_leads_out(files: PhoneFiles, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret").write_text("secret")
    card = tmp_path / "phone" / "tree" / "storage" / "emulated" / "0"
    (card / "way").symlink_to(outside)
    (card / "file").symlink_to(outside / "secret")
    os.mkfifo(card / "fifo")

    for refused in (
        content(files, "/sdcard/way/secret"),
        content(files, "/sdcard/file"),
        content(files, "/sdcard/fifo"),
        files.stat("/sdcard/way/secret"),
        files.stat("/sdcard/file"),
        files.list("/sdcard/way"),
        files.host_path("/sdcard/file"),
        files.write("/sdcard/way/new", some(b"x")),
        files.write("/sdcard/file", some(b"x")),
        files.write("/sdcard/file", some(b"x"), append=True),
        files.mkdir("/sdcard/way/new"),
        files.mkdir("/sdcard/way/new/er", parents=True),
        files.remove("/sdcard/way/secret"),
        files.rename("/sdcard/way/secret", "/sdcard/mine"),
        files.rename("/sdcard/Download/../way/secret", "/sdcard/mine"),
        files.chmod("/sdcard/file", 0o777),
    ):
        with pytest.raises(PhoneFileError):
            await refused
    assert not {"way", "file"} & {file.name for file in await files.list("/sdcard")}
    await files.remove("/sdcard/way", recursive=True)
    assert (outside / "secret").read_text() == "secret"
    assert [path.name for path in outside.iterdir()] == ["secret"]


@given(st.text(max_size=60), st.text(alphabet="/.ab\0~", max_size=30), st.booleans())
def test_whatever_a_path_is_it_means_a_place_on_the_phone(path: str, cwd: str, follow: bool) -> None:
    try:
        resolved = resolve(path, "/" + cwd, follow=follow)
    except PhoneFileError:
        return
    assert resolved.startswith("/")
    assert not {"..", ".", ""} & set(resolved[1:].split("/")) or resolved == "/"
    assert resolve(resolved, follow=False) == resolved


async def test_a_file_appears_whole_or_not_at_all(files: PhoneFiles, tmp_path: Path) -> None:
    await files.write("/sdcard/f", some(b"old"))
    started = asyncio.Event()

    async def slow() -> AsyncIterator[bytes]:
        yield b"new"
        started.set()
        await asyncio.Event().wait()

    writing = asyncio.create_task(files.write("/sdcard/f", slow()))
    await started.wait()
    assert await content(files, "/sdcard/f") == b"old"
    writing.cancel()
    with pytest.raises(asyncio.CancelledError):
        await writing
    assert await content(files, "/sdcard/f") == b"old"
    incoming = tmp_path / "phone" / "incoming"
    await eventually(lambda: not list(incoming.iterdir()))


async def test_many_files_pushed_into_one_new_directory_all_arrive(files: PhoneFiles) -> None:
    await asyncio.gather(
        *(files.write(f"/sdcard/x/y/z/{n}", some(b"%d" % n), parents=True) for n in range(30))
    )
    assert len(await files.list("/sdcard/x/y/z")) == 30


async def test_the_hosts_reserve_is_the_phones_full_disk(tmp_path: Path) -> None:
    files = PhoneFiles(tmp_path / "phone", reserve_bytes=1 << 62)
    await files.prepare()
    with pytest.raises(PhoneFileError, match="No space left on device"):
        await files.write("/sdcard/f", some(b"x"))
    assert list((tmp_path / "phone" / "incoming").iterdir()) == []


async def test_the_null_device_takes_all_and_gives_nothing(files: PhoneFiles) -> None:
    assert await files.write("/dev/null", some(b"x" * 10)) == 10
    assert await content(files, "/dev/null") == b""
    assert [file.name for file in await files.list("/dev")] == ["null"]


async def test_deep_trees_can_be_made_and_removed(files: PhoneFiles) -> None:
    await files.mkdir("/sdcard" + "/d" * 120, parents=True)
    await files.remove("/sdcard/d", recursive=True)
    with pytest.raises(PhoneFileError):
        await files.stat("/sdcard/d")
