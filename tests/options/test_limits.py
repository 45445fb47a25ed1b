"""Limits: how many of a key, or of a queue, run at once and start in a time, over all workers, whatever dies."""

from __future__ import annotations

import itertools
import json
import math
import random
import signal
import time
from collections.abc import Iterable
from typing import Any

import anyio
import pytest

import notifyq
from notifyq.database.connection import SQL
from notifyq.options import parse_rate
from notifyq.worker import job as claims

from ..helpers import verbs
from ..helpers.limits import ONE, Bench, idle
from ..helpers.machine import Probe
from ..helpers.processes import Spawn, Story, started
from ..helpers.running import working
from ..helpers.steps import steps
from ..helpers.verbs import admit, free
from ..helpers.waiting import eventually

# What notifyq.rate_log forgets with the time of a rate.
STARTS = """
    CREATE TABLE ledger (key text, at timestamptz, n integer);
    CREATE FUNCTION note() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN INSERT INTO public.ledger VALUES (NEW.key, NEW.at, NEW.n); RETURN NULL; END $$;
    CREATE TRIGGER note AFTER INSERT ON notifyq.rate_log FOR EACH ROW EXECUTE FUNCTION note()"""


async def begun(db: Any, key: str) -> list[float]:
    """When tasks of a key or a queue were admitted, by the database's clock."""
    rows = await db.fetch("SELECT at, n FROM ledger WHERE key = $1 ORDER BY at", key)
    return [row["at"].timestamp() for row in rows for _ in range(row["n"])]


def closest(starts: list[float], count: int) -> float:
    """The shortest time in which one more than `count` started."""
    return min(later - first for first, later in zip(starts, starts[count:], strict=False))


async def test_at_most_so_many_of_a_key(dsn: str, db: Any) -> None:
    """Over two workers, and always as many as may; others go by; each key by itself."""
    bench = Bench()
    async with bench.app.connect(dsn) as app, working(app, dsn), working(app, dsn):
        for key, limit in (("a", 1), ("b", 3)):
            tasks = [bench.Job(key=key, seconds=0.02) for _ in range(12)]
            await app.enqueue_many(tasks, limit_key=key, limit=limit)
        await app.enqueue_many([bench.Job(key="free", seconds=0.02) for _ in range(12)])
        await bench.ended.reach(36)
        await idle(db)
    assert (bench.most["a"], bench.most["b"]) == (1, 3)
    assert bench.most["free"] > 3


async def test_a_freed_slot_is_taken_at_once(dsn: str, db: Any, probe: Probe) -> None:
    """By a bell, not by a poll: 20 tasks of no length, one at a time, in a small part of a second."""
    bench = Bench()
    async with bench.app.connect(dsn) as app, working(app, dsn), working(app, dsn):
        began = time.monotonic()
        await app.enqueue_many([bench.Job(key="a") for _ in range(20)], limit_key="a", limit=1)
        await bench.ended.reach(20)
        took = time.monotonic() - began
    print(f"{took / 20 * 1000:.1f} ms a task")
    assert took < 3 + probe.lost(began)


async def test_what_fails_and_what_is_cancelled_leaves_its_slot(dsn: str, db: Any) -> None:
    bench = Bench()
    async with bench.app.connect(dsn) as app, working(app, dsn):
        first = await app.enqueue(bench.Job(key="a", seconds=60), limit_key="a", limit=1)
        await bench.begun.reach(1)
        await app.enqueue_many([bench.Job(key="a", fails=2) for _ in range(3)], limit_key="a", limit=1)
        parked = "SELECT count(*) FROM notifyq.all_tasks WHERE waits_for = 'limit'"
        await eventually(lambda: db.fetchval(parked), 3)
        assert await db.fetchval("SELECT notifyq.cancel($1)", first.id)
        await bench.ended.reach(3)
        await idle(db)
    assert len(bench.begun.items) == 1 + 9


async def test_a_rate(dsn: str, db: Any, probe: Probe) -> None:
    """5 in half a second: in no such time do more start, by the database's clock; none waits longer than it must."""
    bench = Bench()
    await db.execute(STARTS)
    async with bench.app.connect(dsn) as app, working(app, dsn), working(app, dsn):
        began = time.monotonic()
        tasks = [bench.Job(key="a") for _ in range(18)]
        await db.execute(
            """INSERT INTO notifyq.task (type, payload, options)
               SELECT 'Job', '{"key": "a"}', '{"limit_key": "a", "limit_rate": 5, "limit_seconds": 0.5}'
               FROM generate_series(1, $1::integer)""",
            len(tasks),
        )
        await bench.ended.reach(18)
        took = time.monotonic() - began
        await idle(db)
    assert took < 3 * 0.5 + 0.4 + probe.lost(began)
    starts = await begun(db, "limit:a")
    assert len(starts) == 18
    assert closest(starts, 5) > 0.5 - 0.000_001


async def test_one_key_with_many_tasks_costs_each_a_few_writes(dsn: str, db: Any) -> None:
    """Parked once, granted once: not touched again and again while they wait, and in nobody's way."""
    bench = Bench()
    many = 1000
    async with bench.app.connect(dsn) as app:
        await app.enqueue_many([bench.Job(key="a") for _ in range(many)], limit_key="a", limit=3)
        plain = await app.enqueue(bench.Job(key="free"))
        before = await updates(db)
        began = time.monotonic()
        async with working(app, dsn), working(app, dsn):
            while plain.id not in bench.ended.items:
                await bench.ended.reach(len(bench.ended.items) + 1)
            behind = time.monotonic() - began
            await bench.ended.reach(many + 1)
            await idle(db)
            took = time.monotonic() - began
    each = (await updates(db) - before) / many
    print(f"{each:.2f} updates a task, {took / many * 1e6:.0f} µs each; the plain one behind them after {behind:.2f} s")
    assert bench.most["a"] <= 3
    assert each < 6.5  # claimed, parked; granted, claimed, admitted


# --- Step by step

RATE: dict[str, Any] = {"options": '{"limit_key": "a", "limit_rate": 2, "limit_seconds": 3600}'}


@pytest.fixture
async def worker(db: Any) -> int:
    return await verbs.register(db)


async def test_two_workers_are_admitted_one_after_the_other(dsn: str) -> None:
    """The second waits for the gate, and then counts what the first has done."""
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


async def test_an_end_while_somebody_is_judged(dsn: str) -> None:
    """It was counted as running, and the task is parked for it: who lets others in waits for that to be written."""
    async with steps(dsn) as s:
        a, b = await s.worker("claims a"), await s.worker("claims b")
        one, two = await verbs.register(s.db), await verbs.register(s.db)
        first, second = await verbs.insert(s.db, 2, **ONE)
        running = await a(verbs.claim, one, 1)
        assert await a(admit, running) == [(first, None)]
        judged = await b(verbs.claim, two, 1)
        await b("BEGIN")
        assert await b(admit, judged) == [(second, "limit")]
        assert await a(verbs.finish, running) == [first]
        waiting = await a.blocked_by(b, free)
        await b("COMMIT")
        assert await waiting == 1
        assert await a(admit, await a(verbs.claim, one)) == [(second, None)]


async def test_of_two_workers_that_look_for_freed_slots_one_does(dsn: str) -> None:
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


async def test_what_somebody_is_cancelling_is_left_to_him(dsn: str) -> None:
    """His transaction may take hours. Nobody waits for it, nor for the gate; the worker hands the task back."""
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
        # And parked: the next one is let in.
        more = await claims(verbs.claim, id)
        assert await claims(admit, more) == [(first, "limit"), (third, "limit")]
        await psql("BEGIN")
        assert await psql(verbs.cancel, first)
        assert await claims(verbs.finish, jobs[1:]) == [second]
        assert await claims(free) == 1
        assert await claims(admit, await claims(verbs.claim, id)) == [(third, None)]


async def test_starts_are_remembered_for_the_longest_window(db: Any, worker: int) -> None:
    """Of tasks with one key and different windows: a start within the last hour counts for a task that asks for an
    hour, though the task that started asked for a second."""
    window = '{"limit_key": "a", "limit_rate": 2, "limit_seconds": %s}'

    async def judged(seconds: float) -> str | None:
        await verbs.insert(db, options=window % seconds)
        [(_, why)] = await admit(db, await verbs.claim(db, worker))
        return why

    assert await judged(3600) is None
    assert await judged(1) is None
    await db.execute("UPDATE notifyq.rate_log SET at = at - interval '1 min'")
    await verbs.prune_started(db)
    assert await judged(3600) == "rate"


async def test_starts_that_no_window_reaches_are_forgotten(db: Any, worker: int) -> None:
    """By the prune, also at a key that no task comes with any more."""
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


async def test_a_slot_is_kept_for_who_was_granted_it(db: Any, worker: int) -> None:
    """A newcomer that is claimed first doesn't take it; after 2 s in vain it may."""
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


@pytest.mark.parametrize(
    "how", ["done", "to be tried again", "cancelled", "deleted", "released", "rescued", "orphaned"]
)
async def test_a_slot_is_left(db: Any, worker: int, how: str) -> None:
    """However an attempt ends, whoever ends it: the next one is let in, though the first may come back."""
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
            assert await verbs.release(db, worker) == 1
        case "rescued":
            await verbs.silent(db, worker)
            assert (await verbs.rescue(db, worker))[1] == 1
        case _:
            await db.execute("DELETE FROM notifyq.worker")
            assert await verbs.orphans(db) == 1
    assert await free(db) == 1
    jobs = await verbs.claim(db, await verbs.register(db))
    ready = (
        [(second, None)]
        if how in ("done", "to be tried again", "cancelled", "deleted")
        else [(first, None), (second, "limit")]
    )
    assert await admit(db, jobs) == ready


@pytest.mark.parametrize("how", ["cancelled", "unhandled", "handed back"])
async def test_a_grant_that_goes_is_passed_on(db: Any, worker: int, how: str) -> None:
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
    assert await free(db) == (0 if how == "handed back" else 1), "handed back, it keeps it"
    next_one = second if how == "handed back" else third
    assert await admit(db, await verbs.claim(db, worker)) == [(next_one, None)]


async def test_nobody_overtakes_those_who_wait(db: Any, worker: int) -> None:
    """A slot is free, and who has just come is judged before anybody has told those who wait: he waits behind them."""
    first, second = await verbs.insert(db, 2, **ONE)
    jobs = await verbs.claim(db, worker)
    assert await admit(db, jobs) == [(first, None), (second, "limit")]
    assert await verbs.finish(db, jobs[:1]) == [first]
    [newcomer] = await verbs.insert(db, **ONE)
    assert await admit(db, await verbs.claim(db, worker)) == [(newcomer, "limit")]
    assert await admit(db, await verbs.claim(db, worker)) == [(second, None)]
    assert await free(db) == 0


async def test_a_paused_queue_takes_no_slots(db: Any, worker: int) -> None:
    """Those of a key who wait in it are passed over, by newcomers too; resumed, they are let in."""
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
    """Each start's slot, for when it is free again, to the next; if that one is cancelled, to the one after it."""
    ids = await verbs.insert(db, 5, **RATE)
    jobs = await verbs.claim(db, worker)
    assert await admit(db, jobs) == [(ids[0], None), (ids[1], None)] + [(id, "rate") for id in ids[2:]]
    scheduled = """SELECT id FROM notifyq.all_tasks WHERE state = 'scheduled' AND waits_for IS NULL
                   AND run_at BETWEEN now() + interval '59 min' AND now() + interval '60 min' ORDER BY id"""
    assert [row[0] for row in await db.fetch(scheduled)] == ids[2:4]
    assert await verbs.cancel(db, ids[2])
    assert await free(db) == 1
    assert [row[0] for row in await db.fetch(scheduled)] == ids[3:]
    # What was handed back, or failed, and starts again counts again.
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


async def test_each_goes_by_its_own_limit(db: Any, worker: int) -> None:
    """Of a key whose tasks don't agree: nobody is let in beyond its own."""
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
    """They are in force, and fail nobody's claim."""
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
    """A rate without its time, a limit without its key, what is no number: none is a limit, and none fails a claim."""
    await verbs.insert(db, 2, options='{"order_key": "c"}')
    await verbs.insert(db, 2, options='{"limit_key": "b", "limit_rate": 1, "limit_seconds": 1e9}')
    await db.execute(f"UPDATE notifyq.task SET options = {odd} WHERE limit_key = 'b'")
    without = """'{"order_key": 7, "limit_running": 1, "limit_rate": 1, "after": {}, "on_dead": 7}'"""
    await db.execute(f"UPDATE notifyq.task SET options = {without}, order_key = id WHERE limit_key IS NULL")
    assert [why for _, why in await admit(db, await verbs.claim(db, worker))] == [None] * 4


# --- Processes


class Ledger:
    """What worker processes did, by what they said themselves: when each run began, and when it was over. A run that
    was killed was over when its process was."""

    def __init__(self, spawn: Spawn, *options: str) -> None:
        self._spawn = spawn
        self._options = options
        self._alive: list[Story] = []
        self._stories: list[tuple[Story, list[float]]] = []  # and when it was killed

    async def hire(self) -> None:
        story = await started(self._spawn, *self._options)
        self._alive.append(story)
        self._stories.append((story, []))

    async def kill(self) -> None:
        """One that runs something, if there is one."""
        events = {story: [line["event"] for _, line in story.lines] for story in self._alive}
        busy = [story for story, seen in events.items() if seen.count("ran") > seen.count("over")]
        victim = random.choice(busy or self._alive)
        self._alive.remove(victim)
        victim.process.signal(signal.SIGKILL)
        next(dead for story, dead in self._stories if story is victim).append(time.time())
        await victim.process.wait()

    def runs(self) -> list[tuple[float, float, int]]:
        """(began, over, id), the earliest first."""
        found: list[tuple[float, float, int]] = []
        for story, dead in self._stories:
            open: dict[tuple[int, int], float] = {}
            for line in [line for _, line in story.lines if line["event"] in ("ran", "over")]:
                run = line["id"], line["attempt"]
                if line["event"] == "ran":
                    open[run] = line["at"]
                else:
                    found.append((open.pop(run), line["at"], line["id"]))
            found += [(began, dead[0] if dead else math.inf, id) for (id, _), began in open.items()]
        return sorted(found)


def most_at_once(runs: Iterable[tuple[float, float, int]]) -> int:
    changes = sorted(change for began, over, _ in runs for change in ((began, 1), (over, -1)))
    return max(itertools.accumulate(change for _, change in changes))


@pytest.mark.slow
async def test_killed_at_random(spawn: Spawn, db: Any) -> None:
    """Two fleets, 4 processes, killed one by one with what they run: no limit, rate or order is ever broken, and in
    the end all is done."""
    await db.execute(
        f"""{STARTS};
           CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$
           BEGIN PERFORM pg_sleep(0.005); RETURN NULL; END $$;
           CREATE TRIGGER slow AFTER UPDATE OF admitted_at ON notifyq.task EXECUTE FUNCTION slow();
           SELECT notifyq.limit_queue('narrow', 2, 10, 0.5)"""
    )
    insert = """INSERT INTO notifyq.task (type, payload, queue, priority, options)
                SELECT 'Step', '{"seconds": 0.15, "fails": 0.1}', queue, (random() * 2)::integer,
                       jsonb_build_object('limit_key', limit_key, 'limit_running', running, 'limit_rate', rate,
                                          'limit_seconds', CASE WHEN rate > 0 THEN 0.5 END, 'order_key', order_key)
                FROM (VALUES ('default', 'one', 1, NULL, NULL), ('default', 'three', 3, NULL, 'mixed'),
                             ('default', 'rate', NULL, 8, NULL), ('default', NULL, NULL, NULL, 'order'),
                             ('narrow', 'three', 3, NULL, NULL), ('narrow', NULL, NULL, NULL, NULL),
                             ('narrow', NULL, NULL, NULL, 'both'))
                     AS t (queue, limit_key, running, rate, order_key)"""
    wide, both = Ledger(spawn, 'queues=["default"]'), Ledger(spawn, 'queues=["narrow", "default"]')
    for ledger in (wide, both):
        await ledger.hire()
        await ledger.hire()
    over, inserts, kills = anyio.Event(), 0, 0

    async def enqueue() -> None:
        nonlocal inserts
        while inserts < 45 or kills < 4:  # so that they meet at the gates
            await db.execute(insert)
            inserts += 1
            await anyio.sleep(random.uniform(0, 0.15))
        over.set()

    async with anyio.create_task_group() as group:
        group.start_soon(enqueue)
        while not over.is_set():
            await anyio.sleep(random.uniform(0, 0.5))
            ledger = random.choice((wide, both))
            await ledger.kill()
            kills += 1
            await ledger.hire()
    await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.task"), 0, 120)
    await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.slot_released"), 0)
    done = {
        row["id"]: row
        for row in await db.fetch(
            """SELECT id, state, queue, options ->> 'limit_key' AS limit_key, options ->> 'order_key' AS order_key
               FROM notifyq.finished"""
        )
    }
    assert {row["state"] for row in done.values()} == {"done"}
    assert len(done) == 7 * inserts
    runs = sorted(wide.runs() + both.runs())
    vanished = "SELECT count(*) FROM notifyq.finished WHERE errors::text LIKE '%vanished while it ran%'"
    assert await db.fetchval(vanished) > 3

    def of(**columns: str) -> list[tuple[float, float, int]]:
        return [run for run in runs if all(done[run[2]][name] == value for name, value in columns.items())]

    at_once = {"one": 1, "three": 3}
    assert {key: most_at_once(of(limit_key=key)) for key in at_once} == at_once
    assert most_at_once(of(queue="narrow")) == 2
    for order in ("order", "mixed", "both"):
        ids = [id for _, _, id in of(order_key=order)]
        assert ids == sorted(ids)
        assert most_at_once(of(order_key=order)) == 1
    for key, count in (("limit:rate", 8), ("queue:narrow", 10)):
        starts = await begun(db, key)
        assert len(starts) >= 40
        window = closest(starts, count)
        print(f"{key}: {len(starts)} starts, {count + 1} in no less than {window:.6f} s")
        assert window > 0.5 - 0.000_001


async def updates(db: Any) -> int:
    await db.execute("SELECT pg_stat_clear_snapshot()")
    return int(await db.fetchval("SELECT n_tup_upd FROM pg_stat_user_tables WHERE relid = 'notifyq.task'::regclass"))


# --- Said wrongly


@pytest.mark.parametrize(
    ("rate", "parsed"),
    [("100/minute", (100, 60.0)), ("5/s", (5, 1.0)), ("20/10s", (20, 10.0)), ("1 / 2 day", (1, 172_800.0))],
)
def test_a_rate_in_words(rate: str, parsed: tuple[int, float]) -> None:
    assert parse_rate(rate) == parsed


@pytest.mark.parametrize("rate", ["100", "0/s", "5/0s", "5/week", "-5/s", "1.5/s", "", 5, "5/99999d"])
def test_a_rate_that_is_none(rate: Any) -> None:
    with pytest.raises(notifyq.ConfigError, match="rate is"):
        parse_rate(rate)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"limit_key": "a"}, "limit_key is 'a', and no limit; add limit=3"),
        ({"limit": 3}, "limit= and rate= are of tasks with the same limit_key; add limit_key="),
        ({"limit_key": "a", "limit": 0}, "limit is 0; expected how many may run at once"),
        ({"limit_key": "a", "limit": True}, "limit is True; expected how many may run at once"),
        ({"limit_key": "a", "rate": "often"}, "rate is 'often'; expected how many in what time"),
        ({"order_key": ""}, "order_key ''"),
        ({"order_key": "a" * 201}, "expected 1 to 200 characters"),
    ],
)
async def test_options_that_cannot_be(dsn: str, options: Any, message: str) -> None:
    bench = Bench()
    async with bench.app.connect(dsn) as app:
        with pytest.raises(notifyq.ConfigError, match=message):
            await app.enqueue(bench.Job(key="a"), **options)
