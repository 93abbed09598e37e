"""The one middleware that turns what handlers raise into answers: problem documents, or pages.

An answer that has begun cannot become another one: its connection is cut, so that its reader knows.
"""

from http import HTTPStatus

from aiohttp import web
from aiohttp.typedefs import Handler
from yarl import URL

from server.auth import recognise
from server.errors import Code, Problem, as_problem, problem_response
from server.i18n import pick_locale, translate
from server.observe import log, request_id_of
from server.pages import render
from server.request_keys import BEGUN


@web.middleware
async def answer_problems(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Turn every exception of a handler into an answer, and log what nobody foresaw once."""
    try:
        return await handler(request)
    except web.HTTPException as answer:
        if answer.status < HTTPStatus.BAD_REQUEST:
            raise
        problem = as_problem(answer)
        headers = {"Allow": answer.headers["Allow"]} if "Allow" in answer.headers else {}
    except Exception as error:
        problem, headers = as_problem(error), {}
        if problem.code is Code.INTERNAL:
            log.exception("unforeseen error", extra={"route": request.path})
    if (begun := request.get(BEGUN)) is not None:
        return _cut_off(request, begun, problem)
    answered = await _page(request, problem) if _wants_page(request) else problem_response(request, problem)
    answered.headers.update(headers)
    return answered


async def note_begun(request: web.Request, response: web.StreamResponse) -> None:
    """Signal handler: remember which answer is on its way."""
    request[BEGUN] = response


def _cut_off(request: web.Request, begun: web.StreamResponse, problem: Problem) -> web.StreamResponse:
    log.info("answer broke off", extra={"route": request.path, "problem": problem.code.value})
    if request.transport is not None:
        request.transport.abort()
    return begun


def _wants_page(request: web.Request) -> bool:
    return not request.path.startswith("/api/") and "text/html" in request.headers.get("Accept", "")


async def _page(request: web.Request, problem: Problem) -> web.Response:
    if problem.code is Code.NOT_SIGNED_IN and request.method == "GET":
        raise web.HTTPSeeOther(URL("/login").with_query(next=request.path_qs))
    await recognise(request)
    locale = pick_locale(request)
    context = {
        "status": problem.code.status,
        "title": translate(locale, problem.code.heading),
        "detail": translate(locale, problem.detail, problem.params),
        "request_id": request_id_of(request),
    }
    response = render(request, "error.html", context, status=problem.code.status)
    response.headers.update(problem.headers())
    return response
