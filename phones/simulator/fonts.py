"""Text on the phone's screen: Pillow's own Latin font, and what the host has for other scripts.

Pillow brings a font with Latin letters alone. For every other character the first font found on the host
that has it is taken; where there is none, an empty box is drawn, as a phone without that font would.
"""

import os
from collections.abc import Iterator
from functools import lru_cache
from pathlib import Path

from PIL import ImageDraw, ImageFont

Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

_DIRECTORIES = (
    "/usr/share/fonts",
    "/usr/local/share/fonts",
    "/System/Library/Fonts",
    "/Library/Fonts",
)
_CHINESE = (
    "NotoSansCJK-Regular.ttc",
    "NotoSansCJKsc-Regular.otf",
    "NotoSansSC-Regular.otf",
    "NotoSansSC-Regular.ttf",
    "SourceHanSansSC-Regular.otf",
    "SourceHanSansCN-Regular.otf",
    "wqy-microhei.ttc",
    "wqy-zenhei.ttc",
    "DroidSansFallbackFull.ttf",
    "DroidSansFallback.ttf",
    "PingFang.ttc",
    "Hiragino Sans GB.ttc",
    "STHeiti Light.ttc",
    "uming.ttc",
)
_WANTED = (
    "NotoSans-Regular.ttf",
    "DejaVuSans.ttf",
    "LiberationSans-Regular.ttf",
    *_CHINESE,
    "NotoSansArabic-Regular.ttf",
    "NotoSansHebrew-Regular.ttf",
    "NotoSansDevanagari-Regular.ttf",
    "NotoSansThai-Regular.ttf",
    "Arial Unicode.ttf",
)
_MISSING = "\U0010fffe"
_PROBE_SIZE = 16


@lru_cache(maxsize=1)
def _paths() -> tuple[str, ...]:
    """The host's fonts in the order in which they are asked; "" is Pillow's own."""
    found: dict[str, str] = {}
    for directory in _DIRECTORIES:
        for parent, _, names in os.walk(directory):
            for name in names:
                found.setdefault(name, str(Path(parent) / name))
    return ("", *(found[name] for name in _WANTED if name in found))


def carried() -> list[Path]:
    """The host's fonts that a phone would take along to another machine: of the Chinese ones, each of
    which has some 10 MB, the first alone.
    """
    found = [Path(path) for path in _paths() if path]
    chinese = [path for path in found if path.name in _CHINESE]
    return [path for path in found if path not in chinese[1:]]


@lru_cache(maxsize=24)
def _font(path: str, size: int) -> Font:
    return ImageFont.truetype(path, size) if path else ImageFont.load_default(size)


@lru_cache(maxsize=2048)
def _path_for(character: str) -> str:
    """The first font that has the character; Pillow's own where none has."""
    if character.isspace():
        return ""
    for path in _paths():
        font = _font(path, _PROBE_SIZE)
        if bytes(font.getmask(character)) != bytes(font.getmask(_MISSING)):
            return path
    return _paths()[-1] if len(_paths()) > 1 else ""


def _runs(text: str) -> Iterator[tuple[str, str]]:
    """Neighbouring characters of one font together."""
    start = 0
    for place in range(1, len(text) + 1):
        if place == len(text) or _path_for(text[place]) != _path_for(text[start]):
            yield _path_for(text[start]), text[start:place]
            start = place


def width_of(text: str, size: int) -> float:
    """The width of a line in pixels."""
    return sum(_font(path, size).getlength(run) for path, run in _runs(text))


def shortened(text: str, size: int, width: float) -> str:
    """The line, cut with an ellipsis where it is wider than `width` pixels."""
    if width_of(text, size) <= width:
        return text
    low, high = 0, len(text)
    while low < high:
        half = (low + high + 1) // 2
        if width_of(text[:half].rstrip() + "…", size) <= width:
            low = half
        else:
            high = half - 1
    return text[:low].rstrip() + "…"


def wrapped(text: str, size: int, width: float) -> list[str]:
    """The text in lines of at most `width` pixels, broken at spaces where there are some."""
    lines: list[str] = []
    for paragraph in text.split("\n"):
        line = ""
        for character in paragraph:
            if not line or width_of(line + character, size) <= width:
                line += character
                continue
            kept, space, rest = line.rpartition(" ")
            if space and kept and character != " ":
                lines.append(kept)
                line = rest + character
            else:
                lines.append(line)
                line = character.lstrip()
        lines.append(line)
    return lines


def draw_line(
    draw: ImageDraw.ImageDraw,
    at: tuple[float, float],
    text: str,
    size: int,
    fill: tuple[int, ...],
    *,
    align: str = "left",
    weight: float = 0,
) -> None:
    """Draw one line; `at` is its middle in height, and its left, middle or right end by `align`."""
    x, y = at
    if align != "left":
        width = width_of(text, size)
        x -= width / 2 if align == "middle" else width
    baseline = y + size * 0.36
    for path, run in _runs(text):
        font = _font(path, size)
        draw.text((x, baseline), run, font=font, fill=fill, anchor="ls", stroke_width=weight)
        x += font.getlength(run)
