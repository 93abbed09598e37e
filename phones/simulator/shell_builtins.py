"""The shell's commands that change the shell itself, and how it complains."""

from phones.simulator import syntax
from phones.simulator.calls import Call, Streams, reason, to_bytes
from phones.simulator.files import PhoneFileError


class Exit(Exception):
    """`exit` was called."""

    def __init__(self, status: int) -> None:
        self.status = status


async def complain(streams: Streams, message: str, status: int) -> int:
    """Write an error in the shell's own name, and return `status`."""
    await streams.stderr.write(to_bytes(f"sh: {message}\n"))
    return status


async def change_directory(call: Call) -> int:
    """`cd`."""
    target = call.arguments[0] if call.arguments else call.session.variables.get("HOME", "/")
    if target == "-":
        target = call.session.variables.get("OLDPWD", "/")
    try:
        path = call.path(target)
        if not (await call.phone.files.stat(path)).is_directory:
            return await complain(call.streams, f"cd: {target}: Not a directory", 2)
    except PhoneFileError as fault:
        return await complain(call.streams, f"cd: {target}: {reason(fault)}", 2)
    call.session.variables["OLDPWD"] = call.session.directory
    call.session.variables["PWD"] = path
    call.session.directory = path
    return 0


async def end_shell(call: Call) -> int:
    """`exit`: raises Exit."""
    text = call.arguments[0] if call.arguments else str(call.session.status)
    if not (text.isascii() and text.removeprefix("-").isdigit() and len(text) < 10):
        await complain(call.streams, f"exit: {text}: bad number", 1)
        raise Exit(1)
    raise Exit(int(text) & 0xFF)


async def export(call: Call) -> int:
    """`export`."""
    for argument in call.arguments:
        name, assigned, value = argument.partition("=")
        if not (set(name) <= syntax.NAME_REST and name[:1] in syntax.NAME_START and name):
            return await complain(call.streams, f"export: {name}: is not an identifier", 1)
        if assigned:
            call.session.variables[name] = value
        call.session.exported.add(name)
    return 0


async def unset(call: Call) -> int:
    """`unset`."""
    for name in call.arguments:
        call.session.variables.pop(name, None)
        call.session.exported.discard(name)
    return 0
