"""Enqueue: validate a task, build the statement that inserts it, and send the statement."""

from __future__ import annotations

from collections.abc import Coroutine, Iterable, Iterator, Sequence
from contextlib import AsyncExitStack
from functools import partial
from itertools import islice
from typing import TYPE_CHECKING, Any, TypeAlias, cast

import anyio
import anyio.lowlevel
import asyncpg
import msgspec

from .. import settings
from ..codec import encode_payload, type_name
from ..database.connection import COMMAND_TIMEOUT_SECONDS, SLOWEST, SQL
from ..database.errors import translate_errors
from ..errors import ConfigError, first_error
from ..payloads import jsonable
from ..registry import Registry
from ..task import Task
from ..unique import Unique
from .bulk import CHUNK, CHUNK_SIZE, Bulk, PlacedRow, Row, Statement, build_bulk_insert, check_one_statement
from .drivers import DriverConnection
from .options import Options, check_group, options_for
from .pool import AppPool
from .ref import Ids

if TYPE_CHECKING:
    from ..database.connection import Connection


Via: TypeAlias = "Connection | asyncpg.Pool[asyncpg.Record] | DriverConnection | AppPool"

SLICE = 100  # tasks that are encoded before the event loop gets a turn: 0.2 ms


async def insert_one(via: Via, registry: Registry, task: Task, options: Options) -> Iterable[Any]:
    """Insert a task, unless it is unique and another task is in its way.

    Returns what enqueue.sql returns; for a unique task what enqueue_unique.sql returns.
    """
    type, payload = validated_task(registry, task)
    query, args = build_insert(type, payload, options.for_task(task), options.unique.for_task(task))
    row: Iterable[Any]
    with translate_errors("enqueue", task=type):
        if isinstance(via, DriverConnection):
            [row] = await via.fetch(query, *args)
        else:
            [row] = await via.fetch(query, *args, timeout=_timeout(len(payload)))
    return row


def build_insert(type: str, payload: str, options: Options, unique: Unique | None) -> Statement:
    """The statement that inserts one task; `options` are those of the task."""
    query = SQL["enqueue" if unique is None else "enqueue_unique"]
    return query, (type, payload, *options.columns, options.text(unique))


async def insert_many(via: Via, registry: Registry, tasks: Iterable[Task], options: Options) -> Ids:
    """Insert all of the tasks, or none.

    Up to CHUNK tasks of CHUNK_SIZE characters go in one statement. More go in several statements of one transaction,
    and each chunk is encoded while PostgreSQL inserts the one before. asyncpg sends a row of the two arrays in 0.6 µs.
    That is half of what COPY costs in all, and COPY doesn't return the ids.
    """
    bulk = Bulk(partial(validated_task, registry), options)
    rest = iter(tasks)
    first = bulk.rows(rest)
    if isinstance(via, DriverConnection):  # one statement, since each library handles savepoints in its own way
        while bulk.has_more():
            await anyio.lowlevel.checkpoint()
            first += bulk.rows(rest)
            check_one_statement(bulk.size)
    if not bulk.has_more():
        for statement in bulk.statements(first, whole=True):
            await _send(via, bulk, statement)
        return bulk.ids()
    assert not isinstance(via, DriverConnection)
    async with AsyncExitStack() as stack:
        if isinstance(via, AppPool):
            conn: Connection = await stack.enter_async_context(via.transaction())
        else:
            conn = await stack.enter_async_context(via.acquire()) if isinstance(via, asyncpg.Pool) else via
            await stack.enter_async_context(conn.transaction())
        try:
            await _stream(conn, bulk, first, rest, options)
        except BaseExceptionGroup as group:
            raise first_error(group) from None
        for statement in bulk.statements([]):
            await _send(conn, bulk, statement)
        return bulk.ids()


async def insert_group(
    via: Via, registry: Registry, tasks: Iterable[Task], then: Task, options: Options
) -> tuple[list[int], tuple[int, int]]:
    """Insert tasks, and a task that waits for all of them, in one statement. Returns what `read_group_ids` does."""
    query, args = build_group_insert(registry, tasks, then, options)
    with translate_errors("enqueue", task="(one of a group)"):
        if isinstance(via, DriverConnection):
            return read_group_ids(await via.fetch(query, *args))
        return read_group_ids(await via.fetch(query, *args, timeout=_timeout(sum(map(len, args[1])))))


def build_group_insert(registry: Registry, tasks: Iterable[Task], then: Task, options: Options) -> Statement:
    """The statement that inserts a group; `then` is the last item of its arrays."""
    tasks = list(tasks)
    rows = [_placed_row(registry, task, options) for task in tasks]
    if any(options.unique.for_task(task) for task in (*tasks, then)):
        raise ConfigError("a group's tasks can't be unique; enqueue those by themselves, and one after=[...] them")
    check_group(len(rows))
    # Of the options, `then` has the queue and the priority. The keys and limits are of the others alone.
    same = options_for(options.given.get("queue"), options.given.get("priority"))
    rows.append(_placed_row(registry, then, same))
    check_one_statement(sum(len(row[1]) for row in rows))
    types, payloads, queues, priorities, texts = map(list, zip(*rows, strict=True))
    _, delay, run_at, _, max_attempts = options.columns
    args = (types, payloads, queues, delay, run_at, priorities, max_attempts, texts, options.given.get("on_dead"))
    return SQL["enqueue_then"], args


def _placed_row(registry: Registry, task: Task, options: Options) -> PlacedRow:
    options = options.for_task(task)
    return *validated_task(registry, task), options.columns.queue, options.columns.priority, options.text()


def read_group_ids(answer: Sequence[Any]) -> tuple[list[int], tuple[int, int]]:
    """The ids of a group's tasks; and of `then` the id, and the created_at in microseconds since 1970."""
    [(last, created, ids)] = answer
    return list(ids or ()), (last, created)


async def _stream(
    conn: Connection, bulk: Bulk, first: list[Row | PlacedRow], rest: Iterator[Task], options: Options
) -> None:
    """Insert the tasks that aren't unique, and encode a chunk while the one before is inserted."""
    send, receive = anyio.create_memory_object_stream[list[Row | PlacedRow]](1)

    async def encode() -> None:
        async with send:
            chunk: list[Row | PlacedRow] = []
            begun, last = bulk.size, -1
            while bulk.count > last:
                last = bulk.count
                chunk += bulk.rows(islice(rest, SLICE))
                if len(chunk) >= CHUNK or bulk.size - begun >= CHUNK_SIZE:
                    await send.send(chunk)
                    chunk, begun = [], bulk.size
                else:
                    await anyio.lowlevel.checkpoint()  # lets asyncpg write the chunk before to the socket
            if chunk:
                await send.send(chunk)

    async with receive, anyio.create_task_group() as group:
        group.start_soon(encode)
        if first:
            await _send(conn, bulk, build_bulk_insert(first, options))
        async for chunk in receive:
            await _send(conn, bulk, build_bulk_insert(chunk, options))


async def _send(via: Via, bulk: Bulk, statement: Statement) -> None:
    query, args = statement
    with translate_errors("enqueue", task=name_of(args[0])):
        if isinstance(via, DriverConnection):
            bulk.add_answer(await via.fetch(query, *args))
        else:
            bulk.add_answer(await via.fetch(query, *args, timeout=_timeout(min(bulk.size, 3 * CHUNK_SIZE))))


def _timeout(size: int) -> float | None:
    """Seconds for a statement with this many characters of payloads. None: the connection's own timeout is enough."""
    return None if size < CHUNK_SIZE // 8 else COMMAND_TIMEOUT_SECONDS + size / SLOWEST


def name_of(types: list[str]) -> str:
    """The type of these tasks, for a message."""
    return types[0] if len(set(types)) == 1 else "(one of several)"


def validated_task(registry: Registry, task: Task) -> Row:
    """The type and the payload of a task. Raises ConfigError for an object that isn't a task, or one that is invalid.

    msgspec doesn't validate a Struct when it is made, so the payload is decoded once to validate it.
    """
    if not isinstance(task, Task):
        raise ConfigError(
            f"enqueue got {task!r:.100}; expected an instance of a subclass of notifyq.Task{_hint(registry, task)}"
        )
    cls = type(task)
    name = type_name(cls)
    payload = encode_payload(task)
    handler = registry.get(name)
    if handler is not None and handler.task is not cls:
        raise ConfigError(f"type {name!r} is {handler.task.__qualname__} in this app, and not {cls.__qualname__}")
    decode = handler.decode if handler is not None else _decoder(cls)
    try:
        decode(payload)
    except (msgspec.MsgspecError, ValueError, RecursionError) as error:
        raise ConfigError(f"task {name} doesn't validate against its own type: {error}") from error
    return name, payload.decode()


def _hint(registry: Registry, given: Any) -> str:
    handler = registry.of(given) if callable(given) else None
    if handler is not None:
        return f": enqueue {handler.task.__name__}(...), not its handler"
    if isinstance(given, type) and issubclass(given, Task):
        return f": {given.__name__}(...)"
    if isinstance(given, Coroutine):
        cast("Coroutine[Any, Any, object]", given).close()  # or Python warns that it was never awaited
        return "; enqueue the task itself, and don't call its handler: a worker does"
    if isinstance(given, list):
        return "; enqueue_many takes several tasks"
    if isinstance(given, tuple) and any(isinstance(part, Task) for part in cast("tuple[object, ...]", given)):
        return "; the options are for all tasks of a call: enqueue tasks with other options by another call"
    return ""


_decoders: dict[type[Task], Any] = {}


def _decoder(cls: type[Task]) -> Any:
    if cls not in _decoders:
        settings.check(cls)
        _decoders[cls] = jsonable.decoder(cls)
    return _decoders[cls]
