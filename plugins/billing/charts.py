"""Bar charts of money by day, as far as a template needs them to draw an SVG image.

Lengths are in the image's own units: 10 across for a day, 100 from the top to the bottom. The image is
stretched to its place, so what must be read (days, amounts) stands beside it, in a table too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, timedelta
from typing import Final

from plugins.billing.overview import DayOfRevenue
from plugins.billing.usage import UsageReport

DAY_WIDTH: Final = 10
BAR_WIDTH: Final = 8
HEIGHT: Final = 100
COLOURS: Final = 5
"""So many phones have a bar of their own, those that cost most; the others share one more."""


@dataclass(frozen=True, slots=True)
class Series:
    """What the parts of one colour are, and their sum; the last colour is for all that have no own one."""

    colour: int
    name: str
    amount: int


@dataclass(frozen=True, slots=True)
class Part:
    """One rectangle of a bar."""

    series: Series
    amount: int
    top: float
    height: float


@dataclass(frozen=True, slots=True)
class Bar:
    """A day and its rectangles, the lowest first."""

    day: date
    left: int
    parts: list[Part]


@dataclass(frozen=True, slots=True)
class Chart:
    """Bars from the first day to the last; `zero` is how far down the line of nothing lies.

    `phones` are all of them with their sums, also those that share a colour.
    """

    width: int
    zero: float
    first_day: date
    last_day: date
    highest: int
    lowest: int
    total: int
    series: list[Series]
    phones: list[Series]
    bars: list[Bar]


def usage_chart(report: UsageReport) -> Chart:
    """What phones cost, a bar a day, a part of it for each phone."""
    names: dict[str, str] = {}
    sums: dict[str, int] = {}
    for item in report.items:  # newest first: a phone has the name it had last
        names.setdefault(item.device_id, item.name)
        sums[item.device_id] = sums.get(item.device_id, 0) + item.amount
    dearest = sorted(sums, key=lambda device_id: -sums[device_id])
    phones = [Series(min(at, COLOURS), names[one], sums[one]) for at, one in enumerate(dearest)]
    series, cheaper = phones[:COLOURS], phones[COLOURS:]
    of_phone = dict(zip(dearest, series, strict=False))
    if cheaper:
        others = Series(COLOURS, "", sum(one.amount for one in cheaper))
        series.append(others)
        of_phone.update(dict.fromkeys(dearest[COLOURS:], others))
    amounts: dict[date, dict[Series, int]] = {}
    for item in report.items:
        of_day = amounts.setdefault(item.day, {})
        one = of_phone[item.device_id]
        of_day[one] = of_day.get(one, 0) + item.amount
    return _chart(report.first_day, report.last_day, series, phones, amounts)


def revenue_chart(days: Sequence[DayOfRevenue]) -> Chart:
    """What was earned, a bar a day; below the line where more was given back than earned."""
    all_of_it = Series(0, "", sum(one.amount for one in days))
    amounts = {one.day: {all_of_it: one.amount} for one in days if one.amount}
    return _chart(days[0].day, days[-1].day, [all_of_it], [], amounts)


def _chart(
    first: date,
    last: date,
    series: list[Series],
    phones: list[Series],
    amounts: Mapping[date, Mapping[Series, int]],
) -> Chart:
    sums = [sum(of_day.values()) for of_day in amounts.values()]
    highest, lowest = max([0, *sums]), min([0, *sums])
    scale = HEIGHT / ((highest - lowest) or 1)
    zero = highest * scale
    days = (last - first).days + 1
    return Chart(
        width=days * DAY_WIDTH,
        zero=round(zero, 2),
        first_day=first,
        last_day=last,
        highest=highest,
        lowest=lowest,
        total=sum(sums),
        series=series,
        phones=phones,
        bars=[
            Bar(
                day,
                (day - first).days * DAY_WIDTH + (DAY_WIDTH - BAR_WIDTH) // 2,
                _parts(series, amounts[day], zero, scale),
            )
            for day in (first + timedelta(days=at) for at in range(days))
            if day in amounts
        ],
    )


def _parts(series: list[Series], amounts: Mapping[Series, int], zero: float, scale: float) -> list[Part]:
    parts: list[Part] = []
    reached = zero
    for one in series:
        amount = amounts.get(one, 0)
        if amount:
            height = abs(amount) * scale
            reached -= height if amount > 0 else 0
            parts.append(Part(one, amount, round(reached, 2), round(height, 2)))
    return parts
