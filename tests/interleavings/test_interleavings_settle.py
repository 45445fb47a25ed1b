"""Settling against cancel, retry and itself, statement by statement: rows in order of their ids.

A task has one lease, ends once, and is never lost, in any order of the statements.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import asyncpg
import pytest

from notifyq.database.connection import SQL
from notifyq.worker.outcome import Finished

from ..helpers.stages import OUTCOMES, Writing
from ..helpers.steps import PREPARED, Session, Steps, until_blocked
from ..helpers.verbs import (
    SETTLES,
    cancel,
    claim,
    claim_unhandled,
    finish,
    held,
    insert,
    retry,
    states,
)
from .test_interleavings import settle

# --- Settle and cancel


@settle
async def test_settled_while_it_is_being_cancelled(s: Steps, w: Session, p: Session, settle: Any) -> None:
    """Settle during cancel: it waits, learns that its lease was lost, and writes nothing."""
    [job] = await w(held)
    await p("BEGIN")
    assert await p(cancel, job.id)
    waiting = await w.blocked_by(p, settle, [job])
    await p("COMMIT")
    assert await waiting == []
    assert await states(s.db) == {job.id: ("cancelled", 1)}


@settle
async def test_settled_while_a_cancel_fails(s: Steps, w: Session, p: Session, settle: Any) -> None:
    """Settle during cancel: the cancel is rolled back, and the outcome stands."""
    [job] = await w(held)
    await p("BEGIN")
    await p(cancel, job.id)
    waiting = await w.blocked_by(p, settle, [job])
    await p("ROLLBACK")
    assert await waiting == [job.id]
    assert await states(s.db) == {job.id: SETTLES[settle]}


@settle
async def test_cancelled_while_it_is_being_settled(s: Steps, w: Session, p: Session, settle: Any) -> None:
    """Cancel during settle: it is too late if the task ended; else it ends the task that the worker gave back."""
    [job] = await w(held)
    await w("BEGIN")
    assert await w(settle, [job]) == [job.id]
    waiting = await p.blocked_by(w, cancel, job.id)
    await w("COMMIT")
    state, attempts = SETTLES[settle]
    assert await waiting is (state != "done")
    assert await states(s.db) == {job.id: ("done" if state == "done" else "cancelled", attempts)}
    assert await w(claim, job.worker) == await w(claim_unhandled, job.worker) == []


async def test_a_cancel_in_a_savepoint_that_is_rolled_back(s: Steps, w: Session, p: Session) -> None:
    """Settle during cancel: it goes on when the savepoint ends, though the transaction stays open."""
    [job] = await w(held)
    await p("BEGIN")
    await p("SAVEPOINT here")
    await p(cancel, job.id)
    waiting = await w.blocked_by(p, finish, [job])
    await p("ROLLBACK TO SAVEPOINT here")
    assert await waiting == [job.id]
    await p("COMMIT")
    assert await states(s.db) == {job.id: ("done", 1)}


async def test_a_prepared_change(s: Steps, w: Session, p: Session) -> None:
    """Settle while a change of the row is prepared, and belongs to no session: it waits for that too. (PostgreSQL
    doesn't prepare a transaction that has cancelled a running task, since that has sent a notification.)"""
    [job] = await w(held)
    await p("BEGIN")
    await p("UPDATE notifyq.task SET priority = 1")
    await p("PREPARE TRANSACTION 'change'")
    waiting = await w.blocked_by(PREPARED, finish, [job])
    await p("COMMIT PREPARED 'change'")
    assert await waiting == [job.id]
    assert await states(s.db) == {job.id: ("done", 1)}


async def test_a_reader_that_locks_rows_only_delays(s: Steps, w: Session, p: Session) -> None:
    """Settle during a stranger's SELECT FOR SHARE: it waits, and then applies."""
    [job] = await w(held)
    await p("BEGIN")
    await p("SELECT FROM notifyq.task FOR SHARE")
    waiting = await w.blocked_by(p, finish, [job])
    await p("COMMIT")
    assert await waiting == [job.id]


async def test_two_cancels(s: Steps, p: Session) -> None:
    """Cancel during cancel: the second waits, and returns that it did nothing."""
    [id] = await insert(s.db)
    q = await s.session("q")
    await p("BEGIN")
    assert await p(cancel, id)
    waiting = await q.blocked_by(p, cancel, id)
    await p("COMMIT")
    assert not await waiting
    assert await states(s.db) == {id: ("cancelled", 0)}


async def test_two_retries(s: Steps, p: Session) -> None:
    """Retry during retry of a cancelled task: the task comes back once."""
    [id] = await insert(s.db)
    await cancel(s.db, id)
    q = await s.session("q")
    await p("BEGIN")
    assert await p(retry, id)
    waiting = await q.blocked_by(p, retry, id)
    await p("COMMIT")
    assert not await waiting
    assert await states(s.db) == {id: ("ready", 0)}


async def test_a_retry_and_a_cancel_that_do_not_see_each_other(s: Steps, p: Session) -> None:
    """Cancel during retry, and retry during cancel: the second finds nothing to do; the task exists once."""
    [id] = await insert(s.db)
    q = await s.session("q")
    await p("BEGIN")
    assert await p(cancel, id)
    assert not await q(retry, id)
    await p("COMMIT")
    await p("BEGIN")
    assert await p(retry, id)
    assert not await q(cancel, id)
    await p("COMMIT")
    assert await states(s.db) == {id: ("ready", 0)}


# --- Settle and settle


@settle
async def test_a_batch_is_sent_again_while_the_first_is_on_its_way(s: Steps, w: Session, settle: Any) -> None:
    """Settle, and the same batch again after a lost connection whose backend still writes: it is applied once."""
    jobs = await w(held, 2)
    again = await s.worker("settle again")
    await w("BEGIN")
    assert len(await w(settle, jobs)) == 2
    waiting = await again.blocked_by(w, settle, jobs)
    await w("COMMIT")
    assert await waiting == []
    assert set((await states(s.db)).values()) == {SETTLES[settle]}


async def test_a_batch_is_cancelled_half_way(s: Steps, w: Session, p: Session) -> None:
    """Settle, and its statement is cancelled: nothing of the batch is written. Sent again, all of it is."""
    jobs = await w(held, 3)
    await p("BEGIN")
    await p("SELECT FROM notifyq.task WHERE id = $1 FOR UPDATE", jobs[1].id)
    waiting = await w.blocked_by(p, finish, jobs)
    await s.db.fetch("SELECT pg_cancel_backend($1)", w.pid)
    with pytest.raises(asyncpg.QueryCanceledError):
        await waiting
    await p("COMMIT")
    assert set((await states(s.db)).values()) == {("running", 1)}
    assert len(await w(finish, jobs)) == 3


async def test_a_settle_whose_await_is_cancelled(s: Steps, w: Session, p: Session) -> None:
    """Settle, and its await is cancelled: whether the server wrote the batch or not, it is right to send it again."""
    [job] = await w(held)
    await p("BEGIN")
    await p("SELECT FROM notifyq.task FOR UPDATE")
    waiting = await w.blocked_by(p, finish, [job])
    await waiting.cancelled()
    await p("COMMIT")
    await w(finish, [job])
    assert await states(s.db) == {job.id: ("done", 1)}


@pytest.mark.parametrize("kind", OUTCOMES)
async def test_rows_are_locked_in_the_order_of_their_ids(s: Steps, w: Session, p: Session, dsn: str, kind: str) -> None:
    """Settle and settle: both lock rows in the order of ids. In opposite orders they would deadlock."""
    jobs = await w(held, 3)
    await p("BEGIN")
    await p("SELECT FROM notifyq.task WHERE id = $1 FOR UPDATE", jobs[1].id)
    async with Writing(dsn, [OUTCOMES[kind](job) for job in reversed(jobs)]):
        await until_blocked(s.db, "settle", p)
        free = await s.db.fetch("SELECT id FROM notifyq.task FOR UPDATE SKIP LOCKED")
        assert [row[0] for row in free] == [jobs[2].id], "it has the first, waits for the second, and has no third"
        await p("COMMIT")


@pytest.mark.parametrize("kind", OUTCOMES)
async def test_two_outcomes_of_one_attempt(s: Steps, w: Session, dsn: str, kind: str) -> None:
    """The server crashes and forgets a claim, whose outcome still waits to be written. The same worker claims the task
    again, as the same attempt, and ends it. One of the two outcomes is written, and the settler goes on."""
    jobs = await w(held, 2)
    async with Writing(dsn, [OUTCOMES[kind](job) for job in (jobs[0], jobs[0], jobs[1])]) as writing:
        pass
    assert writing.settler.pending == 0
    assert await s.db.fetchval("SELECT count(*) FROM notifyq.task WHERE worker IS NOT NULL") == 0


async def test_outcomes_of_all_kinds_are_one_transaction(s: Steps, w: Session, dsn: str) -> None:
    """Either the whole batch is written or nothing of it, and it costs one commit."""
    jobs = await w(held, len(OUTCOMES))
    async with Writing(dsn, [make(job) for make, job in zip(OUTCOMES.values(), jobs, strict=True)]):
        pass
    xmins = "SELECT xmin FROM notifyq.task UNION SELECT xmin FROM notifyq.finished"
    assert len(await s.db.fetch(xmins)) == 1
    assert sorted((await states(s.db)).values()) == [("done", 1), ("ready", 0), ("ready", 0), ("scheduled", 1)]


async def test_a_batch_of_two_kinds_and_the_admission_of_what_runs(s: Steps, w: Session, p: Session, dsn: str) -> None:
    """Both want the same rows, in opposite orders. Settling gives up before PostgreSQL looks for a deadlock."""
    first, second, third = await w(held, 3)
    await p("BEGIN")
    await p("SELECT FROM notifyq.task WHERE id = $1 FOR UPDATE", second.id)
    admission = await s.worker("claims")
    waiting = await admission.blocked_by(p, SQL["admit_running"], first.worker, ["default"])
    async with Writing(dsn, [OUTCOMES["finish"](third), OUTCOMES["later"](first)]) as writing:
        await until_blocked(s.db, "settle", admission)
        await p("COMMIT")
        await waiting
    assert not writing.told.failures, "no deadlock"
    # Those that it still found locked when it gave up are postponed.
    running = [id for id, (state, _) in (await states(s.db)).items() if state == "running"]
    assert len(running) == 1 + len(writing.settler.leases)


async def test_a_batch_has_outcomes_of_before_and_after_a_new_id(
    s: Steps, w: Session, dsn: str, logged: Callable[[str], list[Any]]
) -> None:
    """A worker was given up and came back: each outcome is written under the id that its task was claimed with."""
    old, new = await w(held, 2), await w(held, 2)
    async with Writing(dsn, [Finished(job, "done") for job in (new[0], old[0], new[1], old[1])]):
        pass
    assert set((await states(s.db)).values()) == {("done", 1)}
    assert not logged("lease was lost")


@pytest.fixture
async def impatient(s: Steps) -> AsyncIterator[None]:
    """A new session looks for a deadlock at once, others after a minute. The session that finds one is its victim."""
    await s.db.execute("ALTER ROLE CURRENT_USER SET deadlock_timeout = '10ms'")
    yield
    await s.db.execute("ALTER ROLE CURRENT_USER RESET deadlock_timeout")


@pytest.mark.usefixtures("impatient")
async def test_a_deadlock_of_which_a_worker_is_the_victim(s: Steps, w: Session, p: Session, dsn: str) -> None:
    """Settle, and cancels in one transaction in the other order: the batch is written again, each task ends once."""
    first, second, third = jobs = await w(held, 3)
    other = await s.session("other")
    await p("SET deadlock_timeout = '1min'")
    await p("BEGIN")
    await p(cancel, third.id)
    await other("BEGIN")
    await other("SELECT FROM notifyq.task WHERE id = $1 FOR UPDATE", second.id)
    async with Writing(dsn, [Finished(job, "done") for job in jobs]) as writing:
        await until_blocked(s.db, "settle", other)
        waiting = await p.blocked_by(await settling(s), cancel, first.id)
        await other("COMMIT")
        assert await waiting
        await p("COMMIT")
    assert [type(error) for error in writing.told.failures] == [asyncpg.DeadlockDetectedError]
    assert await states(s.db) == {first.id: ("cancelled", 1), second.id: ("done", 1), third.id: ("cancelled", 1)}


async def test_a_deadlock_of_which_a_person_is_the_victim(s: Steps, w: Session, p: Session, dsn: str) -> None:
    """The person's transaction fails, and the worker doesn't notice."""
    first, second = jobs = await w(held, 2)
    await p("SET deadlock_timeout = '10ms'")
    await p("BEGIN")
    await p(cancel, second.id)
    async with Writing(dsn, [Finished(job, "done") for job in jobs]) as writing:
        await until_blocked(s.db, "settle", p)
        with pytest.raises(asyncpg.DeadlockDetectedError):
            await p(cancel, first.id)
        await p("ROLLBACK")
    assert not writing.told.failures
    assert await states(s.db) == {first.id: ("done", 1), second.id: ("done", 1)}


async def settling(s: Steps) -> int:
    """The backend of the settler's connection."""
    pid = "SELECT pid FROM pg_stat_activity WHERE application_name = 'notifyq settle' AND datname = current_database()"
    return int(await s.db.fetchval(pid))
