"""Regular expressions for the phone's `grep`, matched in time linear in the text.

Python's `re` backtracks: one hostile pattern would hold the phone's only loop for hours. These are
simulated as a set of states instead (Thompson's construction), built once and cached as they are met.
Understood: literals, `.`, `[...]` with ranges and classes, `^`, `$`, `*`, `+`, `?`, `|` and groups.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache

MAX_PATTERN = 1000
MAX_NESTING = 50
MAX_CACHED_STATES = 500

_CLASSES = {
    "alnum": str.isalnum,
    "alpha": str.isalpha,
    "digit": str.isdigit,
    "lower": str.islower,
    "space": str.isspace,
    "upper": str.isupper,
}


class BadPattern(ValueError):
    """The pattern cannot be read; the text says why."""


@dataclass(frozen=True, slots=True)
class _Characters:
    """Which characters one step accepts."""

    singles: frozenset[str] = frozenset()
    ranges: tuple[tuple[str, str], ...] = ()
    classes: tuple[str, ...] = ()
    negated: bool = False

    def accepts(self, character: str) -> bool:
        inside = (
            character in self.singles
            or any(low <= character <= high for low, high in self.ranges)
            or any(_CLASSES[name](character) for name in self.classes)
        )
        return inside != self.negated


_ANY = _Characters(negated=True)


@dataclass(slots=True)
class _Step:
    """A node: consumes a character where `characters` is set, else passes on, an anchor on a condition."""

    characters: _Characters | None = None
    anchor: str = ""
    following: tuple[int, ...] = ()


class Pattern:
    """One compiled pattern; `found_in` says whether it occurs anywhere in a line."""

    def __init__(self, text: str, *, extended: bool, ignore_case: bool) -> None:
        if len(text) > MAX_PATTERN:
            raise BadPattern("regular expression too big")
        self._fold = ignore_case
        self._steps: list[_Step] = []
        self._end = self._add(_Step())
        reader = _PatternReader(text.lower() if ignore_case else text, extended, self._add)
        self._start = reader.read(self._end, self._steps)
        self._moves: dict[tuple[frozenset[int], str], frozenset[int]] = {}

    def _add(self, step: _Step) -> int:
        self._steps.append(step)
        return len(self._steps) - 1

    def _reach(self, starts: set[int], *, at_start: bool, at_end: bool) -> frozenset[int]:
        """Every step reachable without consuming a character."""
        waiting = list(starts)
        reached: set[int] = set()
        while waiting:
            number = waiting.pop()
            step = self._steps[number]
            if number in reached:
                continue
            if (step.anchor == "^" and not at_start) or (step.anchor == "$" and not at_end):
                # Kept so that the end of the line can open it, not followed now.
                reached.add(number)
                continue
            reached.add(number)
            if step.characters is None:
                waiting.extend(step.following)
        return frozenset(reached)

    def _advance(self, states: frozenset[int], character: str) -> frozenset[int]:
        key = (states, character)
        known = self._moves.get(key)
        if known is not None:
            return known
        moved = {self._start}
        for number in states:
            step = self._steps[number]
            if step.characters is not None and step.characters.accepts(character):
                moved.update(step.following)
        reached = self._reach(moved, at_start=False, at_end=False)
        if len(self._moves) >= MAX_CACHED_STATES:
            self._moves.clear()
        self._moves[key] = reached
        return reached

    def found_in(self, line: str) -> bool:
        states = self._reach({self._start}, at_start=True, at_end=not line)
        for character in line.lower() if self._fold else line:
            if self._end in states:
                return True
            states = self._advance(states, character)
        if self._end in states:
            return True
        return self._end in self._reach(set(states), at_start=not line, at_end=True)


class _PatternReader:
    """Builds the steps from the pattern's text, each piece knowing what follows it."""

    def __init__(self, text: str, extended: bool, add: "_Add") -> None:
        self._tokens = _tokens(text, extended)
        self._at = 0
        self._add = add
        self._depth = 0

    def read(self, end: int, steps: list[_Step]) -> int:
        tree = self._alternatives()
        if self._at < len(self._tokens):
            raise BadPattern("unmatched )")
        return self._build(tree, end, steps)

    def _peek(self) -> "_Token | None":
        return self._tokens[self._at] if self._at < len(self._tokens) else None

    def _alternatives(self) -> "_Tree":
        branches = [self._sequence()]
        while self._peek() == "|":
            self._at += 1
            branches.append(self._sequence())
        return ("|", branches)

    def _sequence(self) -> "_Tree":
        pieces: list[_Tree] = []
        while (token := self._peek()) is not None and token not in ("|", ")"):
            self._at += 1
            pieces.append(self._piece(token))
        return ("", pieces)

    def _piece(self, first: "_Token") -> "_Tree":
        piece: _Tree
        if first == "(":
            self._depth += 1
            if self._depth > MAX_NESTING:
                raise BadPattern("regular expression too big")
            piece = self._alternatives()
            if self._peek() != ")":
                raise BadPattern("unmatched (")
            self._at += 1
            self._depth -= 1
        elif first in ("^", "$"):
            return (str(first), [])
        elif isinstance(first, str):
            piece = _Characters(frozenset(first[-1]))
        else:
            piece = first
        seen = ""
        while (following := self._peek()) in ("*", "+", "?"):
            seen += str(following)
            self._at += 1
        if seen:
            # Stacked repetitions collapse: anything but one kind alone means "any number".
            piece = (seen[0] if len(set(seen)) == 1 else "*", [piece])
        return piece

    def _build(self, tree: "_Tree", following: int, steps: list[_Step]) -> int:
        if isinstance(tree, _Characters):
            return self._add(_Step(characters=tree, following=(following,)))
        kind, children = tree
        if kind == "":
            for child in reversed(children):
                following = self._build(child, following, steps)
            return following
        if kind == "|":
            starts = tuple(self._build(child, following, steps) for child in children)
            return self._add(_Step(following=starts))
        if kind in ("^", "$"):
            return self._add(_Step(anchor=kind, following=(following,)))
        loop = self._add(_Step())
        body = self._build(children[0], loop if kind != "?" else following, steps)
        steps[loop].following = (body, following)
        return body if kind == "+" else loop


_Token = str | _Characters
_Tree = _Characters | tuple[str, list["_Tree"]]
_Add = Callable[[_Step], int]


def _tokens(text: str, extended: bool) -> list[_Token]:
    """Operators as themselves, literals as `\\x`, the rest as character sets."""
    operators = "()|+?" if extended else ""
    tokens: list[_Token] = []
    at = 0
    while at < len(text):
        character = text[at]
        at += 1
        if character == "\\":
            if at == len(text):
                raise BadPattern("trailing backslash (\\)")
            escaped = text[at]
            at += 1
            tokens.append(escaped if not extended and escaped in "()|+?" else "\\" + escaped)
        elif character == ".":
            tokens.append(_ANY)
        elif character == "[":
            characters, at = _bracket(text, at)
            tokens.append(characters)
        elif character == "*":
            tokens.append("*" if tokens and tokens[-1] not in ("(", "|", "^") else "\\*")
        elif character == "^":
            opens = not tokens or tokens[-1] in ("(", "|")
            tokens.append("^" if extended or opens else "\\^")
        elif character == "$":
            tokens.append("$" if extended or at == len(text) else "\\$")
        elif character in operators:
            tokens.append(character)
        else:
            tokens.append("\\" + character)
    return tokens


def _bracket(text: str, at: int) -> tuple[_Characters, int]:
    negated = text[at : at + 1] == "^"
    at += negated
    singles: set[str] = set()
    ranges: list[tuple[str, str]] = []
    classes: list[str] = []
    first = True
    while True:
        if at >= len(text):
            raise BadPattern("unmatched [")
        if text[at] == "]" and not first:
            return _Characters(frozenset(singles), tuple(ranges), tuple(classes), negated), at + 1
        first = False
        if text.startswith("[:", at):
            end = text.find(":]", at)
            name = text[at + 2 : end] if end > 0 else ""
            if name not in _CLASSES:
                raise BadPattern("invalid character class")
            classes.append(name)
            at = end + 2
        elif text[at + 1 : at + 2] == "-" and text[at + 2 : at + 3] not in ("]", ""):
            ranges.append((text[at], text[at + 2]))
            at += 3
        else:
            singles.add(text[at])
            at += 1


@lru_cache(maxsize=32)
def compile_pattern(text: str, *, extended: bool, ignore_case: bool) -> Pattern:
    """Compile, or take from the last few. Raises BadPattern."""
    return Pattern(text, extended=extended, ignore_case=ignore_case)
