"""Programs that tell of the system: who, when, processes, memory, properties."""

import re
from datetime import UTC, datetime
from time import strftime

from phones.simulator.calls import Call, Command, UsageFault, parse_options
from phones.simulator.packages import LAUNCHER_APP

_SHELL_ID = (
    "uid=2000(shell) gid=2000(shell) groups=2000(shell),1004(input),1007(log),1011(adb),1015(sdcard_rw)"
)
_FIXED_PROCESSES = (
    ("root", 1, 0, "init"),
    ("root", 2, 0, "[kthreadd]"),
    ("logd", 230, 1, "logd"),
    ("system", 231, 1, "servicemanager"),
    ("root", 402, 1, "zygote64"),
    ("system", 455, 1, "surfaceflinger"),
    ("shell", 480, 1, "adbd"),
    ("system", 1421, 402, "system_server"),
    ("u0_a50", 1633, 402, "com.android.systemui"),
    ("u0_a51", 1854, 402, LAUNCHER_APP),
)
MAX_SLEEP_S = 86_400


async def _true(call: Call) -> int:
    return 0


async def _false(call: Call) -> int:
    return 1


async def _sleep(call: Call) -> int:
    if not call.arguments:
        raise UsageFault("Needs 1 argument")
    seconds = 0.0
    for argument in call.arguments:
        match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?|\.\d{1,9})([smhd]?)", argument, re.ASCII)
        if match is None:
            return await call.fail(f"Unknown suffix '{argument}'")
        seconds += float(match[1]) * {"": 1, "s": 1, "m": 60, "h": 3600, "d": 86_400}[match[2]]
    await call.phone.clock.sleep(min(seconds, MAX_SLEEP_S))
    return 0


async def _id(call: Call) -> int:
    flags, _, names = parse_options(call.arguments, "ungGr")
    if names and names[0] not in ("shell", "2000"):
        return await call.fail(f"bad user '{names[0]}'")
    if not flags & set("ugG"):
        await call.write(f"{_SHELL_ID} context=u:r:shell:s0\n")
        return 0
    await call.write("shell\n" if "n" in flags else "2000\n")
    return 0


async def _whoami(call: Call) -> int:
    await call.write("shell\n")
    return 0


async def _uname(call: Call) -> int:
    flags, _, _ = parse_options(call.arguments, "asnrvmo")
    parts = {
        "s": "Linux",
        "n": "localhost",
        "r": "5.10.0-cloudphone",
        "v": "#1 SMP PREEMPT simulated",
        "m": "x86_64",
        "o": "Toybox",
    }
    chosen = (
        parts if "a" in flags else {flag: text for flag, text in parts.items() if flag in (flags or {"s"})}
    )
    await call.write(" ".join(chosen.values()) + "\n")
    return 0


async def _date(call: Call) -> int:
    _, values, rest = parse_options(call.arguments, "u", "dDI")
    now = call.phone.clock.now()
    if "d" in values:
        seconds = re.fullmatch(r"@(\d{1,11})", values["d"], re.ASCII)
        if seconds is None:
            return await call.fail(f"bad date '{values['d']}'")
        now = datetime.fromtimestamp(int(seconds[1]), UTC)
    if rest and not rest[0].startswith("+"):
        return await call.fail("cannot set date: Operation not permitted")
    template = rest[0][1:] if rest else "%a %b %e %H:%M:%S UTC %Y"
    milliseconds = f"{now.microsecond * 1000:09d}"
    template = template.replace("%N", milliseconds).replace("%3N", milliseconds[:3]).replace("%Z", "UTC")
    template = template.replace("%z", "+0000").replace("%s", str(int(now.timestamp())))
    # Letters that the C library does not know may end the process elsewhere; only these are passed on.
    safe = re.sub(r"%(?![aAbBcCdDeFgGhHIjklmMnprRSTtuUVwWxXyY%])", "%%", template[:1000])
    await call.write(_printed(safe, now) + "\n")
    return 0


def _printed(template: str, now: datetime) -> str:
    try:
        return strftime(template, now.timetuple())
    except (ValueError, UnicodeError):
        return template


async def _uptime(call: Call) -> int:
    seconds = int(call.phone.uptime_s)
    days, rest = divmod(seconds, 86_400)
    since = (f"{days} days, " if days else "") + f"{rest // 3600:2d}:{rest // 60 % 60:02d}"
    await call.write(
        f" {call.phone.clock.now():%H:%M:%S} up {since},  0 users,  load average: 0.00, 0.00, 0.00\n"
    )
    return 0


async def _env(call: Call) -> int:
    if call.arguments:
        raise UsageFault(f"Unknown option '{call.arguments[0].lstrip('-')}'")
    session = call.session
    for name in sorted(session.exported & session.variables.keys()):
        await call.write(f"{name}={session.variables[name]}\n")
    return 0


async def _set(call: Call) -> int:
    if not call.arguments:
        for name, value in sorted(call.session.variables.items()):
            await call.write(f"{name}={value}\n")
    return 0


async def _getprop(call: Call) -> int:
    properties = call.phone.properties
    if call.arguments:
        default = call.arguments[1] if len(call.arguments) > 1 else ""
        await call.write(properties.get(call.arguments[0], default) + "\n")
        return 0
    for name in sorted(properties):
        await call.write(f"[{name}]: [{properties[name]}]\n")
    return 0


async def _setprop(call: Call) -> int:
    if len(call.arguments) != 2:
        raise UsageFault(f"Need {'2 arguments' if len(call.arguments) < 2 else 'at most 2 arguments'}")
    name, value = call.arguments
    try:
        if not re.fullmatch(r"[A-Za-z0-9_@:-]+(\.[A-Za-z0-9_@:-]+)*", name):
            raise ValueError("invalid name")
        await call.phone.set_property(name, value)
    except ValueError as fault:
        return await call.fail(f"failed to set property '{name}' to '{value}': {fault}")
    return 0


def _processes(call: Call) -> list[tuple[str, int, int, str]]:
    """User, number, parent and name of everything that seems to run."""
    apps = [
        (f"u0_a{app.package.user_id - 10000}", app.process, 402, app.package.name)
        for app in reversed(call.phone.activities.running())
    ]
    return [*_FIXED_PROCESSES, *apps]


async def _ps(call: Call) -> int:
    flags, values, _ = parse_options(call.arguments, "AefTlwZ", "opu")
    processes = _processes(call)
    if not flags & set("Ae") and not values:
        processes = [("shell", 2748, 480, "sh"), ("shell", 2749, 2748, "ps")]
    if "p" in values:
        wanted = set(values["p"].split(","))
        processes = [process for process in processes if str(process[1]) in wanted]
    lines = ["USER           PID  PPID     VSZ    RSS WCHAN            ADDR S NAME"]
    for user, number, parent, name in processes:
        lines.append(f"{user:<12} {number:5d} {parent:5d} {1_200_000:7d} {40_000:6d} 0{0:>20} S {name}")
    if "o" in values:
        lines = _columns(values["o"], processes)
    await call.write("\n".join(lines) + "\n")
    return 0


def _columns(wanted: str, processes: list[tuple[str, int, int, str]]) -> list[str]:
    names = [name.strip().upper() for name in wanted.split(",")]
    known = {"USER": 0, "PID": 1, "PPID": 2, "NAME": 3, "ARGS": 3, "CMD": 3, "COMM": 3}
    for name in names:
        if name not in known:
            raise UsageFault(f"bad -o {name}")
    return [" ".join(names), *(" ".join(str(row[known[name]]) for name in names) for row in processes)]


async def _pidof(call: Call) -> int:
    _, _, names = parse_options(call.arguments, "sx")
    found = [str(number) for _, number, _, name in _processes(call) if name in names]
    if found:
        await call.write(" ".join(found) + "\n")
    return 0 if found else 1


async def _free(call: Call) -> int:
    flags, _, _ = parse_options(call.arguments, "bkmgh")
    meminfo = call.phone.kernel_file("/proc/meminfo") or ""
    amounts = {name: int(amount) * 1024 for name, amount in re.findall(r"(\w+): +(\d+) kB", meminfo)}
    unit = 1024 ** ("bkmg".index(next(iter(flags & set("bkmg")), "b")))
    total, free, buffers = (amounts[name] // unit for name in ("MemTotal", "MemFree", "Buffers"))
    await call.write(
        f"{'':16}{'total':>12}{'used':>12}{'free':>12}{'shared':>12}{'buffers':>12}\n"
        f"{'Mem:':16}{total:>12}{total - free:>12}{free:>12}{0:>12}{buffers:>12}\n"
        f"{'-/+ buffers/cache:':16}{total - free - buffers:>10}{free + buffers:>12}\n"
        f"{'Swap:':16}{0:>12}{0:>12}{0:>12}\n"
    )
    return 0


async def _reboot(call: Call) -> int:
    if call.arguments and call.arguments[0] == "-p":
        return await call.fail("a simulated phone is switched off from outside")
    call.phone.reboot()
    return 0


async def _sync(call: Call) -> int:
    await call.phone.save()
    return 0


COMMANDS: dict[str, Command] = {
    ":": _true,
    "date": _date,
    "env": _env,
    "false": _false,
    "free": _free,
    "getprop": _getprop,
    "id": _id,
    "pidof": _pidof,
    "printenv": _env,
    "ps": _ps,
    "reboot": _reboot,
    "set": _set,
    "setprop": _setprop,
    "sleep": _sleep,
    "sync": _sync,
    "true": _true,
    "uname": _uname,
    "uptime": _uptime,
    "whoami": _whoami,
}
