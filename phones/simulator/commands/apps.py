"""`am`, `monkey`, `input`, `wm` and `screencap`: what drives the screen. Answers are AOSP's."""

import re
from collections.abc import AsyncIterator, Awaitable, Callable

from phones.simulator import keys
from phones.simulator.calls import Call, Command, UsageFault, parse_options, reason
from phones.simulator.files import PhoneFileError
from phones.simulator.packages import BROWSER_APP, LAUNCHER_APP, SETTINGS_APP, Package

MAIN = "android.intent.action.MAIN"
HOME_CATEGORY = "android.intent.category.HOME"
MAX_COORDINATE = 100_000
MAX_TEXT = 2000
MIN_DPI = 72

_AM_VALUED = (
    "-a",
    "-d",
    "-t",
    "-c",
    "-n",
    "-p",
    "-f",
    "-i",
    "--user",
    "--display",
    "-P",
    "-R",
    "--activity-brought-to-front",
)
_AM_EXTRAS = {"--es": 2, "--ez": 2, "--ei": 2, "--el": 2, "--ef": 2, "--eu": 2, "-e": 2, "--esn": 1}


async def _am(call: Call) -> int:
    if not call.arguments:
        await call.write(
            "Activity manager (activity) commands:\n  " + "\n  ".join(sorted(_AM_ACTIONS)) + "\n"
        )
        return 1
    name, *arguments = call.arguments
    action = _AM_ACTIONS.get(name)
    if action is None:
        await call.complain(f"Unknown command: {name}")
        return 255
    return await action(call, arguments)


async def _am_start(call: Call, arguments: list[str]) -> int:
    try:
        intent, flags, rest = _intent(arguments)
    except UsageFault as fault:
        await call.complain(f"\nException occurred while executing 'start':\n{fault}")
        return 255
    if not intent and not rest:
        await call.complain(
            "\nException occurred while executing 'start':\n"
            "java.lang.IllegalArgumentException: No intent supplied"
        )
        return 255
    _read_bare(intent, rest)
    await call.write(f"Starting: Intent {{ {_shown_intent(intent)} }}\n")
    if intent.get("-c") == HOME_CATEGORY or intent.get("-n", "").startswith(f"{LAUNCHER_APP}/"):
        call.phone.activities.home()
        return 0
    package = _target(call, intent)
    if package is None:
        return await _not_started(call, intent)
    if "-S" in flags:
        call.phone.activities.stop(package.name)
    outcome = call.phone.activities.start(package)
    if outcome == "delivered":
        await call.complain(
            "Warning: Activity not started, intent has been delivered to currently running top-most instance."
        )
    elif outcome == "brought":
        await call.complain("Warning: Activity not started, its current task has been brought to the front")
    if "-W" in flags:
        state = "COLD" if outcome == "started" else "HOT"
        await call.write(
            f"Status: ok\nLaunchState: {state}\nActivity: {package.component}\n"
            "TotalTime: 140\nWaitTime: 150\nComplete\n"
        )
    return 0


def _intent(arguments: list[str]) -> tuple[dict[str, str], set[str], list[str]]:
    """An intent's parts by their option, the flags, and what stands alone. Raises UsageFault."""
    intent: dict[str, str] = {}
    flags: set[str] = set()
    rest: list[str] = []
    waiting = list(arguments)
    while waiting:
        option = waiting.pop(0)
        wanted = _AM_EXTRAS.get(option, 1 if option in _AM_VALUED else 0)
        if len(waiting) < wanted:
            raise UsageFault(f'java.lang.IllegalArgumentException: Argument expected after "{option}"')
        values, waiting = waiting[:wanted], waiting[wanted:]
        if option in _AM_EXTRAS:
            intent["has extras"] = "1"
        elif wanted:
            intent[option] = values[0]
        elif option.startswith("-"):
            flags.add(option)
        else:
            rest.append(option)
    return intent, flags, rest


def _read_bare(intent: dict[str, str], rest: list[str]) -> None:
    """What stands without an option is a component, an address or a package."""
    for word in rest[:1]:
        if "/" in word and ":" not in word:
            intent.setdefault("-n", word)
        elif ":" in word:
            intent.setdefault("-d", word)
        else:
            intent.setdefault("-p", word)
            intent.setdefault("-a", MAIN)


def _shown_intent(intent: dict[str, str]) -> str:
    name, slash, activity = intent.get("-n", "").partition("/")
    if activity.startswith(name + "."):
        activity = activity.removeprefix(name)
    parts = (
        ("act", intent.get("-a")),
        ("cat", f"[{intent['-c']}]" if "-c" in intent else None),
        ("dat", intent.get("-d")),
        ("typ", intent.get("-t")),
        ("pkg", intent.get("-p")),
        ("cmp", f"{name}{slash}{activity}" or None),
    )
    shown = " ".join(f"{part}={value}" for part, value in parts if value)
    return shown + (" (has extras)" if "has extras" in intent else "")


def _target(call: Call, intent: dict[str, str]) -> Package | None:
    """The app an intent means. Only launcher activities are known here, as an APK names them."""
    packages = call.phone.packages
    if "-n" in intent:
        name, _, activity = intent["-n"].partition("/")
        package = packages.get(name)
        full = name + activity if activity.startswith(".") else activity
        return package if package is not None and package.activity == full else None
    if "-p" in intent:
        package = packages.get(intent["-p"])
        return package if package is not None and package.activity is not None else None
    if intent.get("-a", "").startswith("android.settings."):
        return packages.get(SETTINGS_APP)
    if re.match(r"https?:", intent.get("-d", "")):
        return packages.get(BROWSER_APP)
    return None


async def _not_started(call: Call, intent: dict[str, str]) -> int:
    if "-n" in intent:
        name, _, activity = intent["-n"].partition("/")
        full = name + activity if activity.startswith(".") else activity
        await call.complain(f"Error type 3\nError: Activity class {{{name}/{full}}} does not exist.")
    else:
        await call.complain(
            "Error: Activity not started, unable to resolve Intent"
            f" {{ {_shown_intent(intent)} flg=0x10000000 }}"
        )
    return 1


async def _am_force_stop(call: Call, arguments: list[str]) -> int:
    names = [word for word in arguments if not word.startswith("-")]
    if not names:
        await call.complain(
            "\nException occurred while executing 'force-stop':\n"
            'java.lang.IllegalArgumentException: Argument expected after "force-stop"'
        )
        return 255
    call.phone.activities.stop(names[-1])
    return 0


async def _am_broadcast(call: Call, arguments: list[str]) -> int:
    try:
        intent, _, rest = _intent(arguments)
    except UsageFault as fault:
        await call.complain(str(fault))
        return 255
    _read_bare(intent, rest)
    await call.write(f"Broadcasting: Intent {{ {_shown_intent(intent)} }}\nBroadcast completed: result=0\n")
    return 0


async def _monkey(call: Call) -> int:
    words = list(call.arguments)
    names: list[str] = []
    count = None
    while words:
        word = words.pop(0)
        if word in ("-p", "-c", "-s", "--throttle", "--pct-syskeys", "--pct-touch") and words:
            value = words.pop(0)
            names += [value] if word == "-p" else []
        elif word.isascii() and word.isdigit():
            count = int(word[:9])
        elif not word.startswith("-"):
            await call.complain(f"** Error: Unknown argument: {word}")
            return 251
    if count is None:
        await call.complain("** Error: Count not specified")
        return 251
    for word in call.arguments:
        await call.write(f"  bash arg: {word}\n")
    found = [package for name in names if (package := call.phone.packages.get(name)) and package.activity]
    if not found:
        await call.complain("** No activities found to run, monkey aborted.")
        return 252
    call.phone.activities.start(found[0])
    await call.write(
        f"Events injected: {count}\n"
        "## Network stats: elapsed time=6ms (0ms mobile, 0ms wifi, 6ms not connected)\n"
    )
    return 0


async def _input(call: Call) -> int:
    words = list(call.arguments)
    if words[:1] and words[0] in (
        "touchscreen",
        "keyboard",
        "mouse",
        "touchpad",
        "stylus",
        "dpad",
        "gamepad",
    ):
        words.pop(0)
    if words[:1] == ["-d"]:
        words = words[2:]
    if not words:
        await call.complain(_INPUT_USAGE)
        return 255
    name, *arguments = words
    action = _INPUT_ACTIONS.get(name)
    if action is None:
        await call.complain(f"Error: Unknown command: {name}\n{_INPUT_USAGE}")
        return 255
    try:
        action(call, arguments)
    except UsageFault as fault:
        await call.complain(str(fault) or f"Error: Invalid arguments for command: {name}\n{_INPUT_USAGE}")
        return 255
    return 0


_INPUT_USAGE = """Usage: input [<source>] [-d DISPLAY_ID] <command> [<arg>...]
The commands and default sources are:
      text <string> (Default: touchscreen)
      keyevent [--longpress] <key code number or name> ... (Default: keyboard)
      tap <x> <y> (Default: touchscreen)
      swipe <x1> <y1> <x2> <y2> [duration(ms)] (Default: touchscreen)
      draganddrop <x1> <y1> <x2> <y2> [duration(ms)] (Default: touchscreen)
      motionevent <DOWN|UP|MOVE|CANCEL> <x> <y> (Default: touchscreen)"""


def _coordinates(arguments: list[str], *counts: int) -> list[int]:
    """Whole pixels from numbers, of which there must be one of `counts`. Raises UsageFault."""
    if len(arguments) not in counts:
        raise UsageFault
    for argument in arguments:
        if not re.fullmatch(r"-?\d{1,9}(\.\d{0,9})?", argument, re.ASCII):
            raise UsageFault(
                f"\nException occurred while executing 'input':\n"
                f'java.lang.NumberFormatException: For input string: "{argument}"'
            )
    return [min(max(int(float(argument)), -MAX_COORDINATE), MAX_COORDINATE) for argument in arguments]


def _input_tap(call: Call, arguments: list[str]) -> None:
    x, y = _coordinates(arguments, 2)
    call.phone.screen.tap(x, y)


def _input_swipe(call: Call, arguments: list[str]) -> None:
    x, y, to_x, to_y, *_ = _coordinates(arguments, 4, 5)
    call.phone.screen.swipe(x, y, to_x, to_y)


def _input_text(call: Call, arguments: list[str]) -> None:
    if not arguments:
        raise UsageFault
    call.phone.screen.type(" ".join(arguments)[:MAX_TEXT].replace("%s", " "))


def _input_keyevent(call: Call, arguments: list[str]) -> None:
    names = [word for word in arguments if word not in ("--longpress", "--doubletap")]
    if not names:
        raise UsageFault
    for name in names:
        code = keys.key_code(name)
        if code is None:
            raise UsageFault(f"Error: Unknown keycode: {name}")
        call.phone.screen.key(code)


def _input_motionevent(call: Call, arguments: list[str]) -> None:
    if len(arguments) != 3 or arguments[0].upper() not in ("DOWN", "UP", "MOVE", "CANCEL"):
        raise UsageFault
    x, y = _coordinates(arguments[1:], 2)
    call.phone.screen.motion(arguments[0].upper(), x, y)


async def _wm(call: Call) -> int:
    if not call.arguments:
        await call.write("Window manager (window) commands:\n  size [reset|WxH]\n  density [reset|DENSITY]\n")
        return 255
    name, *arguments = call.arguments
    if name not in ("size", "density"):
        await call.complain(f"Unknown command: {name}")
        return 255
    return await (_wm_size if name == "size" else _wm_density)(call, arguments)


async def _wm_size(call: Call, arguments: list[str]) -> int:
    display = call.phone.screen.display
    if not arguments:
        await call.write(f"Physical size: {display.width}x{display.height}\n")
        if display.override_size is not None:
            await call.write("Override size: {}x{}\n".format(*display.override_size))
        return 0
    size = re.fullmatch(r"(\d{1,6})x(\d{1,6})", arguments[0], re.ASCII)
    if size is None and arguments[0] != "reset":
        await call.complain(
            f"Error: bad size {arguments[0]}" if "x" in arguments[0] else "Error: size must be given as WxH"
        )
        return 255
    display.resize((int(size[1]), int(size[2])) if size else None)
    await call.phone.save()
    return 0


async def _wm_density(call: Call, arguments: list[str]) -> int:
    display = call.phone.screen.display
    if not arguments:
        await call.write(f"Physical density: {display.dpi}\n")
        if display.override_dpi is not None:
            await call.write(f"Override density: {display.override_dpi}\n")
        return 0
    if arguments[0] == "reset":
        display.override_dpi = None
    elif re.fullmatch(r"\d{1,5}", arguments[0], re.ASCII):
        if int(arguments[0]) < MIN_DPI:
            await call.complain(f"Error: density must be >= {MIN_DPI}")
            return 255
        display.override_dpi = int(arguments[0])
    else:
        await call.complain(f"Error: bad number {arguments[0]}")
        return 255
    await call.phone.save()
    return 0


async def _screencap(call: Call) -> int:
    flags, values, names = parse_options(call.arguments, "ph", "d")
    if "h" in flags:
        await call.complain(_SCREENCAP_USAGE)
        return 1
    if values.get("d", "0") != "0":
        await call.complain(f"Display Id '{values['d']}' is not valid.")
        return 1
    as_png = "p" in flags or (bool(names) and names[0].lower().endswith(".png"))
    picture = await (call.phone.screen.png() if as_png else call.phone.screen.raw())
    if not names:
        for start in range(0, len(picture), _PICTURE_CHUNK):
            await call.write(picture[start : start + _PICTURE_CHUNK])
        return 0
    try:
        await call.phone.files.write(call.path(names[0]), _once(picture))
    except PhoneFileError as fault:
        await call.complain(f"Error opening file: {names[0]} ({reason(fault)})")
        return 1
    return 0


async def _once(content: bytes) -> AsyncIterator[bytes]:
    yield content


_PICTURE_CHUNK = 256 << 10
_SCREENCAP_USAGE = """usage: screencap [-hp] [-d display-id] [FILENAME]
   -h: this message
   -p: save the file as a png.
   -d: specify the physical display ID to capture
If FILENAME ends with .png it will be saved as a png.
If FILENAME is not given, the results will be printed to stdout."""

_AM_ACTIONS: dict[str, Callable[[Call, list[str]], Awaitable[int]]] = {
    "broadcast": _am_broadcast,
    "force-stop": _am_force_stop,
    "kill": _am_force_stop,
    "start": _am_start,
    "start-activity": _am_start,
}

_INPUT_ACTIONS: dict[str, Callable[[Call, list[str]], None]] = {
    "draganddrop": _input_swipe,
    "keyevent": _input_keyevent,
    "motionevent": _input_motionevent,
    "swipe": _input_swipe,
    "tap": _input_tap,
    "text": _input_text,
}

COMMANDS: dict[str, Command] = {
    "am": _am,
    "input": _input,
    "monkey": _monkey,
    "screencap": _screencap,
    "wm": _wm,
}
