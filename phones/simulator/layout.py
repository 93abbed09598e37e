"""Where everything on the phone's screen is: shared by what draws it and what a touch means.

All lengths follow from one unit, 1/360 of the screen's shorter side, as Android's dp do on a
usual phone.
"""

from dataclasses import dataclass
from functools import lru_cache

DOCK_TILES = 3


@dataclass(frozen=True, slots=True)
class Box:
    """A rectangle in pixels; right and bottom are outside it."""

    left: int
    top: int
    right: int
    bottom: int

    @property
    def width(self) -> int:
        return self.right - self.left

    @property
    def height(self) -> int:
        return self.bottom - self.top

    @property
    def middle(self) -> tuple[int, int]:
        return (self.left + self.right) // 2, (self.top + self.bottom) // 2

    def holds(self, x: int, y: int) -> bool:
        return self.left <= x < self.right and self.top <= y < self.bottom

    def inset(self, by: int) -> "Box":
        return Box(self.left + by, self.top + by, self.right - by, self.bottom - by)


@dataclass(frozen=True, slots=True)
class Layout:
    """The places on a screen of one size. `cells` are those of one page of the home screen."""

    width: int
    height: int
    unit: float
    status: Box
    content: Box
    back: Box
    home: Box
    recents: Box
    clock: Box
    cells: tuple[Box, ...]
    dots: Box
    dock: Box
    dock_cells: tuple[Box, ...]
    title: Box
    field: Box
    counter: Box
    canvas: Box
    page: Box
    address: Box
    below_address: Box
    cards: tuple[Box, ...]
    clear_all: Box

    def length(self, units: float) -> int:
        """Units in whole pixels, at least one."""
        return max(1, round(units * self.unit))


@lru_cache(maxsize=2)
def layout(width: int, height: int) -> Layout:
    """Lay out a screen of this many pixels."""
    unit = min(width, height) / 360

    def u(units: float) -> int:
        return max(1, round(units * unit))

    status = Box(0, 0, width, u(28))
    bar = Box(0, height - u(44), width, height)
    third = width // 3
    content = Box(0, status.bottom, width, bar.top)
    tall = content.height > u(430)

    clock = Box(0, content.top + u(20), width, content.top + u(132 if tall else 4))
    dock = Box(u(12), content.bottom - u(94), width - u(12), content.bottom - u(8))
    dots = Box(0, dock.top - u(22), width, dock.top - u(4))
    cells = _grid(Box(u(10), clock.bottom + u(8), width - u(10), dots.top), u(80), u(94))
    dock_cells = _row(Box(dock.left + u(16), dock.top + u(6), dock.right - u(16), dock.bottom), DOCK_TILES)

    title = Box(0, content.top, width, content.top + u(76))
    inner = Box(u(16), title.bottom + u(14), width - u(16), content.bottom - u(14))
    field = Box(inner.left, inner.top, inner.right, inner.top + u(96 if tall else 60))
    counter = Box(inner.left, field.bottom + u(12), inner.right, field.bottom + u(60))
    address = Box(inner.left, inner.top, inner.right, inner.top + u(48))
    clear_all = Box(width // 2 - u(60), content.bottom - u(60), width // 2 + u(60), content.bottom - u(18))
    list_area = Box(u(24), content.top + u(56), width - u(24), clear_all.top - u(16))
    return Layout(
        width=width,
        height=height,
        unit=unit,
        status=status,
        content=content,
        back=Box(0, bar.top, third, bar.bottom),
        home=Box(third, bar.top, width - third, bar.bottom),
        recents=Box(width - third, bar.top, width, bar.bottom),
        clock=clock,
        cells=cells,
        dots=dots,
        dock=dock,
        dock_cells=dock_cells,
        title=title,
        field=field,
        counter=counter,
        canvas=Box(
            inner.left, counter.bottom + u(12), inner.right, max(inner.bottom, counter.bottom + u(40))
        ),
        page=inner,
        address=address,
        below_address=Box(inner.left, address.bottom + u(12), inner.right, inner.bottom),
        cards=_stack(list_area, u(84), u(12)),
        clear_all=clear_all,
    )


def _grid(area: Box, cell_width: int, cell_height: int) -> tuple[Box, ...]:
    columns = max(1, area.width // cell_width)
    rows = max(1, area.height // cell_height)
    return tuple(
        cell
        for row in range(rows)
        for cell in _row(
            Box(area.left, area.top + row * cell_height, area.right, area.top + (row + 1) * cell_height),
            columns,
        )
    )


def _row(area: Box, columns: int) -> tuple[Box, ...]:
    edges = [area.left + area.width * column // columns for column in range(columns + 1)]
    return tuple(Box(edges[i], area.top, edges[i + 1], area.bottom) for i in range(columns))


def _stack(area: Box, height: int, gap: int) -> tuple[Box, ...]:
    count = max(1, (area.height + gap) // (height + gap))
    tops = [area.top + place * (height + gap) for place in range(count)]
    return tuple(Box(area.left, top, area.right, top + height) for top in tops)
