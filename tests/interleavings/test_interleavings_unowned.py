"""Tasks whose worker doesn't know of them or is gone, and workers that leave, statement by statement.

A worker that is given up for dead may be alive: a claim or an outcome of it may still be on its way.
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
    held,
    insert,
    orphans,
    register,
    release,
    rescue,
    silent,
    states,
    strays,
    tick,
    unregister,
)
from ..helpers.waiting import eventually
from .test_interleavings_rescue import settle, workers

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
