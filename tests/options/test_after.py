"""Tasks that wait for the ends of others: chains, fan-in, what becomes of one whose dependency fails, races, kills."""

from __future__ import annotations

import asyncio
import json
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import asyncpg
import psycopg
import pytest

import notifyq
from notifyq import Context, TaskCancelled, TaskDead
from notifyq.database.connection import SQL
from notifyq.errors import ConfigError
from notifyq.testing import drain, run_inline
from notifyq.worker import heartbeat
from notifyq.worker.admission import Admission

from ..helpers.machine import limit
from ..helpers.processes import Process, started
from ..helpers.rows import ended, errors, insert, state
from ..helpers.running import working
from ..helpers.steps import frozen, steps
from ..helpers.verbs import claim, finish, held, later, register, rescue, silent
from ..helpers.waiting import Seen, eventually

INSERT = """
    INSERT INTO notifyq.task (type, options)
    VALUES ($1, jsonb_build_object('after', $2::bigint[], 'on_dead', $3::text)) RETURNING id"""
LEFT = "SELECT count(*) FROM notifyq.dependency"


class Step(notifyq.Task):
    max_attempts = 1
    name: str = ""
    how: str = ""


class Sum(notifyq.Task):
    max_attempts = 2
    backoff = 0.01
    fail: bool = False


class Threaded(notifyq.Task):
    pass


class Bench:
    def __init__(self) -> None:
        self.app = app = notifyq.App()
        self.seen = seen = Seen()  # names or ids of steps that began
        self.release = release = anyio.Event()  # those that wait

        @app.handler
        async def step(task: Step, ctx: Context) -> Any:
            seen.add(task.name or ctx.id)
            match task.how:
                case "wait":
                    await release.wait()
                case "fail":
                    raise ValueError("no luck")
                case "cancel":
                    raise notifyq.Cancel("not wanted")
            return task.name or None

        @app.handler
        async def sum(task: Sum, ctx: Context) -> Any:
            results = await ctx.results()
            seen.add([str(one) if isinstance(one, Exception) else one for one in results])
            if task.fail and ctx.attempt == 1:
                raise ValueError("once more")
            return len(results)

        @app.handler
        def threaded(task: Threaded, ctx: Context) -> Any:
            assert threading.current_thread() is not threading.main_thread()
            return anyio.from_thread.run(ctx.results)


@pytest.fixture
async def bench(dsn: str) -> AsyncIterator[Bench]:
    bench = Bench()
    async with bench.app.connect(dsn):
        yield bench
        bench.release.set()


async def where(db: Any, *ids: int) -> list[Any]:
    """The states of these, and what they wait for."""
    query = "SELECT id, state, waits_for FROM notifyq.all_tasks WHERE id = ANY ($1::bigint[])"
    found = {row["id"]: row["waits_for"] or row["state"] for row in await db.fetch(query, ids)}
    return [found.get(id) for id in ids]


# --- In order


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
    """All of it is claimed together, the last first, and all but one are parked."""
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
    """What nobody keeps is kept for who waits for it, until it is pruned."""
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
    # Cancelled before it was judged, it may be unknown by then; else it is known as cancelled.
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
    """What waits for an end holds no slot of its limit, and keeps nobody of its order from running."""
    async with working(bench.app, dsn):
        first = await bench.app.enqueue(Step("first", "wait"))
        waits = await bench.app.enqueue(Step("waits"), after=[first], limit_key="k", limit=1, order_key="o")
        await eventually(lambda: where(db, waits.id), ["after"])
        other = await bench.app.enqueue(Step("other"), limit_key="k", limit=1, order_key="o")
        await ended(db, other.id, "done")
        bench.release.set()
        await ended(db, waits.id, "done")
    assert bench.seen.items == ["first", "other", "waits"]


# --- One of them fails


@pytest.mark.parametrize(("how", "fate"), [("fail", "is dead"), ("cancel", "was cancelled")])
@pytest.mark.parametrize("when", ["before", "after"])
async def test_one_that_is_not_done_cancels_all_that_wait(
    bench: Bench, db: Any, dsn: str, how: str, fate: str, when: str
) -> None:
    """Those that wait for it, and those that wait for them; not those that run all the same."""
    app = bench.app
    bad = await app.enqueue(Step("bad", how))
    good = await app.enqueue(Step("good", "wait"))
    if when == "before":
        async with working(app, dsn, shutdown_timeout=0.1):
            await ended(db, bad.id, "dead" if how == "fail" else "cancelled")
    one = await app.enqueue(Step("one"), after=[good, bad])
    two = await app.enqueue(Step("two"), after=[one])
    three = await app.enqueue(Step("three"), after=[two, good])
    anyway = await app.enqueue(Sum(), after=[bad, three], on_dead="run")
    async with working(app, dsn):
        for ref in (one, two, three):
            await ended(db, ref.id, "cancelled")
        await ended(db, anyway.id, "done")
        assert await state(db, good.id) == "running", "nobody waited for that to end"
        bench.release.set()
    [error] = await errors(db, one.id)
    assert error["error"] == f"task {bad.id} (Step), which it was to run after, {fate}"
    assert error["attempt"] == 0
    [error] = await errors(db, three.id)
    assert error["error"] == f"task {two.id} (Step), which it was to run after, was cancelled"
    last = [item for item in bench.seen.items if isinstance(item, list)]
    why = "ValueError: no luck" if how == "fail" else "not wanted"
    assert last == [
        [
            f"task {bad.id} (Step) {fate}: {why}",
            f"task {three.id} (Step) was cancelled: task {two.id} (Step), which it was to run after, was cancelled",
        ]
    ]
    assert not {"one", "two", "three"} & {item for item in bench.seen.items if isinstance(item, str)}
    assert not await db.fetchval(LEFT)


async def test_a_chain_of_a_hundred_is_cancelled(bench: Bench, db: Any, dsn: str) -> None:
    ids: list[int] = []
    for _ in range(100):
        ids.append((await bench.app.enqueue(Step("", "wait"), after=ids[-1:])).id)
    async with working(bench.app, dsn), working(bench.app, dsn):
        await eventually(lambda: where(db, *ids), ["running"] + ["after"] * 99)
        assert await db.fetchval("SELECT notifyq.cancel($1)", ids[0])
        await eventually(lambda: where(db, *ids), ["cancelled"] * 100)
    assert not await db.fetchval(LEFT)


async def test_one_of_a_type_that_is_too_long_fails(bench: Bench, db: Any, dsn: str) -> None:
    """Those that wait for it are told of the type what a type may be."""
    bad = await db.fetchval("INSERT INTO notifyq.task (type) SELECT repeat('x', 1000000) RETURNING id")
    one = await bench.app.enqueue(Step("one"), after=[bad])
    anyway = await bench.app.enqueue(Sum(), after=[bad], on_dead="run")
    async with working(bench.app, dsn):
        await ended(db, one.id, "cancelled")
        await ended(db, anyway.id, "done")
    [error] = await errors(db, one.id)
    assert error["error"] == f"task {bad} ({'x' * 200}), which it was to run after, is dead"
    why = "its type is longer than 200 characters"
    assert bench.seen.items == [[f"task {bad} ({'x' * 200}) is dead: {why}"]]


async def test_what_is_retried_waits_once_more_and_runs_whatever_became_of_the_others(
    bench: Bench, db: Any, dsn: str
) -> None:
    async with working(bench.app, dsn):
        bad, worse = await bench.app.enqueue(Step("bad", "fail")), await bench.app.enqueue(Step("worse", "fail"))
        last = await bench.app.enqueue(Sum(), after=[bad, worse])
        await ended(db, last.id, "cancelled")
        await ended(db, worse.id, "dead")
        await db.execute(
            'UPDATE notifyq.finished SET payload = \'{"name": "cured", "how": "wait"}\' WHERE id = $1', bad.id
        )
        assert await db.fetchval("SELECT notifyq.retry($1)", bad.id)
        await eventually(lambda: state(db, bad.id), "running")
        assert await state(db, last.id) == "cancelled", "that changes nothing by itself"
        assert await db.fetchval("SELECT notifyq.retry($1)", last.id)
        await eventually(lambda: where(db, last.id), ["after"])
        bench.release.set()
        await ended(db, last.id, "done")
    assert bench.seen.items[-1] == ["cured", f"task {worse.id} (Step) is dead: ValueError: no luck"]


async def test_a_retry_of_what_was_waited_for_changes_nothing(bench: Bench, db: Any, dsn: str) -> None:
    async with working(bench.app, dsn):
        bad = await bench.app.enqueue(Step("bad", "fail"))
        last = await bench.app.enqueue(Sum(fail=True), after=[bad], on_dead="run")
        await bench.seen.reach(2)
        assert await db.fetchval("SELECT notifyq.retry($1)", bad.id)
        row = await ended(db, last.id, "done")
        assert row["attempts"] == 2


async def test_cancelled_while_it_waits(bench: Bench, db: Any, dsn: str) -> None:
    async with working(bench.app, dsn):
        first = await bench.app.enqueue(Step("first", "wait"))
        one = await bench.app.enqueue(Step("one"), after=[first])
        two = await bench.app.enqueue(Step("two"), after=[one])
        await eventually(lambda: where(db, one.id, two.id), ["after", "after"])
        assert await db.fetchval("SELECT notifyq.cancel($1)", one.id)
        await ended(db, two.id, "cancelled")
        assert await db.fetchval("SELECT notifyq.retry($1)", one.id)
        await eventually(lambda: where(db, one.id), ["after"])
        bench.release.set()
        await ended(db, one.id, "done")
    assert not await db.fetchval(LEFT)


# --- At the very moment


NEEDS = "SELECT needs, task, confirmed FROM notifyq.dependency ORDER BY needs, task"
SLEEPS = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"


async def admit(conn: Any, jobs: list[Any]) -> dict[int, str | None]:
    rows = await conn.fetch(SQL["admit"], jobs[0].worker, [job.id for job in jobs], [job.attempt for job in jobs])
    return {row[0]: row[1] for row in rows}


async def free(conn: Any) -> int:
    return int(await conn.fetchval(SQL["release_waiters"], 1000))


async def waiting_for(conn: Any, *ids: int, on_dead: str | None = None) -> list[Any]:
    """A new worker's, which has just claimed one that waits for these."""
    return await held(conn, 1, priority=9, options=json.dumps({"after": ids, "on_dead": on_dead}))


async def test_it_ends_before_the_mark_can_be_seen(dsn: str) -> None:
    """The end waits for the mark, and tells."""
    async with steps(dsn) as s:
        judge, settler = await s.worker("claims"), await s.worker("settle")
        needed = await held(s.db)
        waits = await waiting_for(s.db, needed[0].id)
        await judge("BEGIN")
        assert await judge(admit, waits) == {waits[0].id: "after"}
        ends = await settler.blocked_by(judge, finish, needed)
        await judge("COMMIT")
        assert await ends == [needed[0].id]
        assert await free(s.db) == 1
        assert await where(s.db, waits[0].id) == ["ready"]
        assert not await s.db.fetchval(LEFT)


@pytest.mark.parametrize("commits", [True, False])
async def test_it_is_just_ending_when_it_is_judged(dsn: str, commits: bool) -> None:
    """Its end can't be marked any more, nor is it there yet. That isn't waited for; the next free judges once more."""
    async with steps(dsn) as s:
        judge, settler = await s.worker("claims"), await s.worker("settle")
        needed = await held(s.db)
        waits = await waiting_for(s.db, needed[0].id)
        edge = needed[0].id, waits[0].id
        await settler("BEGIN")
        await settler(finish, needed)
        assert await judge(admit, waits) == {waits[0].id: "after"}
        assert [tuple(row) for row in await s.db.fetch(NEEDS)] == [(*edge, False)]
        assert await free(s.db) == 0
        await settler("COMMIT" if commits else "ROLLBACK")
        assert await free(s.db) == commits
        if not commits:
            assert [tuple(row) for row in await s.db.fetch(NEEDS)] == [(*edge, True)]
            await settler(finish, needed)
            assert await free(s.db) == 1
        assert await where(s.db, waits[0].id) == ["ready"]
        assert not await s.db.fetchval(LEFT)


async def test_it_has_ended_a_moment_later(dsn: str) -> None:
    """Whoever judges looks again, and sees the end. He is stopped in between; who was late to stop him tries again."""
    async with steps(dsn) as s:
        judge, settler = await s.worker("claims"), await s.worker("settle")
        verdict = None
        for _ in range(20):
            needed = await held(s.db)
            waits = await waiting_for(s.db, needed[0].id)
            await settler("BEGIN")
            await settler(finish, needed)
            judged = asyncio.create_task(admit(judge.conn, waits))
            with anyio.fail_after(limit()):
                while not judged.done() and not await s.db.fetchval(SLEEPS):
                    pass
            with frozen(judge):
                await settler("COMMIT")
            verdict = (await judged)[waits[0].id]
            if verdict is None:
                break
        assert verdict is None


async def test_it_is_waited_for_itself_when_it_is_judged(dsn: str) -> None:
    """Another has it locked, to mark it, and lets it go before the verdict. It wasn't asked what it waits for, so it
    doesn't run: it is handed back."""
    async with steps(dsn) as s:
        judge, other, settler = await s.worker("claims 1"), await s.worker("claims 2"), await s.worker("settle")
        stopped = False
        for _ in range(20):
            needed, ending = await held(s.db), await held(s.db)
            worker = await register(s.db)
            for id in (needed[0].id, ending[0].id):
                await s.db.fetchval(INSERT, "Known", [id], None)
            waits, also = await claim(s.db, worker, 2)
            third = await waiting_for(s.db, waits.id)
            await settler("BEGIN")
            await settler(finish, ending)
            await other("BEGIN")
            assert await other(admit, third) == {third[0].id: "after"}
            judged = asyncio.create_task(admit(judge.conn, [waits, also]))
            with anyio.fail_after(limit()):
                while not judged.done() and not await s.db.fetchval(SLEEPS):
                    pass
            with frozen(judge):
                stopped = not judged.done() and bool(await s.db.fetchval(SLEEPS))
                await other("COMMIT")
            assert waits.id not in await judged
            await settler("COMMIT")
            if stopped:
                break
        assert stopped


async def test_the_last_two_end_at_once(dsn: str) -> None:
    """And are let out by two, neither of whom sees what the other does. The second waits for the first."""
    async with steps(dsn) as s:
        one, two = await s.worker("claims 1"), await s.worker("claims 2")
        needed = await held(s.db, 2)
        waits = await waiting_for(s.db, *(job.id for job in needed))
        await admit(s.db, waits)
        await finish(s.db, needed[:1])
        await one("BEGIN")
        assert await one(free) == 0
        await finish(s.db, needed[1:])
        second = await two.blocked_by(one, free)
        await one("COMMIT")
        assert await second == 1
        assert await where(s.db, waits[0].id) == ["ready"]


async def test_two_that_are_judged_at_once_for_the_same(dsn: str) -> None:
    async with steps(dsn) as s:
        one, two = await s.worker("claims 1"), await s.worker("claims 2")
        needed = await held(s.db)
        first, second = await waiting_for(s.db, needed[0].id), await waiting_for(s.db, needed[0].id)
        await one("BEGIN")
        await one(admit, first)
        assert await two(admit, second) == {second[0].id: "after"}
        await one("COMMIT")
        assert [row["confirmed"] for row in await s.db.fetch(NEEDS)] == [True, False], "somebody had it locked"
        third = await waiting_for(s.db, needed[0].id)
        await one("BEGIN")
        await one(admit, third)
        fourth = await waiting_for(s.db, needed[0].id)
        assert await two(admit, fourth) == {fourth[0].id: "after"}
        await one("COMMIT")
        assert [row["confirmed"] for row in await s.db.fetch(NEEDS)] == [True, False, True, True], (
            "marked, it is shared"
        )
        await finish(s.db, needed)
        assert await free(s.db) == 4
        assert await where(s.db, *(jobs[0].id for jobs in (first, second, third, fourth))) == ["ready"] * 4


async def test_somebody_has_it_locked_for_an_hour(dsn: str) -> None:
    """The one that is waited for, and the one that waits: whoever judges, or frees, waits for nobody."""
    async with steps(dsn) as s:
        stranger = await s.session("stranger")
        needed = await held(s.db, 2)
        first = await waiting_for(s.db, needed[0].id)
        await admit(s.db, first)
        second = await waiting_for(s.db, needed[0].id)
        await admit(s.db, second)
        await stranger("BEGIN")
        await stranger("SELECT notifyq.cancel($1)", first[0].id)
        await finish(s.db, needed[:1])
        assert await free(s.db) == 1
        assert await where(s.db, first[0].id, second[0].id) == ["after", "ready"]
        assert await free(s.db) == 0
        await stranger("ROLLBACK")
        assert await free(s.db) == 1
        assert await where(s.db, first[0].id) == ["ready"]
        assert not await s.db.fetchval(LEFT)
        # One that is being cancelled by somebody while it is judged is nobody's to judge.
        third = await waiting_for(s.db, needed[1].id)
        await stranger("BEGIN")
        await stranger("SELECT notifyq.cancel($1)", third[0].id)
        assert await admit(s.db, third) == {}
        await stranger("COMMIT")
        assert not await s.db.fetchval(LEFT)


async def test_it_is_retried_before_anybody_saw_that_it_was_dead(dsn: str) -> None:
    async with steps(dsn) as s:
        needed = await held(s.db)
        waits = await waiting_for(s.db, needed[0].id)
        await admit(s.db, waits)
        await finish(s.db, needed, "dead")
        assert await s.db.fetchval("SELECT notifyq.retry($1)", needed[0].id)
        assert await free(s.db) == 0
        assert await where(s.db, waits[0].id) == ["after"], "it lives, so that is waited for"
        [again] = await claim(s.db, needed[0].worker, 1)
        await finish(s.db, [again])
        assert await free(s.db) == 1
        assert await where(s.db, waits[0].id) == ["ready"]


async def test_what_is_not_an_end(dsn: str) -> None:
    """A retry, and a rescue, of the one that is waited for: it lives. A rescue that has it dead is an end."""
    async with steps(dsn) as s:
        needed = await held(s.db)
        waits = await waiting_for(s.db, needed[0].id)
        await admit(s.db, waits)
        await later(s.db, needed, 0.0)
        assert await free(s.db) == 0
        [again] = await claim(s.db, needed[0].worker, 1)
        for dead in (False, True):
            await s.db.execute("UPDATE notifyq.task SET max_attempts = $2 WHERE id = $1", again.id, 2 if dead else 10)
            worker = await register(s.db)
            await s.db.execute("UPDATE notifyq.task SET worker = $2, attempts = 2 WHERE id = $1", again.id, worker)
            await silent(s.db, worker)
            assert (await rescue(s.db, worker))[1:] == ((0, 1) if dead else (1, 0))
            assert await free(s.db) == 0
            assert await where(s.db, waits[0].id) == ["cancelled" if dead else "after"]
        assert not await s.db.fetchval(LEFT)


async def test_whom_nobody_tells_a_heartbeat_finds(bench: Bench, db: Any, dsn: str, connect: Any) -> None:
    """What is waited for was locked by a stranger, longer than anybody looked again, and then it was gone."""
    stranger = await connect()
    async with working(bench.app, dsn):
        first = await bench.app.enqueue(Step("first", "wait"))
        await bench.seen.reach(1)
        async with stranger.transaction():
            await stranger.execute("SELECT FROM notifyq.task WHERE id = $1 FOR UPDATE", first.id)
            last = await bench.app.enqueue(Step("last"), after=[first])
            await eventually(lambda: where(db, last.id), ["after"])
            await anyio.sleep(0.1)  # of five times UNSURE_SECONDS nothing tells
            await stranger.execute("SELECT notifyq.cancel($1)", first.id)
        await ended(db, last.id, "cancelled")


async def test_it_ends_a_moment_after_somebody_began_to_wait(
    bench: Bench, db: Any, dsn: str, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its row was locked when the other was judged, so its end tells nobody: the worker looks again by itself, and does
    not wait for the heartbeat."""
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 3600.0)
    someone, judged = await connect(), Admission.admit

    async def admit(self: Admission, *args: Any) -> Any:
        answer = await judged(self, *args)
        if self.recheck and someone.is_in_transaction():
            await someone.execute("COMMIT")
        return answer

    monkeypatch.setattr(Admission, "admit", admit)
    needed = await bench.app.enqueue(Step("needed"), delay=3600)
    await someone.execute("BEGIN")
    assert await someone.fetchval("SELECT notifyq.cancel($1)", needed.id)
    async with working(bench.app, dsn):
        waits = await bench.app.enqueue(Step("waits"), after=[needed], on_dead="run")
        await ended(db, waits.id, "done")
    assert bench.seen.items == ["waits"]


async def test_settled_in_its_handlers_transaction(bench: Bench, db: Any, dsn: str) -> None:
    class Book(notifyq.Task):
        pass

    @bench.app.handler
    async def book(task: Book, ctx: Context) -> None:
        async with ctx.transaction() as conn:
            await conn.execute("SELECT 1")
            await bench.release.wait()

    async with working(bench.app, dsn):
        first = await bench.app.enqueue(Book())
        last = await bench.app.enqueue(Sum(), after=[first])
        await eventually(lambda: where(db, last.id), ["after"])
        bench.release.set()
        await ended(db, last.id, "done")


# --- Workers die


@pytest.mark.slow
async def test_killed(spawn: Callable[..., Process], db: Any, bench: Bench) -> None:
    """With what it ran, others' dependencies among them; a chain goes on, and a fan-in has all its results."""
    workers = [await started(spawn, 'queues=["default"]') for _ in range(2)]
    before = await insert(db, "Sleep", 20)
    waits = await db.fetchval(INSERT, "Quick", before, None)
    await eventually(lambda: where(db, waits), ["after"])
    names = "SELECT DISTINCT worker FROM notifyq.all_tasks WHERE state = 'running'"
    await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.task WHERE worker IS NOT NULL"), 20)
    [pid] = [int(row[0].rpartition(":")[2]) for row in await db.fetch(names)]
    victim, heir = sorted(workers, key=lambda story: story.process.pid != pid)
    victim.process.signal(signal.SIGKILL)
    await heir.reach(20, "ran", attempt=2)
    assert await where(db, waits) == ["after"]
    for id in before:
        assert await db.fetchval("SELECT notifyq.cancel($1)", id)
    await eventually(lambda: where(db, waits), ["cancelled"])
    assert not await db.fetchval(LEFT)


@pytest.mark.slow
async def test_killed_at_random(spawn: Callable[..., Process], db: Any) -> None:
    """Three workers, one of which is killed again and again, over chains and fans: every task ends, none before what it
    waits for."""
    ids: list[int] = []
    for n in range(1500):
        # The one before it, and the one that is ten before, if there is one.
        after = (ids[-1:] if n % 4 else []) + (ids[-10:-9] if n % 3 else [])
        ids.append(await db.fetchval(INSERT, "Quick", after or None, "run" if after else None))
    last = await db.fetchval(INSERT, "Quick", ids, "run")
    workers = [await started(spawn, "concurrency=5") for _ in range(3)]
    for _ in range(5):
        await anyio.sleep(0.05)
        workers[0].process.signal(signal.SIGKILL)
        workers.append(await started(spawn, "concurrency=5"))
        workers.pop(0)
    await eventually(lambda: state(db, last), "done", 40)
    assert set(await where(db, *ids)) == {"done"}
    assert not await db.fetch(
        """SELECT t.id, f.id FROM notifyq.finished t CROSS JOIN jsonb_array_elements_text(t.options -> 'after') a (id)
           JOIN notifyq.finished f ON f.id = a.id::bigint
           WHERE t.xmin::text::bigint <= f.xmin::text::bigint"""
    ), "by the transactions that wrote their ends, whatever the clock has done meanwhile"
    await eventually(lambda: db.fetchval(LEFT), 0)


# --- Written wrongly


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


# --- Other ways in


async def test_other_clients(bench: Bench, db: Any, dsn: str) -> None:
    """In their own transactions, and in plain SQL."""
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
    """Their payloads are moved to the history: 32 MB of them, and what that cuts, in a statement. The others follow."""
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
