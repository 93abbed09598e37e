"""Secrets made once and kept under data_dir, readable by the server's user alone."""

import os
from pathlib import Path

from server.clock import Randomness


def kept_secret(data_dir: Path, name: str, randomness: Randomness, configured: str = "") -> str:
    """The configured secret, or one made at the first start and kept as data_dir/secrets/<name>."""
    if configured:
        return configured
    folder = data_dir / "secrets"
    folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    path = folder / name
    if not path.exists():
        draft = folder / f".{name}.new"
        descriptor = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        with os.fdopen(descriptor, "w") as file:
            file.write(randomness.token(48))
            file.flush()
            os.fsync(file.fileno())
        draft.rename(path)
    return path.read_text()
