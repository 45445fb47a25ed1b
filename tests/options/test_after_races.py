"""The end of a task against the admission of a task that waits for it, statement by statement.

The task that is waited for is the predecessor. Admission marks its row (`watched`), so that its end notifies a
worker."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

import notifyq
from notifyq import Context
from notifyq.database.connection import SQL
from notifyq.worker import heartbeat
from notifyq.worker.admission import Admission
from notifyq.worker.intake import RECHECK_SECONDS

from ..helpers.machine import limit
from ..helpers.predecessors import INSERT, LEFT, Bench, Step, Sum, where
from ..helpers.rows import ended
from ..helpers.running import working
from ..helpers.steps import frozen, steps
from ..helpers.verbs import claim, finish, held, later, register, rescue, silent
from ..helpers.waiting import eventually


@pytest.fixture
async def bench(dsn: str) -> AsyncIterator[Bench]:
    bench = Bench()
    async with bench.app.connect(dsn):
        yield bench
        bench.release.set()


NEEDS = "SELECT needs, task, confirmed FROM notifyq.dependency ORDER BY needs, task"
SLEEPS = "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'PgSleep' AND datname = current_database()"


async def admit(conn: Any, jobs: list[Any]) -> dict[int, str | None]:
    rows = await conn.fetch(SQL["admit"], jobs[0].worker, [job.id for job in jobs], [job.attempt for job in jobs])
    return {row[0]: row[1] for row in rows}


async def free(conn: Any) -> int:
    return int(await conn.fetchval(SQL["release_waiters"], 1000))


async def waiting_for(conn: Any, *ids: int, on_dead: str | None = None) -> list[Any]:
    """A new worker, which has just claimed a task that waits for these. Returns its jobs."""
    return await held(conn, 1, priority=9, options=json.dumps({"after": ids, "on_dead": on_dead}))


async def test_a_predecessor_ends_before_its_mark_is_committed(dsn: str) -> None:
    """The statement that ends the predecessor waits for the mark, and then releases the waiting task."""
    async with steps(dsn) as s:
        admitter, settler = await s.worker("claims"), await s.worker("settle")
        needed = await held(s.db)
        waits = await waiting_for(s.db, needed[0].id)
        await admitter("BEGIN")
        assert await admitter(admit, waits) == {waits[0].id: "after"}
        ends = await settler.blocked_by(admitter, finish, needed)
        await admitter("COMMIT")
        assert await ends == [needed[0].id]
        assert await free(s.db) == 1
        assert await where(s.db, waits[0].id) == ["ready"]
        assert not await s.db.fetchval(LEFT)


@pytest.mark.parametrize("commits", [True, False])
async def test_a_predecessor_is_ending_during_the_admission(dsn: str, commits: bool) -> None:
    """The predecessor can't be marked any more, and its end isn't committed. Admission doesn't wait for it; the next
    release_waiters looks again."""
    async with steps(dsn) as s:
        admitter, settler = await s.worker("claims"), await s.worker("settle")
        needed = await held(s.db)
        waits = await waiting_for(s.db, needed[0].id)
        edge = needed[0].id, waits[0].id
        await settler("BEGIN")
        await settler(finish, needed)
        assert await admitter(admit, waits) == {waits[0].id: "after"}
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


async def test_a_predecessor_has_ended_at_the_second_look(dsn: str) -> None:
    """Admission looks a second time, and sees the end. The test stops the backend between the two looks. If it stops it
    too late, it tries again."""
    async with steps(dsn) as s:
        admitter, settler = await s.worker("claims"), await s.worker("settle")
        verdict = None
        for _ in range(20):
            needed = await held(s.db)
            waits = await waiting_for(s.db, needed[0].id)
            await settler("BEGIN")
            await settler(finish, needed)
            verdicts = asyncio.create_task(admit(admitter.conn, waits))
            with anyio.fail_after(limit()):
                while not verdicts.done() and not await s.db.fetchval(SLEEPS):
                    pass
            with frozen(admitter):
                await settler("COMMIT")
            verdict = (await verdicts)[waits[0].id]
            if verdict is None:
                break
        assert verdict is None


async def test_a_task_is_locked_as_a_predecessor_during_its_admission(dsn: str) -> None:
    """Another session has locked the task, to mark it as a predecessor, and unlocks it before the verdict. Admission
    hasn't read what the task waits for. So the task doesn't run: it is handed back."""
    async with steps(dsn) as s:
        admitter, other, settler = await s.worker("claims 1"), await s.worker("claims 2"), await s.worker("settle")
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
            verdicts = asyncio.create_task(admit(admitter.conn, [waits, also]))
            with anyio.fail_after(limit()):
                while not verdicts.done() and not await s.db.fetchval(SLEEPS):
                    pass
            with frozen(admitter):
                stopped = not verdicts.done() and bool(await s.db.fetchval(SLEEPS))
                await other("COMMIT")
            assert waits.id not in await verdicts
            await settler("COMMIT")
            if stopped:
                break
        assert stopped


async def test_the_last_two_predecessors_end_at_once(dsn: str) -> None:
    """Two workers release the task, and neither sees what the other does. The second waits for the first."""
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


async def test_two_admissions_with_the_same_predecessor_at_once(dsn: str) -> None:
    async with steps(dsn) as s:
        one, two = await s.worker("claims 1"), await s.worker("claims 2")
        needed = await held(s.db)
        first, second = await waiting_for(s.db, needed[0].id), await waiting_for(s.db, needed[0].id)
        await one("BEGIN")
        await one(admit, first)
        assert await two(admit, second) == {second[0].id: "after"}
        await one("COMMIT")
        assert [row["confirmed"] for row in await s.db.fetch(NEEDS)] == [True, False], "another session had locked it"
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


async def test_a_stranger_locks_a_waiting_task(dsn: str) -> None:
    """Neither admission nor release_waiters waits for a row that a stranger has locked."""
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
        # A task that a person is cancelling is not admitted.
        third = await waiting_for(s.db, needed[1].id)
        await stranger("BEGIN")
        await stranger("SELECT notifyq.cancel($1)", third[0].id)
        assert await admit(s.db, third) == {}
        await stranger("COMMIT")
        assert not await s.db.fetchval(LEFT)


async def test_a_dead_predecessor_is_retried_before_its_end_is_seen(dsn: str) -> None:
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


async def test_a_retry_or_a_rescue_of_a_predecessor_is_no_end(dsn: str) -> None:
    """After a retry or a rescue the predecessor lives, so the task waits on. A rescue that ends it as dead is an
    end."""
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


async def test_a_heartbeat_finds_a_task_whose_release_was_missed(bench: Bench, db: Any, dsn: str, connect: Any) -> None:
    """A stranger has locked the predecessor for longer than a worker looks again, and then it was gone."""
    stranger = await connect()
    async with working(bench.app, dsn):
        first = await bench.app.enqueue(Step("first", "wait"))
        await bench.seen.reach(1)
        async with stranger.transaction():
            await stranger.execute("SELECT FROM notifyq.task WHERE id = $1 FOR UPDATE", first.id)
            last = await bench.app.enqueue(Step("last"), after=[first])
            await eventually(lambda: where(db, last.id), ["after"])
            await anyio.sleep(5 * RECHECK_SECONDS)  # no signal tells that a worker has looked again
            await stranger.execute("SELECT notifyq.cancel($1)", first.id)
        await ended(db, last.id, "cancelled")


async def test_a_locked_predecessor_ends_just_after_the_admission(
    bench: Bench, db: Any, dsn: str, connect: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The predecessor's row was locked during the admission, so its end notifies no worker. The worker looks again by
    itself, and doesn't wait for the heartbeat."""
    monkeypatch.setattr(heartbeat, "BEAT_SECONDS", 3600.0)
    canceller, admit_tasks = await connect(), Admission.admit

    async def admit(self: Admission, *args: Any) -> Any:
        answer = await admit_tasks(self, *args)
        if self.recheck and canceller.is_in_transaction():
            await canceller.execute("COMMIT")
        return answer

    monkeypatch.setattr(Admission, "admit", admit)
    needed = await bench.app.enqueue(Step("needed"), delay=3600)
    await canceller.execute("BEGIN")
    assert await canceller.fetchval("SELECT notifyq.cancel($1)", needed.id)
    async with working(bench.app, dsn):
        waits = await bench.app.enqueue(Step("waits"), after=[needed], on_dead="run")
        await ended(db, waits.id, "done")
    assert bench.seen.items == ["waits"]


async def test_a_predecessor_is_settled_in_its_handlers_transaction(bench: Bench, db: Any, dsn: str) -> None:
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
