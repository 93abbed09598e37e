"""Programs that make and change text. Words and exit codes are toybox's, where it has them."""

import re
from collections import deque
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing

from phones.simulator.calls import Call, Command, UsageFault, count_of, parse_options, to_bytes, to_text
from phones.simulator.files import PhoneFileError
from phones.simulator.patterns import BadPattern, compile_pattern

MAX_KEPT_LINES = 100_000
MAX_KEPT_BYTES = 8 << 20
MAX_FORMATTED = 1 << 20

_ESCAPES = {
    "\\": "\\",
    "a": "\a",
    "b": "\b",
    "e": "\x1b",
    "f": "\f",
    "n": "\n",
    "r": "\r",
    "t": "\t",
    "v": "\v",
}


async def _echo(call: Call) -> int:
    words = list(call.arguments)
    newline, escapes = "\n", False
    while words and re.fullmatch(r"-[neE]+", words[0]):
        flags = words.pop(0)
        newline = "" if "n" in flags else newline
        escapes = escapes or "e" in flags
    text = " ".join(words)
    if escapes:
        text, ended = _unescaped(text)
        newline = "" if ended else newline
    await call.write(text + newline)
    return 0


def _unescaped(text: str) -> tuple[str, bool]:
    """The text with its backslash escapes done, and whether `\\c` has ended it."""
    out: list[str] = []
    at = 0
    while at < len(text):
        following = text[at + 1 : at + 2]
        if text[at] != "\\" or not following:
            out.append(text[at])
            at += 1
        elif following == "c":
            return "".join(out), True
        elif number := re.match(r"\\(?:0([0-7]{1,3})|x([0-9a-fA-F]{1,2}))", text[at : at + 5]):
            octal, hexadecimal = number.groups()
            code = int(octal, 8) if octal else int(hexadecimal, 16)
            out.append(bytes([code & 0xFF]).decode("utf-8", "surrogateescape"))
            at += number.end()
        else:
            out.append(_ESCAPES.get(following, "\\" + following))
            at += 2
    return "".join(out), False


async def _printf(call: Call) -> int:
    if not call.arguments:
        return await call.fail("Needs 1 argument")
    template, *values = call.arguments
    template, _ = _unescaped(template)
    pieces = re.split(r"(%[-0+ #]*\d{0,4}(?:\.\d{1,4})?[diouxXcsb%])", template)
    wants_values = any(piece[:1] == "%" and piece != "%%" for piece in pieces[1::2])
    status = 0
    size = 0
    while True:
        for place, piece in enumerate(pieces):
            text = piece
            if place % 2:
                try:
                    text = "%" if piece == "%%" else _formatted(piece, values.pop(0) if values else "")
                except ValueError as fault:
                    status = await call.fail(str(fault))
                    text = "0"
            size += len(text)
            if size > MAX_FORMATTED:
                return await call.fail("out of memory")
            await call.write(text)
        if not values or not wants_values:
            return status


def _formatted(piece: str, value: str) -> str:
    kind = piece[-1]
    if kind == "b":
        return (piece[:-1] + "s") % _unescaped(value)[0]
    if kind in "sc":
        return (piece[:-1] + "s") % (value[:1] if kind == "c" else value)
    if len(value) > 20:
        raise ValueError(f"bad number '{value}'")
    try:
        number = int(value or "0", 0)
    except ValueError:
        raise ValueError(f"bad number '{value}'") from None
    return (piece[:-1] + ("d" if kind in "iu" else kind)) % number


async def _cat(call: Call) -> int:
    _, _, names = parse_options(call.arguments, "uvet")
    status = 0
    for name in names or ["-"]:
        try:
            async for chunk in call.chunks(name):
                await call.write(chunk)
        except PhoneFileError as fault:
            status = await call.complain_of(name, fault)
    return status


async def _head(call: Call) -> int:
    _, values, names = parse_options(_numbered(call.arguments), "qv", "nc")
    count = count_of(values.get("n", "10"))
    size = count_of(values["c"]) if "c" in values else None
    status = 0
    for place, name in enumerate(names or ["-"]):
        try:
            if len(names) > 1:
                await call.write(f"{'' if place == 0 else chr(10)}==> {name} <==\n")
            await (_head_lines(call, name, count) if size is None else _head_bytes(call, name, size))
        except PhoneFileError as fault:
            status = await call.complain_of(name, fault)
    return status


async def _head_lines(call: Call, name: str, count: int) -> None:
    if count <= 0:
        return
    async with aclosing(call.lines(name)) as lines:
        async for line in lines:
            await call.write(line)
            count -= line.endswith(b"\n")
            if count <= 0:
                return


async def _head_bytes(call: Call, name: str, size: int) -> None:
    async with aclosing(call.chunks(name)) as chunks:
        async for chunk in chunks:
            await call.write(chunk[: max(0, size)])
            size -= len(chunk)
            if size <= 0:
                return


async def _tail(call: Call) -> int:
    _, values, names = parse_options(_numbered(call.arguments), "q", "nc")
    text = values.get("n", "10")
    status = 0
    for name in names or ["-"]:
        try:
            if "c" in values:
                await _tail_bytes(call, name, abs(count_of(values["c"])))
            else:
                await _tail_lines(call, name, text)
        except PhoneFileError as fault:
            status = await call.complain_of(name, fault)
    return status


async def _tail_lines(call: Call, name: str, text: str) -> None:
    count = count_of(text)
    if text.startswith("+"):
        async for line in call.lines(name):
            count -= 1
            if count <= 0:
                await call.write(line)
        return
    kept: deque[bytes] = deque(maxlen=min(abs(count), MAX_KEPT_LINES))
    size = 0
    async for line in call.lines(name):
        size += len(line) - (len(kept[0]) if kept and len(kept) == kept.maxlen else 0)
        kept.append(line)
        while size > MAX_KEPT_BYTES:
            size -= len(kept.popleft())
    await call.write(b"".join(kept))


async def _tail_bytes(call: Call, name: str, size: int) -> None:
    size = min(size, MAX_KEPT_BYTES)
    kept = b""
    async for chunk in call.chunks(name):
        kept = (kept + chunk)[-size:] if size else b""
    await call.write(kept)


def _numbered(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """`-5` stands for `-n 5`."""
    return tuple(f"-n{a[1:]}" if re.fullmatch(r"-\d+", a, re.ASCII) else a for a in arguments)


async def _wc(call: Call) -> int:
    flags, _, names = parse_options(call.arguments, "lwcm")
    totals = [0, 0, 0]
    status = 0
    for name in names or ["-"]:
        try:
            counts = await _counted(call, name)
        except PhoneFileError as fault:
            status = await call.complain_of(name, fault)
            continue
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
        await call.write(_counts_line(counts, flags, name if names else ""))
    if len(names) > 1:
        await call.write(_counts_line(totals, flags, "total"))
    return status


async def _counted(call: Call, name: str) -> list[int]:
    lines = words = size = 0
    in_word = False
    async for chunk in call.chunks(name):
        size += len(chunk)
        lines += chunk.count(b"\n")
        words += len(chunk.split()) - (in_word and not chunk[:1].isspace())
        in_word = not chunk[-1:].isspace()
    return [lines, words, size]


def _counts_line(counts: list[int], flags: set[str], name: str) -> str:
    chosen = [c for c, names in zip(counts, ("l", "w", "cm"), strict=True) if not flags or flags & set(names)]
    return " ".join([*map(str, chosen), *([name] if name else [])]) + "\n"


async def _grep(call: Call) -> int:
    flags, values, rest = parse_options(call.arguments, "ivqnclEFhHs", "em")
    if "e" not in values:
        if not rest:
            raise UsageFault("no REGEX")
        values["e"] = rest.pop(0)
    try:
        finds = _matcher(values["e"], flags)
    except BadPattern as fault:
        return await call.fail(f"bad regex '{values['e']}': {fault}", 2)
    limit = count_of(values["m"]) if "m" in values else None
    names = rest or ["-"]
    found = failed = False
    for name in names:
        shown = f"{name}:" if ("H" in flags or len(names) > 1) and "h" not in flags else ""
        try:
            matches = await _grep_file(call, name, shown, flags, finds, limit)
        except PhoneFileError as fault:
            failed = True
            if "s" not in flags:
                await call.complain_of(name, fault)
            continue
        found = found or matches > 0
        if found and "q" in flags:
            return 0
    return 2 if failed else 0 if found else 1


def _matcher(pattern: str, flags: set[str]) -> Callable[[str], bool]:
    fold = "i" in flags
    if "F" in flags:
        wanted = pattern.lower() if fold else pattern
        return lambda line: wanted in (line.lower() if fold else line)
    return compile_pattern(pattern, extended="E" in flags, ignore_case=fold).found_in


async def _grep_file(
    call: Call, name: str, shown: str, flags: set[str], finds: Callable[[str], bool], limit: int | None
) -> int:
    """Print a file's matching lines and return how many there are."""
    matches = number = 0
    quiet = flags & set("qcl")
    async with aclosing(call.lines(name)) as lines:
        async for line in lines:
            number += 1
            if limit is not None and matches >= limit:
                break
            if finds(to_text(line.rstrip(b"\n"))) == ("v" in flags):
                continue
            matches += 1
            if flags & set("ql"):
                break
            if not quiet:
                place = f"{number}:" if "n" in flags else ""
                await call.write(to_bytes(shown + place) + line.rstrip(b"\n") + b"\n")
    if "c" in flags and "q" not in flags:
        await call.write(f"{shown}{matches}\n")
    elif "l" in flags and matches and "q" not in flags:
        await call.write(f"{name}\n")
    return matches


async def _egrep(call: Call) -> int:
    return await _grep(call.renamed("egrep", ("-E", *call.arguments)))


async def _sort(call: Call) -> int:
    flags, _, names = parse_options(call.arguments, "rnu")
    lines: list[bytes] = []
    size = 0
    for name in names or ["-"]:
        async for line in call.lines(name):
            lines.append(line.rstrip(b"\n"))
            size += len(line)
            if size > MAX_KEPT_BYTES:
                return await call.fail("out of memory")
    lines.sort(key=_leading_number if "n" in flags else lambda line: (0, line), reverse="r" in flags)
    if "u" in flags:
        lines = list(dict.fromkeys(lines))
    await call.write(b"".join(line + b"\n" for line in lines))
    return 0


def _leading_number(line: bytes) -> tuple[int, bytes]:
    number = re.match(rb"\s*(-?\d{1,18})", line)
    return (int(number[1]) if number else 0, line)


async def _tee(call: Call) -> int:
    flags, _, names = parse_options(call.arguments, "a")
    content = bytearray()
    while chunk := await call.streams.stdin.read():
        await call.write(chunk)
        content += chunk[: MAX_KEPT_BYTES - len(content)]
    status = 0
    for name in names:
        try:
            await call.phone.files.write(call.path(name), _once(bytes(content)), append="a" in flags)
        except PhoneFileError as fault:
            status = await call.complain_of(name, fault)
    return status


async def _once(content: bytes) -> AsyncIterator[bytes]:
    if content:
        yield content


COMMANDS: dict[str, Command] = {
    "cat": _cat,
    "echo": _echo,
    "egrep": _egrep,
    "grep": _grep,
    "head": _head,
    "printf": _printf,
    "sort": _sort,
    "tail": _tail,
    "tee": _tee,
    "wc": _wc,
}
