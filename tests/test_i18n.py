"""Languages: which one is picked, how messages are filled in, and that no catalogue has a gap."""

from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal

import pytest
from aiohttp.test_utils import make_mocked_request
from hypothesis import given
from hypothesis import strategies as st

from server import i18n


def locale_for(accept: str = "", cookie: str = "") -> str:
    headers = {"Accept-Language": accept} if accept else {}
    if cookie:
        headers["Cookie"] = f"locale={cookie}"
    return i18n.pick_locale(make_mocked_request("GET", "/", headers=headers))


def test_every_catalogue_is_complete_and_up_to_date() -> None:
    assert list(i18n.complaints()) == []


@pytest.mark.parametrize(
    ("accept", "expected"),
    [
        ("", "en"),
        ("zh-CN,zh;q=0.9,en;q=0.8", "zh_CN"),
        ("zh-Hans", "zh_CN"),
        ("en;q=0.5, zh;q=0.9", "zh_CN"),
        ("fr, de", "en"),
        ("fr, zh;q=0.1", "zh_CN"),
        ("zh;q=0, en", "en"),
        ("zh;q=abc", "en"),
        (";;;,,q=", "en"),
    ],
)
def test_the_browsers_languages_are_weighed(accept: str, expected: str) -> None:
    assert locale_for(accept) == expected


def test_the_readers_own_choice_comes_before_the_browsers() -> None:
    assert locale_for("zh-CN", cookie="en") == "en"
    assert locale_for("en", cookie="zh_CN") == "zh_CN"
    assert locale_for("zh-CN", cookie="../../etc") == "zh_CN"


@given(st.text())
def test_no_header_breaks_the_choice_of_a_language(header: str) -> None:
    tags = i18n._accepted(header)
    assert all(tags)


def test_a_message_is_translated_and_filled_in() -> None:
    assert i18n.translate("en", "{package} is installed", {"package": "org.x"}) == "org.x is installed"
    assert i18n.translate("zh_CN", "{package} is installed", {"package": "org.x"}) == "org.x 已安装"


def test_a_missing_parameter_stays_visible() -> None:
    assert i18n.translate("en", "{a} {b:.2f} {c.d}", {"a": 1}) == "1 {b} {c}"


def test_text_without_parameters_passes_through_unharmed() -> None:
    assert i18n.translate("zh_CN", "disk {0} full }{ 100%") == "disk {0} full }{ 100%"
    assert i18n.translate("zh_CN", "") == ""


def test_a_parameter_is_never_read_as_a_message() -> None:
    assert (
        i18n.translate("en", "{package} is installed", {"package": "{package}"}) == "{package} is installed"
    )


def test_the_plural_follows_the_language() -> None:
    assert i18n.ngettext("en", "{n} phone", "{n} phones", 1) == "1 phone"
    assert i18n.ngettext("en", "{n} phone", "{n} phones", 2) == "2 phones"
    assert i18n.plural_form("zh_CN", "%(num)s is running", "%(num)s are running", 1) == "%(num)s 台正在运行"


def test_money_has_the_digits_of_its_currency() -> None:
    assert i18n.money(-123456, "CNY", "en") == "-CN¥1,234.56"
    assert i18n.money(123456, "CNY", "zh_CN") == "¥1,234.56"
    assert i18n.money(500, "JPY", "en") == "¥500"


@given(st.integers(-(10**13), 10**13), st.sampled_from([("CNY", 2), ("JPY", 0), ("KWD", 3)]))
def test_an_amount_reads_back_as_itself(minor: int, currency: tuple[str, int]) -> None:
    name, digits = currency
    typed = f"{Decimal(minor).scaleb(-digits):f}"
    assert i18n.parse_money(typed, name, "en") == minor
    assert i18n.parse_money(f" {typed} ", name, "zh_CN") == minor


@pytest.mark.parametrize(
    "typed", ["", "x", "1.234", "nan", "inf", "1e999999", "9" * 40, "1..2", "10,50", "1,0,5", "1,00.5"]
)
def test_what_is_no_amount_of_money_is_refused(typed: str) -> None:
    with pytest.raises(ValueError, match=r"amount|coin"):
        i18n.parse_money(typed, "CNY", "en")


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0, "1 min"),
        (3599, "59 min"),
        (3660, "1 hr 1 min"),
        (86_460, "1 day"),
        (90_061, "1 day 1 hr"),
        (273_600, "3 days 4 hr"),
    ],
)
def test_a_stretch_of_time_is_told_in_its_two_largest_units(seconds: int, words: str) -> None:
    assert i18n.stretch(seconds, "en") == words


def test_sizes_times_and_durations_are_in_the_readers_words() -> None:
    assert i18n.file_size(12_345_678, "en") == "12.3 MB"
    assert i18n.file_size(999_950, "en") == "1 MB"
    assert i18n.duration(3 * 3600, "zh_CN") == "3小时"
    assert i18n.day(date(2026, 3, 1), "en") == "Mar 1, 2026"
    assert i18n.day(date(2026, 3, 1), "zh_CN") == "2026年3月1日"
    assert i18n.month(date(2026, 3, 1), "en") == "March 2026"
    assert i18n.month(date(2026, 3, 1), "zh_CN") == "2026年3月"
    at = datetime(2026, 3, 1, 9, 30, tzinfo=timezone(timedelta(hours=8)))
    assert i18n.moment(at, "en") == "Mar 1, 2026 01:30 UTC"
    assert i18n.moment(at.astimezone(UTC), "zh_CN") == "2026年3月1日 01:30 UTC"
