"""HTML pages: templates, static files, the language switch.

How a plugin renders a page. Its handler collects plain values (the models of the API, or dicts
with the same field names) and answers

    return render(request, "devices/list.html", {"devices": devices, "plans": plans, "currency": "CNY"})

The comment at the top of each template names exactly what it wants; a name it does not get is an
error (StrictUndefined), not a blank. Every page gets these besides:

- `caller`: `request.get(CALLER)`, an object with `user_id`, `email`, `display_name`, `role`, or None;
- `csrf_token`: `request.get(PAGE_CSRF, "")`; every form that posts carries it as the field
  `csrf_token`, the modules in static/js send it as the header `X-CSRF-Token`;
- `locale`, `path` (the request's path and query);
- `page_facts`: what the plugins know about the caller for the header of every page. A plugin's
  lifespan adds a function that answers from memory: `app[PAGE_CONTEXT].append(facts_of_page)`,
  `(web.Request) -> Mapping[str, object]`. Every fact is optional:
  notify: `unread: int`, `last_notification_id: int`, `recent_notifications` (newest first, on `/`);
  billing: `balance: int`, `currency: str`; devices: `runtime: "docker"|"simulated"`,
  `runtime_reason: str` (a sentence in the reader's language, may be ""),
  `phones: {"total": int, "running": int}` (on `/`).

A form that was filled in wrongly is rendered again with status 422, `errors` (field → sentence; ""
for the whole form) and `values` (field → what was typed). After a form that worked, answer
303 See Other.

Text in templates is marked with `_("…")`. What arrives in a variable and is one of our messages
(N_) goes through the filter `translated`. The other filters: `money(currency)`, `moment`, `day`, `month`,
`file_size`, `duration`, `stretch`, `json_attribute` (a value for a quoted attribute, read by a module).
`static("css/base.css")` is a file's address, with the hash of the whole tree in its path, so that
browsers may keep it for a year and modules that import each other still fit together.
"""

import asyncio
import gzip
import hashlib
import json
import mimetypes
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import aiohttp_jinja2
import jinja2
from aiohttp import web
from markupsafe import Markup, escape

from server import i18n
from server.request_keys import CALLER, PAGE_CSRF

PageFacts = Callable[[web.Request], Mapping[str, object]]

PAGE_CONTEXT: Final[web.AppKey[list[PageFacts]]] = web.AppKey("PAGE_CONTEXT", list)

SECURITY_HEADERS: Final[Mapping[str, str]] = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' data: blob:; object-src 'none'; "
    "base-uri 'none'; frame-ancestors 'none'; form-action 'self'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "same-origin",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-store",
}

_ROOT = Path(__file__).resolve().parent.parent
_STATIC_PREFIX = "/static/"
_A_YEAR_S = 365 * 24 * 3600
_TEXT_TYPES = ("text/", "image/svg+xml")

mimetypes.add_type("text/javascript", ".js")
mimetypes.add_type("image/svg+xml", ".svg")


@dataclass(frozen=True)
class _StaticFile:
    body: bytes
    gzipped: bytes | None
    content_type: str


@dataclass(frozen=True)
class _StaticTree:
    """All of static/, in memory: some hundred kilobytes, and no path can lead out of it."""

    version: str
    files: Mapping[str, _StaticFile]

    def address(self, path: str) -> str:
        if path not in self.files:
            raise LookupError(f"no file static/{path}")
        return f"{_STATIC_PREFIX}{self.version}/{path}"


_STATIC: Final = web.AppKey("_STATIC", _StaticTree)
_ENVIRONMENTS: Final = {locale: web.AppKey(f"_PAGES_{locale}", jinja2.Environment) for locale in i18n.LOCALES}


def setup_pages(app: web.Application) -> None:
    """Give the application its pages: call once, before the plugins' lifespans.

    Adds the route `GET /static/…` (open to all) and a start-up step that reads and compiles every
    template, so that a broken one stops the start. `set_language` is routed by the caller.
    """
    app[PAGE_CONTEXT] = []
    app.router.add_get(_STATIC_PREFIX + "{path:.+}", _serve_static, name="static")
    app.cleanup_ctx.append(_load)


def render(
    request: web.Request, template: str, context: Mapping[str, object], *, status: int = 200
) -> web.Response:
    """The page as an answer, in the reader's language, with the headers every page carries."""
    locale = i18n.pick_locale(request)
    page_facts: dict[str, object] = {}
    for facts in request.app[PAGE_CONTEXT]:
        page_facts.update(facts(request))
    common = {
        "caller": request.get(CALLER),
        "csrf_token": request.get(PAGE_CSRF, ""),
        "locale": locale,
        "path": request.path_qs,
        "page_facts": page_facts,
    }
    response = aiohttp_jinja2.render_template(
        template, request, {**common, **context}, app_key=_ENVIRONMENTS[locale], status=status
    )
    response.headers.update(SECURITY_HEADERS)
    response.headers["Content-Language"] = locale.replace("_", "-")
    return response


async def set_language(request: web.Request) -> web.StreamResponse:
    """`POST /language`, a form with `locale` and `next`: remembers the choice and goes back to the page."""
    form = await request.post()
    locale, next_page = form.get("locale"), form.get("next")
    back = next_page if isinstance(next_page, str) and is_local(next_page) else "/"
    response = web.Response(status=303, headers={"Location": back})
    if isinstance(locale, str) and locale in i18n.LOCALES:
        response.set_cookie(
            i18n.LOCALE_COOKIE,
            locale,
            max_age=_A_YEAR_S,
            httponly=True,
            samesite="Lax",
            secure=request.secure,
        )
    return response


def is_local(address: str) -> bool:
    """Whether an address stays on this site: a path, which no browser takes for another host's."""
    if not address.startswith("/") or "\\" in address or not address.isprintable():
        return False
    try:
        parts = urlsplit(address)
    except ValueError:
        return False
    return not parts.scheme and not parts.netloc and not parts.path.startswith("//")


async def _load(app: web.Application) -> AsyncIterator[None]:
    app[_STATIC] = tree = await asyncio.to_thread(_read_static, _ROOT / "static")
    sources = await asyncio.to_thread(_read_templates, _ROOT / "templates")
    for locale, key in _ENVIRONMENTS.items():
        environment = aiohttp_jinja2.setup(
            app,
            app_key=key,
            default_helpers=False,
            loader=jinja2.DictLoader(sources),
            bytecode_cache=_COMPILED,
            extensions=["jinja2.ext.i18n"],
            undefined=jinja2.StrictUndefined,
            auto_reload=False,
            trim_blocks=True,
            lstrip_blocks=True,
        )
        _speak(environment, locale)
        environment.globals["static"] = tree.address
        await asyncio.to_thread(_compile_all, environment)
    yield


def _speak(environment: jinja2.Environment, locale: str) -> None:
    """One environment a language: macros and filters then need not be told which."""
    environment.install_gettext_callables(  # type: ignore[attr-defined]  # the i18n extension adds it at run time
        partial(i18n.translate, locale), partial(i18n.plural_form, locale), newstyle=True
    )
    environment.globals["locales"] = i18n.LOCALES
    environment.filters.update(
        translated=partial(i18n.translate, locale),
        money=partial(i18n.money, locale=locale),
        moment=partial(i18n.moment, locale=locale),
        day=partial(i18n.day, locale=locale),
        month=partial(i18n.month, locale=locale),
        file_size=partial(i18n.file_size, locale=locale),
        duration=partial(i18n.duration, locale=locale),
        stretch=partial(i18n.stretch, locale=locale),
        json_attribute=_json_attribute,
    )


class _SharedBytecode(jinja2.BytecodeCache):
    """Compiles a template once for all languages."""

    def __init__(self) -> None:
        self._codes: dict[tuple[str, str], Any] = {}

    def load_bytecode(self, bucket: jinja2.bccache.Bucket) -> None:
        bucket.code = self._codes.get((bucket.key, bucket.checksum))

    def dump_bytecode(self, bucket: jinja2.bccache.Bucket) -> None:
        self._codes[bucket.key, bucket.checksum] = bucket.code


_COMPILED: Final = _SharedBytecode()


def _read_templates(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): path.read_text("utf-8")
        for path in sorted(folder.rglob("*.html"))
    }


def _compile_all(environment: jinja2.Environment) -> None:
    for name in environment.list_templates():
        environment.get_template(name)


def _json_attribute(value: object) -> Markup:
    return escape(json.dumps(value, ensure_ascii=False))


@cache
def _read_static(folder: Path) -> _StaticTree:
    files: dict[str, _StaticFile] = {}
    digest = hashlib.sha256()
    for path in sorted(file for file in folder.rglob("*") if file.is_file()):
        name, body = path.relative_to(folder).as_posix(), path.read_bytes()
        content_type = mimetypes.guess_type(name)[0] or "application/octet-stream"
        squeezable = content_type.startswith(_TEXT_TYPES)
        files[name] = _StaticFile(body, gzip.compress(body, mtime=0) if squeezable else None, content_type)
        digest.update(f"{name}\0{len(body)}\0".encode() + body)
    return _StaticTree(digest.hexdigest()[:12], files)


async def _serve_static(request: web.Request) -> web.StreamResponse:
    """A file under its versioned address, kept for a year; under its plain one, asked again each time."""
    tree = request.app[_STATIC]
    path = request.match_info["path"]
    plain = path.removeprefix(f"{tree.version}/")
    file = tree.files.get(plain)
    if file is None:
        raise web.HTTPNotFound
    lasting = plain != path
    headers = {
        "Cache-Control": f"public, max-age={_A_YEAR_S}, immutable" if lasting else "no-cache",
        "X-Content-Type-Options": "nosniff",
        "ETag": f'W/"{tree.version}"',
        "Vary": "Accept-Encoding",
    }
    if tree.version in request.headers.get("If-None-Match", ""):
        return web.Response(status=304, headers=headers)
    body = file.body
    if file.gzipped is not None and "gzip" in request.headers.get("Accept-Encoding", ""):
        body = file.gzipped
        headers["Content-Encoding"] = "gzip"
    charset = "utf-8" if file.gzipped is not None else None
    return web.Response(body=body, content_type=file.content_type, charset=charset, headers=headers)
