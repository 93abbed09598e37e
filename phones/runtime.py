"""What every kind of machine that runs phones can do.

A runtime owns the phones of one installation on one machine: containers of a Docker engine, or
local processes. It knows no owner and no price; whoever uses it writes down what it wants first
and calls again after a crash, so every operation here may be repeated.
"""

from collections.abc import AsyncIterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol

RuntimeName = Literal["docker", "simulated"]


class RuntimeFault(Exception):
    """The machine could not do what was asked; the text is fit for the phone's owner."""


class RuntimeUnavailable(RuntimeFault):
    """The machine itself does not answer; the phone's fate is unknown, ask again later."""


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
    """All a runtime needs to know to make a phone. `id` is a UUID and names it for ever."""

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


class PhoneStatus(StrEnum):
    """What the machine says of a phone, as opposed to what its owner wants."""

    RUNNING = "running"
    STOPPED = "stopped"


@dataclass(frozen=True, slots=True)
class FoundPhone:
    """A phone the machine has, whoever remembers it. `ports` is None where it is stopped."""

    id: str
    status: PhoneStatus
    ports: PortTriple | None


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

    async def open(self) -> None:
        """Get ready and adopt the phones that outlived the last process."""

    async def close(self) -> None:
        """Let go of everything held here. Phones keep running."""

    async def create(self, spec: PhoneSpec) -> None:
        """Make the phone's storage and whatever else must stand before `start`; repeatable."""

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

    async def inspect(self, phone_id: str) -> FoundPhone | None:
        """What the machine has under this id."""

    async def list(self) -> list[FoundPhone]:
        """Every phone of this installation, running or not."""

    async def stats(self, phone_id: str) -> PhoneStats:
        """What a running phone uses now. Raises RuntimeFault when it does not run."""

    def events(self) -> AsyncIterator[FoundPhone]:
        """Phones whose status changed by themselves, as it happens; ends when closed."""
