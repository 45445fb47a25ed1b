"""Rescue and heartbeats against whatever else is under way, statement by statement.

A worker that is given up for dead may be alive. It may have a claim or an outcome under way, and it may come back.
Whatever the order: its tasks have one lease, end once, count each attempt once, and never stay under the name of a
worker that is gone.

In each docstring, "X during Y" means that statement X begins while Y is not committed yet; "it" is X.
"""

from __future__ import annotations

from typing import Any

import pytest

from ..helpers.steps import Session, Steps
from ..helpers.verbs import (
    SETTLES,
    cancel,
    claim,
    finish,
    hand_back_all,
    held,
    reclaim_unanswered,
    reclaim_unowned,
    register,
    rescue,
    silent,
    states,
    tick,
    unregister,
)

settle = pytest.mark.parametrize("settle", SETTLES)
LOCK, UNLOCK = "SELECT pg_try_advisory_lock(1852990827, $1)", "SELECT pg_advisory_unlock(1852990827, $1)"


async def workers(s: Steps) -> int:
    return int(await s.db.fetchval("SELECT count(*) FROM notifyq.worker"))


# --- Settle and rescue


@settle
async def test_settled_while_it_is_being_rescued(s: Steps, w: Session, k: Session, settle: Any) -> None:
    """Settle during rescue: it waits, its lease is lost, and it writes nothing."""
    [job] = await w(held)
    await silent(s.db, job.worker)
    await k("BEGIN")
    assert await k(rescue, job.worker) == ("host:1", 1, 0)
    waiting = await w.blocked_by(k, settle, [job])
    await k("COMMIT")
    assert await waiting == []
    assert await states(s.db) == {job.id: ("ready", 1)}


@settle
async def test_settled_while_a_rescuer_dies(s: Steps, w: Session, k: Session, settle: Any) -> None:
    """Settle during rescue: the rescuer is killed, and the outcome that the worker writes stands."""
    [job] = await w(held)
    await silent(s.db, job.worker)
    await k("BEGIN")
    await k(rescue, job.worker)
    waiting = await w.blocked_by(k, settle, [job])
    await s.db.fetch("SELECT pg_terminate_backend($1)", k.pid)
    assert await waiting == [job.id]
    assert await states(s.db) == {job.id: SETTLES[settle]}


@settle
async def test_rescued_while_it_settles(s: Steps, w: Session, k: Session, settle: Any) -> None:
    """Rescue during settle: it skips the task, and deletes the worker only when the outcome is written."""
    [job] = await w(held)
    await silent(s.db, job.worker)
    await w("BEGIN")
    await w(settle, [job])
    assert await k(rescue, job.worker) == ("host:1", 0, 0)
    assert await workers(s) == 1, "it still holds what it is settling, as far as can be seen"
    await w("COMMIT")
    assert await k(rescue, job.worker) == ("host:1", 0, 0)
    assert await workers(s) == 0
    assert await states(s.db) == {job.id: SETTLES[settle]}


@settle
async def test_rescued_while_its_last_words_are_lost(s: Steps, w: Session, k: Session, settle: Any) -> None:
    """Rescue during settle: the worker dies before its commit, and the next round finds the task."""
    [job] = await w(held)
    await silent(s.db, job.worker)
    await w("BEGIN")
    await w(settle, [job])
    assert await k(rescue, job.worker) == ("host:1", 0, 0)
    await s.db.fetch("SELECT pg_terminate_backend($1, 2000)", w.pid)
    assert await k(rescue, job.worker) == ("host:1", 1, 0)
    assert await states(s.db) == {job.id: ("ready", 1)}


async def test_done_by_its_worker_and_dead_by_its_rescuer(s: Steps, w: Session, k: Session) -> None:
    """Settle during the rescue of a task without attempts left: the task ends once, as the statement that came first
    says."""
    [job] = await w(held, max_attempts=1)
    await silent(s.db, job.worker)
    await k("BEGIN")
    assert await k(rescue, job.worker) == ("host:1", 0, 1)
    waiting = await w.blocked_by(k, finish, [job])
    await k("COMMIT")
    assert await waiting == []
    assert await states(s.db) == {job.id: ("dead", 1)}


async def test_dead_by_its_rescuer_and_done_by_its_worker(s: Steps, w: Session, k: Session) -> None:
    """Rescue of a task without attempts left, during its settle: the task is done, and not dead too."""
    [job] = await w(held, max_attempts=1)
    await silent(s.db, job.worker)
    await w("BEGIN")
    await w(finish, [job])
    assert await k(rescue, job.worker) == ("host:1", 0, 0)
    await w("COMMIT")
    assert await k(rescue, job.worker) == ("host:1", 0, 0)
    assert await states(s.db) == {job.id: ("done", 1)}


async def test_a_dead_worker_comes_back_and_says_everything_twice(s: Steps, w: Session, k: Session) -> None:
    """Late statements after rescue and another worker's claim: none of them changes the new lease."""
    jobs = await w(held)
    me = jobs[0].worker
    await silent(s.db, me)
    assert await k(rescue, me) == ("host:1", 1, 0)
    assert await k(rescue, me) == ("host:1", 0, 0)
    [again] = await k(claim, await k(register, "heir:1"))
    before = await s.db.fetch("SELECT * FROM notifyq.task")
    for verb in SETTLES:
        assert await w(verb, jobs) == []
    assert await w(hand_back_all, me) == await w(reclaim_unanswered, me, []) == await w(reclaim_unowned) == 0
    assert await w(claim, me) == []
    assert await w(tick, me, jobs) == (False, [again.id], [again.worker])
    assert not await w(unregister, me)
    assert await s.db.fetch("SELECT * FROM notifyq.task") == before
    assert await k(finish, [again]) == [again.id]


# --- Rescuers, heartbeats, locks


async def test_a_rescuer_dies_and_another_takes_over(s: Steps, w: Session, k: Session) -> None:
    """Rescue during rescue: it doesn't wait. If the first is killed, it rescues all, and counts the attempt once."""
    jobs = await w(held, 2)
    await silent(s.db, jobs[0].worker)
    other = await s.worker("heartbeat 2")
    await k("BEGIN")
    assert await k(rescue, jobs[0].worker) == ("host:1", 2, 0)
    assert await other(rescue, jobs[0].worker) == (None, 0, 0)
    await s.db.fetch("SELECT pg_terminate_backend($1, 2000)", k.pid)
    assert await other(rescue, jobs[0].worker) == ("host:1", 2, 0)
    assert set((await states(s.db)).values()) == {("ready", 1)}
    assert await other(rescue, jobs[0].worker) == ("host:1", 0, 0)
    assert await workers(s) == 0


async def test_a_heartbeat_while_its_worker_is_buried(s: Steps, w: Session, k: Session) -> None:
    """Heartbeat during rescue: it waits, and learns that its worker isn't registered any more."""
    jobs = await w(held)
    await silent(s.db, jobs[0].worker)
    await k("BEGIN")
    await k(rescue, jobs[0].worker)
    await k(rescue, jobs[0].worker)
    waiting = await w.blocked_by(k, tick, jobs[0].worker, jobs)
    await k("COMMIT")
    registered, _, _ = await waiting
    assert not registered
    assert await w(claim, jobs[0].worker) == []


async def test_a_heartbeat_while_its_worker_is_rescued_in_pieces(s: Steps, w: Session, k: Session) -> None:
    """Heartbeat during rescue: in time to keep the rest. The next one tells the worker which leases it has lost."""
    first, second = jobs = await w(held, 2)
    await silent(s.db, first.worker)
    await k("BEGIN")
    assert await k(rescue, first.worker, 1) == ("host:1", 1, 0)
    waiting = await w.blocked_by(k, tick, first.worker, jobs)
    await k("COMMIT")
    registered, _, _ = await waiting
    assert registered
    assert await w(tick, first.worker, jobs) == (True, [first.id], [])
    assert await k(rescue, first.worker) == (None, 0, 0), "it lives"
    assert await w(finish, jobs) == [second.id]
    assert await states(s.db) == {first.id: ("ready", 1), second.id: ("done", 1)}


async def test_a_rescue_while_a_heartbeat_is_on_its_way(s: Steps, w: Session, k: Session) -> None:
    """Rescue during heartbeat: it doesn't wait and takes nothing, since the worker is alive."""
    jobs = await w(held)
    me = jobs[0].worker
    await silent(s.db, me)
    await w("BEGIN")
    await w(tick, me, jobs)
    assert await k(rescue, me) == (None, 0, 0)
    await w("COMMIT")
    assert await k(rescue, me) == (None, 0, 0)
    assert await states(s.db) == {jobs[0].id: ("running", 1)}


async def test_a_heartbeat_that_reconnects_while_its_worker_is_rescued(s: Steps, w: Session, k: Session) -> None:
    """Its advisory lock during rescue: it is refused at once. It asks again later, and gets it if the rescue failed."""
    [job] = await w(held)
    await silent(s.db, job.worker)
    await k("BEGIN")
    await k(rescue, job.worker)
    assert (await w(LOCK, job.worker))[0][0] is False
    await k("ROLLBACK")
    assert (await w(LOCK, job.worker))[0][0] is True
    assert await k(rescue, job.worker) == (None, 0, 0)


async def test_a_heartbeats_session_ends_while_another_asks(s: Steps, w: Session, k: Session) -> None:
    """Rescue and the end of the dead worker's session: nothing is rescued before it, and all at once after it."""
    [job] = await w(held)
    await silent(s.db, job.worker)
    await w(LOCK, job.worker)
    assert await k(rescue, job.worker) == (None, 0, 0)
    await s.db.fetch("SELECT pg_terminate_backend($1, 2000)", w.pid)
    assert await k(rescue, job.worker) == ("host:1", 1, 0)


# --- Claim, cancel and rescue


async def test_claimed_while_it_is_being_rescued(s: Steps, w: Session, k: Session) -> None:
    """Claim during rescue: it skips the task, and gets it with its next attempt after the commit."""
    [job] = await w(held)
    await silent(s.db, job.worker)
    other = await s.worker("claims 2")
    heir = await other(register, "heir:1")
    await k("BEGIN")
    await k(rescue, job.worker)
    assert await other(claim, heir) == []
    await k("COMMIT")
    assert [again.attempt for again in await other(claim, heir)] == [2]


async def test_cancelled_while_it_is_being_rescued(s: Steps, w: Session, k: Session, p: Session) -> None:
    """Cancel during rescue: it waits, and ends the task that is ready again."""
    [job] = await w(held)
    await silent(s.db, job.worker)
    await k("BEGIN")
    await k(rescue, job.worker)
    waiting = await p.blocked_by(k, cancel, job.id)
    await k("COMMIT")
    assert await waiting
    assert await states(s.db) == {job.id: ("cancelled", 1)}


async def test_cancelled_while_its_rescuer_says_dead(s: Steps, w: Session, k: Session, p: Session) -> None:
    """Cancel during the rescue of a task without attempts left: the task is dead before, and stays dead."""
    [job] = await w(held, max_attempts=1)
    await silent(s.db, job.worker)
    await k("BEGIN")
    await k(rescue, job.worker)
    waiting = await p.blocked_by(k, cancel, job.id)
    await k("COMMIT")
    assert not await waiting
    assert await states(s.db) == {job.id: ("dead", 1)}


async def test_rescued_while_it_is_being_cancelled(s: Steps, w: Session, k: Session, p: Session) -> None:
    """Rescue during cancel: it skips the task, leaves the worker registered, and finds the rest in its next round."""
    first, second = await w(held, 2)
    await silent(s.db, first.worker)
    await p("BEGIN")
    await p(cancel, first.id)
    assert await k(rescue, first.worker) == ("host:1", 1, 0)
    assert await k(rescue, first.worker) == ("host:1", 0, 0)
    assert await workers(s) == 1
    await p("ROLLBACK")
    assert await k(rescue, first.worker) == ("host:1", 1, 0)
    assert await states(s.db) == {first.id: ("ready", 1), second.id: ("ready", 1)}
