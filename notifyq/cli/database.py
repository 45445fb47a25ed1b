"""The database as a whole: migrate and stats, and demo and dev, which run an embedded PostgreSQL."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import time
from pathlib import Path
from typing import Any

import click

from notifyq.database import schema, upgrade
from notifyq.database.connection import SQL, server_version
from notifyq.errors import ConfigError, NotifyqError
from notifyq.options import STATES

from .options import dsn_option, number, option, setting
from .output import say, span, table
from .session import LONG_SECONDS, session

PROJECT_MARKS = ("pyproject.toml", ".git")


@click.command()
@option("--sql", is_flag=True, help="print the schema's SQL and change nothing")
@option(
    "--from",
    "since",
    metavar="VERSION",
    type=number(1, schema.SCHEMA_VERSION),
    help="with --sql: print the upgrade from this version of the schema, for psql",
)
@dsn_option
def migrate(*, sql: bool, since: int | None, dsn: str | None) -> None:
    """Install or upgrade the schema.

    Running it again does no harm. Workers and producers go on meanwhile: migrate first, then start workers of the new
    version.
    """
    if sql:
        if since == schema.SCHEMA_VERSION:
            raise ConfigError(f"--from {since} is this notifyq's own version; name an earlier one")
        text = schema.schema_sql()
        click.echo(text if since is None else upgrade.script(since, text), nl=False)
        return
    if since is not None:
        raise ConfigError("--from goes with --sql; without --sql the database itself knows its version")
    database, before, after = asyncio.run(_migrate(dsn))
    if before is None:
        click.echo(f"installed schema notifyq, version {after}, in database {database}")
    elif before == after:
        click.echo(f"database {database} has schema notifyq, version {after}, already")
    else:
        click.echo(f"upgraded schema notifyq in database {database} from version {before} to {after}")


async def _migrate(dsn: str | None) -> tuple[str, int | None, int]:
    async with session(dsn, migrated=False) as conn:
        before, after = await schema.migrate(conn, say)
        return await conn.fetchval("SELECT current_database()"), before, after


@click.command()
@option("--json", "as_json", is_flag=True, help="one JSON document, times in seconds")
@dsn_option
def stats(*, as_json: bool, dsn: str | None) -> None:
    """Count tasks by queue and state, and list workers.

    Each queue's line ends with the age of its oldest ready task, or "paused", and with how long its longest running
    task has run. The counts are exact: counting takes about half a second per million tasks, finished ones included.
    """

    async def run() -> dict[str, Any]:
        async with session(dsn) as conn, conn.transaction(readonly=True):
            # The planner expects 200 values in the view's column `state`. With the default work_mem it would sort
            # millions of rows.
            await conn.execute("SET LOCAL work_mem = '64MB'")
            text: str = await conn.fetchval(SQL["read_stats"], timeout=LONG_SECONDS)
            findings = [dict(row) for row in await conn.fetch(SQL["list_findings"], True)]
            return {**json.loads(text), "findings": findings}

    found = asyncio.run(run())
    if as_json:
        click.echo(json.dumps(found))
        return
    table(
        ("queue", *STATES, "oldest ready", "longest running"),
        [
            [
                q["queue"],
                *(q[state] for state in STATES),
                "paused" if q["paused"] else _age(q),
                _age(q, "longest_running_seconds"),
            ]
            for q in found["queues"]
        ],
    )
    if found["unserved"]:
        click.echo("\nready, but no worker that lives takes this type from this queue:")
        columns = ("queue", "type", "ready", "oldest ready")
        table(columns, [[u["queue"], u["type"], u["ready"], _age(u)] for u in found["unserved"]])
    click.echo("\nworkers:" if found["workers"] else "\nno workers")
    if found["workers"]:
        table(
            ("id", "name", "running", "slots", "seen", "queues", "status"),
            [
                [w["id"], w["name"], w["running"], w["concurrency"], f"{span(w['seen_seconds'])} ago",
                 ", ".join(w["queues"]), w["status"]]
                for w in found["workers"]
            ],
        )  # fmt: skip
    for finding in found["findings"]:
        click.echo(f"\n{finding['problem']}. Cure: {finding['cure']}")


def _age(row: dict[str, Any], name: str = "oldest_ready_seconds") -> str:
    seconds = row[name]
    return "" if seconds is None else f"{seconds:.1f} s"


@click.command()
@option("--seconds", type=float, default=20.0, help="how long traffic runs")
@option("--tasks", type=int, default=5000, help="about how many tasks in all")
# This --dsn has no environment variables: a demo leaves the database of NOTIFYQ_DSN alone.
@option("--dsn", metavar="URL", help="run it on your server, in a database that it creates and drops")
def demo(*, seconds: float, tasks: int, dsn: str | None) -> int:
    """See it work: signups, mail, a worker that dies.

    At the end it checks what notifyq promises.
    """
    from notifyq.demo import main

    return main(seconds, tasks, dsn)


@click.command()
@click.argument("name", required=False)
@setting("--data-dir", type=click.Path(path_type=Path), help="keep the data here, whatever the project")
@option("--port", metavar="PORT", type=number(1, 65535), help="listen on this port of 127.0.0.1 too; no password")
def dev(*, name: str | None, data_dir: Path | None, port: int | None) -> int:
    """Run the embedded PostgreSQL until Ctrl-C.

    Each project has a server of its own. NAME is the project's name; without it, the project is the folder with
    pyproject.toml or .git, or else this folder. The data and the DSN stay from start to start, and the schema is
    installed. Stdout has one line, the DSN.
    """
    if name is not None and data_dir is not None:
        raise ConfigError(f"NAME {name!r} and --data-dir {data_dir} both name the folder of the data; give only one")
    folder = data_dir or state_folder() / (project_name() if name is None else check_project_name(name))
    # Both signals raise KeyboardInterrupt. Server cleans up, wherever the exception interrupts it.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return _serve(folder, port)
    except KeyboardInterrupt:
        return 0


def _serve(data_dir: Path, port: int | None) -> int:
    from notifyq.embedded import Server

    with Server(data_dir, durable=True, port=port) as server:
        dsn = server.dsn()

        async def prepare() -> str:
            async with session(dsn, migrated=False) as conn:
                await schema.migrate(conn)
                return await server_version(conn)

        version = asyncio.run(prepare())
        click.echo(dsn)
        shared = f"the one that process {server.owner_pid or '(unknown)'} runs: it ends when that process ends"
        whose = f"shares {shared}" if server.shares else server.binaries.source
        say(f"PostgreSQL {version} ({whose}), process {server.pid}, data in {data_dir}")
        stays = (
            ""
            if server.is_stable
            else " (another one at each start, as this folder's path is long; --port 5433 keeps it)"
        )
        say(f"use it: export NOTIFYQ_DSN='{dsn}'{stays}; end it: Ctrl-C")
        pid, log = server.pid, server.log_path
        while _lives(pid):
            time.sleep(0.5)
        if server.shares:
            raise NotifyqError(f"PostgreSQL has ended; it was {shared}")
        raise NotifyqError(f"PostgreSQL has ended by itself; {log} may say why")


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # it runs as another user: this process only attached to its server
    return True


def state_folder() -> Path:
    """The folder for the data of all projects, as XDG has it.

    For root it is in /var/lib, as root's home is closed to the account that runs PostgreSQL for root. Raises
    ConfigError for a user without a home.
    """
    named = Path(os.environ.get("XDG_STATE_HOME", ""))
    if named.is_absolute():
        return named / "notifyq" / "dev"
    if os.geteuid() == 0:
        return Path("/var/lib/notifyq/dev")
    try:
        return Path.home() / ".local" / "state" / "notifyq" / "dev"
    except RuntimeError:
        raise ConfigError("this user has no home folder to keep data in; say where: --data-dir FOLDER") from None


def project_name(here: Path | None = None) -> str:
    """The name of the project that this folder belongs to, with a hash of its path, as two may have the same name."""
    here = Path(os.path.realpath(here or Path.cwd()))
    marked = (folder for folder in (here, *here.parents) if any((folder / it).exists() for it in PROJECT_MARKS))
    folder = next(marked, here)
    name = re.sub(r"[^\w.-]+", "-", folder.name)[:20] or "root"
    return f"{name}-{hashlib.sha256(os.fsencode(folder)).hexdigest()[:6]}"


def check_project_name(name: str) -> str:
    """Return `name`. Raises ConfigError for one that could lead out of the state folder."""
    if not re.fullmatch(r"\w[\w.-]{0,39}", name):
        raise ConfigError(f"NAME is {name!r:.50}; expected up to 40 letters, digits, - . and _; a folder is --data-dir")
    return name
