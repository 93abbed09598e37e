"""What this machine has of what Android in containers needs."""

from pathlib import Path
from typing import Final, Literal

Lack = Literal["engine", "binder"]

_ENGINE_SOCKET: Final = Path("/var/run/docker.sock")
_BINDER_DEVICE: Final = Path("/dev/binder")
_FILE_SYSTEMS: Final = Path("/proc/filesystems")


def lack_for_android(docker_url: str) -> Lack | None:
    """What keeps this machine from running Android in containers, or None. Blocking.

    An engine elsewhere, at `docker_url`, has a kernel that cannot be seen from here, so that only a local
    one is looked for. Android needs the kernel's binder, as devices or as the file system `binder`.
    """
    path = docker_url.removeprefix("unix://")
    socket = Path(path) if path.startswith("/") else _ENGINE_SOCKET
    if not socket.is_socket():
        return "engine"
    if _BINDER_DEVICE.exists() or "binder" in _file_systems():
        return None
    return "binder"


def _file_systems() -> set[str]:
    try:
        lines = _FILE_SYSTEMS.read_text().splitlines()
    except OSError:
        return set()
    return {line.split()[-1] for line in lines if line}
