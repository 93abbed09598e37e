"""Which apps run on the phone, which one is in front, and what a person has done in each."""

from dataclasses import dataclass, field
from enum import StrEnum
from typing import Literal

from phones.simulator.clock import Clock
from phones.simulator.logcat import Log, Priority
from phones.simulator.packages import LAUNCHER_APP, Package, Packages

MAX_TEXT = 2000
MAX_MARKS = 40
FIRST_PROCESS = 3100
SYSTEM_SERVER_PROCESS = 1421


class View(StrEnum):
    """What fills the screen."""

    HOME = "home"
    APP = "app"
    RECENTS = "recents"


@dataclass(frozen=True, slots=True)
class Mark:
    """A touch inside an app, in thousandths of the drawing area's width and height."""

    x: int
    y: int
    to_x: int
    to_y: int


@dataclass(slots=True)
class RunningApp:
    """A running app. `focused` is whether its text field takes what is typed."""

    package: Package
    process: int
    started_at: float
    text: str = ""
    taps: int = 0
    focused: bool = False
    marks: list[Mark] = field(default_factory=list)

    def type(self, text: str) -> None:
        """Put text into the field; the oldest part is kept when it is full."""
        self.text = (self.text + text)[:MAX_TEXT]

    def erase(self) -> None:
        self.text = self.text[:-1]

    def mark(self, mark: Mark) -> None:
        self.marks = [*self.marks, mark][-MAX_MARKS:]


class Activities:
    """The running apps, the one used last at the end."""

    def __init__(self, packages: Packages, log: Log, clock: Clock) -> None:
        self._packages = packages
        self._log = log
        self._clock = clock
        self._running: dict[str, RunningApp] = {}
        self._next_process = FIRST_PROCESS
        self.view = View.HOME
        packages.removed = self.stop

    def running(self) -> list[RunningApp]:
        """Every running app, the one used last first."""
        return list(reversed(self._running.values()))

    @property
    def front(self) -> RunningApp | None:
        """The app that fills the screen."""
        return next(reversed(self._running.values()), None) if self.view is View.APP else None

    @property
    def component(self) -> str:
        """`package/.Activity` of what has the focus."""
        package = self.front.package if self.front else self._packages.get(LAUNCHER_APP)
        assert package is not None
        assert package.component is not None
        return package.component

    def start(self, package: Package) -> Literal["started", "brought", "delivered"]:
        """Bring an app with an activity to the front, starting it when it does not run."""
        assert package.component is not None
        before = self.front
        app = self._running.pop(package.name, None)
        outcome: Literal["started", "brought", "delivered"] = "brought"
        if app is None:
            app = RunningApp(package, self._new_process(), self._clock.monotonic())
            outcome = "started"
        elif app is before:
            outcome = "delivered"
        self._running[package.name] = app
        self.view = View.APP
        self._log_start(app, outcome)
        return outcome

    def stop(self, name: str) -> None:
        """End an app; one that does not run is no error."""
        was_front = self.front is not None and self.front.package.name == name
        app = self._running.pop(name, None)
        if app is None:
            return
        self._system_log("ActivityManager", f"Force stopping {name} appid={app.package.user_id} user=0")
        self._system_log("ActivityManager", f"Killing {app.process}:{name}/u0a (adj 0): stop {name}")
        if was_front:
            self.home()

    def home(self) -> None:
        """Show the home screen; apps keep running."""
        if self.front is not None:
            self.front.focused = False
        if self.view is not View.HOME:
            self.view = View.HOME
            self._system_log("ActivityTaskManager", f"START u0 {{act=MAIN cat=[HOME] cmp={self.component}}}")

    def back(self) -> None:
        """Leave the text field, or what is in front."""
        if self.front is not None and self.front.focused:
            self.front.focused = False
        else:
            self.home()

    def recents(self) -> None:
        """Show the running apps, or hide them again."""
        if self.front is not None:
            self.front.focused = False
        self.view = View.HOME if self.view is View.RECENTS else View.RECENTS

    def _new_process(self) -> int:
        self._next_process += 17
        return self._next_process

    def _log_start(self, app: RunningApp, outcome: str) -> None:
        component = app.package.component
        self._system_log(
            "ActivityTaskManager",
            "START u0 {act=android.intent.action.MAIN cat=[android.intent.category.LAUNCHER]"
            f" cmp={component}}} from uid 2000",
        )
        if outcome == "started":
            self._system_log(
                "ActivityManager",
                f"Start proc {app.process}:{app.package.name}/u0a{app.package.user_id - 10000}"
                f" for top-activity {{{component}}}",
            )
        if outcome != "delivered":
            self._system_log("ActivityTaskManager", f"Displayed {component}: +{120 + app.process % 90}ms")

    def _system_log(self, tag: str, message: str) -> None:
        self._log.write(tag, message, priority=Priority.INFO, process=SYSTEM_SERVER_PROCESS, buffer="system")
