"""Phones as containers of a Docker engine.

A phone is a container and a volume. The container is named after the installation and the phone, carries
both as labels, and may be made anew at any time, as it is whenever its ports, limits or image differ from
what is wanted; the phone's data is on the volume. What does not carry our labels is not touched.

Two kinds of image: `redroid`, a whole Android, which needs a privileged container, and `simulated`, the
simulated phone, which gets no privilege at all.
"""

import asyncio
import hashlib
import json
import logging
import re
from collections.abc import AsyncIterator, Mapping
from contextlib import suppress
from dataclasses import asdict, astuple
from datetime import UTC, datetime
from typing import Any, Final

from phones.engine import Engine, NameTaken, NotThere
from phones.meter import Meters
from phones.network import NAME_PREFIX, PhoneNetwork
from phones.pulls import Pulls
from phones.runtime import (
    LOCAL_NODE,
    FoundPhone,
    PhoneSpec,
    PhoneStats,
    PhoneStatus,
    PortTaken,
    PortTriple,
    RuntimeFault,
    RuntimeName,
    RuntimeUnavailable,
)

INSTALLATION_LABEL: Final = "cloudphone.installation"
DEVICE_LABEL: Final = "cloudphone.device"
NODE_LABEL: Final = "cloudphone.node"
PORTS_LABEL: Final = "cloudphone.ports"
LIMITS_LABEL: Final = "cloudphone.limits"
SPEC_LABEL: Final = "cloudphone.spec"
ANDROID_LABEL: Final = "cloudphone.android"

PROBE_EVERY_S: Final = 5.0
PROBE_AWAY_EVERY_S: Final = 1.0
STOP_GRACE_S: Final = 10
INSPECTIONS_AT_ONCE: Final = 16
CREATE_TRIES: Final = 3
STILL_REMOVED: Final = "the phone's last container is still being removed"
_MAX_LINE = 2000
_UNPRINTABLE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]|[^\x20-\x7e\t\u00a0-\U0010ffff]")

log = logging.getLogger(__name__)


class DockerRuntime:
    """One installation's phones on one engine; implements `phones.runtime.Runtime`."""

    name: RuntimeName = "docker"

    def __init__(self, engine: Engine, installation: str) -> None:
        """`installation` tells our containers from those of others on the same engine; the engine is ours."""
        self._engine = engine
        self._installation = installation
        self._ours = f"{INSTALLATION_LABEL}={installation}"
        self._network = PhoneNetwork(engine, installation, self._ours)
        self._meters = Meters(engine)
        self._pulls = Pulls(engine)
        self._watching: asyncio.Task[None] | None = None
        self._listeners: set[asyncio.Queue[str | None]] = set()
        self._closed = asyncio.Event()
        self._trouble: RuntimeUnavailable | None = None  # why the last probe failed
        self.epoch = 0
        # What inspections said of running containers, until something happens to them.
        self._runs: dict[str, tuple[str, bool]] = {}

    async def open(self) -> None:
        """Start to watch the engine, which may be away."""
        with suppress(RuntimeUnavailable):
            await self._probe()
        self._watching = asyncio.create_task(self._watch())

    async def close(self) -> None:
        """End what is held here, and every `events()`. Containers keep running."""
        self._closed.set()
        if self._watching is not None:
            self._watching.cancel()
            await asyncio.gather(self._watching, return_exceptions=True)
        await self._pulls.close()
        await self._meters.close()
        for listener in self._listeners:
            listener.put_nowait(None)
        await self._engine.close()

    async def check(self) -> None:
        """Raises RuntimeUnavailable: at once where the engine is known to be away."""
        self._require_engine()
        await self._probe()

    def trouble(self) -> str:
        """Why the last probe failed."""
        return str(self._trouble or "")

    def is_exposed(self) -> bool:
        """Whether no firewall rule could be set for the phones' network."""
        return not self._network.is_closed

    def fetch(self, spec: PhoneSpec) -> AsyncIterator[int]:
        """Pull the image unless the engine has it; one pull an image, however many wait for it."""
        if spec.image_kind == "simulated":
            return self._require_built(spec.image_reference)
        return self._pulls.follow(spec.image_reference)

    async def _require_built(self, reference: str) -> AsyncIterator[int]:
        if not reference:
            raise RuntimeFault("it has no container image: it was rented where phones are local processes")
        if not await self._pulls.has(reference):
            raise RuntimeFault(f"the phones' machine has no image {reference}; `make phone-image` builds it")
        return
        yield 0  # what makes this an iterator

    async def create(self, spec: PhoneSpec) -> None:
        """Make the network, the volume and the container; one that is there and as wanted stays."""
        self._require_engine()
        await self._network.ensure(spec.image_reference)
        made_by = await self._volume_version(spec)
        config = self._config(spec)
        for _ in range(CREATE_TRIES):
            try:
                await self._engine.create(self._name(spec.id), config)
                return
            except NotThere as missing:
                self._pulls.forget(spec.image_reference)
                self._network.forget()
                raise RuntimeUnavailable(f"what the phone needs has gone: {missing}") from None
            except NameTaken:
                found = await self._engine.inspect(self._name(spec.id))
                if found is None:
                    continue
                labels = self._labels_of(found, spec.id)
                _refuse_downgrade(spec, max(made_by, _major(labels.get(ANDROID_LABEL, ""))))
                if labels.get(SPEC_LABEL) == config["Labels"][SPEC_LABEL]:
                    return
                await self._engine.delete(found["Id"])
        raise RuntimeUnavailable(STILL_REMOVED)

    async def start(self, spec: PhoneSpec) -> None:
        """Start the container. Raises PortTaken, RuntimeFault."""
        self._require_engine()
        try:
            await self._engine.start(self._name(spec.id))
        except NotThere:
            self._network.forget()
            raise RuntimeUnavailable("the phone's container or network has gone") from None
        except NameTaken:
            raise RuntimeUnavailable(STILL_REMOVED) from None
        except PortTaken as taken:
            # It bears a port that is no use; the next try makes another.
            await self._engine.delete(self._name(spec.id))
            if taken.port not in astuple(spec.ports):
                raise RuntimeFault(f"the Docker engine says that port {taken.port} is taken") from None
            raise

    async def stop(self, phone_id: str) -> None:
        """SIGTERM, and SIGKILL when the grace is over."""
        self._require_engine()
        found = await self._engine.inspect(self._name(phone_id))
        if found is None or not self._is_ours(found, phone_id):
            return
        self._meters.drop(phone_id)
        with suppress(NotThere):
            if found["State"]["Paused"]:
                await self._engine.unpause(found["Id"])
            await self._engine.stop(found["Id"], STOP_GRACE_S)

    async def wipe(self, phone_id: str) -> None:
        """Delete a stopped phone's container and volume. Raises RuntimeFault where the phone runs."""
        self._require_engine()
        found = await self._engine.inspect(self._name(phone_id))
        if found is not None and self._is_ours(found, phone_id):
            if found["State"]["Running"]:
                raise RuntimeFault("a running phone cannot be wiped")
            await self._engine.delete(found["Id"])
        await self._delete_volume(phone_id)

    async def remove(self, phone_id: str) -> None:
        """Delete the phone's containers, whatever they are called, and its volume."""
        self._require_engine()
        self._meters.drop(phone_id)
        for container in await self._engine.containers(self._ours, f"{DEVICE_LABEL}={phone_id}"):
            await self._engine.delete(container["Id"])
        await self._delete_volume(phone_id)

    async def discard(self, found: FoundPhone) -> None:
        """Delete this one container; the volume stays."""
        self._require_engine()
        self._meters.drop(found.id)
        await self._engine.delete(found.place)

    async def limit(self, spec: PhoneSpec) -> None:
        """Give the container the limits of the spec again."""
        self._require_engine()
        await self._engine.update(self._name(spec.id), _limits(spec))
        self._runs.clear()

    async def inspect(self, phone_id: str) -> FoundPhone | None:
        """What the engine says of the phone's container."""
        self._require_engine()
        found = await self._engine.inspect(self._name(phone_id))
        if found is None or not self._is_ours(found, phone_id):
            return None
        return self._described(found)

    async def stats(self, phone_id: str) -> PhoneStats:
        """From the phone's one stream of statistics, opened when first asked for."""
        self._require_engine()
        return await self._meters.read(phone_id, self._name(phone_id))

    async def log(self, phone_id: str, lines: int) -> list[str]:
        """What the container printed, without colours and control characters."""
        self._require_engine()
        found = await self._engine.inspect(self._name(phone_id))
        if found is None or not self._is_ours(found, phone_id):
            return []
        return [
            _UNPRINTABLE.sub("", line)[:_MAX_LINE] for line in await self._engine.logs(found["Id"], lines)
        ]

    async def list(self) -> list[FoundPhone]:
        """Every container of this installation; those not looked at since they started are inspected."""
        self._require_engine()
        containers = await self._engine.containers(self._ours)
        turn = asyncio.Semaphore(INSPECTIONS_AT_ONCE)
        unknown = [one for one in containers if one["State"] == "running" and one["Id"] not in self._runs]
        await asyncio.gather(*(self._look_at(one["Id"], turn) for one in unknown))
        known = {one["Id"] for one in containers}
        for gone in self._runs.keys() - known:
            del self._runs[gone]
        return [self._listed(one) for one in containers]

    def events(self) -> AsyncIterator[str | None]:
        """Ids of phones whose containers died, went, started or changed, from this call on."""
        listener: asyncio.Queue[str | None] = asyncio.Queue()
        self._listeners.add(listener)
        return self._listen(listener)

    async def _listen(self, listener: asyncio.Queue[str | None]) -> AsyncIterator[str | None]:
        try:
            while True:
                event = await listener.get()
                if self._closed.is_set():
                    return
                yield event
        finally:
            self._listeners.discard(listener)

    # --- The engine's health --------------------------------------------------------------------

    def _require_engine(self) -> None:
        """Raises RuntimeUnavailable where the engine is known to be away, so that nobody waits for it."""
        if self._trouble is not None:
            raise RuntimeUnavailable(str(self._trouble))

    async def _probe(self) -> None:
        try:
            await self._engine.ping()
        except RuntimeUnavailable as trouble:
            self._trouble = trouble
            raise
        self._trouble = None

    async def _watch(self) -> None:
        """Hear what happens for as long as the engine answers, and begin anew whenever it is back."""
        is_told = False
        while True:
            try:
                await self._probe()
                is_told = False
                self._forget()
                async with asyncio.TaskGroup() as group:
                    group.create_task(self._probe_on())
                    group.create_task(self._hear())
            except* RuntimeFault as faults:
                if not is_told:
                    log.warning("the Docker engine is away: %s", faults.exceptions[0])
                is_told = True
                self.epoch += 1
            except* Exception:
                log.exception("unforeseen error while watching the Docker engine")
            await asyncio.sleep(PROBE_AWAY_EVERY_S)

    def _forget(self) -> None:
        """Take nothing for granted: the engine or its machine may have started anew."""
        self.epoch += 1
        self._runs.clear()
        self._network.forget()
        self._pulls.forget()

    async def _probe_on(self) -> None:
        while True:
            await asyncio.sleep(PROBE_EVERY_S)
            await self._probe()

    async def _hear(self) -> None:
        async for event in self._engine.events(self._ours):
            if not event:
                log.info("listening to the Docker engine")
                self._tell(None)
            elif event.get("Action", "").partition(":")[0] in {"die", "destroy", "start", "update", "pause"}:
                self._runs.pop(event["Actor"]["ID"], None)
                self._tell(event["Actor"]["Attributes"].get(DEVICE_LABEL, ""))
        raise RuntimeUnavailable("the Docker engine's events ended")

    def _tell(self, event: str | None) -> None:
        for listener in self._listeners:
            listener.put_nowait(event)

    # --- What a container is --------------------------------------------------------------------

    def _name(self, phone_id: str) -> str:
        return f"{NAME_PREFIX}{self._installation[:8]}-{phone_id}"

    def _volume(self, phone_id: str) -> str:
        return f"{self._name(phone_id)}-data"

    async def _volume_version(self, spec: PhoneSpec) -> int:
        """Have the volume; the major version of the Android that made it. Raises RuntimeFault."""
        labels = await self._engine.create_volume(
            self._volume(spec.id),
            {
                INSTALLATION_LABEL: self._installation,
                DEVICE_LABEL: spec.id,
                ANDROID_LABEL: spec.android_version,
            },
        )
        if not self._marks(labels, spec.id):
            raise RuntimeFault("a Docker volume that is not this phone's has its name")
        made_by = _major(labels.get(ANDROID_LABEL, ""))
        _refuse_downgrade(spec, made_by)
        return made_by

    def _config(self, spec: PhoneSpec) -> dict[str, Any]:
        config = _redroid(spec) if spec.image_kind == "redroid" else _simulated(spec)
        published = dict(zip(astuple(spec.inner_ports), astuple(spec.ports), strict=True))
        published.pop(0, None)
        host = config["HostConfig"] | _limits(spec)
        host |= {
            "NetworkMode": self._network.name,
            "PortBindings": {
                f"{inner}/tcp": [{"HostIp": spec.bind_address, "HostPort": str(outer)}]
                for inner, outer in published.items()
            },
            "LogConfig": {
                "Type": "json-file",
                "Config": {"max-size": f"{spec.log_mb * 512}k", "max-file": "2"},
            },
            "Mounts": [{"Type": "volume", "Source": self._volume(spec.id), "Target": "/data"}],
            # Phones come back with the engine. One that ends by itself comes back too, and is then seen to.
            "RestartPolicy": {"Name": "unless-stopped"},
        }
        config |= {
            "Image": spec.image_reference,
            "Hostname": f"phone-{spec.id[:8]}",
            "ExposedPorts": {f"{inner}/tcp": {} for inner in published},
            "StopTimeout": STOP_GRACE_S,
            "HostConfig": host,
        }
        fingerprint = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()[:16]
        config["Labels"] = {
            INSTALLATION_LABEL: self._installation,
            DEVICE_LABEL: spec.id,
            NODE_LABEL: spec.node,
            PORTS_LABEL: json.dumps(asdict(spec.ports)),
            LIMITS_LABEL: json.dumps(_limits(spec)),
            ANDROID_LABEL: spec.android_version,
            SPEC_LABEL: fingerprint,
        }
        return config

    async def _delete_volume(self, phone_id: str) -> None:
        labels = await self._engine.volume_labels(self._volume(phone_id))
        if labels is not None and self._marks(labels, phone_id):
            await self._engine.delete_volume(self._volume(phone_id))

    def _is_ours(self, found: Mapping[str, Any], phone_id: str) -> bool:
        return self._marks(found["Config"]["Labels"] or {}, phone_id)

    def _marks(self, labels: Mapping[str, str], phone_id: str) -> bool:
        """Whether these labels say that something is this phone's."""
        return labels.get(INSTALLATION_LABEL) == self._installation and labels.get(DEVICE_LABEL) == phone_id

    def _labels_of(self, found: Mapping[str, Any], phone_id: str) -> dict[str, str]:
        """Raises RuntimeFault for a container that is somebody else's."""
        if not self._is_ours(found, phone_id):
            raise RuntimeFault("a container that is not ours has this phone's name")
        return dict(found["Config"]["Labels"])

    # --- What the engine says -------------------------------------------------------------------

    async def _look_at(self, container_id: str, turn: asyncio.Semaphore) -> None:
        async with turn:
            found = await self._engine.inspect(container_id)
        if found is not None and found["State"]["Running"]:
            self._runs[container_id] = _run(found), _is_altered(found)

    def _described(self, found: Mapping[str, Any]) -> FoundPhone:
        state, labels = found["State"], found["Config"]["Labels"]
        runs = _runs(state["Status"])
        return FoundPhone(
            id=labels[DEVICE_LABEL],
            status=PhoneStatus.RUNNING if runs else PhoneStatus.STOPPED,
            ports=_ports(labels) if runs else None,
            node=labels.get(NODE_LABEL, LOCAL_NODE),
            place=found["Id"],
            run=_run(found) if runs else None,
            is_altered=runs and _is_altered(found),
            has_restarted=found["RestartCount"] > 0,
        )

    def _listed(self, one: Mapping[str, Any]) -> FoundPhone:
        labels = one["Labels"]
        runs = _runs(one["State"])
        run, is_altered = self._runs.get(one["Id"], (None, False))
        phone_id = labels.get(DEVICE_LABEL, "")
        return FoundPhone(
            id=phone_id,
            status=PhoneStatus.RUNNING if runs else PhoneStatus.STOPPED,
            ports=_ports(labels) if runs else None,
            node=labels.get(NODE_LABEL, LOCAL_NODE),
            place=one["Id"],
            run=run if runs else None,
            created_at=datetime.fromtimestamp(one["Created"], UTC),
            is_stray=f"/{self._name(phone_id)}" not in (one["Names"] or ()),
            is_altered=runs and is_altered,
        )


def _redroid(spec: PhoneSpec) -> dict[str, Any]:
    """A whole Android. Its arguments: the redroid project's documentation, "Configuration"."""
    options = {
        "androidboot.redroid_width": spec.width,
        "androidboot.redroid_height": spec.height,
        "androidboot.redroid_dpi": spec.dpi,
        "androidboot.redroid_fps": spec.fps,
        "androidboot.redroid_gpu_mode": spec.gpu_mode,
        # Newer kernels have no ashmem.
        "androidboot.use_memfd": "true",
    }
    return {
        "Cmd": [f"{name}={value}" for name, value in options.items()],
        "HostConfig": {"Privileged": True},
    }


def _simulated(spec: PhoneSpec) -> dict[str, Any]:
    """The simulated phone, which needs nothing but its volume and a port."""
    options = {
        "data-dir": "/data",
        "host": "0.0.0.0",  # noqa: S104  (inside the container; published on spec.bind_address alone)
        "adb-port": spec.inner_ports.adb,
        "webrtc-port": spec.ports.webrtc,
        "scrcpy-port": spec.ports.scrcpy,
        "id": spec.id,
        "name": spec.name.replace("\0", ""),
        "width": spec.width,
        "height": spec.height,
        "dpi": spec.dpi,
        "android-version": spec.android_version,
    }
    return {
        "Cmd": [f"--{name}={value}" for name, value in options.items()],
        "HostConfig": {
            # A signal that comes before Python listens would be lost on a process that is the first one.
            "Init": True,
            "CapDrop": ["ALL"],
            "SecurityOpt": ["no-new-privileges"],
            "ReadonlyRootfs": True,
            "Tmpfs": {"/tmp": "size=64m,mode=1777"},  # noqa: S108  (the container's own)
        },
    }


def _limits(spec: PhoneSpec) -> dict[str, int]:
    memory = spec.memory_mb << 20
    return {
        "NanoCpus": int(spec.cpus * 1_000_000_000),
        "Memory": memory,
        "MemorySwap": memory,
        "PidsLimit": spec.pids_limit,
    }


def _is_altered(found: Mapping[str, Any]) -> bool:
    """Whether a container's limits are not those it was made with."""
    try:
        wanted = json.loads(found["Config"]["Labels"][LIMITS_LABEL])
    except (KeyError, ValueError):
        return False
    return any(found["HostConfig"].get(name) != value for name, value in wanted.items())


def _run(found: Mapping[str, Any]) -> str:
    return str(found["State"]["StartedAt"])


def _runs(status: str) -> bool:
    # A paused or restarting phone answers nobody.
    return status == "running"


def _ports(labels: Mapping[str, str]) -> PortTriple | None:
    try:
        return PortTriple(**json.loads(labels[PORTS_LABEL]))
    except (KeyError, ValueError, TypeError):
        return None


def _major(version: str) -> int:
    digits = re.match(r"\d+", version)
    return int(digits[0]) if digits else 0


def _refuse_downgrade(spec: PhoneSpec, made_by: int) -> None:
    wanted = _major(spec.android_version)
    if 0 < wanted < made_by:
        raise RuntimeFault(
            f"its data is from Android {made_by}, which Android {wanted} cannot read; reset it"
        )
