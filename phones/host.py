"""What this machine has of what Android in containers needs."""

from pathlib import Path
from typing import Final

_BINDER_DEVICE: Final = Path("/dev/binder")
_FILE_SYSTEMS: Final = Path("/proc/filesystems")


def has_binder() -> bool:
    """Whether the kernel has Android's binder, as devices or as the file system `binder`. Blocking."""
    return _BINDER_DEVICE.exists() or "binder" in _file_systems()


def _file_systems() -> set[str]:
    try:
        lines = _FILE_SYSTEMS.read_text().splitlines()
    except OSError:
        return set()
    return {line.split()[-1] for line in lines if line}
