"""Slots of a limit, step by step: which task is admitted, which waits, and where a released slot goes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from notifyq.database.connection import SQL
from notifyq.worker import job as claims

from ..helpers import verbs
from ..helpers.limits import ONE
from ..helpers.steps import steps
from ..helpers.verbs import admit, free

RATE: dict[str, Any] = {"options": '{"limit_key": "a", "limit_rate": 2, "limit_seconds": 3600}'}


@pytest.fixture
async def worker(db: Any) -> int:
    return await verbs.register(db)


async def test_two_workers_are_admitted_one_after_the_other(dsn: str) -> None:
    """The second waits for the lock of the key, and then counts what the first has done."""
    async with steps(dsn) as s:
        a, b = await s.worker("claims a"), await s.worker("claims b")
        one, two = await verbs.register(s.db), await verbs.register(s.db)
        first, second = await verbs.insert(s.db, 2, **ONE)
        mine, others = await a(verbs.claim, one, 1), await b(verbs.claim, two, 1)
        await a("BEGIN")
        assert await a(admit, mine) == [(first, None)]
        waiting = await b.blocked_by(a, admit, others)
        await a("COMMIT")
        assert await waiting == [(second, "limit")]


async def test_a_task_ends_during_the_admission_of_another(dsn: str) -> None:
    """The task that ends was counted as running, so the other is being parked. release_waiters waits until that is
    committed."""
    async with steps(dsn) as s:
        a, b = await s.worker("claims a"), await s.worker("claims b")
        one, two = await verbs.register(s.db), await verbs.register(s.db)
        first, second = await verbs.insert(s.db, 2, **ONE)
        running = await a(verbs.claim, one, 1)
        assert await a(admit, running) == [(first, None)]
        claimed = await b(verbs.claim, two, 1)
        await b("BEGIN")
        assert await b(admit, claimed) == [(second, "limit")]
        assert await a(verbs.finish, running) == [first]
        waiting = await a.blocked_by(b, free)
        await b("COMMIT")
        assert await waiting == 1
        assert await a(admit, await a(verbs.claim, one)) == [(second, None)]


async def test_only_one_of_two_workers_grants_a_released_slot(dsn: str) -> None:
    """The other neither waits for it nor does the same again."""
    async with steps(dsn) as s:
        a, b = await s.worker("claims a"), await s.worker("claims b")
        first, second = await verbs.insert(s.db, 2, **ONE)
        jobs = await a(verbs.claim, await verbs.register(s.db))
        assert await a(admit, jobs) == [(first, None), (second, "limit")]
        assert await a(verbs.finish, jobs[:1]) == [first]
        await a("BEGIN")
        assert await a(free) == 1
        assert await b(free) == 0
        await a("COMMIT")
        assert await verbs.states(s.db) == {first: ("done", 1), second: ("ready", 0)}


async def test_a_task_that_a_session_is_cancelling_is_handed_back(dsn: str) -> None:
    """That transaction may take hours. No session waits for it, or for the lock of the key: the worker hands the task
    back."""
    async with steps(dsn) as s:
        psql, claims, settle = await s.session("psql"), await s.worker("claims"), await s.worker("settle")
        id = await verbs.register(s.db)
        first, second, third = await verbs.insert(s.db, 3, **ONE)
        jobs = await claims(verbs.claim, id, 2)
        await psql("BEGIN")
        assert await psql(verbs.cancel, first)
        assert await claims(admit, jobs) == [(second, None)]
        waiting = await settle.blocked_by(psql, verbs.hand_back, jobs[:1])
        await psql("ROLLBACK")
        assert await waiting == [first]
        # Now it is parked, and the next one gets the slot.
        more = await claims(verbs.claim, id)
        assert await claims(admit, more) == [(first, "limit"), (third, "limit")]
        await psql("BEGIN")
        assert await psql(verbs.cancel, first)
        assert await claims(verbs.finish, jobs[1:]) == [second]
        assert await claims(free) == 1
        assert await claims(admit, await claims(verbs.claim, id)) == [(third, None)]


async def test_starts_are_remembered_for_the_longest_window(db: Any, worker: int) -> None:
    """Tasks of one key have different windows. A start within the last hour counts for a task that asks for an hour,
    though the task that started asked for a second."""
    window = '{"limit_key": "a", "limit_rate": 2, "limit_seconds": %s}'

    async def verdict(seconds: float) -> str | None:
        await verbs.insert(db, options=window % seconds)
        [(_, why)] = await admit(db, await verbs.claim(db, worker))
        return why

    assert await verdict(3600) is None
    assert await verdict(1) is None
    await db.execute("UPDATE notifyq.rate_log SET at = at - interval '1 min'")
    await verbs.prune_started(db)
    assert await verdict(3600) == "rate"


async def test_starts_that_no_window_reaches_are_forgotten(db: Any, worker: int) -> None:
    """The prune deletes them, also those of a key that no task comes with any more."""
    await verbs.insert(db, **RATE)
    await admit(db, await verbs.claim(db, worker))
    await verbs.prune_started(db)
    assert await db.fetchval("SELECT count(*) FROM notifyq.rate_log") == 1
    await db.execute("UPDATE notifyq.rate_log SET at = at - interval '2 h'")
    await verbs.prune_started(db)
    assert await db.fetchval("SELECT count(*) FROM notifyq.rate_log") == 0


async def test_a_retried_task_keeps_its_keys(db: Any, worker: int) -> None:
    options = '{"order_key": "o", "limit_key": "l", "limit_running": 1}'
    jobs = await verbs.held(db, options=options)
    await verbs.finish(db, jobs, "dead")
    assert await verbs.retry(db, jobs[0].id)
    row = await db.fetchrow("SELECT order_key, limit_key, watched, options FROM notifyq.task")
    assert tuple(row)[:3] == ("o", "l", True)
    assert json.loads(row["options"]) == json.loads(options)


async def test_a_granted_slot_is_reserved_for_its_task(db: Any, worker: int) -> None:
    """A newcomer that is claimed first doesn't take the slot. Once the grant is older than 2 s, it may."""
    first, second = await verbs.insert(db, 2, **ONE)
    running = await verbs.claim(db, worker)
    assert await admit(db, running) == [(first, None), (second, "limit")]
    assert await verbs.finish(db, running[:1]) == [first]
    assert await free(db) == 1
    [newcomer] = await verbs.insert(db, priority=5, **ONE)
    jobs = await verbs.claim(db, worker, 1)
    assert await admit(db, jobs) == [(newcomer, "limit")]
    await db.execute("UPDATE notifyq.task SET run_at = run_at - interval '3 s' WHERE id = $1", second)
    assert await db.fetchval("SELECT notifyq.recheck_waiting()") is None
    assert await free(db) == 1
    assert await admit(db, await verbs.claim(db, worker, 1)) == [(newcomer, None)]
    assert await admit(db, await verbs.claim(db, worker)) == [(second, "limit")]


@pytest.mark.parametrize("how", ["done", "to be tried again", "cancelled", "deleted", "released", "rescued", "unowned"])
async def test_every_end_of_an_attempt_releases_its_slot(db: Any, worker: int, how: str) -> None:
    """However an attempt ends, the next task is released, though the first may come back."""
    first, second = await verbs.insert(db, 2, **ONE)
    jobs = await verbs.claim(db, worker)
    assert await admit(db, jobs) == [(first, None), (second, "limit")]
    match how:
        case "done":
            assert await verbs.finish(db, jobs[:1]) == [first]
        case "to be tried again":
            assert await verbs.later(db, jobs[:1], 3600.0) == [first]
        case "cancelled":
            assert await verbs.cancel(db, first)
        case "deleted":
            await db.execute("DELETE FROM notifyq.task WHERE id = $1", first)
        case "released":
            assert await verbs.hand_back_all(db, worker) == 1
        case "rescued":
            await verbs.silent(db, worker)
            assert (await verbs.rescue(db, worker))[1] == 1
        case _:
            await db.execute("DELETE FROM notifyq.worker")
            assert await verbs.reclaim_unowned(db) == 1
    assert await free(db) == 1
    jobs = await verbs.claim(db, await verbs.register(db))
    ready = (
        [(second, None)]
        if how in ("done", "to be tried again", "cancelled", "deleted")
        else [(first, None), (second, "limit")]
    )
    assert await admit(db, jobs) == ready


@pytest.mark.parametrize("how", ["cancelled", "unhandled", "handed back"])
async def test_a_grant_that_is_given_up_is_passed_on(db: Any, worker: int, how: str) -> None:
    first, second, third = await verbs.insert(db, 3, **ONE)
    running = await verbs.claim(db, worker)
    assert await admit(db, running) == [(first, None), (second, "limit"), (third, "limit")]
    assert await verbs.finish(db, running[:1]) == [first]
    assert await free(db) == 1
    if how == "cancelled":
        assert await verbs.cancel(db, second)
    else:
        granted = await verbs.claim(db, worker)
        assert [job.id for job in granted] == [second]
        assert await (verbs.release_unhandled if how == "unhandled" else verbs.hand_back)(db, granted) == [second]
    assert await free(db) == (0 if how == "handed back" else 1), "a task that is handed back keeps its grant"
    next_one = second if how == "handed back" else third
    assert await admit(db, await verbs.claim(db, worker)) == [(next_one, None)]


async def test_a_newcomer_does_not_overtake_waiting_tasks(db: Any, worker: int) -> None:
    """A slot is free, and a newcomer is admitted before release_waiters has run: it waits behind the others."""
    first, second = await verbs.insert(db, 2, **ONE)
    jobs = await verbs.claim(db, worker)
    assert await admit(db, jobs) == [(first, None), (second, "limit")]
    assert await verbs.finish(db, jobs[:1]) == [first]
    [newcomer] = await verbs.insert(db, **ONE)
    assert await admit(db, await verbs.claim(db, worker)) == [(newcomer, "limit")]
    assert await admit(db, await verbs.claim(db, worker)) == [(second, None)]
    assert await free(db) == 0


async def test_a_paused_queue_takes_no_slots(db: Any, worker: int) -> None:
    """Tasks of the key that wait in a paused queue are passed over, by newcomers too. When the queue is resumed, they
    are released."""
    first, second = await verbs.insert(db, 2, **ONE)
    jobs = await verbs.claim(db, worker)
    assert await admit(db, jobs) == [(first, None), (second, "limit")]
    assert await db.fetchval("SELECT notifyq.pause('default')")
    assert await verbs.finish(db, jobs[:1]) == [first]
    assert await free(db) == 0
    [other] = await verbs.insert(db, queue="other", **ONE)
    [job] = await claims.claim(db, worker, {"other": 1}, 1)
    assert await admit(db, [job]) == [(other, None)]
    assert await verbs.finish(db, [job]) == [other]
    assert await free(db) == 0
    assert await db.fetchval("SELECT notifyq.resume('default')")
    assert await free(db) == 1
    assert await admit(db, await verbs.claim(db, worker)) == [(second, None)]


async def test_a_rate_grants_ahead(db: Any, worker: int) -> None:
    """The slot of each start is granted to the next task, for the time when it is free again. If that task is
    cancelled, the one after it gets the slot."""
    ids = await verbs.insert(db, 5, **RATE)
    jobs = await verbs.claim(db, worker)
    assert await admit(db, jobs) == [(ids[0], None), (ids[1], None)] + [(id, "rate") for id in ids[2:]]
    scheduled = """SELECT id FROM notifyq.all_tasks WHERE state = 'scheduled' AND waits_for IS NULL
                   AND run_at BETWEEN now() + interval '59 min' AND now() + interval '60 min' ORDER BY id"""
    assert [row[0] for row in await db.fetch(scheduled)] == ids[2:4]
    assert await verbs.cancel(db, ids[2])
    assert await free(db) == 1
    assert [row[0] for row in await db.fetch(scheduled)] == ids[3:]
    # A task that was handed back, or failed, and starts again counts again.
    assert await verbs.hand_back(db, jobs[:1]) == [ids[0]]
    assert await admit(db, await verbs.claim(db, worker)) == [(ids[0], "rate")]


async def test_a_rate_when_the_time_has_come(db: Any, worker: int) -> None:
    ids = await verbs.insert(db, 5, **RATE)
    await admit(db, await verbs.claim(db, worker))
    await db.fetchval(SQL["advance_clock"], 3601.0)
    assert await verbs.promote(db) == 2
    assert await admit(db, await verbs.claim(db, worker)) == [(ids[2], None), (ids[3], None)]
    await db.fetchval(SQL["advance_clock"], 3601.0)
    assert await verbs.promote(db) == 1
    assert await admit(db, await verbs.claim(db, worker)) == [(ids[4], None)]
    assert await db.fetchval("SELECT count(*) FROM notifyq.rate_log") == 1, "the others are forgotten"


async def test_each_task_counts_by_its_own_limit(db: Any, worker: int) -> None:
    """The tasks of the key have different limits: none runs beyond its own."""
    for limit in (1, 3, 3, 2):
        await verbs.insert(db, options=json.dumps({"limit_key": "a", "limit_running": limit}))
    assert [why for _, why in await admit(db, await verbs.claim(db, worker))] == [None, None, None, "limit"]


@pytest.mark.parametrize(
    ("limits", "most"),
    [
        ('"limit_running": 2147483647, "limit_rate": 2147483647, "limit_seconds": 1e-300', 4),
        ('"limit_running": 3.0', 3),
        ('"limit_rate": 30e-1, "limit_seconds": 1000000000.0', 3),
        ('"limit_running": 3, "limit_rate": null, "limit_seconds": null, "order_key": null', 3),
    ],
)
async def test_odd_limits(db: Any, worker: int, limits: str, most: int) -> None:
    """They are in force, and no claim fails because of them."""
    ids = await verbs.insert(db, 4, options=f'{{"limit_key": "{"a" * 200}", {limits}}}')
    jobs = await verbs.claim(db, worker)
    why = "limit" if "running" in limits else "rate"
    assert await admit(db, jobs) == [(id, None if n < most else why) for n, id in enumerate(ids)]
    assert await verbs.finish(db, jobs[:1]) == ids[:1]
    assert await free(db) == (1 if why == "limit" and most < 4 else 0), "a rate has granted ahead"


@pytest.mark.parametrize(
    "odd",
    [
        "options - 'limit_seconds'",
        """options || '{"limit_running": "many", "limit_rate": 1e400, "limit_seconds": [null]}'""",
        """options || '{"limit_running": 0, "limit_rate": -1, "limit_seconds": 1e-400}'""",
        "'[1]'",
        "'7'",
        "NULL",
    ],
)
async def test_limits_that_an_update_has_made_odd(db: Any, worker: int, odd: str) -> None:
    """A rate without its time, a limit without its key, a value that isn't a number: none is a limit, and none fails a
    claim."""
    await verbs.insert(db, 2, options='{"order_key": "c"}')
    await verbs.insert(db, 2, options='{"limit_key": "b", "limit_rate": 1, "limit_seconds": 1e9}')
    await db.execute(f"UPDATE notifyq.task SET options = {odd} WHERE limit_key = 'b'")
    without = """'{"order_key": 7, "limit_running": 1, "limit_rate": 1, "after": {}, "on_dead": 7}'"""
    await db.execute(f"UPDATE notifyq.task SET options = {without}, order_key = id WHERE limit_key IS NULL")
    assert [why for _, why in await admit(db, await verbs.claim(db, worker))] == [None] * 4
