"""Claims, settling, cancel, retry and timers against each other, statement by statement, in an order made to go wrong.

Who waits for whom is asserted too. Whatever the order: a task has one lease, ends once, and is never lost.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import anyio
import asyncpg
import pytest

import notifyq
from notifyq.database import connection
from notifyq.database.connection import SQL
from notifyq.worker import job as claims
from notifyq.worker.outcome import Finished, HandedBack, RetryLater, Unhandled
from notifyq.worker.settle import Settler

from ..helpers import verbs
from ..helpers.machine import limit
from ..helpers.running import working
from ..helpers.stages import Told
from ..helpers.steps import PREPARED, Session, Steps, steps, until_blocked
from ..helpers.verbs import (
    OVERDUE,
    SETTLES,
    adopt,
    cancel,
    claim,
    claim_onward,
    finish,
    held,
    insert,
    promote,
    register,
    release_unhandled,
    retry,
    states,
)
from ..helpers.waiting import Seen, eventually

settle = pytest.mark.parametrize("settle", SETTLES)
take = pytest.mark.parametrize("take", [claim, claim_onward])


@pytest.fixture
async def s(dsn: str) -> AsyncIterator[Steps]:
    async with steps(dsn) as s:
        yield s


@pytest.fixture
async def w(s: Steps) -> Session:
    """A worker."""
    return await s.worker("w")


@pytest.fixture
async def p(s: Steps) -> Session:
    """A person at psql."""
    return await s.session("p")


async def test_a_step_that_should_wait_and_does_not_is_found(w: Session, p: Session) -> None:
    await p("BEGIN")
    with pytest.raises(AssertionError, match=r"w should wait, and didn't: SELECT 1"):
        await w.blocked_by(p, "SELECT 1")


async def test_a_step_that_waits_for_somebody_else_is_found(
    s: Steps, w: Session, p: Session, monkeypatch: pytest.MonkeyPatch
) -> None:
    [job] = await w(held)
    await p("BEGIN")
    await p(cancel, job.id)
    monkeypatch.setattr("tests.helpers.steps.limit", lambda: limit(0.3))
    with pytest.raises(AssertionError, match="w waits for nobody"):
        await w.blocked_by(await s.session("q"), finish, [job])
    q = await s.session("q")
    with pytest.raises(AssertionError, match=rf"q should wait for nobody, and waits for backends \[{w.pid}"):
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
    """Cancel during claim: it waits, and then ends the task that runs; its worker settles nothing more."""
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
    """Claim and claim: neither waits, whatever order they have their queues in; no task goes to both."""
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
    """Claim and the end of its statement or its session: it took all or nothing, so nothing, and another has it."""
    await insert(s.db, 3)
    me, other = await w(register), await s.worker("other")
    async with half_way(s, p):
        waiting = await w.blocked_by(p, take, me, 3)
        assert await other(take, me, 3) == [], "its rows are locked"
        await s.db.fetch(f"SELECT {end}($1)", w.pid)
        with pytest.raises((asyncpg.QueryCanceledError, *connection.TRANSIENT)):
            await waiting
    assert [job.attempt for job in await other(take, me, 3)] == [1, 1, 1]


@asynccontextmanager
async def half_way(s: Steps, p: Session) -> AsyncIterator[None]:
    """Inside, whoever updates tasks waits for `p` at its second row, with the first already written."""
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
    """Settle during cancel: rolled back, what the worker says stands."""
    [job] = await w(held)
    await p("BEGIN")
    await p(cancel, job.id)
    waiting = await w.blocked_by(p, settle, [job])
    await p("ROLLBACK")
    assert await waiting == [job.id]
    assert await states(s.db) == {job.id: SETTLES[settle]}


@settle
async def test_cancelled_while_it_is_being_settled(s: Steps, w: Session, p: Session, settle: Any) -> None:
    """Cancel during settle: too late if that ended the task; else it ends what the worker had given back."""
    [job] = await w(held)
    await w("BEGIN")
    assert await w(settle, [job]) == [job.id]
    waiting = await p.blocked_by(w, cancel, job.id)
    await w("COMMIT")
    state, attempts = SETTLES[settle]
    assert await waiting is (state != "done")
    assert await states(s.db) == {job.id: ("done" if state == "done" else "cancelled", attempts)}
    assert await w(claim, job.worker) == await w(adopt, job.worker) == []


async def test_a_cancel_in_a_savepoint_that_is_rolled_back(s: Steps, w: Session, p: Session) -> None:
    """Settle during cancel: the savepoint's end lets it go on, though the transaction stays open."""
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
    """Settle while somebody's change of the row is prepared and belongs to no session: it waits for that all the same.
    (A transaction that has cancelled what runs has notified, so PostgreSQL doesn't prepare it.)"""
    [job] = await w(held)
    await p("BEGIN")
    await p("UPDATE notifyq.task SET priority = 1")
    await p("PREPARE TRANSACTION 'change'")
    waiting = await w.blocked_by(PREPARED, finish, [job])
    await p("COMMIT PREPARED 'change'")
    assert await waiting == [job.id]
    assert await states(s.db) == {job.id: ("done", 1)}


async def test_a_reader_that_locks_rows_only_delays(s: Steps, w: Session, p: Session) -> None:
    """Settle during somebody's SELECT FOR SHARE: it waits, and then applies."""
    [job] = await w(held)
    await p("BEGIN")
    await p("SELECT FROM notifyq.task FOR SHARE")
    waiting = await w.blocked_by(p, finish, [job])
    await p("COMMIT")
    assert await waiting == [job.id]


async def test_two_cancels(s: Steps, p: Session) -> None:
    """Cancel and cancel: the second waits, and says that it did nothing."""
    [id] = await insert(s.db)
    q = await s.session("q")
    await p("BEGIN")
    assert await p(cancel, id)
    waiting = await q.blocked_by(p, cancel, id)
    await p("COMMIT")
    assert not await waiting
    assert await states(s.db) == {id: ("cancelled", 0)}


async def test_two_retries(s: Steps, p: Session) -> None:
    """Retry and retry of a cancelled task: it comes back once."""
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
    """Cancel during retry, retry during cancel: the second finds nothing to do; the task is there, once."""
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
    """Settle and the same after a lost connection, whose backend still writes: applied once."""
    jobs = await w(held, 2)
    again = await s.worker("settle again")
    await w("BEGIN")
    assert len(await w(settle, jobs)) == 2
    waiting = await again.blocked_by(w, settle, jobs)
    await w("COMMIT")
    assert await waiting == []
    assert set((await states(s.db)).values()) == {SETTLES[settle]}


async def test_a_batch_is_cancelled_half_way(s: Steps, w: Session, p: Session) -> None:
    """Settle and the end of its statement: none of the batch is settled, and again, all of it."""
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
    """Settle and a cancelled await: whatever the server made of it, to say it again is right."""
    [job] = await w(held)
    await p("BEGIN")
    await p("SELECT FROM notifyq.task FOR UPDATE")
    waiting = await w.blocked_by(p, finish, [job])
    await waiting.cancelled()
    await p("COMMIT")
    await w(finish, [job])
    assert await states(s.db) == {job.id: ("done", 1)}


OUTCOMES: dict[str, Any] = {
    "finish": lambda job: Finished(job, "done"),
    "later": lambda job: RetryLater(job, 3600.0, verbs.ERROR),
    "hand back": HandedBack,
    "aside": Unhandled,
}


class Writing:
    """A settler that has been given these outcomes, and writes."""

    def __init__(self, dsn: str, outcomes: list[Any]) -> None:
        self.told = Told()
        self.settler = Settler(dsn, True, self.told, self.told)
        for outcome in outcomes:
            self.settler.put(outcome)
        self.settler.finish()

    async def __aenter__(self) -> Writing:
        self.task = asyncio.create_task(self.settler.run())
        return self

    async def __aexit__(self, *_: object) -> None:
        with anyio.fail_after(limit()):
            await self.task


@pytest.mark.parametrize("kind", OUTCOMES)
async def test_rows_are_locked_in_the_order_of_their_ids(s: Steps, w: Session, p: Session, dsn: str, kind: str) -> None:
    """Settle and settle: two that would lock the same rows in opposite orders would wait for each other for ever."""
    jobs = await w(held, 3)
    await p("BEGIN")
    await p("SELECT FROM notifyq.task WHERE id = $1 FOR UPDATE", jobs[1].id)
    async with Writing(dsn, [OUTCOMES[kind](job) for job in reversed(jobs)]):
        await until_blocked(s.db, "settle", p)
        free = await s.db.fetch("SELECT id FROM notifyq.task FOR UPDATE SKIP LOCKED")
        assert [row[0] for row in free] == [jobs[2].id], "it has the first, waits for the second, and has no third"
        await p("COMMIT")


async def test_outcomes_of_all_kinds_are_one_transaction(s: Steps, w: Session, dsn: str) -> None:
    """Of a batch all is written or nothing, and it costs one commit."""
    jobs = await w(held, len(OUTCOMES))
    async with Writing(dsn, [make(job) for make, job in zip(OUTCOMES.values(), jobs, strict=True)]):
        pass
    xmins = "SELECT xmin FROM notifyq.task UNION SELECT xmin FROM notifyq.finished"
    assert len(await s.db.fetch(xmins)) == 1
    assert sorted((await states(s.db)).values()) == [("done", 1), ("ready", 0), ("ready", 0), ("scheduled", 1)]


async def test_a_batch_of_two_kinds_and_the_admission_of_what_runs(s: Steps, w: Session, p: Session, dsn: str) -> None:
    """They want the same rows in opposite orders. Settling gives up before PostgreSQL looks for a deadlock."""
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
    assert len(running) == 1 + writing.settler.postponed


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
    """Who waits in a new session looks for a deadlock at once, others after a minute; who does is its victim."""
    await s.db.execute("ALTER ROLE CURRENT_USER SET deadlock_timeout = '10ms'")
    yield
    await s.db.execute("ALTER ROLE CURRENT_USER RESET deadlock_timeout")


@pytest.mark.usefixtures("impatient")
async def test_a_deadlock_of_which_a_worker_is_the_victim(s: Steps, w: Session, p: Session, dsn: str) -> None:
    """Settle and cancels in one transaction, in the other order: written again, and each task ends once."""
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
    """The same, and the worker doesn't notice."""
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


# --- Timers


async def test_cancelled_at_the_moment_of_its_promotion(s: Steps, w: Session, p: Session) -> None:
    """Cancel during promotion: it waits, and ends a task that has just become ready."""
    [id] = await insert(s.db, **OVERDUE)
    await w("BEGIN")
    assert await w(promote) == 1
    waiting = await p.blocked_by(w, cancel, id)
    await w("COMMIT")
    assert await waiting
    assert await states(s.db) == {id: ("cancelled", 0)}


async def test_promoted_at_the_moment_of_its_cancel(s: Steps, w: Session, p: Session) -> None:
    """Promotion during cancel: stepped over, without waiting; rolled back, it is promoted the next time."""
    [id] = await insert(s.db, **OVERDUE)
    await p("BEGIN")
    await p(cancel, id)
    assert await w(promote) == 0
    await p("ROLLBACK")
    assert await w(promote) == 1
    assert await states(s.db) == {id: ("ready", 0)}


async def test_retried_at_the_moment_of_its_promotion(s: Steps, w: Session, p: Session) -> None:
    """Retry during promotion: it waits, and finds that nothing is left to do; the task is ready once."""
    [id] = await insert(s.db, **OVERDUE)
    await w("BEGIN")
    await w(promote)
    waiting = await p.blocked_by(w, retry, id)
    await w("COMMIT")
    assert not await waiting
    assert [job.attempt for job in await w(claim, await w(register))] == [1]


async def test_promoted_at_the_moment_of_its_retry(s: Steps, w: Session, p: Session) -> None:
    """Promotion and claim during retry: neither waits, neither has it; at the commit it is ready."""
    [id] = await insert(s.db, **OVERDUE)
    me = await w(register)
    await p("BEGIN")
    assert await p(retry, id)
    assert await w(promote) == 0
    assert await w(claim, me) == []
    await p("COMMIT")
    assert await w(promote) == 0
    assert [job.id for job in await w(claim, me)] == [id]


async def test_claimed_at_the_moment_of_its_promotion(s: Steps, w: Session) -> None:
    """Claim during promotion: the task is still scheduled for others, until the promotion's commit."""
    await insert(s.db, **OVERDUE)
    other, me = await s.worker("claims 2"), await w(register)
    await w("BEGIN")
    await w(promote)
    assert await other(claim, me) == []
    await w("COMMIT")
    assert len(await other(claim, me)) == 1


async def test_a_promoter_that_dies(s: Steps, w: Session) -> None:
    """Promotion and promotion: what the first had in its hands when it died, the second promotes."""
    await insert(s.db, 2, **OVERDUE)
    other = await s.worker("other")
    await w("BEGIN")
    assert await w(promote) == 2
    assert await other(promote) == 0
    await s.db.fetch("SELECT pg_terminate_backend($1, 2000)", w.pid)
    assert await other(promote) == 2


async def test_a_person_puts_off_what_is_being_claimed(s: Steps, w: Session, p: Session) -> None:
    """UPDATE OF run_at during claim: it waits; the attempt that has begun goes on and settles."""
    [id] = await insert(s.db)
    me = await w(register)
    await w("BEGIN")
    jobs = await w(claim, me)
    waiting = await p.blocked_by(w, "UPDATE notifyq.task SET run_at = '2999-01-01' WHERE id = $1", id)
    await w("COMMIT")
    await waiting
    assert await states(s.db) == {id: ("running", 1)}
    assert await w(finish, jobs) == [id]


@take
async def test_a_claim_of_what_a_person_puts_off(s: Steps, w: Session, p: Session, take: Any) -> None:
    """Claim during UPDATE OF run_at: it steps over the task, which then isn't ready any more."""
    [id] = await insert(s.db)
    me = await w(register)
    await p("BEGIN")
    await p("UPDATE notifyq.task SET run_at = '2999-01-01' WHERE id = $1", id)
    assert await w(take, me) == []
    await p("COMMIT")
    assert await w(take, me) == []
    assert await states(s.db) == {id: ("scheduled", 0)}


# --- Types that only some know


async def test_adopted_while_it_is_set_aside(s: Steps, w: Session) -> None:
    """Adopt and claim during release_unhandled: nobody has the task before the commit; then who knows its type does."""
    jobs = await w(held)
    knows = await s.worker("knows")
    other = await knows(register, "knows:1")
    await w("BEGIN")
    await w(release_unhandled, jobs)
    assert await knows(adopt, other) == await knows(claim, other) == []
    await w("COMMIT")
    assert await knows(claim, other) == []
    [job] = await knows(adopt, other)
    assert (job.id, job.attempt) == (jobs[0].id, jobs[0].attempt)
    assert await w(release_unhandled, jobs) == [], (
        "said again, after a lost connection: the same attempt, another's lease"
    )
    assert await knows(finish, [job]) == [job.id]


async def test_two_adopt(s: Steps, w: Session) -> None:
    """Adopt and adopt: they share, and neither waits; what the first gives up by dying is there again."""
    all_ids = await insert(s.db, 3, withheld=True)
    other, me = await s.worker("other"), await w(register)
    await w("BEGIN")
    assert [job.id for job in await w(adopt, me, 2)] == all_ids[:2]
    assert [job.id for job in await other(adopt, me)] == all_ids[2:]
    await s.db.fetch("SELECT pg_terminate_backend($1, 2000)", w.pid)
    assert [job.id for job in await other(adopt, me)] == all_ids[:2]


# --- Other isolation levels


@pytest.mark.parametrize("level", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_a_cancel_with_an_old_snapshot(s: Steps, w: Session, p: Session, level: str) -> None:
    """Cancel in a strict transaction, of a task claimed since: the person is told, the task runs on."""
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
    """Enqueue and enqueue: one of them fails, and its task never was; the other's is there."""
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
