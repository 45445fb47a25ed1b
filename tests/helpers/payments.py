"""Handlers with results, and how a test waits for them."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import msgspec

import notifyq

from .machine import limit
from .waiting import eventually

app = notifyq.App()


class Receipt(msgspec.Struct):
    number: int


class Pay(notifyq.Task):
    backoff = 0.001
    cents: int = 1
    fails: int = 0
    dies: bool = False
    cancels: bool = False


class Untyped(notifyq.Task):
    pass


class Gone(notifyq.Task):
    """No handler here takes it."""


@app.handler
async def pay(task: Pay, ctx: notifyq.Context) -> Receipt | notifyq.Dead:
    if ctx.attempt <= task.fails:
        raise ValueError("not yet")
    if task.cancels:
        raise notifyq.Cancel("changed my mind")
    if task.dies:
        return notifyq.Dead("refused")
    return Receipt(task.cents)


@app.handler
def untyped(task: Untyped):  # type: ignore[no-untyped-def]
    return {"a": [1, None]}


def waiting() -> int:
    """How many tasks the app is waiting for."""
    return len(app.results._waiting)


async def marked(db: Any, count: int = 1) -> None:
    await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.task WHERE awaited"), count)


@asynccontextmanager
async def wait(ref: notifyq.Ref, *args: Any, **options: Any) -> AsyncIterator[list[Any]]:
    """Begin to wait. At the block's end the wait must be over, and the list has the result, or the error."""
    got: list[Any] = []

    async def run() -> None:
        try:
            got.append(await ref.result(*args, **options))
        except Exception as error:
            got.append(error)

    with anyio.fail_after(limit()):
        async with anyio.create_task_group() as group:
            group.start_soon(run)
            yield got
