"""Queues at run time: `queues` lists them; `queue` pauses, resumes and limits them, for all workers."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import click

from notifyq.config import check_name
from notifyq.database.connection import SQL, Connection
from notifyq.options import parse_rate

from .options import did_you_mean, dsn_option, number, option, rate
from .output import say, span, table
from .session import LONG_SECONDS, session


async def _queues(conn: Connection) -> list[dict[str, Any]]:
    return [json.loads(row[0]) for row in await conn.fetch(SQL["list_queues"], timeout=LONG_SECONDS)]


@click.command()
@option("--json", "as_json", is_flag=True, help="a JSON object per line")
@dsn_option
def queues(*, as_json: bool, dsn: str | None) -> None:
    """List queues, with their limits and workers.

    Each line says whether the queue is paused, its limits, how many tasks run, how many wait for its limits, and how
    many workers serve it.
    """

    async def run() -> list[dict[str, Any]]:
        async with session(dsn) as conn:
            return await _queues(conn)

    found = asyncio.run(run())
    if as_json:
        for queue in found:
            click.echo(json.dumps(queue))
    elif found:
        table(
            ("queue", "state", "limit", "rate", "running", "waiting", "workers"),
            [
                [q["name"], "paused" if q["paused"] else "open", q["limit_running"], _rate(q), q["running"],
                 q["waiting"], q["workers"]]
                for q in found
            ],
        )  # fmt: skip
    else:
        say("no queues: nothing is enqueued, and no worker runs")


def _rate(queue: dict[str, Any]) -> str:
    count, seconds = queue["limit_rate"], queue["limit_seconds"]
    return "" if count is None else f"{count}/{seconds:g}s" if seconds < 120 else f"{count}/{span(seconds)}"


@click.group()
def queue() -> None:
    """Pause, resume or limit queues, for every worker.

    Workers follow within a quarter of a second.
    """


_names = click.argument("names", metavar="NAME...", nargs=-1, required=True)


@queue.command()
@_names
@dsn_option
def pause(*, names: tuple[str, ...], dsn: str | None) -> None:
    """Start no more tasks from these queues. Running ones go on."""
    _each(names, "SELECT notifyq.pause($1)", "paused", "is paused already", dsn)


@queue.command()
@_names
@dsn_option
def resume(*, names: tuple[str, ...], dsn: str | None) -> None:
    """Start tasks from these queues again."""
    _each(names, "SELECT notifyq.resume($1)", "resumed", "isn't paused", dsn)


@queue.command()
@_names
@option("--running", metavar="N", type=number(1, 2**31 - 1), help="at most N of a queue's tasks run at the same time")
@option("--rate", type=rate, metavar="RATE", help="at most this many start in any such time: 100/minute, 5/s, 20/10s")
@option("--none", "unlimited", is_flag=True, help="remove the limits")
@dsn_option
def limit(*, names: tuple[str, ...], running: int | None, rate: str | None, unlimited: bool, dsn: str | None) -> None:
    """Limit each of these queues, over all workers. A limit that isn't given is removed."""
    if unlimited is (running is not None or rate is not None):
        raise click.UsageError("give --running N, --rate RATE or both; or --none, to remove the limits")
    count, seconds = parse_rate(rate) if rate is not None else (None, None)
    done = "no limits" if unlimited else "limited"
    _each(names, "SELECT notifyq.limit_queue($1, $2, $3, $4) IS NOT NULL", done, "", dsn, running, count, seconds)


def _each(names: tuple[str, ...], statement: str, done: str, already: str, dsn: str | None, *args: object) -> None:
    """Run the statement for each queue, and print for each whether it changed something."""
    for name in names:
        check_name("queue", name)

    async def run() -> None:
        async with session(dsn) as conn:
            for name in dict.fromkeys(names):
                changed = await conn.fetchval(statement, name, *args)
                click.echo(f"{name}: {done if changed else already}")
            served = [queue["name"] for queue in await _queues(conn) if queue["workers"]]
            for name in dict.fromkeys(names):
                if name not in served:
                    say(f"no worker serves queue {name!r} now{did_you_mean(name, served)}")

    asyncio.run(run())
