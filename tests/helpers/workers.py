"""A worker in a process of its own, for tests that kill, freeze or starve it: `workers.py DSN [OPTION=JSON...]`.

It writes one line of JSON to stdout for each event: started, ran (a handler began), ended, log.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import random
import signal
import sys
import time
from typing import Any

import anyio

import notifyq
from notifyq.worker import isolate

app = notifyq.App()


def say(event: str, **fields: Any) -> None:
    # One write, whole: the heartbeat's thread logs too.
    os.write(1, json.dumps({"event": event, "pid": os.getpid(), **fields}, default=str).encode() + b"\n")


class Log(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        say("log", message=getattr(record, "summary", record.getMessage()), fields=getattr(record, "fields", {}))


class Quick(notifyq.Task):
    n: int = 0


class Sleep(notifyq.Task):
    backoff = 0.01
    seconds: float = 3600


class Block(notifyq.Task):
    seconds: float


class Die(notifyq.Task):
    max_attempts = 2


class Part(notifyq.Task):
    """It runs in a batch, for as long as the longest of it."""

    seconds: float = 3600


class Book(notifyq.Task):
    backoff = 0.01


class Step(notifyq.Task):
    """Its handler takes up to that many seconds, and fails that often."""

    max_attempts = 1000
    seconds: float = 0.0
    fails: float = 0.0


@app.handler
async def step(task: Step, ctx: notifyq.Context) -> None:
    say("ran", id=ctx.id, attempt=ctx.attempt, at=time.time())
    try:
        await anyio.sleep(random.uniform(0, task.seconds))
    finally:
        say("over", id=ctx.id, attempt=ctx.attempt, at=time.time())
    if random.random() < task.fails:
        raise notifyq.Retry(delay=random.choice((0, 0.02)))


@app.handler
async def book(task: Book, ctx: notifyq.Context) -> None:
    async with ctx.transaction() as conn:
        await conn.execute("INSERT INTO ledger VALUES ($1, $2)", ctx.id, ctx.attempt)
        await anyio.sleep(random.uniform(0, 0.02))
    say("booked", id=ctx.id)
    await anyio.sleep(random.uniform(0, 0.02))


@app.handler(batch=20, linger=0.02)
async def parts(tasks: list[Part], ctxs: list[notifyq.Context]) -> None:
    say("batch", ids=[ctx.id for ctx in ctxs], attempts=[ctx.attempt for ctx in ctxs])
    await anyio.sleep(max(task.seconds for task in tasks))
    say("ended", ids=[ctx.id for ctx in ctxs])


@app.handler
async def quick(task: Quick, ctx: notifyq.Context) -> None:
    say("ran", id=ctx.id, attempt=ctx.attempt)


@app.handler
async def sleep(task: Sleep, ctx: notifyq.Context) -> None:
    say("ran", id=ctx.id, attempt=ctx.attempt)
    try:
        await anyio.sleep(task.seconds)
    except BaseException:
        say("cancelled", id=ctx.id)
        raise
    say("ended", id=ctx.id)


@app.handler
async def block(task: Block, ctx: notifyq.Context) -> None:
    say("ran", id=ctx.id, attempt=ctx.attempt)
    time.sleep(task.seconds)
    say("ended", id=ctx.id)


@app.handler
async def die(task: Die, ctx: notifyq.Context) -> None:
    say("ran", id=ctx.id, attempt=ctx.attempt)
    os.kill(os.getpid(), signal.SIGKILL)


async def main(dsn: str, options: dict[str, Any]) -> None:
    isolate.PATIENCE_SECONDS = float(os.environ.get("NOTIFYQ_TEST_PATIENCE", isolate.PATIENCE_SECONDS))
    stop, force = anyio.Event(), anyio.Event()

    def stopping() -> None:
        (force if stop.is_set() else stop).set()

    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopping)
    async with anyio.create_task_group() as group:

        async def run(*, task_status: Any) -> None:
            await app.run_worker(
                dsn=dsn, stop=stop, force=force, task_status=task_status, **{"poll_interval": 0, **options}
            )

        info = await group.start(run)
        say("started", id=info.id, bell_ms=info.bell_ms)


if __name__ == "__main__":
    logging.getLogger("notifyq").addHandler(Log())
    logging.getLogger("notifyq").setLevel(logging.INFO)
    given = dict(argument.split("=", 1) for argument in sys.argv[2:])
    asyncio.run(main(sys.argv[1], {name: json.loads(value) for name, value in given.items()}))
