"""Where a claim begins to read: at the head, or at a cursor; and that no task stays hidden before a cursor."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import anyio
import pytest

import notifyq
from notifyq.worker import cursors, state
from notifyq.worker.cursors import (
    BUSY_SECONDS,
    BUSY_TIMES,
    HEAD_SCAN_TIMES,
    LAG_SECONDS,
    LEVELS,
    PATIENCE_SECONDS,
    Cursors,
    FromCursor,
)
from notifyq.worker.job import Job

from ..helpers.databases import Sessions
from ..helpers.machine import Probe, limit
from ..helpers.running import working
from ..helpers.waiting import Seen, asleep, eventually

HEAD, CURSOR = False, True


def job(id: int, queue: str = "q", priority: int = 0) -> Job:
    return Job(1, (id, 1, "T", queue, priority, None, datetime.now(UTC), b"{}", False, None))  # type: ignore[arg-type]


def after_claims_of(*jobs: Job, slow: bool) -> tuple[Cursors, float]:
    """Cursors some time after a claim from the head took these jobs, and the time then."""
    m = Cursors()
    m.claimed(jobs, HEAD, 0.001, 10.0)
    m.claimed([], HEAD, 0.001, 10.0 + LAG_SECONDS)
    now = 10.0 + 2 * LAG_SECONDS
    for _ in range(2):
        m.claimed([], HEAD, 1.0 if slow else 0.001, now)
    return m, now


def test_a_healthy_claim_without_a_backlog_is_from_the_head() -> None:
    m, now = after_claims_of(job(7), slow=False)
    assert m.from_cursor(now, backlog=False) is None
    assert m.head_scan_at == float("inf")


def test_under_a_backlog_most_claims_begin_at_a_cursor() -> None:
    m, now = after_claims_of(job(7), slow=False)
    assert m.from_cursor(now, backlog=True) == FromCursor(["q"], [0], [7])
    assert m.from_cursor(now + BUSY_SECONDS, backlog=True) is None, "one from the head, now and then"
    m, now = after_claims_of(job(7), slow=True)
    assert m.from_cursor(now + BUSY_TIMES - 0.1, backlog=True), "it took a second: not so soon again"
    assert m.from_cursor(now + BUSY_TIMES, backlog=True) is None


def test_after_a_slow_claim_cursors_answer_first_and_the_head_later() -> None:
    m, now = after_claims_of(job(7), slow=True)
    assert m.from_cursor(now, backlog=False) == FromCursor(["q"], [0], [7])
    m.claimed([job(8)], CURSOR, 0.001, now)
    assert m.head_scan_at == now + HEAD_SCAN_TIMES
    assert m.from_cursor(m.head_scan_at, backlog=False) is None
    m.claimed([], HEAD, 0.001, m.head_scan_at)
    assert m.head_scan_at == float("inf"), "that was it"


def test_a_claim_that_was_held_up_once_is_no_sign() -> None:
    m, now = after_claims_of(job(7), slow=False)
    m.claimed([], HEAD, 2.5, now)
    assert m.from_cursor(now, backlog=False) is None
    assert m.from_cursor(now + BUSY_SECONDS, backlog=True) is None
    m.claimed([], HEAD, 0.5, now)
    assert m.from_cursor(now, backlog=False), "so it is slow, and half a second of it"
    assert m.from_cursor(now + HEAD_SCAN_TIMES / 2, backlog=False) is None


def test_cursors_that_do_not_help_are_left_alone_for_a_while() -> None:
    m, now = after_claims_of(job(7), slow=True)
    m.claimed([], CURSOR, 0.9, now)  # as slow as from the head: the network is
    assert m.from_cursor(now, backlog=False) is None
    assert m.head_scan_at == now
    m.claimed([], HEAD, 1.0, now + 1)
    assert m.from_cursor(now + 1, backlog=False) is None
    m.claimed([], HEAD, 1.0, now + PATIENCE_SECONDS)
    assert m.from_cursor(now + PATIENCE_SECONDS, backlog=False)


def test_a_cursor_is_behind_by_a_moment() -> None:
    """Ids become visible in about their order, not quite: a task claimed just now moves no cursor yet."""
    m, now = after_claims_of(job(7), slow=False)
    m.claimed([job(20)], CURSOR, 0.001, now + LAG_SECONDS / 2)
    for _ in range(2):
        assert m.from_cursor(now, backlog=True) == FromCursor(["q"], [0], [7])
        now += LAG_SECONDS
        m.claimed([], CURSOR, 0.001, now)
    now += LAG_SECONDS
    m.claimed([], CURSOR, 0.001, now)
    m.claimed([], HEAD, 0.001, now)
    assert m.from_cursor(now, backlog=True) == FromCursor(["q"], [0], [20])


def test_levels_are_apart_and_the_highest_priority_comes_first() -> None:
    m, now = after_claims_of(job(9, priority=5), job(3), job(4), job(2, "other", 7), slow=False)
    assert m.from_cursor(now, backlog=True) == FromCursor(["other", "q", "q"], [7, 5, 0], [2, 9, 4])


def test_more_levels_than_can_be_kept_apart_are_not() -> None:
    m, now = after_claims_of(*(job(n, priority=n) for n in range(LEVELS + 1)), slow=False)
    assert m.from_cursor(now, backlog=True) is None


def force(monkeypatch: pytest.MonkeyPatch, times: float) -> None:
    """Cursors as soon and as often as can be: a claim from the head counts as slow, and rests for `times` as long."""
    for module in (cursors, state):
        monkeypatch.setattr(module, "SLOW_SECONDS", -1.0)
        monkeypatch.setattr(module, "HEAD_SCAN_TIMES", times)
    monkeypatch.setattr(cursors, "PATIENCE_SECONDS", 0.0)
    monkeypatch.setattr(cursors, "LAG_SECONDS", 0.0)


async def test_a_task_before_a_cursor_is_found(
    monkeypatch: pytest.MonkeyPatch, dsn: str, db: Any, connect: Sessions
) -> None:
    """A transaction that stayed open, a new priority, a task made ready again: all start, though nothing rings for
    them after the cursors have gone past, and the fallback poll is off."""
    force(monkeypatch, 200.0)
    app, seen = notifyq.App(), Seen()

    class Mark(notifyq.Task):
        backoff = 0.0
        name: str
        fail: bool = False

    @app.handler
    async def run(task: Mark, ctx: notifyq.Context) -> None:
        if task.fail and ctx.attempt == 1:
            raise ValueError("once")
        seen.add(task.name)

    straggler = await connect()
    open_one = straggler.transaction()
    await open_one.start()
    await app.enqueue(Mark("straggler"), conn=straggler)
    async with working(app, dsn):
        for n in range(20):
            await app.enqueue(Mark(str(n)), conn=db)
            await seen.reach(n + 1)
        await open_one.commit()
        await app.enqueue(Mark("again", fail=True), conn=db)
        await app.enqueue(Mark("urgent"), conn=db, priority=9)
        await app.enqueue(Mark("timed"), conn=db, delay=0.05)
        with anyio.fail_after(limit()):
            await seen.reach(24)
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.task"), 0)
    assert sorted(seen.items[20:]) == ["again", "straggler", "timed", "urgent"]


async def test_a_timed_task_that_is_seen_late_is_found(
    monkeypatch: pytest.MonkeyPatch, dsn: str, db: Any, connect: Sessions
) -> None:
    """It was inserted in a transaction that stayed open until long after its time. By then the due
    check has a cursor of its own. It looks before that cursor again although no bell and no poll asks it to."""
    force(monkeypatch, 300.0)
    monkeypatch.setattr(state, "ECHO_SECONDS", 3600.0)
    app, seen = notifyq.App(), Seen()

    class Mark(notifyq.Task):
        name: str

    @app.handler
    async def run(task: Mark) -> None:
        seen.add(task.name)

    straggler = await connect()
    open_one = straggler.transaction()
    await open_one.start()
    await app.enqueue(Mark("late"), conn=straggler, delay=0.001)
    async with working(app, dsn):
        for n in range(5):
            await app.enqueue(Mark(str(n)), conn=db, delay=0.03)
            await seen.reach(n + 1)
        await open_one.commit()
        assert (await seen.reach(6))[5] == "late"


@pytest.mark.parametrize("what", ["claim", "timer"])
async def test_a_claim_that_waited_for_a_lock_delays_none_later(
    what: str, dsn: str, db: Any, connect: Sessions, probe: Probe
) -> None:
    """A claim that waited for the lock took long, but isn't slow. So tasks before the cursors still start at once."""
    app, seen = notifyq.App(), Seen()

    class Mark(notifyq.Task):
        name: str = ""

    @app.handler
    async def run(task: Mark) -> None:
        seen.add(task.name)

    stranger = await connect()
    waits = """SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid)
               WHERE relation = 'notifyq.task'::regclass AND NOT granted AND application_name LIKE 'notifyq claims %'"""
    async with working(app, dsn):
        until = anyio.current_time() + 5 * LAG_SECONDS
        count = 0
        while anyio.current_time() < until:
            await app.enqueue(Mark("first"), conn=db)
            count = len(await seen.reach(count + 1))
        if what == "timer":
            await app.enqueue(Mark("timed"), conn=db, delay=1)
        await asleep(db)
        async with stranger.transaction():
            await stranger.execute("LOCK TABLE notifyq.task IN ACCESS EXCLUSIVE MODE")
            if what == "claim":
                await db.execute("NOTIFY notifyq")
            await eventually(lambda: db.fetchval(waits), 1)
            await anyio.sleep(0.5)  # so that it takes long
        if what == "claim":
            await app.enqueue(Mark("urgent"), conn=db, priority=9)
        else:
            count = len(await seen.reach(count + 1))
            await db.execute(
                """INSERT INTO notifyq.task (type, created_at, run_at)
                   VALUES ('Mark', now() - interval '2 min', now() - interval '1 min')"""
            )
        with probe.within(2):
            await seen.reach(count + 1)
