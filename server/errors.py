"""Problem: how a broken rule is raised, and what it says to a program (RFC 9457)."""

from collections.abc import Sequence
from enum import StrEnum
from typing import Self

import orjson
from aiohttp import web

from server.db import DatabaseUnavailable
from server.i18n import N_, pick_locale, translate
from server.observe import request_id_of
from server.storage import StorageUnavailable


class Code(StrEnum):
    """Every problem this server answers: its stable code, HTTP status and heading."""

    status: int
    heading: str

    def __new__(cls, code: str, status: int, heading: str) -> Self:
        """Give the code its status and heading."""
        member = str.__new__(cls, code)
        member._value_ = code
        member.status = status
        member.heading = heading
        return member

    MALFORMED = "malformed", 400, N_("The request cannot be read")
    AMBIGUOUS_CREDENTIALS = "ambiguous_credentials", 400, N_("Two different callers in one request")
    NOT_SIGNED_IN = "not_signed_in", 401, N_("Not signed in")
    INVALID_TOKEN = "invalid_token", 401, N_("The token is not valid")
    INVALID_CREDENTIALS = "invalid_credentials", 401, N_("E-mail or password is wrong")
    BAD_SIGNATURE = "bad_signature", 401, N_("The signature is not valid")
    INSUFFICIENT_BALANCE = "insufficient_balance", 402, N_("Not enough balance")
    FORBIDDEN = "forbidden", 403, N_("Not allowed")
    CSRF = "csrf", 403, N_("The form is out of date")
    REGISTRATION_CLOSED = "registration_closed", 403, N_("Registration is closed")
    NOT_FOUND = "not_found", 404, N_("Not found")
    UNKNOWN_ORDER = "unknown_order", 404, N_("Unknown order")
    METHOD_NOT_ALLOWED = "method_not_allowed", 405, N_("Method not allowed")
    EMAIL_TAKEN = "email_taken", 409, N_("This e-mail address has an account")
    QUOTA_EXCEEDED = "quota_exceeded", 409, N_("Limit reached")
    INVALID_STATE = "invalid_state", 409, N_("Not possible in this state")
    DEVICE_NOT_RUNNING = "device_not_running", 409, N_("The phone is not running")
    ORDER_CLOSED = "order_closed", 409, N_("The order is closed")
    COMMAND_ENDED = "command_ended", 409, N_("The command was ended")
    IN_PROGRESS = "in_progress", 409, N_("The same request is under way")
    TOO_LARGE = "too_large", 413, N_("Too large")
    UNSUPPORTED_MEDIA_TYPE = "unsupported_media_type", 415, N_("Unsupported media type")
    RANGE_NOT_SATISFIABLE = "range_not_satisfiable", 416, N_("Range not satisfiable")
    INVALID = "invalid", 422, N_("Some values are not valid")
    INVALID_APK = "invalid_apk", 422, N_("Not an Android app")
    AMOUNT_MISMATCH = "amount_mismatch", 422, N_("The amount does not match the order")
    IDEMPOTENCY_MISMATCH = "idempotency_mismatch", 422, N_("Idempotency key used for another request")
    TOO_MANY_ATTEMPTS = "too_many_attempts", 429, N_("Too many attempts")
    TOO_MANY_REQUESTS = "too_many_requests", 429, N_("Too many requests")
    INTERNAL = "internal", 500, N_("Something went wrong here")
    UNAVAILABLE = "unavailable", 503, N_("Temporarily unavailable")
    PORTS_EXHAUSTED = "ports_exhausted", 503, N_("No free ports")
    RUNTIME_UNAVAILABLE = "runtime_unavailable", 503, N_("The phones' machine does not answer")


class Problem(Exception):
    """A rule was broken; `detail` is an N_() message formatted with `params` in the reader's language.

    `errors` names the fields of a 422, `retry_after_s` goes out as Retry-After.
    """

    def __init__(
        self,
        code: Code,
        detail: str = "",
        *,
        errors: Sequence[tuple[str, str]] = (),
        retry_after_s: int | None = None,
        **params: object,
    ) -> None:
        super().__init__(f"{code.value}: {detail.format_map(params) if params else detail}")
        self.code = code
        self.detail = detail or code.heading
        self.params = params
        self.errors = tuple(errors)
        self.retry_after_s = 5 if retry_after_s is None and code.status == 503 else retry_after_s

    def headers(self) -> dict[str, str]:
        """The headers this problem's answer carries beside its body."""
        headers = {}
        if self.retry_after_s is not None:
            headers["Retry-After"] = str(self.retry_after_s)
        if self.code.status == 401:
            invalid = ' error="invalid_token"' if self.code is Code.INVALID_TOKEN else ""
            headers["WWW-Authenticate"] = f"Bearer{invalid}"
        return headers

    def document(self, locale: str, request_id: str) -> dict[str, object]:
        """The RFC 9457 body, for the API and for frames on a WebSocket."""
        document: dict[str, object] = {
            "type": f"urn:cloudphone:problem:{self.code.value}",
            "title": translate(locale, self.code.heading),
            "status": self.code.status,
            "detail": translate(locale, self.detail, self.params),
            "code": self.code.value,
            "request_id": request_id,
        }
        if self.errors:
            document["errors"] = [
                {"field": field, "message": translate(locale, message)} for field, message in self.errors
            ]
        return document


def not_found() -> Problem:
    """The one answer for what is not there and for what is somebody else's."""
    return Problem(Code.NOT_FOUND)


_HTTP_CODES = {
    400: Code.MALFORMED,
    401: Code.NOT_SIGNED_IN,
    403: Code.FORBIDDEN,
    404: Code.NOT_FOUND,
    405: Code.METHOD_NOT_ALLOWED,
    413: Code.TOO_LARGE,
    415: Code.UNSUPPORTED_MEDIA_TYPE,
    416: Code.RANGE_NOT_SATISFIABLE,
    429: Code.TOO_MANY_REQUESTS,
    503: Code.UNAVAILABLE,
}


def as_problem(error: Exception) -> Problem:
    """The problem an exception stands for; what nobody foresaw is `internal`."""
    match error:
        case Problem():
            return error
        case DatabaseUnavailable():
            return Problem(Code.UNAVAILABLE, N_("The database does not answer; try again shortly."))
        case StorageUnavailable():
            return Problem(Code.UNAVAILABLE, N_("The file storage does not answer; try again shortly."))
        case web.HTTPException():
            return Problem(_HTTP_CODES.get(error.status, Code.MALFORMED))
        case web.RequestPayloadError() | ConnectionError():
            return Problem(Code.MALFORMED, N_("The request ended before its body did."))
        case _:
            return Problem(Code.INTERNAL)


def problem_response(request: web.Request, problem: Problem) -> web.Response:
    """The problem as application/problem+json."""
    document = problem.document(pick_locale(request), request_id_of(request))
    return web.Response(
        body=orjson.dumps(document),
        status=problem.code.status,
        content_type="application/problem+json",
        headers=problem.headers(),
    )
