"""The order of locks, as CONTRIBUTING.md has it: which locks a session holds while it waits for another one."""

from __future__ import annotations

from typing import Any

import pytest

from notifyq.database.connection import SQL, prove_alive
from notifyq.worker.job import claim_by_id

from ..helpers.steps import Session, Steps
from ..helpers.verbs import (
    OVERDUE,
    admit,
    claim,
    claim_from_cursor,
    claim_unhandled,
    free,
    hand_back,
    held,
    insert,
    promote,
    reclaim_unowned,
    register,
    rescue,
    silent,
)

LOW, HIGH = '{"limit_key": "k3", "limit_running": 1}', '{"limit_key": "k1", "limit_running": 1}'
EVERY_ROW = "SELECT FROM notifyq.task FOR UPDATE NOWAIT"


@pytest.fixture
async def w(s: Steps) -> Session:
    """A worker's connection for claims."""
    return await s.worker("claims")


@pytest.fixture
async def p(s: Steps) -> Session:
    """A stranger, whose transaction stays open."""
    return await s.session("p")


async def number(s: Steps, key: str) -> int:
    return int(await s.db.fetchval("SELECT hashtext($1) & 255", key))


async def key_locks(s: Steps) -> set[int]:
    """The key locks that no session holds."""
    return {row[0] for row in await s.db.fetch("SELECT n FROM notifyq.key_lock FOR UPDATE SKIP LOCKED")}


@pytest.fixture
async def low_and_high(s: Steps) -> tuple[int, int]:
    low, high = await number(s, "limit:k3"), await number(s, "limit:k1")
    assert low < high, "the keys of these tests are chosen so"
    return low, high


async def test_key_locks_are_taken_by_number(s: Steps, w: Session, p: Session, low_and_high: tuple[int, int]) -> None:
    """The order of the tasks doesn't matter: a worker that waits for the lower lock doesn't hold the higher one."""
    low, high = low_and_high
    [first] = await w(held, options=HIGH)
    [second] = await w(held, options=LOW)
    await w("UPDATE notifyq.task SET worker = $1", first.worker)
    second.worker = first.worker
    for waits_for, holds in ((low, set[int]()), (high, {low})):
        await p("BEGIN")
        await p("SELECT FROM notifyq.key_lock WHERE n = $1 FOR UPDATE", waits_for)
        waiting = await w.blocked_by(p, admit, [first, second])
        assert {low, high} - await key_locks(s) - {waits_for} == holds
        await p("COMMIT")
        await waiting


@pytest.mark.parametrize("verb", [admit, free])
async def test_a_worker_that_waits_for_a_key_lock_holds_no_row_of_a_task(
    s: Steps, w: Session, p: Session, verb: Any
) -> None:
    """It doesn't hold the bell either. So a session that has those locks waits for no worker that waits here."""
    [job] = await w(held, options=LOW)
    await s.db.execute("INSERT INTO notifyq.slot_released (task, ended, queue, limit_key) VALUES (0, false, '', 'k3')")
    await p("BEGIN")
    await p("SELECT FROM notifyq.key_lock FOR UPDATE")
    waiting = await w.blocked_by(p, verb, *([[job]] if verb is admit else []))
    await s.db.fetch(EVERY_ROW)
    await s.db.execute("BEGIN; LOCK TABLE notifyq.bell IN SHARE MODE NOWAIT; COMMIT")
    await p("COMMIT")
    await waiting


async def test_the_lock_of_ends_is_the_last_key_lock(s: Steps, w: Session, p: Session) -> None:
    """A worker that waits for it holds all the key locks that it needs."""
    [needed] = await insert(s.db, run_at="3000-01-01")
    [job] = await w(held, options=f'{{"after": [{needed}]}}')
    assert await w(admit, [job]) == [(job.id, "after")]
    await s.db.execute("DELETE FROM notifyq.task WHERE id = $1", needed)
    await s.db.execute("INSERT INTO notifyq.slot_released (task, ended, queue, limit_key) VALUES (0, false, '', 'k3')")
    await p("BEGIN")
    await p("SELECT FROM notifyq.key_lock WHERE n = -1 FOR UPDATE")
    waiting = await w.blocked_by(p, free)
    assert await number(s, "limit:k3") not in await key_locks(s)
    await s.db.fetch(EVERY_ROW)
    await p("COMMIT")
    assert await waiting == 1


async def test_no_claim_and_no_chore_waits_for_the_row_of_a_task(s: Steps, w: Session, p: Session) -> None:
    """A stranger has locked every row, also of tasks that wait, are due, or belong to a worker that vanished."""
    [needed] = await insert(s.db, run_at="3000-01-01")
    [job] = await w(held, options=LOW)
    [after] = await w(held, options=f'{{"after": [{needed}]}}')
    [lost] = await w(held)
    await w(silent, lost.worker)
    [unowned] = await w(held)
    await w("DELETE FROM notifyq.worker WHERE id = $1", unowned.worker)
    [ready] = await insert(s.db)
    await insert(s.db, withheld=True)
    await insert(s.db, withheld=True, parked="limit", waiting_on="limit:k3", options=LOW)
    [due] = await insert(s.db, **OVERDUE)
    await s.db.execute("INSERT INTO notifyq.slot_released (task, ended, queue, limit_key) VALUES (0, false, '', 'k3')")
    await p("BEGIN")
    await p("SELECT FROM notifyq.task FOR UPDATE")
    me = await w(register)
    for take in (claim, claim_from_cursor, claim_unhandled):
        assert await w(take, me) == []
    assert await w(claim_by_id, me, [ready], 9) == []
    assert await w(admit, [job]) == await w(admit, [after]) == []
    assert await w(free) == 0
    assert await w(promote) == 0
    assert await w(SQL["promote_by_id"], [due]) == []
    assert await w(SQL["write_progress"], job.worker, [job.id], [job.attempt], [0.5], ["half"]) == []
    assert len(await w(SQL["list_locked"], [job.id])) == 1
    assert [row["marked"] for row in await w(SQL["read_and_await"], [job.id])] == [False]
    await w(SQL["correct_misdated"], [due], [job.id])
    assert await w(rescue, lost.worker) == ("host:1", 0, 0)
    assert await w(reclaim_unowned) == 0
    await w("SELECT notifyq.recheck_waiting('', 9)")
    waiting = await w.blocked_by(p, hand_back, [job])  # as settling does
    await p("COMMIT")
    assert await waiting == [job.id]


async def test_a_worker_that_waits_for_the_turn_or_the_bell_holds_no_more_than_these(
    s: Steps, w: Session, p: Session
) -> None:
    """It holds its liveness, which no session waits for; and the turn, while it waits for the bell."""
    await w(prove_alive, 5)
    await p("SELECT pg_advisory_lock(1852990836, 7)")
    waiting = await w.blocked_by(p, "SELECT notifyq.take_turn(7, 60000)")
    assert await locks(s, w) == [("advisory", 1852990827, "ShareLock")]
    await p("SELECT pg_advisory_unlock(1852990836, 7)")
    await waiting
    await p("BEGIN")
    await p("LOCK TABLE notifyq.bell IN ROW EXCLUSIVE MODE")
    await w("BEGIN")
    waiting = await w.blocked_by(p, "SELECT notifyq.fall_asleep(60000)")
    assert await locks(s, w) == [("advisory", 1852990827, "ShareLock"), ("advisory", 1852990836, "ExclusiveLock")]
    await p("COMMIT")
    await waiting
    assert ("relation", None, "ShareLock") in await locks(s, w)


async def test_two_that_postpone_the_same_release(s: Steps, w: Session, p: Session) -> None:
    """Neither waits for the rows of the other, although each wants all of them."""
    other = await s.worker("other")
    await s.db.execute(
        "INSERT INTO notifyq.slot_released (task, ended, queue, limit_key)"
        " SELECT 0, false, '', 'k3' FROM generate_series(1, 5)"
    )
    await p("BEGIN")
    await p("SELECT FROM notifyq.slot_released WHERE n = 2 FOR UPDATE")
    await w("BEGIN")
    assert len(await w(SQL["postpone_release"])) == 1
    assert await other(SQL["postpone_release"]) == []
    await w("COMMIT")
    await p("COMMIT")
    assert await s.db.fetchval("SELECT count(*) FROM notifyq.slot_released") == 2


async def test_forgetting_keys_waits_for_no_enqueuer(s: Steps, w: Session, p: Session) -> None:
    """While it waited it would hold some keys, for which that enqueuer could then wait."""
    await s.db.execute(
        "INSERT INTO notifyq.unique_key SELECT key, 1000, now(), now() FROM unnest('{first,second}'::text[]) AS key"
    )
    await p("BEGIN")
    await p("""INSERT INTO notifyq.task (type, options) VALUES ('x', '{"unique_key": "second"}')""")
    await w(SQL["forget_keys_of_future_ids"])
    assert [row[0] for row in await s.db.fetch("SELECT key FROM notifyq.unique_key")] == ["second"]
    await p("""INSERT INTO notifyq.task (type, options) VALUES ('x', '{"unique_key": "first"}')""")
    await p("COMMIT")


async def locks(s: Steps, session: Session) -> list[tuple[Any, ...]]:
    """The locks that it has been granted, but for those on its own transaction's id and those that reading takes."""
    rows = await s.db.fetch(
        "SELECT DISTINCT locktype, classid::bigint, mode FROM pg_locks WHERE pid = $1 AND granted"
        " AND locktype IN ('advisory', 'relation', 'tuple') AND mode <> 'AccessShareLock' ORDER BY 1, 2",
        session.pid,
    )
    return [tuple(row) for row in rows]
