"""One simulated phone: its parts, its properties and settings, and what it writes down."""

import asyncio
import hashlib
import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from phones.simulator.activities import Activities
from phones.simulator.clock import Clock, SystemClock
from phones.simulator.files import PhoneFiles
from phones.simulator.logcat import Log
from phones.simulator.packages import ABIS, Packages
from phones.simulator.screen import Display, Screen
from phones.simulator.shell import Shell

SDK_BY_VERSION: Mapping[str, int] = {
    "8": 26, "8.0": 26, "8.1": 27, "9": 28, "10": 29, "11": 30, "12": 31, "12L": 32, "13": 33, "14": 34,
    "15": 35, "16": 36,
}  # fmt: skip
MAX_STATE_ENTRIES = 2000
MEMORY_TOTAL_KB = 3_145_728
MEMORY_FREE_KB = 1_872_640


@dataclass(frozen=True, slots=True)
class Model:
    """What a phone is from the factory. `id` is a UUID; sizes are in pixels."""

    id: str
    name: str
    width: int = 720
    height: int = 1280
    dpi: int = 320
    android_version: str = "12"

    @property
    def sdk(self) -> int:
        """The API level of its Android version."""
        version = self.android_version
        known = SDK_BY_VERSION.get(version) or SDK_BY_VERSION.get(version.partition(".")[0])
        return known or SDK_BY_VERSION["12"]


@dataclass(slots=True)
class Battery:
    """A phone in a rack hangs on its charger; `level` is in percent."""

    level: int = 100
    charging: bool = True


class Phone:
    """The phone as its ADB daemon sees it. `open` first; everything is kept under `directory`."""

    device = "sim"

    def __init__(self, directory: Path, model: Model, clock: Clock | None = None) -> None:
        self._directory = directory
        self._state_path = directory / "state.json"
        self._saving = asyncio.Lock()  # guards: state.json
        self.clock: Clock = clock or SystemClock()
        self._booted_at = self.clock.monotonic()
        self.model = model
        self.files = PhoneFiles(directory / "files", kernel=self.kernel_file)
        self.log = Log(self.clock)
        self.properties: dict[str, str] = _factory_properties(model)
        self.settings: dict[str, dict[str, str]] = _factory_settings(model)
        self.battery = Battery()
        self.packages = Packages(
            self.files,
            directory / "icons",
            self.log,
            self.clock,
            android_version=model.android_version,
            sdk=model.sdk,
            save=self.save,
        )
        self.activities = Activities(self.packages, self.log, self.clock)
        self.screen = Screen(self, Display(model.width, model.height, model.dpi), self.activities)
        self.shell = Shell(self)

    async def open(self) -> None:
        """Lay out the phone's files and take over what an earlier run has written down."""
        await asyncio.to_thread((self._directory / "icons").mkdir, parents=True, exist_ok=True)
        build = "".join(f"{name}={value}\n" for name, value in sorted(self.properties.items()))
        await self.files.prepare({"/system/build.prop": build})
        saved = await asyncio.to_thread(_read_state, self._state_path)
        self.properties.update(saved.get("properties", {}))
        for namespace, values in saved.get("settings", {}).items():
            self.settings[namespace] = values
        size = saved.get("size")
        self.screen.display.resize(tuple(size) if size else None)
        self.screen.display.override_dpi = saved.get("dpi")
        await self.packages.restore(saved.get("packages", []))
        self._log_boot()

    async def save(self) -> None:
        """Write down what must outlive the process; the file is always a whole one."""
        display = self.screen.display
        async with self._saving:
            state = {
                "properties": {
                    name: value for name, value in self.properties.items() if name.startswith("persist.")
                },
                "settings": self.settings,
                "size": display.override_size,
                "dpi": display.override_dpi,
                "packages": self.packages.saved(),
            }
            await asyncio.to_thread(write_json, self._state_path, state)

    async def set_property(self, name: str, value: str) -> None:
        """Set a property; `persist.` ones outlive a restart. Raises ValueError as init refuses them."""
        if name.startswith("ro.") and name in self.properties:
            raise ValueError("read-only property")
        if len(value.encode("utf-8", "replace")) > 91 and not name.startswith("ro."):
            raise ValueError("value too long")
        if len(self.properties) >= MAX_STATE_ENTRIES and name not in self.properties:
            raise ValueError("no room for another property")
        self.properties[name] = value
        if name.startswith("persist."):
            await self.save()

    async def disk(self) -> tuple[int, int, int]:
        """Bytes in all, used and free, as on the host's disk."""
        usage = await asyncio.to_thread(shutil.disk_usage, self._directory)
        return usage.total, usage.used, usage.free

    @property
    def uptime_s(self) -> float:
        """Seconds since the phone came up."""
        return self.clock.monotonic() - self._booted_at

    def reboot(self) -> None:
        """End every app and start the system again; files, packages and settings stay."""
        for app in self.activities.running():
            self.activities.stop(app.package.name)
        self.activities.home()
        self.screen.is_on = True
        self.screen.page = 0
        self._booted_at = self.clock.monotonic()
        kept = {name: value for name, value in self.properties.items() if name.startswith("persist.")}
        self.properties.clear()
        self.properties.update(_factory_properties(self.model) | kept)
        self._log_boot()

    def kernel_file(self, path: str) -> str | None:
        """The content of a file that the kernel makes up when it is read; None for any other path."""
        if path == "/proc/meminfo":
            used = MEMORY_TOTAL_KB - MEMORY_FREE_KB
            return (
                f"MemTotal:       {MEMORY_TOTAL_KB:8d} kB\nMemFree:        {MEMORY_FREE_KB:8d} kB\n"
                f"MemAvailable:   {MEMORY_FREE_KB + used // 3:8d} kB\nBuffers:        {used // 40:8d} kB\n"
                f"Cached:         {used // 3:8d} kB\n"
                "SwapTotal:             0 kB\nSwapFree:              0 kB\n"
            )
        if path == "/proc/uptime":
            return f"{self.uptime_s:.2f} {self.uptime_s * 1.9:.2f}\n"
        if path == "/proc/version":
            return "Linux version 5.10.0-cloudphone (simulated) #1 SMP PREEMPT\n"
        if path == "/proc/cpuinfo":
            return "".join(f"processor\t: {n}\nmodel name\t: Simulated x86_64\n\n" for n in range(2))
        if path == "/proc/loadavg":
            return "0.00 0.00 0.00 1/420 3100\n"
        return None

    def _log_boot(self) -> None:
        self.log.write("boot", f"simulated phone {self.model.id}", process=1)
        self.log.write("SystemServer", "Entered the Android system server!", process=1421, buffer="system")
        self.log.write("ActivityManager", "System now ready", process=1421, buffer="system")
        self.log.write("SystemServer", "sys.boot_completed=1", process=1421, buffer="system")


def _factory_properties(model: Model) -> dict[str, str]:
    serial = hashlib.sha256(model.id.encode()).hexdigest()[:16].upper()
    release, sdk = model.android_version, model.sdk
    fingerprint = f"cloudphone/sim/sim:{release}/SIM1/1:userdebug/test-keys"
    return {
        "dev.bootcomplete": "1",
        "gsm.sim.state": "ABSENT",
        "init.svc.adbd": "running",
        "init.svc.bootanim": "stopped",
        "net.hostname": "localhost",
        "persist.sys.locale": "en-US",
        "persist.sys.timezone": "UTC",
        "persist.sys.usb.config": "adb",
        "ro.build.characteristics": "default",
        "ro.build.fingerprint": fingerprint,
        "ro.build.id": "SIM1",
        "ro.build.type": "userdebug",
        "ro.build.version.release": release,
        "ro.build.version.sdk": str(sdk),
        "ro.boot.serialno": serial,
        "ro.cloudphone.simulated": "1",
        "ro.debuggable": "1",
        "ro.hardware": "simulated",
        "ro.product.board": "sim",
        "ro.product.brand": "Cloudphone",
        "ro.product.cpu.abi": ABIS[0],
        "ro.product.cpu.abilist": ",".join(ABIS),
        "ro.product.device": "sim",
        "ro.product.locale": "en-US",
        "ro.product.manufacturer": "Cloudphone",
        "ro.product.model": "Simulated phone",
        "ro.product.name": "sim",
        "ro.secure": "1",
        "ro.serialno": serial,
        "ro.sf.lcd_density": str(model.dpi),
        "sys.boot_completed": "1",
    }


def _factory_settings(model: Model) -> dict[str, dict[str, str]]:
    return {
        "system": {
            "accelerometer_rotation": "0",
            "font_scale": "1.0",
            "screen_brightness": "128",
            "screen_brightness_mode": "0",
            "screen_off_timeout": "2147483647",
            "volume_music": "5",
        },
        "secure": {
            "android_id": hashlib.sha256(f"android_id {model.id}".encode()).hexdigest()[:16],
            "location_mode": "0",
            "user_setup_complete": "1",
        },
        "global": {
            "adb_enabled": "1",
            "airplane_mode_on": "0",
            "animator_duration_scale": "1.0",
            "development_settings_enabled": "1",
            "device_name": model.name,
            "device_provisioned": "1",
            "stay_on_while_plugged_in": "7",
            "transition_animation_scale": "1.0",
            "wifi_on": "1",
            "window_animation_scale": "1.0",
        },
    }


def _read_state(path: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    return state


def write_json(path: Path, value: Any) -> None:
    """Replace a JSON file by a whole new one."""
    draft = path.with_name(f"{path.name}.new")
    draft.write_text(json.dumps(value), encoding="utf-8")
    draft.replace(path)
