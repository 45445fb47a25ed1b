"""An app that measures its limits, and the end of all waiting for one."""

from __future__ import annotations

import time
from typing import Any

import anyio

import notifyq

from .waiting import Seen, eventually

ONE: dict[str, Any] = {"options": '{"limit_key": "a", "limit_running": 1}'}


class Bench:
    """An app that counts how many of its handlers run at once, by limit_key. Each runs as long as its task says."""

    def __init__(self) -> None:
        self.app = notifyq.App()
        self.most: dict[str, int] = {}
        self.begun = Seen()
        self.ended = Seen()
        self._running: dict[str, int] = {}

        class Job(notifyq.Task):
            key: str
            seconds: float = 0.0
            fails: int = 0

        self.Job = Job

        @self.app.handler
        async def job(task: Job, ctx: notifyq.Context) -> None:
            self._running[task.key] = running = self._running.get(task.key, 0) + 1
            self.most[task.key] = max(running, self.most.get(task.key, 0))
            self.begun.add((ctx.id, time.monotonic()))
            try:
                await anyio.sleep(task.seconds)
            finally:
                self._running[task.key] -= 1
            if ctx.attempt <= task.fails:
                raise notifyq.Retry(delay=0)
            self.ended.add(ctx.id)


async def idle(db: Any) -> None:
    """Wait until no task waits, none runs, and no worker has to look at a key any more."""
    await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.task"), 0)
    await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.slot_released"), 0)


# What notifyq.rate_log forgets with the time of a rate.
STARTS = """
    CREATE TABLE ledger (key text, at timestamptz, n integer);
    CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN INSERT INTO public.ledger VALUES (NEW.key, NEW.at, NEW.n); RETURN NULL; END $$;
    CREATE TRIGGER note AFTER INSERT ON notifyq.rate_log FOR EACH ROW EXECUTE FUNCTION note()"""


async def begun(db: Any, key: str) -> list[float]:
    """When tasks of a key or a queue were admitted, by the database's clock."""
    rows = await db.fetch("SELECT at, n FROM ledger WHERE key = $1 ORDER BY at", key)
    return [row["at"].timestamp() for row in rows for _ in range(row["n"])]


def closest(starts: list[float], count: int) -> float:
    """The shortest time in which one task more than `count` started."""
    return min(later - first for first, later in zip(starts, starts[count:], strict=False))
