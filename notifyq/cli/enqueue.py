"""enqueue: insert one task. Each row of the table in notifyq/options.py makes one of its flags."""

from __future__ import annotations

import asyncio
import builtins
import json
import sys
from collections.abc import Callable, Iterator
from typing import Any, cast

import click

from notifyq import App, EnqueueOptions
from notifyq.client.enqueue import build_insert
from notifyq.client.options import Options
from notifyq.codec import PAYLOAD_LIMIT, type_name
from notifyq.config import check_name
from notifyq.database.errors import translate_errors
from notifyq.errors import ConfigError
from notifyq.options import OPTIONS, Ids, Kind, Moment, OneOf, Rate, Seconds, SomeOf, Whole
from notifyq.registry import decode_as
from notifyq.task import Task
from notifyq.unique import NO_RULE

from .load import load_app
from .options import Command, as_flags, dsn_option, duration, moment, number, option, rate, setting, task_id, word
from .output import say
from .served import NO_WORKER, why_not_started
from .session import session

CONFLICT = {
    "keep": "",
    "replace": "; if it waits, its payload is this one's now",
    "move": "; if it waits for its time or a worker, its run_at is this one's now",
}


def enqueue_options(command: Command) -> Command:
    """A flag for each option of enqueue, in the order of the table. A flag that isn't given is None or ()."""
    for name, row in reversed([*OPTIONS.items()]):
        flags = row.flags or ("--" + name.replace("_", "-"),)
        several = isinstance(row.kind, Ids | SomeOf)
        more = {"metavar": row.metavar} if row.metavar else {}
        command = option(*flags, name, type=_type_of(row.kind), multiple=several, help=row.help, **more)(command)
    return command


def _type_of(kind: Kind) -> click.Choice[str] | Callable[[str], object] | None:
    """How click reads the value of a flag; None: as a str."""
    match kind:
        case Seconds():
            return duration
        case Moment():
            return moment
        case Whole():
            return number(kind.low, kind.high)
        case Rate():
            return rate
        case Ids():
            return task_id
        case OneOf():
            return click.Choice(kind.words)
        case SomeOf():
            return word(*kind.words)
        case _:
            return None


@click.command()
@click.argument("type")
@click.argument("payload", metavar="[JSON]", default="{}")
@enqueue_options
@setting(
    "--app",
    metavar="MODULE:APP",
    help="check type and payload against this app's tasks, and use the settings of the task's class",
)
@dsn_option
def enqueue(*, type: str, payload: str, app: str | None, dsn: str | None, **flags: Any) -> None:
    """Enqueue a task and print its id.

    JSON is the payload, an object; without it, {}. With - it is read from stdin.
    """
    check_name("type", type)
    given = cast("EnqueueOptions", {name: value for name, value in flags.items() if value not in (None, ())})
    with as_flags():
        options = Options.check(**given)
    text = _read_payload(payload)
    task = Task() if app is None else _validated_task(load_app(app, to_run=False), type, text.encode())
    if app is None and options.unique.unique is None and options.unique != NO_RULE:
        raise ConfigError(
            "--unique-for, --unique-states and --on-conflict go with --unique KEY, or with --app and a type's rule"
        )
    with as_flags():
        unique, options = options.unique.for_task(task), options.for_task(task)
    query, args = build_insert(type, text, options, unique)

    async def run() -> tuple[int, bool, str]:
        async with session(dsn, reads=False) as conn:
            with translate_errors("enqueue", task=type):
                [row] = await conn.fetch(query, *args)
            note = "" if app else await why_not_started(conn, type, options.columns.queue)
            return row[0], len(row) > 2 and row[2], note

    id, existed, note = asyncio.run(run())
    if note and note != NO_WORKER:  # a worker may be started later, for any queue and type
        say(note)
    if existed:
        assert unique is not None
        say(f"nothing was enqueued: a task with this key is there{CONFLICT[unique.on_conflict]}")
    click.echo(id)


def _validated_task(app: App, type: str, payload: bytes) -> Task:
    """The task, decoded by the app's handler of its type, or else by a Task class of the user's with this type.

    An app that only enqueues has no handlers. Raises ConfigError for a payload that doesn't validate.
    """
    declared = {type_name(cls): cls for cls in _subclasses(Task) if not cls.__module__.startswith("notifyq.")}
    if app.registry.get(type) is None and type in declared:
        return decode_as(declared[type], type, payload)
    return app.registry.check(type, payload, declared)


def _subclasses(cls: builtins.type[Task]) -> Iterator[builtins.type[Task]]:
    for below in cls.__subclasses__():
        yield below
        yield from _subclasses(below)


def _read_payload(argument: str) -> str:
    """The JSON text. Raises ConfigError for one that isn't an object, or that PostgreSQL can't store."""
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
