"""An app with tasks that wait for others."""

from __future__ import annotations

import threading
from typing import Any

import anyio

import notifyq
from notifyq import Context

from .waiting import Seen

INSERT = """
    INSERT INTO notifyq.task (type, options)
    VALUES ($1, jsonb_build_object('after', $2::bigint[], 'on_dead', $3::text)) RETURNING id"""
LEFT = "SELECT count(*) FROM notifyq.dependency"


class Step(notifyq.Task):
    max_attempts = 1
    name: str = ""
    how: str = ""


class Sum(notifyq.Task):
    max_attempts = 2
    backoff = 0.01
    fail: bool = False


class Threaded(notifyq.Task):
    pass


class Bench:
    def __init__(self) -> None:
        self.app = app = notifyq.App()
        self.seen = seen = Seen()  # names or ids of steps that began
        self.release = release = anyio.Event()  # those that wait

        @app.handler
        async def step(task: Step, ctx: Context) -> Any:
            seen.add(task.name or ctx.id)
            match task.how:
                case "wait":
                    await release.wait()
                case "fail":
                    raise ValueError("no luck")
                case "cancel":
                    raise notifyq.Cancel("not wanted")
            return task.name or None

        @app.handler
        async def sum(task: Sum, ctx: Context) -> Any:
            results = await ctx.results()
            seen.add([str(one) if isinstance(one, Exception) else one for one in results])
            if task.fail and ctx.attempt == 1:
                raise ValueError("once more")
            return len(results)

        @app.handler
        def threaded(task: Threaded, ctx: Context) -> Any:
            assert threading.current_thread() is not threading.main_thread()
            return anyio.from_thread.run(ctx.results)


async def where(db: Any, *ids: int) -> list[Any]:
    """The states of these, and what they wait for."""
    query = "SELECT id, state, waits_for FROM notifyq.all_tasks WHERE id = ANY ($1::bigint[])"
    found = {row["id"]: row["waits_for"] or row["state"] for row in await db.fetch(query, ids)}
    return [found.get(id) for id in ids]
