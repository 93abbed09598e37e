"""Programs that look at and change the phone's files. Words and exit codes are toybox's."""

import errno
import hashlib
import operator
import re
import stat
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import replace
from datetime import UTC, datetime

from phones.simulator.calls import Call, Command, UsageFault, parse_options, reason
from phones.simulator.files import PhoneFile, PhoneFileError, resolve

_OWNERS = {0: "root", 1000: "system", 2000: "shell"}


async def _ls(call: Call) -> int:
    flags, _, names = parse_options(call.arguments, "laAdhi1FRrtSn")
    if "R" in flags:
        raise UsageFault("Unknown option 'R'")
    status = 0
    single: list[PhoneFile] = []
    directories: list[tuple[str, str]] = []
    for name in names or ["."]:
        try:
            path = resolve(name, call.session.directory, follow="l" not in flags or name.endswith("/"))
            file = await call.phone.files.stat(path, follow="l" not in flags or name.endswith("/"))
        except PhoneFileError as fault:
            status = await call.complain_of(name, fault)
            continue
        if file.is_directory and "d" not in flags:
            directories.append((name, path))
        else:
            single.append(_named(file, name))
    await call.write(_listing(single, flags))
    for place, (name, path) in enumerate(directories):
        if len(names) > 1:
            await call.write(f"{chr(10) if single or place else ''}{name}:\n")
        await call.write(await _directory_listing(call, path, flags))
    return status


async def _directory_listing(call: Call, path: str, flags: set[str]) -> str:
    files = await call.phone.files.list(path)
    if "a" in flags:
        here = await call.phone.files.stat(path)
        above = await call.phone.files.stat(path.rpartition("/")[0] or "/")
        files = [_named(here, "."), _named(above, ".."), *files]
    elif "A" not in flags:
        files = [file for file in files if not file.name.startswith(".")]
    if "t" in flags:
        files.sort(key=lambda file: -file.modified_at)
    if "S" in flags:
        files.sort(key=lambda file: -file.size_bytes)
    if "r" in flags:
        files.reverse()
    total = f"total {sum(_blocks(file) for file in files)}\n" if "l" in flags else ""
    return total + _listing(files, flags)


def _listing(files: list[PhoneFile], flags: set[str]) -> str:
    if "l" not in flags:
        return "".join(f"{_shown_name(file, flags)}\n" for file in files)
    sizes = [_shown_size(file.size_bytes, flags) for file in files]
    width = max(map(len, sizes), default=0)
    links = max((len(str(file.links)) for file in files), default=0)
    lines = []
    for file, size in zip(files, sizes, strict=True):
        owner = str(file.uid) if "n" in flags else _OWNERS.get(file.uid, str(file.uid))
        modified = datetime.fromtimestamp(file.modified_at, UTC)
        target = f" -> {file.link_target}" if file.link_target else ""
        lines.append(
            f"{stat.filemode(file.mode)} {file.links:>{links}} {owner} {owner} {size:>{width}} "
            f"{modified:%Y-%m-%d %H:%M} {_shown_name(file, flags)}{target}\n"
        )
    return "".join(lines)


def _shown_name(file: PhoneFile, flags: set[str]) -> str:
    inode = f"{file.inode} " if "i" in flags else ""
    return f"{inode}{file.name}{'/' if 'F' in flags and file.is_directory else ''}"


def _shown_size(size: int, flags: set[str]) -> str:
    if "h" not in flags or size < 1000:
        return str(size)
    amount, units = size / 1024, "KMGT"
    while amount >= 1000 and len(units) > 1:
        amount, units = amount / 1024, units[1:]
    unit = units[0]
    return f"{amount:.1f}{unit}" if amount < 10 else f"{amount:.0f}{unit}"


def _blocks(file: PhoneFile) -> int:
    return (file.size_bytes + 4095) // 4096 * 4


def _named(file: PhoneFile, name: str) -> PhoneFile:
    return replace(file, name=name)


async def _mkdir(call: Call) -> int:
    flags, _, names = parse_options(call.arguments, "pv", "m")
    if not names:
        raise UsageFault("Needs 1 argument")
    status = 0
    for name in names:
        try:
            await call.phone.files.mkdir(call.path(name), parents="p" in flags)
        except PhoneFileError as fault:
            status = await call.fail(f"'{name}': {reason(fault)}")
    return status


async def _rmdir(call: Call) -> int:
    _, _, names = parse_options(call.arguments, "p")
    if not names:
        raise UsageFault("Needs 1 argument")
    status = 0
    for name in names:
        try:
            if not (await call.phone.files.stat(call.path(name), follow=False)).is_directory:
                status = await call.fail(f"'{name}': Not a directory")
                continue
            await call.phone.files.remove(call.path(name))
        except PhoneFileError as fault:
            status = await call.fail(f"'{name}': {reason(fault)}")
    return status


async def _rm(call: Call) -> int:
    flags, _, names = parse_options(call.arguments, "rRfiv")
    recursive, forced = bool(flags & {"r", "R"}), "f" in flags
    if not names and not forced:
        raise UsageFault("Needs 1 argument")
    status = 0
    for name in names:
        try:
            file = await call.phone.files.stat(call.path(name), follow=False)
            if file.is_directory and not recursive:
                status = await call.fail(f"{name}: is a directory")
                continue
            await call.phone.files.remove(call.path(name), recursive=recursive)
        except PhoneFileError as fault:
            if not (forced and fault.errno == errno.ENOENT):
                status = await call.complain_of(name, fault)
    return status


async def _mv(call: Call) -> int:
    _, _, names = parse_options(call.arguments, "fiv")
    return await _transfer(call, names, _move)


async def _cp(call: Call) -> int:
    flags, _, names = parse_options(call.arguments, "rRafpiv")
    return await _transfer(call, names, _copy_tree if flags & {"r", "R", "a"} else _copy_file)


async def _transfer(call: Call, names: list[str], carry: Callable[[Call, str, str], Awaitable[None]]) -> int:
    if len(names) < 2:
        raise UsageFault("Needs 2 arguments")
    *sources, last = names
    into = await _is_directory(call, last)
    if len(sources) > 1 and not into:
        return await call.fail(f"'{last}' not directory")
    status = 0
    for source in sources:
        name = resolve(source, call.session.directory).rpartition("/")[2]
        target = f"{last.rstrip('/')}/{name}" if into else last
        try:
            await carry(call, call.path(source), resolve(target, call.session.directory))
        except PhoneFileError as fault:
            status = await call.fail(f"bad '{source}': {reason(fault)}")
    return status


async def _move(call: Call, source: str, target: str) -> None:
    await call.phone.files.stat(source, follow=False)
    await call.phone.files.rename(source, target)


async def _copy_file(call: Call, source: str, target: str) -> None:
    file = await call.phone.files.stat(source)
    if file.is_directory:
        raise PhoneFileError(errno.EISDIR, source)
    if resolve(source) != resolve(target):
        await call.phone.files.write(target, call.chunks(source), mode=file.mode & 0o777)


async def _copy_tree(call: Call, source: str, target: str) -> None:
    if not (await call.phone.files.stat(source)).is_directory:
        await _copy_file(call, source, target)
        return
    if f"{resolve(target)}/".startswith(f"{resolve(source)}/"):
        raise PhoneFileError(errno.EINVAL, target)
    await call.phone.files.mkdir(target, parents=True)
    for file in await call.phone.files.list(source):
        await _copy_tree(call, f"{source}/{file.name}", f"{target}/{file.name}")


async def _is_directory(call: Call, name: str) -> bool:
    try:
        return (await call.phone.files.stat(call.path(name))).is_directory
    except PhoneFileError:
        return False


async def _touch(call: Call) -> int:
    flags, _, names = parse_options(call.arguments, "camh", "dtr")
    if not names:
        raise UsageFault("Needs 1 argument")
    status = 0
    for name in names:
        try:
            await _touch_file(call, call.path(name), create="c" not in flags)
        except PhoneFileError as fault:
            status = await call.fail(f"'{name}': {reason(fault)}")
    return status


async def _touch_file(call: Call, path: str, *, create: bool) -> None:
    now = int(call.phone.clock.now().timestamp())
    try:
        file = await call.phone.files.stat(path)
    except PhoneFileError as fault:
        if fault.errno == errno.ENOENT and create:
            await call.phone.files.write(path, _nothing(), modified_at=now)
        elif fault.errno != errno.ENOENT:
            raise
        return
    if not file.is_directory:
        await call.phone.files.write(path, call.chunks(path), mode=file.mode & 0o777, modified_at=now)


async def _nothing() -> AsyncIterator[bytes]:
    empty: tuple[bytes, ...] = ()
    for chunk in empty:
        yield chunk


async def _chmod(call: Call) -> int:
    _, _, names = parse_options(call.arguments, "Rvf")
    if len(names) < 2:
        raise UsageFault("Needs 2 arguments")
    wanted, *names = names
    status = 0
    for name in names:
        try:
            mode = _mode(wanted, (await call.phone.files.stat(call.path(name))).mode & 0o777)
            await call.phone.files.chmod(call.path(name), mode)
        except PhoneFileError as fault:
            status = await call.fail(f"'{name}' to {wanted}: {reason(fault)}")
    return status


def _mode(wanted: str, before: int) -> int:
    """`755`, `u+x`, `a-w` and their like. Raises UsageFault."""
    if re.fullmatch(r"[0-7]{1,4}", wanted):
        return int(wanted, 8) & 0o777
    match = re.fullmatch(r"([ugoa]*)([-+=])([rwx]*)", wanted)
    if match is None:
        raise UsageFault(f"bad mode '{wanted}'")
    who, operator, letters = match.groups()
    bits = sum({"r": 4, "w": 2, "x": 1}[letter] for letter in set(letters))
    shifts = {"u": 6, "g": 3, "o": 0}
    who = "ugo" if not who or "a" in who else who
    for one in set(who):
        change = bits << shifts[one]
        if operator == "=":
            before &= ~(7 << shifts[one])
        before = before & ~change if operator == "-" else before | change
    return before


async def _stat(call: Call) -> int:
    _, values, names = parse_options(call.arguments, "L", "c")
    if not names:
        raise UsageFault("Needs 1 argument")
    status = 0
    for name in names:
        try:
            file = await call.phone.files.stat(call.path(name), follow=False)
        except PhoneFileError as fault:
            status = await call.fail(f"'{name}': {reason(fault)}")
            continue
        template = values.get(
            "c", "  File: %N\n  Size: %s\t Inode: %i\t Links: %h\nAccess: (%a/%A)\tUid: (%u/%U)"
        )
        fields = {
            "%A": stat.filemode(file.mode),
            "%N": name,
            "%U": _OWNERS.get(file.uid, str(file.uid)),
            "%Y": str(file.modified_at),
            "%a": f"{file.mode & 0o7777:o}",
            "%h": str(file.links),
            "%i": str(file.inode),
            "%n": name,
            "%s": str(file.size_bytes),
            "%u": str(file.uid),
        }
        await call.write("".join(fields.get(p, p) for p in re.split(r"(%[A-Za-z])", template)) + "\n")
    return status


async def _checksum(call: Call) -> int:
    _, _, names = parse_options(call.arguments, "b")
    status = 0
    for name in names or ["-"]:
        digest = hashlib.new(call.name.removesuffix("sum"), usedforsecurity=False)
        try:
            async for chunk in call.chunks(name):
                digest.update(chunk)
            await call.write(f"{digest.hexdigest()}  {name}\n")
        except PhoneFileError as fault:
            status = await call.fail(f"{name}: {reason(fault)}")
    return status


async def _pwd(call: Call) -> int:
    await call.write(call.session.directory + "\n")
    return 0


async def _test(call: Call) -> int:
    words = list(call.arguments)
    if call.name == "[" and (not words or words.pop() != "]"):
        return await call.fail("missing ]", 2)
    negated = bool(words) and words[0] == "!"
    if negated:
        words.pop(0)
    try:
        held = await _holds(call, words)
    except ValueError as fault:
        return await call.fail(str(fault), 2)
    return int(held == negated)


async def _holds(call: Call, words: list[str]) -> bool:
    if len(words) < 2:
        return bool(words and words[0])
    if len(words) == 2:
        sign, operand = words
        if sign in ("-z", "-n"):
            return bool(operand) == (sign == "-n")
        return await _is_kind(call, sign, operand)
    if len(words) > 3:
        raise ValueError("too many arguments")
    left, sign, right = words
    if sign in ("=", "==", "!="):
        return (left == right) == (sign != "!=")
    compare = _COMPARISONS.get(sign)
    if compare is None:
        raise ValueError(f"{sign}: unexpected operator/operand")
    for side in (left, right):
        if not re.fullmatch(r"-?\d{1,18}", side, re.ASCII):
            raise ValueError(f"{side}: bad number")
    return compare(int(left), int(right))


_COMPARISONS: dict[str, Callable[[int, int], bool]] = {
    "-eq": operator.eq,
    "-ge": operator.ge,
    "-gt": operator.gt,
    "-le": operator.le,
    "-lt": operator.lt,
    "-ne": operator.ne,
}


async def _is_kind(call: Call, sign: str, name: str) -> bool:
    if sign not in ("-e", "-f", "-d", "-s", "-r", "-w", "-x", "-L", "-h"):
        raise ValueError(f"{sign}: unexpected sign/operand")
    try:
        file = await call.phone.files.stat(call.path(name), follow=sign not in ("-L", "-h"))
    except PhoneFileError:
        return False
    answers = {
        "-d": file.is_directory,
        "-f": stat.S_ISREG(file.mode),
        "-s": file.size_bytes > 0,
        "-x": bool(file.mode & 0o111),
        "-L": bool(file.link_target),
        "-h": bool(file.link_target),
    }
    return answers.get(sign, True)


async def _df(call: Call) -> int:
    flags, _, names = parse_options(call.arguments, "hkPai")
    total, used, free = await call.phone.disk()
    head = "Filesystem" + " " * 6 + ("Size  Used Avail" if "h" in flags else " 1K-blocks      Used Available")
    lines = [f"{head} Use% Mounted on"]
    shown = [_shown_size(n, {"h"}) if "h" in flags else str(n // 1024) for n in (total, used, free)]
    widths = (4, 5, 5) if "h" in flags else (11, 9, 9)
    sizes = " ".join(f"{text:>{width}}" for text, width in zip(shown, widths, strict=True))
    percent = f"{-(-used * 100 // max(1, total))}%"
    for device, place in (("/dev/block/dm-0", "/data"), ("/dev/fuse", "/storage/emulated")):
        if not names or any(resolve(n, call.session.directory).startswith(place) for n in names):
            lines.append(f"{device:<15} {sizes} {percent:>4} {place}")
    await call.write("\n".join(lines) + "\n")
    return 0


COMMANDS: dict[str, Command] = {
    "[": _test,
    "chmod": _chmod,
    "cp": _cp,
    "df": _df,
    "ls": _ls,
    "md5sum": _checksum,
    "mkdir": _mkdir,
    "mv": _mv,
    "pwd": _pwd,
    "rm": _rm,
    "rmdir": _rmdir,
    "sha1sum": _checksum,
    "sha256sum": _checksum,
    "stat": _stat,
    "test": _test,
    "touch": _touch,
}
