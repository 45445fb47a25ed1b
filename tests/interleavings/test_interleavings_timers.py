"""The promotion of a scheduled task against cancel, retry, a claim and another promotion, statement by statement."""

from __future__ import annotations

from typing import Any

from ..helpers.steps import Session, Steps
from ..helpers.verbs import (
    OVERDUE,
    cancel,
    claim,
    finish,
    insert,
    promote,
    register,
    retry,
    states,
)
from .test_interleavings import take

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
    """Promotion during cancel: it skips the task, without waiting. When the cancel is rolled back, the next promotion
    takes the task."""
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
    """Promotion and claim during retry: neither waits, and neither gets the task. At the commit it is ready."""
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
    """Promotion during promotion: what the first had locked when it died, the second promotes."""
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
