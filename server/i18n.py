"""Words, numbers and times in the reader's language.

English is the language of the source; every other locale has a catalogue,
`locales/<locale>/LC_MESSAGES/messages.po`, read and compiled in memory when this module is
imported. Nothing here touches a file afterwards, so every function may be called on the loop.

How a message gets here:

- a template writes `{{ _("Phones") }}` or `{% trans %}…{% endtrans %}`, with `%(name)s` for values;
- Python marks a constant with `N_("{name} is running")` and translates it when it knows the reader:
  `translate(locale, MESSAGE, {"name": device.name})`, with `{name}` for values;
- `python -m server.i18n extract` brings new messages into the catalogues, keeping what is
  translated; `python -m server.i18n check` fails while anything is missing, fuzzy or left over.
"""

import gettext
import io
import re
import sys
from collections.abc import Iterator, Mapping
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path

from aiohttp import web
from babel import Locale
from babel.dates import format_date, format_skeleton, format_timedelta
from babel.messages.catalog import Catalog
from babel.messages.extract import extract_from_dir
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po, write_po
from babel.numbers import format_currency, format_decimal, get_currency_precision, parse_decimal
from babel.units import format_unit

SOURCE_LOCALE = "en"
LOCALES = ("en", "zh_CN")
"""Every language a page can be in, the default first."""

LOCALE_COOKIE = "locale"

_ROOT = Path(__file__).resolve().parent.parent
# Given a name instead, Babel looks at the disk on each call.
_BABEL = {locale: Locale.parse(locale) for locale in LOCALES}
_MOST_MONEY = 10**15
_PLACEHOLDER = re.compile(r"%\((\w+)\)[sd]|\{(\w+)[^{}]*\}")


def N_(message: str) -> str:
    """Mark a message for extraction where its reader is not known yet; returns it as it is."""
    return message


def translate(locale: str, message: str, params: Mapping[str, object] | None = None) -> str:
    """The message in the reader's language, its `{name}`s filled from `params`.

    `message` is one of our own constants, never a visitor's text, when there are `params`; without
    them nothing is filled in and any text passes through unharmed. A missing parameter stays
    visible as `{name}`.
    """
    text = _TRANSLATIONS[locale].gettext(message) if message else ""
    return text.format_map(_Lenient(params)) if params else text


def ngettext(
    locale: str, singular: str, plural: str, n: int, params: Mapping[str, object] | None = None
) -> str:
    """The message for `n` things; `{n}` is the number, the other `{name}`s come from `params`."""
    return plural_form(locale, singular, plural, n).format_map(_Lenient({"n": n, **(params or {})}))


def plural_form(locale: str, singular: str, plural: str, n: int) -> str:
    """The form of a message that fits `n`, nothing filled in."""
    return _TRANSLATIONS[locale].ngettext(singular, plural, n)


def pick_locale(request: web.Request) -> str:
    """The language of the answer: the reader's own choice, else what the browser asks for, else English."""
    chosen = request.cookies.get(LOCALE_COOKIE)
    if chosen in LOCALES:
        return chosen
    for tag in _accepted(request.headers.get("Accept-Language", "")):
        for locale in LOCALES:
            if tag.partition("-")[0] == locale.partition("_")[0]:
                return locale
    return SOURCE_LOCALE


def money(amount_minor: int, currency: str, locale: str) -> str:
    """An amount in minor units (cents, fen) as the reader writes it: `CN¥10.00`, `¥10.00`."""
    amount = Decimal(amount_minor).scaleb(-get_currency_precision(currency))
    return format_currency(amount, currency, locale=_BABEL[locale])


def parse_money(text: str, currency: str, locale: str) -> int:
    """What somebody typed (`10`, `10.5`, `1,000.00`) in minor units.

    Raises ValueError where it is no number, finer than the currency's smallest coin, or grouped as nobody
    of that language does: `10,50` in English would be 1050.
    """
    try:
        number = parse_decimal(text.strip(), locale=_BABEL[locale], strict=True)
        amount = number.scaleb(get_currency_precision(currency))
    except (ArithmeticError, ValueError) as error:
        raise ValueError(f"not an amount of money: {text!r}") from error
    if not amount.is_finite() or abs(amount) >= _MOST_MONEY:
        raise ValueError(f"not an amount of money: {text!r}")
    minor = int(amount)
    if minor != amount:
        raise ValueError(f"finer than the smallest coin: {text!r}")
    return minor


def moment(at: datetime, locale: str) -> str:
    """A point in time in UTC, to the minute. Pages show it until the browser puts it in local time."""
    utc = at.astimezone(UTC)
    return f"{format_date(utc, locale=_BABEL[locale])} {utc:%H:%M} UTC"


def day(on: date, locale: str) -> str:
    """A day as the reader writes it."""
    return format_date(on, locale=_BABEL[locale])


def month(on: date, locale: str) -> str:
    """A day's month and year as the reader writes them."""
    return format_skeleton("yMMMM", on, locale=_BABEL[locale])


def file_size(size_bytes: int, locale: str) -> str:
    """A size in decimal units, to three figures at most: `850 byte`, `12.3 MB`."""
    size = float(size_bytes)
    if size < 1000:
        return format_unit(size_bytes, "digital-byte", "short", locale=_BABEL[locale])
    for unit in ("kilobyte", "megabyte", "gigabyte"):
        size /= 1000
        if size < 999.5 or unit == "gigabyte":
            break
    number = format_decimal(size, "#,##0.#" if size < 100 else "#,##0", locale=_BABEL[locale])
    return format_unit(number, f"digital-{unit}", "short", locale=_BABEL[locale])


def duration(seconds: float, locale: str) -> str:
    """A length of time in its largest fitting unit: `3 hours`."""
    return format_timedelta(timedelta(seconds=seconds), threshold=1, locale=_BABEL[locale])


def stretch(seconds: int, locale: str) -> str:
    """A length of time in its two largest units: `3 days 4 hr`; a minute is the least."""
    minutes = max(1, seconds // 60)
    parts = [("day", minutes // 1440), ("hour", minutes // 60 % 24), ("minute", minutes % 60)]
    while not parts[0][1]:
        del parts[0]
    return " ".join(
        format_unit(count, f"duration-{unit}", "short", locale=_BABEL[locale])
        for unit, count in parts[:2]
        if count
    )


class _Missing:
    """Stands for a parameter nobody gave: prints itself as the placeholder it is."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __format__(self, spec: str) -> str:
        return f"{{{self._name}}}"

    def __getattr__(self, name: str) -> "_Missing":
        return self


class _Lenient(dict[str, object]):
    def __missing__(self, name: str) -> _Missing:
        return _Missing(name)


def _accepted(header: str) -> list[str]:
    """The language tags of an Accept-Language header in lower case, the best liked first."""
    weighted: list[tuple[float, str]] = []
    for item in header.lower().split(","):
        tag, _, weight = item.strip().partition(";q=")
        try:
            weighted.append((-float(weight or 1), tag))
        except ValueError:
            continue
    return [tag for weight, tag in sorted(weighted, key=lambda pair: pair[0]) if tag and weight < 0]


def _catalogue_path(locale: str) -> Path:
    return _ROOT / "locales" / locale / "LC_MESSAGES" / "messages.po"


def _read_catalogue(locale: str) -> Catalog:
    path = _catalogue_path(locale)
    if not path.exists():
        return Catalog(locale=locale)
    with path.open("rb") as file:
        return read_po(file, locale=locale)


def _translations(locale: str) -> gettext.NullTranslations:
    if locale == SOURCE_LOCALE:
        return gettext.NullTranslations()
    compiled = io.BytesIO()
    write_mo(compiled, _read_catalogue(locale))
    compiled.seek(0)
    return gettext.GNUTranslations(compiled)


def _load_locale(locale: str) -> None:
    """Make Babel read its files about a locale now, not in the middle of a request."""
    money(0, "CNY", locale)
    moment(datetime(2000, 1, 1, tzinfo=UTC), locale)
    file_size(1234, locale)
    duration(60, locale)
    stretch(90_000, locale)
    month(date(2000, 1, 1), locale)


def _extract() -> Catalog:
    """Every message the source has now."""
    found = Catalog(project="cloudphone", charset="utf-8")
    python = {"N_": None, "ngettext": (2, 3)}
    refusals = {"InvalidApk": None}  # phones/ knows no gettext; these texts are shown to people
    template = {"_": None, "gettext": None, "ngettext": (1, 2)}
    for folder, pattern, method, keywords in (
        ("server", "**.py", "python", python),
        ("phones", "**.py", "python", refusals),
        ("plugins", "**.py", "python", python),
        ("templates", "**.html", "jinja2", template),
    ):
        options = {pattern: {"trimmed": "true", "silent": "false"}}
        for path, _line, message, comments, context in extract_from_dir(
            _ROOT / folder, [(pattern, method)], options, keywords, comment_tags=("i18n:",)
        ):
            # Without line numbers a catalogue changes only when a message does.
            found.add(message, None, [(f"{folder}/{path}", 0)], auto_comments=comments, context=context)
    return found


def extract() -> None:
    """Bring the catalogues up to the source: new messages empty, translated ones kept, others dropped."""
    source = _extract()
    for locale in _translated_locales():
        catalogue = _read_catalogue(locale)
        catalogue.update(source, no_fuzzy_matching=True)
        catalogue.obsolete.clear()
        for message in catalogue:
            message.locations = [(path, 0) for path in sorted({path for path, _ in message.locations})]
        path = _catalogue_path(locale)
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            # A header would hold nothing but dates, and change with each run.
            write_po(file, catalogue, width=100, omit_header=True, sort_output=True, include_lineno=False)


def complaints() -> Iterator[str]:
    """What keeps the catalogues from being complete, a line each."""
    wanted = {message.id for message in _extract() if message.id}
    for locale in _translated_locales():
        catalogue = _read_catalogue(locale)
        had = {message.id for message in catalogue if message.id}
        yield from (f"{locale}: not extracted: {_first(id_)!r}" for id_ in sorted(wanted - had, key=str))
        yield from (f"{locale}: no longer used: {_first(id_)!r}" for id_ in sorted(had - wanted, key=str))
        for message in catalogue:
            if not message.id:
                continue
            texts = _forms(message.string)
            if not all(texts):
                yield f"{locale}: not translated: {_first(message.id)!r}"
            elif message.fuzzy:
                yield f"{locale}: fuzzy: {_first(message.id)!r}"
            elif not all(_placeholders(text) <= _placeholders(*_forms(message.id)) for text in texts):
                yield f"{locale}: unknown placeholder: {_first(message.id)!r}"


def _translated_locales() -> list[str]:
    return [locale for locale in LOCALES if locale != SOURCE_LOCALE]


def _forms(text: str | tuple[str, ...] | list[str] | None) -> tuple[str, ...]:
    return (text or "",) if isinstance(text, str | None) else tuple(text)


def _first(id_: str | tuple[str, ...] | list[str]) -> str:
    return _forms(id_)[0]


def _placeholders(*texts: str) -> set[str]:
    return {name for text in texts for pair in _PLACEHOLDER.findall(text) for name in pair if name}


_TRANSLATIONS = {locale: _translations(locale) for locale in LOCALES}
for _locale in LOCALES:
    _load_locale(_locale)


def main(arguments: list[str]) -> int:
    """`extract` or `check` from the command line; answers the exit code."""
    if arguments == ["extract"]:
        extract()
        return 0
    if arguments == ["check"]:
        found = list(complaints())
        print("\n".join(found) or f"catalogues complete: {', '.join(_translated_locales())}")
        return 1 if found else 0
    print("usage: python -m server.i18n extract|check", file=sys.stderr)
    return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
