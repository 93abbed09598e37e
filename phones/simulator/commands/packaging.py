"""`pm` and `cmd package`. Source of options and answers: AOSP's PackageManagerShellCommand."""

from collections.abc import AsyncIterator, Awaitable, Callable
from datetime import UTC, datetime

from phones.simulator.calls import Call, Command, open_source
from phones.simulator.files import PhoneFileError
from phones.simulator.packages import (
    DANGEROUS_PERMISSIONS,
    InstallOptions,
    InstallRefused,
    Package,
    UnknownSession,
)
from phones.simulator.streams import FileSource, Source

_VALUED = (
    "-i",
    "--user",
    "--abi",
    "--install-location",
    "--originating-uri",
    "--referrer",
    "--pkg",
    "--package",
    "-p",
)


class _PmFault(Exception):
    """What `pm` prints to stderr before it ends with 1."""


async def _pm(call: Call) -> int:
    if not call.arguments:
        await call.write("Package manager (package) commands:\n  " + "\n  ".join(sorted(_ACTIONS)) + "\n")
        return 1
    name, *arguments = call.arguments
    action = _ACTIONS.get(name)
    if action is None:
        await call.complain(f"Unknown command: {name}")
        return 255
    try:
        return await action(call, arguments)
    except _PmFault as fault:
        await call.complain(str(fault))
        return 1
    except InstallRefused as refusal:
        await call.write(f"Failure [{refusal}]\n")
        return 1
    except UnknownSession:
        await call.complain("Error: java.lang.SecurityException: Caller has no access to session")
        return 255


def _options(arguments: list[str], valued: tuple[str, ...] = _VALUED) -> tuple[dict[str, str], list[str]]:
    """Options with their values (empty where they have none), and the rest."""
    found: dict[str, str] = {}
    waiting = list(arguments)
    while waiting and waiting[0].startswith("-") and waiting[0] != "-":
        option = waiting.pop(0)
        if option in valued or option == "-S":
            if not waiting:
                raise _PmFault(f"Error: Argument expected after {option}")
            found[option] = waiting.pop(0)
        else:
            found[option] = ""
    return found, waiting


def _size(options: dict[str, str]) -> int | None:
    text = options.get("-S")
    if text is None:
        return None
    if not (text.isascii() and text.isdigit() and len(text) < 15):
        raise _PmFault(f'Error: java.lang.NumberFormatException: For input string: "{text}"')
    return int(text)


def _install_options(options: dict[str, str]) -> InstallOptions:
    return InstallOptions(
        replace="-r" in options,
        downgrade="-d" in options,
        grant="-g" in options,
        expected_package=options.get("--pkg") or options.get("--package"),
    )


async def _install(call: Call, arguments: list[str]) -> int:
    options, rest = _options(arguments)
    size = _size(options)
    if not rest and size is None:
        raise _PmFault("Error: must either specify a package size or an APK file")
    source = await _source(call, rest[0] if rest else "-")
    try:
        await call.phone.packages.install(_pieces(source, size), _install_options(options), size)
    finally:
        await _close(source)
    await call.write("Success\n")
    return 0


async def _source(call: Call, path: str) -> Source:
    if path == "-":
        return call.streams.stdin
    try:
        return await open_source(call.phone, call.path(path))
    except PhoneFileError:
        raise _PmFault(
            f"Error: Unable to open file: {path}\nConsider using a file under /data/local/tmp/"
        ) from None


async def _close(source: Source) -> None:
    if isinstance(source, FileSource):
        await source.close()


async def _pieces(source: Source, size: int | None) -> AsyncIterator[bytes]:
    """At most `size` bytes: what comes after them on the stream is not ours."""
    while (size is None or size > 0) and (chunk := await source.read()):
        if size is not None:
            chunk = chunk[:size]
            size -= len(chunk)
        yield chunk


async def _install_create(call: Call, arguments: list[str]) -> int:
    options, _ = _options(arguments)
    _size(options)
    number = await call.phone.packages.create_session(_install_options(options))
    await call.write(f"Success: created install session [{number}]\n")
    return 0


async def _install_write(call: Call, arguments: list[str]) -> int:
    options, rest = _options(arguments)
    if len(rest) < 2:
        raise _PmFault("Error: must specify a session and a split name")
    size = _size(options)
    source = await _source(call, rest[2] if len(rest) > 2 else "-")
    try:
        written = await call.phone.packages.write_session(
            _session(rest[0]), rest[1], _pieces(source, size), size
        )
    finally:
        await _close(source)
    await call.write(f"Success: streamed {written} bytes\n")
    return 0


async def _install_commit(call: Call, arguments: list[str]) -> int:
    _, rest = _options(arguments)
    if not rest:
        raise _PmFault("Error: must specify a session")
    await call.phone.packages.commit_session(_session(rest[0]))
    await call.write("Success\n")
    return 0


async def _install_abandon(call: Call, arguments: list[str]) -> int:
    _, rest = _options(arguments)
    if not rest:
        raise _PmFault("Error: must specify a session")
    await call.phone.packages.abandon_session(_session(rest[0]))
    await call.write("Success\n")
    return 0


def _session(text: str) -> int:
    if not (text.isascii() and text.isdigit() and len(text) < 12):
        raise UnknownSession
    return int(text)


async def _uninstall(call: Call, arguments: list[str]) -> int:
    _, rest = _options(arguments)
    if not rest:
        raise _PmFault("Error: package name not specified")
    if await call.phone.packages.uninstall(rest[0]):
        await call.write("Success\n")
        return 0
    await call.write("Failure [DELETE_FAILED_INTERNAL_ERROR]\n")
    return 1


async def _clear(call: Call, arguments: list[str]) -> int:
    _, rest = _options(arguments)
    if not rest:
        raise _PmFault("Error: no package specified")
    cleared = await call.phone.packages.clear(rest[0])
    await call.write("Success\n" if cleared else "Failed\n")
    return 0 if cleared else 1


async def _grant(call: Call, arguments: list[str]) -> int:
    return await _change_permission(call, arguments, granted=True)


async def _revoke(call: Call, arguments: list[str]) -> int:
    return await _change_permission(call, arguments, granted=False)


async def _change_permission(call: Call, arguments: list[str], *, granted: bool) -> int:
    _, rest = _options(arguments)
    if len(rest) < 2:
        raise _PmFault("Error: no package specified" if not rest else "Error: no permission specified")
    try:
        await call.phone.packages.grant(rest[0], rest[1], granted=granted)
    except ValueError as fault:
        verb = "grant" if granted else "revoke"
        await call.complain(
            f"\nException occurred while executing '{verb}':\njava.lang.IllegalArgumentException: {fault}"
        )
        return 255
    return 0


async def _list(call: Call, arguments: list[str]) -> int:
    if not arguments:
        raise _PmFault("Error: didn't specify type of data to list")
    kind, *rest = arguments
    if kind in ("package", "packages"):
        return await _list_packages(call, rest)
    if kind == "features":
        for feature in (
            "android.hardware.screen.portrait",
            "android.hardware.touchscreen",
            "android.software.home_screen",
        ):
            await call.write(f"feature:{feature}\n")
        return 0
    if kind == "users":
        await call.write("Users:\n\tUserInfo{0:Owner:c13} running\n")
        return 0
    raise _PmFault(f"Error: unknown list type '{kind}'")


async def _list_packages(call: Call, arguments: list[str]) -> int:
    options, rest = _options(arguments, ("--user", "--uid"))
    known = {
        "-f",
        "-3",
        "-s",
        "-U",
        "-e",
        "-d",
        "-a",
        "-i",
        "-l",
        "-u",
        "--show-versioncode",
        "--user",
        "--uid",
    }
    if unknown := options.keys() - known:
        raise _PmFault(f"Error: Unknown option: {min(unknown)}")
    for package in call.phone.packages.all():
        unwanted = ("-3" in options and package.is_system) or ("-s" in options and not package.is_system)
        if unwanted or "-d" in options or (rest and rest[0] not in package.name):
            continue
        file = f"{package.files[0]}=" if "-f" in options else ""
        version = f" versionCode:{package.version_code}" if "--show-versioncode" in options else ""
        user = f" uid:{package.user_id}" if "-U" in options else ""
        installer = "  installer=null" if "-i" in options else ""
        await call.write(f"package:{file}{package.name}{version}{installer}{user}\n")
    return 0


async def _path(call: Call, arguments: list[str]) -> int:
    _, rest = _options(arguments)
    if not rest:
        raise _PmFault("Error: no package specified")
    package = call.phone.packages.get(rest[0])
    if package is None:
        return 1
    await call.write("".join(f"package:{path}\n" for path in package.files))
    return 0


async def _resolve_activity(call: Call, arguments: list[str]) -> int:
    options, rest = _options(arguments, ("-a", "-c", "-d", "-t", "-n", "-p", "--user"))
    name = options.get("-p") or options.get("-n", "").partition("/")[0] or (rest[0] if rest else "")
    package = call.phone.packages.get(name)
    if package is None or package.component is None:
        await call.write("No activity found\n")
        return 0
    await call.write("priority=0 preferredOrder=0 match=0x108000 specificIndex=-1 isDefault=false\n")
    await call.write(f"{package.component}\n")
    return 0


def described(package: Package) -> str:
    """What `dumpsys package` says of one app."""
    flags = "SYSTEM HAS_CODE ALLOW_BACKUP" if package.is_system else "HAS_CODE ALLOW_CLEAR_USER_DATA"
    asked = [name for name in package.permissions if name in DANGEROUS_PERMISSIONS]
    lines = [
        "Packages:",
        f"  Package [{package.name}] ({package.user_id:x}):",
        f"    userId={package.user_id}",
        f"    codePath={package.files[0].rpartition('/')[0]}",
        f"    primaryCpuAbi={package.abi or 'null'}",
        f"    versionCode={package.version_code} minSdk={package.min_sdk} targetSdk={package.target_sdk}",
        f"    versionName={package.version_name or 'null'}",
        f"    flags=[ {flags} ]",
        f"    firstInstallTime={_time(package.installed_at)}",
        f"    lastUpdateTime={_time(package.updated_at)}",
    ]
    if package.permissions:
        lines.append("    requested permissions:")
        lines += [f"      {name}" for name in package.permissions]
        lines.append("    install permissions:")
        lines += [f"      {name}: granted=true" for name in package.permissions if name not in asked]
    lines.append(
        "    User 0: ceDataInode=0 installed=true hidden=false suspended=false stopped=false enabled=0"
    )
    if asked:
        lines.append("      runtime permissions:")
        lines += [f"        {n}: granted={str(n in package.granted).lower()}" for n in asked]
    return "\n".join(lines) + "\n"


def _time(seconds: int) -> str:
    return f"{datetime.fromtimestamp(seconds, UTC):%Y-%m-%d %H:%M:%S}"


async def dump_package(call: Call, arguments: list[str]) -> int:
    """`dumpsys package [NAME]`: one app, or all of them."""
    if not arguments:
        for package in call.phone.packages.all():
            await call.write(described(package))
        return 0
    named = call.phone.packages.get(arguments[0])
    if named is None:
        await call.write(f"Unable to find package: {arguments[0]}\n")
    else:
        if named.component is not None:
            await call.write(
                "Activity Resolver Table:\n  Non-Data Actions:\n      android.intent.action.MAIN:\n"
                f"        {named.user_id:x} {named.component} filter {named.user_id:x}\n"
                '          Action: "android.intent.action.MAIN"\n'
                '          Category: "android.intent.category.LAUNCHER"\n\n'
            )
        await call.write(described(named))
    return 0


_ACTIONS: dict[str, Callable[[Call, list[str]], Awaitable[int]]] = {
    "clear": _clear,
    "dump": dump_package,
    "grant": _grant,
    "install": _install,
    "install-abandon": _install_abandon,
    "install-commit": _install_commit,
    "install-create": _install_create,
    "install-write": _install_write,
    "list": _list,
    "path": _path,
    "resolve-activity": _resolve_activity,
    "revoke": _revoke,
    "uninstall": _uninstall,
}

COMMANDS: dict[str, Command] = {"pm": _pm}
