"""Statements under statistics of every kind, and what they read."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

# The planner multiplies tuples a page, as last counted, with the pages there are now.
MOMENTS = {
    "counted now": "",
    "counted when empty": "UPDATE pg_class SET reltuples = 0",
    "never counted": "UPDATE pg_class SET reltuples = -1, relpages = 0",
}
TOUCHED = """
    SELECT coalesce(sum(pg_stat_get_xact_tuples_returned(oid)), 0)::bigint
    FROM pg_class
    WHERE relnamespace = 'notifyq'::regnamespace AND relname ~ '^(task|finished|unique_key)'"""


@asynccontextmanager
async def rolled_back(conn: Any, moment: str = "counted now") -> AsyncIterator[None]:
    """A transaction that is rolled back, whatever happens in it, with the statistics of that moment."""
    transaction = conn.transaction()
    await transaction.start()
    try:
        await at_moment(conn, moment)
        yield
    finally:
        await transaction.rollback()


async def at_moment(conn: Any, moment: str) -> None:
    """Inside a transaction that is rolled back: have the planner believe what was counted at some other moment."""
    if MOMENTS[moment]:
        await conn.execute("SET LOCAL allow_system_table_mods = on")
        await conn.execute(f"""
            {MOMENTS[moment]} WHERE relnamespace = 'notifyq'::regnamespace AND relkind IN ('r', 'i');
            DELETE FROM pg_statistic WHERE starelid IN ('notifyq.task'::regclass, 'notifyq.finished'::regclass)""")


async def touched(conn: Any, run: Callable[[], Any]) -> tuple[Any, int]:
    """Returns what `call` returns, and how many entries of indexes and rows of scans it read, as the server counted."""
    before = await conn.fetchval(TOUCHED)
    result = await run()
    return result, await conn.fetchval(TOUCHED) - before
