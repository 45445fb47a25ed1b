"""Tasks that their worker doesn't know of, or whose worker is gone; and workers that leave. Statement by statement.

A worker that is given up for dead may be alive: a claim or an outcome of it may still be under way. In each docstring,
"X during Y" means that statement X begins while Y is not committed yet; "it" is X.
"""

from __future__ import annotations

import asyncio
from typing import Any

from ..helpers.steps import Session, Steps, frozen
from ..helpers.verbs import (
    SETTLES,
    cancel,
    claim,
    end_backends,
    finish,
    hand_back,
    hand_back_all,
    held,
    insert,
    reclaim_unanswered,
    reclaim_unowned,
    register,
    rescue,
    silent,
    states,
    tick,
    unregister,
)
from ..helpers.waiting import eventually
from .test_interleavings_rescue import settle, workers

# --- Unowned tasks, and claims without an answer


async def test_a_claim_outlives_its_worker(s: Steps, w: Session, k: Session) -> None:
    """Rescue during claim: it sees no task of the worker, and deletes it. The claimed task is unowned, and is found."""
    me = await w(register)
    [id] = await insert(s.db)
    await silent(s.db, me)
    await w("BEGIN")
    assert len(await w(claim, me)) == 1
    assert await k(rescue, me) == ("host:1", 0, 0)
    assert await workers(s) == 0
    await w("COMMIT")
    assert await states(s.db) == {id: ("running", 1)}
    assert await k(reclaim_unowned) == 1
    assert await states(s.db) == {id: ("ready", 1)}


async def test_a_claim_outlives_its_worker_that_left(s: Steps, w: Session, k: Session) -> None:
    """Unregister during claim: a worker leaves whose last claim was never answered. Its task is found as well."""
    me = await w(register)
    [id] = await insert(s.db)
    await w("BEGIN")
    await w(claim, me)
    assert await k(hand_back_all, me) == 0
    assert await k(unregister, me)
    await w("COMMIT")
    assert await k(reclaim_unowned) == 1
    assert await states(s.db) == {id: ("ready", 1)}


async def unowned(s: Steps, w: Session) -> Any:
    """A task whose worker isn't registered any more, though its claimer believes that it holds the task."""
    [job] = await w(held)
    await s.db.execute("DELETE FROM notifyq.worker")
    return job


@settle
async def test_settled_while_it_is_taken_for_unowned(s: Steps, w: Session, k: Session, settle: Any) -> None:
    """Settle during reclaim_unowned: it waits and writes nothing; the task is ready."""
    job = await unowned(s, w)
    await k("BEGIN")
    assert await k(reclaim_unowned) == 1
    waiting = await w.blocked_by(k, settle, [job])
    await k("COMMIT")
    assert await waiting == []
    assert await states(s.db) == {job.id: ("ready", 1)}


@settle
async def test_taken_for_unowned_while_it_settles(s: Steps, w: Session, k: Session, settle: Any) -> None:
    """Reclaim_unowned during settle: it skips the task that is being settled."""
    job = await unowned(s, w)
    await w("BEGIN")
    await w(settle, [job])
    assert await k(reclaim_unowned) == 0
    await w("COMMIT")
    assert await k(reclaim_unowned) == 0
    assert await states(s.db) == {job.id: SETTLES[settle]}


async def test_two_find_the_same_unowned_tasks(s: Steps, w: Session, k: Session) -> None:
    """Reclaim_unowned during itself, and claim: neither waits, and each task is taken back once."""
    job = await unowned(s, w)
    other = await s.worker("heartbeat 2")
    heir = await other(register, "heir:1")
    await k("BEGIN")
    assert await k(reclaim_unowned) == 1
    assert await other(reclaim_unowned) == 0
    assert await other(claim, heir) == []
    await k("COMMIT")
    assert await other(reclaim_unowned) == 0
    assert [(again.id, again.attempt) for again in await other(claim, heir)] == [(job.id, 2)]


async def test_an_unanswered_claim_that_is_still_under_way(s: Steps, k: Session) -> None:
    """Reclaim_unanswered during claim: the claim's backend is ended first, so the claim can't commit later."""
    me = await k(register)
    claims = await s.worker(f"claims {me}")
    [id] = await insert(s.db)
    await claims("BEGIN")
    assert len(await claims(claim, me)) == 1
    assert await k(reclaim_unanswered, me, []) == 0, "it can't be seen"
    assert await k(end_backends, me)
    assert await k(reclaim_unanswered, me, []) == 0
    assert [(job.id, job.attempt) for job in await k(claim, me)] == [(id, 1)]


async def test_claims_have_ended_only_when_their_backend_is_gone(s: Steps, k: Session) -> None:
    """A backend that doesn't handle the signal yet may still commit its claim, so end_backends waits for its end."""
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


async def test_an_unanswered_claim_while_a_known_task_is_settled(s: Steps, w: Session, k: Session) -> None:
    """Reclaim_unanswered during settle: it neither takes nor waits for the task that the worker knows of."""
    known, unknown = await w(held, 2)
    await w("BEGIN")
    await w(finish, [known])
    assert await k(reclaim_unanswered, known.worker, [known]) == 1
    await w("COMMIT")
    assert await states(s.db) == {known.id: ("done", 1), unknown.id: ("ready", 0)}


async def test_an_unanswered_claim_whose_task_is_being_cancelled(s: Steps, w: Session, p: Session) -> None:
    """Reclaim_unanswered during cancel: it waits; the task is cancelled, and doesn't come back."""
    [job] = await w(held)
    await p("BEGIN")
    await p(cancel, job.id)
    waiting = await w.blocked_by(p, reclaim_unanswered, job.worker, [])
    await p("COMMIT")
    assert await waiting == 0
    assert await states(s.db) == {job.id: ("cancelled", 1)}


# --- Leaving


async def test_released_while_it_is_rescued(s: Steps, w: Session, k: Session) -> None:
    """Hand_back_all during rescue: it waits and finds nothing; the attempt counts, as the rescue says."""
    jobs = await w(held, 2)
    await silent(s.db, jobs[0].worker)
    await k("BEGIN")
    await k(rescue, jobs[0].worker)
    waiting = await w.blocked_by(k, hand_back_all, jobs[0].worker)
    await k("COMMIT")
    assert await waiting == 0
    assert set((await states(s.db)).values()) == {("ready", 1)}


async def test_rescued_while_it_releases(s: Steps, w: Session, k: Session) -> None:
    """Rescue during hand_back_all: it skips everything; the attempts are taken off once."""
    jobs = await w(held, 2)
    me = jobs[0].worker
    await silent(s.db, me)
    await w("BEGIN")
    assert await w(hand_back_all, me) == 2
    assert await k(rescue, me) == ("host:1", 0, 0)
    await w("COMMIT")
    assert set((await states(s.db)).values()) == {("ready", 0)}
    assert await w(unregister, me)


async def test_released_while_its_last_outcome_is_written(s: Steps, w: Session, k: Session) -> None:
    """Hand_back_all during settle: it waits for the settler's connection, and hands back only the rest."""
    first, second = await w(held, 2)
    await w("BEGIN")
    await w(finish, [first])
    waiting = await k.blocked_by(w, hand_back_all, first.worker)
    await w("COMMIT")
    assert await waiting == 1
    assert await states(s.db) == {first.id: ("done", 1), second.id: ("ready", 0)}


async def test_its_last_outcome_while_it_is_released(s: Steps, w: Session, k: Session) -> None:
    """Settle during hand_back_all, which got the same tasks in the other order: it waits, and reports what it lost."""
    jobs = await w(held, 2)
    await k("BEGIN")
    await k(hand_back_all, jobs[0].worker)
    waiting = await w.blocked_by(k, hand_back, jobs[::-1])
    await k("COMMIT")
    assert await waiting == []
    assert set((await states(s.db)).values()) == {("ready", 0)}, "the attempt is taken off once"


async def test_unregistered_while_it_is_buried(s: Steps, w: Session, k: Session) -> None:
    """Unregister during rescue: it waits, and finds nothing to do."""
    me = await w(register)
    await silent(s.db, me)
    await k("BEGIN")
    await k(rescue, me)
    waiting = await w.blocked_by(k, unregister, me)
    await k("COMMIT")
    assert not await waiting


async def test_buried_while_it_registers_anew(s: Steps, w: Session, k: Session) -> None:
    """Heartbeat during register: it doesn't name a worker whose registration isn't committed."""
    mine = await k(register, "mine:1")
    await w("BEGIN")
    me = await w(register)
    assert await k(tick, mine) == (True, [], [])
    assert await k(rescue, me) == (None, 0, 0)
    await w("COMMIT")
    assert await k(tick, mine) == (True, [], [me])
