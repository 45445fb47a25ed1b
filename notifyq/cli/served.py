"""Why a ready task isn't started: its queue is paused, or no worker takes it."""

from __future__ import annotations

import shlex

import asyncpg

from notifyq.database.connection import SQL, Connection

from .options import did_you_mean

NO_WORKER = "no worker is up"


async def why_not_started(conn: Connection, type: str, queue: str) -> str:
    """Why a ready task of this type isn't started from this queue; "" if a worker takes it.

    "" too for a role that may not read the workers and queues.
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
