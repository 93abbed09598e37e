"""Turns the words of a command line into arguments: variables, substitutions, splitting, patterns."""

from collections.abc import Awaitable, Callable
from fnmatch import fnmatchcase

from phones.simulator.calls import Session
from phones.simulator.files import PhoneFileError, PhoneFiles, resolve
from phones.simulator.syntax import Part, Script, Substitution, Text, Variable, Word

MAX_MATCHES = 4096
MAX_EXPANDED = 1 << 20
SHELL_PROCESS = 2748

Substitute = Callable[[Script], Awaitable[str]]


class ExpansionFault(Exception):
    """The words grow too large."""


class _Field:
    """One argument in the making, beside the pattern it may turn out to be."""

    def __init__(self) -> None:
        self.text = ""
        self.pattern = ""
        self.is_pattern = False

    def add(self, text: str, *, quoted: bool) -> None:
        self.text += text
        special = "*?["
        if quoted:
            self.pattern += "".join(f"[{sign}]" if sign in special else sign for sign in text)
        else:
            self.pattern += text
            self.is_pattern = self.is_pattern or any(sign in text for sign in special)


class Expansion:
    """Expands words for one command of one shell."""

    def __init__(self, files: PhoneFiles, session: Session, substitute: Substitute) -> None:
        self._files = files
        self._session = session
        self._substitute = substitute

    async def text(self, word: Word) -> str:
        """The word as one piece, as in an assignment."""
        return "".join([await self._value(part) for part in word])

    async def arguments(self, words: tuple[Word, ...]) -> tuple[str, ...]:
        """All the arguments that the words mean. Raises ExpansionFault."""
        arguments: list[str] = []
        size = 0
        for word in words:
            for field in await self._fields(word):
                matches = await self._matches(field.pattern) if field.is_pattern else []
                arguments.extend(matches or [field.text])
                size += sum(map(len, matches or [field.text]))
            if size > MAX_EXPANDED:
                raise ExpansionFault("argument list too long")
        return tuple(arguments)

    async def _fields(self, word: Word) -> list[_Field]:
        fields: list[_Field] = []
        current: _Field | None = None
        for part in word:
            value = await self._value(part)
            if part.quoted or isinstance(part, Text):
                current = current or _Field()
                current.add(value, quoted=part.quoted)
                continue
            pieces = value.split()
            if current is not None and value[:1].isspace():
                fields.append(current)
                current = None
            for piece in pieces:
                current = current or _Field()
                current.add(piece, quoted=False)
                if piece is not pieces[-1] or value[-1:].isspace():
                    fields.append(current)
                    current = None
        if current is not None:
            fields.append(current)
        return fields

    async def _value(self, part: Part) -> str:
        if isinstance(part, Text):
            return part.text
        if isinstance(part, Substitution):
            return await self._substitute(part.script)
        return self._variable(part)

    def _variable(self, part: Variable) -> str:
        arguments = self._session.arguments
        if part.name == "?":
            value = str(self._session.status)
        elif part.name == "#":
            value = str(len(arguments))
        elif part.name in ("@", "*"):
            value = " ".join(arguments)
        elif part.name == "$":
            value = str(SHELL_PROCESS)
        elif part.name == "0":
            value = "sh"
        elif part.name.isdigit():
            value = arguments[int(part.name) - 1] if int(part.name) <= len(arguments) else ""
        else:
            value = self._session.variables.get(part.name, "")
        return value or part.fallback or ""

    async def _matches(self, pattern: str) -> list[str]:
        """The phone's files that match, sorted; none leaves the word as it was written."""
        prefixes = ["/"] if pattern.startswith("/") else [""]
        for step in [part for part in pattern.split("/") if part]:
            if not any(sign in step for sign in "*?["):
                prefixes = [prefix + step + "/" for prefix in prefixes]
                continue
            found: list[str] = []
            for prefix in prefixes:
                found += [prefix + name + "/" for name in await self._names(prefix, step)]
                if len(found) > MAX_MATCHES:
                    raise ExpansionFault("argument list too long")
            prefixes = found
        return [name for prefix in prefixes if await self._exists(name := prefix.rstrip("/") or "/")]

    async def _names(self, directory: str, pattern: str) -> list[str]:
        try:
            listed = await self._files.list(resolve(directory or ".", self._session.directory))
        except PhoneFileError:
            return []
        hidden = pattern.startswith(".")
        return [
            file.name
            for file in listed
            if file.name.startswith(".") == hidden and fnmatchcase(file.name, pattern)
        ]

    async def _exists(self, name: str) -> bool:
        try:
            await self._files.stat(resolve(name, self._session.directory))
        except PhoneFileError:
            return False
        return True
