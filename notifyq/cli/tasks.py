"""Tasks, one by one or in lists: enqueue, tasks, retry, cancel, prune."""

from __future__ import annotations

import asyncio
import builtins
import json
import sys
from collections.abc import Iterator
from datetime import datetime
from typing import Literal

import asyncpg
import click

from notifyq import App
from notifyq.codec import PAYLOAD_LIMIT, type_name
from notifyq.config import check_name
from notifyq.enqueue import Explained, statement
from notifyq.errors import ConfigError
from notifyq.lease import DEAD_KEPT_SECONDS, PRUNE_AT_ONCE
from notifyq.options import UNTOLD, Options
from notifyq.registry import decode_as
from notifyq.store import SQL, Connection
from notifyq.task import ENDED, STATES, State, Task
from notifyq.unique import NOTHING

from .load import load_app
from .options import (
    as_flags,
    check_typed_queue,
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
@option("-q", "--queue", metavar="NAME", help="which queue  [default: what its type says, with --app; else default]")
@option("--delay", type=duration, metavar="TIME", help="not before so much time has passed: 90s, 15m, 12h, 1d")
@option("--run-at", type=moment, metavar="TIME", help="not before this time: 2030-01-31T08:00:00Z")
@option("--priority", metavar="N", type=number(-32768, 32767), help="-32768 to 32767, the higher the sooner")
@option(
    "--max-attempts",
    metavar="N",
    type=number(1, 32767),
    help="runs in all until it is dead  [default: what its type says]",
)
@option("--order-key", metavar="KEY", help="of tasks with the same, one runs at a time, in the order of their ids")
@option("--limit-key", metavar="KEY", help="of tasks with the same, over all workers,")
@option(
    "--limit-running", "--limit", "limit", metavar="N", type=number(1, 2**31 - 1), help="at most so many run at once,"
)
@option("--rate", metavar="RATE", type=rate, help="and at most so many start in any such time: 100/minute, 5/s, 20/10s")
@option("--after", type=task_id, metavar="ID", multiple=True, help="not before this task is done (repeatable)")
@option("--on-dead", type=click.Choice(["cancel", "run"]), help="what to do if one of these isn't  [default: cancel]")
@option("--unique", metavar="KEY", help="not while another with this key is there: print that one's id")
@option("--unique-for", type=duration, metavar="TIME", help="and was enqueued less than so long ago, be it done")
@option(
    "--unique-states",
    metavar="STATE",
    multiple=True,
    type=word(*STATES),
    help="and is in this state (repeatable)  [default: it hasn't ended]",
)
@option(
    "--on-conflict",
    type=click.Choice(["keep", "replace", "move"]),
    help="keep that one as it is, replace its payload, or move its time to this one's, while it waits  [default: keep]",
)
@setting(
    "--app",
    metavar="MODULE:APP",
    help="validate type and payload against this app's tasks first, and go by their classes' queue, limits, ...",
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

    JSON is the payload, an object, {} if it is left out; - reads it from stdin.
    """
    check_name("type", type)
    if queue is not None:
        check_typed_queue(queue)
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
    if app is None and unique is None and options.unique != NOTHING:
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
            return row[0], len(row) > 2 and row[2], "" if app else await _unserved(conn, type, options.values[0])

    id, existed, note = asyncio.run(run())
    if note:
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


async def _unserved(conn: Connection, type: str, queue: str) -> str:
    """A note, if workers are up and none of them will take this task; a role that only enqueues isn't told."""
    try:
        row = await conn.fetchrow(SQL["served"])
    except asyncpg.InsufficientPrivilegeError:
        return ""
    if row is None or not row["queues"]:
        return ""  # no worker is up: it may be started later, with anything
    if queue not in row["queues"]:
        return f"no worker that is up serves queue {queue!r}{did_you_mean(queue, row['queues'])}"
    if type not in row["types"]:
        return f"no worker that is up takes type {type!r}{did_you_mean(type, row['types'])}"
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
@option("--state", type=word(*STATES), metavar="STATE", help=f"one of {', '.join(STATES)}")
@option("-q", "--queue", metavar="NAME", help="of this queue")
@option("--type", metavar="TYPE", help="of this type")
@option("--limit", metavar="N", type=number(1, 1_000_000), default=50, help="at most so many")
@option("--json", "as_json", is_flag=True, help="a JSON object a line, whole: with payload, result and errors")
@dsn_option
def tasks(
    *, state: str | None, queue: str | None, type: str | None, limit: int, as_json: bool, dsn: str | None
) -> None:
    """List tasks, finished ones too, the newest first.

    The last column has what a task says: how far it is, or its last error.
    """

    async def run() -> tuple[list[tuple[str, float]], int, str]:
        async with session(dsn) as conn, conn.transaction(readonly=True):
            rows: list[tuple[str, float]] = []
            count = 0
            # A few at a time: payloads of 16 MB are printed as they come.
            args = (state, queue, type, limit, as_json)
            prefetch = 4 if as_json else 500
            async for text, seconds in conn.cursor(SQL["tasks"], *args, prefetch=prefetch, timeout=LONG_SECONDS):
                count += 1
                if as_json:
                    click.echo(text)
                else:
                    rows.append((text, seconds))
            guess = ""
            if not count and (queue or type):
                known = await conn.fetchrow(SQL["names"], timeout=LONG_SECONDS)
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

    Dead and cancelled ones start over with all their attempts, scheduled ones become due.
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

    The handler of a running one is cancelled too, at once if it has run for a second or so, else within 1.5 s, and
    whatever it says counts no more.
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
@option("--history", type=duration, metavar="TIME", default="1d", help="keep done and cancelled for so long")
@option(
    "--dead", type=duration, metavar="TIME", default=f"{DEAD_KEPT_SECONDS / 86400:.0f}d", help="keep dead for so long"
)
@dsn_option
def prune(*, history: float, dead: float, dsn: str | None) -> None:
    """Delete what ended long ago. Workers do it too, by the minute.

    Ages are seconds, or 90s, 15m, 12h, 1d; 0 is all.
    """

    async def run() -> int:
        total = 0
        async with session(dsn) as conn:
            while True:
                pruned: int = await conn.fetchval(SQL["prune"], history, dead, PRUNE_AT_ONCE, None)
                total += pruned
                if pruned < PRUNE_AT_ONCE:
                    break
            for statement in ("prune_started", "prune_keys"):
                while await conn.fetchval(SQL[statement], PRUNE_AT_ONCE) >= PRUNE_AT_ONCE:
                    pass
            return total

    click.echo(f"pruned {(count := asyncio.run(run()))} {'task' if count == 1 else 'tasks'}")
