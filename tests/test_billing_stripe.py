"""Stripe: what its webhooks may say, and payments all the way through a server and a stand-in for Stripe."""

import asyncio
import json
import re
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import uuid4

import aiohttp
import pytest
import pytest_asyncio
from multidict import CIMultiDict

from plugins.billing.janitor import JANITOR
from plugins.billing.model import OrderState, PaymentEvent, StripeSection
from plugins.billing.orders import ORDERS
from plugins.billing.providers import (
    Payable,
    ProviderUnavailable,
    RefundProgress,
    RefundRefused,
    RefundWish,
)
from plugins.billing.providers import stripe as stripe_room
from plugins.billing.providers.stripe import Stripe, open_stripe
from server.clock import SystemClock
from server.errors import Code, Problem
from server.interfaces import DATABASE
from tests.house import Client, House
from tests.paying import (
    PLUGINS,
    SECRET,
    WELCOME,
    OpenBank,
    administrator,
    assert_sound,
    balance_of,
    booked,
    complaints,
    events_of,
    state_of,
)
from tests.paying import open_bank as open_bank
from tests.servers import Servers
from tests.stripe_standin import SECRET_KEY, WEBHOOK_SECRET, Fault, StripeStandin, digest, signature

pytestmark = pytest.mark.asyncio(loop_scope="module")

CALLBACK = "/api/v1/billing/payments/stripe"
# After docs.stripe.com/api/events/object and /api/checkout/sessions/object, shortened.
DOCUMENTED: dict[str, Any] = {
    "id": "evt_1NG8Du2eZvKYlo2CUI79vXWy",
    "object": "event",
    "api_version": "2019-02-19",
    "created": 1686089970,
    "data": {
        "object": {
            "id": "cs_test_a11YYufWQzNY63zpQ6QSNRQhkUpVph4WRmzW0zWJO2znZKdVujZ0N0S22u",
            "object": "checkout.session",
            "amount_subtotal": 2198,
            "amount_total": 2198,
            "automatic_tax": {"enabled": False, "liability": None, "status": None},
            "client_reference_id": "CP0123456789ABCDEF0123",
            "created": 1679600215,
            "currency": "usd",
            "expires_at": 1679686615,
            "livemode": False,
            "metadata": {"cloudphone_order": "CP0123456789ABCDEF0123"},
            "mode": "payment",
            "payment_intent": "pi_1GszsK2eZvKYlo2CfhZyoZLp",
            "payment_method_types": ["card"],
            "payment_status": "paid",
            "status": "complete",
            "url": None,
        }
    },
    "livemode": False,
    "pending_webhooks": 0,
    "request": {"id": None, "idempotency_key": None},
    "type": "checkout.session.completed",
}


@dataclass
class ShiftedClock(SystemClock):
    """The machine's clock, put forward."""

    by_s: float = 0

    def now(self) -> datetime:
        """Wall time, as it is shifted."""
        return datetime.now(UTC) + timedelta(seconds=self.by_s)


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shared_standin() -> AsyncIterator[StripeStandin]:
    """The stand-in that the tests of this file share."""
    async with StripeStandin.running() as standin:
        yield standin


@pytest.fixture
def standin(shared_standin: StripeStandin) -> Iterator[StripeStandin]:
    """The stand-in, well and without memory of what other tests asked."""
    shared_standin.refund_status, shared_standin.page_most = "succeeded", 100
    shared_standin.asked.clear()
    shared_standin.forms.clear()
    yield shared_standin
    shared_standin.fault = ""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def bank(
    servers: Servers, shared_standin: StripeStandin, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[House]:
    """A server that takes payments at the stand-in; the tests of this file share it."""
    folder = tmp_path_factory.mktemp("bank") / "house"
    house = await House.open(servers, folder, {"billing": section(shared_standin)}, PLUGINS)
    yield house
    await house.close()


@pytest_asyncio.fixture(loop_scope="module")
async def clock() -> ShiftedClock:
    """The clock of the provider under test."""
    return ShiftedClock()


@pytest_asyncio.fixture(loop_scope="module")
async def provider(standin: StripeStandin, clock: ShiftedClock) -> AsyncIterator[Stripe]:
    """The provider alone, at the stand-in."""
    async with aiohttp.ClientSession() as http:
        keys = StripeSection(secret_key=SECRET_KEY, webhook_secret=WEBHOOK_SECRET, api_url=f"{standin.url}/")
        opened = await asyncio.to_thread(open_stripe, keys, "CNY", clock, http)
        assert opened is not None
        yield opened


def section(standin: StripeStandin, **keys: str) -> dict[str, object]:
    """[billing] with Stripe at the stand-in, and the sandbox."""
    stripe = {"secret_key": SECRET_KEY, "webhook_secret": WEBHOOK_SECRET, "api_url": standin.url, **keys}
    return {"providers": {"sandbox": {"secret": SECRET}, "stripe": stripe}}


def new_order(*, lasts_s: float = 900, amount: int = 5000) -> Payable:
    """An order as a provider knows it."""
    now = datetime.now(UTC)
    number = f"CP{uuid4().hex[:20].upper()}"
    return Payable(number, amount, "CNY", now, now + timedelta(seconds=lasts_s), "")


async def begun(provider: Stripe, order: Payable) -> Payable:
    """The order with its checkout's reference, as billing keeps it."""
    checkout = await provider.checkout(order, back_url="https://shop.example/back", callback_url="")
    return replace(order, reference=checkout.reference)


async def paid(provider: Stripe, standin: StripeStandin, *, amount: int = 5000) -> RefundWish:
    """A refund of all that was paid for a new order."""
    order = await begun(provider, new_order(amount=amount))
    standin.pay(order.reference)
    payment_id = standin.sessions[order.reference]["payment_intent"]
    return RefundWish(uuid4(), order, payment_id, order.amount, order.amount, "asked for")


def read(provider: Stripe, body: bytes, header: str | None = None) -> PaymentEvent:
    """What the provider reads in a webhook, signed unless another header is given."""
    headers = CIMultiDict({"stripe-signature": signature(body) if header is None else header})
    return provider.read_callback(headers, body)


def documented(kind: str = "checkout.session.completed", **session: object) -> bytes:
    """The documented event with another type, and other values in its session."""
    changed = {**DOCUMENTED["data"]["object"], **session}
    return json.dumps({**DOCUMENTED, "type": kind, "data": {"object": changed}}).encode()


# What a webhook says


async def test_a_documented_event_is_read(provider: Stripe) -> None:
    assert read(provider, json.dumps(DOCUMENTED).encode()) == PaymentEvent(
        event_id="evt_1NG8Du2eZvKYlo2CUI79vXWy",
        order_number="CP0123456789ABCDEF0123",
        amount=2198,
        currency="USD",
        status="succeeded",
        payment_id="pi_1GszsK2eZvKYlo2CfhZyoZLp",
    )


@pytest.mark.parametrize(
    ("kind", "payment_status", "status"),
    [
        ("checkout.session.completed", "paid", "succeeded"),
        ("checkout.session.completed", "unpaid", "other"),
        ("checkout.session.completed", "no_payment_required", "other"),
        ("checkout.session.async_payment_succeeded", "paid", "succeeded"),
        ("checkout.session.async_payment_failed", "unpaid", "failed"),
        ("checkout.session.expired", "unpaid", "other"),
        ("checkout.session.of_the_future", "paid", "other"),
    ],
)
async def test_only_an_event_that_says_so_is_a_payment(
    provider: Stripe, kind: str, payment_status: str, status: str
) -> None:
    event = read(provider, documented(kind, payment_status=payment_status))
    assert (event.status, event.order_number) == (status, "CP0123456789ABCDEF0123")


async def test_what_concerns_no_order_of_ours_is_no_orders_affair(provider: Stripe) -> None:
    others = [
        documented(metadata={}),
        documented(metadata=None),
        documented(metadata={"order_number": "CP0123456789ABCDEF0123"}, client_reference_id="user 42"),
        json.dumps({**DOCUMENTED, "type": "charge.refunded", "data": {"object": {"id": "ch_1"}}}).encode(),
        json.dumps({"id": "evt_1", "object": "v2.core.event", "type": "v1.billing.meter.no"}).encode(),
    ]
    for body in others:
        event = read(provider, body)
        assert (event.status, event.order_number) == ("other", "-"), body


async def test_an_expanded_payment_intent_names_the_payment_too(provider: Stripe) -> None:
    intent = {"id": "pi_9", "object": "payment_intent", "status": "succeeded"}
    assert read(provider, documented(payment_intent=intent)).payment_id == "pi_9"


async def test_a_webhook_without_a_genuine_signature_is_refused(provider: Stripe) -> None:
    body = documented()
    now = str(int(time.time()))
    genuine = f"t={now},v1={digest(body, now)}"
    forged = [
        "",
        "nonsense",
        f"t={now}",
        f"v1={digest(body, now)}",
        f"t={now},v1=",
        f"t={now},v1={'0' * 64}",
        f"t={now},v1={'é' * 64}",
        f"t={now},v1=\udcff",
        f"t={now},v0={digest(body, now)}",
        f"t=,v1={digest(body, '')}",
        f"t=t,v1={digest(body, 't')}",
        f"t={'9' * 5000},v1={digest(body, '9' * 5000)}",
        f"t={'9' * 400},v1={digest(body, '9' * 400)}",
        f"t={int(now) + 1},v1={digest(body, now)}",
        f"t={now},v1={digest(body, now, 'whsec_another')}",
        f"t={now},v1={digest(body + b' ', now)}",
        f"t={now},v1={digest(json.dumps(json.loads(body), indent=1).encode(), now)}",
    ]
    for header in forged:
        with pytest.raises(Problem) as refusal:
            read(provider, body, header)
        assert refusal.value.code is Code.BAD_SIGNATURE, header
    with pytest.raises(Problem) as refusal:
        provider.read_callback(CIMultiDict(), body)
    assert refusal.value.code is Code.BAD_SIGNATURE
    with pytest.raises(Problem) as refusal:
        read(provider, b"\xff\xfe")
    assert refusal.value.code is Code.BAD_SIGNATURE
    altered = body.replace(b"2198", b"2199")
    with pytest.raises(Problem) as refusal:
        read(provider, altered, genuine)
    assert refusal.value.code is Code.BAD_SIGNATURE
    assert read(provider, body, genuine).status == "succeeded"


async def test_a_signature_holds_for_300_seconds_before_and_after(
    provider: Stripe, clock: ShiftedClock
) -> None:
    body = documented()
    header = signature(body)
    for by_s in (-290, 0, 290):
        clock.by_s = by_s
        assert read(provider, body, header).status == "succeeded"
    for by_s in (-310, 310, 86400):
        clock.by_s = by_s
        with pytest.raises(Problem) as refusal:
            read(provider, body, header)
        assert refusal.value.code is Code.BAD_SIGNATURE, by_s


async def test_while_a_secret_is_replaced_one_of_two_signatures_is_enough(provider: Stripe) -> None:
    body, now = documented(), str(int(time.time()))
    header = f"t={now},v1={digest(body, now, 'whsec_the_new_one')},v1={digest(body, now)}"
    assert read(provider, body, header).status == "succeeded"


@pytest.mark.parametrize(
    ("body", "code"),
    [
        (b"", Code.MALFORMED),
        (b"{", Code.MALFORMED),
        (b"[" * 100_000, Code.MALFORMED),
        (b"[]", Code.INVALID),
        (b"null", Code.INVALID),
        (b"{}", Code.INVALID),
        (b'{"id": 1, "type": "charge.refunded"}', Code.INVALID),
        (b'{"id": "evt_1", "type": "checkout.session.completed"}', Code.INVALID),
        (documented(amount_total="2198"), Code.INVALID),
        (documented(amount_total=21.98), Code.INVALID),
        (documented(amount_total=10**30), Code.INVALID),
        (documented(metadata={"cloudphone_order": "two words"}), Code.INVALID),
        (documented(metadata=["cloudphone_order"]), Code.INVALID),
        (documented(currency="\u0000"), Code.INVALID),
        (documented().replace(b"evt_1NG8Du2eZvKYlo2CUI79vXWy", b""), Code.INVALID),
    ],
)
async def test_a_genuine_webhook_that_cannot_be_understood_says_so(
    provider: Stripe, body: bytes, code: Code
) -> None:
    with pytest.raises(Problem) as refusal:
        read(provider, body)
    assert refusal.value.code is code


async def test_stripe_need_repeat_nothing_but_what_names_an_unknown_order(provider: Stripe) -> None:
    kept = [*OrderState, Code.ORDER_CLOSED, Code.AMOUNT_MISMATCH, None]
    answers = [provider.answer(outcome) for outcome in kept]
    assert [answer.status for answer in answers if answer] == [200] * len(kept)
    assert provider.answer(Code.UNKNOWN_ORDER) is None


# What is asked of Stripe


async def test_a_session_is_made_of_its_order(provider: Stripe, standin: StripeStandin) -> None:
    order = new_order(amount=12345)
    checkout = await provider.checkout(order, back_url="https://shop.example/o/1?a=b&c", callback_url="")
    (form,) = standin.forms
    assert form["mode"] == "payment"
    assert form["client_reference_id"] == order.number
    assert form["metadata"] == form["payment_intent_data"]["metadata"] == {"cloudphone_order": order.number}
    assert list(form["line_items"]) == ["0"]
    item = form["line_items"]["0"]
    assert (item["quantity"], item["price_data"]["unit_amount"], item["price_data"]["currency"]) == (
        "1", "12345", "cny",
    )  # fmt: skip
    assert order.number in item["price_data"]["product_data"]["name"]
    assert form["success_url"] == form["cancel_url"] == "https://shop.example/o/1?a=b&c"
    assert form["adaptive_pricing"] == {"enabled": "false"}
    assert checkout.url == standin.sessions[checkout.reference]["url"]
    assert checkout.qr_text == ""


@pytest.mark.parametrize("lasts_s", [1, 900, 3600, 86400, 30 * 86400])
async def test_a_session_outlives_its_order_where_stripe_lets_it(
    provider: Stripe, standin: StripeStandin, lasts_s: int
) -> None:
    order = await begun(provider, new_order(lasts_s=lasts_s))
    session_lasts_s = standin.sessions[order.reference]["expires_at"] - time.time()
    assert max(1800, min(lasts_s, 22 * 3600)) <= session_lasts_s <= 86400


@pytest.mark.parametrize("lasts_s", [900, 30 * 86400])
async def test_an_order_asked_about_twice_has_one_session(
    provider: Stripe, standin: StripeStandin, clock: ShiftedClock, lasts_s: int
) -> None:
    order = new_order(lasts_s=lasts_s)
    clock.by_s = 600 - time.time() % 3600  # so that no hour ends on the way
    asked = [begun(provider, order) for _ in range(3)]
    first = await asyncio.gather(*asked)
    clock.by_s += 60
    again = [await begun(provider, order), await begun(provider, first[0])]
    assert {one.reference for one in (*first, *again)} == {first[0].reference}
    assert len(standin.forms) == 1


async def test_a_session_that_is_spent_is_replaced_once(provider: Stripe, standin: StripeStandin) -> None:
    expired = await begun(provider, new_order())
    await provider.close(expired)
    failed = await begun(provider, new_order())
    standin.pay(failed.reference, is_pending=True)
    standin.settle(failed.reference, is_paid=False)
    for order in (expired, failed):
        renewed = [await begun(provider, order) for _ in range(2)]
        assert renewed[0].reference == renewed[1].reference != order.reference
        assert standin.sessions[renewed[0].reference]["status"] == "open"


@pytest.mark.parametrize("is_pending", [True, False])
async def test_a_session_whose_payment_was_made_is_not_paid_again(
    provider: Stripe, standin: StripeStandin, is_pending: bool
) -> None:
    order = await begun(provider, new_order())
    standin.pay(order.reference, is_pending=is_pending)
    checkout = await provider.checkout(order, back_url="https://shop.example/back", callback_url="")
    assert (checkout.url, checkout.reference) == ("https://shop.example/back", order.reference)


async def test_an_amount_that_stripe_does_not_take_is_no_failure_of_stripe(provider: Stripe) -> None:
    with pytest.raises(Problem) as refusal:
        await begun(provider, new_order(amount=1))
    assert refusal.value.code is Code.INVALID


async def test_a_payment_is_found_where_there_is_one(provider: Stripe, standin: StripeStandin) -> None:
    assert await provider.query(new_order()) is None
    order = await begun(provider, new_order())
    assert await provider.query(order) is None
    standin.pay(order.reference, is_pending=True)
    assert await provider.query(order) is None
    standin.settle(order.reference, is_paid=True)
    found, again = await provider.query(order), await provider.query(order)
    assert found == again and found is not None
    assert found.event == PaymentEvent(
        event_id=f"query_{order.reference}",
        order_number=order.number,
        amount=5000,
        currency="CNY",
        status="succeeded",
        payment_id=standin.sessions[order.reference]["payment_intent"],
    )
    assert json.loads(found.body) == standin.sessions[order.reference]
    assert read(provider, standin.event(order.reference)).payment_id == found.event.payment_id


async def test_a_closed_order_cannot_be_paid(provider: Stripe, standin: StripeStandin) -> None:
    await provider.close(new_order())
    order = await begun(provider, new_order())
    for _ in range(2):
        await provider.close(order)
        assert standin.sessions[order.reference]["status"] == "expired"
    pending = await begun(provider, new_order())
    standin.pay(pending.reference, is_pending=True)
    await provider.close(pending)


async def test_an_order_paid_before_it_could_be_closed_is_asked_about_again(
    provider: Stripe, standin: StripeStandin
) -> None:
    order = await begun(provider, new_order())
    standin.pay(order.reference)
    with pytest.raises(ProviderUnavailable):
        await provider.close(order)


async def test_an_order_that_could_not_be_closed_is_not_taken_for_closed(
    provider: Stripe, standin: StripeStandin
) -> None:
    order = await begun(provider, new_order())
    standin.sessions[order.reference]["is_busy"] = True
    with pytest.raises(ProviderUnavailable):
        await provider.close(order)


async def test_no_request_tells_what_system_this_is(provider: Stripe, standin: StripeStandin) -> None:
    for _ in range(2):
        await begun(provider, new_order())
    for request in standin.asked:
        assert "X-Stripe-Client-Telemetry" not in request.headers
        told = json.loads(request.headers["X-Stripe-Client-User-Agent"])
        assert not {"platform", "uname", "telemetry_id"} & set(told)


# Refunds


async def test_a_refund_is_made_once(provider: Stripe, standin: StripeStandin) -> None:
    wish = await paid(provider, standin)
    for forgets in (False, True, False):
        if forgets:
            standin.forget_keys()
        assert await provider.refund(wish) is RefundProgress.DONE
    (refund,) = [one for one in standin.refunds if one["payment_intent"] == wish.payment_id]
    assert (refund["amount"], refund["metadata"]["cloudphone_refund"]) == (5000, str(wish.id))


async def test_parts_of_a_payment_are_given_back_one_by_one(provider: Stripe, standin: StripeStandin) -> None:
    wish = await paid(provider, standin)
    standin.page_most = 1
    parts = [replace(wish, id=uuid4(), amount=1000) for _ in range(4)]
    for part in (*parts, *parts):
        standin.forget_keys()
        assert await provider.refund(part) is RefundProgress.DONE
    made = [one["amount"] for one in standin.refunds if one["payment_intent"] == wish.payment_id]
    assert made == [1000] * 4


async def test_a_refund_whose_answer_was_lost_is_made_once(provider: Stripe, standin: StripeStandin) -> None:
    wish = await paid(provider, standin)
    standin.fault = "cut"
    with pytest.raises(ProviderUnavailable):
        await provider.refund(wish)
    standin.fault = ""
    await asyncio.gather(*(provider.refund(wish) for _ in range(3)))
    assert len([one for one in standin.refunds if one["payment_intent"] == wish.payment_id]) == 1


async def test_a_refund_under_way_is_asked_about_until_it_is_done(
    provider: Stripe, standin: StripeStandin
) -> None:
    wish = await paid(provider, standin)
    for status in ("pending", "requires_action"):
        standin.refund_status = status
        assert await provider.refund(wish) is RefundProgress.UNDER_WAY
        standin.refunds[-1]["status"] = status
        assert await provider.refund(wish) is RefundProgress.UNDER_WAY
    standin.refunds[-1]["status"] = "succeeded"
    assert await provider.refund(wish) is RefundProgress.DONE


@pytest.mark.parametrize("status", ["failed", "canceled"])
async def test_a_refund_that_fails_is_refused(provider: Stripe, standin: StripeStandin, status: str) -> None:
    wish = await paid(provider, standin)
    standin.refund_status = "pending"
    assert await provider.refund(wish) is RefundProgress.UNDER_WAY
    standin.refunds[-1] |= {"status": status, "failure_reason": "lost_or_stolen_card"}
    with pytest.raises(RefundRefused, match="lost_or_stolen_card"):
        await provider.refund(wish)


async def test_a_refund_that_stripe_refuses_says_why(provider: Stripe, standin: StripeStandin) -> None:
    wish = await paid(provider, standin)
    with pytest.raises(RefundRefused, match="greater than unrefunded"):
        await provider.refund(replace(wish, id=uuid4(), amount=5001))
    await provider.refund(wish)
    with pytest.raises(RefundRefused, match="already been refunded"):
        await provider.refund(replace(wish, id=uuid4()))
    with pytest.raises(RefundRefused, match="No such payment_intent"):
        await provider.refund(replace(wish, id=uuid4(), payment_id="pi_0"))
    asked = len(standin.asked)
    with pytest.raises(RefundRefused):
        await provider.refund(replace(wish, payment_id=""))
    assert len(standin.asked) == asked


# Where Stripe does not answer

Ask = Callable[[Stripe, RefundWish], Coroutine[Any, Any, object]]
CALLS: dict[str, Ask] = {
    "checkout": lambda provider, wish: begun(provider, new_order()),
    "checkout again": lambda provider, wish: begun(provider, wish.order),
    "query": lambda provider, wish: provider.query(wish.order),
    "close": lambda provider, wish: provider.close(wish.order),
    "refund": lambda provider, wish: provider.refund(wish),
}


@pytest.mark.parametrize("call", CALLS)
@pytest.mark.parametrize("fault", ["down", "cut", "slow", "500", "429", "nonsense"])
async def test_without_an_answer_nothing_is_known(
    provider: Stripe, standin: StripeStandin, monkeypatch: pytest.MonkeyPatch, call: str, fault: Fault
) -> None:
    wish = await paid(provider, standin)
    standin.fault = fault
    monkeypatch.setattr(stripe_room, "PROVIDER_TIMEOUT_S", 0.3 if fault == "slow" else 5)
    async with asyncio.timeout(4):
        with pytest.raises(ProviderUnavailable) as unknown:
            await CALLS[call](provider, wish)
    assert SECRET_KEY not in repr(unknown.value)


async def test_a_wrong_key_is_no_refusal_of_a_refund(standin: StripeStandin) -> None:
    async with aiohttp.ClientSession() as http:
        keys = StripeSection(secret_key="sk_wrong", webhook_secret="whsec_1", api_url=standin.url)
        provider = await asyncio.to_thread(open_stripe, keys, "CNY", SystemClock(), http)
        assert provider is not None
        wish = RefundWish(uuid4(), new_order(), "pi_1", 5000, 5000, "")
        with pytest.raises(ProviderUnavailable, match=r"^Stripe: AuthenticationError 401 None req_1$"):
            await provider.refund(wish)


@pytest.mark.parametrize("currency", ["CNY", "USD", "EUR", "JPY", "KRW", "XOF", "HUF", "TWD"])
async def test_stripe_opens_for_a_currency_it_counts_as_we_do(currency: str) -> None:
    async with aiohttp.ClientSession() as http:
        assert await asyncio.to_thread(
            open_stripe, StripeSection(secret_key="k"), currency, SystemClock(), http
        )


@pytest.mark.parametrize("currency", ["ISK", "UGX", "MGA", "KWD", "TND", "LYD", "ALL", "CLF"])
async def test_stripe_stays_closed_for_a_currency_it_counts_otherwise(
    currency: str, caplog: pytest.LogCaptureFixture
) -> None:
    async with aiohttp.ClientSession() as http:
        keys = StripeSection(secret_key="k")
        assert await asyncio.to_thread(open_stripe, keys, currency, SystemClock(), http) is None
    assert currency in vars(caplog.records[-1])["missing"]


# The whole way


async def order_at_stripe(client: Client, amount: int = 5000) -> dict[str, Any]:
    """A new order that is to be paid at Stripe."""
    reply = await client.post("/billing/orders", {"amount": amount, "provider": "stripe"})
    assert reply.status == 201, reply.body
    return dict(reply.json)


async def go_to_pay(house: House, standin: StripeStandin, order: dict[str, Any]) -> str:
    """Go on to the order's session, as its payer does; the session's id."""
    reply = await house.anyone.post(f"//checkout/stripe/{order['number']}")
    assert reply.status == 200, reply.body
    session = standin.session_of(order["number"])
    assert session["url"] in reply.body.decode()
    return str(session["id"])


async def make_due(house: House, order: dict[str, Any], *, is_over: bool = False) -> None:
    """Let the time come to ask Stripe about an order, or the end of the order's own."""
    await house.app[DATABASE].execute(
        "UPDATE orders SET next_ask_at = now(), expires_at = CASE WHEN $2 THEN now() ELSE expires_at END"
        " WHERE number = $1",
        order["number"],
        is_over,
    )


async def test_a_payment_at_stripe_is_credited_once(bank: House, standin: StripeStandin) -> None:
    client = await bank.sign_up()
    order = await order_at_stripe(client)
    assert order["checkout_url"] == f"{bank.url}/checkout/stripe/{order['number']}"
    session_id = await go_to_pay(bank, standin, order)
    assert await go_to_pay(bank, standin, order) == session_id
    back_url = f"{bank.url}/billing/orders/{order['id']}"
    assert standin.forms[-1]["success_url"] == standin.forms[-1]["cancel_url"] == back_url
    standin.pay(session_id)
    webhook = standin.event(session_id)
    another = standin.event(session_id, "checkout.session.async_payment_succeeded")
    storm = [webhook] * 10 + [another] * 10
    statuses = await asyncio.gather(*(standin.send(body, bank.url + CALLBACK) for body in storm))
    await make_due(bank, order)
    await bank.app[JANITOR].ask()
    assert [await standin.send(webhook, bank.url + CALLBACK), *statuses] == [200] * 21
    assert await state_of(client, order) == "paid"
    assert await balance_of(client) == WELCOME + 5000
    kept = await bank.app[DATABASE].fetch(
        "SELECT body FROM payment_events WHERE order_number = $1", order["number"]
    )
    assert {bytes(row["body"]) for row in kept} == {webhook, another}
    await assert_sound(bank)


async def test_money_that_is_under_way_is_credited_when_it_comes(bank: House, standin: StripeStandin) -> None:
    client = await bank.sign_up()
    order = await order_at_stripe(client)
    session_id = await go_to_pay(bank, standin, order)
    standin.pay(session_id, is_pending=True)
    assert await standin.send(standin.event(session_id), bank.url + CALLBACK) == 200
    assert await state_of(client, order) == "pending"
    assert await balance_of(client) == WELCOME
    standin.settle(session_id, is_paid=True)
    webhook = standin.event(session_id, "checkout.session.async_payment_succeeded")
    assert await standin.send(webhook, bank.url + CALLBACK) == 200
    assert await balance_of(client) == WELCOME + 5000


async def test_after_a_payment_that_failed_another_can_be_made(bank: House, standin: StripeStandin) -> None:
    client = await bank.sign_up()
    order = await order_at_stripe(client)
    first = await go_to_pay(bank, standin, order)
    standin.pay(first, is_pending=True)
    standin.settle(first, is_paid=False)
    failure = standin.event(first, "checkout.session.async_payment_failed")
    assert await standin.send(failure, bank.url + CALLBACK) == 200
    assert await events_of(bank, order) == ["failed"]
    second = await go_to_pay(bank, standin, order)
    assert second != first
    standin.pay(second)
    await standin.send(standin.event(second), bank.url + CALLBACK)
    assert await balance_of(client) == WELCOME + 5000


async def test_a_payment_whose_webhook_was_lost_is_found(bank: House, standin: StripeStandin) -> None:
    client = await bank.sign_up()
    order = await order_at_stripe(client)
    session_id = await go_to_pay(bank, standin, order)
    await make_due(bank, order)
    await bank.app[JANITOR].ask()
    assert await state_of(client, order) == "pending"
    standin.pay(session_id)
    standin.fault = "down"
    await make_due(bank, order)
    await bank.app[JANITOR].ask()
    assert await state_of(client, order) == "pending"
    standin.fault = ""
    await make_due(bank, order)
    await bank.app[JANITOR].ask()
    assert await state_of(client, order) == "paid"
    assert await standin.send(standin.event(session_id), bank.url + CALLBACK) == 200
    assert await balance_of(client) == WELCOME + 5000
    await assert_sound(bank)


async def test_an_order_that_is_over_cannot_be_paid_at_stripe(bank: House, standin: StripeStandin) -> None:
    client = await bank.sign_up()
    cancelled, expired = await order_at_stripe(client), await order_at_stripe(client)
    sessions = [await go_to_pay(bank, standin, order) for order in (cancelled, expired)]
    assert (await client.post(f"/billing/orders/{cancelled['id']}/cancel")).status == 200
    await make_due(bank, expired, is_over=True)
    await bank.app[JANITOR].ask()
    await bank.app[ORDERS].expire()
    assert [standin.sessions[session_id]["status"] for session_id in sessions] == ["expired"] * 2
    assert [await state_of(client, order) for order in (cancelled, expired)] == ["cancelled", "expired"]
    for session_id in sessions:
        body = standin.event(session_id, "checkout.session.expired")
        assert await standin.send(body, bank.url + CALLBACK) == 200
    for order in (cancelled, expired):
        reply = await bank.anyone.post(f"//checkout/stripe/{order['number']}")
        assert reply.status == 409


async def test_a_payment_for_a_closed_order_is_set_aside(bank: House, standin: StripeStandin) -> None:
    admin, client = await administrator(bank), await bank.sign_up()
    order = await order_at_stripe(client)
    session_id = await go_to_pay(bank, standin, order)
    standin.pay(session_id)
    assert (await client.post(f"/billing/orders/{order['id']}/cancel")).status == 200
    webhook = standin.event(session_id)
    assert [await standin.send(webhook, bank.url + CALLBACK) for _ in range(2)] == [200, 200]
    await bank.app[JANITOR].ask()
    assert await state_of(client, order) == "cancelled"
    assert await balance_of(client) == WELCOME
    payments = await bank.app[DATABASE].fetch(
        "SELECT p.payment_id, p.amount, p.state, p.reason FROM payments p JOIN orders o ON o.id = p.order_id"
        " WHERE o.number = $1",
        order["number"],
    )
    intent = standin.sessions[session_id]["payment_intent"]
    assert [tuple(row) for row in payments] == [(intent, 5000, "unapplied", "order_closed")]
    assert await booked(bank, "unapplied_payment", order) == {"unapplied": 5000, "clearing": -5000}
    assert [one["order_number"] for one in await complaints(admin)] == [order["number"]]
    await assert_sound(bank)


async def test_stripe_hears_what_to_repeat(bank: House, standin: StripeStandin) -> None:
    client = await bank.sign_up()
    order = await order_at_stripe(client)
    session_id = await go_to_pay(bank, standin, order)
    standin.pay(session_id)
    session = standin.sessions[session_id]
    body = standin.event(session_id)
    send = standin.send
    assert await send(body.replace(order["number"].encode(), b"CP00"), bank.url + CALLBACK) == 404
    session["amount_total"] = 4999
    assert await send(standin.event(session_id), bank.url + CALLBACK) == 200
    session |= {"amount_total": 5000, "currency": "usd"}
    assert await send(standin.event(session_id), bank.url + CALLBACK) == 200
    session |= {"currency": "cny", "metadata": {}}
    assert await send(standin.event(session_id), bank.url + CALLBACK) == 200
    assert await send(b'{"id": "evt_of_something", "type": "balance.available"}', bank.url + CALLBACK) == 200
    assert await send(b"{}", bank.url + CALLBACK) == 422
    assert await balance_of(client) == WELCOME
    assert await state_of(client, order) == "pending"


async def test_a_forged_webhook_changes_nothing(bank: House, standin: StripeStandin) -> None:
    client = await bank.sign_up()
    order = await order_at_stripe(client)
    session_id = await go_to_pay(bank, standin, order)
    standin.pay(session_id)
    body = standin.event(session_id)
    headers = ["", signature(body, secret="whsec_guessed"), signature(body, at=time.time() - 310),
               signature(body, at=time.time() + 310), signature(body + b"\n")]  # fmt: skip
    for header in headers:
        reply = await bank.anyone.post(
            "/billing/payments/stripe", data=body, headers={"Stripe-Signature": header}
        )
        assert (reply.status, reply.code) == (401, "bad_signature")
    assert await events_of(bank, order) == []
    assert await balance_of(client) == WELCOME


async def test_while_stripe_is_away_orders_can_be_made_and_paid_later(
    bank: House, standin: StripeStandin
) -> None:
    client = await bank.sign_up()
    order = await order_at_stripe(client)
    standin.fault = "down"
    assert (await bank.anyone.post(f"//checkout/stripe/{order['number']}")).status == 503
    standin.fault = ""
    standin.pay(await go_to_pay(bank, standin, order))


async def test_an_order_too_small_for_stripe_says_so(bank: House) -> None:
    order = await order_at_stripe(await bank.sign_up(), amount=1)
    assert (await bank.anyone.post(f"//checkout/stripe/{order['number']}")).status == 422


async def test_the_sandbox_comes_last(bank: House) -> None:
    client = await bank.sign_up()
    offered = (await client.get("/billing/providers")).json["items"]
    assert [one["name"] for one in offered] == ["stripe", "sandbox"]
    assert (
        "/checkout/stripe/" in (await client.post("/billing/orders", {"amount": 5000})).json["checkout_url"]
    )


@pytest.mark.parametrize(
    ("changes", "missing"),
    [
        ({"stripe": {"webhook_secret": ""}}, "billing.providers.stripe.webhook_secret"),
        ({"stripe": {"secret_key": ""}}, "billing.providers.stripe.secret_key"),
        ({"billing": {"currency": "ISK"}}, "billing.currency"),
        ({"server": {"host": "0.0.0.0"}}, "server.public_url"),
    ],
)
async def test_stripe_stays_closed_until_all_is_configured(
    open_bank: OpenBank,
    standin: StripeStandin,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, dict[str, str]],
    missing: str,
) -> None:
    billing = {**section(standin, **changes.get("stripe", {})), **changes.get("billing", {})}
    server = {"port": 0, "shutdown_grace_s": 2, **changes.get("server", {})}
    bank = await open_bank(billing=billing, server=server)
    (line,) = [one for one in caplog.records if one.getMessage() == "a payment provider stays closed"]
    assert re.search(rf"\b{re.escape(missing)}\b", vars(line)["missing"])
    assert SECRET_KEY not in repr(vars(line)) and WEBHOOK_SECRET not in repr(vars(line))
    client = await bank.sign_up()
    assert [one["name"] for one in (await client.get("/billing/providers")).json["items"]] == ["sandbox"]
    refused = await client.post("/billing/orders", {"amount": 5000, "provider": "stripe"})
    assert (refused.status, refused.code) == (422, "invalid")
    assert await standin.send(documented(), bank.url + CALLBACK) == 404
