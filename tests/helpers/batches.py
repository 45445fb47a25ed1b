"""An app with batch handlers, and a record of the batches."""

from __future__ import annotations

import threading
from datetime import UTC, datetime
from typing import Any

import anyio

import notifyq
from notifyq import Cancel, Context, Dead, Retry

from .waiting import Seen

CONTEXT = Context(id=1, queue="q", attempt=1, max_attempts=9, priority=0, created_at=datetime.now(UTC))
CLAIMED = "SELECT count(*) FROM notifyq.task WHERE worker IS NOT NULL"


class Item(notifyq.Task):
    """These are gathered for two minutes, or until there are ten."""

    backoff = 0.01
    max_attempts = 2
    how: str = ""


class Slow(notifyq.Task):
    timeout = 0.1
    max_attempts = 1


class Threaded(notifyq.Task):
    pass


class Score(notifyq.Task):
    n: int


class Pool:
    pass


class Bench:
    """An app with batch handlers, and what they have done."""

    def __init__(self) -> None:
        self.app = app = notifyq.App()
        self.seen = seen = Seen()  # ids, a list for each call

        @app.handler(batch=10, linger=120)
        async def items(tasks: list[Item], ctxs: list[Context]) -> Any:
            assert len(tasks) == len(ctxs)
            seen.add([ctx.id for ctx in ctxs])
            first = tasks[0].how
            if first == "raise":
                raise ValueError("all of it")
            if first == "return":
                return Retry(0, "all again")
            if first == "short":
                return [None]
            if first == "dict":
                return {}
            kinds = {
                "": None,
                "result": {"ok": True},
                "odd": object(),
                "error": KeyError("this one"),
                "retry": Retry(0, "this one again"),
                "cancel": Cancel("not this one"),
                "dead": Dead("not that one"),
            }
            return [kinds[task.how] for task in tasks]

        @app.handler(batch=5, linger=0.02)
        async def slow(tasks: list[Slow]) -> None:
            seen.add(len(tasks))
            await anyio.sleep(60)

        @app.handler(batch=5, linger=0)
        def threaded(tasks: list[Threaded]) -> list[str]:
            seen.add(len(tasks))
            return [threading.current_thread().name for _ in tasks]


def items(count: int, how: str = "") -> list[notifyq.Task]:
    return [Item(how) for _ in range(count)]


async def claimed(db: Any) -> int:
    return int(await db.fetchval(CLAIMED))
