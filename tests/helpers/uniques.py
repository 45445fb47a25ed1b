"""Unique tasks, and rows of them in each state."""

from __future__ import annotations

from typing import Any

import notifyq
from notifyq.options import State

from ..helpers import verbs

WAITING: tuple[State, ...] = ("scheduled", "ready")
KEY = '{"unique_key": "k"}'
KEYED = f"INSERT INTO notifyq.task (type, options) VALUES ('Known', '{KEY}')"
UNTIL_BEGUN = """
INSERT INTO notifyq.task (type, options)
VALUES ('Known', '{"unique_key": "k", "unique_states": ["scheduled", "ready"]}')
"""


class Known(notifyq.Task):
    n: int = 0


class Whole(notifyq.Task, tag="WHOLE"):
    unique = True
    user: str
    more: dict[str, int] | None = None


class Daily(notifyq.Task):
    unique = ("user", "day")
    unique_for = 3600
    user: str
    day: int
    note: str = ""


async def put(db: Any, state: str, **columns: Any) -> int:
    """Insert a task with the key 'k' in this state. Returns its id."""
    late: dict[str, Any] = {"run_at": "2100-01-01"} if state == "scheduled" else {}
    if state in ("scheduled", "ready"):
        return (await verbs.insert(db, options=KEY, **columns, **late))[0]
    [job] = await verbs.held(db, options=KEY, **columns)
    if state != "running":
        assert await verbs.finish(db, [job], state) == [job.id]
    return job.id
