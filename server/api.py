"""Route and WebSocket declarations: what a handler takes and gives is read from its signature.

A handler is a plain coroutine function. Its parameters are bound by name: `request`, `caller`
(the signed-in caller), `body` (a JSON body's model), `query` (the query string's model), `new_id`
(the id to give what is created, so that a repeated request makes it once); every other parameter
is a part of the path, converted to its annotation. What it returns is the answer: an `Outgoing`
model, an `Answer` with another status, None for 204, or a ready aiohttp response.
"""

import base64
import binascii
import inspect
import re
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from types import NoneType, UnionType
from typing import Annotated, Any, Generic, TypeVar, get_args
from urllib.parse import parse_qsl

import orjson
from aiohttp import web
from pydantic import AwareDatetime, BaseModel, ConfigDict, Field, PlainSerializer, ValidationError

from server.auth import Access, authenticate
from server.errors import Code, Problem, not_found
from server.i18n import N_
from server.idempotency import IDEMPOTENCY
from server.request_keys import UNLOGGED

API_PREFIX = "/api/v1"
MAX_JSON_BYTES = 1 << 20
MAX_PAGE = 100
_NUL_ESCAPE = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")

Item = TypeVar("Item")
Model = TypeVar("Model", bound=BaseModel)
Handler = Callable[..., Awaitable[Any]]

Moment = Annotated[
    AwareDatetime, PlainSerializer(lambda at: at.isoformat().replace("+00:00", "Z"), return_type=str)
]


class Incoming(BaseModel):
    """A JSON body: exact types, nothing unknown."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class Query(BaseModel):
    """A query string: texts that must read as their types, nothing unknown."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Outgoing(BaseModel):
    """What the API answers."""

    model_config = ConfigDict(frozen=True)


class PageQuery(Query):
    """Which part of a list; more than 100 a page is taken as 100."""

    limit: Annotated[int, Field(ge=1)] = 20
    cursor: str | None = None

    @property
    def page_size(self) -> int:
        """How many items to answer with."""
        return min(self.limit, MAX_PAGE)


class Page(Outgoing, Generic[Item]):
    """One part of a list; `next_cursor` leads to the next part."""

    items: list[Item]
    next_cursor: str | None = None


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer whose status differs from the declared one."""

    model: BaseModel
    status: int


class Upload(StrEnum):
    """A body that a handler reads from its request as it comes: the media type it takes."""

    FORM = "multipart/form-data"
    RAW = "*/*"


class Kind(StrEnum):
    """What a route serves."""

    API = "api"
    PAGE = "page"
    SOCKET = "socket"


@dataclass(frozen=True)
class Route:
    """A declared route. `location` is formatted with the answer's fields into the Location header."""

    kind: Kind
    method: str
    path: str
    access: Access
    handler: Handler
    status: int
    problems: tuple[Code, ...]
    location: str | None
    media: str | None
    upload: Upload | None
    is_logged: bool
    tag: str
    body: type[BaseModel] | None
    query: type[BaseModel] | None
    answer: type[BaseModel] | None
    path_types: dict[str, type]
    wanted: tuple[str, ...]

    @property
    def operation(self) -> str:
        """The operation's name, such as `devices.start`."""
        return f"{self.tag}.{self.handler.__name__}"

    @property
    def summary(self) -> str:
        """The first line of the handler's docstring."""
        return self.description.partition("\n")[0]

    @property
    def description(self) -> str:
        """The handler's whole docstring."""
        return inspect.getdoc(self.handler) or ""

    @property
    def creates(self) -> bool:
        """Whether the route makes something under `new_id`, and so honours Idempotency-Key."""
        return "new_id" in self.wanted


class Routes:
    """A plugin's routes, collected by decorators."""

    def __init__(self, tag: str) -> None:
        self.tag = tag
        self.declared: list[Route] = []

    def api(
        self,
        method: str,
        path: str,
        *,
        access: Access,
        status: int = 200,
        problems: Sequence[Code] = (),
        location: str | None = None,
        media: str | None = None,
        upload: Upload | None = None,
        is_logged: bool = True,
    ) -> Callable[[Handler], Handler]:
        """Declare an operation of the JSON API; `media` where it answers something else than JSON.

        One that is not `is_logged` keeps its own record of what it did, and logs refusals and faults alone.
        """
        return self._declare(
            *(Kind.API, method, API_PREFIX + path, access, status, problems, location, media, upload),
            is_logged=is_logged,
        )

    def socket(
        self, path: str, *, access: Access, problems: Sequence[Code] = ()
    ) -> Callable[[Handler], Handler]:
        """Declare a WebSocket of the API."""
        return self._declare(Kind.SOCKET, "GET", API_PREFIX + path, access, 101, problems, None, None, None)

    def page(self, method: str, path: str, *, access: Access) -> Callable[[Handler], Handler]:
        """Declare a page of the dashboard, or the form it posts."""
        return self._declare(Kind.PAGE, method, path, access, 200, (), None, "text/html", None)

    def _declare(
        self,
        kind: Kind,
        method: str,
        path: str,
        access: Access,
        status: int,
        problems: Sequence[Code],
        location: str | None,
        media: str | None,
        upload: Upload | None,
        *,
        is_logged: bool = True,
    ) -> Callable[[Handler], Handler]:
        def declare(handler: Handler) -> Handler:
            hints = inspect.get_annotations(handler, eval_str=True)
            answer = hints.pop("return")
            parts = re.findall(r"{(\w+)", path)
            wanted = tuple(inspect.signature(handler).parameters)
            unknown = set(wanted) - {"request", "caller", "body", "query", "new_id", *parts}
            if unknown:
                raise TypeError(f"{handler.__qualname__} takes {sorted(unknown)}, which {path} does not give")
            self.declared.append(
                Route(
                    kind=kind,
                    method=method,
                    path=path,
                    access=access,
                    handler=handler,
                    status=204 if answer in (None, NoneType) and kind is Kind.API else status,
                    problems=tuple(problems),
                    location=location,
                    media=media,
                    upload=upload,
                    is_logged=is_logged,
                    tag=self.tag,
                    body=hints.get("body"),
                    query=hints.get("query"),
                    answer=_model_of(answer),
                    path_types={part: hints[part] for part in parts if part in hints},
                    wanted=wanted,
                )
            )
            return handler

        return declare


def _model_of(annotation: Any) -> type[BaseModel] | None:
    """The model among what a handler may return."""
    choices = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    models = [choice for choice in choices if inspect.isclass(choice) and issubclass(choice, BaseModel)]
    return models[0] if models else None


def endpoint(route: Route) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
    """The aiohttp handler of a declared route: authenticate, parse, call, encode."""

    async def serve(request: web.Request) -> web.StreamResponse:
        request[UNLOGGED] = not route.is_logged
        caller = await authenticate(request, route.access, is_socket=route.kind is Kind.SOCKET)
        arguments: dict[str, Any] = {}
        for name in route.wanted:
            match name:
                case "request":
                    arguments[name] = request
                case "caller":
                    arguments[name] = caller
                case "query":
                    arguments[name] = _parse_query(request, route.query)
                case "body" | "new_id":
                    pass
                case part:
                    arguments[part] = _parse_part(request.match_info[part], route.path_types[part])
        raw = await _read_json(request) if route.body else b""
        if route.body:
            arguments["body"] = _parse_body(raw, route.body)
        if route.creates:
            return await request.app[IDEMPOTENCY].serve(
                request, caller, raw, lambda new_id: _call(route, arguments | {"new_id": new_id})
            )
        return await _call(route, arguments)

    return serve


async def _call(route: Route, arguments: dict[str, Any]) -> web.StreamResponse:
    return encode(route, await route.handler(**arguments))


def encode(route: Route, result: object) -> web.StreamResponse:
    """A handler's result as an HTTP answer."""
    if isinstance(result, web.StreamResponse):
        return result
    if result is None:
        return web.Response(status=204)
    status = route.status
    if isinstance(result, Answer):
        status, result = result.status, result.model
    assert isinstance(result, BaseModel), f"{route.operation} returned {type(result)}"
    response = web.Response(
        body=result.model_dump_json().encode(),
        status=status,
        content_type="application/json",
        charset="utf-8",
    )
    if route.location:
        response.headers["Location"] = route.location.format_map(dict(result))
    return response


async def _read_json(request: web.Request) -> bytes:
    if request.content_type != "application/json":
        raise Problem(Code.UNSUPPORTED_MEDIA_TYPE, N_("Send JSON as application/json."))
    if (request.content_length or 0) > MAX_JSON_BYTES:
        raise Problem(Code.TOO_LARGE)
    return await request.read()


def _parse_body(raw: bytes, model: type[Model]) -> Model:
    try:
        orjson.loads(raw)
    except orjson.JSONDecodeError:
        raise Problem(Code.MALFORMED, N_("The body is not JSON.")) from None
    if _NUL_ESCAPE.search(raw):
        raise Problem(Code.INVALID, N_("Texts must not hold NUL characters."))
    try:
        return model.model_validate_json(raw)
    except ValidationError as error:
        raise invalid(error) from None


def _parse_query(request: web.Request, model: type[Model] | None) -> Model:
    assert model is not None
    # aiohttp keeps escaped bytes that are no UTF-8 as if somebody had meant the escapes themselves.
    escaped = request.rel_url.raw_query_string
    pairs = parse_qsl(escaped, keep_blank_values=True, errors="surrogateescape")
    values = dict(reversed(pairs))  # the first of a name counts
    values.pop("ticket", None)
    if any(map(_is_unreadable, values)):
        raise Problem(Code.MALFORMED, N_("The query string cannot be read."))
    unreadable = [name for name, value in values.items() if _is_unreadable(value)]
    if unreadable:
        raise Problem(Code.INVALID, errors=[(name, N_("This is no readable text.")) for name in unreadable])
    try:
        return model.model_validate(values)
    except ValidationError as error:
        raise invalid(error) from None


def _is_unreadable(text: str) -> bool:
    return "\x00" in text or (
        not text.isascii() and any("\ud800" <= character <= "\udfff" for character in text)
    )


def _parse_part(text: str, wanted: type) -> object:
    if _is_unreadable(text):
        raise not_found()
    try:
        return wanted(text)
    except ValueError:
        raise not_found() from None


def invalid(error: ValidationError) -> Problem:
    """All that is wrong with a body at once, never repeating what was sent."""
    found = error.errors(include_input=False, include_url=False, include_context=False)
    return Problem(
        Code.INVALID, errors=[(".".join(map(str, one["loc"])) or "body", one["msg"]) for one in found]
    )


def to_cursor(*position: str | int) -> str:
    """An opaque cursor for a position in a list."""
    return base64.urlsafe_b64encode(orjson.dumps(position)).decode().rstrip("=")


def whole_number(value: object) -> int:
    """A cursor's number, within what the database counts. Raises ValueError."""
    if not isinstance(value, int) or not 0 <= value < 2**63:
        raise ValueError("no place in a list")
    return value


def moment(value: str) -> datetime:
    """A cursor's time, to the microsecond. Raises ValueError."""
    at = datetime.fromisoformat(value)
    if at.tzinfo is None:
        raise ValueError("a time without its zone")
    return at


def from_cursor(cursor: str, *kinds: Callable[[Any], Any]) -> list[Any]:
    """The position a cursor stands for, each part made by its kind; forgeries are Problem(malformed)."""
    try:
        position = orjson.loads(base64.urlsafe_b64decode(cursor + "=" * (-len(cursor) % 4)))
        return [kind(value) for kind, value in zip(kinds, position, strict=True)]
    except (binascii.Error, ValueError, TypeError, AttributeError):
        raise Problem(Code.MALFORMED, N_("The cursor is not one of ours.")) from None
