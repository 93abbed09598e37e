"""Draws the phone's screen with Pillow. A picture depends on its scene alone."""

import hashlib
import io
import math
from functools import lru_cache

from PIL import Image, ImageDraw, ImageFilter

from phones.simulator import fonts
from phones.simulator.layout import Box, Layout, layout
from phones.simulator.packages import BROWSER_APP, NOTES_APP, SETTINGS_APP
from phones.simulator.scene import AppScene, Home, Recents, Scene, Tile

Colour = tuple[int, int, int]

WHITE: Colour = (255, 255, 255)
INK: Colour = (28, 32, 44)
SOFT_INK: Colour = (96, 104, 122)
PAPER: Colour = (245, 246, 250)
LINE: Colour = (218, 222, 232)
ACCENT: Colour = (43, 98, 214)
AMBER: Colour = (255, 196, 61)
TILE_COLOURS: tuple[Colour, ...] = (
    (43, 98, 214),
    (0, 137, 123),
    (123, 63, 190),
    (214, 73, 94),
    (217, 119, 22),
    (46, 125, 50),
    (84, 96, 122),
)
SMOOTHING = 4


def paint(scene: Scene) -> Image.Image:
    """The screen as an RGB picture. Takes some 30-60 ms; call it in a thread."""
    plan = layout(scene.width, scene.height)
    if scene.shown is None:
        return _dark(scene, plan)
    if isinstance(scene.shown, AppScene):
        board = _Board(Image.new("RGB", (scene.width, scene.height), PAPER), plan)
        _draw_app(board, scene.shown)
        ink = INK
    else:
        board = _Board(_wallpaper(scene.width, scene.height), plan)
        ink = WHITE
        if isinstance(scene.shown, Home):
            _draw_home(board, scene, scene.shown)
        else:
            _draw_recents(board, scene.shown)
    _draw_status(board, scene, ink)
    _draw_navigation(board, ink)
    return board.image


class _Board:
    """A picture in the making, with shapes whose edges are smooth."""

    def __init__(self, image: Image.Image, plan: Layout) -> None:
        self.image = image
        self.plan = plan
        self.draw = ImageDraw.Draw(image)

    def u(self, units: float) -> int:
        return self.plan.length(units)

    def rounded(self, box: Box, radius: float, fill: Colour, opacity: float = 1.0) -> None:
        if box.width <= 0 or box.height <= 0:
            return
        mask = _rounded_mask(box.width, box.height, min(self.u(radius), box.width // 2, box.height // 2))
        if opacity < 1:
            mask = mask.point([round(level * opacity) for level in range(256)])
        self.image.paste(fill, (box.left, box.top), mask)

    def framed(self, box: Box, radius: float, fill: Colour, frame: Colour, thickness: float) -> None:
        self.rounded(box, radius, frame)
        self.rounded(box.inset(self.u(thickness)), radius - thickness, fill)

    def disc(self, middle: tuple[float, float], radius: float, fill: Colour, opacity: float = 1.0) -> None:
        """A circle; `radius` in units, `middle` in pixels."""
        r = self.u(radius)
        x, y = round(middle[0]), round(middle[1])
        self.rounded(Box(x - r, y - r, x + r, y + r), radius, fill, opacity)

    def text(
        self,
        at: tuple[float, float],
        text: str,
        size: float,
        fill: Colour,
        *,
        align: str = "left",
        width: float | None = None,
        weight: float = 0,
    ) -> None:
        """One line of `size` units, cut to `width` pixels."""
        pixels = self.u(size)
        line = fonts.shortened(text, pixels, width) if width is not None else text
        fonts.draw_line(self.draw, at, line, pixels, fill, align=align, weight=weight * self.plan.unit)

    def icon(self, box: Box, tile: Tile) -> None:
        picture = _icon(tile, box.width)
        self.image.paste(picture, (box.left, box.top), picture)


def _dark(scene: Scene, plan: Layout) -> Image.Image:
    board = _Board(Image.new("RGB", (scene.width, scene.height), (0, 0, 0)), plan)
    board.text(
        (scene.width / 2, scene.height - board.u(40)),
        "simulated · screen off",
        11,
        (70, 70, 70),
        align="middle",
    )
    return board.image


def _draw_status(board: _Board, scene: Scene, ink: Colour) -> None:
    u, middle = board.u, board.plan.status.middle[1]
    board.text((u(16), middle), scene.time, 13, ink, weight=0.25)
    left = u(16) + u(48)
    pill = Box(left, middle - u(8.5), left + u(70), middle + u(8.5))
    board.rounded(pill, 9, AMBER)
    board.text(pill.middle, "simulated", 11, (60, 40, 0), align="middle", weight=0.2)
    right = scene.width - u(16)
    percent = f"{scene.battery_percent}%"
    board.text((right, middle), percent, 12, ink, align="right", weight=0.2)
    right -= round(fonts.width_of(percent, u(12))) + u(6)
    _draw_battery(board, Box(right - u(10), middle - u(8), right, middle + u(8)), scene, ink)
    _draw_waves(board, (right - u(26), middle + u(6)), ink)


def _draw_battery(board: _Board, box: Box, scene: Scene, ink: Colour) -> None:
    u = board.u
    board.rounded(Box(box.left + u(3), box.top, box.right - u(3), box.top + u(3)), 1, ink)
    body = Box(box.left, box.top + u(2), box.right, box.bottom)
    board.rounded(body, 2, ink, 0.35)
    filled = round(body.height * scene.battery_percent / 100)
    board.rounded(Box(body.left, body.bottom - filled, body.right, body.bottom), 2, ink)
    if scene.charging:
        x, y = body.middle
        bolt = [
            (x + u(1), y - u(5)),
            (x - u(3), y + u(1)),
            (x, y + u(1)),
            (x - u(1), y + u(5)),
            (x + u(3), y - u(1)),
            (x, y - u(1)),
        ]
        board.draw.polygon(bolt, fill=AMBER)


def _draw_waves(board: _Board, foot: tuple[int, int], ink: Colour) -> None:
    """The sign of a wireless network: arcs above a dot."""
    u = board.u
    size = u(22) * SMOOTHING
    mask = Image.new("L", (size, size), 0)
    draw = ImageDraw.Draw(mask)
    for radius in (0.95, 0.62, 0.3):
        reach = round(size / 2 * radius)
        box = (size // 2 - reach, size - reach - size // 4, size // 2 + reach, size + reach - size // 4)
        draw.arc(box, 225, 315, fill=255, width=round(size * 0.085))
    small = mask.resize((u(22), u(22)), Image.Resampling.LANCZOS)
    board.image.paste(ink, (foot[0] - u(11), foot[1] - u(16)), small)
    board.disc((foot[0], foot[1] - u(1)), 1.6, ink)


def _draw_navigation(board: _Board, ink: Colour) -> None:
    plan, u = board.plan, board.u
    size = u(18)
    sheet = Image.new("L", (size * SMOOTHING, size * SMOOTHING), 0)
    whole, thick = size * SMOOTHING, u(1.8) * SMOOTHING
    draw = ImageDraw.Draw(sheet)
    for box, name in ((plan.back, "back"), (plan.home, "home"), (plan.recents, "recents")):
        draw.rectangle((0, 0, whole, whole), fill=0)
        if name == "back":
            points = [(whole * 0.8, whole * 0.12), (whole * 0.2, whole * 0.5), (whole * 0.8, whole * 0.88)]
            draw.line([*points, points[0], points[1]], fill=255, width=thick, joint="curve")
        elif name == "home":
            draw.ellipse((thick, thick, whole - thick, whole - thick), outline=255, width=thick)
        else:
            edge = whole * 0.14
            draw.rounded_rectangle(
                (edge, edge, whole - edge, whole - edge), thick * 1.5, outline=255, width=thick
            )
        x, y = box.middle
        small = sheet.resize((size, size), Image.Resampling.LANCZOS)
        board.image.paste(ink, (x - size // 2, y - size // 2), small)


def _draw_home(board: _Board, scene: Scene, home: Home) -> None:
    plan, u = board.plan, board.u
    if plan.clock.height > u(60):
        x, top = plan.clock.middle[0], plan.clock.top
        board.text((x, top + u(40)), scene.time, 62, WHITE, align="middle")
        board.text((x, top + u(88)), scene.date, 15, WHITE, align="middle")
    for cell, tile in zip(plan.cells, home.tiles, strict=False):
        _draw_tile(board, cell, tile)
    if home.pages > 1:
        x, y = plan.dots.middle
        for page in range(home.pages):
            place = x + (page - (home.pages - 1) / 2) * u(12)
            board.disc((place, y), 3, WHITE, 1.0 if page == home.page else 0.4)
    board.rounded(plan.dock, 28, WHITE, 0.2)
    for cell, tile in zip(plan.dock_cells, home.dock, strict=False):
        _draw_tile(board, cell, tile)


def _draw_tile(board: _Board, cell: Box, tile: Tile) -> None:
    u = board.u
    size = u(52)
    x = cell.middle[0]
    top = cell.top + u(4)
    board.icon(Box(x - size // 2, top, x - size // 2 + size, top + size), tile)
    at = (x, top + size + u(11))
    board.text(
        (at[0], at[1] + u(0.7)), tile.label, 11.5, (20, 28, 60), align="middle", width=cell.width - u(4)
    )
    board.text(at, tile.label, 11.5, WHITE, align="middle", width=cell.width - u(4))


def _draw_recents(board: _Board, recents: Recents) -> None:
    plan, u = board.plan, board.u
    board.text((u(24), plan.content.top + u(28)), "Recent apps", 20, WHITE)
    if not recents.apps:
        board.text(plan.content.middle, "No recent apps", 16, WHITE, align="middle")
        return
    for card, app in zip(plan.cards, recents.apps, strict=False):
        board.rounded(card, 18, PAPER)
        size = u(48)
        top = card.middle[1] - size // 2
        board.icon(Box(card.left + u(16), top, card.left + u(16) + size, top + size), app.tile)
        left, room = card.left + u(80), card.width - u(96)
        board.text((left, card.middle[1] - u(10)), app.tile.label, 16, INK, width=room, weight=0.2)
        detail = app.text.replace("\n", " ") or f"{app.tile.package} {app.version}"
        board.text((left, card.middle[1] + u(12)), detail, 12, SOFT_INK, width=room)
    board.rounded(plan.clear_all, 22, WHITE, 0.9)
    board.text(plan.clear_all.middle, "Clear all", 14, INK, align="middle")


def _draw_app(board: _Board, app: AppScene) -> None:
    plan, u = board.plan, board.u
    board.draw.rectangle((0, 0, plan.width, plan.title.bottom), fill=WHITE)
    board.draw.rectangle((0, plan.title.bottom, plan.width, plan.title.bottom + u(0.6)), fill=LINE)
    size = u(44)
    top = plan.title.middle[1] - size // 2
    board.icon(Box(u(16), top, u(16) + size, top + size), app.tile)
    left, room = u(72), plan.width - u(88)
    board.text((left, plan.title.middle[1] - u(11)), app.tile.label, 19, INK, width=room, weight=0.25)
    detail = f"{app.tile.package}  {app.version}".rstrip()
    board.text((left, plan.title.middle[1] + u(13)), detail, 11.5, SOFT_INK, width=room)
    if app.kind == "settings":
        _draw_rows(board, plan.page, app)
    elif app.kind == "notes":
        _draw_field(board, plan.page, app, "Tap to write a note")
    elif app.kind == "browser":
        _draw_field(board, plan.address, app, "Search or type a web address")
        _draw_notice(board, plan.below_address)
    else:
        _draw_field(board, plan.field, app, "Tap here and type")
        _draw_counter(board, app)
        _draw_canvas(board, app)


def _draw_field(board: _Board, box: Box, app: AppScene, hint: str) -> None:
    u = board.u
    board.framed(box, 14, WHITE, ACCENT if app.focused else LINE, 2 if app.focused else 1)
    size, step = u(16), u(23)
    inner = box.inset(u(13))
    room = max(1, (inner.height + u(6)) // step)
    lines = fonts.wrapped(app.text, size, inner.width - u(4))[-room:]
    first = box.middle[1] if room == 1 else inner.top + step // 2
    if not app.text and not app.focused:
        board.text((inner.left, first), hint, 16, (150, 156, 172), width=inner.width)
    for place, line in enumerate(lines):
        board.text((inner.left, first + place * step), line, 16, INK)
    if app.focused:
        x = inner.left + round(fonts.width_of(lines[-1], size)) + u(1)
        y = first + (len(lines) - 1) * step
        board.draw.rectangle((x, y - u(10), x + u(1.6), y + u(10)), fill=ACCENT)


def _draw_counter(board: _Board, app: AppScene) -> None:
    box = board.plan.counter
    board.rounded(box, 24, ACCENT)
    times = "once" if app.taps == 1 else f"{app.taps} times"
    board.text(box.middle, f"Tapped {times}" if app.taps else "Tap me", 16, WHITE, align="middle", weight=0.2)


def _draw_canvas(board: _Board, app: AppScene) -> None:
    box, u = board.plan.canvas, board.u
    board.framed(box, 14, WHITE, LINE, 1)
    if not app.marks:
        board.text(box.middle, "Touch or draw here", 14, (150, 156, 172), align="middle")
    for place, mark in enumerate(app.marks, start=1):
        start = _on(box, mark.x, mark.y)
        end = _on(box, mark.to_x, mark.to_y)
        newest = place == len(app.marks)
        colour = ACCENT if newest else (150, 178, 232)
        if start != end:
            board.draw.line([start, end], fill=colour, width=u(3.5))
            board.disc(start, 1.9, colour)
        board.disc(end, 9, colour, 0.25 if newest else 0.12)
        board.disc(end, 4, colour)


def _on(box: Box, x: int, y: int) -> tuple[int, int]:
    return box.left + box.width * x // 1000, box.top + box.height * y // 1000


def _draw_rows(board: _Board, area: Box, app: AppScene) -> None:
    u = board.u
    step = u(54)
    rows = app.rows[: max(1, area.height // step)]
    card = Box(area.left, area.top, area.right, area.top + step * len(rows))
    board.framed(card, 14, WHITE, LINE, 1)
    for place, (name, value) in enumerate(rows):
        middle = area.top + place * step + step // 2
        if place:
            board.draw.rectangle(
                (area.left + u(16), middle - step // 2, area.right - u(16), middle - step // 2), fill=LINE
            )
        board.text((area.left + u(16), middle - u(10)), name, 15, INK)
        board.text((area.left + u(16), middle + u(11)), value, 12, SOFT_INK, width=area.width - u(32))


def _draw_notice(board: _Board, area: Box) -> None:
    u = board.u
    x, y = area.middle
    board.text((x, y - u(12)), "No web pages here", 17, INK, align="middle")
    board.text((x, y + u(14)), "This simulated phone has no network.", 13, SOFT_INK, align="middle")


@lru_cache(maxsize=24)
def _rounded_mask(width: int, height: int, radius: int) -> Image.Image:
    """Opaque but for its rounded corners, which alone are drawn large and made small."""
    mask = Image.new("L", (width, height), 255)
    if radius < 1:
        return mask
    large = Image.new("L", (radius * 2 * SMOOTHING, radius * 2 * SMOOTHING), 0)
    ImageDraw.Draw(large).ellipse((0, 0, large.width - 1, large.height - 1), fill=255)
    disc = large.resize((radius * 2, radius * 2), Image.Resampling.LANCZOS)
    for x, left in ((0, 0), (width - radius, radius)):
        for y, top in ((0, 0), (height - radius, radius)):
            mask.paste(disc.crop((left, top, left + radius, top + radius)), (x, y))
    return mask


def _wallpaper(width: int, height: int) -> Image.Image:
    """A calm blend of colours: a few blurred discs, drawn small and stretched, which costs no detail."""
    small = Image.new("RGB", (45, 80), (38, 52, 110))
    draw = ImageDraw.Draw(small)
    for x, y, radius, colour in (
        (4, 6, 30, (58, 84, 168)),
        (44, 22, 26, (92, 82, 176)),
        (6, 58, 28, (24, 98, 140)),
        (40, 74, 30, (30, 60, 120)),
        (22, 40, 12, (70, 96, 190)),
    ):
        draw.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return small.filter(ImageFilter.GaussianBlur(10)).resize((width, height), Image.Resampling.BICUBIC)


@lru_cache(maxsize=32)
def _icon(tile: Tile, size: int) -> Image.Image:
    """An app's icon in a rounded square; a letter on a colour where it has none."""
    drawn = {SETTINGS_APP: _gear, NOTES_APP: _note, BROWSER_APP: _globe}.get(tile.package)
    if drawn is not None:
        face = drawn(size * SMOOTHING).resize((size, size), Image.Resampling.LANCZOS)
    else:
        face = _own_icon(tile, size) or _letter(tile, size)
    face.putalpha(_rounded_mask(size, size, round(size * 0.26)))
    return face


def _own_icon(tile: Tile, size: int) -> Image.Image | None:
    """The app's own bitmap on white, so that one with a clear ground keeps its shape."""
    if tile.icon is None:
        return None
    try:
        bitmap = Image.open(io.BytesIO(tile.icon), formats=("PNG",)).convert("RGBA")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):
        return None
    face = Image.new("RGBA", (size, size), (*WHITE, 255))
    clear = any(bitmap.getchannel("A").histogram()[:128])
    room = round(size * 0.8) if clear else size
    bitmap = bitmap.resize((room, room), Image.Resampling.LANCZOS)
    face.alpha_composite(bitmap, ((size - room) // 2, (size - room) // 2))
    return face.convert("RGB")


def _letter(tile: Tile, size: int) -> Image.Image:
    digest = hashlib.sha256(tile.package.encode()).digest()
    face = Image.new("RGB", (size, size), TILE_COLOURS[digest[0] % len(TILE_COLOURS)])
    letter = next((sign for sign in tile.label if sign.isalnum()), "?").upper()
    fonts.draw_line(
        ImageDraw.Draw(face), (size / 2, size / 2), letter, round(size * 0.5), WHITE, align="middle"
    )
    return face


def _gear(size: int) -> Image.Image:
    face = Image.new("RGB", (size, size), (84, 96, 122))
    draw = ImageDraw.Draw(face)
    middle = size / 2
    for tooth in range(8):
        angle = tooth * math.pi / 4
        tip = (middle + math.cos(angle) * size * 0.33, middle + math.sin(angle) * size * 0.33)
        draw.line([(middle, middle), tip], fill=WHITE, width=round(size * 0.12))
    _circle(draw, middle, size * 0.25, WHITE)
    _circle(draw, middle, size * 0.11, (84, 96, 122))
    return face


def _note(size: int) -> Image.Image:
    face = Image.new("RGB", (size, size), (250, 204, 84))
    draw = ImageDraw.Draw(face)
    draw.rounded_rectangle((size * 0.24, size * 0.2, size * 0.76, size * 0.8), size * 0.06, fill=WHITE)
    for line, end in ((0.36, 0.66), (0.48, 0.66), (0.6, 0.54)):
        draw.line(
            [(size * 0.34, size * line), (size * end, size * line)], fill=(196, 150, 30), width=size // 22
        )
    return face


def _globe(size: int) -> Image.Image:
    face = Image.new("RGB", (size, size), (36, 132, 220))
    draw = ImageDraw.Draw(face)
    thick = size // 22
    edge, far = size * 0.22, size * 0.78
    draw.ellipse((edge, edge, far, far), outline=WHITE, width=thick)
    draw.ellipse((size * 0.38, edge, size * 0.62, far), outline=WHITE, width=thick)
    for line in (0.41, 0.59):
        draw.line([(size * 0.25, size * line), (size * 0.75, size * line)], fill=WHITE, width=thick)
    return face


def _circle(draw: ImageDraw.ImageDraw, middle: float, radius: float, fill: Colour) -> None:
    draw.ellipse((middle - radius, middle - radius, middle + radius, middle + radius), fill=fill)
