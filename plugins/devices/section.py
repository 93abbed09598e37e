"""The section [devices] of config.toml: where phones run, on which ports, and what can be rented."""

import re
from ipaddress import ip_address
from itertools import combinations
from typing import Annotated, Final, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from server.plugin import Section

NAME_PATTERN: Final = r"^[a-z0-9][a-z0-9._-]{0,63}$"
_VERSION = re.compile(r"\d+(?:\.\d+)?")
_NEWEST_COMMON_VERSION = "12"

Port = Annotated[int, Field(ge=1, le=65535)]


def _rising(ports: tuple[int, int]) -> tuple[int, int]:
    if ports[0] > ports[1]:
        raise ValueError("expected the first and the last port, the lower one first")
    return ports


PortRange = Annotated[tuple[Port, Port], AfterValidator(_rising)]


class ImageSection(Section):
    """[[devices.images]]: an Android to choose. `reference` is an engine's name for it."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    kind: Literal["redroid", "simulated"] = "redroid"
    reference: Annotated[str, Field(pattern=r"^$|^[A-Za-z0-9][A-Za-z0-9._:/@-]{0,254}$")] = ""
    adb_port: Port = 5555
    webrtc_port: Annotated[int, Field(ge=0, le=65535)] = 0
    scrcpy_port: Annotated[int, Field(ge=0, le=65535)] = 0
    fps: Annotated[int, Field(ge=1, le=120)] = 30
    gpu_mode: Literal["auto", "host", "guest"] = "guest"

    @property
    def android_version(self) -> str:
        """The Android version in its name, such as 12 in android-12."""
        found = _VERSION.search(self.name)
        return found[0] if found else _NEWEST_COMMON_VERSION

    @model_validator(mode="after")
    def _a_container_needs_an_image(self) -> Self:
        if self.kind == "redroid" and not self.reference:
            raise ValueError(f"the image {self.name!r} needs a reference")
        return self

    @model_validator(mode="after")
    def _inner_ports_are_told_apart(self) -> Self:
        inner = [port for port in (self.adb_port, self.webrtc_port, self.scrcpy_port) if port]
        if len(set(inner)) < len(inner):
            raise ValueError(f"two ports of the image {self.name!r} are the same")
        return self


class PlanSection(Section):
    """[[devices.plans]]: a size and its price in minor units of billing.currency; 0 = free."""

    name: Annotated[str, Field(pattern=NAME_PATTERN)]
    cpus: Annotated[float, Field(gt=0, le=64)] = 2.0
    memory_mb: Annotated[int, Field(ge=256, le=262144)] = 3072
    width: Annotated[int, Field(ge=200, le=4096)] = 720
    height: Annotated[int, Field(ge=200, le=4096)] = 1280
    dpi: Annotated[int, Field(ge=72, le=640)] = 320
    pids_limit: Annotated[int, Field(ge=64, le=1_000_000)] = 4096
    log_mb: Annotated[int, Field(ge=1, le=1000)] = 10
    price_per_hour: Annotated[int, Field(ge=0, le=10**9)] = 20


class DevicesSection(Section):
    """[devices]"""

    runtime: Literal["auto", "docker", "simulated"] = "auto"
    docker_url: Annotated[str, Field(pattern=r"^$|^(unix|https?|tcp)://")] = ""
    bind_address: str = "127.0.0.1"
    adb_ports: PortRange = (20000, 21999)
    webrtc_ports: PortRange = (22000, 23999)
    scrcpy_ports: PortRange = (24000, 25999)
    max_per_user: Annotated[int, Field(ge=0, le=10000)] = 10
    min_balance_hours: Annotated[int, Field(ge=0, le=10000)] = 1
    allow_public_ports: bool = False
    keep_stopped_days: Annotated[int, Field(ge=1, le=3650)] = 7
    start_deadline_s: Annotated[float, Field(gt=0, le=3600)] = 60
    operations_at_once: Annotated[int, Field(ge=1, le=64)] = 4
    max_file_mb: Annotated[int, Field(ge=1, le=1 << 20)] = 4096
    images: tuple[ImageSection, ...] = (
        ImageSection(name="android-12", reference="redroid/redroid:12.0.0-latest"),
    )
    plans: tuple[PlanSection, ...] = (
        PlanSection(name="basic"),
        PlanSection(
            name="large", cpus=4, memory_mb=4096, width=1080, height=1920, dpi=480, price_per_hour=40
        ),
        PlanSection(name="small", cpus=1, memory_mb=2048, width=540, height=960, dpi=240, price_per_hour=10),
    )

    @model_validator(mode="after")
    def _ports_keep_apart(self) -> Self:
        ranges = {name: getattr(self, name) for name in ("adb_ports", "webrtc_ports", "scrcpy_ports")}
        for (left, (start, end)), (right, (other_start, other_end)) in combinations(ranges.items(), 2):
            if start <= other_end and other_start <= end:
                raise ValueError(f"{left} and {right} overlap")
        return self

    @property
    def is_public(self) -> bool:
        """Whether phones' ports are published on more than a loopback or private address."""
        address = ip_address(self.bind_address)
        return address.is_unspecified or not address.is_private

    @model_validator(mode="after")
    def _ports_stay_private(self) -> Self:
        try:
            ip_address(self.bind_address)
        except ValueError:
            raise ValueError("bind_address: expected an IP address") from None
        if self.is_public and not self.allow_public_ports:
            raise ValueError(
                "bind_address: adb has no login, so phones' ports are published on a loopback or private"
                " address, unless allow_public_ports is true"
            )
        return self

    @model_validator(mode="after")
    def _names_are_told_apart(self) -> Self:
        for kind, choices in (("images", self.images), ("plans", self.plans)):
            names = [choice.name for choice in choices]
            if len(set(names)) < len(names):
                raise ValueError(f"two {kind} have the same name")
        return self
