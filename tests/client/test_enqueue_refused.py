"""What can't be enqueued is refused before it is sent, and in the caller's transaction nothing is sent early."""

from __future__ import annotations

from collections.abc import AsyncIterator
from datetime import UTC, datetime
from typing import Any

import msgspec
import pytest

import notifyq

from ..helpers.databases import Sessions
from ..helpers.lifecycle import Bench, Note
from ..helpers.running import working
from ..helpers.waiting import eventually


@pytest.fixture
async def bench(dsn: str) -> AsyncIterator[Bench]:
    """Connected, so that tests and handlers can enqueue."""
    bench = Bench()
    async with bench.app.connect(dsn):
        yield bench
        bench.release.set()


async def test_a_worker_runs_what_the_caller_commits(bench: Bench, db: Any, dsn: str, connect: Sessions) -> None:
    """If it is rolled back, the task never existed. If it is committed, the task runs, and not before."""
    conn = await connect()
    async with working(bench.app, dsn):
        for outcome in ("rollback", "commit"):
            transaction = conn.transaction()
            await transaction.start()
            await bench.app.enqueue(Note(outcome), conn=conn)
            await bench.app.enqueue_many([Note(outcome)] * 2, conn=conn)
            await bench.app.enqueue(Note(f"beside {outcome}"))
            await bench.seen.reach(1 if outcome == "rollback" else 2)
            await getattr(transaction, outcome)()
        await bench.seen.reach(5)
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.finished"), 5)
    assert bench.seen.items == ["beside rollback", "beside commit", "commit", "commit", "commit"]
    assert await db.fetchval("SELECT count(*) FROM notifyq.all_tasks") == 5


class Typed(notifyq.Task):
    n: int
    tags: list[str] = msgspec.field(default_factory=list)


typed: Any = Typed  # which takes anything, as a caller without a type checker may


class Other(notifyq.Task, tag="Note"):
    pass


class Large(notifyq.Task):
    text: str = msgspec.field(default_factory=lambda: "x" * 17_000_000)


REFUSED: list[tuple[Any, dict[str, Any], str]] = [
    (typed(n="x"), {}, r"Typed .*Expected `int`, got `str` - at `\$.n`"),
    (typed(n=1, tags=["a", 5]), {}, r"at `\$.tags\[1\]`"),
    (typed(n=object()), {}, "Typed can't be written as JSON"),
    (Note("a\x00b"), {}, "Note: PostgreSQL can't store this payload"),
    (Note("\ud800"), {}, "Note can't be written as JSON"),
    (Large(), {}, "17,000,0.. bytes, the limit is 16,777,216"),
    (Other(), {}, "type 'Note' is Note in this app, and not Other"),
    ({"n": 1}, {}, "expected an instance of a subclass of notifyq.Task"),
    (Note(), {"queue": ""}, "expected 1 to 200 characters"),
    (Note(), {"queue": "q" * 201}, "expected 1 to 200 characters"),
    (Note(), {"queue": "a\x00"}, "none of them NUL"),
    (Note(), {"delay": -1}, "delay is -1"),
    (Note(), {"delay": float("nan")}, "delay is nan"),
    (Note(), {"delay": "5"}, "delay is '5'"),
    (Note(), {"run_at": datetime(2030, 1, 1)}, "with a timezone"),  # noqa: DTZ001 - the mistake
    (Note(), {"run_at": datetime.now(UTC), "delay": 1}, "both given"),
    (Note(), {"priority": 40_000}, "priority is 40000"),
    (Note(), {"priority": 1.5}, "priority is 1.5"),
    (Note(), {"max_attempts": 0}, "max_attempts is 0"),
]


async def test_what_cannot_be_is_refused_before_it_is_sent(bench: Bench, db: Any) -> None:
    """The error names the task or the option. In enqueue_many one mistake refuses all."""
    for task, options, message in REFUSED:
        with pytest.raises(notifyq.ConfigError, match=message):
            await bench.app.enqueue(task, **options)
        with pytest.raises(notifyq.ConfigError, match=message):
            await bench.app.enqueue_many([Note(), task], **options)
    assert await db.fetchval("SELECT count(*) FROM notifyq.task") == 0
