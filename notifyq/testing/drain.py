"""Run every task that can run, on a real database by a real worker, and count the outcomes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Generator, Iterable
from contextlib import AsyncExitStack, contextmanager
from datetime import datetime

import anyio
import msgspec

from notifyq.app import App
from notifyq.database.connection import SQL, Connection

from .clock import advance
from .source import connection


class Drained(msgspec.Struct, frozen=True, kw_only=True):
    """How many tasks ran, by their state at the end. `retry`: the task failed, and waits for its next attempt."""

    done: int = 0
    retry: int = 0
    dead: int = 0
    cancelled: int = 0


async def drain(
    app: App,
    dsn: str | None = None,
    *,
    queues: Iterable[str] | None = None,
    with_scheduled: bool = False,
    concurrency: int = 100,
    timeout: float = 30.0,
) -> Drained:
    """Run a worker until no task can run, and return how the tasks ended. Tasks that handlers enqueue run too.

    dsn             None: the database that the app is connected to; if it isn't, the one that the environment names
    queues          None: all
    with_scheduled  True: run scheduled tasks too. The clock is moved to the next task's time again and again, until
                    none is scheduled. Retries are scheduled as well, so in the end each task is done, dead or cancelled
    concurrency     how many handlers run at the same time
    timeout         seconds after which it raises AssertionError: tasks that enqueue themselves again never end

    Crons enqueue nothing here, as a test's result would depend on the time. An app that isn't connected is connected
    during the call, so that its handlers can enqueue. Tasks of types without a handler stay. Raises what `run_worker`
    raises.
    """
    states: dict[int, str] = {}
    wanted = None if queues is None else list(queues)
    async with AsyncExitStack() as stack:
        stack.enter_context(_without_crons(app))
        if app._pool is None:  # pyright: ignore[reportPrivateUsage]
            await stack.enter_async_context(app.connect(dsn))
        conn = await stack.enter_async_context(connection(dsn or app))
        with anyio.move_on_after(timeout) as late:
            while (wait := await _run_ready(app, dsn, conn, wanted, concurrency, states)) and with_scheduled:
                await advance(conn, wait)
    if late.cancelled_caught:
        raise AssertionError(f"after {timeout:g} s there are still tasks to run; these ran by then: {_count(states)}")
    return _count(states)


@contextmanager
def _without_crons(app: App) -> Generator[None, None, None]:
    crons, app.registry.crons = app.registry.crons, {}
    try:
        yield
    finally:
        app.registry.crons = crons


async def _run_ready(
    app: App, dsn: str | None, conn: Connection, wanted: list[str] | None, concurrency: int, states: dict[int, str]
) -> float | None:
    """Run the ready tasks, and note their states in `states`. Returns the seconds until the next scheduled task."""
    while True:
        row = await conn.fetchrow(SQL["find_runnable"], wanted)
        assert row is not None
        next_seconds: float | None = row["next_seconds"]
        began: datetime = row["at"]
        if not row["queues"]:
            return next_seconds
        # The queues are named anew each time, as handlers may have enqueued into new ones.
        await app.run_worker(row["queues"], concurrency, dsn=dsn, poll_interval=1.0, history=366 * 86400, drain=True)
        ran: dict[int, str] = {row["id"]: row["state"] for row in await conn.fetch(SQL["list_ran"], began)}
        states |= ran
        if not ran:  # the ready tasks are of types without a handler here
            return next_seconds


def _count(states: dict[int, str]) -> Drained:
    count = Counter(states.values())
    ended = {state: count.pop(state, 0) for state in ("done", "dead", "cancelled")}
    return Drained(**ended, retry=count.total())
