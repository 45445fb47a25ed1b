"""Tasks that wait for the ends of others: chains, fan-in, results, and other ways to enqueue them."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import anyio
import asyncpg
import psycopg
import pytest

import notifyq
from notifyq import Context, TaskCancelled, TaskDead
from notifyq.errors import ConfigError
from notifyq.testing import drain, run_inline

from ..helpers.machine import limit
from ..helpers.predecessors import LEFT, Bench, Step, Sum, Threaded, where
from ..helpers.rows import ended, state
from ..helpers.running import working
from ..helpers.waiting import eventually
from .test_after_races import free


@pytest.fixture
async def bench(dsn: str) -> AsyncIterator[Bench]:
    bench = Bench()
    async with bench.app.connect(dsn):
        yield bench
        bench.release.set()


async def test_it_waits_for_all_and_gets_their_results(bench: Bench, db: Any, dsn: str) -> None:
    async with working(bench.app, dsn):
        a = await bench.app.enqueue(Step("a"))
        b = await bench.app.enqueue(Step("b", "wait"))
        last = await bench.app.enqueue(Sum(), after=[b, a.id])
        await eventually(lambda: where(db, a.id, b.id, last.id), ["done", "running", "after"])
        bench.release.set()
        row = await ended(db, last.id, "done")
    assert bench.seen.items[2] == ["b", "a"], "in the order of `after`"
    assert row["attempts"] == 1, "waiting isn't an attempt"
    assert json.loads(row["options"]) == {"after": [b.id, a.id]}
    assert row["result"] == b"2"
    assert not await db.fetchval(LEFT)


async def test_a_task_that_is_named_twice_counts_once(bench: Bench, db: Any, dsn: str) -> None:
    first, second = await bench.app.enqueue(Step("a")), await bench.app.enqueue(Step("b"))
    last = await bench.app.enqueue(Sum(), after=[second, first, second.id])
    async with working(bench.app, dsn):
        assert (await ended(db, last.id, "done"))["result"] == b"2"
    assert bench.seen.items[-1] == ["b", "a"]


async def test_a_chain_of_a_hundred_with_two_workers(bench: Bench, db: Any, dsn: str) -> None:
    ids: list[int] = []
    async with working(bench.app, dsn), working(bench.app, dsn):
        for n in range(100):
            ids.append((await bench.app.enqueue(Step(), after=ids[-1:], priority=n)).id)
        await ended(db, ids[-1], "done")
    assert bench.seen.items == ids
    assert set(await where(db, *ids)) == {"done"}
    assert not await db.fetchval(LEFT)


async def test_a_chain_that_is_enqueued_at_once(bench: Bench, db: Any, dsn: str) -> None:
    """The whole chain is claimed together, the last task first, and all but one are parked."""
    ids: list[int] = []
    async with db.transaction():
        for n in range(100):
            ids.append((await bench.app.enqueue(Step(), after=ids[-1:], priority=n, conn=db)).id)
    async with working(bench.app, dsn), working(bench.app, dsn):
        await ended(db, ids[-1], "done")
    assert bench.seen.items == ids
    assert not await db.fetchval(LEFT)


async def test_a_thousand_wide(bench: Bench, db: Any, dsn: str) -> None:
    async with working(bench.app, dsn), working(bench.app, dsn):
        ids, last = await bench.app.enqueue_many([Step(str(n)) for n in range(1000)], then=Sum())
        row = await ended(db, last.id, "done")
    assert row["result"] == b"1000"
    assert bench.seen.items[-1] == [str(n) for n in range(1000)], "the last, and in order"
    assert len(bench.seen.items) == 1001
    assert ids == list(range(1, 1001))
    assert not await db.fetchval(LEFT)


async def test_a_thousand_wait_for_one(bench: Bench, db: Any, dsn: str) -> None:
    async with working(bench.app, dsn), working(bench.app, dsn):
        first = await bench.app.enqueue(Step("first", "wait"))
        ids = await bench.app.enqueue_many([Step(str(n)) for n in range(1000)], after=[first])
        await eventually(lambda: where(db, *ids), ["after"] * 1000)
        assert bench.seen.items == ["first"]
        bench.release.set()
        await eventually(lambda: where(db, *ids), ["done"] * 1000)
    assert not await db.fetchval(LEFT)


async def test_groups_of_groups(bench: Bench, db: Any, dsn: str) -> None:
    async with working(bench.app, dsn):
        _, one = await bench.app.enqueue_many([Step("a"), Step("b")], then=Sum(), priority=3)
        _, two = await bench.app.enqueue_many([Step("c")], then=Sum(), after=[one])
        empty, three = await bench.app.enqueue_many([], then=Sum())
        assert empty == []
        last = await bench.app.enqueue(Sum(), after=[one, two, three])
        await ended(db, last.id, "done")
    assert bench.seen.items[-1] == [2, 1, 0]
    assert bench.seen.items.index(["c"]) > bench.seen.items.index("c") > bench.seen.items.index(["a", "b"])
    assert await db.fetchval("SELECT priority FROM notifyq.all_tasks WHERE id = $1", one.id) == 3


async def test_a_delay_comes_first(bench: Bench, db: Any, dsn: str) -> None:
    first = await bench.app.enqueue(Step("first"))
    delayed = await bench.app.enqueue(Step("delayed"), after=[first], delay=3600)
    async with working(bench.app, dsn):
        await ended(db, first.id, "done")
        assert await where(db, delayed.id) == ["scheduled"]
        await db.execute("SELECT notifyq.retry($1)", delayed.id)
        await ended(db, delayed.id, "done")


async def test_what_is_over_or_unknown_is_not_waited_for(bench: Bench, db: Any, dsn: str) -> None:
    async with working(bench.app, dsn):
        a = await bench.app.enqueue(Step("a"))
        pruned = await bench.app.enqueue(Step("pruned"))
        await ended(db, a.id, "done")
        await ended(db, pruned.id, "done")
        await db.execute("DELETE FROM notifyq.finished WHERE id = $1", pruned.id)
        last = await bench.app.enqueue(Sum(fail=True), after=[a, pruned])
        row = await ended(db, last.id, "done")
    assert row["attempts"] == 2
    assert bench.seen.items[2:] == [["a", None]] * 2, "and the second run is given them too"


async def test_history_0(bench: Bench, db: Any, dsn: str) -> None:
    """An outcome for which no history is kept stays for the tasks that wait for it, until it is pruned."""
    async with working(bench.app, dsn, history=0):
        alone = await bench.app.enqueue(Step("alone"))
        _, last = await bench.app.enqueue_many([Step("a", "wait"), Step("b", "wait")], then=Sum())
        await eventually(lambda: where(db, last.id), ["after"])
        doomed = await bench.app.enqueue(Step("c", "cancel"))
        after = await bench.app.enqueue(Step("never"), after=[doomed])
        bench.release.set()
        await bench.seen.reach(5)
        await eventually(lambda: where(db, alone.id, last.id), [None, None])
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.task"), 0)
    assert ["a", "b"] in bench.seen.items
    # Cancelled before its admission, it may be unknown by then; otherwise it is known as cancelled.
    assert (await where(db, after.id) == ["cancelled"]) == ("never" not in bench.seen.items)


async def test_drained(bench: Bench, db: Any) -> None:
    ids = [(await bench.app.enqueue(Step("first"))).id]
    for n in range(20):
        ids += [(await bench.app.enqueue(Step(str(n)), after=ids[-2:])).id]
    _, last = await bench.app.enqueue_many([Step("x", "fail"), Step("y")], then=Sum(), on_dead="run")
    drained = await drain(bench.app)
    assert (drained.done, drained.dead) == (23, 1)
    assert await state(db, last.id) == "done"
    ids = [(await bench.app.enqueue(Step("bad", "fail"))).id]
    for _ in range(20):
        ids += [(await bench.app.enqueue(Step("never"), after=ids[-1:])).id]
    await drain(bench.app)
    assert await where(db, *ids) == ["dead"] + ["cancelled"] * 20
    assert not await db.fetchval(LEFT)


async def test_in_a_thread(bench: Bench, db: Any, dsn: str) -> None:
    async with working(bench.app, dsn):
        _, last = await bench.app.enqueue_many([Step("a"), Step("b")], then=Threaded())
        assert (await ended(db, last.id, "done"))["result"] == b'["a", "b"]'


async def test_with_limits_and_order(bench: Bench, db: Any, dsn: str) -> None:
    """A task that waits for an end holds no slot of its limit, and holds up no task of its order key."""
    async with working(bench.app, dsn):
        first = await bench.app.enqueue(Step("first", "wait"))
        waits = await bench.app.enqueue(Step("waits"), after=[first], limit_key="k", limit=1, order_key="o")
        await eventually(lambda: where(db, waits.id), ["after"])
        other = await bench.app.enqueue(Step("other"), limit_key="k", limit=1, order_key="o")
        await ended(db, other.id, "done")
        bench.release.set()
        await ended(db, waits.id, "done")
    assert bench.seen.items == ["first", "other", "waits"]


async def test_what_cannot_be(bench: Bench, db: Any) -> None:
    app = bench.app
    first = await app.enqueue(Step())
    for wrong, message in (
        ([first.id + 2], "task Step: after has an id that no task has yet"),
        ([first.id + 2**40], "an id that no task has yet"),
    ):
        with pytest.raises(ConfigError, match=message):
            await app.enqueue(Step(), after=wrong)
        with pytest.raises(ConfigError, match=message):
            await app.enqueue_many([Step()], after=wrong)
        await db.execute("SELECT setval('notifyq.task_id_seq', $1)", first.id)
    for options, message in (
        ({"after": ["5"]}, "after has '5' in it"),
        ({"after": [0]}, "after has 0 in it"),
        ({"after": [first], "on_dead": "skip"}, "on_dead is 'skip'; expected 'cancel' or 'run', beside after="),
        ({"on_dead": "run"}, "on_dead is 'run'; expected"),
        ({"after": range(1, 10_002)}, "after has 10001 tasks; expected 10000 at most"),
    ):
        with pytest.raises(ConfigError, match=message):
            await app.enqueue(Step(), **options)
    with pytest.raises(ConfigError, match="then= would wait for 10001 tasks; expected 10000 at most"):
        await app.enqueue_many([Step()] * 10_001, then=Sum())
    for text, message in (
        ('{"after": [null]}', "after contains something other than an id"),
        ('{"on_dead": "run"}', "on_dead needs after"),
        ('{"after": [1], "on_dead": "skip"}', "on_dead is not cancel or run"),
        (json.dumps({"after": [1] * 10_001}), "after has more than 10000 ids"),
        (json.dumps({"after": [first.id + 2**40]}), "after has an id that no task has yet"),
    ):
        with pytest.raises(asyncpg.CheckViolationError, match=f"^notifyq.task: {message}$"):
            await db.execute("INSERT INTO notifyq.task (type, options) VALUES ('Step', $1::text::jsonb)", text)
    assert await db.fetchval("SELECT count(*) FROM notifyq.task") == 1


async def test_results_outside_of_a_worker() -> None:
    with pytest.raises(ConfigError, match=r"ctx\.results\(\) is for handlers that a worker runs"):
        await Context(1, "q", 1, 1, 0, None).results()  # type: ignore[arg-type]


async def test_inline(bench: Bench) -> None:
    dead = TaskDead(5, "Step", "no luck")
    assert (await run_inline(bench.app, Sum(), results=["a", dead])).result == 2
    assert bench.seen.items == [["a", "task 5 (Step) is dead: no luck"]]
    assert (await run_inline(bench.app, Sum())).result == 0
    assert str(TaskCancelled(5, "Step", None)) == "task 5 (Step) was cancelled"


async def test_other_clients(bench: Bench, db: Any, dsn: str) -> None:
    """They enqueue in their own transactions, and in plain SQL."""
    client = notifyq.SyncClient(bench.app)

    def blocking() -> tuple[list[int], int]:
        with psycopg.connect(dsn) as conn:
            ids, last = client.enqueue_many([Step("a"), Step("b")], then=Sum(), conn=conn)
            alone = client.enqueue(Step("c"), after=[last], conn=conn)
            return ids, alone.id

    ids, alone = await anyio.to_thread.run_sync(blocking)
    by_sql = await db.fetchval(
        "SELECT notifyq.enqueue('Sum', options => jsonb_build_object('after', $1::bigint[], 'on_dead', 'run'))",
        [*ids, alone],
    )
    async with await psycopg.AsyncConnection.connect(dsn) as conn:
        await bench.app.enqueue_many([Step("never")], then=Sum(), conn=conn)
        await conn.rollback()
    async with working(bench.app, dsn):
        await ended(db, by_sql, "done")
    assert bench.seen.items[-1] == ["a", "b", "c"]
    assert bench.seen.items.index(["a", "b"]) < bench.seen.items.index("c")
    assert await db.fetchval("SELECT count(*) FROM notifyq.all_tasks") == 5


async def test_command_line(bench: Bench, db: Any, dsn: str) -> None:
    def run(*args: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "notifyq", "enqueue", "--dsn", dsn, *args]
        return subprocess.run(command, capture_output=True, text=True, check=False, timeout=limit())

    first, second = (await bench.app.enqueue(Step())).id, (await bench.app.enqueue(Step())).id
    done = await anyio.to_thread.run_sync(run, "Sum", "--after", str(first), "--after", str(second), "--on-dead", "run")
    assert done.returncode == 0, done.stderr
    id = int(done.stdout)
    row = await db.fetchrow("SELECT after, options FROM notifyq.task WHERE id = $1", id)
    assert row["after"] == [first, second]
    assert json.loads(row["options"]) == {"after": [first, second], "on_dead": "run"}
    done = await anyio.to_thread.run_sync(run, "Sum", "--after", "999999")
    assert done.returncode == 2
    assert "task Sum: after has an id that no task has yet" in done.stderr
    done = await anyio.to_thread.run_sync(run, "Sum", "--on-dead", "run")
    assert done.returncode == 2
    shown = [sys.executable, "-m", "notifyq", "show", "--json", "--dsn", dsn, str(id)]
    output = subprocess.run(shown, capture_output=True, text=True, check=True).stdout
    assert json.loads(output)["options"]["after"] == [first, second]


async def test_large_tasks_that_are_cancelled_together(db: Any) -> None:
    """A statement moves at most 32 MB of their payloads to the history, and cancels those tasks. The others follow."""
    await db.execute("ALTER TABLE notifyq.task ALTER payload SET STORAGE EXTERNAL")  # not compressed: as large as it is
    await db.execute(
        """INSERT INTO notifyq.finished (id, created_at, run_at, processed_at, priority, attempts, state, queue, type,
                                         payload)
           VALUES (1, now(), now(), now(), 0, 1, 'dead', 'default', 'A', '{}')"""
    )
    await db.execute("SELECT setval('notifyq.task_id_seq', 1)")
    await db.execute(
        """INSERT INTO notifyq.task (type, payload, options, parked, withheld)
           SELECT 'B', jsonb_build_object('x', repeat('x', 10000000)), '{"after": [1]}', 'after', true
           FROM generate_series(1, 5)"""
    )
    await db.execute("INSERT INTO notifyq.dependency (needs, task, confirmed) SELECT 1, id, true FROM notifyq.task")
    await db.execute("INSERT INTO notifyq.slot_released (task, ended, queue) VALUES (1, true, 'default')")
    cancelled = "SELECT count(*) FROM notifyq.finished WHERE state = 'cancelled' AND payload ? 'x'"
    seen = []
    while await db.fetchval("SELECT EXISTS (SELECT FROM notifyq.slot_released)"):
        await free(db)
        seen.append(await db.fetchval(cancelled))
    assert seen == [4, 5]
    assert not await db.fetchval(LEFT)
