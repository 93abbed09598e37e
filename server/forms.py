"""A page's form: read it, act, and either move on or show it again with what was wrong."""

from collections.abc import Awaitable, Callable, Mapping
from typing import Any, TypeVar
from uuid import UUID, uuid5

from aiohttp import web
from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from server.errors import Code, Problem
from server.i18n import N_, pick_locale, translate
from server.pages import render

Model = TypeVar("Model", bound=BaseModel)


async def submit(
    request: web.Request,
    model: type[Model],
    act: Callable[[Model], Awaitable[str]],
    template: str,
    context: Mapping[str, object],
) -> web.StreamResponse:
    """Check the posted fields against `model` and go to the address `act` returns (303).

    A field that does not fit, or a Problem that `act` raises, shows `template` again with `errors`
    (field → sentence, "" for the whole form), `values` and the problem's status.
    """
    fields = {name: value for name, value in (await request.post()).items() if isinstance(value, str)}
    fields.pop("csrf_token", None)
    locale = pick_locale(request)
    try:
        if any("\x00" in value for value in fields.values()):
            raise Problem(Code.MALFORMED)
        address = await act(model.model_validate(fields))
    except ValidationError as error:
        errors = sentences(error, locale)
        return _again(request, template, context, errors, fields, Code.INVALID.status)
    except Problem as problem:
        errors = {field: translate(locale, message) for field, message in problem.errors}
        errors = errors or {"": translate(locale, problem.detail, problem.params)}
        return _again(request, template, context, errors, fields, problem.code.status)
    raise web.HTTPSeeOther(address)


def sent_once(caller_id: UUID, request_id: str, *wish: object) -> UUID:
    """The id under which a form makes something: the same however often that form is sent.

    `request_id` is a fresh text that the page put into the form; `wish` is what was filled in, so that a
    form that is gone back to and filled in otherwise asks for something else. Nobody's id is another's.
    """
    return uuid5(caller_id, "\n".join(map(str, (request_id, *wish))))


# pydantic's error types → what a person is told; every other type gets the last.
_SENTENCES = {
    "missing": N_("Please fill this in."),
    "string_too_short": N_("At least {min_length} characters, please."),
    "string_too_long": N_("At most {max_length} characters, please."),
    "greater_than_equal": N_("At least {ge}, please."),
    "less_than_equal": N_("At most {le}, please."),
}
_UNFIT = N_("This does not fit here.")


def sentences(error: ValidationError, locale: str) -> dict[str, str]:
    """What to say beside each field that does not fit; "" is the whole form."""
    found = error.errors(include_input=False, include_url=False)
    return {str(one["loc"][0]) if one["loc"] else "": _sentence(one, locale) for one in found}


def _sentence(one: ErrorDetails, locale: str) -> str:
    context = one.get("ctx", {})
    if one["type"] == "value_error":  # raised by a model of ours, with an N_() message
        return translate(locale, str(context["error"]))
    return translate(locale, _SENTENCES.get(one["type"], _UNFIT), context)


def _again(
    request: web.Request,
    template: str,
    context: Mapping[str, object],
    errors: Mapping[str, str],
    values: Mapping[str, Any],
    status: int,
) -> web.Response:
    kept = {name: value for name, value in values.items() if "password" not in name}
    return render(request, template, {**context, "errors": errors, "values": kept}, status=status)
