"""Alipay: what its notifications may do, and what is asked of its gateway."""

import asyncio
import base64
import html
import logging
import re
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit
from uuid import uuid4

import aiohttp
import pytest
import pytest_asyncio
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)

from plugins.billing.janitor import JANITOR
from plugins.billing.model import AlipaySection, OrderState
from plugins.billing.orders import ORDERS
from plugins.billing.providers import (
    PROVIDERS,
    Payable,
    ProviderUnavailable,
    RefundProgress,
    RefundRefused,
    RefundWish,
)
from plugins.billing.providers import alipay as module
from plugins.billing.providers.alipay import Alipay, open_alipay
from server.clock import SystemClock
from server.errors import Code, Problem
from server.interfaces import DATABASE
from tests.alipay_standin import APP_ID, Fault, Gateway, Trade, notification, sign, signed_form
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

pytestmark = pytest.mark.asyncio(loop_scope="module")

NOW = datetime(2030, 1, 1, tzinfo=UTC)


@cache
def key(_name: str) -> rsa.RSAPrivateKey:
    """A key of this process, the same for the same name."""
    return rsa.generate_private_key(65537, 2048)


def private_text(
    form: PrivateFormat = PrivateFormat.PKCS8, *, is_pem: bool = False, of: str = "application"
) -> str:
    """A private key as config.toml has it."""
    encoding = Encoding.PEM if is_pem else Encoding.DER
    return as_text(key(of).private_bytes(encoding, form, NoEncryption()), is_pem=is_pem)


def public_text(
    form: PublicFormat = PublicFormat.SubjectPublicKeyInfo, *, is_pem: bool = False, of: str = "alipay"
) -> str:
    """A public key as config.toml has it."""
    encoding = Encoding.PEM if is_pem else Encoding.DER
    return as_text(key(of).public_key().public_bytes(encoding, form), is_pem=is_pem)


def as_text(encoded: bytes, *, is_pem: bool) -> str:
    """PEM as it is; base64 on one line of what is not."""
    return encoded.decode() if is_pem else base64.b64encode(encoded).decode()


def settings(gateway_url: str = "http://127.0.0.1:9/gateway.do", **changes: str) -> dict[str, str]:
    """[billing.providers.alipay], complete."""
    return {
        "app_id": APP_ID,
        "private_key": private_text(),
        "alipay_public_key": public_text(),
        "gateway_url": gateway_url,
    } | changes


class StillClock(SystemClock):
    """It is NOW."""

    def now(self) -> datetime:
        """NOW."""
        return NOW


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def http() -> AsyncIterator[aiohttp.ClientSession]:
    """What the provider under test asks with."""
    async with aiohttp.ClientSession() as session:
        yield session


@pytest_asyncio.fixture(loop_scope="module")
async def gateway() -> AsyncIterator[Gateway]:
    """Alipay, for one test."""
    async with Gateway.started(key("alipay"), key("application").public_key()) as started:
        yield started


async def provider(http: aiohttp.ClientSession, gateway: Gateway | None = None, **changes: str) -> Alipay:
    """The provider alone, at NOW."""
    section = AlipaySection(**settings(gateway.url if gateway else "http://127.0.0.1:9/", **changes))
    opened = await asyncio.to_thread(open_alipay, section, StillClock(), http)
    assert opened is not None
    return opened


def payable(number: str = "CP1", amount: int = 8888, expires_at: datetime | None = None) -> Payable:
    """An order without a server."""
    return Payable(number, amount, "CNY", NOW, expires_at or NOW + timedelta(minutes=15), "")


async def opened_trade(
    alipay: Alipay, gateway: Gateway, http: aiohttp.ClientSession, order: Payable
) -> Trade:
    """The order's trade, once somebody looked at Alipay's page."""
    callback_url = "http://127.0.0.1:9/nobody"
    checkout = await alipay.checkout(order, back_url="https://example.com/back", callback_url=callback_url)
    async with http.get(checkout.url) as page:
        assert page.status == 200, await page.text()
        assert "the page where it is paid" in await page.text()
    return gateway.trades[order.number]


async def paid_trade(alipay: Alipay, gateway: Gateway, http: aiohttp.ClientSession, order: Payable) -> Trade:
    """The order's trade, paid."""
    trade = await opened_trade(alipay, gateway, http, order)
    trade.status = "TRADE_SUCCESS"
    return trade


def wish(trade: Trade, amount: int, *, paid: int = 8888) -> RefundWish:
    """A refund nobody asked for yet."""
    return RefundWish(uuid4(), payable(trade.number, paid), trade.trade_no, paid, amount, "two by mistake")


def told(**changes: str) -> dict[str, str]:
    """A notification of a payment of 88.88 for order CP1."""
    trade = Trade("CP1", "2030010122001400000000000001", "88.88", "", "", "TRADE_SUCCESS")
    return notification(trade) | changes


def read(alipay: Alipay, body: bytes) -> Any:
    """The event of a notification, or the code of its refusal."""
    try:
        return alipay.read_callback({}, body)
    except Problem as problem:
        return problem.code


# What a notification says


async def test_a_notification_of_a_payment_is_read(http: aiohttp.ClientSession) -> None:
    event = read(await provider(http), signed_form(told(), key("alipay")))
    assert event.model_dump() == {
        "event_id": told()["notify_id"],
        "order_number": "CP1",
        "amount": 8888,
        "currency": "CNY",
        "status": "succeeded",
        "payment_id": "2030010122001400000000000001",
    }


async def test_a_notification_that_is_a_day_old_is_no_forgery(http: aiohttp.ClientSession) -> None:
    old = told(notify_time="2029-12-30 23:00:00")
    assert read(await provider(http), signed_form(old, key("alipay"))).status == "succeeded"


async def test_a_notification_that_alipay_did_not_sign_for_us_is_refused(http: aiohttp.ClientSession) -> None:
    alipay, own = await provider(http), key("alipay")
    genuine = signed_form(told(), own)
    unsigned = {name: value for name, value in told().items() if name != "charset"}
    forged = {
        "empty": b"",
        "nonsense": b"nonsense",
        "no signature": urlencode(told()).encode(),
        "no kind of signature": urlencode({**told(), "sign": sign("", own)}).encode(),
        "no base64": urlencode({**told(), "sign": "a", "sign_type": "RSA2"}).encode(),
        "not ASCII": urlencode({**told(), "sign": "é", "sign_type": "RSA2"}).encode(),
        "another's key": signed_form(told(), key("stranger")),
        "our own key": signed_form(told(), key("application")),
        "another sum": genuine.replace(b"total_amount=88.88", b"total_amount=99.99"),
        "another order": genuine.replace(b"out_trade_no=CP1", b"out_trade_no=CP2"),
        "something more": genuine + b"&passback_params=x",
        "something less": genuine.replace(b"&version=1.0", b""),
        "a name twice": genuine + b"&out_trade_no=CP1",
        "another application": signed_form(told(app_id="2099"), own),
        "SHA-1": signed_form(told(), own, sign_type="RSA"),
        "another charset": signed_form(told(charset="gbk"), own),
        "no charset": signed_form(unsigned, own),
        "no UTF-8": genuine + b"&body=%ff",
        "JSON": b'{"trade_status": "TRADE_SUCCESS"}',
    }
    assert {what: read(alipay, body) for what, body in forged.items()} == dict.fromkeys(
        forged, Code.BAD_SIGNATURE
    )
    assert read(alipay, genuine).order_number == "CP1"


async def test_sums_are_read_to_the_fen_or_not_at_all(http: aiohttp.ClientSession) -> None:
    alipay = await provider(http)
    good = {"88.88": 8888, "0.01": 1, "20": 2000, "1.5": 150, "0.29": 29, "100000000.00": 10_000_000_000}
    for yuan, fen in good.items():
        assert read(alipay, signed_form(told(total_amount=yuan), key("alipay"))).amount == fen
    for yuan in ("88.888", "1e2", "-1", "+1", " 1", "１２", "NaN", "", "1.", ".5", "1,000.00", "9" * 400):
        assert read(alipay, signed_form(told(total_amount=yuan), key("alipay"))) is Code.INVALID, yuan


async def test_fen_become_yuan_and_fen_again() -> None:
    for fen in (1, 9, 10, 99, 100, 101, 8888, 1029, 10**12 - 1, 10**12):
        assert module._fen(module._yuan(fen)) == fen
    assert [module._yuan(fen) for fen in (1, 10, 100, 8888, 123456)] == [
        "0.01", "0.10", "1.00", "88.88", "1234.56",
    ]  # fmt: skip


async def test_a_genuine_notification_without_what_matters_is_kept_apart(http: aiohttp.ClientSession) -> None:
    for name in ("notify_id", "out_trade_no", "trade_no", "total_amount", "trade_status"):
        facts = {one: value for one, value in told().items() if one != name}
        assert read(await provider(http), signed_form(facts, key("alipay"))) is Code.INVALID, name


async def test_only_a_payment_counts_as_one_and_only_an_unpaid_trade_as_failed(
    http: aiohttp.ClientSession,
) -> None:
    alipay = await provider(http)
    refund = {"gmt_refund": "2030-01-02 10:00:00.123", "refund_fee": "88.88"}
    unpaid = {name: value for name, value in told().items() if name not in {"gmt_payment", "refund_fee"}}
    cases = [
        (told(), "succeeded"),
        (told(trade_status="TRADE_FINISHED"), "succeeded"),
        (told(refund_fee="0.00"), "succeeded"),
        (unpaid, "succeeded"),
        (unpaid | {"trade_status": "TRADE_CLOSED"}, "failed"),
        (told(trade_status="TRADE_CLOSED"), "other"),
        (told(trade_status="WAIT_BUYER_PAY"), "other"),
        (told(trade_status="TRADE_PENDING"), "other"),
        (told(**refund | {"refund_fee": "10.00"}), "other"),
        (told(refund_fee="10.00"), "other"),
        (told(gmt_refund="2030-01-02 10:00:00.123"), "other"),
        (told(trade_status="TRADE_FINISHED", **refund), "other"),
        (told(trade_status="TRADE_CLOSED", **refund), "other"),
        (unpaid | {"trade_status": "TRADE_CLOSED", **refund}, "other"),
    ]
    for facts, status in cases:
        assert read(alipay, signed_form(facts, key("alipay"))).status == status, facts


async def test_only_a_payment_without_its_order_is_asked_to_be_repeated(http: aiohttp.ClientSession) -> None:
    alipay = await provider(http)
    kept = [*OrderState, Code.ORDER_CLOSED, Code.AMOUNT_MISMATCH, None]
    for outcome in kept:
        answer = alipay.answer(outcome)
        assert (answer.status, answer.text) == (200, "success"), outcome
    repeated = alipay.answer(Code.UNKNOWN_ORDER)
    assert (repeated.status, repeated.text) == (404, "failure")


# What the gateway is asked


async def test_the_page_is_asked_for_the_orders_sum_until_the_order_ends(
    http: aiohttp.ClientSession, gateway: Gateway
) -> None:
    order = payable(amount=29, expires_at=datetime(2030, 1, 1, 16, 30, 5, tzinfo=UTC))
    checkout = await (await provider(http, gateway)).checkout(
        order, back_url="https://example.com/back", callback_url="https://example.com/told"
    )
    asked = {name: value for name, (value,) in parse_qs(urlsplit(checkout.url).query).items()}
    assert checkout.url.startswith(gateway.url + "?")
    assert (checkout.qr_text, checkout.reference) == ("", "")
    assert (asked["method"], asked["timestamp"]) == ("alipay.trade.page.pay", "2030-01-01 08:00:00")
    assert asked["return_url"] == "https://example.com/back"
    trade = await opened_trade(await provider(http, gateway), gateway, http, order)
    assert (trade.number, trade.total, trade.time_expire) == ("CP1", "0.29", "2030-01-02 00:30:05")
    far = await opened_trade(
        await provider(http, gateway), gateway, http, payable("CP2", expires_at=NOW + timedelta(days=30))
    )
    assert far.time_expire == "2030-01-15 08:00:00"


async def test_a_question_is_answered_by_payments_alone(
    http: aiohttp.ClientSession, gateway: Gateway
) -> None:
    alipay, order = await provider(http, gateway), payable()
    assert await alipay.query(order) is None
    trade = await opened_trade(alipay, gateway, http, order)
    assert await alipay.query(order) is None
    for status in ("TRADE_SUCCESS", "TRADE_FINISHED"):
        trade.status = status
        found = await alipay.query(order)
        assert found is not None
        assert found.event.model_dump() == {
            "event_id": f"query_{trade.trade_no}",
            "order_number": "CP1",
            "amount": 8888,
            "currency": "CNY",
            "status": "succeeded",
            "payment_id": trade.trade_no,
        }
        assert b'"alipay_trade_query_response"' in found.body
    trade.status = "TRADE_CLOSED"
    assert await alipay.query(order) is None


async def test_a_trade_is_closed_and_that_it_is_not_there_or_closed_is_no_error(
    http: aiohttp.ClientSession, gateway: Gateway
) -> None:
    alipay, order = await provider(http, gateway), payable()
    await alipay.close(order)
    trade = await opened_trade(alipay, gateway, http, order)
    for _ in range(2):
        await alipay.close(order)
        assert trade.status == "TRADE_CLOSED"
    trade.status = "TRADE_SUCCESS"
    with pytest.raises(ProviderUnavailable, match="paid"):
        await alipay.close(order)


async def test_a_close_of_which_nothing_is_known_is_no_close(
    http: aiohttp.ClientSession, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    alipay, order = await provider(http, gateway), payable()
    await opened_trade(alipay, gateway, http, order)
    do = gateway._do

    def stumble(method: str, content: dict[str, str]) -> dict[str, str]:
        refusal = {"code": "40004", "sub_code": "ACQ.SYSTEM_ERROR"}
        return refusal if method == "alipay.trade.close" else do(method, content)

    monkeypatch.setattr(gateway, "_do", stumble)
    with pytest.raises(ProviderUnavailable, match=r"ACQ\.SYSTEM_ERROR"):
        await alipay.close(order)


async def test_a_refund_is_made_once_however_often_it_is_asked_for(
    http: aiohttp.ClientSession, gateway: Gateway
) -> None:
    alipay = await provider(http, gateway)
    trade = await paid_trade(alipay, gateway, http, payable())
    part, rest = wish(trade, 3000), wish(trade, 5888)
    for one in (part, part, rest, rest, part):
        assert await alipay.refund(one) is RefundProgress.DONE
    assert {name: str(yuan) for name, yuan in trade.refunds.items()} == {
        str(part.id): "30.00",
        str(rest.id): "58.88",
    }
    assert trade.status == "TRADE_CLOSED"


async def test_a_refund_whose_answer_was_lost_is_found_when_it_is_asked_for_again(
    http: aiohttp.ClientSession, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    alipay = await provider(http, gateway)
    trade = await paid_trade(alipay, gateway, http, payable())
    whole = wish(trade, 8888)
    gateway.fault = Fault.CUT
    with pytest.raises(ProviderUnavailable):
        await alipay.refund(whole)
    gateway.fault = None
    assert str(trade.refunded) == "88.88"
    assert await alipay.refund(whole) is RefundProgress.DONE
    # Even where the gateway refuses the repetition, because the trade is over.
    refuse_refunds(gateway, monkeypatch, "ACQ.TRADE_HAS_CLOSE")
    assert await alipay.refund(whole) is RefundProgress.DONE
    assert str(trade.refunded) == "88.88"


async def test_a_refund_that_is_taken_and_not_made_is_under_way(
    http: aiohttp.ClientSession, gateway: Gateway
) -> None:
    alipay = await provider(http, gateway)
    trade = await paid_trade(alipay, gateway, http, payable())
    whole = wish(trade, 8888)
    gateway.refunds_wait = True
    assert await alipay.refund(whole) is RefundProgress.UNDER_WAY
    gateway.refunds_wait = False
    assert await alipay.refund(whole) is RefundProgress.DONE


async def test_a_refund_alipay_does_not_make_is_refused_with_its_reason(
    http: aiohttp.ClientSession, gateway: Gateway
) -> None:
    alipay = await provider(http, gateway)
    trade = await paid_trade(alipay, gateway, http, payable())
    with pytest.raises(RefundRefused, match=r"业务处理失败 \(ACQ\.REASON_TRADE_REFUND_FEE_ERR\)"):
        await alipay.refund(wish(trade, 8889))
    nowhere = Trade("CP9", "2030010122001400000000000009", "88.88", "", "")
    with pytest.raises(RefundRefused, match=r"ACQ\.TRADE_NOT_EXIST"):
        await alipay.refund(wish(nowhere, 1))
    assert trade.refunds == {}


async def test_a_refusal_that_may_be_none_is_asked_again(
    http: aiohttp.ClientSession, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    alipay = await provider(http, gateway)
    trade = await paid_trade(alipay, gateway, http, payable())
    for code in ("ACQ.SYSTEM_ERROR", "AQC.SYSTEM_ERROR", "isp.unknow-error", "ACQ.REFUND_CHARGE_ERROR"):
        refuse_refunds(gateway, monkeypatch, code)
        with pytest.raises(ProviderUnavailable, match=re.escape(code)):
            await alipay.refund(wish(trade, 8888))


def refuse_refunds(gateway: Gateway, monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    """Let the gateway refuse every refund."""
    refusal = {"code": "40004", "msg": "Business Failed", "sub_code": code, "sub_msg": "no"}
    monkeypatch.setattr(gateway, "_refund", lambda *_: refusal)


@pytest.mark.parametrize("fault", [Fault.DOWN, Fault.SLOW, Fault.WRONG_SIGNATURE, Fault.SYSTEM_ERROR])
async def test_a_gateway_that_says_nothing_to_be_believed_is_asked_again_later(
    http: aiohttp.ClientSession, gateway: Gateway, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    alipay = await provider(http, gateway)
    trade = await paid_trade(alipay, gateway, http, payable())
    order = payable()
    gateway.fault = fault
    if fault is Fault.SLOW:
        monkeypatch.setattr(module, "PROVIDER_TIMEOUT_S", 0.2)
    async with asyncio.timeout(5):
        for ask in (alipay.query(order), alipay.close(order), alipay.refund(wish(trade, 8888))):
            with pytest.raises(ProviderUnavailable):
                await ask


async def test_what_the_gateway_does_not_accept_from_us_is_no_refusal(
    http: aiohttp.ClientSession, gateway: Gateway
) -> None:
    alipay = await provider(http, gateway)
    trade = await paid_trade(alipay, gateway, http, payable())
    stranger = await provider(http, gateway, private_key=private_text(of="stranger"))
    for ask in (stranger.query(payable()), stranger.close(payable()), stranger.refund(wish(trade, 8888))):
        with pytest.raises(ProviderUnavailable, match=r"isv\.invalid-signature"):
            await ask
    nobody = await provider(http)
    with pytest.raises(ProviderUnavailable):
        await nobody.query(payable())


async def test_the_answer_about_another_order_is_not_believed(
    http: aiohttp.ClientSession, gateway: Gateway, monkeypatch: pytest.MonkeyPatch
) -> None:
    alipay = await provider(http, gateway)
    other = await paid_trade(alipay, gateway, http, payable("CP2"))
    facts = {"code": "10000", "out_trade_no": "CP2", "trade_no": other.trade_no, "fund_change": "Y"}
    monkeypatch.setattr(
        gateway, "_do", lambda *_: facts | {"trade_status": other.status, "total_amount": other.total}
    )
    mine = Trade("CP1", "2030010122001400000000000009", "88.88", "", "")
    for ask in (alipay.query(payable()), alipay.close(payable()), alipay.refund(wish(mine, 1))):
        with pytest.raises(ProviderUnavailable, match="CP2"):
            await ask


# What config.toml has to say


async def test_keys_are_read_as_the_platforms_tool_prints_them(
    http: aiohttp.ClientSession, gateway: Gateway
) -> None:
    private_forms = [
        private_text(form, is_pem=is_pem)
        for form in (PrivateFormat.PKCS8, PrivateFormat.TraditionalOpenSSL)
        for is_pem in (True, False)
    ]
    public_forms = [
        public_text(form, is_pem=is_pem)
        for form in (PublicFormat.SubjectPublicKeyInfo, PublicFormat.PKCS1)
        for is_pem in (True, False)
    ]
    wrapped = re.sub("(.{64})", r"\1\n", private_text())
    for private_key, public_key in zip(
        [*private_forms, wrapped], [*public_forms, f"  {public_text()}\n"], strict=True
    ):
        alipay = await provider(http, gateway, private_key=private_key, alipay_public_key=public_key)
        assert await alipay.query(payable()) is None
        assert read(alipay, signed_form(told(), key("alipay"))).amount == 8888
    assert len(gateway.asked) == 5


async def test_a_key_that_cannot_be_used_closes_the_provider_and_is_named_but_never_told(
    http: aiohttp.ClientSession, caplog: pytest.LogCaptureFixture
) -> None:
    elliptic = ec.generate_private_key(ec.SECP256R1())
    elliptic_private = elliptic.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()
    elliptic_public = elliptic.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo)
    wrong = [
        *(("private_key", text) for text in ("nonsense", "é", "MIIB", public_text(), elliptic_private)),
        ("private_key", private_text()[:-40]),
        *(("alipay_public_key", text) for text in ("nonsense", private_text(of="alipay"), "-----BEGIN")),
        ("alipay_public_key", elliptic_public.decode()),
        ("alipay_public_key", public_text(of="application")),
    ]
    for name, text in wrong:
        caplog.clear()
        section = AlipaySection(**settings(**{name: text}))
        assert await asyncio.to_thread(open_alipay, section, StillClock(), http) is None, (name, text)
        (line,) = caplog.records
        assert vars(line)["unusable"] == f"billing.providers.alipay.{name}"
        assert not [value for value in vars(line).values() if section.private_key in str(value)]


async def test_an_unfinished_configuration_stays_closed_and_says_what_is_missing(
    open_bank: OpenBank, caplog: pytest.LogCaptureFixture
) -> None:
    async def providers_of(missing: str | None, alipay: dict[str, str], **more: Any) -> list[str]:
        caplog.clear()
        providers = {"sandbox": {"secret": SECRET}, "alipay": alipay}
        billing = {"providers": providers, **more.pop("billing", {})}
        house = await open_bank(billing=billing, **more)
        said = [vars(line).get("missing") for line in caplog.records if line.levelno == logging.WARNING]
        assert [one for one in said if one] == ([missing] if missing else [])
        client = await house.sign_up()
        return [one["name"] for one in (await client.get("/billing/providers")).json["items"]]

    assert await providers_of(None, {}) == ["sandbox"]
    keyless = settings(private_key="", app_id="")
    missing = "billing.providers.alipay.app_id, billing.providers.alipay.private_key"
    assert await providers_of(missing, keyless) == ["sandbox"]
    dollars = {"currency": "USD"}
    assert await providers_of("billing.currency = CNY", settings(), billing=dollars) == ["sandbox"]
    public = {"host": "0.0.0.0"}
    assert await providers_of("server.public_url", settings(), server=public) == ["sandbox"]
    assert await providers_of(None, settings()) == ["alipay", "sandbox"]


# The whole way


class Shop:
    """A server that takes Alipay, and Alipay."""

    def __init__(self, house: House, gateway: Gateway) -> None:
        self.house = house
        self.gateway = gateway

    async def order(self, client: Client, amount: int = 5000) -> dict[str, Any]:
        """A new order that is to be paid with Alipay."""
        reply = await client.post("/billing/orders", {"amount": amount, "provider": "alipay"})
        assert reply.status == 201, reply.body
        return dict(reply.json)

    async def begin(self, client: Client, order: dict[str, Any]) -> Trade:
        """Go from the order to Alipay's page."""
        reply = await client.post(f"//checkout/alipay/{order['number']}")
        assert reply.status == 200, reply.body
        links = re.findall(r'href="([^"]*gateway\.do[^"]*)"', reply.body.decode())
        async with self.house.http.get(html.unescape(links[0])) as page:
            assert page.status == 200
            assert "the page where it is paid" in await page.text()
        return self.gateway.trades[order["number"]]

    async def change(self, order: dict[str, Any], change: str) -> None:
        """Let time pass for one order."""
        await self.house.app[DATABASE].execute(
            f"UPDATE orders SET {change} WHERE number = $1", order["number"]
        )

    async def ask(self, order: dict[str, Any]) -> None:
        """Let the janitor ask after this order now."""
        await self.change(order, "next_ask_at = now()")
        await self.house.app[JANITOR].ask()

    async def unapplied(self, order: dict[str, Any]) -> list[tuple[str, str, int]]:
        """The order's payments that nobody has."""
        rows = await self.house.app[DATABASE].fetch(
            "SELECT p.payment_id, p.reason, p.amount FROM payments p JOIN orders o ON o.id = p.order_id"
            " WHERE o.number = $1 AND p.state = 'unapplied'",
            order["number"],
        )
        return [(row["payment_id"], row["reason"], row["amount"]) for row in rows]


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(servers: Servers, tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Shop]:
    """The server and the gateway that these tests share."""
    async with Gateway.started(key("alipay"), key("application").public_key()) as gateway:
        folder: Path = tmp_path_factory.mktemp("shop") / "house"
        billing: dict[str, object] = {"providers": {"alipay": settings(gateway.url)}}
        house = await House.open(servers, folder, {"billing": billing}, PLUGINS)
        yield Shop(house, gateway)
        await house.close()


async def test_a_payment_is_credited_once_however_often_it_is_told(shop: Shop) -> None:
    client = await shop.house.sign_up()
    order = await shop.order(client)
    trade = await shop.begin(client, order)
    assert trade.total == "50.00"
    expires_at = datetime.fromisoformat(order["expires_at"]) + timedelta(hours=8)
    assert trade.time_expire == expires_at.strftime("%Y-%m-%d %H:%M:%S")
    assert await state_of(client, order) == "pending"
    assert await shop.gateway.pay(order["number"]) == (200, "success")
    again = [shop.gateway.notify(order["number"], notify_id=f"again-{n % 3}") for n in range(9)]
    assert set(await asyncio.gather(*again)) == {(200, "success")}
    assert await state_of(client, order) == "paid"
    assert await balance_of(client) == WELCOME + 5000
    assert await booked(shop.house, "top_up", order) == {"user": 5000, "clearing": -5000}
    assert await shop.unapplied(order) == []
    await assert_sound(shop.house)


async def test_a_payment_first_told_many_times_at_once_is_credited_once(shop: Shop) -> None:
    client = await shop.house.sign_up()
    order = await shop.order(client)
    (await shop.begin(client, order)).status = "TRADE_SUCCESS"
    at_once = [shop.gateway.notify(order["number"], notify_id=f"{order['number']}-{n % 2}") for n in range(8)]
    assert set(await asyncio.gather(*at_once)) == {(200, "success")}
    assert await balance_of(client) == WELCOME + 5000
    await assert_sound(shop.house)


async def test_a_payment_whose_notification_is_lost_is_found(shop: Shop) -> None:
    client = await shop.house.sign_up()
    order = await shop.order(client)
    trade = await shop.begin(client, order)
    await shop.ask(order)
    assert await state_of(client, order) == "pending"
    trade.status = "TRADE_SUCCESS"
    shop.gateway.fault = Fault.WRONG_SIGNATURE
    await shop.ask(order)
    shop.gateway.fault = None
    assert await state_of(client, order) == "pending"
    await shop.ask(order)
    assert await state_of(client, order) == "paid"
    assert await shop.gateway.notify(order["number"]) == (200, "success")
    assert await balance_of(client) == WELCOME + 5000
    assert await shop.unapplied(order) == []
    await assert_sound(shop.house)


async def test_a_forged_notification_changes_nothing(shop: Shop) -> None:
    client = await shop.house.sign_up()
    order = await shop.order(client)
    trade = await shop.begin(client, order)
    trade.status = "TRADE_SUCCESS"
    body = signed_form(notification(trade), key("stranger"))
    headers = {"Content-Type": "application/x-www-form-urlencoded"}
    reply = await shop.house.anyone.post("/billing/payments/alipay", data=body, headers=headers)
    assert (reply.status, reply.code) == (401, "bad_signature")
    assert await state_of(client, order) == "pending"
    assert await events_of(shop.house, order) == []


async def test_money_given_back_is_neither_a_payment_nor_a_failure(shop: Shop) -> None:
    client = await shop.house.sign_up()
    order = await shop.order(client)
    trade = await shop.begin(client, order)
    await shop.gateway.pay(order["number"])
    alipay = shop.house.app[PROVIDERS]["alipay"]
    for amount in (2000, 3000):
        assert await alipay.refund(wish(trade, amount, paid=5000)) is RefundProgress.DONE
        assert await shop.gateway.notify(order["number"]) == (200, "success")
    assert trade.status == "TRADE_CLOSED"
    assert sorted(await events_of(shop.house, order)) == ["other", "other", "succeeded"]
    assert await state_of(client, order) == "paid"
    assert await balance_of(client) == WELCOME + 5000
    assert await shop.unapplied(order) == []


@pytest.mark.parametrize("end", ["cancelled", "expired"])
async def test_an_order_that_is_over_cannot_be_paid_any_more(shop: Shop, end: str) -> None:
    client = await shop.house.sign_up()
    order = await shop.order(client)
    trade = await shop.begin(client, order)
    if end == "cancelled":
        await client.post(f"/billing/orders/{order['id']}/cancel")
        await shop.house.app[JANITOR].ask()
    else:
        await shop.change(order, "created_at = now() - interval '1 hour', expires_at = now()")
        await shop.ask(order)
        await shop.house.app[ORDERS].expire()
    assert await state_of(client, order) == end
    assert trade.status == "TRADE_CLOSED"
    assert await shop.gateway.notify(order["number"]) == (200, "success")
    assert await balance_of(client) == WELCOME


async def test_a_payment_that_comes_too_late_is_kept_for_administrators(shop: Shop) -> None:
    admin, client = await administrator(shop.house), await shop.house.sign_up()
    order = await shop.order(client)
    trade = await shop.begin(client, order)
    await client.post(f"/billing/orders/{order['id']}/cancel")
    for _ in range(2):
        trade.status = "TRADE_SUCCESS"
        assert await shop.gateway.notify(order["number"]) == (200, "success")
    assert await state_of(client, order) == "cancelled"
    assert await balance_of(client) == WELCOME
    assert await shop.unapplied(order) == [(trade.trade_no, "order_closed", 5000)]
    assert [one["order_number"] for one in await complaints(admin)] == [order["number"]]
    await assert_sound(shop.house)


async def test_a_payment_made_while_its_trade_was_to_be_closed_is_found(
    shop: Shop, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = await shop.house.sign_up()
    order = await shop.order(client)
    trade = await shop.begin(client, order)
    do = shop.gateway._do

    def pay_before_the_close(method: str, content: dict[str, str]) -> dict[str, str]:
        if method == "alipay.trade.close":
            trade.status = "TRADE_SUCCESS"
        return do(method, content)

    monkeypatch.setattr(shop.gateway, "_do", pay_before_the_close)
    await client.post(f"/billing/orders/{order['id']}/cancel")
    await shop.house.app[JANITOR].ask()
    assert await shop.unapplied(order) == []
    await shop.change(order, "next_ask_at = CASE WHEN next_ask_at IS NOT NULL THEN now() END")
    await shop.house.app[JANITOR].ask()
    assert await shop.unapplied(order) == [(trade.trade_no, "order_closed", 5000)]


async def test_an_unknown_order_and_another_sum_are_answered_as_alipay_wants_it(shop: Shop) -> None:
    client = await shop.house.sign_up()
    order = await shop.order(client)
    trade = await shop.begin(client, order)
    trade.status = "TRADE_SUCCESS"
    other = {"total_amount": "50.01", "notify_id": "another-sum"}
    assert await shop.gateway.notify(order["number"], **other) == (200, "success")
    assert await shop.gateway.notify(order["number"], out_trade_no="CP0", notify_id="a") == (404, "failure")
    assert await state_of(client, order) == "pending"
    assert await balance_of(client) == WELCOME
