"""What every kind of machine that runs phones can do.

A runtime owns the phones of one installation on one machine: containers of a Docker engine, or
local processes. It knows no owner and no price; whoever uses it writes down what it wants first
and calls again after a crash, so every operation here may be repeated.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from datetime import datetime
from enum import StrEnum
from typing import Final, Literal, Protocol

RuntimeName = Literal["docker", "simulated"]

LOCAL_NODE: Final = "local"
"""The one machine there is today; whatever names a phone's place names its node beside it."""


class RuntimeFault(Exception):
    """The machine could not do what was asked; the text is fit for the phone's owner."""


class RuntimeUnavailable(RuntimeFault):
    """The machine itself does not answer; the phone's fate is unknown, ask again later."""


class MachineFault(RuntimeFault):
    """The machine failed, or the phone did for no reason of its own: the machine may be going down."""


class PortTaken(RuntimeFault):
    """Somebody else listens on one of the phone's ports; `port` is a host port."""

    def __init__(self, port: int) -> None:
        super().__init__(f"port {port} is in use by another program")
        self.port = port


@dataclass(frozen=True, slots=True)
class PortTriple:
    """The host ports allotted to one phone."""

    adb: int
    webrtc: int
    scrcpy: int


@dataclass(frozen=True, slots=True)
class PhoneSpec:
    """All a runtime needs to know to make a phone. `id` is a UUID and names it for ever.

    `inner_ports` are those on which the phone itself listens; 0 is one that its image does not have.
    """

    id: str
    name: str
    image_kind: Literal["redroid", "simulated"]
    image_reference: str
    android_version: str
    cpus: float
    memory_mb: int
    width: int
    height: int
    dpi: int
    bind_address: str
    ports: PortTriple
    node: str = LOCAL_NODE
    inner_ports: PortTriple = PortTriple(adb=5555, webrtc=0, scrcpy=0)
    fps: int = 30
    gpu_mode: str = "guest"
    pids_limit: int = 4096
    log_mb: int = 10


class PhoneStatus(StrEnum):
    """What the machine says of a phone, as opposed to what its owner wants."""

    RUNNING = "running"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class FoundPhone:
    """A phone the machine has, whoever remembers it.

    `ports` is None where it is stopped. `run` names its present run where the machine tells runs apart: a
    phone that ended and came up again by itself has another. `place` is the machine's own name for it, and
    `is_stray` says that it stands where no phone of this id should. `is_altered` says that somebody changed
    its limits.
    """

    id: str
    status: PhoneStatus
    ports: PortTriple | None
    node: str = LOCAL_NODE
    place: str = ""
    run: str | None = None
    created_at: datetime | None = field(default=None, compare=False)
    is_stray: bool = False
    is_altered: bool = False
    has_restarted: bool = False


@dataclass(frozen=True, slots=True)
class PhoneStats:
    """What a running phone uses now. Network figures count since it started."""

    cpu_percent: float
    memory_bytes: int
    memory_limit_bytes: int
    rx_bytes: int
    tx_bytes: int


class Runtime(Protocol):
    """One machine's phones. Every method raises RuntimeUnavailable when the machine is away."""

    name: RuntimeName
    epoch: int
    """Rises whenever the machine was lost sight of, so that phones may have ended unseen."""

    async def open(self) -> None:
        """Get ready and adopt the phones that outlived the last process. A machine may be away."""

    async def close(self) -> None:
        """Let go of everything held here. Phones keep running."""

    async def check(self) -> None:
        """Raises RuntimeUnavailable, within 3 s, where the machine does not answer."""

    def trouble(self) -> str:
        """Why the machine does not answer, as far as is known without asking it; nothing where it does."""

    def is_exposed(self) -> bool:
        """Whether phones can reach the machine's own services, because they could not be kept from it."""

    def fetch(self, spec: PhoneSpec) -> AsyncIterator[int]:
        """Bring the phone's image to the machine; yields the percentage that is there, from time to time.

        Yields nothing where it is there already. Raises RuntimeFault where it cannot be had.
        """

    async def create(self, spec: PhoneSpec) -> None:
        """Make the phone's storage and whatever else must stand before `start`; repeatable.

        Raises RuntimeFault where its data was made by a newer Android.
        """

    async def start(self, spec: PhoneSpec) -> None:
        """Bring the phone up on `spec.ports`; a running one is left as it is.

        Returns when the phone's process or container runs, not when Android is up. Raises
        PortTaken when one of its ports belongs to somebody else.
        """

    async def stop(self, phone_id: str) -> None:
        """Bring the phone down and keep its data; a stopped or unknown one is no error."""

    async def wipe(self, phone_id: str) -> None:
        """Throw away a stopped phone's data, so that it starts like new."""

    async def remove(self, phone_id: str) -> None:
        """Bring the phone down and forget it with its data; an unknown one is no error."""

    async def discard(self, found: FoundPhone) -> None:
        """Take one phone off the machine that nobody remembers, and leave its data."""

    async def limit(self, spec: PhoneSpec) -> None:
        """Set a running phone's limits again as the spec has them."""

    async def inspect(self, phone_id: str) -> FoundPhone | None:
        """What the machine has under this id."""

    async def log(self, phone_id: str, lines: int) -> list[str]:
        """The last lines that the phone's program or container printed, the oldest first."""

    async def list(self) -> list[FoundPhone]:
        """Every phone of this installation, running or not."""

    async def stats(self, phone_id: str) -> PhoneStats:
        """What a running phone uses now. Raises RuntimeFault when it does not run."""

    def events(self) -> AsyncIterator[str | None]:
        """Ids of phones to which something happened, as it happens; ends when closed.

        None says that the machine is back after it was away, and that anything may have happened.
        """
