"""The database as a whole: migrate, stats, and the embedded one of demo and dev."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import click

from notifyq import schema, upgrade
from notifyq.errors import ConfigError, NotifyqError
from notifyq.store import SQL, server_version
from notifyq.task import STATES

from .options import dsn_option, number, option, setting
from .output import say, span, table
from .session import LONG_SECONDS, session


@click.command()
@option("--sql", is_flag=True, help="print the schema's SQL, to look at or to run elsewhere, and do nothing")
@option(
    "--from",
    "since",
    metavar="VERSION",
    type=number(1, schema.SCHEMA_VERSION - 1),
    help="with --sql: print the way from this version of the schema, for psql",
)
@dsn_option
def migrate(*, sql: bool, since: int | None, dsn: str | None) -> None:
    """Install or upgrade the schema; once is enough, twice does no harm.

    Workers and producers go on meanwhile: migrate first, then bring the workers of the new version.
    """
    if sql:
        text = schema.schema_sql()
        click.echo(text if since is None else upgrade.script(since, text), nl=False)
        return
    if since is not None:
        raise ConfigError("--from is for --sql; otherwise the database itself says which version it has")
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

    Beside each queue the age of its oldest ready task, in seconds. All are counted, none estimated: that takes
    about half a second a million tasks, of history too.
    """

    async def run() -> dict[str, Any]:
        async with session(dsn) as conn, conn.transaction(readonly=True):
            # The planner expects 200 values of the view's state, and would sort millions of rows with the default.
            await conn.execute("SET LOCAL work_mem = '64MB'")
            text: str = await conn.fetchval(SQL["stats"], timeout=LONG_SECONDS)
            findings = [dict(row) for row in await conn.fetch(SQL["findings"], True)]
            return {**json.loads(text), "findings": findings}

    found = asyncio.run(run())
    if as_json:
        click.echo(json.dumps(found))
        return
    table(
        ("queue", *STATES, "oldest ready"),
        [[q["queue"], *(q[state] for state in STATES), _age(q)] for q in found["queues"]],
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


def _age(row: dict[str, Any]) -> str:
    seconds = row["oldest_ready_seconds"]
    return "" if seconds is None else f"{seconds:.1f} s"


@click.command()
@option("--seconds", type=float, default=20.0, help="how long there is traffic")
@option("--tasks", type=int, default=5000, help="about how many tasks in all")
# Without the variables of other commands' --dsn: a demo leaves the database of NOTIFYQ_DSN alone.
@option("--dsn", metavar="URL", help="run it on your server, not on an embedded one")
def demo(*, seconds: float, tasks: int, dsn: str | None) -> int:
    """See it work: signups, mail, a worker that dies; checked in the end."""
    from notifyq.demo import main

    return main(seconds, tasks, dsn)


@click.command()
@setting("--data-dir", type=click.Path(path_type=Path), help="where the data are kept  [default: in XDG_STATE_HOME]")
@option(
    "--port", metavar="PORT", type=number(1, 65535), help="listen on this port of 127.0.0.1 too; there is no password"
)
def dev(*, data_dir: Path | None, port: int | None) -> int:
    """Run the embedded PostgreSQL until Ctrl-C.

    Its data are kept, its schema is migrated. The first line on stdout is its DSN, and nothing else is.
    """
    # The same for both signals; Server leaves nothing behind, at whatever point it is interrupted.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        return _serve(data_dir or state_folder(), port)
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
        say(f"PostgreSQL {version} ({server.binaries.source}), process {server.pid}, data in {data_dir}")
        say(f"use it: export NOTIFYQ_DSN='{dsn}'; end it: Ctrl-C")
        while _lives(server.pid):
            time.sleep(0.5)
        raise NotifyqError(f"PostgreSQL has ended by itself; {server.log_path} may say why")


def _lives(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass  # somebody else's, to which we are attached
    return True


def state_folder() -> Path:
    """XDG's. Not for root without one: its home is closed to the account that runs PostgreSQL for it."""
    named = Path(os.environ.get("XDG_STATE_HOME", ""))
    if named.is_absolute():
        return named / "notifyq" / "dev"
    return (Path("/var/lib") if os.geteuid() == 0 else Path.home() / ".local" / "state") / "notifyq" / "dev"
