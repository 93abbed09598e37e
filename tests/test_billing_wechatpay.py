"""WeChat Pay: what its notifications may do, and what is asked of its API."""

import asyncio
import html
import json
import logging
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from datetime import datetime, timedelta
from functools import cache
from typing import Any
from uuid import UUID, uuid4

import pytest
import pytest_asyncio
import segno
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from cryptography.hazmat.primitives.serialization import (
    BestAvailableEncryption,
    Encoding,
    KeySerializationEncryption,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
)
from multidict import CIMultiDict

from plugins.billing.janitor import JANITOR
from plugins.billing.model import OrderState, WechatpaySection
from plugins.billing.orders import ORDERS
from plugins.billing.providers import (
    PROVIDERS,
    Payable,
    ProviderUnavailable,
    RefundProgress,
    RefundRefused,
    RefundWish,
)
from plugins.billing.providers import wechatpay as module
from plugins.billing.providers.wechatpay import Wechatpay, open_wechatpay
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
from tests.wechatpay_standin import (
    API_V3_KEY,
    APP,
    MERCHANT,
    PUBLIC_KEY_ID,
    SERIAL,
    Fault,
    WechatpayStandin,
    notification,
    sealed,
)

pytestmark = pytest.mark.asyncio(loop_scope="module")

NO_ONE = "http://127.0.0.1:9"
NOTIFY_URL = "https://phones.example.com/api/v1/billing/payments/wechatpay"


@cache
def key(_name: str) -> rsa.RSAPrivateKey:
    """A key of this process, the same for the same name."""
    return rsa.generate_private_key(65537, 2048)


def private_pem(
    form: PrivateFormat = PrivateFormat.PKCS8, encryption: KeySerializationEncryption | None = None
) -> str:
    """The merchant's key."""
    return key("merchant").private_bytes(Encoding.PEM, form, encryption or NoEncryption()).decode()


def public_pem(form: PublicFormat = PublicFormat.SubjectPublicKeyInfo) -> str:
    """The platform's key."""
    return key("platform").public_key().public_bytes(Encoding.PEM, form).decode()


def settings(api_url: str = NO_ONE, **changes: str) -> dict[str, str]:
    """[billing.providers.wechatpay], complete."""
    return {
        "app_id": APP,
        "merchant_id": MERCHANT,
        "certificate_serial": SERIAL,
        "private_key": private_pem(),
        "api_v3_key": API_V3_KEY,
        "public_key": public_pem(),
        "public_key_id": PUBLIC_KEY_ID,
        "api_url": api_url,
    } | changes


@asynccontextmanager
async def opened(api_url: str = NO_ONE, **changes: str) -> AsyncIterator[Wechatpay]:
    """The provider alone."""
    section = WechatpaySection(**settings(api_url, **changes))
    async with open_wechatpay(section, SystemClock()) as wechatpay:
        assert wechatpay is not None
        yield wechatpay


@pytest_asyncio.fixture(loop_scope="module")
async def reader() -> AsyncIterator[Wechatpay]:
    """The provider, with nobody to ask."""
    async with opened() as wechatpay:
        yield wechatpay


@pytest_asyncio.fixture(loop_scope="module")
async def standin() -> AsyncIterator[WechatpayStandin]:
    """WeChat Pay, for one test."""
    async with WechatpayStandin.started(key("platform"), key("merchant").public_key()) as started:
        yield started


@pytest_asyncio.fixture(loop_scope="module")
async def wechatpay(standin: WechatpayStandin) -> AsyncIterator[Wechatpay]:
    """The provider at the stand-in."""
    async with opened(standin.url) as one:
        yield one


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def platform() -> AsyncIterator[WechatpayStandin]:
    """WeChat Pay, for the tests that share `shop`."""
    async with WechatpayStandin.started(key("platform"), key("merchant").public_key()) as started:
        yield started


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def shop(
    servers: Servers, platform: WechatpayStandin, tmp_path_factory: pytest.TempPathFactory
) -> AsyncIterator[House]:
    """A server whose users pay with WeChat Pay."""
    providers = {"wechatpay": settings(platform.url), "sandbox": {"secret": SECRET}}
    folder = tmp_path_factory.mktemp("shop") / "house"
    house = await House.open(servers, folder, {"billing": {"providers": providers}}, PLUGINS)
    yield house
    await house.close()


@pytest.fixture(autouse=True)
def all_is_well(request: pytest.FixtureRequest) -> None:
    """Leave no fault of an earlier test in the shared stand-in."""
    if "platform" in request.fixturenames:
        request.getfixturevalue("platform").fault = Fault()


def payable(number: str = "CP0123456789", amount: int = 8888) -> Payable:
    """An order without a server."""
    now = datetime.now().astimezone()
    return Payable(number, amount, "CNY", now, now + timedelta(minutes=15), "")


def wish(order: Payable, amount: int, *, id: UUID | None = None, reason: str = "") -> RefundWish:
    """A refund of some of an order."""
    return RefundWish(id or uuid4(), order, "42", order.amount, amount, reason)


def trade(**changes: object) -> dict[str, object]:
    """A paid trade, shortened from docs/merchant/products/notification/introduction.html."""
    return {
        "transaction_id": "1217752501201407033233368018",
        "amount": {"payer_total": 95, "total": 100, "currency": "CNY", "payer_currency": "CNY"},
        "mchid": MERCHANT,
        "trade_state": "SUCCESS",
        "appid": APP,
        "out_trade_no": "1217752501201407033233368018",
        "trade_type": "NATIVE",
        "payer": {"openid": "oUpF8uMuAJO_M2pxb1Q9zNjWeS6o"},
    } | changes


def headers_of(body: bytes, **how: Any) -> dict[str, str]:
    """The headers of a notification."""
    return sealed(how.pop("key", key("platform")), body, **how)


def refusal(reader: Wechatpay, headers: dict[str, str], body: bytes) -> Problem:
    """Why a notification is not taken."""
    with pytest.raises(Problem) as refused:
        reader.read_callback(CIMultiDict(headers), body)
    return refused.value


async def bought(standin: WechatpayStandin, wechatpay: Wechatpay, order: Payable) -> None:
    """Have an order paid."""
    await wechatpay.checkout(order, back_url="", callback_url=NOTIFY_URL)
    standin.pay(order.number)


async def test_a_notification_of_the_documented_shape_is_read(reader: Wechatpay) -> None:
    body = notification(trade(), id="EV-2018022511223320873")
    event = reader.read_callback(headers_of(body), body)
    assert event.model_dump() == {
        "event_id": "EV-2018022511223320873",
        "order_number": "1217752501201407033233368018",
        "amount": 100,
        "currency": "CNY",
        "status": "succeeded",
        "payment_id": "1217752501201407033233368018",
    }


async def test_what_the_platform_did_not_sign_for_us_now_is_refused(reader: Wechatpay) -> None:
    body = notification(trade())
    genuine = headers_of(body)
    forged = [genuine | change for change in (
        {"Wechatpay-Signature": "WECHATPAY/SIGNTEST/" + genuine["Wechatpay-Signature"]},
        {"Wechatpay-Signature": ""},
        {"Wechatpay-Signature": "é" * 344},
        {"Wechatpay-Signature": "A" * 344},
        {"Wechatpay-Nonce": "another"},
        {"Wechatpay-Nonce": "\udcff"},
        {"Wechatpay-Serial": "PUB_KEY_ID_0000"},
        {"Wechatpay-Serial": SERIAL},
        {"Wechatpay-Timestamp": str(int(genuine["Wechatpay-Timestamp"]) + 1)},
        {"Wechatpay-Timestamp": "-1"},
        {"Wechatpay-Timestamp": ""},
        {"Wechatpay-Timestamp": "9" * 5000},
        {"Wechatpay-Timestamp": "١" * 10},
    )]  # fmt: skip
    for name in ("Timestamp", "Nonce", "Serial", "Signature"):
        forged += [{key: value for key, value in genuine.items() if key != f"Wechatpay-{name}"}]
    forged += [
        headers_of(body, key=key("merchant")),
        headers_of(body, serial="PUB_KEY_ID_0000"),
        headers_of(body, off_s=-310),
        headers_of(body, off_s=310),
        headers_of(body + b" "),
        {},
    ]
    for headers in forged:
        assert refusal(reader, headers, body).code is Code.BAD_SIGNATURE, headers
    for headers in (headers_of(body, off_s=-290), headers_of(body, off_s=290), genuine):
        reader.read_callback(CIMultiDict(headers), body)
    for altered in (body.replace(b"TRANSACTION", b"REFUND"), b"\xff\xfe", b""):
        assert refusal(reader, genuine, altered).code is Code.BAD_SIGNATURE


async def test_an_old_notification_is_not_made_new_by_headers_of_another_spelling(reader: Wechatpay) -> None:
    body = notification(trade())
    old = headers_of(body, off_s=-3600)
    spelled = {f"HTTP_{name.upper().replace('-', '_')}": value for name, value in old.items()}
    fresh = headers_of(b"") | {"Wechatpay-Signature": old["Wechatpay-Signature"]}
    assert refusal(reader, fresh | spelled, body).code is Code.BAD_SIGNATURE


async def test_what_is_about_another_merchant_or_app_is_refused(reader: Wechatpay) -> None:
    for content, event_type in (
        (trade(mchid="1900000000"), "TRANSACTION.SUCCESS"),
        (trade(appid="wx0000000000000000"), "TRANSACTION.SUCCESS"),
        (trade(appid=""), "TRANSACTION.SUCCESS"),
        ({"mchid": "1900000000", "out_trade_no": "CP1"}, "REFUND.SUCCESS"),
    ):
        body = notification(content, event_type=event_type)
        assert refusal(reader, headers_of(body), body).code is Code.BAD_SIGNATURE, content


async def test_what_is_genuine_and_cannot_be_understood_says_so(reader: Wechatpay) -> None:
    whole = json.loads(notification(trade()))
    resource = whole["resource"]
    cases = [
        (b"{", Code.MALFORMED),
        (b"", Code.MALFORMED),
        (b"[]", Code.INVALID),
        (b"{}", Code.INVALID),
        (notification(trade(), id=""), Code.INVALID),
        (notification(trade(), id="two words"), Code.INVALID),
        (notification(trade(), resource=resource | {"algorithm": "AES"}), Code.INVALID),
        (notification(trade(), resource=resource | {"nonce": "short"}), Code.INVALID),
        (notification(trade(), resource=resource | {"nonce": "é" * 12}), Code.INVALID),
        (notification(trade(), resource=resource | {"ciphertext": "é"}), Code.INVALID),
        (notification(trade(), resource=resource | {"ciphertext": ""}), Code.INVALID),
        (notification(trade(), resource=resource | {"ciphertext": 1}), Code.INVALID),
        (notification(trade(), key="x" * 32), Code.INVALID),
        (notification(b"{"), Code.MALFORMED),
        (notification(b"\xff"), Code.INVALID),
        (notification(b"[]"), Code.INVALID),
        (notification(trade(amount=None)), Code.INVALID),
        (notification(trade(amount={"payer_total": 100})), Code.INVALID),
        (notification(trade(transaction_id="")), Code.INVALID),
        (notification(trade(out_trade_no="a b")), Code.INVALID),
    ] + [
        (notification(trade(amount={"total": total, "currency": "CNY"})), Code.INVALID)
        for total in ("100", 100.0, True, None, 2**63)
    ]  # fmt: skip
    for body, code in cases:
        problem = refusal(reader, headers_of(body), body)
        assert problem.code is code, body
        assert API_V3_KEY not in repr(problem.errors)


async def test_only_money_that_came_is_a_success(reader: Wechatpay) -> None:
    def status_of(content: dict[str, object], event_type: str = "TRANSACTION.SUCCESS") -> str:
        body = notification(content, event_type=event_type)
        return reader.read_callback(headers_of(body), body).status

    states = {"SUCCESS": "succeeded", "REFUND": "succeeded", "PAYERROR": "failed", "CLOSED": "other",
              "NOTPAY": "other", "REVOKED": "other", "USERPAYING": "other", "NEW": "other"}  # fmt: skip
    assert {state: status_of(trade(trade_state=state)) for state in states} == states
    assert status_of(trade(trade_state="PAYERROR", amount=None)) == "other"
    assert status_of(trade(), "REFUND.SUCCESS") == "other"
    assert status_of(trade(), "SECURITY_ECHO.SUCCESS") == "other"


async def test_a_notification_of_a_refund_names_its_order_and_no_more(reader: Wechatpay) -> None:
    for content, number in (
        (
            {"mchid": MERCHANT, "out_trade_no": "CP1", "refund_status": "SUCCESS", "amount": {"refund": 5}},
            "CP1",
        ),
        ({}, "-"),
    ):
        body = notification(content, event_type="REFUND.SUCCESS")
        event = reader.read_callback(headers_of(body), body)
        assert (event.order_number, event.status, event.amount, event.payment_id) == (number, "other", 0, "")


async def test_only_what_must_come_again_is_answered_as_a_failure(reader: Wechatpay) -> None:
    for kept in (*OrderState, Code.ORDER_CLOSED, Code.AMOUNT_MISMATCH, None):
        reply = reader.answer(kept)
        assert (reply.status, reply.body) == (204, None)
    reply = reader.answer(Code.UNKNOWN_ORDER)
    assert isinstance(reply.body, bytes)
    assert (reply.status, json.loads(reply.body)["code"]) == (404, "FAIL")


async def test_a_checkout_is_the_same_however_often_it_begins(
    standin: WechatpayStandin, wechatpay: Wechatpay
) -> None:
    order = payable()
    first = await wechatpay.checkout(order, back_url="https://x/", callback_url=NOTIFY_URL)
    assert first.qr_text.startswith("weixin://wxpay/bizpayurl?pr=")
    assert (first.url, first.reference) == ("", "")
    assert await wechatpay.checkout(order, back_url="https://y/", callback_url=NOTIFY_URL) == first
    asked = standin.orders[order.number]["asked"]
    assert asked["amount"] == {"total": 8888, "currency": "CNY"}
    assert asked["notify_url"] == NOTIFY_URL
    expires_at = datetime.fromisoformat(asked["time_expire"])
    assert expires_at == order.expires_at.replace(microsecond=0)
    for state in ("SUCCESS", "CLOSED"):
        standin.orders[order.number]["trade_state"] = state
        with pytest.raises(ProviderUnavailable, match="ORDER"):
            await wechatpay.checkout(order, back_url="", callback_url=NOTIFY_URL)


async def test_a_question_finds_the_payment_and_nothing_before_it(
    standin: WechatpayStandin, wechatpay: Wechatpay
) -> None:
    order = payable()
    assert await wechatpay.query(order) is None
    await wechatpay.checkout(order, back_url="", callback_url=NOTIFY_URL)
    assert await wechatpay.query(order) is None
    told = standin.pay(order.number)
    found = await wechatpay.query(order)
    assert found is not None
    assert found.event.event_id == f"query_{told['transaction_id']}"
    assert (found.event.payment_id, found.event.status) == (told["transaction_id"], "succeeded")
    assert (found.event.order_number, found.event.amount, found.event.currency) == (order.number, 8888, "CNY")
    assert json.loads(found.body) == told
    await wechatpay.refund(wish(order, 1))
    assert standin.orders[order.number]["trade_state"] == "REFUND"
    again = await wechatpay.query(order)
    assert again is not None
    assert again.event == found.event


@pytest.mark.parametrize(
    "change", [{"out_trade_no": "CP9999999999"}, {"mchid": "1"}, {"appid": "wx1"}, {"amount": None}]
)
async def test_an_answer_about_something_else_is_not_believed(
    standin: WechatpayStandin, wechatpay: Wechatpay, change: dict[str, object]
) -> None:
    order = payable()
    await bought(standin, wechatpay, order)
    standin.orders[order.number] |= change
    with pytest.raises(ProviderUnavailable):
        await wechatpay.query(order)


async def test_a_closed_order_cannot_be_paid_and_is_closed_as_often_as_one_likes(
    standin: WechatpayStandin, wechatpay: Wechatpay
) -> None:
    order = payable()
    await wechatpay.close(order)
    await wechatpay.checkout(order, back_url="", callback_url=NOTIFY_URL)
    for _ in range(2):
        await wechatpay.close(order)
        assert standin.orders[order.number]["trade_state"] == "CLOSED"
    assert await wechatpay.query(order) is None


async def test_closing_what_was_paid_meanwhile_says_so(
    standin: WechatpayStandin, wechatpay: Wechatpay
) -> None:
    order = payable()
    await bought(standin, wechatpay, order)
    with pytest.raises(ProviderUnavailable, match="ORDERPAID"):
        await wechatpay.close(order)
    standin.fault.error = (202, "USER_PAYING")
    with pytest.raises(ProviderUnavailable, match="USER_PAYING"):
        await wechatpay.close(order)


async def test_one_refund_is_made_once_and_followed_to_its_end(
    standin: WechatpayStandin, wechatpay: Wechatpay
) -> None:
    order = payable()
    await bought(standin, wechatpay, order)
    part = wish(order, 3000, reason="退" * 30)
    for _ in range(3):
        assert await wechatpay.refund(part) is RefundProgress.UNDER_WAY
    (made,) = standin.refunds.values()
    assert made["out_refund_no"] == part.id.hex
    assert made["amount"] == {"refund": 3000, "total": 8888, "currency": "CNY"}
    assert made["reason"] == "退" * 26, "80 bytes at most, and no half letter"
    made["status"] = "SUCCESS"
    assert await wechatpay.refund(part) is RefundProgress.DONE
    with pytest.raises(RefundRefused, match="INVALID_REQUEST"):
        await wechatpay.refund(wish(order, 5889))
    rest = wish(order, 5888)
    assert await wechatpay.refund(rest) is RefundProgress.UNDER_WAY
    for status in ("CLOSED", "ABNORMAL"):
        standin.refunds[rest.id.hex]["status"] = status
        with pytest.raises(RefundRefused):
            await wechatpay.refund(rest)
    standin.refunds[rest.id.hex]["status"] = "NEW"
    with pytest.raises(ProviderUnavailable):
        await wechatpay.refund(rest)


@pytest.mark.parametrize(
    "code",
    [
        "NOT_ENOUGH",
        "INVALID_REQUEST",
        "USER_ACCOUNT_ABNORMAL",
        "NO_AUTH",
        "PARAM_ERROR",
        "RESOURCE_NOT_EXISTS",
    ],
)
async def test_a_refusal_counts_only_where_no_refund_was_made(
    standin: WechatpayStandin, wechatpay: Wechatpay, code: str
) -> None:
    order = payable()
    await bought(standin, wechatpay, order)
    one = wish(order, 1)
    standin.fault.error, standin.fault.only = (403, code), "POST /v3/refund"
    with pytest.raises(RefundRefused, match=f"{code}! \\({code}\\)"):
        await wechatpay.refund(one)
    standin.refunds[one.id.hex] = {"out_refund_no": one.id.hex, "status": "SUCCESS"}
    assert await wechatpay.refund(one) is RefundProgress.DONE


@pytest.mark.parametrize(
    "error", [(500, "SYSTEM_ERROR"), (429, "FREQUENCY_LIMITED"), (401, "SIGN_ERROR"), (503, "NOT_ENOUGH")]
)
async def test_an_error_that_may_pass_is_no_refusal(
    standin: WechatpayStandin, wechatpay: Wechatpay, error: tuple[int, str]
) -> None:
    order = payable()
    await bought(standin, wechatpay, order)
    standin.fault.error, standin.fault.only = error, "POST /v3/refund"
    with pytest.raises(ProviderUnavailable, match=error[1]):
        await wechatpay.refund(wish(order, 1))


Call = Callable[[Wechatpay, Payable], Awaitable[object]]
CALLS: dict[str, Call] = {
    "checkout": lambda provider, order: provider.checkout(order, back_url="", callback_url=NOTIFY_URL),
    "query": lambda provider, order: provider.query(order),
    "close": lambda provider, order: provider.close(order),
    "refund": lambda provider, order: provider.refund(wish(order, 1)),
}
FAULTS: dict[str, Fault] = {
    "down": Fault(is_down=True),
    "slow": Fault(is_slow_s=6),
    "system_error": Fault(error=(500, "SYSTEM_ERROR")),
    "sealed by another": Fault(seal={"key": key("another")}),
    "another key's name": Fault(seal={"serial": "PUB_KEY_ID_0000"}),
    "a certificate's name": Fault(seal={"serial": SERIAL}),
    "sealed long ago": Fault(seal={"off_s": -310}),
    "no seal": Fault(seal={"left_out": True}),
    "an error sealed by another": Fault(error=(404, "ORDER_NOT_EXIST"), seal={"key": key("another")}),
}


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("call", CALLS)
async def test_what_is_not_known_for_certain_is_asked_again(
    standin: WechatpayStandin,
    wechatpay: Wechatpay,
    monkeypatch: pytest.MonkeyPatch,
    call: str,
    fault: str,
) -> None:
    order = payable()
    await wechatpay.checkout(order, back_url="", callback_url=NOTIFY_URL)
    if call in {"query", "refund"}:
        standin.pay(order.number)
    standin.fault = FAULTS[fault]
    if fault == "slow":
        monkeypatch.setattr(module, "PROVIDER_TIMEOUT_S", 0.2)
    asked = len(standin.asked)
    begun_at = asyncio.get_running_loop().time()
    with pytest.raises(ProviderUnavailable) as away:
        await CALLS[call](wechatpay, order)
    assert asyncio.get_running_loop().time() - begun_at < 5
    assert private_pem() not in str(away.value)
    assert len(standin.asked) == asked + 1, "nothing else is asked for, no certificates either"


async def test_nobody_at_the_address_is_no_answer(reader: Wechatpay) -> None:
    for call in CALLS.values():
        with pytest.raises(ProviderUnavailable, match="ConnectError"):
            await call(reader, payable())


async def test_a_request_that_wechat_pay_does_not_take_for_ours_is_no_answer(
    standin: WechatpayStandin,
) -> None:
    async with opened(standin.url, certificate_serial="00") as wechatpay:
        for call in CALLS.values():
            with pytest.raises(ProviderUnavailable, match="401 SIGN_ERROR"):
                await call(wechatpay, payable())


async def test_the_connections_end_with_the_server(standin: WechatpayStandin) -> None:
    async with opened(standin.url) as wechatpay:
        assert await wechatpay.query(payable()) is None
    with pytest.raises(ProviderUnavailable, match="closed"):
        await wechatpay.query(payable())


@pytest.mark.parametrize(
    "change",
    [
        {"private_key": private_pem(PrivateFormat.TraditionalOpenSSL)},
        {"public_key": public_pem(PublicFormat.PKCS1)},
        {"private_key": f"\n{private_pem()}\n\n"},
    ],
    ids=["PKCS1 private", "PKCS1 public", "blank lines"],
)
async def test_keys_are_read_in_every_form_of_pem(standin: WechatpayStandin, change: dict[str, str]) -> None:
    async with opened(f"{standin.url}/", **change) as wechatpay:
        order = payable()
        await bought(standin, wechatpay, order)
        assert await wechatpay.query(order) is not None


EC_KEY = ec.generate_private_key(ec.SECP256R1())
UNUSABLE: dict[str, tuple[str, str]] = {
    "no key": ("private_key", "SECRET"),
    "cut short": ("private_key", private_pem()[:900]),
    "behind a password": ("private_key", private_pem(encryption=BestAvailableEncryption(b"password"))),
    "of another kind": (
        "private_key", EC_KEY.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()).decode()),
    "a public one": ("private_key", public_pem()),
    "no public key": ("public_key", "SECRET"),
    "a private one": ("public_key", private_pem()),
    "31 bytes": ("api_v3_key", API_V3_KEY[1:]),
    "33 bytes": ("api_v3_key", f"{API_V3_KEY}1"),
    "32 letters, more bytes": ("api_v3_key", f"{API_V3_KEY[1:]}é"),
}  # fmt: skip


@pytest.mark.parametrize("case", UNUSABLE)
async def test_a_key_that_cannot_be_used_keeps_it_closed_and_is_named(
    caplog: pytest.LogCaptureFixture, case: str
) -> None:
    name, value = UNUSABLE[case]
    section = WechatpaySection(**settings(**{name: value}))
    with caplog.at_level(logging.WARNING):
        async with open_wechatpay(section, SystemClock()) as wechatpay:
            assert wechatpay is None
    (record,) = (record for record in caplog.records if record.name == "cloudphone")
    assert vars(record)["unusable"] == f"billing.providers.wechatpay.{name}"
    assert value not in str(vars(record))


async def begin(house: House, client: Client, amount: int = 5000) -> dict[str, Any]:
    """An order whose payment has begun, and the text of its QR code."""
    reply = await client.post("/billing/orders", {"amount": amount, "provider": "wechatpay"})
    assert reply.status == 201, reply.body
    order = dict(reply.json)
    page = await house.anyone.post(f"//checkout/wechatpay/{order['number']}")
    assert page.status == 200, page.body
    return order | {"page": html.unescape(page.body.decode())}


async def ask(house: House, order: dict[str, Any]) -> None:
    """Let the janitor ask about an order now."""
    await house.app[DATABASE].execute(
        "UPDATE orders SET next_ask_at = now() WHERE number = $1 AND state <> 'paid'", order["number"]
    )
    await house.app[JANITOR].ask()


async def payments_of(house: House, order: dict[str, Any]) -> list[tuple[str, str, str]]:
    """An order's payments: their names, states and reasons."""
    rows = await house.app[DATABASE].fetch(
        "SELECT p.payment_id, p.state, p.reason FROM payments p JOIN orders o ON o.id = p.order_id"
        " WHERE o.number = $1",
        order["number"],
    )
    return [tuple(row) for row in rows]


async def test_paying_the_qr_code_credits_once_however_often_it_is_told(
    shop: House, platform: WechatpayStandin
) -> None:
    client = await shop.sign_up()
    offered = (await client.get("/billing/providers")).json["items"]
    assert [one["name"] for one in offered] == ["wechatpay", "sandbox"]
    order = await begin(shop, client)
    assert order["checkout_url"] == f"{shop.url}/checkout/wechatpay/{order['number']}"
    code_url = f"weixin://wxpay/bizpayurl?pr={order['number'][-9:]}"
    assert segno.make(code_url).svg_data_uri(scale=6) in order["page"]
    assert (await shop.anyone.post(f"//checkout/wechatpay/{order['number']}")).status == 200
    paid = platform.pay(order["number"])
    body = notification(paid)
    told = await asyncio.gather(
        *(platform.notify(order["number"], body) for _ in range(5)),
        *(platform.notify(order["number"]) for _ in range(5)),
    )
    assert set(told) == {(204, b"")}
    assert await platform.notify(order["number"], body) == (204, b"")
    assert await state_of(client, order) == "paid"
    assert await balance_of(client) == WELCOME + 5000
    assert await payments_of(shop, order) == [(paid["transaction_id"], "credited", "")]
    await assert_sound(shop)


async def test_a_lost_notification_is_made_up_for_by_a_question(
    shop: House, platform: WechatpayStandin
) -> None:
    client = await shop.sign_up()
    order = await begin(shop, client)
    await ask(shop, order)
    assert await state_of(client, order) == "pending"
    paid = platform.pay(order["number"])
    platform.fault = Fault(error=(500, "SYSTEM_ERROR"))
    await ask(shop, order)
    assert await state_of(client, order) == "pending"
    platform.fault = Fault()
    await ask(shop, order)
    assert await state_of(client, order) == "paid"
    assert await platform.notify(order["number"]) == (204, b"")
    assert await balance_of(client) == WELCOME + 5000
    assert await payments_of(shop, order) == [(paid["transaction_id"], "credited", "")]
    await assert_sound(shop)


async def test_an_order_that_is_over_is_closed_at_wechat_pay(shop: House, platform: WechatpayStandin) -> None:
    client = await shop.sign_up()
    cancelled, expired = await begin(shop, client), await begin(shop, client)
    await client.post(f"/billing/orders/{cancelled['id']}/cancel")
    await shop.app[JANITOR].ask()
    await shop.app[DATABASE].execute(
        "UPDATE orders SET expires_at = now() WHERE number = $1", expired["number"]
    )
    await ask(shop, expired)
    await shop.app[ORDERS].expire()
    for order, state in ((cancelled, "cancelled"), (expired, "expired")):
        assert platform.orders[order["number"]]["trade_state"] == "CLOSED"
        assert await state_of(client, order) == state
        reply = await shop.anyone.post(f"//checkout/wechatpay/{order['number']}")
        assert reply.status == 409


async def test_money_for_a_cancelled_order_is_set_aside(shop: House, platform: WechatpayStandin) -> None:
    client, admin = await shop.sign_up(), await administrator(shop)
    order = await begin(shop, client)
    paid = platform.pay(order["number"])
    await client.post(f"/billing/orders/{order['id']}/cancel")
    for _ in range(2):
        assert await platform.notify(order["number"]) == (204, b"")
    await ask(shop, order)
    assert await balance_of(client) == WELCOME
    assert await payments_of(shop, order) == [(paid["transaction_id"], "unapplied", "order_closed")]
    assert await booked(shop, "unapplied_payment", order) == {"unapplied": 5000, "clearing": -5000}
    assert [one["order_number"] for one in await complaints(admin)] == [order["number"]]
    await assert_sound(shop)


async def test_money_that_comes_while_the_order_is_being_closed_is_found_without_a_notification(
    shop: House, platform: WechatpayStandin
) -> None:
    client = await shop.sign_up()
    order = await begin(shop, client)
    await client.post(f"/billing/orders/{order['id']}/cancel")
    platform.fault.payer = f"{order['number']}/close", order["number"]
    await shop.app[JANITOR].ask()
    platform.fault = Fault()
    assert await payments_of(shop, order) == []
    assert await shop.app[DATABASE].fetchval(
        "SELECT next_ask_at > now() FROM orders WHERE number = $1", order["number"]
    )
    await ask(shop, order)
    ((_, *how),) = await payments_of(shop, order)
    assert how == ["unapplied", "order_closed"]


async def test_a_notification_of_an_order_that_is_not_there_yet_is_to_come_again(
    shop: House, platform: WechatpayStandin
) -> None:
    client = await shop.sign_up()
    order = await begin(shop, client)
    platform.pay(order["number"])
    body = notification(platform.told(order["number"]))
    database = shop.app[DATABASE]
    await database.execute("UPDATE orders SET number = 'not yet' WHERE number = $1", order["number"])
    status, answer = await platform.notify(order["number"], body)
    assert (status, json.loads(answer)["code"]) == (404, "FAIL")
    await database.execute("UPDATE orders SET number = $1 WHERE number = 'not yet'", order["number"])
    assert await platform.notify(order["number"], body) == (204, b"")
    assert await balance_of(client) == WELCOME + 5000


async def test_another_amount_is_kept_for_administrators(shop: House, platform: WechatpayStandin) -> None:
    client, admin = await shop.sign_up(), await administrator(shop)
    order = await begin(shop, client)
    paid = platform.pay(order["number"])
    for wrong in ({"total": 4995, "currency": "CNY"}, {"total": 5000, "currency": "HKD"}):
        body = notification(paid | {"amount": wrong})
        assert await platform.notify(order["number"], body) == (204, b"")
    assert await state_of(client, order) == "pending"
    assert len(await complaints(admin)) == 2
    assert await platform.notify(order["number"]) == (204, b"")
    assert await balance_of(client) == WELCOME + 5000


async def test_a_forged_notification_leaves_no_trace_and_an_unreadable_one_is_kept(
    shop: House, platform: WechatpayStandin
) -> None:
    client = await shop.sign_up()
    order = await begin(shop, client)
    body = notification(platform.pay(order["number"]))
    address = "/billing/payments/wechatpay"
    for headers in ({}, sealed(key("another"), body), sealed(key("platform"), body, off_s=-310)):
        reply = await shop.anyone.post(address, data=body, headers=headers)
        assert (reply.status, reply.code) == (401, "bad_signature")
    assert await events_of(shop, order) == []
    strange = notification(platform.told(order["number"]), key="y" * 32)
    status, answer = await platform.notify(order["number"], strange)
    assert (status, json.loads(answer)["code"]) == (422, "invalid")
    kept = await shop.app[DATABASE].fetchval("SELECT misfit FROM payment_events WHERE body = $1", strange)
    assert kept == "unreadable"
    assert await balance_of(client) == WELCOME


async def test_a_notification_of_a_refund_changes_nothing_and_is_kept(
    shop: House, platform: WechatpayStandin
) -> None:
    client = await shop.sign_up()
    order = await begin(shop, client)
    content = {"mchid": MERCHANT, "out_trade_no": order["number"], "refund_status": "SUCCESS"}
    for event_type in ("REFUND.SUCCESS", "REFUND.ABNORMAL"):
        body = notification(content, event_type=event_type)
        assert await platform.notify(order["number"], body) == (204, b"")
    assert await events_of(shop, order) == ["other", "other"]
    assert await state_of(client, order) == "pending"


async def test_while_wechat_pay_is_away_the_page_says_so(shop: House, platform: WechatpayStandin) -> None:
    client = await shop.sign_up()
    reply = await client.post("/billing/orders", {"amount": 5000, "provider": "wechatpay"})
    page = f"//checkout/wechatpay/{reply.json['number']}"
    platform.fault = Fault(is_down=True)
    assert (await shop.anyone.post(page)).status == 503
    platform.fault = Fault()
    assert (await shop.anyone.post(page)).status == 200


@pytest.mark.parametrize(
    ("changes", "section", "missing"),
    [
        ({"public_key_id": "", "api_v3_key": ""}, {},
         "billing.providers.wechatpay.api_v3_key, billing.providers.wechatpay.public_key_id"),
        ({}, {"currency": "USD"}, "billing.currency = CNY"),
    ],
    ids=["incomplete", "another currency"],
)  # fmt: skip
async def test_where_it_cannot_take_money_it_is_closed_and_the_log_says_why(
    open_bank: OpenBank,
    caplog: pytest.LogCaptureFixture,
    changes: dict[str, str],
    section: dict[str, str],
    missing: str,
) -> None:
    with caplog.at_level(logging.WARNING):
        house = await open_bank(
            billing=section | {"providers": {"wechatpay": settings(**changes), "sandbox": {"secret": SECRET}}}
        )
    providers = house.app[PROVIDERS]
    assert list(providers) == ["sandbox"]
    (record,) = (record for record in caplog.records if "stays closed" in record.getMessage())
    assert (vars(record)["provider"], vars(record)["missing"]) == ("wechatpay", missing)
    client = await house.sign_up()
    reply = await client.post("/billing/orders", {"amount": 5000, "provider": "wechatpay"})
    assert (reply.status, reply.code) == (422, "invalid")
    assert (await house.anyone.post("/billing/payments/wechatpay", data=b"{}")).status == 404
