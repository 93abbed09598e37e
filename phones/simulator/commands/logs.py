"""`logcat` and `log`. Source of options and formats: AOSP's system/logging/logcat."""

import re

from phones.simulator.calls import Call, Command, UsageFault, parse_options
from phones.simulator.logcat import BUFFERS, DEFAULT_BUFFERS, FORMATS, LETTERS, Entry, Filter, Priority

_IGNORED_FORMATS = frozenset(
    {"color", "descriptive", "epoch", "monotonic", "printable", "uid", "usec", "year", "zone", "UTC"}
)
_BATCH_LINES = 200


async def _logcat(call: Call) -> int:
    try:
        flags, values, rest = parse_options(_shortened(call.arguments), "dcgsBDSL", "vbtTP")
        form = _form(values.get("v", "threadtime"))
        buffers = _buffers(values.get("b", ""))
        rules = _rules(call, rest, only_named="s" in flags)
        process = int(values["P"]) if "P" in values else None
        count = _count(values.get("t") or values.get("T"))
    except (UsageFault, ValueError) as fault:
        return await call.fail(str(fault))
    if "c" in flags:
        call.phone.log.clear(buffers)
        return 0
    if "g" in flags:
        for name in sorted(buffers, key=BUFFERS.index):
            await call.write(
                f"{name}: ring buffer is 256 KiB (64 KiB consumed, 64 KiB readable), max entry is 5120 B\n"
            )
        return 0
    shown = _Shown(call, form, buffers, rules, process)
    if "d" in flags or "t" in values:
        await shown.write(shown.chosen(call.phone.log.entries())[-count if count else None :])
        return 0
    first = True
    async for batch in call.phone.log.follow():
        chosen = shown.chosen(batch)
        await shown.write(chosen[-count:] if first and count else chosen)
        first = False
    return 0


class _Shown:
    """Chooses and writes lines, with a headline where a buffer shows up first."""

    def __init__(
        self, call: Call, form: str, buffers: frozenset[str], rules: Filter, process: int | None
    ) -> None:
        self._call = call
        self._form = FORMATS[form]
        self._buffers = buffers
        self._rules = rules
        self._process = process
        self._begun: set[str] = set()

    def chosen(self, entries: list[Entry]) -> list[Entry]:
        return [
            entry
            for entry in entries
            if entry.buffer in self._buffers
            and self._rules.passes(entry)
            and self._process in (None, entry.process)
        ]

    async def write(self, entries: list[Entry]) -> None:
        for start in range(0, len(entries), _BATCH_LINES):
            lines: list[str] = []
            for entry in entries[start : start + _BATCH_LINES]:
                if entry.buffer not in self._begun:
                    self._begun.add(entry.buffer)
                    lines.append(f"--------- beginning of {entry.buffer}\n")
                lines.append(self._form(entry) + "\n")
            await self._call.write("".join(lines))


def _shortened(arguments: tuple[str, ...]) -> tuple[str, ...]:
    """Long options as their short ones."""
    long = {
        "--buffer": "-b",
        "--clear": "-c",
        "--format": "-v",
        "--dump": "-d",
        "--pid": "-P",
        "--buffer-size": "-g",
    }
    short: list[str] = []
    for argument in arguments:
        name, assigned, value = argument.partition("=")
        short += [long[name], *([value] if assigned else [])] if name in long else [argument]
    return tuple(short)


def _form(text: str) -> str:
    chosen = "threadtime"
    for name in re.split(r"[ ,]+", text):
        if name in FORMATS:
            chosen = name
        elif name not in _IGNORED_FORMATS:
            raise ValueError(f"Invalid parameter '{name}' to -v")
    return chosen


def _buffers(text: str) -> frozenset[str]:
    chosen: set[str] = set()
    for name in text.split(",") if text else ["default"]:
        if name in ("all", "default"):
            chosen |= set(BUFFERS) if name == "all" else DEFAULT_BUFFERS
        elif name in BUFFERS:
            chosen.add(name)
        else:
            raise ValueError(f"unknown buffer {name}")
    return frozenset(chosen)


def _rules(call: Call, rules: list[str], *, only_named: bool) -> Filter:
    if not rules and not only_named:
        rules = call.session.variables.get("ANDROID_LOG_TAGS", "").replace('"', "").replace("'", "").split()
    try:
        return Filter.parse(["*:S", *rules] if only_named else rules)
    except ValueError as fault:
        raise ValueError(f"Invalid filter expression '{fault}'") from None


def _count(text: str | None) -> int | None:
    """`-t 20`; a time instead of a number shows everything held."""
    if text is None or not (text.isascii() and text.isdigit()):
        return None
    return max(1, int(text[:9]))


async def _log(call: Call) -> int:
    _, values, words = parse_options(call.arguments, "", "pt")
    letter = values.get("p", "i").upper()
    if letter not in LETTERS or LETTERS[letter] is Priority.SILENT:
        raise UsageFault(f"bad -p '{letter.lower()}'")
    call.phone.log.write(values.get("t", "log"), " ".join(words), priority=LETTERS[letter], process=2749)
    return 0


COMMANDS: dict[str, Command] = {"log": _log, "logcat": _logcat}
