"""The composition root: argv → serve | doctor | create-admin. Alone imports the plugins."""

import argparse
import asyncio
import sys
from collections.abc import Callable
from pathlib import Path

import plugins.apps
import plugins.billing
import plugins.devices
import plugins.notify
import plugins.users
from server.app import open_beside
from server.clock import SystemRandomness
from server.config import ConfigFault, Configuration, load
from server.doctor import examine, repair
from server.errors import Problem
from server.observe import configure_logging
from server.plugin import Plugin, PluginFault, in_order
from server.serve import START_FAULTS, serve

Plugins = tuple[Plugin, ...]

PLUGINS = (
    plugins.users.PLUGIN,
    plugins.notify.PLUGIN,
    plugins.billing.PLUGIN,
    plugins.devices.PLUGIN,
    plugins.apps.PLUGIN,
)


def main(arguments: list[str]) -> int:
    """Run a command; 2 is the exit code for a configuration that cannot be used."""
    chosen = _parse(arguments)
    configure_logging()
    try:
        ordered = in_order(PLUGINS)
        configuration = load(chosen.config, ordered)
    except (ConfigFault, PluginFault) as fault:
        print(f"cloudphone: {fault}", file=sys.stderr)
        return 2
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        code: int = runner.run(chosen.act(configuration, ordered, chosen))
    return code


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    """uvloop's where it is installed; asyncio's own is slower and just as right."""
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


def _parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m server", description="Cloudphone: phones in a browser.")
    parser.add_argument(
        "--config", type=Path, help="the configuration file (default: config.toml beside the code)"
    )
    parser.set_defaults(act=_serve)
    commands = parser.add_subparsers(metavar="command")
    for name, act, purpose in (
        ("doctor", _doctor, "check what the server needs, a line each"),
        ("create-admin", _create_admin, "create or promote an administrator"),
    ):
        command = commands.add_parser(name, help=purpose, description=purpose)
        command.add_argument("--config", type=Path, default=argparse.SUPPRESS)
        command.set_defaults(act=act)
    doctor = commands.choices["doctor"]
    doctor.add_argument("--repair", action="store_true", help="mend what came apart while no server ran")
    doctor.add_argument("--dry-run", action="store_true", help="with --repair: only say what would be mended")
    admin = commands.choices["create-admin"]
    admin.add_argument("--email", required=True)
    admin.add_argument(
        "--password-stdin", action="store_true", help="read the new account's password from stdin"
    )
    chosen = parser.parse_args(arguments)
    if chosen.act is _doctor and chosen.dry_run and not chosen.repair:
        doctor.error("--dry-run goes with --repair")
    return chosen


async def _serve(configuration: Configuration, ordered: Plugins, _chosen: argparse.Namespace) -> int:
    return await serve(configuration, ordered)


async def _doctor(configuration: Configuration, ordered: Plugins, chosen: argparse.Namespace) -> int:
    code = await examine(configuration, ordered)
    if chosen.repair:
        code = max(code, await repair(configuration, ordered, dry_run=chosen.dry_run))
    return code


async def _create_admin(configuration: Configuration, _ordered: Plugins, chosen: argparse.Namespace) -> int:
    password = sys.stdin.readline().rstrip("\n") if chosen.password_stdin else None
    try:
        async with open_beside(configuration) as database:
            await database.migrate("users", plugins.users.PLUGIN.migrations)
            print(await plugins.users.create_admin(database, SystemRandomness(), chosen.email, password))
    except (*START_FAULTS, Problem) as fault:
        print(f"cloudphone: {fault}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
