"""Rows of tasks and workers for the tests of single statements."""

from __future__ import annotations

from typing import Any

from notifyq.database.connection import SQL
from notifyq.worker import job as claims


async def register(conn: Any, name: str = "host:1", **more: Any) -> int:
    options = {"types": ["Known"], "allowed": [10], "lease": 30.0, **more}
    args = (["default"], options["types"], options["allowed"], 100, options["lease"])
    id: int = await conn.fetchval(SQL["register_worker"], name, *args)
    return id


async def insert(conn: Any, count: int = 1, **columns: Any) -> list[int]:
    """`insert(db, 3, queue="mail")`: rows with these columns, each an SQL literal by itself."""
    columns = {"type": "Known", **columns}
    values = ", ".join("NULL" if v is None else "'" + str(v).replace("'", "''") + "'" for v in columns.values())
    rows = await conn.fetch(
        f"INSERT INTO notifyq.task ({', '.join(columns)}) SELECT {values} FROM generate_series(1, $1) RETURNING id",
        count,
    )
    return [row[0] for row in rows]


async def held(conn: Any, count: int = 1, worker: int | None = None, **columns: Any) -> tuple[int, list[int]]:
    """A worker that has claimed `count` tasks. Returns its id and the tasks' ids."""
    await insert(conn, count, **columns)
    worker = worker or await register(conn)
    jobs = await claims.claim(conn, worker, {"default": count}, count)
    assert len(jobs) == count
    return worker, [job.id for job in jobs]


async def task(conn: Any, id: int) -> Any:
    return await conn.fetchrow("SELECT * FROM notifyq.all_tasks WHERE id = $1", id)


async def states(conn: Any) -> dict[int, str]:
    return {row[0]: row[1] for row in await conn.fetch("SELECT id, state FROM notifyq.all_tasks ORDER BY id")}


def ids(rows: Any) -> list[int]:
    return sorted(row[0] for row in rows)


async def silent(conn: Any, worker: int, seconds: float) -> None:
    await conn.execute(
        "UPDATE notifyq.worker SET seen_at = now() - make_interval(secs => $2) WHERE id = $1", worker, seconds
    )
