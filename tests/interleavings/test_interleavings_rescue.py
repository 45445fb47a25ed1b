"""Rescue, heartbeats, orphans, strays, hand-overs and prune against whatever else is under way, statement by statement.

A worker that is given up for dead may be alive, may have a claim or an outcome on its way, may come back. Whatever the
order: its tasks have one lease, end once, count each attempt once, and don't stay behind under a name nobody has.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import pytest

from ..helpers.steps import Session, Steps, frozen, steps
from ..helpers.verbs import (
    SETTLES,
    cancel,
    claim,
    end_backends,
    finish,
    hand_back,
    held,
    insert,
    orphans,
    prune,
    register,
    release,
    rescue,
    retry,
    silent,
    states,
    strays,
    tick,
    unregister,
)
from ..helpers.waiting import eventually

settle = pytest.mark.parametrize("settle", SETTLES)
LOCK, UNLOCK = "SELECT pg_try_advisory_lock(1852990827, $1)", "SELECT pg_advisory_unlock(1852990827, $1)"


@pytest.fixture
async def s(dsn: str) -> AsyncIterator[Steps]:
    async with steps(dsn) as s:
        yield s


@pytest.fixture
async def w(s: Steps) -> Session:
    """A worker that is about to be taken for dead."""
    return await s.worker("w")


@pytest.fixture
async def k(s: Steps) -> Session:
    """The heartbeat of another worker."""
    return await s.worker("heartbeat")


@pytest.fixture
async def p(s: Steps) -> Session:
    """A person at psql."""
    return await s.session("p")


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
    """Settle during rescue: the rescuer is killed, and what the worker says stands."""
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
    """Rescue during settle: it steps over the task, and buries the worker only when that is written."""
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
    """Finish during the rescue of a task without attempts left: it is over once, as the first of both said."""
    [job] = await w(held, max_attempts=1)
    await silent(s.db, job.worker)
    await k("BEGIN")
    assert await k(rescue, job.worker) == ("host:1", 0, 1)
    waiting = await w.blocked_by(k, finish, [job])
    await k("COMMIT")
    assert await waiting == []
    assert await states(s.db) == {job.id: ("dead", 1)}


async def test_dead_by_its_rescuer_and_done_by_its_worker(s: Steps, w: Session, k: Session) -> None:
    """Rescue of a task without attempts left during its finish: it is done, and not dead too."""
    [job] = await w(held, max_attempts=1)
    await silent(s.db, job.worker)
    await w("BEGIN")
    await w(finish, [job])
    assert await k(rescue, job.worker) == ("host:1", 0, 0)
    await w("COMMIT")
    assert await k(rescue, job.worker) == ("host:1", 0, 0)
    assert await states(s.db) == {job.id: ("done", 1)}


async def test_a_dead_worker_comes_back_and_says_everything_twice(s: Steps, w: Session, k: Session) -> None:
    """Late words after rescue and another's claim: none of them touches the new lease."""
    jobs = await w(held)
    me = jobs[0].worker
    await silent(s.db, me)
    assert await k(rescue, me) == ("host:1", 1, 0)
    assert await k(rescue, me) == ("host:1", 0, 0)
    [again] = await k(claim, await k(register, "heir:1"))
    before = await s.db.fetch("SELECT * FROM notifyq.task")
    for verb in SETTLES:
        assert await w(verb, jobs) == []
    assert await w(release, me) == await w(strays, me, []) == await w(orphans) == 0
    assert await w(claim, me) == []
    assert await w(tick, me, jobs) == (False, [again.id], [again.worker])
    assert not await w(unregister, me)
    assert await s.db.fetch("SELECT * FROM notifyq.task") == before
    assert await k(finish, [again]) == [again.id]


# --- Rescuers, heartbeats, locks


async def test_a_rescuer_dies_and_another_takes_over(s: Steps, w: Session, k: Session) -> None:
    """Rescue during rescue: it doesn't wait; when the first is killed it does all, and counts the attempt once."""
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
    """Heartbeat during rescue: in time for the rest; by the next one the worker knows what it has lost."""
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
    """Rescue during heartbeat: it doesn't wait and takes nothing; the worker was alive after all."""
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
    """Its lock during rescue: refused without waiting, so it tries again later, and has it if the rescue failed."""
    [job] = await w(held)
    await silent(s.db, job.worker)
    await k("BEGIN")
    await k(rescue, job.worker)
    assert (await w(LOCK, job.worker))[0][0] is False
    await k("ROLLBACK")
    assert (await w(LOCK, job.worker))[0][0] is True
    assert await k(rescue, job.worker) == (None, 0, 0)


async def test_a_heartbeats_session_ends_while_another_asks(s: Steps, w: Session, k: Session) -> None:
    """Rescue and the end of the dead worker's session: not before, and at once after."""
    [job] = await w(held)
    await silent(s.db, job.worker)
    await w(LOCK, job.worker)
    assert await k(rescue, job.worker) == (None, 0, 0)
    await s.db.fetch("SELECT pg_terminate_backend($1, 2000)", w.pid)
    assert await k(rescue, job.worker) == ("host:1", 1, 0)


# --- Claim, cancel and rescue


async def test_claimed_while_it_is_being_rescued(s: Steps, w: Session, k: Session) -> None:
    """Claim during rescue: it steps over, and has the task with its next attempt after the commit."""
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
    """Cancel during the rescue of a task without attempts left: it was dead before, and stays so."""
    [job] = await w(held, max_attempts=1)
    await silent(s.db, job.worker)
    await k("BEGIN")
    await k(rescue, job.worker)
    waiting = await p.blocked_by(k, cancel, job.id)
    await k("COMMIT")
    assert not await waiting
    assert await states(s.db) == {job.id: ("dead", 1)}


async def test_rescued_while_it_is_being_cancelled(s: Steps, w: Session, k: Session, p: Session) -> None:
    """Rescue during cancel: it steps over, leaves the worker registered, and finds the rest in its next round."""
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


# --- Orphans and strays


async def test_a_claim_outlives_its_worker(s: Steps, w: Session, k: Session) -> None:
    """Burial during claim: the worker holds nothing that could be seen; what its claim took is an orphan, and found."""
    me = await w(register)
    [id] = await insert(s.db)
    await silent(s.db, me)
    await w("BEGIN")
    assert len(await w(claim, me)) == 1
    assert await k(rescue, me) == ("host:1", 0, 0)
    assert await workers(s) == 0
    await w("COMMIT")
    assert await states(s.db) == {id: ("running", 1)}
    assert await k(orphans) == 1
    assert await states(s.db) == {id: ("ready", 1)}


async def test_a_claim_outlives_its_worker_that_left(s: Steps, w: Session, k: Session) -> None:
    """Unregister during claim: the same, when a worker leaves whose last claim was never answered."""
    me = await w(register)
    [id] = await insert(s.db)
    await w("BEGIN")
    await w(claim, me)
    assert await k(release, me) == 0
    assert await k(unregister, me)
    await w("COMMIT")
    assert await k(orphans) == 1
    assert await states(s.db) == {id: ("ready", 1)}


async def orphan(s: Steps, w: Session) -> Any:
    """A task under the lease of nobody, that its claimer still believes to have."""
    [job] = await w(held)
    await s.db.execute("DELETE FROM notifyq.worker")
    return job


@settle
async def test_settled_while_it_is_taken_for_an_orphan(s: Steps, w: Session, k: Session, settle: Any) -> None:
    """Settle during orphans: it waits and writes nothing; the task is ready."""
    job = await orphan(s, w)
    await k("BEGIN")
    assert await k(orphans) == 1
    waiting = await w.blocked_by(k, settle, [job])
    await k("COMMIT")
    assert await waiting == []
    assert await states(s.db) == {job.id: ("ready", 1)}


@settle
async def test_taken_for_an_orphan_while_it_settles(s: Steps, w: Session, k: Session, settle: Any) -> None:
    """Orphans during settle: it steps over what is being settled."""
    job = await orphan(s, w)
    await w("BEGIN")
    await w(settle, [job])
    assert await k(orphans) == 0
    await w("COMMIT")
    assert await k(orphans) == 0
    assert await states(s.db) == {job.id: SETTLES[settle]}


async def test_two_find_the_same_orphans(s: Steps, w: Session, k: Session) -> None:
    """Orphans during orphans, and claim: nobody waits, and each task is taken back once."""
    job = await orphan(s, w)
    other = await s.worker("heartbeat 2")
    heir = await other(register, "heir:1")
    await k("BEGIN")
    assert await k(orphans) == 1
    assert await other(orphans) == 0
    assert await other(claim, heir) == []
    await k("COMMIT")
    assert await other(orphans) == 0
    assert [(again.id, again.attempt) for again in await other(claim, heir)] == [(job.id, 2)]


async def test_strays_of_a_claim_that_is_still_under_way(s: Steps, k: Session) -> None:
    """Strays during claim: its backend is ended first, so nothing is left to be found, and nothing comes later."""
    me = await k(register)
    claims = await s.worker(f"claims {me}")
    [id] = await insert(s.db)
    await claims("BEGIN")
    assert len(await claims(claim, me)) == 1
    assert await k(strays, me, []) == 0, "it can't be seen"
    assert await k(end_backends, me)
    assert await k(strays, me, []) == 0
    assert [(job.id, job.attempt) for job in await k(claim, me)] == [(id, 1)]


async def test_claims_have_ended_only_when_their_backend_is_gone(s: Steps, k: Session) -> None:
    """A backend that doesn't hear the signal yet may still commit its claim, so end_backends waits for it."""
    me = await k(register)
    claims = await s.worker(f"claims {me}")
    waits = "SELECT wait_event = 'BackendTermination' FROM pg_stat_activity WHERE pid = $1"

    async def seen() -> bool:
        return asking.done() or await s.db.fetchval(waits, k.pid)

    with frozen(claims):
        asking = asyncio.create_task(k(end_backends, me))
        await eventually(seen)
        assert not asking.done()
    assert await asking


async def test_strays_while_something_known_is_settled(s: Steps, w: Session, k: Session) -> None:
    """Strays during settle: what the worker knows of is left alone, and not waited for."""
    known, stray = await w(held, 2)
    await w("BEGIN")
    await w(finish, [known])
    assert await k(strays, known.worker, [known]) == 1
    await w("COMMIT")
    assert await states(s.db) == {known.id: ("done", 1), stray.id: ("ready", 0)}


async def test_a_stray_that_is_being_cancelled(s: Steps, w: Session, p: Session) -> None:
    """Strays during cancel: it waits; the task is over, and doesn't come back."""
    [job] = await w(held)
    await p("BEGIN")
    await p(cancel, job.id)
    waiting = await w.blocked_by(p, strays, job.worker, [])
    await p("COMMIT")
    assert await waiting == 0
    assert await states(s.db) == {job.id: ("cancelled", 1)}


# --- Leaving


async def test_released_while_it_is_rescued(s: Steps, w: Session, k: Session) -> None:
    """Release during rescue: it waits and finds nothing; the rescue's attempt counts, and isn't taken off."""
    jobs = await w(held, 2)
    await silent(s.db, jobs[0].worker)
    await k("BEGIN")
    await k(rescue, jobs[0].worker)
    waiting = await w.blocked_by(k, release, jobs[0].worker)
    await k("COMMIT")
    assert await waiting == 0
    assert set((await states(s.db)).values()) == {("ready", 1)}


async def test_rescued_while_it_releases(s: Steps, w: Session, k: Session) -> None:
    """Rescue during release: it steps over everything; the attempts are taken off once."""
    jobs = await w(held, 2)
    me = jobs[0].worker
    await silent(s.db, me)
    await w("BEGIN")
    assert await w(release, me) == 2
    assert await k(rescue, me) == ("host:1", 0, 0)
    await w("COMMIT")
    assert set((await states(s.db)).values()) == {("ready", 0)}
    assert await w(unregister, me)


async def test_released_while_its_last_outcome_is_written(s: Steps, w: Session, k: Session) -> None:
    """Release during settle: it waits for the settling connection, and takes back only the rest."""
    first, second = await w(held, 2)
    await w("BEGIN")
    await w(finish, [first])
    waiting = await k.blocked_by(w, release, first.worker)
    await w("COMMIT")
    assert await waiting == 1
    assert await states(s.db) == {first.id: ("done", 1), second.id: ("ready", 0)}


async def test_its_last_outcome_while_it_is_released(s: Steps, w: Session, k: Session) -> None:
    """Settle during release, which had the same tasks in the other order: it waits, and says what it lost."""
    jobs = await w(held, 2)
    await k("BEGIN")
    await k(release, jobs[0].worker)
    waiting = await w.blocked_by(k, hand_back, jobs[::-1])
    await k("COMMIT")
    assert await waiting == []
    assert set((await states(s.db)).values()) == {("ready", 0)}, "the attempt is taken off once"


async def test_unregistered_while_it_is_buried(s: Steps, w: Session, k: Session) -> None:
    """Unregister during rescue: it waits, and has nothing to do."""
    me = await w(register)
    await silent(s.db, me)
    await k("BEGIN")
    await k(rescue, me)
    waiting = await w.blocked_by(k, unregister, me)
    await k("COMMIT")
    assert not await waiting


async def test_buried_while_it_registers_anew(s: Steps, w: Session, k: Session) -> None:
    """Heartbeat during register: nobody is told of a worker whose registration isn't committed, nor calls it silent."""
    mine = await k(register, "mine:1")
    await w("BEGIN")
    me = await w(register)
    assert await k(tick, mine) == (True, [], [])
    assert await k(rescue, me) == (None, 0, 0)
    await w("COMMIT")
    assert await k(tick, mine) == (True, [], [me])


# --- Prune


async def over(s: Steps, w: Session, state: str = "dead") -> int:
    """A task that has ended so."""
    jobs = await w(held)
    assert await w(finish, jobs, state)
    return int(jobs[0].id)


async def test_retried_while_it_is_pruned(s: Steps, w: Session, k: Session, p: Session) -> None:
    """Retry during prune: it waits, and says that there is nothing to retry."""
    id = await over(s, w)
    await k("BEGIN")
    assert await k(prune) == 1
    waiting = await p.blocked_by(k, retry, id)
    await k("COMMIT")
    assert not await waiting
    assert await states(s.db) == {}


async def test_retried_while_a_prune_fails(s: Steps, w: Session, k: Session, p: Session) -> None:
    """Retry during prune: rolled back, the task is run again."""
    id = await over(s, w)
    await k("BEGIN")
    await k(prune)
    waiting = await p.blocked_by(k, retry, id)
    await k("ROLLBACK")
    assert await waiting
    assert await states(s.db) == {id: ("ready", 0)}


@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
async def test_pruned_while_it_is_retried(s: Steps, w: Session, k: Session, p: Session, end: str) -> None:
    """Prune during retry: it steps over; the task lives, or is pruned when the retry has failed."""
    id = await over(s, w)
    await p("BEGIN")
    assert await p(retry, id)
    assert await k(prune) == 0
    await p(end)
    assert await k(prune) == (end == "ROLLBACK")
    assert await states(s.db) == ({id: ("ready", 0)} if end == "COMMIT" else {})


async def test_two_prune(s: Steps, w: Session, k: Session) -> None:
    """Prune during prune: they share, and neither waits."""
    for state in ("done", "dead", "done", "dead"):
        await over(s, w, state)
    other = await s.worker("heartbeat 2")
    await k("BEGIN")
    assert await k(prune, 1) == 2
    assert await other(prune) == 2
    await k("COMMIT")
    assert await states(s.db) == {}


async def test_pruned_while_it_is_settled(s: Steps, w: Session, k: Session) -> None:
    """Prune during settle: what isn't committed can't be pruned, and nothing waits."""
    jobs = await w(held)
    await w("BEGIN")
    await w(finish, jobs)
    assert await k(prune) == 0
    await w("COMMIT")
    assert await states(s.db) == {jobs[0].id: ("done", 1)}
    assert await k(prune) == 1
