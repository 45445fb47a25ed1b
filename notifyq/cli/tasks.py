"""Existing tasks: list them, retry them, cancel them, prune them."""

from __future__ import annotations

import asyncio
import json

import click

from notifyq.database.connection import SQL
from notifyq.options import ENDED, STATES
from notifyq.worker.maintenance import DEAD_KEPT_SECONDS, PRUNE_AT_ONCE

from .options import did_you_mean, dsn_option, duration, number, option, task_id, word
from .output import percent, say, span, table
from .session import LONG_SECONDS, session

SAYS_LENGTH = 60  # characters of the last column


@click.command()
@option("--state", type=word(*STATES), metavar="STATE", help=f"only in this state: {', '.join(STATES)}")
@option("-q", "--queue", metavar="NAME", help="only of this queue")
@option("--type", metavar="TYPE", help="only of this type")
@option("--limit", metavar="N", type=number(1, 1_000_000), default=50, help="at most N tasks")
@option("--json", "as_json", is_flag=True, help="a JSON object per line, with payload, result and errors")
@dsn_option
def tasks(
    *, state: str | None, queue: str | None, type: str | None, limit: int, as_json: bool, dsn: str | None
) -> None:
    """List tasks, finished ones too, the newest first.

    The last column is the task's progress or its last error.
    """

    async def run() -> tuple[list[tuple[str, float]], int, str]:
        async with session(dsn) as conn, conn.transaction(readonly=True):
            rows: list[tuple[str, float]] = []
            count = 0
            # A few rows at a time: --json prints payloads, of up to 16 MB each, as they arrive.
            args = (state, queue, type, limit, as_json)
            prefetch = 4 if as_json else 500
            async for text, seconds in conn.cursor(SQL["list_tasks"], *args, prefetch=prefetch, timeout=LONG_SECONDS):
                count += 1
                if as_json:
                    click.echo(text)
                else:
                    rows.append((text, seconds))
            guess = ""
            if not count and (queue or type):
                known = await conn.fetchrow(SQL["list_names"], timeout=LONG_SECONDS)
                assert known is not None
                if queue and queue not in known["queues"]:
                    guess += f"; no task is of queue {queue!r}{did_you_mean(queue, known['queues'])}"
                if type and type not in known["types"]:
                    guess += f"; no task is of type {type!r}{did_you_mean(type, known['types'])}"
            return rows, count, guess

    rows, count, guess = asyncio.run(run())
    if rows:
        columns = ("id", "state", "when", "queue", "type", "attempts", "says")
        table(columns, [_row(json.loads(text), seconds) for text, seconds in rows])
    if not count:
        say(f"no such tasks{guess}")


def _row(task: dict[str, object], seconds: float | None) -> list[object]:
    words = {"scheduled": "in {}", "running": "for {}", "ready": "waits {}"}
    when = words.get(str(task["state"]), "{} ago").format("infinity" if seconds is None else span(abs(seconds)))
    if task["state"] == "scheduled" and seconds is not None and seconds < 0:
        when = f"due {span(-seconds)} ago"
    if task["waits_for"] == "crashed":
        when = "waits to run alone, as its worker vanished"
    elif task["waits_for"]:
        when = f"waits for {task['waits_for']}"
    attempts = "/".join(str(n) for n in (task["attempts"], task["max_attempts"]) if n is not None)
    says = " ".join((percent(task) or str(task["error"] or "")).split())
    if len(says) > SAYS_LENGTH:
        says = says[: SAYS_LENGTH - 1] + "…"
    return [task["id"], task["state"], when, task["queue"], task["type"], attempts, says]


@click.command()
@click.argument("ids", metavar="ID...", type=task_id, nargs=-1, required=True)
@dsn_option
def retry(*, ids: tuple[int, ...], dsn: str | None) -> int:
    """Run tasks again, now.

    A dead or cancelled task starts again with attempts at 0. A task that waits for its time becomes due.
    """
    reasons = {
        "ready": "it is ready already",
        "scheduled": "it waits for others: for its limit, its order, or what it comes after",
        "running": "it is running",
        "done": "it is done; enqueue another to run it once more",
    }
    return _each(ids, "SELECT notifyq.retry($1)", "will run now", "not retried", reasons, dsn)


@click.command()
@click.argument("ids", metavar="ID...", type=task_id, nargs=-1, required=True)
@dsn_option
def cancel(*, ids: tuple[int, ...], dsn: str | None) -> int:
    """Cancel tasks that haven't ended.

    If the task is running, its handler is cancelled too, within 1.5 s. What that handler returns or raises doesn't
    count.
    """
    reasons = {state: f"it has ended already: {state}" for state in ENDED}
    return _each(ids, "SELECT notifyq.cancel($1)", "cancelled", "not cancelled", reasons, dsn)


def _each(
    ids: tuple[int, ...], statement: str, done: str, failed: str, reasons: dict[str, str], dsn: str | None
) -> int:
    """Run the statement for each id, and print the outcomes. Returns 1 if it did nothing for one of them.

    done     what to print if the statement changed the task
    failed   what to print if it didn't, before the reason
    reasons  the reasons why it didn't, by the task's state
    """

    async def run() -> list[tuple[int, str | None]]:
        outcomes: list[tuple[int, str | None]] = []
        async with session(dsn) as conn:
            for id in dict.fromkeys(ids):
                why = None
                if not await conn.fetchval(statement, id):
                    state = await conn.fetchval("SELECT state FROM notifyq.all_tasks WHERE id = $1", id)
                    # The state may have changed since the statement.
                    why = reasons.get(state, f"it is {state} by now; try again") if state else NO_TASK
                outcomes.append((id, why))
        return outcomes

    outcomes = asyncio.run(run())
    for id, why in outcomes:
        if why is None:
            click.echo(f"{id}: {done}")
        else:
            say(f"{id}: {failed}: {why}")
    return 1 if any(why for _, why in outcomes) else 0


NO_TASK = "there is no such task; it may have been pruned"


@click.command()
@option(
    "--history",
    type=duration,
    metavar="TIME",
    default="1d",
    help="keep done and cancelled tasks that ended less than TIME ago",
)
@option(
    "--dead",
    type=duration,
    metavar="TIME",
    default=f"{DEAD_KEPT_SECONDS / 86400:.0f}d",
    help="keep dead tasks that ended less than TIME ago",
)
@dsn_option
def prune(*, history: float, dead: float, dsn: str | None) -> None:
    """Delete finished tasks older than their retention.

    Workers do that too, every minute. Times are seconds, or 90s, 15m, 12h, 1d; 0 keeps nothing.
    """

    async def run() -> int:
        total = 0
        async with session(dsn) as conn:
            while True:
                pruned: int = await conn.fetchval(SQL["prune_finished"], history, dead, PRUNE_AT_ONCE, None)
                total += pruned
                if pruned < PRUNE_AT_ONCE:
                    break
            for statement in ("prune_rate_log", "prune_unique_keys"):
                while await conn.fetchval(SQL[statement], PRUNE_AT_ONCE) >= PRUNE_AT_ONCE:
                    pass
            return total

    click.echo(f"pruned {(count := asyncio.run(run()))} {'task' if count == 1 else 'tasks'}")
