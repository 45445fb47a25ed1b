"""A worker in this process."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import anyio.abc

import notifyq

from .machine import limit


class RunningWorker:
    """A worker in this process."""

    def __init__(self, info: notifyq.WorkerInfo, stop: anyio.Event, force: anyio.Event, done: anyio.Event) -> None:
        self.info = info
        self.stop = stop
        self.force = force
        self.done = done  # set when it has returned

    async def stopped(self) -> None:
        self.stop.set()
        with anyio.fail_after(limit()):
            await self.done.wait()


@asynccontextmanager
async def working(app: notifyq.App, dsn: str, **options: Any) -> AsyncIterator[RunningWorker]:
    """A worker of `app` that works inside the block, the fallback poll off; drained at its end."""
    options = {"poll_interval": 0.0, "shutdown_timeout": 5.0, **options}
    stop, force, done = anyio.Event(), anyio.Event(), anyio.Event()

    async def run(*, task_status: anyio.abc.TaskStatus[notifyq.WorkerInfo]) -> None:
        try:
            await app.run_worker(dsn=dsn, stop=stop, force=force, task_status=task_status, **options)
        finally:
            done.set()

    async with anyio.create_task_group() as group:
        with anyio.fail_after(limit()):
            info = await group.start(run)
        yield RunningWorker(info, stop, force, done)
        stop.set()
