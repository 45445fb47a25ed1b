"""Tasks and handlers for the tests of notifyq.testing."""

from __future__ import annotations

import threading
from datetime import UTC, datetime

import anyio
import msgspec

import notifyq


class User(msgspec.Struct):
    id: int
    email: str


class Mail(notifyq.Task, tag="MAIL"):
    to: str
    user: User | None = None
    copies: list[User] = msgspec.field(default_factory=list)
    headers: dict[str, str] = msgspec.field(default_factory=dict)
    queue: str = ""  # a field of the payload, whatever a class may say of its queue


class Act(notifyq.Task):
    """Its handler does as it is told."""

    max_attempts = 3
    backoff = 100.0
    how: str = "done"


class Slow(notifyq.Task):
    timeout = 0.01


class Thread(notifyq.Task):
    pass


class Chain(notifyq.Task):
    left: int
    delay: float | None = None


class Unhandled(notifyq.Task):
    pass


class Receipt(msgspec.Struct):
    number: int
    at: datetime


NOW = datetime(2030, 1, 1, tzinfo=UTC)
app = notifyq.App()
contexts: list[notifyq.Context] = []


@app.handler
async def mail(task: Mail) -> None:
    pass


@app.handler
async def act(task: Act, ctx: notifyq.Context) -> Receipt | notifyq.Dead | object:
    contexts.append(ctx)
    match task.how:
        case "done":
            return Receipt(number=7, at=NOW)
        case "raise":
            raise KeyError("no such thing")
        case "retry":
            raise notifyq.Retry(delay=30, reason="busy")
        case "dead":
            return notifyq.Dead("refused")
        case "cancel":
            raise notifyq.Cancel("not needed")
        case "exit":
            raise SystemExit(3)
        case "once":
            if ctx.attempt == 1:
                raise ValueError("the first time")
            return None
        case _:
            return object()


@app.handler
async def slow(task: Slow) -> None:
    await anyio.sleep(3600)


@app.handler
def thread(task: Thread) -> Receipt | notifyq.Retry:
    return Receipt(number=threading.get_ident(), at=NOW)


@app.handler
async def chain(task: Chain) -> None:
    if task.left:
        await app.enqueue(Chain(left=task.left - 1, delay=task.delay), queue=f"q{task.left}", delay=task.delay)
