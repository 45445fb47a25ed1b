"""What workers and people say to the database, as functions of a connection: the statements' parameters in one place.

Each is one statement of notifyq/database/sql, run as notifyq runs it. Those that settle return the ids that they
applied to."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from typing import Any

from notifyq.database.connection import SQL
from notifyq.worker import job as claims
from notifyq.worker.cursors import FromCursor
from notifyq.worker.job import Job

KNOWN = "Known"  # the type that workers here know
ERROR = b'{"attempt": 1, "error": "oh"}'
OVERDUE: dict[str, Any] = {"created_at": "2000-01-01", "run_at": "2001-01-01"}  # scheduled, and its time has come


async def insert(conn: Any, count: int = 1, **columns: Any) -> list[int]:
    """Insert tasks with these columns, each an SQL literal. Returns their ids."""
    columns = {"type": KNOWN, **columns}
    values = ", ".join("NULL" if v is None else "'" + str(v).replace("'", "''") + "'" for v in columns.values())
    rows = await conn.fetch(
        f"INSERT INTO notifyq.task ({', '.join(columns)}) SELECT {values} FROM generate_series(1, $1) RETURNING id",
        count,
    )
    return [row[0] for row in rows]


async def register(conn: Any, name: str = "host:1") -> int:
    id: int = await conn.fetchval(SQL["register_worker"], name, ["default"], [KNOWN], [10], 100, 30.0)
    return id


async def unregister(conn: Any, worker: int) -> bool:
    return str(await conn.execute(SQL["unregister_worker"], worker)) == "DELETE 1"


async def claim(conn: Any, worker: int, count: int = 9) -> list[Job]:
    return await claims.claim(conn, worker, {"default": count}, count)


async def claim_from_cursor(conn: Any, worker: int, count: int = 9) -> list[Job]:
    """Claim from a cursor, as under a backlog. This cursor hides no task."""
    return await claims.claim(conn, worker, {"default": count}, count, from_cursor=FromCursor(["default"], [0], [1]))


async def claim_unhandled(conn: Any, worker: int, count: int = 9) -> list[Job]:
    return await claims.claim(conn, worker, {"default": count}, count, unhandled=[KNOWN])


async def held(conn: Any, count: int = 1, **columns: Any) -> list[Job]:
    """Register a worker that has just claimed that many new tasks. Returns its jobs."""
    await insert(conn, count, **columns)
    jobs = await claim(conn, await register(conn), count)
    assert len(jobs) == count
    return jobs


async def admit(conn: Any, jobs: Sequence[Job]) -> list[tuple[int, str | None]]:
    """The verdict on each task: None if it runs."""
    keys = [job.id for job in jobs], [job.attempt for job in jobs]
    return sorted((row[0], row[1]) for row in await conn.fetch(SQL["admit"], jobs[0].worker, *keys))


async def free(conn: Any) -> int:
    return int(await conn.fetchval(SQL["release_waiters"], 1000))


async def _settle(conn: Any, name: str, jobs: Sequence[Job], *rest: Any) -> list[int]:
    keys = [job.id for job in jobs], [job.attempt for job in jobs]
    return sorted(row[0] for row in await conn.fetch(SQL[name], jobs[0].worker, *keys, *rest))


async def finish(conn: Any, jobs: Sequence[Job], state: str = "done") -> list[int]:
    return await _settle(conn, "finish", jobs, [state] * len(jobs), [], [], True)


async def later(conn: Any, jobs: Sequence[Job], delay: float = 3600.0) -> list[int]:
    return await _settle(conn, "retry_later", jobs, [delay] * len(jobs), [ERROR] * len(jobs))


async def hand_back(conn: Any, jobs: Sequence[Job]) -> list[int]:
    return await _settle(conn, "hand_back", jobs)


async def release_unhandled(conn: Any, jobs: Sequence[Job]) -> list[int]:
    return await _settle(conn, "release_unhandled", jobs)


# What a worker may write about a task, and what that is then: its state and attempts.
SETTLES: dict[Callable[..., Awaitable[list[int]]], tuple[str, int]] = {
    finish: ("done", 1),
    later: ("scheduled", 1),
    hand_back: ("ready", 0),
    release_unhandled: ("ready", 0),
}


async def promote(conn: Any) -> int:
    row = await conn.fetchrow(SQL["check_due"], ["default"], [], 9, None, None)
    return int(row["promoted"])


async def tick(conn: Any, worker: int, jobs: Sequence[Job] = ()) -> tuple[bool, list[int], list[int]]:
    """Send a heartbeat: whether the worker is registered, which leases it has lost, which other workers there are."""
    keys = [job.id for job in jobs], [job.attempt for job in jobs]
    row = await conn.fetchrow(SQL["send_heartbeat"], worker, len(jobs), "ok", *keys, ["default"], [KNOWN], False)
    return row["registered"], sorted(row["lost"]), row["others"]


async def unseen(conn: Any, worker: int) -> tuple[float, float]:
    """The worker's last heartbeat, and how long ago it was: for rescue.sql, as by a rescuer that has watched it all
    along."""
    found = "SELECT extract(epoch FROM seen_at)::float8, extract(epoch FROM now() - seen_at)::float8"
    row = await conn.fetchrow(f"{found} FROM notifyq.worker WHERE id = $1", worker)
    return tuple(row) if row else (0.0, 0.0)


async def rescue(conn: Any, worker: int, most: int = 100) -> tuple[str | None, int, int]:
    """Returns whose tasks it took back, how many are ready again, and how many are dead."""
    name, ready, dead = await conn.fetchrow(SQL["rescue"], worker, most, *await unseen(conn, worker), None)
    return name, ready, dead


async def silent(conn: Any, worker: int) -> None:
    """Make the worker silent for long enough. No session here holds its lock."""
    await conn.execute("UPDATE notifyq.worker SET seen_at = now() - interval '5 s' WHERE id = $1", worker)


async def reclaim_unowned(conn: Any) -> int:
    ids = [row[0] for row in await conn.fetch(SQL["list_unowned"], [])]
    return int(await conn.fetchval(SQL["reclaim_unowned"], ids))


async def hand_back_all(conn: Any, worker: int) -> int:
    return int(await conn.fetchval(SQL["hand_back_all"], worker, None))


async def reclaim_unanswered(conn: Any, worker: int, known: Sequence[Job]) -> int:
    keys = [job.id for job in known], [job.attempt for job in known]
    return int(await conn.fetchval(SQL["reclaim_unanswered"], worker, *keys, None))


async def end_backends(conn: Any, worker: int) -> bool:
    """Returns whether none is left."""
    row = await conn.fetchrow(SQL["end_backends"], worker, ["claims", "bell"], 2000)
    return bool(row["remaining"] == 0)


async def prune(conn: Any, most: int = 100) -> int:
    """Prune whatever its age."""
    return int(await conn.fetchval(SQL["prune_finished"], 0.0, 0.0, most, None))


async def prune_started(conn: Any, most: int = 100) -> int:
    return int(await conn.fetchval(SQL["prune_rate_log"], most))


async def cancel(conn: Any, id: int) -> bool:
    return bool(await conn.fetchval("SELECT notifyq.cancel($1)", id))


async def retry(conn: Any, id: int) -> bool:
    return bool(await conn.fetchval("SELECT notifyq.retry($1)", id))


async def take_turn(conn: Any, wait_ms: int = 5000, fleet: int = 7) -> bool:
    return bool(await conn.fetchval("SELECT notifyq.take_turn($1, $2)", fleet, wait_ms))


async def fall_asleep(conn: Any, wait_ms: int = 5000) -> bool:
    return bool(await conn.fetchval("SELECT notifyq.fall_asleep($1)", wait_ms))


async def states(conn: Any) -> dict[int, tuple[str, int]]:
    """State and attempts of each task that is known. No task is known twice."""
    rows = await conn.fetch("SELECT id, state, attempts FROM notifyq.all_tasks ORDER BY id")
    found = {row["id"]: (row["state"], row["attempts"]) for row in rows}
    assert len(found) == len(rows), "a task lives and is over, both at once"
    return found
