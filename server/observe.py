"""What operators see: request ids, logs in JSON, metrics, health and readiness."""

import asyncio
import logging
import sys
import warnings
from contextvars import ContextVar
from datetime import UTC, datetime
from functools import cache
from typing import Final

import orjson
from aiohttp import web
from aiohttp.typedefs import Handler, Middleware
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_LATEST

from server.clock import Clock, Randomness
from server.request_keys import REQUEST_ID, UNLOGGED

log: Final = logging.getLogger("cloudphone")

_REQUEST_ID: ContextVar[str] = ContextVar("request_id", default="")
_STANDARD_FIELDS = frozenset(vars(logging.makeLogRecord({}))) | {"message", "asctime", "taskName"}
_FIELD_LIMIT = 1000
SLOW_REQUEST_S = 1.0


class JsonFormatter(logging.Formatter):
    """One JSON object a line; values are escaped and cut, so that a hostile header stays a value."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        line: dict[str, object] = {
            "at": datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage()[:_FIELD_LIMIT],
        }
        if request_id := _REQUEST_ID.get():
            line["request_id"] = request_id
        for name, value in vars(record).items():
            if name not in _STANDARD_FIELDS:
                line[name] = value if isinstance(value, int | float) else str(value)[:_FIELD_LIMIT]
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return orjson.dumps(line).decode()


def configure_logging(level: int = logging.INFO) -> None:
    """Send every log line to standard error as JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonFormatter())
    logging.basicConfig(level=level, handlers=[handler], force=True)
    logging.captureWarnings(True)
    # aiohttp-session keeps its session under a plain string, which is its own affair.
    warnings.filterwarnings("ignore", category=web.NotAppKeyWarning, module="aiohttp_session")
    for chatty in ("botocore", "aiobotocore", "urllib3", "aiohttp.access", "asyncio", "httpx", "PIL"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def request_id_of(request: web.Request) -> str:
    """The id under which this request is logged and answered."""
    request_id: str = request.get(REQUEST_ID, "")
    return request_id


class Metrics:
    """The process's own registry, so that two servers in one test never share a counter."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "cloudphone_requests", "Answered requests.", ["method", "route", "status"], registry=self.registry
        )
        self.answered = cache(self._answered)
        self.latency = Histogram(
            "cloudphone_request_seconds",
            "Time to answer a request.",
            ["route"],
            buckets=(0.001, 0.005, 0.025, 0.1, 0.5, 2.5, 10),
            registry=self.registry,
        )
        self.loop_lag = Gauge(
            "cloudphone_loop_lag_seconds",
            "How late the event loop woke at its last check.",
            registry=self.registry,
        )
        self.jobs = Counter("cloudphone_jobs", "Job runs.", ["job", "outcome"], registry=self.registry)
        self.sockets = Gauge("cloudphone_sockets", "Open WebSockets.", registry=self.registry)

    def _answered(self, method: str, route: str, status: int) -> tuple[Counter, Histogram]:
        """Where such a request is counted; looked up once, for a look takes longer than the counting."""
        return self.requests.labels(method, route, str(status)), self.latency.labels(route)

    def text(self) -> bytes:
        """Everything in Prometheus' text format."""
        return generate_latest(self.registry)


METRICS: Final = web.AppKey("METRICS", Metrics)


async def watch_loop_lag(metrics: Metrics, clock: Clock) -> None:
    """Measure for ever how late the event loop is, twice a second."""
    while True:
        due = clock.monotonic() + 0.5
        await clock.sleep(0.5)
        metrics.loop_lag.set(max(0.0, clock.monotonic() - due))


def observing(metrics: Metrics, clock: Clock, randomness: Randomness) -> Middleware:
    """The outermost middleware: gives each request its id, counts it, and logs what is worth a line."""

    @web.middleware
    async def observe(request: web.Request, handler: Handler) -> web.StreamResponse:
        request_id = request[REQUEST_ID] = randomness.token(12)
        token = _REQUEST_ID.set(request_id)
        started = clock.monotonic()
        status = 500
        try:
            response = await handler(request)
            status = response.status
            return response
        except web.HTTPException as answer:
            status = answer.status
            raise
        except asyncio.CancelledError:
            status = 499
            raise
        finally:
            _count(metrics, request, status, clock.monotonic() - started)
            _REQUEST_ID.reset(token)

    return observe


def _count(metrics: Metrics, request: web.Request, status: int, took_s: float) -> None:
    resource = request.match_info.route.resource
    route = resource.canonical if resource is not None else "unmatched"
    requests, latency = metrics.answered(request.method, route, status)
    requests.inc()
    latency.observe(took_s)
    is_change = request.method not in {"GET", "HEAD"} and not request.get(UNLOGGED)
    if is_change or status >= 400 or took_s > SLOW_REQUEST_S:
        log.info(
            "request",
            extra={
                "method": request.method,
                "path": request.path,
                "status": status,
                "took_ms": round(took_s * 1000, 1),
                "peer": request.remote or "",
            },
        )


async def mark_answer(request: web.Request, response: web.StreamResponse) -> None:
    """Signal handler: every answer, streamed or not, names its request."""
    response.headers["X-Request-ID"] = request_id_of(request)
    response.headers.setdefault("X-Content-Type-Options", "nosniff")


def metrics_response(metrics: Metrics) -> web.Response:
    """The answer of GET /metrics."""
    return web.Response(body=metrics.text(), headers={"Content-Type": CONTENT_TYPE_LATEST})
