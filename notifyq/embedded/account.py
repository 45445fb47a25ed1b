"""The account that runs the embedded PostgreSQL: the user's own, unless that is root, which PostgreSQL refuses.

For root an existing account runs it. No account is added, and only the server's own folders are opened to it.
"""

from __future__ import annotations

import os
import pwd
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from notifyq.errors import EmbeddedError

from .binaries import OWN_SERVER, environment

SERVICE_ACCOUNTS = ("postgres", "nobody")
CURE = f"run as an ordinary user, or {OWN_SERVER}"


@dataclass(frozen=True)
class Account:
    """The account that the server runs as. `switch`: it isn't the account of this process."""

    name: str
    uid: int
    gid: int
    switch: bool

    def run(self, argv: Sequence[str | Path], stdin: str = "") -> subprocess.CompletedProcess[str]:
        """Run a program to its end, with stderr in stdout. It runs in /, as the account may have no access to the
        current folder."""
        switch: dict[str, Any] = {}
        if self.switch:
            switch = {"user": self.uid, "group": self.gid, "extra_groups": []}
        return subprocess.run(
            argv,
            input=stdin,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
            env=environment(),
            cwd="/",
            **switch,
        )

    def can_run(self, bin_dir: Path) -> bool:
        """Whether the account can run PostgreSQL's programs in this folder."""
        try:
            return all(self.run([bin_dir / name, "--version"]).returncode == 0 for name in ("initdb", "postgres"))
        except PermissionError:
            return False

    def first_closed(self, folder: Path) -> Path | None:
        """The first folder on the path to this one that the account may not pass; None if there is none.

        A program that runs as the account tries it: not only the mode's bits decide, ACLs do too.
        """
        if not self.switch:
            return None
        way = [*reversed(folder.parents), folder]
        script = 'for d in "$@"; do [ -x "$d" ] || { echo "$d"; exit; }; done'
        try:
            closed = self.run(["/bin/sh", "-c", script, "sh", *way]).stdout.strip()
        except OSError as error:  # root in a sandbox, which can't become another user
            raise EmbeddedError(f"root can't run programs as {self.name} here ({error}); {CURE}") from error
        return Path(closed) if closed else None

    def own(self, folder: Path) -> None:
        """Make a folder that only the account may use."""
        folder.mkdir(mode=0o700)
        if self.switch:
            os.chown(folder, self.uid, self.gid, follow_symlinks=False)


def find_account(data: Path | None) -> Account:
    """This process's account. For root it is the owner of the data if there are data, else `postgres`, else `nobody`.

    Raises EmbeddedError if the account has no name, which initdb needs.
    """
    uid = os.geteuid()
    owner = uid or (data.stat().st_uid if data and data.exists() else 0)
    for who in (owner,) if owner else SERVICE_ACCOUNTS:
        try:
            entry = pwd.getpwuid(who) if isinstance(who, int) else pwd.getpwnam(who)
        except KeyError:
            continue
        return Account(entry.pw_name, entry.pw_uid, entry.pw_gid, switch=uid == 0)
    if owner:
        raise EmbeddedError(f"user id {owner} has no name in /etc/passwd, without which PostgreSQL won't run; {CURE}")
    names = " nor ".join(SERVICE_ACCOUNTS)
    raise EmbeddedError(f"PostgreSQL won't run as root, and there is no account {names} to run it as; {CURE}")
