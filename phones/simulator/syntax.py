"""Reads a command line into a tree that `shell.py` can run. The grammar is the part of POSIX sh that
people type after `adb shell`: lists, pipes, redirects, groups, quotes, variables and substitutions.
Loops and conditions are not read: their words are taken for commands and are not found.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

MAX_NESTING = 24
MAX_PIPELINE = 64

NAME_START = frozenset("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ_")
NAME_REST = NAME_START | frozenset("0123456789")
SPECIAL_PARAMETERS = frozenset("?$#@*!-0123456789")
OPERATOR_START = frozenset(";&|<>()\n")
BLANKS = frozenset(" \t\r")


class ShellSyntaxError(Exception):
    """The command line cannot be read; the text is what sh prints after its name."""


@dataclass(frozen=True, slots=True)
class Text:
    """Characters as they stand; quoted ones are neither split nor taken as a pattern."""

    text: str
    quoted: bool


@dataclass(frozen=True, slots=True)
class Variable:
    """`$NAME` or `${NAME:-fallback}`."""

    name: str
    quoted: bool
    fallback: str | None = None


@dataclass(frozen=True, slots=True)
class Substitution:
    """`$(script)`: the output of the script."""

    script: "Script"
    quoted: bool


Part = Text | Variable | Substitution
Word = tuple[Part, ...]


@dataclass(frozen=True, slots=True)
class Redirect:
    """One of `<`, `>`, `>>` with a path, or `>&` with a descriptor."""

    descriptor: int
    kind: Literal["<", ">", ">>", ">&"]
    target: Word


@dataclass(frozen=True, slots=True)
class Simple:
    """Assignments, a command's words, and where its streams go."""

    assignments: tuple[tuple[str, Word], ...]
    words: tuple[Word, ...]
    redirects: tuple[Redirect, ...]


@dataclass(frozen=True, slots=True)
class Group:
    """`( list )`, which runs in a copy of the shell, or `{ list; }`, which does not."""

    script: "Script"
    own_shell: bool
    redirects: tuple[Redirect, ...]


@dataclass(frozen=True, slots=True)
class Pipeline:
    """Commands joined by `|`; `!` turns the exit code round."""

    commands: tuple[Simple | Group, ...]
    negated: bool


@dataclass(frozen=True, slots=True)
class AndOr:
    """Pipelines joined by `&&` and `||`; a trailing `&` lets them run beside the rest."""

    first: Pipeline
    rest: tuple[tuple[Literal["&&", "||"], Pipeline], ...]
    background: bool


@dataclass(frozen=True, slots=True)
class Script:
    """Lists one after the other."""

    entries: tuple[AndOr, ...]


def parse(text: str) -> Script:
    """Read a whole command line. Raises ShellSyntaxError."""
    reader = _Reader(text, depth=0)
    return reader.script(until=lambda: reader.at_end())


class _Reader:
    """A recursive-descent reader over one text; nested substitutions get their own."""

    def __init__(self, text: str, depth: int, at: int = 0) -> None:
        if depth > MAX_NESTING:
            raise ShellSyntaxError("syntax error: nested too deeply")
        self.text = text
        self.at = at
        self.depth = depth

    def at_end(self) -> bool:
        return self.at >= len(self.text)

    def peek(self, length: int = 1) -> str:
        return self.text[self.at : self.at + length]

    def skip_blanks(self) -> None:
        """Skip spaces, joined lines and a comment."""
        while not self.at_end():
            if self.peek() in BLANKS:
                self.at += 1
            elif self.peek(2) == "\\\n":
                self.at += 2
            elif self.peek() == "#":
                end = self.text.find("\n", self.at)
                self.at = len(self.text) if end < 0 else end
            else:
                return

    def skip_lines(self) -> None:
        self.skip_blanks()
        while self.peek() == "\n":
            self.at += 1
            self.skip_blanks()

    def unexpected(self) -> ShellSyntaxError:
        if self.at_end():
            return ShellSyntaxError("syntax error: unexpected EOF")
        token = "newline" if self.peek() == "\n" else self.peek()
        return ShellSyntaxError(f"syntax error: unexpected '{token}'")

    def script(self, until: Callable[[], bool]) -> Script:
        entries: list[AndOr] = []
        self.skip_lines()
        while not until():
            entry = self.and_or()
            self.skip_blanks()
            if self.peek() == "&":
                self.at += 1
                entry = AndOr(entry.first, entry.rest, background=True)
            elif self.peek() in (";", "\n") and not self.at_end():
                self.at += 1
            elif not until():
                raise self.unexpected()
            entries.append(entry)
            self.skip_lines()
        return Script(tuple(entries))

    def and_or(self) -> AndOr:
        first = self.pipeline()
        rest: list[tuple[Literal["&&", "||"], Pipeline]] = []
        while True:
            self.skip_blanks()
            operator = self.peek(2)
            if operator == "&&":
                self.at += 2
                self.skip_lines()
                rest.append(("&&", self.pipeline()))
            elif operator == "||":
                self.at += 2
                self.skip_lines()
                rest.append(("||", self.pipeline()))
            else:
                return AndOr(first, tuple(rest), background=False)

    def pipeline(self) -> Pipeline:
        self.skip_blanks()
        negated = False
        if self.peek() == "!" and self.peek(2)[1:] in (" ", "\t"):
            self.at += 1
            negated = True
        commands = [self.command()]
        self.skip_blanks()
        while self.peek() == "|" and self.peek(2) != "||":
            self.at += 1
            self.skip_lines()
            commands.append(self.command())
            if len(commands) > MAX_PIPELINE:
                raise ShellSyntaxError("can't fork - try again")
            self.skip_blanks()
        return Pipeline(tuple(commands), negated)

    def command(self) -> Simple | Group:
        self.skip_blanks()
        if self.peek() == "(":
            return self.group(")", own_shell=True)
        if self.peek() == "{" and self.peek(2)[1:] in (" ", "\t", "\n"):
            return self.group("}", own_shell=False)
        return self.simple()

    def group(self, closing: str, *, own_shell: bool) -> Group:
        inner = _Reader(self.text, self.depth + 1, self.at + 1)
        script = inner.script(until=lambda: inner.peek() == closing)
        if not script.entries:
            raise inner.unexpected()
        self.at = inner.at + 1
        redirects: list[Redirect] = []
        while (redirect := self.redirect()) is not None:
            redirects.append(redirect)
        return Group(script, own_shell, tuple(redirects))

    def simple(self) -> Simple:
        assignments: list[tuple[str, Word]] = []
        words: list[Word] = []
        redirects: list[Redirect] = []
        while True:
            redirect = self.redirect()
            if redirect is not None:
                redirects.append(redirect)
                continue
            if self.at_end() or self.peek() in OPERATOR_START:
                break
            name = None if words else self.assignment_name()
            if name is not None:
                assignments.append((name, self.word(may_be_empty=True)))
            else:
                words.append(self.word())
        if not assignments and not words and not redirects:
            raise self.unexpected()
        return Simple(tuple(assignments), tuple(words), tuple(redirects))

    def assignment_name(self) -> str | None:
        end = self.at
        while end < len(self.text) and self.text[end] in NAME_REST:
            end += 1
        if end == self.at or self.text[self.at] not in NAME_START or self.text[end : end + 1] != "=":
            return None
        name = self.text[self.at : end]
        self.at = end + 1
        return name

    def redirect(self) -> Redirect | None:
        self.skip_blanks()
        start = self.at
        digits = self.peek() if self.peek() in ("0", "1", "2") and self.peek() else ""
        operator_at = start + len(digits)
        if self.text[operator_at : operator_at + 1] not in ("<", ">"):
            return None
        kind: Literal["<", ">", ">>", ">&"]
        if self.text.startswith((">>", ">&", ">|"), operator_at):
            two = self.text[operator_at : operator_at + 2]
            kind = ">>" if two == ">>" else ">&" if two == ">&" else ">"
            self.at = operator_at + 2
        else:
            kind = "<" if self.text[operator_at] == "<" else ">"
            self.at = operator_at + 1
        if kind == "<" and self.peek() in ("<", "&", ">") and not self.at_end():
            raise self.unexpected()
        self.skip_blanks()
        if self.at_end() or self.peek() in OPERATOR_START:
            raise self.unexpected()
        descriptor = int(digits) if digits else (0 if kind == "<" else 1)
        return Redirect(descriptor, kind, self.word())

    def word(self, *, may_be_empty: bool = False) -> Word:
        parts: list[Part] = []
        while not self.at_end() and self.peek() not in OPERATOR_START and self.peek() not in BLANKS:
            character = self.peek()
            if character == "'":
                parts.append(Text(self.single_quoted(), quoted=True))
            elif character == '"':
                parts.extend(self.double_quoted())
            elif character == "\\":
                escaped = self.peek(2)[1:]
                self.at += 2
                if escaped != "\n":
                    parts.append(Text(escaped or "\\", quoted=True))
            elif character in "$`":
                parts.append(self.expansion(quoted=False))
            else:
                parts.append(Text(self.plain(), quoted=False))
        if not parts and not may_be_empty:
            # Only a joined line stood here; nothing is not a word, but the reader has moved on.
            return (Text("", quoted=False),)
        return tuple(parts)

    def plain(self) -> str:
        start = self.at
        while not self.at_end() and self.peek() not in OPERATOR_START and self.peek() not in " \t\r'\"\\$`":
            self.at += 1
        return self.text[start : self.at]

    def single_quoted(self) -> str:
        end = self.text.find("'", self.at + 1)
        if end < 0:
            raise ShellSyntaxError("syntax error: no closing quote")
        text = self.text[self.at + 1 : end]
        self.at = end + 1
        return text

    def double_quoted(self) -> list[Part]:
        parts: list[Part] = [Text("", quoted=True)]
        literal: list[str] = []
        self.at += 1
        while True:
            if self.at_end():
                raise ShellSyntaxError("syntax error: no closing quote")
            character = self.peek()
            if character == '"':
                self.at += 1
                break
            if character == "\\" and self.peek(2)[1:] in ("\\", '"', "$", "`", "\n") and self.peek(2)[1:]:
                if self.peek(2)[1] != "\n":
                    literal.append(self.peek(2)[1])
                self.at += 2
            elif character in "$`":
                parts.append(Text("".join(literal), quoted=True))
                literal.clear()
                parts.append(self.expansion(quoted=True))
            else:
                literal.append(character)
                self.at += 1
        parts.append(Text("".join(literal), quoted=True))
        return parts

    def expansion(self, *, quoted: bool) -> Part:
        if self.peek() == "`":
            return self.backquoted(quoted=quoted)
        if self.peek(2) == "$(":
            inner = _Reader(self.text, self.depth + 1, self.at + 2)
            script = inner.script(until=lambda: inner.peek() == ")")
            self.at = inner.at + 1
            return Substitution(script, quoted)
        if self.peek(2) == "${":
            return self.braced(quoted=quoted)
        self.at += 1
        if self.peek() in SPECIAL_PARAMETERS and not self.at_end():
            self.at += 1
            return Variable(self.text[self.at - 1], quoted)
        start = self.at
        if self.peek() in NAME_START:
            while not self.at_end() and self.peek() in NAME_REST:
                self.at += 1
        return Variable(self.text[start : self.at], quoted) if self.at > start else Text("$", quoted)

    def braced(self, *, quoted: bool) -> Variable:
        end = self.text.find("}", self.at)
        if end < 0:
            raise ShellSyntaxError("syntax error: no closing '}'")
        name, has_fallback, fallback = self.text[self.at + 2 : end].partition(":-")
        if not name or not (name in SPECIAL_PARAMETERS or (set(name) <= NAME_REST and name[0] in NAME_START)):
            raise ShellSyntaxError(f"{self.text[self.at : end + 1]}: bad substitution")
        self.at = end + 1
        return Variable(name, quoted, fallback if has_fallback else None)

    def backquoted(self, *, quoted: bool) -> Substitution:
        end = self.at + 1
        inside: list[str] = []
        while end < len(self.text) and self.text[end] != "`":
            if self.text[end] == "\\" and self.text[end + 1 : end + 2] in ("`", "\\", "$"):
                end += 1
            inside.append(self.text[end : end + 1])
            end += 1
        if end >= len(self.text):
            raise ShellSyntaxError("syntax error: no closing quote")
        self.at = end + 1
        inner = _Reader("".join(inside), self.depth + 1)
        return Substitution(inner.script(until=lambda: inner.at_end()), quoted)
