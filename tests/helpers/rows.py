"""Tasks and workers, as the tables show them."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import msgspec

from .waiting import eventually


async def insert(db: Any, type: str, count: int = 1, queue: str = "default", **payload: Any) -> list[int]:
    many = """INSERT INTO notifyq.task (type, queue, payload) SELECT $1, $2, $3::text::jsonb
              FROM generate_series(1, $4::integer) RETURNING id"""
    return [row[0] for row in await db.fetch(many, type, queue, json.dumps(payload), count)]


async def states(db: Any, ids: list[int]) -> dict[tuple[str, int], int]:
    """How many of these tasks are in which state, at which attempt."""
    rows = await db.fetch("SELECT state, attempts FROM notifyq.all_tasks WHERE id = ANY ($1::bigint[])", ids)
    return dict(Counter((row[0], row[1]) for row in rows))


async def state(db: Any, id: int) -> str | None:
    value: str | None = await db.fetchval("SELECT state FROM notifyq.all_tasks WHERE id = $1", id)
    return value


async def errors(db: Any, id: int) -> list[dict[str, Any]]:
    found = await db.fetchval("SELECT errors FROM notifyq.all_tasks WHERE id = $1", id)
    return msgspec.json.decode(found, type=list[dict[str, Any]]) if found else []


async def ended(db: Any, id: int, want: str) -> dict[str, Any]:
    """Wait until the task is in the state `want`. Returns its row."""
    await eventually(lambda: state(db, id), want)
    row = await db.fetchrow("SELECT * FROM notifyq.all_tasks WHERE id = $1", id)
    return dict(row)


async def handed_back(db: Any, *ids: int) -> bool:
    """Whether they are ready again as if nothing had happened: no attempt counted, no error, no worker."""
    rows = await db.fetch("SELECT worker, attempts, errors FROM notifyq.task WHERE id = ANY ($1::bigint[])", ids)
    return [tuple(row) for row in rows] == [(None, 0, None)] * len(ids)


async def nobody_left(db: Any) -> bool:
    return bool(await db.fetchval("SELECT count(*) = 0 FROM notifyq.worker"))
