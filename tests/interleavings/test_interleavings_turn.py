"""Falling asleep and waiting for the turn, statement by statement: refused, cancelled, killed.

In each docstring, "X during Y" means that X begins while Y is not committed yet."""

from __future__ import annotations

import pytest

from ..helpers.machine import limit
from ..helpers.steps import Session, Steps, frozen
from ..helpers.verbs import fall_asleep, insert, take_turn
from .test_interleavings_bell import locks


async def test_falling_asleep_is_given_up(s: Steps, bell: Session, p: Session) -> None:
    """Sleep during enqueue, for 20 ms: the worker is refused, holds nothing, and may ask again in the same
    transaction."""
    await p("BEGIN")
    await p(insert)
    assert not await bell(fall_asleep, 20)
    assert await locks(s, bell) == []
    q = await s.session("q")
    await q("BEGIN")
    await q(insert)
    assert await locks(s, q) == ["RowExclusiveLock"], "no session waits any more"
    await q("COMMIT")
    await p("COMMIT")
    assert await bell(fall_asleep, 20)


async def test_falling_asleep_is_cancelled(s: Steps, bell: Session, p: Session) -> None:
    """Sleep during enqueue, and a request to cancel it: the worker holds nothing, and its transaction goes on."""
    await p("BEGIN")
    await p(insert)
    waiting = await bell.blocked_by(p, fall_asleep)
    await s.db.fetch("SELECT pg_cancel_backend($1)", bell.pid)
    assert await waiting is False
    await p("COMMIT")
    assert await locks(s, bell) == []
    assert await bell(fall_asleep)


async def late(s: Steps, why: str, waiter: Session, ms: int) -> None:
    """While the waiter's backend is frozen: end its wait of `ms`, so that it finds it both granted and ended."""
    if why == "cancelled":
        await s.db.fetch("SELECT pg_cancel_backend($1)", waiter.pid)
    else:
        await s.db.fetch("SELECT pg_sleep($1)", ms / 1000 + 0.1)


@pytest.mark.parametrize("why", ["cancelled", "timed out"])
async def test_falling_asleep_is_granted_when_the_wait_ends(s: Steps, bell: Session, p: Session, why: str) -> None:
    """Sleep is granted at the moment at which the wait ends: the worker holds the lock exactly if the function says
    so."""
    await p("BEGIN")
    await p(insert)
    ms = int(limit(0.6) * 1000)  # it is frozen before that is over
    waiting = await bell.blocked_by(p, fall_asleep, ms)
    with frozen(bell):
        await p("COMMIT")
        await late(s, why, bell, ms)
    granted = await waiting
    assert await locks(s, bell) == (["ShareLock"] if granted else [])


@pytest.mark.parametrize("why", ["cancelled", "timed out"])
async def test_a_turn_that_is_granted_when_the_wait_ends(s: Steps, why: str) -> None:
    """The turn is granted at the moment at which the wait ends: the worker holds it exactly if the function says so,
    and passes it on."""
    first, second, third = [await s.worker(f"bell {n}") for n in range(3)]
    assert await first(take_turn)
    ms = int(limit(0.6) * 1000)
    waiting = await second.blocked_by(first, take_turn, ms)
    with frozen(second):
        await first("SELECT pg_advisory_unlock(1852990836, 7)")
        await late(s, why, second, ms)
    took = await waiting
    assert await locks(s, second) == (["turn"] if took else [])
    assert took or await third(take_turn)


async def test_the_turn_goes_round_in_order(s: Steps) -> None:
    """The turn is first come, first served. It is passed on at once when its holder steps back or is killed. Another
    fleet has a turn of its own."""
    first, second, third, other = [await s.worker(f"bell {n}") for n in range(4)]
    assert await first(take_turn)
    second_waits = await second.blocked_by(first, take_turn)
    third_waits = await third.blocked_by(second, take_turn)
    assert await other(take_turn, 5000, 8), "another fleet's"
    await s.db.fetch("SELECT pg_terminate_backend($1)", first.pid)
    assert await second_waits
    assert not third_waits.over
    await second("SELECT pg_advisory_unlock(1852990836, 7)")
    assert await third_waits
    assert not await second(take_turn, 20)
    assert await locks(s, second) == []
