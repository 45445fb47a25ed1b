"""Prune against a retry, an outcome and another prune, statement by statement."""

from __future__ import annotations

import pytest

from ..helpers.steps import Session, Steps
from ..helpers.verbs import (
    finish,
    held,
    prune,
    retry,
    states,
)

# --- Prune


async def over(s: Steps, w: Session, state: str = "dead") -> int:
    """A task that has ended in this state."""
    jobs = await w(held)
    assert await w(finish, jobs, state)
    return int(jobs[0].id)


async def test_retried_while_it_is_pruned(s: Steps, w: Session, k: Session, p: Session) -> None:
    """Retry during prune: it waits, and returns that there is nothing to retry."""
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
    """Prune during retry: it skips the task. The task lives, or is pruned when the retry has failed."""
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
    """Prune during settle: it prunes no task whose end isn't committed, and doesn't wait."""
    jobs = await w(held)
    await w("BEGIN")
    await w(finish, jobs)
    assert await k(prune) == 0
    await w("COMMIT")
    assert await states(s.db) == {jobs[0].id: ("done", 1)}
    assert await k(prune) == 1
