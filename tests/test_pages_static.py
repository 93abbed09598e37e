"""Pages: every template in every language, the headers, the static files, and rules for our markup."""

import re
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, date, datetime
from html.parser import HTMLParser
from itertools import product
from pathlib import Path
from uuid import uuid4

import pytest
from aiohttp import web
from aiohttp.test_utils import TestClient

from plugins.billing.charts import revenue_chart, usage_chart
from plugins.billing.checks import FINDINGS, IN_MONEY
from plugins.billing.overview import DayOfRevenue
from plugins.billing.usage import DayOfUse, UsageReport
from server.auth import Caller
from server.i18n import LOCALES
from server.pages import PAGE_CONTEXT, is_local, render, set_language, setup_pages
from server.request_keys import CALLER, PAGE_CSRF

ROOT = Path(__file__).resolve().parent.parent
NOW = datetime(2026, 3, 1, 9, 30, tzinfo=UTC)
NASTY = """<script>alert(1)</script>"'&{{ 7*7 }}%s"""

PLAN = {
    "name": "basic",
    "cpus": 2.0,
    "memory_mb": 3072,
    "width": 720,
    "height": 1280,
    "dpi": 320,
    "price_per_hour": 20,
}
DEVICE = {
    "id": "6f1c", "name": NASTY, "state": "failed", "state_detail": NASTY, "image": "android-12",
    "plan": "basic", "runtime": "simulated", "simulated": True, "ports": None, "created_at": NOW,
}  # fmt: skip
RUNNING = DEVICE | {
    "state": "running",
    "state_detail": "",
    "ports": {"adb": 20001, "webrtc": 22001, "scrcpy": 24001},
}
APP = {
    "id": "a1", "package": "org.x", "label": NASTY, "version_name": NASTY, "version_code": 7, "min_sdk": 21,
    "target_sdk": None, "permissions": ["android.permission.CAMERA", NASTY], "size_bytes": 12_345_678,
    "sha256": "e3b0", "created_at": NOW,
}  # fmt: skip
ORDER = {
    "id": "o1", "number": "N1", "amount": 5000, "currency": "CNY", "state": "pending",
    "checkout_url": "/checkout", "created_at": NOW, "expires_at": NOW, "paid_at": None,
}  # fmt: skip
ENTRY = {
    "id": 1, "amount": -1, "balance_after": 999, "kind": NASTY, "reference": "", "label": NASTY,
    "created_at": NOW,
}  # fmt: skip
DAY = date(2026, 3, 1)
REPORT = UsageReport(
    first_day=DAY,
    last_day=DAY,
    currency="CNY",
    total=12,
    items=[DayOfUse(device_id=str(n), name=NASTY, day=DAY, amount=n + 1) for n in range(8)],
)
NO_USE = UsageReport(first_day=DAY, last_day=DAY, currency="CNY", total=0, items=[])
SPENDING = {"balance": 1000, "currency": "CNY", "spending_per_hour": 20, "lasts_s": 90_000}
IDLE = SPENDING | {"spending_per_hour": 0, "lasts_s": None}
PERIOD: dict[str, object] = {"months": [(DAY, DAY)], "errors": {}, "values": {}}
WRONG_PERIOD: dict[str, object] = {
    "months": [(DAY, DAY)],
    "errors": {"": NASTY, "from": NASTY, "to": NASTY},
    "values": {"from": NASTY, "to": NASTY},
}
STATEMENT = {
    "first_day": DAY, "last_day": DAY, "currency": "CNY", "opening": 0, "closing": -1,
    "lines": [{"at": NOW, "kind": "device_time", "label": NASTY, "reference": "", "amount": -1}],
}  # fmt: skip
PAYMENT_ID, USER_ID = uuid4(), uuid4()
PAYMENT = {
    "id": PAYMENT_ID, "order_number": NASTY, "user_id": USER_ID, "email": NASTY, "provider": "sandbox",
    "amount": 5000, "refunded": 0, "currency": "CNY", "state": "unapplied", "reason": "paid_twice",
    "received_at": NOW,
}  # fmt: skip
PAYMENTS = [PAYMENT, PAYMENT | {"id": uuid4(), "state": "credited", "refunded": 1}]
REFUND = {
    "id": uuid4(), "order_number": NASTY, "user_id": USER_ID, "email": NASTY, "amount": 5000,
    "currency": "CNY", "reason": NASTY, "state": "refused", "detail": NASTY, "requested_at": NOW,
}  # fmt: skip
MISFIT = {
    "id": uuid4(), "provider": NASTY, "order_number": NASTY, "amount": 1, "currency": NASTY,
    "misfit": "unknown_order", "deliveries": 2, "body": NASTY, "received_at": NOW,
}  # fmt: skip
REVENUE = [DayOfRevenue(day=DAY, amount=7), DayOfRevenue(day=date(2026, 3, 2), amount=-3)]
CHECK = {"at": NOW, "sound": False, "findings": {"ledger_sum": 5, "wrong_balances": 1, NASTY: 1}}
SOUND = CHECK | {"sound": True, "findings": {}}
MONEY = {
    "currency": "CNY", "balances": 1, "revenue": 1, "clearing": 1, "promotions": 1, "unapplied": 1,
    "unapplied_payments": 9, "misfit_callbacks": 9, "refunded": 1, "refunds_open": 1,
    "providers": [{"provider": NASTY, "payments": 1, "received": 1, "refunded": 1}],
    "revenue_by_day": REVENUE, "last_check": CHECK,
}  # fmt: skip
NO_MONEY = MONEY | {"unapplied_payments": 0, "misfit_callbacks": 0, "providers": [], "last_check": None}
FORMS: dict[str, object] = {
    "titles": {}, "request_id": NASTY, "failed": str(PAYMENT_ID), "done": "", "errors": {}, "values": {},
}  # fmt: skip
ADMIN_OVERVIEW = FORMS | {
    "overview": MONEY, "chart": revenue_chart(REVENUE), "finding_names": FINDINGS,
    "findings_in_money": IN_MONEY, "unapplied": PAYMENTS[:1], "misfits": [MISFIT], "open_refunds": [REFUND],
    "refused_refunds": [REFUND], "found": [(USER_ID, NASTY)], "wanted": NASTY,
}  # fmt: skip
ADMIN_USER = FORMS | {
    "user_id": USER_ID, "email": NASTY, "now": SPENDING, "payments": PAYMENTS, "more_payments": "more",
    "orders": [ORDER | {"provider": NASTY}], "refunds": [REFUND], "ledger": [ENTRY], "next_cursor": "more",
    "is_first": False,
}  # fmt: skip
NOTE = {
    "id": 3,
    "topic": "system",
    "title": NASTY,
    "body": NASTY,
    "data": {},
    "created_at": NOW,
    "read_at": None,
}
SESSION = {
    "id": "s", "created_at": NOW, "last_used_at": None, "user_agent": NASTY, "address": "::1",
    "current": True,
}  # fmt: skip
USER = {"email": "a@example.org", "display_name": NASTY, "role": "admin", "created_at": NOW}
BALANCE: dict[str, object] = {
    "now": SPENDING, "chart": usage_chart(REPORT), "orders": [ORDER], "ledger": [ENTRY], "request_id": "r",
    "providers": [{"name": NASTY, "title": NASTY}, {"name": "two", "title": NASTY}],
}  # fmt: skip
WRONG = {
    "": NASTY,
    "provider": NASTY,
    "email": NASTY,
    "name": NASTY,
    "image": NASTY,
    "plan": NASTY,
    "amount": NASTY,
}

PAGES: list[tuple[str, bool, Mapping[str, object]]] = [
    ("users/home.html", False, {}),
    ("users/home.html", True, {}),
    ("users/signup.html", False, {"errors": WRONG, "values": {"email": NASTY}, "registration_open": True}),
    ("users/signup.html", False, {"errors": {}, "values": {}, "registration_open": False}),
    ("users/login.html", False, {"errors": WRONG, "values": {"email": NASTY}, "next": NASTY}),
    ("users/account.html", True, {"user": USER, "sessions": [SESSION]}),
    ("devices/list.html", True, {"devices": [RUNNING, DEVICE], "plans": {"basic": PLAN}, "currency": "CNY"}),
    ("devices/list.html", True, {"devices": [DEVICE], "plans": {}, "currency": "CNY"}),
    ("devices/list.html", True, {"devices": [], "plans": {}, "currency": "CNY"}),
    (
        "devices/new.html",
        True,
        {
            "images": [{"name": "android-12", "kind": "simulated"}],
            "plans": [PLAN, PLAN | {"name": "free", "price_per_hour": 0}],
            "currency": "CNY",
            "errors": WRONG,
            "values": {"name": NASTY, "plan": "free"},
        },
    ),
    ("devices/new.html", True, {"images": [], "plans": [], "currency": "CNY", "errors": {}, "values": {}}),
    (
        "devices/show.html",
        True,
        {"device": RUNNING, "plan": PLAN, "currency": "CNY", "adb_host": "127.0.0.1"},
    ),
    ("devices/show.html", True, {"device": DEVICE, "plan": PLAN, "currency": "CNY", "adb_host": "127.0.0.1"}),
    ("apps/list.html", True, {"apps": [APP], "max_upload_mb": 4096}),
    ("apps/list.html", True, {"apps": [], "max_upload_mb": 4096}),
    ("apps/show.html", True, {"app": APP}),
    ("billing/index.html", True, BALANCE | {"errors": WRONG, "values": {"amount": NASTY, "provider": "two"}}),
    (
        "billing/index.html",
        True,
        BALANCE
        | {"now": IDLE, "chart": usage_chart(NO_USE), "orders": [], "ledger": [], "providers": []}
        | {"errors": {}, "values": {}},
    ),
    ("billing/orders.html", True, {"orders": [ORDER], "next_cursor": NASTY, "is_first": True}),
    ("billing/orders.html", True, {"orders": [], "next_cursor": None, "is_first": False}),
    (
        "billing/movements.html",
        True,
        {"ledger": [ENTRY], "currency": "CNY", "next_cursor": NASTY, "is_first": False},
    ),
    (
        "billing/movements.html",
        True,
        {"ledger": [], "currency": "CNY", "next_cursor": None, "is_first": True},
    ),
    ("billing/usage.html", True, {"report": REPORT, "chart": usage_chart(REPORT)} | PERIOD),
    ("billing/usage.html", True, {"report": NO_USE, "chart": usage_chart(NO_USE)} | WRONG_PERIOD),
    ("billing/statement.html", True, {"statement": STATEMENT, "email": NASTY} | PERIOD),
    ("billing/statement.html", True, {"statement": STATEMENT | {"lines": []}, "email": NASTY} | WRONG_PERIOD),
    ("billing/order.html", True, {"order": ORDER, "errors": WRONG}),
    ("billing/order.html", True, {"order": ORDER | {"state": "paid", "paid_at": NOW}, "errors": {}}),
    ("billing/checkout.html", False, {"order": ORDER, "provider": NASTY, "next_page": "/checkout"}),
    (
        "billing/checkout.html",
        True,
        {"order": ORDER | {"state": "paid"}, "provider": NASTY, "next_page": "/billing/orders/o1"},
    ),
    (
        "billing/checkout_open.html",
        False,
        {"order": ORDER, "provider": NASTY, "url": NASTY, "qr_code": "", "checkout": "/", "next_page": "/"},
    ),
    (
        "billing/checkout_open.html",
        False,
        {"order": ORDER, "provider": NASTY, "url": "", "qr_code": NASTY, "checkout": "/", "next_page": "/"},
    ),
    ("billing/checkout_sandbox.html", True, {"order": ORDER, "next_page": "/checkout", "errors": WRONG}),
    (
        "billing/checkout_sandbox.html",
        True,
        {"order": ORDER | {"state": "expired"}, "next_page": "/billing/orders/o1", "errors": {}},
    ),
    ("billing/admin_overview.html", True, ADMIN_OVERVIEW | {"errors": WRONG, "values": {"reason": NASTY}}),
    (
        "billing/admin_overview.html",
        True,
        ADMIN_OVERVIEW
        | {"overview": NO_MONEY, "unapplied": [], "misfits": [], "open_refunds": [], "refused_refunds": []}
        | {"found": [], "errors": WRONG},
    ),
    (
        "billing/admin_overview.html",
        True,
        ADMIN_OVERVIEW | {"failed": "", "done": "checked", "overview": MONEY | {"last_check": SOUND}},
    ),
    ("billing/admin_user.html", True, ADMIN_USER | {"errors": WRONG, "values": {"amount": NASTY}}),
    (
        "billing/admin_user.html",
        True,
        ADMIN_USER | {"failed": "correction", "errors": WRONG, "values": {"direction": "take"}},
    ),
    (
        "billing/admin_user.html",
        True,
        ADMIN_USER
        | {"failed": "", "done": "refunded", "now": IDLE, "payments": [], "orders": [], "refunds": []}
        | {"ledger": [], "next_cursor": None, "is_first": True},
    ),
    ("notifications/index.html", True, {"notifications": [NOTE, NOTE | {"id": 2, "read_at": NOW}]}),
    ("notifications/index.html", True, {"notifications": []}),
    ("error.html", False, {"status": 404, "title": NASTY, "detail": NASTY, "request_id": "r1"}),
    ("error.html", True, {"status": 500, "title": "x", "detail": "", "request_id": ""}),
]
FACTS = {
    "unread": 2, "last_notification_id": 3, "balance": 1000, "currency": "CNY", "runtime": "simulated",
    "runtime_away": True, "warnings": [NASTY],
    "runtime_reason": NASTY, "phones": {"total": 0, "running": 0}, "recent_notifications": [NOTE],
}  # fmt: skip

DRAWN = set(re.findall(r'<symbol id="([\w-]+)"', (ROOT / "static/icons.svg").read_text()))

Client = TestClient[web.Request, web.Application]
MakeClient = Callable[[web.Application], Awaitable[Client]]


class Markup(HTMLParser):
    """What the rules below want to know of a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, {name: value or "" for name, value in attrs}))

    def all(self, *names: str) -> list[dict[str, str]]:
        return [attributes for tag, attributes in self.tags if tag in names]


def page_of(template: str, signed_in: bool, context: Mapping[str, object]) -> web.Application:
    async def show(request: web.Request) -> web.Response:
        request[PAGE_CSRF] = "the-token"
        if signed_in:
            request[CALLER] = Caller(uuid4(), "a@example.org", NASTY, "admin", uuid4())
        flashes = [{"kind": "error", "message": NASTY}] if signed_in else []
        return render(request, template, {"flashes": flashes, **context})

    app = web.Application()
    setup_pages(app)
    app.router.add_get("/", show)
    app.router.add_post("/language", set_language)
    return app


@pytest.mark.parametrize(("template", "signed_in", "context"), PAGES)
async def test_every_page_renders_safely_in_every_language(
    aiohttp_client: MakeClient, template: str, signed_in: bool, context: Mapping[str, object]
) -> None:
    app = page_of(template, signed_in, context)
    app[PAGE_CONTEXT].append(lambda request: FACTS if "facts" in request.query else {})
    client = await aiohttp_client(app)
    for locale, path in product(LOCALES, ("/", "/?facts")):
        answer = await client.get(path, headers={"Cookie": f"locale={locale}"})
        page = await answer.text()
        assert answer.status == 200, page
        assert f'lang="{locale.replace("_", "-")}"' in page
        assert "<script>alert" not in page
        check_markup(Markup(page))


def check_markup(markup: Markup) -> None:
    """What the content security policy, forgery protection and screen readers ask of every page."""
    assert not markup.all("style")
    assert all(script["src"].startswith("/static/") for script in markup.all("script"))
    for _, attributes in markup.tags:
        assert not [name for name in attributes if name == "style" or name.startswith("on")]

    posting = [form for form in markup.all("form") if form.get("method") == "post"]
    tokens = [field["value"] for field in markup.all("input") if field.get("name") == "csrf_token"]
    assert tokens == ["the-token"] * len(posting)

    ids = [attributes["id"] for _, attributes in markup.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert len(markup.all("h1")) == 1
    labelled = {label.get("for") for label in markup.all("label")}
    for field in markup.all("input", "select", "textarea"):
        if field.get("type") not in ("hidden", "radio") and field.get("aria-hidden") != "true":
            assert field["id"] in labelled
    for _, attributes in markup.tags:
        for name in ("aria-labelledby", "aria-describedby"):
            assert set(attributes.get(name, "").split()) <= set(ids)
    assert {use["href"].partition("#")[2] for use in markup.all("use")} <= DRAWN


async def test_a_page_carries_the_security_headers(aiohttp_client: MakeClient) -> None:
    answer = await (await aiohttp_client(page_of("users/home.html", False, {}))).get("/")
    policy = answer.headers["Content-Security-Policy"]
    assert "default-src 'self'" in policy
    assert "frame-ancestors 'none'" in policy
    assert "unsafe" not in policy
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Referrer-Policy"] == "same-origin"
    assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
    assert answer.headers["Cache-Control"] == "no-store"


async def test_a_name_the_page_did_not_get_is_an_error(aiohttp_client: MakeClient) -> None:
    client = await aiohttp_client(page_of("apps/list.html", True, {"apps": []}))
    assert (await client.get("/")).status == 500


async def test_the_language_switch_remembers_the_choice_and_goes_back(aiohttp_client: MakeClient) -> None:
    client = await aiohttp_client(page_of("users/home.html", False, {}))
    form = {"locale": "zh_CN", "next": "/?a=1"}
    answer = await client.post("/language", data=form, allow_redirects=False)
    assert answer.status == 303
    assert answer.headers["Location"] == "/?a=1"
    assert "浏览器" in await (await client.get("/")).text()


@pytest.mark.parametrize(
    "form", [{}, {"locale": "xx", "next": "//evil.example"}, {"locale": "en\r\nX: 1", "next": "x"}]
)
async def test_a_language_form_cannot_lead_elsewhere(
    aiohttp_client: MakeClient, form: dict[str, str]
) -> None:
    client = await aiohttp_client(page_of("users/home.html", False, {}))
    answer = await client.post("/language", data=form, allow_redirects=False)
    assert (answer.status, answer.headers["Location"]) == (303, "/")
    assert "Set-Cookie" not in answer.headers


@pytest.mark.parametrize(
    "address",
    [
        "",
        "x",
        "//evil.example",
        "/\\evil.example",
        "https://evil.example",
        "/\t/evil.example",
        "/\n",
        "javascript:1",
    ],
)
def test_an_address_of_another_site_is_not_local(address: str) -> None:
    assert not is_local(address)


def test_a_path_of_this_site_is_local() -> None:
    assert is_local("/devices/1?tab=a%20b#x")


async def test_a_static_file_is_kept_under_its_versioned_address_only(aiohttp_client: MakeClient) -> None:
    client = await aiohttp_client(page_of("users/home.html", False, {}))
    page = await (await client.get("/")).text()
    address = re.findall(r"/static/\w{12}/js/main\.js", page)[0]
    lasting = await client.get(address)
    assert lasting.headers["Cache-Control"] == "public, max-age=31536000, immutable"
    assert lasting.headers["Content-Type"] == "text/javascript; charset=utf-8"
    assert await lasting.read() == (ROOT / "static/js/main.js").read_bytes()
    plain = await client.get("/static/js/main.js")
    assert plain.headers["Cache-Control"] == "no-cache"
    again = await client.get("/static/js/main.js", headers={"If-None-Match": plain.headers["ETag"]})
    assert again.status == 304


@pytest.mark.parametrize(
    "path",
    [
        "/static/",
        "/static/x",
        "/static/../server/pages.py",
        "/static/%2e%2e/server/pages.py",
        "/static//etc/passwd",
    ],
)
async def test_no_path_leads_out_of_the_static_folder(aiohttp_client: MakeClient, path: str) -> None:
    client = await aiohttp_client(page_of("users/home.html", False, {}))
    assert (await client.get(path)).status == 404


def test_every_module_imports_only_what_exists() -> None:
    for module in (ROOT / "static/js").glob("*.js"):
        for name, source in re.findall(r'import \{([^}]*)\} from "([^"]+)"', module.read_text()):
            exported = re.findall(
                r"export (?:async )?(?:function|const|class) (\w+)", (module.parent / source).read_text()
            )
            for wanted in filter(None, (part.strip() for part in name.split(","))):
                assert wanted in exported, f"{module.name} imports {wanted} from {source}"


def test_every_word_a_module_asks_for_is_in_a_template() -> None:
    templates = "".join(path.read_text() for path in (ROOT / "templates").rglob("*.html"))
    for module in (ROOT / "static/js").glob("*.js"):
        for path in re.findall(r'\btext\("([\w.]+)"', module.read_text()):
            for key in path.split("."):
                assert f'"{key}":' in templates or f'"{key}" :' in templates, f"{module.name}: {path}"


def test_nothing_is_loaded_from_another_host() -> None:
    for folder in ("templates", "static"):
        for path in (ROOT / folder).rglob("*.*"):
            found = re.findall(r"""(?:https?:)?//[a-z0-9-]+\.[a-z]{2,}[^\s"']*""", path.read_text())
            assert [one for one in found if "www.w3.org/2000/svg" not in one] == [], path


def _luminance(colour: str) -> float:
    channels = [int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5)]
    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((_luminance(one), _luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_every_pair_of_colours_can_be_read(scheme: str) -> None:
    """WCAG 2.2 AA: 4.5 for text (1.4.3), 3 for the edges of controls (1.4.11)."""
    light, _, dark = (ROOT / "static/css/tokens.css").read_text().partition("@media")
    colours = dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", light))
    if scheme == "dark":
        colours |= dict(re.findall(r"--([\w-]+): (#[0-9a-f]{6})", dark))
    pairs = [
        (ink, ground)
        for ink in ("ink", "ink-soft", "accent", "bad")
        for ground in ("paper", "surface", "sunken")
    ]
    pairs += [(name, f"{name}-wash") for name in ("good", "warn", "bad", "busy", "idle")]
    pairs += [("ink", f"{name}-wash") for name in ("good", "warn", "bad", "busy", "accent")]
    pairs += [("on-accent", "accent"), ("on-accent", "accent-strong"), ("accent-strong", "accent-wash")]
    pairs += [("surface", "bad"), ("good", "surface"), ("ink-soft", "accent-wash")]
    for one, other in pairs:
        assert contrast(colours[one], colours[other]) >= 4.5, f"{one} on {other}"
    for ground in ("surface", "paper"):
        assert contrast(colours["edge"], colours[ground]) >= 3, ground
