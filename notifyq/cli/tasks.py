"""Tasks, one by one or in lists: enqueue, tasks, retry, cancel, prune."""

from __future__ import annotations

import asyncio
import builtins
import json
import shlex
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Literal

import asyncpg
import click

from notifyq import App
from notifyq.client.enqueue import Explained, statement
from notifyq.client.options import UNTOLD, Options
from notifyq.codec import PAYLOAD_LIMIT, type_name
from notifyq.config import check_name
from notifyq.database.connection import SQL, Connection
from notifyq.errors import ConfigError
from notifyq.registry import decode_as
from notifyq.task import ENDED, STATES, State, Task
from notifyq.unique import NO_RULE
from notifyq.worker.heartbeat import DEAD_KEPT_SECONDS, PRUNE_AT_ONCE

from .load import load_app
from .options import (
    as_flags,
    did_you_mean,
    dsn_option,
    duration,
    moment,
    number,
    option,
    rate,
    setting,
    word,
)
from .output import percent, say, span, table
from .session import LONG_SECONDS, session

SAYS_LENGTH = 60
task_id = number(1, 2**63 - 1)


@click.command()
@click.argument("type")
@click.argument("payload", metavar="[JSON]", default="{}")
@option("-q", "--queue", metavar="NAME", help="into this queue  [default: its class's queue, with --app; else default]")
@option("--delay", type=duration, metavar="TIME", help="don't start it before this time has passed: 90s, 15m, 12h, 1d")
@option("--run-at", type=moment, metavar="TIME", help="don't start it before this moment: 2030-01-31T08:00:00Z")
@option(
    "--priority", metavar="N", type=number(-32768, 32767), help="-32768 to 32767; tasks with a higher one start first"
)
@option(
    "--max-attempts",
    metavar="N",
    type=number(1, 32767),
    help="after this many failed attempts it is dead  [default: what its class says]",
)
@option("--order-key", metavar="KEY", help="of the tasks with this key one runs at a time, in the order of their ids")
@option("--limit-key", metavar="KEY", help="--limit and --rate are for the tasks with this key, over all workers")
@option(
    "--limit-running",
    "--limit",
    "limit",
    metavar="N",
    type=number(1, 2**31 - 1),
    help="at most N tasks with the --limit-key run at the same time",
)
@option(
    "--rate",
    metavar="RATE",
    type=rate,
    help="at most this many tasks with the --limit-key start in any such time: 100/minute, 5/s, 20/10s",
)
@option("--after", type=task_id, metavar="ID", multiple=True, help="start it when this task is done; repeatable")
@option(
    "--on-dead",
    type=click.Choice(["cancel", "run"]),
    help="what to do if a task of --after ends dead or cancelled  [default: cancel]",
)
@option("--unique", metavar="KEY", help="if a task with this key exists, enqueue nothing, and print that task's id")
@option(
    "--unique-for",
    type=duration,
    metavar="TIME",
    help="count only a task that was enqueued within TIME; a done one counts too",
)
@option(
    "--unique-states",
    metavar="STATE",
    multiple=True,
    type=word(*STATES),
    help="count only tasks in this state; repeatable  [default: those that haven't ended]",
)
@option(
    "--on-conflict",
    type=click.Choice(["keep", "replace", "move"]),
    help="while that task waits: leave it alone, give it this payload, or give it this time  [default: keep]",
)
@setting(
    "--app",
    metavar="MODULE:APP",
    help="check type and payload against this app's tasks, and use the settings of the task's class",
)
@dsn_option
def enqueue(
    *,
    type: str,
    payload: str,
    queue: str | None,
    delay: float | None,
    run_at: datetime | None,
    priority: int | None,
    max_attempts: int | None,
    order_key: str | None,
    limit_key: str | None,
    limit: int | None,
    rate: str | None,
    after: tuple[int, ...],
    on_dead: Literal["cancel", "run"] | None,
    unique: str | None,
    unique_for: float | None,
    unique_states: tuple[State, ...],
    on_conflict: Literal["keep", "replace", "move"] | None,
    app: str | None,
    dsn: str | None,
) -> None:
    """Enqueue a task and print its id.

    JSON is the payload, an object; without it, {}. With - it is read from stdin.
    """
    check_name("type", type)
    with as_flags():
        options = Options.check(
            queue=UNTOLD if queue is None else queue,
            delay=delay,
            run_at=run_at,
            priority=UNTOLD if priority is None else priority,
            max_attempts=max_attempts,
            order_key=order_key,
            limit_key=limit_key,
            limit=limit,
            rate=rate,
            after=after,
            on_dead=on_dead,
            unique=unique,
            unique_for=unique_for,
            unique_states=unique_states or None,
            on_conflict=on_conflict,
        )
    text = _payload(payload)
    task = Task() if app is None else _validated(load_app(app, to_run=False), type, text.encode())
    if app is None and unique is None and options.unique != NO_RULE:
        raise ConfigError(
            "--unique-for, --unique-states and --on-conflict go with --unique KEY, or with --app and a type's rule"
        )
    with as_flags():
        only, options = options.unique.of(task), options.of(task)
    query, args = statement(type, text, options, only)

    async def run() -> tuple[int, bool, str]:
        async with session(dsn, reads=False) as conn:
            with Explained(type):
                [row] = await conn.fetch(query, *args)
            return row[0], len(row) > 2 and row[2], "" if app else await why_not_started(conn, type, options.values[0])

    id, existed, note = asyncio.run(run())
    if note and note != NO_WORKER:  # one may be started later, with any queue and type
        say(note)
    if existed:
        assert only is not None
        say(f"nothing was enqueued: a task with this key is there{CONFLICT[only.on_conflict]}")
    click.echo(id)


def _validated(app: App, type: str, payload: bytes) -> Task:
    """By the app's handlers. An app that only enqueues has none; there, by the tasks that its modules declare."""
    declared = {type_name(cls): cls for cls in _subclasses(Task) if not cls.__module__.startswith("notifyq.")}
    if app.registry.get(type) is None and type in declared:
        return decode_as(declared[type], type, payload)
    return app.registry.check(type, payload, declared)


def _subclasses(cls: builtins.type[Task]) -> Iterator[builtins.type[Task]]:
    for below in cls.__subclasses__():
        yield below
        yield from _subclasses(below)


NO_WORKER = "no worker is up"


async def why_not_started(conn: Connection, type: str, queue: str) -> str:
    """Why a ready task of this type and queue isn't started, or "" if nothing speaks against it.

    A role that may not read the workers and queues isn't told.
    """
    try:
        row = await conn.fetchrow(SQL["list_served"], queue)
    except asyncpg.InsufficientPrivilegeError:
        return ""
    assert row is not None
    if row["paused"]:
        return f"queue {queue!r} is paused; resume it with: notifyq queue resume {shlex.quote(queue)}"
    if not row["queues"]:
        return NO_WORKER
    if queue not in row["queues"]:
        return f"no worker that is up serves queue {queue!r}{did_you_mean(queue, row['queues'])}"
    if type not in row["types"]:
        return f"no worker that is up takes type {type!r} from queue {queue!r}{did_you_mean(type, row['types'])}"
    return ""


CONFLICT = {
    "keep": "",
    "replace": "; if it waits, its payload is this one's now",
    "move": "; if it waits for its time or a worker, its run_at is this one's now",
}


def _payload(argument: str) -> str:
    """The JSON text, once it is one. Raises ConfigError that says where it isn't."""
    where = "the payload on stdin" if argument == "-" else "the payload"
    try:
        text = sys.stdin.buffer.read().decode("utf-8-sig") if argument == "-" else argument
        size = len(text.encode())
    except UnicodeError as error:
        raise ConfigError(f"{where} is not UTF-8: {error}") from error
    if size > PAYLOAD_LIMIT:
        raise ConfigError(f"{where} is {size:,} bytes, the limit is {PAYLOAD_LIMIT:,}")
    example = """such as '{"to": "a@b.c"}', in single quotes for the shell"""
    try:
        value = json.loads(text, parse_constant=_refuse)
    except json.JSONDecodeError as error:
        near = f", at {text[error.pos : error.pos + 20]!r}" if error.pos < len(text) else ", at its end"
        raise ConfigError(
            f"{where} is not JSON: {error.msg}, line {error.lineno} column {error.colno}{near}; "
            f"expected an object {example}"
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{where} is not JSON that PostgreSQL can store: {error}") from error
    if not isinstance(value, dict):
        raise ConfigError(f"{where} is {text.strip():.20}, not an object; expected one {example}")
    return text


def _refuse(constant: str) -> None:
    raise ValueError(f"it has no {constant}")


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
            # A few at a time: payloads of 16 MB are printed as they come.
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

    A dead or cancelled task starts over with all its attempts. A scheduled one becomes due.
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
    """Apply to each id, say for each what came of it, and return 1 if for any nothing did."""

    async def run() -> list[tuple[int, str | None]]:
        outcomes: list[tuple[int, str | None]] = []
        async with session(dsn) as conn:
            for id in dict.fromkeys(ids):
                why = None
                if not await conn.fetchval(statement, id):
                    state = await conn.fetchval("SELECT state FROM notifyq.all_tasks WHERE id = $1", id)
                    # It may have moved on in between.
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
