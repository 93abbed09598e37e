"""What a device is: its states, its row as memory holds it, and the models of the API."""

import unicodedata
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, Any, Final, Literal, Self
from uuid import UUID

from pydantic import AfterValidator, Field, RootModel, StringConstraints
from pydantic_core import PydanticCustomError

from phones.runtime import LOCAL_NODE, PhoneSpec, PortTriple, RuntimeName
from plugins.devices.section import ImageSection, PlanSection
from server.api import Incoming, Moment, Outgoing, PageQuery, Query
from server.db import Record
from server.errors import Code
from server.i18n import N_, translate


class DeviceState(StrEnum):
    """Where a device is. The passing ones end by the reconciler's work."""

    CREATING = "creating"
    STARTING = "starting"
    RUNNING = "running"
    STOPPING = "stopping"
    STOPPED = "stopped"
    RESETTING = "resetting"
    DELETING = "deleting"
    FAILED = "failed"


class Wanted(StrEnum):
    """Where a device shall be in the end."""

    RUNNING = "running"
    STOPPED = "stopped"
    DELETED = "deleted"


COMING_UP: Final = frozenset({DeviceState.CREATING, DeviceState.STARTING})
PASSING: Final = COMING_UP | {DeviceState.STOPPING, DeviceState.RESETTING, DeviceState.DELETING}


@dataclass(frozen=True, slots=True)
class Hardware:
    """What a device is made of: its image and plan as they were when it was rented.

    What has a default came later than the oldest rows.
    """

    image_kind: Literal["redroid", "simulated"]
    image_reference: str
    android_version: str
    cpus: float
    memory_mb: int
    width: int
    height: int
    dpi: int
    inner_adb_port: int = 5555
    inner_webrtc_port: int = 0
    inner_scrcpy_port: int = 0
    fps: int = 30
    gpu_mode: str = "guest"
    pids_limit: int = 4096
    log_mb: int = 10

    @classmethod
    def chosen(cls, image: ImageSection, plan: PlanSection) -> Self:
        """The image on the plan."""
        return cls(
            image_kind=image.kind,
            image_reference=image.reference,
            android_version=image.android_version,
            cpus=plan.cpus,
            memory_mb=plan.memory_mb,
            width=plan.width,
            height=plan.height,
            dpi=plan.dpi,
            inner_adb_port=image.adb_port,
            inner_webrtc_port=image.webrtc_port,
            inner_scrcpy_port=image.scrcpy_port,
            fps=image.fps,
            gpu_mode=image.gpu_mode,
            pids_limit=plan.pids_limit,
            log_mb=plan.log_mb,
        )

    def on(self, plan: PlanSection) -> Self:
        """The same image on another plan."""
        return replace(
            self,
            cpus=plan.cpus,
            memory_mb=plan.memory_mb,
            width=plan.width,
            height=plan.height,
            dpi=plan.dpi,
            pids_limit=plan.pids_limit,
            log_mb=plan.log_mb,
        )


@dataclass(frozen=True, slots=True)
class Detail:
    """Why a device is in its state: an N_() message and its values, or nothing."""

    message: str = ""
    params: dict[str, object] = field(default_factory=dict)

    def text(self, locale: str) -> str | None:
        """The sentence in a reader's language; None where there is nothing to say."""
        return translate(locale, self.message, self.params) or None


NOTHING: Final = Detail()
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)


@dataclass(frozen=True, slots=True)
class Rented:
    """A device's row. `generation` rises with each intent; `ports` are held until the phone is gone.

    `run` is the machine's name for the run in which the phone came up: another one began by itself.
    `spent_at` is since when its owner has had nothing to run it with, where it was stopped for that.
    """

    id: UUID
    owner_id: UUID
    name: str
    image: str
    plan: str
    price_per_hour: int
    hardware: Hardware
    state: DeviceState
    wanted: Wanted
    created_at: datetime
    updated_at: datetime
    detail: Detail = NOTHING
    generation: int = 1
    started_at: datetime | None = None
    deletion_warned: bool = False
    spent_at: datetime | None = None
    revived_at: datetime | None = None
    node: str = LOCAL_NODE
    run: str | None = None
    ports: PortTriple | None = None
    shown: "dict[str, Device]" = field(default_factory=dict, compare=False, repr=False)

    @classmethod
    def from_row(cls, row: Record, ports: PortTriple | None) -> Self:
        """The device of a row of `devices`, with what `device_ports` says."""
        values: dict[str, Any] = dict(row)
        detail = Detail(values.pop("detail"), values.pop("detail_params"))
        hardware = Hardware(**values.pop("hardware"))
        state, wanted = DeviceState(values.pop("state")), Wanted(values.pop("wanted_state"))
        return cls(**values, detail=detail, hardware=hardware, state=state, wanted=wanted, ports=ports)

    @property
    def position(self) -> tuple[int, UUID]:
        """Where it stands in a list: by the microseconds of its making."""
        return (self.created_at - _EPOCH) // timedelta(microseconds=1), self.id

    @property
    def is_due(self) -> bool:
        """Whether it runs or is about to, so that its owner must be able to pay for it."""
        return self.state is DeviceState.RUNNING or (self.wanted is Wanted.RUNNING and self.state in PASSING)

    @property
    def needs_work(self) -> bool:
        """Whether the reconciler has something to do: a passing state, or ports of a failed phone."""
        return self.state in PASSING or (self.state is DeviceState.FAILED and self.ports is not None)

    def spec(self, bind_address: str) -> PhoneSpec:
        """What the runtime needs to know."""
        assert self.ports is not None
        made_of = asdict(self.hardware)
        inner = {role: made_of.pop(f"inner_{role}_port") for role in ("adb", "webrtc", "scrcpy")}
        return PhoneSpec(
            id=str(self.id),
            name=self.name,
            bind_address=bind_address,
            ports=self.ports,
            node=self.node,
            inner_ports=PortTriple(**inner),
            **made_of,
        )


class Ports(Outgoing):
    """Where a device is reached, on the address of `devices.bind_address`."""

    adb: int
    webrtc: int
    scrcpy: int


class Device(Outgoing):
    """A rented phone. A `simulated` one runs no app's code, wherever it runs itself."""

    id: UUID
    name: str
    owner_id: UUID
    state: DeviceState
    state_detail: str | None
    image: str
    plan: str
    runtime: RuntimeName
    simulated: bool
    ports: Ports | None
    created_at: Moment
    started_at: Moment | None
    updated_at: Moment


def show(device: Rented, runtime: RuntimeName, locale: str, waits_for: Detail = NOTHING) -> Device:
    """The device as the API gives it; made once a language, as most are read more often than changed.

    What it waits for just now, such as its turn, is not in its row and stands in for a missing detail.
    """
    shown = device.shown.get(locale)
    if shown is None:
        shown = device.shown[locale] = _shown(device, runtime, locale)
    if waits_for != NOTHING and device.detail == NOTHING:
        return shown.model_copy(update={"state_detail": waits_for.text(locale)})
    return shown


def _shown(device: Rented, runtime: RuntimeName, locale: str) -> Device:
    ports = device.ports
    return Device.model_construct(
        id=device.id,
        name=device.name,
        owner_id=device.owner_id,
        state=device.state,
        state_detail=device.detail.text(locale),
        image=device.image,
        plan=device.plan,
        runtime=runtime,
        simulated=runtime == "simulated" or device.hardware.image_kind == "simulated",
        ports=Ports.model_construct(**asdict(ports)) if ports else None,
        created_at=device.created_at,
        started_at=device.started_at,
        updated_at=device.updated_at,
    )


class DeviceImage(Outgoing):
    """An Android to choose."""

    name: str
    kind: Literal["redroid", "simulated"]
    android_version: str


class DevicePlan(Outgoing):
    """A size and its price."""

    name: str
    cpus: float
    memory_mb: int
    width: int
    height: int
    dpi: int
    price_per_hour: int
    currency: str


class DeviceStats(Outgoing):
    """What a running device uses now; network figures count since it started."""

    cpu_percent: float
    memory_bytes: int
    memory_limit_bytes: int
    rx_bytes: int
    tx_bytes: int


class DeviceLog(Outgoing):
    """What a phone's program or container printed, the oldest line first."""

    lines: list[str]


class ShellAnswer(Outgoing):
    """What a command left behind; bytes that are no UTF-8 are replaced."""

    exit_code: int
    stdout: str
    stderr: str


_TURNING: Final = frozenset("\u061c\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069")


def _plain(name: str) -> str:
    if any(
        unicodedata.category(character) in {"Cc", "Zl", "Zp"} or character in _TURNING for character in name
    ):
        raise PydanticCustomError(
            "device_name", N_("The name must not hold control characters or change the writing direction.")
        )
    return name


Name = Annotated[
    str, StringConstraints(strip_whitespace=True, min_length=1, max_length=64), AfterValidator(_plain)
]


class NewDevice(Incoming):
    """What to rent."""

    name: Name
    image: Annotated[str, Field(max_length=64)]
    plan: Annotated[str, Field(max_length=64)]


class DeviceChanges(Incoming):
    """What to change; what is left out stays."""

    name: Name | None = None
    plan: Annotated[str, Field(max_length=64)] | None = None


class DeviceQuery(PageQuery):
    """Which devices."""

    state: DeviceState | None = None


Pixel = Annotated[int, Field(ge=0)]


class Tap(Incoming):
    """A short touch."""

    type: Literal["tap"]
    x: Pixel
    y: Pixel


class Swipe(Incoming):
    """A finger drawn over the screen."""

    type: Literal["swipe"]
    x: Pixel
    y: Pixel
    to_x: Pixel
    to_y: Pixel
    duration_ms: Annotated[int, Field(ge=1, le=10_000)] = 300


class Text(Incoming):
    """Text typed where the phone's cursor is."""

    type: Literal["text"]
    text: Annotated[str, Field(min_length=1, max_length=1000)]


class Key(Incoming):
    """A key by its Android name, with or without KEYCODE_."""

    type: Literal["key"]
    key: Annotated[str, Field(pattern=r"^[A-Z0-9_]{1,40}$")]


class Gesture(RootModel[Annotated[Tap | Swipe | Text | Key, Field(discriminator="type")]]):
    """What a finger or a keyboard does."""


class ShellCommand(Incoming):
    """A command line for the phone's shell."""

    command: Annotated[str, Field(min_length=1, max_length=32_768)]
    timeout_s: Annotated[float, Field(ge=1, le=300)] = 30


MAX_PATH_BYTES: Final = 1000


def _absolute(path: str) -> str:
    if not path.startswith("/"):
        raise PydanticCustomError("phone_path", N_("A path on the phone begins with /."))
    if len(path.encode()) > MAX_PATH_BYTES:
        raise PydanticCustomError("phone_path", N_("A path on the phone has at most 1000 bytes."))
    return path


class FileQuery(Query):
    """Which file or directory of the phone: an absolute path of up to 1000 bytes."""

    path: Annotated[
        str,
        AfterValidator(_absolute),
        Field(json_schema_extra={"pattern": "^/", "maxLength": MAX_PATH_BYTES}),
    ]


class FileKind(StrEnum):
    """What a directory's entry is."""

    FILE = "file"
    DIRECTORY = "directory"
    LINK = "link"
    OTHER = "other"


class PhoneFile(Outgoing):
    """An entry of a directory on the phone; bytes of its name that are no UTF-8 are replaced."""

    name: str
    kind: FileKind
    size_bytes: int
    modified_at: Moment


class DeviceAction(StrEnum):
    """What can be done to many devices at once, each by the rules of its single call."""

    START = "start"
    STOP = "stop"
    RESTART = "restart"
    RESET = "reset"
    DELETE = "delete"


class DeviceActions(Incoming):
    """One action on many devices."""

    action: DeviceAction
    ids: Annotated[list[UUID], Field(min_length=1, max_length=100)]


class ActionDone(Outgoing):
    """The device took the action; `status` is what its single call answers."""

    id: UUID
    status: int


class ActionRefused(ActionDone):
    """The device did not take the action; `status` and `code` are those of its single call's problem."""

    code: Code


class ActionResults(Outgoing):
    """What became of each device, in the order asked."""

    results: list[ActionRefused | ActionDone]
