"""The phone's screen: what it shows, what a touch or a key does to it, and its picture."""

import asyncio
import io
import struct
from dataclasses import dataclass
from typing import TYPE_CHECKING

from phones.simulator import keys
from phones.simulator.activities import Activities, Mark, RunningApp, View
from phones.simulator.layout import Box, Layout, layout
from phones.simulator.logcat import Priority
from phones.simulator.packages import BROWSER_APP, NOTES_APP, SETTINGS_APP
from phones.simulator.scene import AppKind, AppScene, Home, Recents, Scene, Tile

if TYPE_CHECKING:
    from phones.simulator.phone import Phone

MIN_SIDE = 200
MAX_SCALE = 2
RGBA_8888 = 1
SRGB = 1

_KINDS: dict[str, AppKind] = {SETTINGS_APP: "settings", NOTES_APP: "notes", BROWSER_APP: "browser"}
_DOCK = (SETTINGS_APP, NOTES_APP, BROWSER_APP)
_WEEKDAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_MONTHS = (
    *("January", "February", "March", "April", "May", "June"),
    *("July", "August", "September", "October", "November", "December"),
)


@dataclass(slots=True)
class Display:
    """The screen's own size in pixels and density in dpi, and what `wm` has set instead."""

    width: int
    height: int
    dpi: int
    override_size: tuple[int, int] | None = None
    override_dpi: int | None = None

    @property
    def size(self) -> tuple[int, int]:
        return self.override_size or (self.width, self.height)

    @property
    def density(self) -> int:
        return self.override_dpi or self.dpi

    def resize(self, size: tuple[int, int] | None) -> None:
        """Show another size, within the bounds that Android sets too; None is the display's own."""
        if size is None:
            self.override_size = None
            return
        width = min(max(size[0], MIN_SIDE), self.width * MAX_SCALE)
        height = min(max(size[1], MIN_SIDE), self.height * MAX_SCALE)
        self.override_size = None if (width, height) == (self.width, self.height) else (width, height)


class Screen:
    """Touches, keys and pictures. A picture is drawn only when asked for, and kept while it is true."""

    def __init__(self, phone: "Phone", display: Display, activities: Activities) -> None:
        self._phone = phone
        self._activities = activities
        self._drawing = asyncio.Lock()  # guards: _drawn, and against two pictures in memory at once
        self._drawn: tuple[Scene, bytes] | None = None
        self.display = display
        self._pressed_at: tuple[int, int] | None = None
        self.is_on = True
        self.page = 0

    def tap(self, x: int, y: int) -> None:
        """A finger down and up at one place."""
        self.swipe(x, y, x, y)

    def swipe(self, x: int, y: int, to_x: int, to_y: int) -> None:
        """A finger down at one place and up at another; one that hardly moves is a tap."""
        if not self.is_on:
            return
        self._log(f"touch ({x}, {y}) to ({to_x}, {to_y}) in {self._activities.component}")
        plan = layout(*self.display.size)
        is_tap = abs(to_x - x) + abs(to_y - y) <= plan.length(12)
        if is_tap and y >= plan.back.top:
            self._touch_navigation(plan, x, y)
        elif self._activities.view is View.HOME:
            self._touch_home(plan, x, y, to_x, is_tap=is_tap)
        elif self._activities.view is View.RECENTS:
            if is_tap:
                self._touch_recents(plan, x, y)
        elif (app := self._activities.front) is not None:
            self._touch_app(plan, app, (x, y), (to_x, to_y))

    def motion(self, action: str, x: int, y: int) -> None:
        """One part of a touch: DOWN, MOVE, UP or CANCEL; the whole counts when the finger is lifted."""
        if action == "DOWN":
            self._pressed_at = (x, y)
        elif action != "MOVE" and self._pressed_at is not None:
            start, self._pressed_at = self._pressed_at, None
            if action == "UP":
                self.swipe(*start, x, y)

    def key(self, code: int) -> None:
        """A key down and up."""
        self._log(f"key {code} in {self._activities.component}")
        if code == keys.POWER:
            self.is_on = not self.is_on
        elif code in (keys.SLEEP, keys.WAKEUP):
            self.is_on = code == keys.WAKEUP
        elif not self.is_on:
            return
        elif code == keys.HOME:
            self._go_home()
        elif code in (keys.BACK, keys.ESCAPE):
            self._activities.back()
        elif code == keys.APP_SWITCH:
            self._activities.recents()
        elif code == keys.DEL:
            if (app := self._writable_app()) is not None:
                app.erase()
        elif code in keys.TYPED:
            self.type(keys.TYPED[code])

    def type(self, text: str) -> None:
        """Put text into the field of the app in front, which takes the focus by it."""
        app = self._writable_app()
        if app is not None and text:
            app.focused = True
            app.type("".join(sign for sign in text if sign.isprintable() or sign == "\n"))

    def scene(self) -> Scene:
        """What is to be seen now."""
        now = self._phone.clock.now()
        width, height = self.display.size
        return Scene(
            width=width,
            height=height,
            time=f"{now:%H:%M}",
            date=f"{_WEEKDAYS[now.weekday()]} {now.day} {_MONTHS[now.month - 1]}",
            battery_percent=self._phone.battery.level,
            charging=self._phone.battery.charging,
            shown=self._shown() if self.is_on else None,
        )

    async def png(self) -> bytes:
        """The picture as PNG."""
        async with self._drawing:
            scene = self.scene()
            if self._drawn is None or self._drawn[0] != scene:
                self._drawn = (scene, await asyncio.to_thread(_png, scene))
            return self._drawn[1]

    async def raw(self) -> bytes:
        """The picture as screencap's raw form: width, height, format and colour space, then RGBA."""
        async with self._drawing:
            return await asyncio.to_thread(_raw, self.scene())

    def _writable_app(self) -> RunningApp | None:
        app = self._activities.front
        return app if app is not None and app.package.name != SETTINGS_APP and self.is_on else None

    def _go_home(self) -> None:
        if self._activities.view is View.HOME:
            self.page = 0
        self._activities.home()

    def _touch_navigation(self, plan: Layout, x: int, y: int) -> None:
        if plan.back.holds(x, y):
            self._activities.back()
        elif plan.home.holds(x, y):
            self._go_home()
        elif plan.recents.holds(x, y):
            self._activities.recents()

    def _touch_home(self, plan: Layout, x: int, y: int, to_x: int, *, is_tap: bool) -> None:
        if not is_tap:
            if abs(to_x - x) >= plan.length(60):
                step = 1 if to_x < x else -1
                self.page = min(max(self._page(plan) + step, 0), self._pages(plan) - 1)
            return
        home = self._home(plan)
        places = [*zip(plan.cells, home.tiles, strict=False), *zip(plan.dock_cells, home.dock, strict=False)]
        for cell, tile in places:
            package = self._phone.packages.get(tile.package)
            if cell.holds(x, y) and package is not None:
                self._activities.start(package)
                return

    def _touch_recents(self, plan: Layout, x: int, y: int) -> None:
        running = self._activities.running()
        if running and plan.clear_all.holds(x, y):
            for app in running:
                self._activities.stop(app.package.name)
            self._activities.home()
            return
        for card, app in zip(plan.cards, running, strict=False):
            if card.holds(x, y):
                self._activities.start(app.package)
                return

    def _touch_app(self, plan: Layout, app: RunningApp, start: tuple[int, int], end: tuple[int, int]) -> None:
        kind = _KINDS.get(app.package.name, "app")
        fields = {"app": plan.field, "notes": plan.page, "browser": plan.address}
        app.focused = kind in fields and fields[kind].holds(*start)
        if kind != "app":
            return
        if plan.counter.holds(*start) and plan.counter.holds(*end):
            app.taps += 1
        elif plan.canvas.holds(*start):
            app.mark(Mark(*_within(plan.canvas, *start), *_within(plan.canvas, *end)))

    def _shown(self) -> Home | AppScene | Recents:
        app = self._activities.front
        if app is not None:
            return self._app_scene(app)
        if self._activities.view is View.RECENTS:
            return Recents(tuple(self._app_scene(app) for app in self._activities.running()))
        return self._home(layout(*self.display.size))

    def _pages(self, plan: Layout) -> int:
        return max(1, -(-len(self._phone.packages.shown()) // len(plan.cells)))

    def _page(self, plan: Layout) -> int:
        """The page on the screen: the wanted one may be gone with the app that was on it."""
        return min(self.page, self._pages(plan) - 1)

    def _home(self, plan: Layout) -> Home:
        page = self._page(plan)
        shown = self._phone.packages.shown()[page * len(plan.cells) : (page + 1) * len(plan.cells)]
        return Home(
            tiles=tuple(self._tile(package.name) for package in shown),
            dock=tuple(self._tile(name) for name in _DOCK),
            page=page,
            pages=self._pages(plan),
        )

    def _tile(self, name: str) -> Tile:
        package = self._phone.packages.get(name)
        return Tile(name, package.label if package else name, self._phone.packages.icon(name))

    def _app_scene(self, app: RunningApp) -> AppScene:
        package = app.package
        kind = _KINDS.get(package.name, "app")
        return AppScene(
            kind=kind,
            tile=self._tile(package.name),
            version=package.version_name,
            text=app.text,
            taps=app.taps,
            focused=app.focused,
            marks=tuple(app.marks),
            rows=self._settings_rows() if kind == "settings" else (),
        )

    def _settings_rows(self) -> tuple[tuple[str, str], ...]:
        phone, (width, height) = self._phone, self.display.size
        charging = ", charging" if phone.battery.charging else ""
        return (
            ("Phone name", phone.model.name),
            ("Kind", "Simulated phone"),
            ("Android version", phone.model.android_version),
            ("Screen", f"{width} × {height} pixels, {self.display.density} dpi"),
            ("Battery", f"{phone.battery.level}%{charging}"),
            ("Installed apps", str(len(phone.packages.shown()))),
            ("Identifier", phone.model.id),
        )

    def _log(self, message: str) -> None:
        self._phone.log.write(
            "InputDispatcher", message, priority=Priority.DEBUG, process=1421, buffer="system"
        )


def _within(box: Box, x: int, y: int) -> tuple[int, int]:
    """A place in thousandths of a box, kept inside it."""
    return (
        min(max((x - box.left) * 1000 // box.width, 0), 1000),
        min(max((y - box.top) * 1000 // box.height, 0), 1000),
    )


def _png(scene: Scene) -> bytes:
    from phones.simulator.painting import paint  # Pillow costs a phone that nobody looks at 10 MB

    out = io.BytesIO()
    paint(scene).save(out, "PNG", compress_level=1)
    return out.getvalue()


def _raw(scene: Scene) -> bytes:
    from phones.simulator.painting import paint

    header = struct.pack("<4I", scene.width, scene.height, RGBA_8888, SRGB)
    return header + paint(scene).convert("RGBA").tobytes()
