"""What the screen shows at one moment, as plain values: equal scenes give equal pictures."""

from dataclasses import dataclass
from typing import Literal

from phones.simulator.activities import Mark

AppKind = Literal["app", "notes", "browser", "settings"]


@dataclass(frozen=True, slots=True)
class Tile:
    """An app's face. `icon` is its own PNG, where it has one."""

    package: str
    label: str
    icon: bytes | None


@dataclass(frozen=True, slots=True)
class AppScene:
    """One app as it looks. `rows` are the lines of a settings page."""

    kind: AppKind
    tile: Tile
    version: str
    text: str = ""
    taps: int = 0
    focused: bool = False
    marks: tuple[Mark, ...] = ()
    rows: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Home:
    """One page of the home screen and the row of apps below it."""

    tiles: tuple[Tile, ...]
    dock: tuple[Tile, ...]
    page: int
    pages: int


@dataclass(frozen=True, slots=True)
class Recents:
    """The running apps, the one used last first."""

    apps: tuple[AppScene, ...]


@dataclass(frozen=True, slots=True)
class Scene:
    """The whole screen; `shown` is None while it is off. `time` and `date` are written out."""

    width: int
    height: int
    time: str
    date: str
    battery_percent: int
    charging: bool
    shown: Home | AppScene | Recents | None
