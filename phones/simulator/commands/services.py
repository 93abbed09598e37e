"""`settings`, `dumpsys`, `cmd`, `svc`: the doors to the system's services."""

import re
from collections.abc import Awaitable, Callable

from phones.simulator.calls import Call, Command
from phones.simulator.commands import apps, packaging

MAX_SETTINGS = 2000
MAX_VALUE = 4000

_CMD_SERVICES = {
    "activity": apps.COMMANDS["am"],
    "input": apps.COMMANDS["input"],
    "package": packaging.COMMANDS["pm"],
    "window": apps.COMMANDS["wm"],
}


async def _settings(call: Call) -> int:
    words = list(call.arguments)
    while words[:1] == ["--user"]:
        words = words[2:]
    if len(words) < 2 or words[0] not in ("get", "put", "delete", "list", "reset"):
        await call.complain("Invalid command" if words else "Settings provider (settings) commands:")
        return 255
    verb, namespace, *rest = words
    values = call.phone.settings.get(namespace)
    if values is None:
        await call.complain(f"Error: Invalid namespace '{namespace}'")
        return 255
    if verb == "list":
        await call.write("".join(f"{name}={values[name]}\n" for name in sorted(values)))
        return 0
    if not rest or (verb == "put" and len(rest) < 2):
        await call.complain("Bad arguments")
        return 255
    if verb == "get":
        await call.write(values.get(rest[0], "null") + "\n")
        return 0
    if verb == "delete":
        count = int(values.pop(rest[0], None) is not None)
        await call.write(f"Deleted {count} rows\n")
    elif verb == "put":
        if len(values) >= MAX_SETTINGS or len(rest[0]) + len(rest[1]) > MAX_VALUE:
            await call.complain("Error: Setting is too large")
            return 255
        values[rest[0]] = rest[1]
    await call.phone.save()
    return 0


async def _dumpsys(call: Call) -> int:
    words = [word for word in call.arguments if word != "-t"]
    if words[:1] == ["-l"] or not words:
        await call.write("Currently running services:\n" + "".join(f"  {name}\n" for name in sorted(_DUMPS)))
        return 0
    dump = _DUMPS.get(words[0])
    if dump is None:
        await call.complain(f"Can't find service: {words[0]}")
        return 0
    return await dump(call, words[1:])


async def _dump_battery(call: Call, arguments: list[str]) -> int:
    battery = call.phone.battery
    if arguments:
        return await _change_battery(call, arguments)
    status = 5 if battery.charging and battery.level == 100 else 2 if battery.charging else 3
    await call.write(
        "Current Battery Service state:\n"
        f"  AC powered: {str(battery.charging).lower()}\n  USB powered: false\n  Wireless powered: false\n"
        f"  Max charging current: 0\n  status: {status}\n  health: 2\n  present: true\n"
        f"  level: {battery.level}\n  scale: 100\n  voltage: 4200\n  temperature: 250\n  technology: Li-ion\n"
    )
    return 0


async def _change_battery(call: Call, arguments: list[str]) -> int:
    """`dumpsys battery set level 20`, `unplug`, `reset`, as tests of apps use them."""
    if arguments[:2] == ["set", "level"] and re.fullmatch(r"\d{1,3}", "".join(arguments[2:3]), re.ASCII):
        call.phone.battery.level = min(int(arguments[2]), 100)
    elif arguments[0] == "unplug" or arguments == ["set", "ac", "0"]:
        call.phone.battery.charging = False
    elif arguments[0] == "reset" or arguments == ["set", "ac", "1"]:
        call.phone.battery.charging = True
        if arguments[0] == "reset":
            call.phone.battery.level = 100
    else:
        await call.write("Unknown set option: " + " ".join(arguments) + "\n")
    return 0


def _focus(call: Call) -> str:
    return f"u0 {call.phone.activities.component}"


async def _dump_window(call: Call, arguments: list[str]) -> int:
    display = call.phone.screen.display
    width, height = display.size
    await call.write(
        f"  Display: mDisplayId=0\n    init={display.width}x{display.height} {display.dpi}dpi "
        f"cur={width}x{height} app={width}x{height}\n"
        f"  mCurrentFocus=Window{{5f1a0c2 {_focus(call)}}}\n"
        f"  mFocusedApp=ActivityRecord{{8d1f3b4 {_focus(call)} t12}}\n"
        f"  mAwake={str(call.phone.screen.is_on).lower()}\n"
    )
    return 0


async def _dump_activity(call: Call, arguments: list[str]) -> int:
    lines = [
        "ACTIVITY MANAGER ACTIVITIES (dumpsys activity activities)",
        "Display #0 (activities from top to bottom):",
    ]
    lines += [
        f"    * Hist #0: ActivityRecord{{{app.process:x} u0 {app.package.component} t{app.process}}}"
        for app in call.phone.activities.running()
    ]
    lines.append(f"  mResumedActivity: ActivityRecord{{8d1f3b4 {_focus(call)} t12}}")
    lines.append(f"  topResumedActivity=ActivityRecord{{8d1f3b4 {_focus(call)} t12}}")
    await call.write("\n".join(lines) + "\n")
    return 0


async def _dump_power(call: Call, arguments: list[str]) -> int:
    state = "Awake" if call.phone.screen.is_on else "Asleep"
    shown = "ON" if call.phone.screen.is_on else "OFF"
    await call.write(f"POWER MANAGER (dumpsys power)\n  mWakefulness={state}\nDisplay Power: state={shown}\n")
    return 0


async def _dump_meminfo(call: Call, arguments: list[str]) -> int:
    await call.write(call.phone.kernel_file("/proc/meminfo") or "")
    return 0


async def _cmd(call: Call) -> int:
    if not call.arguments:
        await call.complain("cmd: No service specified; use -l to list all services")
        return 20
    name, *rest = call.arguments
    if name == "-l":
        names = sorted({*_CMD_SERVICES, "settings"})
        await call.write("Currently running services:\n" + "".join(f"  {service}\n" for service in names))
        return 0
    if name == "settings":
        return await _settings(call.renamed("settings", tuple(rest)))
    service = _CMD_SERVICES.get(name)
    if service is None:
        await call.complain(f"cmd: Can't find service: {name}")
        return 20
    return await service(call.renamed(name, tuple(rest)))


async def _svc(call: Call) -> int:
    if call.arguments[:2] == ("power", "reboot"):
        call.phone.reboot()
        return 0
    if call.arguments[:2] == ("power", "stayon"):
        return 0
    await call.complain("Available commands:\n    help\n    power")
    return 1


_DUMPS: dict[str, Callable[[Call, list[str]], Awaitable[int]]] = {
    "activity": _dump_activity,
    "battery": _dump_battery,
    "meminfo": _dump_meminfo,
    "package": packaging.dump_package,
    "power": _dump_power,
    "window": _dump_window,
}

COMMANDS: dict[str, Command] = {
    "cmd": _cmd,
    "dumpsys": _dumpsys,
    "settings": _settings,
    "svc": _svc,
}
