"""An app with tasks that succeed, fail, hold on and time out, and a record of what they did."""

from __future__ import annotations

import threading
import time
from collections import Counter
from typing import Any

import anyio

import notifyq

from .waiting import Seen


class Note(notifyq.Task):
    name: str = ""


class Hold(notifyq.Task):
    """Its handler runs until the test says so."""

    name: str = ""


class Fail(notifyq.Task):
    max_attempts = 4
    backoff = 0.02
    why: str = "no luck"


class Say(notifyq.Task):
    """Its handler ends as it is told."""

    verdict: str
    delay: float | None = None
    returned: bool = False


class Slow(notifyq.Task):
    max_attempts = 1
    timeout = 0.1


class SlowThread(notifyq.Task):
    max_attempts = 1
    timeout = 0.25  # in which a thread has begun


class Parent(notifyq.Task):
    children: int


class Bench:
    """An app with a handler for each of these tasks, and what they have done."""

    def __init__(self) -> None:
        self.app = app = notifyq.App()
        self.seen = seen = Seen()
        self.held = held = Seen()
        self.cancelled = cancelled = Seen()
        self.release = release = anyio.Event()
        self.running: Counter[str] = Counter()
        self.peak: Counter[str] = Counter()

        @app.handler
        async def note(task: Note, ctx: notifyq.Context) -> str:
            seen.add(task.name)
            return f"noted {task.name}"

        @app.handler
        async def hold(task: Hold, ctx: notifyq.Context) -> None:
            self.running[ctx.queue] += 1
            self.peak[ctx.queue] = max(self.peak[ctx.queue], self.running[ctx.queue])
            held.add(ctx.id)
            try:
                await release.wait()
            except BaseException:
                cancelled.add(ctx.id)
                raise
            finally:
                self.running[ctx.queue] -= 1

        @app.handler
        async def fail(task: Fail) -> None:
            seen.add(time.monotonic())
            raise ValueError(task.why)

        @app.handler
        async def say(task: Say, ctx: notifyq.Context) -> Any:
            seen.add(ctx.id)
            verdict = {
                "retry": notifyq.Retry(task.delay, "not yet"),
                "cancel": notifyq.Cancel("not wanted"),
                "dead": notifyq.Dead("hopeless"),
            }[task.verdict]
            if task.returned:
                return verdict
            raise verdict

        @app.handler
        async def slow(task: Slow) -> None:
            await anyio.sleep(60)

        @app.handler
        def slow_thread(task: SlowThread) -> None:
            seen.add("in a thread")
            threading.Event().wait(0.5)

        @app.handler
        async def parent(task: Parent) -> None:
            seen.add("parent")
            await anyio.sleep(0.2)  # nothing is runnable meanwhile, and yet it isn't over
            await app.enqueue_many([Note(str(n)) for n in range(task.children)])
