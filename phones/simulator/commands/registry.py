"""All the phone's programs, by name."""

from phones.simulator.calls import Command
from phones.simulator.commands import apps, filesystem, logs, packaging, services, system, text

COMMANDS: dict[str, Command] = {
    **text.COMMANDS,
    **filesystem.COMMANDS,
    **system.COMMANDS,
    **logs.COMMANDS,
    **packaging.COMMANDS,
    **apps.COMMANDS,
    **services.COMMANDS,
}
