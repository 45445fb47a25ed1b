"""Crons: `cron` lists them, pauses and resumes them, runs one now, and removes one that no app declares."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable

import click

from notifyq.database.connection import SQL, Connection
from notifyq.errors import ConfigError

from .options import did_you_mean, dsn_option, option
from .output import say, span, table
from .session import session


@click.group(invoke_without_command=True)
@option("--json", "as_json", is_flag=True, help="a JSON object per line")
@dsn_option
@click.pass_context
def cron(ctx: click.Context, *, as_json: bool, dsn: str | None) -> None:
    """List crons and their next runs; pause, resume, run them."""
    if ctx.invoked_subcommand is not None:
        return

    async def run() -> list[tuple[str, float | None, float | None]]:
        async with session(dsn) as conn:
            return [(row[0], row[2], row[3]) for row in await conn.fetch(SQL["list_crons"])]

    found = asyncio.run(run())
    if as_json:
        for text, _, _ in found:
            click.echo(text)
    elif found:
        rows: list[list[object]] = []
        for text, next_seconds, last_seconds in found:
            c = json.loads(text)
            state = "paused" if c["paused"] else "on" if c["served"] else "no worker"
            coming = "" if c["paused"] or next_seconds is None else f"in {span(max(0.0, next_seconds))}"
            last = "" if last_seconds is None else f"{span(max(0.0, last_seconds))} ago {c['last_state'] or ''}".strip()
            rows.append([c["name"], c["expression"], c["tz"], state, coming, last])
        table(("name", "expression", "tz", "state", "next", "last"), rows)
    else:
        say("no crons: a worker writes those of its app when it starts")


_names = click.argument("names", metavar="NAME...", nargs=-1, required=True)


@cron.command()
@_names
@dsn_option
def pause(*, names: tuple[str, ...], dsn: str | None) -> None:
    """Pause crons, and cancel their tasks that haven't started."""
    _each(names, dsn, lambda conn, name: _run_for(conn, "SELECT notifyq.cron_pause($1)", name, "paused"))


@cron.command()
@_names
@dsn_option
def resume(*, names: tuple[str, ...], dsn: str | None) -> None:
    """Resume crons. Times that passed meanwhile are left out."""
    _each(names, dsn, lambda conn, name: _run_for(conn, "SELECT notifyq.cron_resume($1)", name, "resumed"))


@cron.command("run")
@_names
@dsn_option
def run_now(*, names: tuple[str, ...], dsn: str | None) -> None:
    """Enqueue a task of each cron now, and print their ids.

    The schedule stays as it is.
    """

    async def run(conn: Connection, name: str) -> str | None:
        id: int | None = await conn.fetchval("SELECT notifyq.cron_run($1)", name)
        return None if id is None else str(id)

    _each(names, dsn, run)


@cron.command()
@_names
@dsn_option
def remove(*, names: tuple[str, ...], dsn: str | None) -> None:
    """Remove crons that no running app declares."""

    async def run(conn: Connection, name: str) -> str | None:
        row = await conn.fetchrow(SQL["remove_cron"], name)
        if row is not None and row["worker"] is not None:
            raise ConfigError(
                f"cron {name!r} is declared by the app of running worker {row['worker']}; remove it there first"
            )
        return None if row is None else f"{name}: removed"

    _each(names, dsn, run)


async def _run_for(conn: Connection, statement: str, name: str, done: str) -> str | None:
    return f"{name}: {done}" if await conn.fetchval(statement, name) else None


def _each(names: tuple[str, ...], dsn: str | None, act: Callable[[Connection, str], Awaitable[str | None]]) -> None:
    """Act on each cron, and print the outcomes. Raises ConfigError for an unknown name, before it acts on any."""

    async def run() -> None:
        async with session(dsn) as conn:
            known = [row["name"] for row in await conn.fetch(SQL["list_crons"])]
            for name in names:
                if name not in known:
                    raise ConfigError(f"there is no cron {name!r}{did_you_mean(name, known)}")
            for name in dict.fromkeys(names):
                click.echo(await act(conn, name) or f"{name}: gone meanwhile")

    asyncio.run(run())
