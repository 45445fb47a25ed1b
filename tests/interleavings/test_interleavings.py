"""Claims, settling, cancel, retry and timers against each other, statement by statement, in an order made to go wrong.

Each test asserts which session waits for which. Whatever the order: a task has one lease, ends once, and is never lost.

In each docstring, "X during Y" means that statement X begins while Y is not committed yet; "it" is X."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import anyio
import asyncpg
import pytest

import notifyq
from notifyq.database import errors
from notifyq.worker import job as claims

from ..helpers.machine import limit
from ..helpers.running import working
from ..helpers.steps import Session, Steps
from ..helpers.verbs import (
    SETTLES,
    cancel,
    claim,
    claim_from_cursor,
    claim_unhandled,
    finish,
    held,
    insert,
    register,
    release_unhandled,
    retry,
    states,
)
from ..helpers.waiting import Seen, eventually

settle = pytest.mark.parametrize("settle", SETTLES)
take = pytest.mark.parametrize("take", [claim, claim_from_cursor])


async def test_a_step_that_should_wait_and_does_not_is_found(w: Session, p: Session) -> None:
    await p("BEGIN")
    with pytest.raises(AssertionError, match=r"w should wait, and didn't: SELECT 1"):
        await w.blocked_by(p, "SELECT 1")


async def test_a_step_that_waits_for_another_session_is_found(
    s: Steps, w: Session, p: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    [job] = await w(held)
    await p("BEGIN")
    await p(cancel, job.id)
    monkeypatch.setattr("tests.helpers.steps.limit", lambda: limit(0.3))
    with pytest.raises(AssertionError, match="w doesn't wait"):
        await w.blocked_by(await s.session("q"), finish, [job])
    q = await s.session("q")
    with pytest.raises(AssertionError, match=rf"q should not wait, and waits for backends \[{w.pid}"):
        await q("SELECT FROM notifyq.task FOR UPDATE")


# --- Claim and cancel


@take
async def test_a_claim_steps_over_what_is_being_cancelled(s: Steps, w: Session, p: Session, take: Any) -> None:
    """Claim during cancel: committed, the task is never claimed."""
    first, second = await insert(s.db, 2)
    await p("BEGIN")
    assert await p(cancel, first)
    assert [job.id for job in await w(take, await w(register))] == [second]
    await p("COMMIT")
    assert await states(s.db) == {first: ("cancelled", 0), second: ("running", 1)}


@take
async def test_a_cancel_that_is_rolled_back_has_lost_nothing(s: Steps, w: Session, p: Session, take: Any) -> None:
    """Claim during cancel: rolled back, the next claim has it."""
    [id] = await insert(s.db)
    me = await w(register)
    await p("BEGIN")
    await p(cancel, id)
    assert await w(take, me) == []
    await p("ROLLBACK")
    assert [job.id for job in await w(take, me)] == [id]


@take
async def test_a_cancel_during_a_claim_takes_the_task_from_its_worker(
    s: Steps, w: Session, p: Session, take: Any
) -> None:
    """Cancel during claim: it waits, and then ends the running task. The worker settles nothing more."""
    [id] = await insert(s.db)
    me = await w(register)
    await w("BEGIN")
    [job] = await w(take, me)
    waiting = await p.blocked_by(w, cancel, id)
    await w("COMMIT")
    assert await waiting
    assert await w(finish, [job]) == []
    assert await states(s.db) == {id: ("cancelled", 1)}
    assert await s.db.fetchval("SELECT worker FROM notifyq.all_tasks") == "host:1"


async def test_a_cancel_during_a_claim_that_fails(s: Steps, w: Session, p: Session) -> None:
    """Cancel during claim: the claimer dies, and the task is cancelled without an attempt."""
    [id] = await insert(s.db)
    me = await w(register)
    await w("BEGIN")
    await w(claim, me)
    waiting = await p.blocked_by(w, cancel, id)
    await s.db.fetch("SELECT pg_terminate_backend($1)", w.pid)
    assert await waiting
    assert await states(s.db) == {id: ("cancelled", 0)}


async def test_claims_of_the_same_queues_in_opposite_order(s: Steps, w: Session) -> None:
    """Claim during claim: neither waits, whatever order their queues have, and no task goes to both."""
    [a], [b] = await insert(s.db, queue="a"), await insert(s.db, queue="b")
    other, me = await s.worker("claims 2"), await w(register)
    await w("BEGIN")
    await other("BEGIN")
    assert [job.id for job in await w(claims.claim, me, {"a": 1, "b": 1}, 1)] == [a]
    assert [job.id for job in await other(claims.claim, me, {"b": 1, "a": 1}, 2)] == [b]
    assert await w(claims.claim, me, {"b": 1, "a": 1}, 2) == []


@take
@pytest.mark.parametrize("end", ["pg_cancel_backend", "pg_terminate_backend"])
async def test_a_claim_that_is_ended_half_way(s: Steps, w: Session, p: Session, end: str, take: Any) -> None:
    """A claim whose statement or session is ended took nothing, and another claim takes the tasks."""
    await insert(s.db, 3)
    me, other = await w(register), await s.worker("other")
    async with half_way(s, p):
        waiting = await w.blocked_by(p, take, me, 3)
        assert await other(take, me, 3) == [], "its rows are locked"
        await s.db.fetch(f"SELECT {end}($1)", w.pid)
        with pytest.raises((asyncpg.QueryCanceledError, *errors.TRANSIENT)):
            await waiting
    assert [job.attempt for job in await other(take, me, 3)] == [1, 1, 1]


@asynccontextmanager
async def half_way(s: Steps, p: Session) -> AsyncIterator[None]:
    """Inside, an UPDATE of tasks waits for `p` at its second row, when the first is written already."""
    await s.db.execute("""
        CREATE FUNCTION public.halt() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN
            IF current_setting('test.written', true) = 'one' THEN
                PERFORM pg_advisory_xact_lock_shared(1, 1);
            END IF;
            PERFORM set_config('test.written', 'one', true);
            RETURN new;
        END $$;
        CREATE TRIGGER halt BEFORE UPDATE ON notifyq.task FOR EACH ROW EXECUTE FUNCTION public.halt()""")
    await p("SELECT pg_advisory_lock(1, 1)")
    try:
        yield
    finally:
        await p("SELECT pg_advisory_unlock(1, 1)")
        await s.db.execute("DROP TRIGGER halt ON notifyq.task; DROP FUNCTION public.halt()")


# --- Types that only some know


async def test_claimed_while_it_is_released_as_unhandled(s: Steps, w: Session) -> None:
    """Claim_unhandled and claim during release_unhandled: neither gets the task before the commit. Then the worker that
    handles its type does."""
    jobs = await w(held)
    knows = await s.worker("knows")
    other = await knows(register, "knows:1")
    await w("BEGIN")
    await w(release_unhandled, jobs)
    assert await knows(claim_unhandled, other) == await knows(claim, other) == []
    await w("COMMIT")
    assert await knows(claim, other) == []
    [job] = await knows(claim_unhandled, other)
    assert (job.id, job.attempt) == (jobs[0].id, jobs[0].attempt)
    assert await w(release_unhandled, jobs) == [], (
        "said again, after a lost connection: the same attempt, another's lease"
    )
    assert await knows(finish, [job]) == [job.id]


async def test_two_claim_unhandled_tasks(s: Steps, w: Session) -> None:
    """Claim_unhandled during itself: they share, and neither waits. What the first loses when it dies can be claimed
    again."""
    all_ids = await insert(s.db, 3, withheld=True)
    other, me = await s.worker("other"), await w(register)
    await w("BEGIN")
    assert [job.id for job in await w(claim_unhandled, me, 2)] == all_ids[:2]
    assert [job.id for job in await other(claim_unhandled, me)] == all_ids[2:]
    await s.db.fetch("SELECT pg_terminate_backend($1, 2000)", w.pid)
    assert [job.id for job in await other(claim_unhandled, me)] == all_ids[:2]


# --- Other isolation levels


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_a_cancel_with_an_old_snapshot(s: Steps, w: Session, p: Session, level: str) -> None:
    """Cancel in a serializable transaction, of a task that was claimed since its snapshot: the person gets an error,
    and the task runs on."""
    [id] = await insert(s.db)
    await p(f"BEGIN ISOLATION LEVEL {level}")
    await p("SELECT FROM notifyq.all_tasks")
    jobs = await w(claim, await w(register))
    with pytest.raises(asyncpg.SerializationError):
        await p(cancel, id)
    await p("ROLLBACK")
    assert await w(finish, jobs) == [id]
    assert await states(s.db) == {id: ("done", 1)}


async def test_a_serializable_enqueuer_who_looks_before(s: Steps, w: Session, p: Session) -> None:
    """Claim and settle during its transaction never make it fail, though it has read what they write."""
    await insert(s.db, 2)
    me = await w(register)
    await p("BEGIN ISOLATION LEVEL SERIALIZABLE")
    await p("SELECT count(*) FROM notifyq.all_tasks WHERE type = 'Known'")
    await w(finish, await w(claim, me, 1))
    await p(insert)
    await w(finish, await w(claim, me, 1))
    await p("COMMIT")
    assert len(await w(claim, me)) == 1


async def test_two_serializable_enqueuers_who_enqueue_unless_there_is_one(s: Steps, p: Session) -> None:
    """Enqueue during enqueue: one of them fails and has enqueued nothing; the other's task is there."""
    q = await s.session("q")
    for session in (p, q):
        await session("BEGIN ISOLATION LEVEL SERIALIZABLE")
        assert await session("SELECT FROM notifyq.task WHERE type = 'Known'") == []
    [id] = await p(insert)
    await q(insert)
    await p("COMMIT")
    with pytest.raises(asyncpg.SerializationError):
        await q("COMMIT")
    assert await states(s.db) == {id: ("ready", 0)}


# --- With a worker


class Known(notifyq.Task):
    pass


async def test_cancelled_and_retried_while_its_handler_runs(s: Steps, p: Session, dsn: str) -> None:
    """Cancel, retry and a second claim by the same worker, before its heartbeat: the first run settles nothing."""
    app, begun, release = notifyq.App(), Seen(), [anyio.Event(), anyio.Event()]

    @app.handler
    async def known(_: Known) -> int:
        run = len(begun.items)
        begun.add(run)
        await release[run].wait()
        return run

    async with working(app, dsn):
        [id] = await insert(s.db)
        await begun.reach(1)
        assert await p(cancel, id)
        assert await p(retry, id)
        await eventually(lambda: s.db.fetchval("SELECT attempts FROM notifyq.task WHERE worker IS NOT NULL"), 1)
        release[0].set()
        await begun.reach(2)
        release[1].set()
        await eventually(lambda: states(s.db), {id: ("done", 1)})
    assert json.loads(await s.db.fetchval("SELECT result FROM notifyq.finished")) == 1
