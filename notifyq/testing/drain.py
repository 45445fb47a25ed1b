"""Run all that can be run, on a real database, by a real worker, and say what came of it."""

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
    """How many tasks ran, by where they stand now. `retry`: they failed, and are scheduled once more."""

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
    """Run a worker until nothing is runnable any more, what handlers enqueue on the way included.

    dsn             None: where the app is connected, else where the environment says
    queues          None: all
    with_scheduled  what is scheduled runs too: the clock is moved from one time to the next, until there is none.
                    A retry is scheduled as well, so in the end every task is done, dead or cancelled
    timeout         seconds after which it fails: tasks that enqueue themselves again have no end

    Crons enqueue nothing meanwhile: just before a slot the same test would find one task more.
    An app that isn't connected is, meanwhile, so that handlers can enqueue. Tasks of types that the app doesn't handle
    stay. Raises AssertionError at the timeout, else what `run_worker` raises.
    """
    states: dict[int, str] = {}
    wanted = None if queues is None else list(queues)
    async with AsyncExitStack() as stack:
        stack.enter_context(_without_crons(app))
        if app._pool is None:  # pyright: ignore[reportPrivateUsage]
            await stack.enter_async_context(app.connect(dsn))
        conn = await stack.enter_async_context(connection(dsn or app))
        with anyio.move_on_after(timeout) as late:
            while (wait := await _runnable(app, dsn, conn, wanted, concurrency, states)) and with_scheduled:
                await advance(conn, wait)
    if late.cancelled_caught:
        raise AssertionError(f"after {timeout:g} s there is still something to run; what ran by then: {_count(states)}")
    return _count(states)


@contextmanager
def _without_crons(app: App) -> Generator[None, None, None]:
    crons, app.registry.crons = app.registry.crons, {}
    try:
        yield
    finally:
        app.registry.crons = crons


async def _runnable(
    app: App, dsn: str | None, conn: Connection, wanted: list[str] | None, concurrency: int, states: dict[int, str]
) -> float | None:
    """Run what is runnable, and note in `states` where it stands; the seconds until the next scheduled task is due."""
    while True:
        row = await conn.fetchrow(SQL["find_runnable"], wanted)
        assert row is not None
        next_seconds: float | None = row["next_seconds"]
        began: datetime = row["at"]
        if not row["queues"]:
            return next_seconds
        # By itself it would serve queues that were known before, and handlers enqueue into others.
        await app.run_worker(row["queues"], concurrency, dsn=dsn, poll_interval=1.0, history=366 * 86400, drain=True)
        ran: dict[int, str] = {row["id"]: row["state"] for row in await conn.fetch(SQL["list_ran"], began)}
        states |= ran
        if not ran:  # of types that nobody here handles
            return next_seconds


def _count(states: dict[int, str]) -> Drained:
    count = Counter(states.values())
    ended = {state: count.pop(state, 0) for state in ("done", "dead", "cancelled")}
    return Drained(**ended, retry=count.total())
