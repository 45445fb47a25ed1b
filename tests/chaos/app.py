"""The app that the workers of a chaos run serve: handlers of every temper, each of which writes down what it does.

An event is one line, written whole by one system call: it is there, whatever happens to the process next.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import logging
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import anyio

import notifyq

TICK_SECONDS = 2
WHO = os.environ.get("CHAOS_WHO", "")
_flags = os.O_CREAT | os.O_APPEND | os.O_WRONLY
_file = os.open(os.path.join(os.environ["CHAOS_EVENTS"], f"{WHO}.jsonl"), _flags) if WHO else -1
_numbers = itertools.count(1)
_fork = multiprocessing.get_context("fork")
_left: list[Any] = []

app = notifyq.App()


def say(event: str, **fields: Any) -> None:
    if WHO:
        line = json.dumps({"event": event, "who": WHO, "at": time.time(), **fields}, default=str)
        os.write(_file, line.encode() + b"\n")


class Log(logging.Handler):
    """What notifyq warns of is part of the history."""

    def emit(self, record: logging.LogRecord) -> None:
        fields = getattr(record, "fields", {})
        say(
            "log",
            message=getattr(record, "summary", record.getMessage()),
            ids=fields.get("ids") or [fields.get("id", 0)],
            fields=fields,
        )


@contextmanager
def told(task: Numbered, ctx: notifyq.Context) -> Iterator[str]:
    run = f"{WHO}-{next(_numbers)}"
    say("started", run=run, id=ctx.id, attempt=ctx.attempt, type=type(task).__name__, n=task.n)
    how = "returned"
    try:
        yield f"run {run}"
    except BaseException as error:
        how = type(error).__name__
        raise
    finally:
        say("ended", run=run, how=how)


class Numbered(notifyq.Task):
    backoff: ClassVar[float] = 0.05
    n: int = 0
    seconds: float = 0.0


class Quick(Numbered): ...


class Tick(Numbered): ...


class Only(Numbered):
    unique = ("key",)
    key: int = 0


class Slow(Numbered): ...


class Fail(Numbered):
    times: int = 1


class Doomed(Numbered):
    max_attempts = 2


class TimedOut(Numbered):
    max_attempts = 2
    timeout = 0.3


class Thread(Numbered): ...


class Forks(Numbered): ...


class Verdict(Numbered):
    says: str = "retry"


class Kamikaze(Numbered):
    max_attempts = 2


class Bystander(Numbered):
    max_attempts = 2


class Block(Numbered): ...


class Stubborn(Numbered):
    max_attempts = 2
    timeout = 0.2


class Leak(Numbered): ...


class Big(Numbered):
    """Its payload ends with its number. `result`: the size that its result is to have."""

    blob: str = ""
    result: int = 0


class Huge(Big): ...


class Rude(Numbered):
    max_attempts = 2
    what: int = 0


@app.handler
async def quick(task: Quick, ctx: notifyq.Context) -> str:
    with told(task, ctx) as run:
        return run


@app.cron(f"*/{TICK_SECONDS} * * * * *", name="tick")
@app.handler
async def tick(task: Tick, ctx: notifyq.Context) -> str:
    with told(task, ctx) as run:
        return run


@app.handler
async def only(task: Only, ctx: notifyq.Context) -> str:
    with told(task, ctx) as run:
        await anyio.sleep(task.seconds)
        return run


@app.handler
async def slow(task: Slow, ctx: notifyq.Context) -> str:
    with told(task, ctx) as run:
        await anyio.sleep(task.seconds)
        return run


@app.handler
async def fail(task: Fail, ctx: notifyq.Context) -> str:
    with told(task, ctx) as run:
        if ctx.attempt <= task.times:
            raise RuntimeError(run)
        return run


@app.handler
async def doomed(task: Doomed, ctx: notifyq.Context) -> None:
    with told(task, ctx) as run:
        raise RuntimeError(run)


@app.handler
async def timed_out(task: TimedOut, ctx: notifyq.Context) -> None:
    with told(task, ctx):
        await anyio.sleep(60)


@app.handler
def thread(task: Thread, ctx: notifyq.Context) -> str:
    with told(task, ctx) as run:
        time.sleep(task.seconds)
        return run


def _end_with_parent() -> None:
    """The processes of a pool wait for work for ever if their parent is killed."""
    parent = os.getppid()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(0.5)
        os._exit(0)

    threading.Thread(target=watch, daemon=True).start()


@app.handler
def forks(task: Forks, ctx: notifyq.Context) -> str:
    """Its handler ends a child by a signal, leaves a pool early, and waits for a child, which outlives a killed
    worker."""
    with told(task, ctx) as run:
        child = _fork.Process(target=time.sleep, args=(60,), daemon=True)
        child.start()
        child.terminate()
        child.join()
        with _fork.Pool(2, initializer=_end_with_parent) as pool:
            pool.apply(abs, (-1,))
        child = _fork.Process(target=time.sleep, args=(task.seconds,), daemon=True)
        child.start()
        child.join()
        return run


@app.handler
async def verdict(task: Verdict, ctx: notifyq.Context) -> notifyq.Retry | str:
    with told(task, ctx) as run:
        if task.says == "retry":
            return notifyq.Retry(0.1, run) if ctx.attempt == 1 else run
        raise notifyq.Cancel(run) if task.says == "cancel" else notifyq.Dead(run)


@app.handler
async def kamikaze(task: Kamikaze, ctx: notifyq.Context) -> None:
    with told(task, ctx):
        os.kill(os.getpid(), signal.SIGKILL)


@app.handler
async def bystander(task: Bystander, ctx: notifyq.Context) -> str:
    with told(task, ctx) as run:
        await anyio.sleep(task.seconds)
        return run


@app.handler
async def block(task: Block, ctx: notifyq.Context) -> str:
    with told(task, ctx) as run:
        time.sleep(task.seconds)
        return run


@app.handler
async def stubborn(task: Stubborn, ctx: notifyq.Context) -> str:
    """Its handler swallows its cancellations for as long as its task says."""
    with told(task, ctx) as run:
        until = time.monotonic() + task.seconds
        while time.monotonic() < until:
            try:
                await asyncio.sleep(until - time.monotonic())
            except asyncio.CancelledError:
                pass
        return run


@app.handler
async def leak(task: Leak, ctx: notifyq.Context) -> str:
    """Its handler leaves memory, a file and an asyncio task behind."""
    with told(task, ctx) as run:
        _left.append((asyncio.get_running_loop().create_task(asyncio.sleep(5)), bytes(10_000), os.open(os.devnull, 0)))
        return run


@app.handler
async def big(task: Big, ctx: notifyq.Context) -> str:
    with told(task, ctx) as run:
        if not task.blob.endswith(f" {task.n}"):
            raise RuntimeError(f"{run}: its payload isn't whole")
        return f"{run}, {task.result} bytes".ljust(task.result) if task.result else run


@app.handler
async def huge(task: Huge, ctx: notifyq.Context) -> str:
    """Its payload is above the limit, so this never runs."""
    with told(task, ctx) as run:
        return run


@app.handler
async def rude(task: Rude, ctx: notifyq.Context) -> None:
    with told(task, ctx) as run:
        raise (
            SystemExit(run),
            KeyboardInterrupt(run),
            GeneratorExit(run),
            asyncio.CancelledError(run),
            BaseExceptionGroup(run, [SystemExit(1)]),
        )[task.what % 5]


logging.getLogger("notifyq").addHandler(Log(logging.WARNING))
