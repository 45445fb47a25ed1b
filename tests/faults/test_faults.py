"""Worker processes that are killed, frozen or blocked: nothing is lost, nothing runs twice except by the fault."""

from __future__ import annotations

import json
import signal
import time
from typing import Any
from urllib.parse import urlsplit

import anyio
import pytest

from ..helpers.databases import Sessions, grants, overload
from ..helpers.machine import Probe, limit
from ..helpers.processes import Process, Spawn, Story, started, whose
from ..helpers.rows import insert, states
from ..helpers.running import working
from ..helpers.waiting import eventually
from .test_connections_lost import CONNECTIONS, Bench, terminate

pytestmark = pytest.mark.slow


INSERT = "INSERT INTO notifyq.task (type, payload) VALUES ($1, $2::text::jsonb) RETURNING id"


# Processes.


async def test_killed(spawn: Spawn, db: Any, probe: Probe) -> None:
    """A killed worker's 50 tasks run in another worker within 5 s. A task that kills its worker each time ends dead."""
    mortal = [spawn('queues=["die"]') for _ in range(2)]
    # That no lease ends meanwhile shows that its death was seen.
    workers = [await started(spawn, 'queues=["default"]', "lease=3600") for _ in range(2)]
    dying = [Story(process) for process in mortal]
    for story in dying:
        await story.reach(1, "started")
    ids = await insert(db, "Sleep", 50)
    await eventually(lambda: states(db, ids), {("running", 1): 50})
    victim, heir = await whose(db, workers)
    await victim.reach(50, "ran")
    # Both faults at once, as both wait for the same.
    [fatal] = await insert(db, "Die", queue="die")
    killed = time.monotonic()
    victim.process.signal(signal.SIGKILL)
    last = await heir.reach(50, "ran", attempt=2)
    print(f"rescued after {last - killed:.2f} s")
    assert last - killed < 5 + probe.late(killed)
    assert await states(db, ids) == {("running", 2): 50}
    await eventually(lambda: db.fetchval("SELECT state FROM notifyq.all_tasks WHERE id = $1", fatal), "dead")
    attempts, error, errors = await db.fetchrow(
        "SELECT attempts, error, jsonb_array_length(errors) FROM notifyq.all_tasks WHERE id = $1", fatal
    )
    assert (attempts, errors) == (2, 2)
    assert "vanished while it ran" in error
    assert [await process.wait() for process in mortal] == [-signal.SIGKILL] * 2
    buried = "SELECT array_agg(split_part(name, ':', 2)) FROM notifyq.worker"
    await eventually(lambda: db.fetchval(buried), [str(heir.process.pid)])


async def test_a_poison_task_takes_no_innocent_with_it(spawn: Spawn, db: Any) -> None:
    """It kills each worker that runs it, and ends dead. Tasks beside it are done, though they may run only once."""
    workers = [spawn("concurrency=20") for _ in range(2)]
    async with db.transaction():
        [fatal] = await insert(db, "Die")
        ids = await insert(db, "Sleep", 8, seconds=1)
        await db.execute("UPDATE notifyq.task SET max_attempts = 1 WHERE type = 'Sleep'")
    killed = 0
    with anyio.fail_after(limit(100)):
        while await db.fetchval("SELECT count(*) FROM notifyq.task"):
            for n, process in enumerate(workers):
                if process.popen.poll() is not None:
                    killed += 1
                    workers[n] = spawn("concurrency=20")
            await anyio.sleep(0.2)
    attempts, state, errors = await db.fetchrow(
        "SELECT attempts, state, errors FROM notifyq.all_tasks WHERE id = $1", fatal
    )
    assert (state, attempts) == ("dead", killed)
    assert "vanished while it ran this task alone, 2 times by now" in json.loads(errors)[-1]["error"]
    done = await db.fetch("SELECT id FROM notifyq.all_tasks WHERE state = 'done' AND type = 'Sleep'")
    assert sorted(row[0] for row in done) == ids


async def test_a_suspect_beside_a_handler_that_runs_on(spawn: Spawn, db: Any, monkeypatch: Any) -> None:
    """A worker that doesn't become empty in time runs a suspect beside the tasks that it holds."""
    monkeypatch.setenv("NOTIFYQ_TEST_PATIENCE", "0.5")
    worker = await started(spawn)
    [long] = await insert(db, "Sleep")
    await worker.reach(1, "ran")
    await db.execute(
        """INSERT INTO notifyq.task (type, attempts, crashes, withheld, parked, waiting_on)
           VALUES ('Quick', 2, 2, true, 'crashed', 'crashed:default')"""
    )
    await eventually(lambda: db.fetchval("SELECT state FROM notifyq.finished WHERE type = 'Quick'"), "done")
    assert await states(db, [long]) == {("running", 1): 1}
    [told] = worker.logged("running tasks isolated")
    assert (told["tasks"], told["alone"]) == (1, False)


async def test_a_drain_runs_suspects(db: Any, dsn: str) -> None:
    """It runs the suspects of its queues, but none of a paused queue."""
    bench = Bench()
    park = """INSERT INTO notifyq.task (type, queue, attempts, crashes, withheld, parked, waiting_on)
              SELECT 'Note', $1, 2, 2, true, 'crashed', 'crashed:' || $1 FROM generate_series(1, $2::integer)
              RETURNING id"""
    ids = [row[0] for row in await db.fetch(park, "default", 20)]
    await db.fetch(park, "paused", 1)
    await db.fetchval("SELECT notifyq.pause('paused')")
    async with working(bench.app, dsn, drain=True, queues=["default", "paused"]) as worker:
        with anyio.fail_after(limit()):
            await worker.done.wait()
    assert sorted(bench.seen.items) == ids
    assert await states(db, ids) == {("done", 3): 20}


async def test_not_all_of_its_connections_are_lost(dsn: str, spawn: Spawn, db: Any) -> None:
    """A worker that has lost some of its connections, and can't open others, isn't dead."""
    role = f"worker_{urlsplit(dsn).path[1:]}"
    cut = (["heartbeat%"], ["heartbeat%", "settle"], ["heartbeat%", "claims %", "bell %"])
    sessions = """SELECT l.pid FROM pg_locks l JOIN pg_stat_activity a ON a.pid = l.pid
                  WHERE l.locktype = 'advisory' AND l.classid = 1852990827 AND l.objid = $1::integer::oid AND l.granted
                    AND l.database = (SELECT oid FROM pg_database WHERE datname = current_database())
                    AND a.application_name LIKE ANY ($2::text[])"""
    everybody = "SELECT count(pg_terminate_backend(pid, 5000)) FROM pg_stat_activity WHERE usename = $1"
    await db.execute(f"CREATE ROLE {role} LOGIN")
    for grant in grants("worker"):
        await db.execute(grant.replace("TO worker;", f"TO {role};"))
    processes = [Process(dsn.replace("://notifyq@", f"://{role}@"), f'queues=["q{n}"]') for n in range(len(cut))]
    try:
        victims = [Story(process) for process in processes]
        rescuer = await started(spawn, 'queues=["none"]')
        ids = []
        for n, victim in enumerate(victims):
            await victim.reach(1, "started")
            ids += await insert(db, "Sleep", 5, f"q{n}")
        for victim in victims:
            await victim.reach(5, "ran")
        await db.execute(f"ALTER ROLE {role} NOLOGIN")
        for victim, names in zip(victims, cut, strict=True):
            args = victim.of("started")[0][1]["id"], [f"notifyq {name}" for name in names]
            ended = await db.fetch(f"SELECT pg_terminate_backend(pid, 5000) FROM ({sessions}) s", *args)
            assert len(ended) == len(names)
        # Long enough for the rescuer to look at them four times at least, when they have been silent for 2 s.
        since = await db.fetchval("SELECT clock_timestamp()")
        looked = "SELECT seen_at > $2::timestamptz + interval '9 seconds' FROM notifyq.worker WHERE id = $1"
        await eventually(lambda: db.fetchval(looked, rescuer.of("started")[0][1]["id"], since))
        assert await states(db, ids) == {("running", 1): len(ids)}
        assert not rescuer.logged("rescued")
        await db.execute(f"ALTER ROLE {role} LOGIN")
        for victim in victims:
            await victim.reach(1, "log", message="heartbeat: the database is back")
            assert not victim.logged("took this worker for dead") + victim.logged("lease lost")
        assert await states(db, ids) == {("running", 1): len(ids)}
        # Without any of them it is dead, though its process lives.
        await db.execute(f"ALTER ROLE {role} NOLOGIN")
        await db.execute(everybody.replace("$1", f"'{role}'"))
        await rescuer.reach(len(victims), "log", message="rescued the tasks of a dead worker")
        assert await states(db, ids) == {("ready", 1): len(ids)}
    finally:
        for process in processes:
            process.close()
        await db.execute(everybody.replace("$1", f"'{role}'"))
        await db.execute(f"DROP OWNED BY {role}")
        await db.execute(f"DROP ROLE {role}")


async def test_killed_while_its_connections_wait(spawn: Spawn, db: Any, connect: Sessions, probe: Probe) -> None:
    """One backend of a killed worker waits for the turn, another for a row. Its tasks are rescued nevertheless."""
    victim, rescuer = await started(spawn, 'queues=["a"]'), await started(spawn, 'queues=["none"]')
    ids = await insert(db, "Sleep", 5, "a")
    [locked] = await insert(db, "Sleep", 1, "a", seconds=limit(2))
    await victim.reach(6, "ran")
    turn, row = await connect(), await connect()
    await row.execute("BEGIN")
    await row.execute("SELECT FROM notifyq.task WHERE id = $1 FOR UPDATE", locked)
    take = """SELECT pg_advisory_lock(1852990836, objid::bigint::bit(32)::integer) FROM pg_locks
              WHERE locktype = 'advisory' AND classid = 1852990836 AND granted AND pid IN (
                  SELECT pid FROM pg_stat_activity
                  WHERE application_name = 'notifyq bell ' || $1::integer AND datname = current_database())"""
    async with anyio.create_task_group() as group:
        group.start_soon(turn.execute, take, victim.of("started")[0][1]["id"])
        waits = """SELECT count(*) FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()
                   AND application_name LIKE 'notifyq ' || $1"""
        await eventually(lambda: db.fetchval(waits, "test"), 1)
        await terminate(db, "bell %")
    await eventually(lambda: db.fetchval(waits, "bell %"), 1)
    await eventually(lambda: db.fetchval(waits, "settle"), 1)
    killed = time.monotonic()
    victim.process.signal(signal.SIGKILL)
    rescued = await rescuer.reach(1, "log", message="rescued the tasks of a dead worker") - killed
    print(f"rescued after {rescued:.2f} s")
    assert rescued < 5 + probe.late(killed)
    assert await states(db, [*ids, locked]) == {("ready", 1): 5, ("running", 1): 1}
    await row.execute("ROLLBACK")
    await eventually(lambda: states(db, [locked]), {("ready", 1): 1})


@pytest.mark.parametrize("step", ["1 hour", "-1 hour"])
async def test_the_servers_clock_is_stepped(spawn: Spawn, db: Any, step: str) -> None:
    """Stored heartbeats are wrong by that much. A live worker keeps its tasks; a killed one's are rescued."""
    well, mortal, rescuer = [await started(spawn, f'queues=["{queue}"]') for queue in ("a", "b", "none")]
    ids, dying = await insert(db, "Sleep", 5, "a"), await insert(db, "Sleep", 5, "b")
    await well.reach(5, "ran")
    await mortal.reach(5, "ran")
    await db.execute(f"""
        CREATE FUNCTION step() RETURNS trigger LANGUAGE plpgsql AS $$
        BEGIN NEW.seen_at := NEW.seen_at - interval '{step}'; RETURN NEW; END $$;
        CREATE TRIGGER step BEFORE UPDATE ON notifyq.worker FOR EACH ROW EXECUTE FUNCTION step();
        UPDATE notifyq.worker SET seen_at = seen_at""")
    since = "SELECT seen_at FROM notifyq.worker WHERE id = $1"
    began = await db.fetchval(since, me := rescuer.of("started")[0][1]["id"])
    # It has looked at the others four times at least.
    looked = "SELECT seen_at > $2::timestamptz + interval '7 seconds' FROM notifyq.worker WHERE id = $1"
    await eventually(lambda: db.fetchval(looked, me, began))
    assert await states(db, ids + dying) == {("running", 1): 10}
    mortal.process.signal(signal.SIGKILL)
    await eventually(lambda: states(db, dying), {("ready", 1): 5})
    assert await states(db, ids) == {("running", 1): 5}
    assert not well.logged("lease lost") + well.logged("took this worker for dead")


async def test_frozen_past_its_lease(spawn: Spawn, db: Any, probe: Probe) -> None:
    """A worker is frozen with the turn. Another worker takes the turn soon, and the tasks after the lease. Thawed, the
    first settles nothing, logs that, cancels its handlers, and registers again."""
    workers = [await started(spawn, "lease=6", "shutdown_timeout=0.1") for _ in range(2)]
    async with db.transaction():
        long = await insert(db, "Sleep", 5, seconds=3600)
        short = await insert(db, "Sleep", 5, seconds=6)  # over when it is thawed
    await eventually(lambda: states(db, long + short), {("running", 1): 10})
    frozen, other = await whose(db, workers)
    over = await frozen.reach(10, "ran") + 6.5
    # Asleep again, or a claim that is under way takes the next task along into the freezer.
    asleep = (
        "SELECT count(*) FROM pg_locks WHERE relation = 'notifyq.bell'::regclass AND mode = 'ShareLock' AND granted"
    )
    await eventually(lambda: db.fetchval(asleep), 1)
    claiming = (
        "SELECT count(*) FROM pg_stat_activity WHERE application_name LIKE 'notifyq claims%' AND state = 'active'"
    )
    await eventually(lambda: db.fetchval(claiming), 0)
    frozen.process.signal(signal.SIGSTOP)
    stopped = time.monotonic()
    await db.execute(  # and elsewhere never
        "UPDATE notifyq.task SET payload = '{\"seconds\": 3600}' WHERE id = ANY ($1::bigint[])", short
    )
    [quick] = await insert(db, "Quick")
    turn = await other.reach(1, "ran", id=quick) - stopped
    rescue = await other.reach(10, "ran", attempt=2) - stopped
    print(f"turn after {turn:.2f} s, tasks after {rescue:.2f} s")
    assert turn < 8 + probe.late(stopped)
    assert rescue < 10 + probe.late(stopped)

    await anyio.sleep(max(0.0, over - time.monotonic()))
    frozen.process.signal(signal.SIGCONT)
    await frozen.reach(5, "cancelled")
    assert {line["id"] for _, line in frozen.of("cancelled")} == set(long)
    assert sum(fields["tasks"] for fields in frozen.logged("lease lost")) >= 5
    assert {line["id"] for _, line in frozen.of("ended")} == set(short)
    await eventually(lambda: settled_nothing(frozen), 5)
    [again] = frozen.logged("goes on under a new id")
    assert again["new"] != again["old"] == frozen.of("started")[0][1]["id"]
    assert await states(db, long + short) == {("running", 2): 10}, "they belong to the other"

    other.process.signal(signal.SIGTERM)
    assert await other.process.wait() == 0
    await frozen.reach(10, "ran", attempt=2)
    owners = await db.fetch("SELECT DISTINCT worker FROM notifyq.task")
    assert [row[0] for row in owners] == [again["new"]]


async def settled_nothing(story: Story) -> int:
    """How many outcomes it could not write, since other workers had the leases."""
    return sum(fields["tasks"] for fields in story.logged("settled nothing"))


async def test_a_failover_that_lost_its_registration(spawn: Spawn, db: Any) -> None:
    """The database is as it was before a worker registered, and another worker registers. Then the first goes on."""
    first = await started(spawn)
    first.process.signal(signal.SIGSTOP)
    for role in CONNECTIONS:  # first, as one of them may hold locks
        await terminate(db, role)
    await db.execute("TRUNCATE notifyq.worker RESTART IDENTITY")
    second = await started(spawn)
    assert second.of("started")[0][1]["id"] != first.of("started")[0][1]["id"]
    ids = await insert(db, "Sleep", 10)
    await second.reach(10, "ran")
    first.process.signal(signal.SIGCONT)
    await first.reach(1, "log", message="others took this worker for dead; it goes on under a new id")
    [new] = [fields["new"] for fields in first.logged("goes on under a new id")]
    claims = "SELECT count(*) FROM pg_stat_activity WHERE application_name = 'notifyq claims ' || $1::integer"
    await eventually(lambda: db.fetchval(claims, new), 1)  # so it has taken back the tasks of its unanswered claim
    assert await states(db, ids) == {("running", 1): 10}
    assert not first.of("ran")
    assert not second.logged("lease lost")
    [settled] = await insert(db, "Quick")
    await eventually(lambda: states(db, [settled]), {("done", 1): 1})
    for story in (first, second):  # and each is registered, as itself
        seen = await db.fetchval(
            "SELECT count(*) FROM notifyq.worker WHERE name LIKE '%:' || $1", str(story.process.pid)
        )
        assert seen == 1


async def test_a_blocked_event_loop(spawn: Spawn, db: Any) -> None:
    """The worker has the turn, and a handler sleeps without `await`. Another worker goes on, the log names the handler,
    and no lease is lost."""
    workers = [await started(spawn) for _ in range(2)]
    seconds = limit(3)
    [block] = await insert(db, "Block", seconds=seconds)
    await eventually(lambda: states(db, [block]), {("running", 1): 1})
    blocked, other = await whose(db, workers)
    began = await blocked.reach(1, "ran")
    ids = await insert(db, "Quick", 3)
    turn = await other.reach(3, "ran") - began
    print(f"turn after {turn:.2f} s")
    assert turn < seconds * 5 / 6
    await eventually(lambda: states(db, [block]), {("done", 1): 1})
    assert await states(db, ids) == {("done", 1): 3}
    # A busy machine may stop it once more, and then no handler is named.
    [_] = [it for it in blocked.logged("event loop is blocked") if it["handler"].endswith(f"block (task {block})")]
    await blocked.reach(1, "log", message="the event loop answers again")
    assert not blocked.logged("lease lost") + other.logged("rescued")


async def test_an_id_that_another_worker_has_is_drawn_anew(db: Any, dsn: str) -> None:
    await db.execute("CREATE SEQUENCE public.draws")
    await db.execute("ALTER TABLE notifyq.worker ALTER id SET DEFAULT nextval('public.draws')")
    add = """INSERT INTO notifyq.worker (name, queues, types, max_attempts, concurrency, lease)
             VALUES ('another:1', '{}', '{}', '{}', 1, '1 hour')"""
    await db.execute(add)
    await db.execute("SELECT setval('public.draws', 1, false)")
    async with working(Bench().app, dsn) as worker:
        assert worker.info.id == 2


async def test_functions_that_an_extension_overloads(spawn: Spawn, db: Any) -> None:
    """A worker and its rescuer call PostgreSQL's own functions, and no heartbeat loses its connection."""
    await overload(db)
    workers = [await started(spawn) for _ in range(2)]
    [block] = await insert(db, "Block", seconds=limit(3))
    await eventually(lambda: states(db, [block]), {("running", 1): 1})
    blocked, other = await whose(db, workers)
    await blocked.reach(1, "log", message="the event loop answers again")
    long = await insert(db, "Sleep", 3)
    await eventually(lambda: states(db, [block, *long]), {("done", 1): 1, ("running", 1): 3})
    victim, heir = await whose(db, workers)
    victim.process.signal(signal.SIGKILL)
    await heir.reach(3, "ran", attempt=2)
    for story in workers:
        assert not [line for _, line in story.lines if "the wrong" in str(line) or "not unique" in str(line)]
        assert not story.logged("out of reach")
    assert not blocked.logged("lease lost") + other.logged("lease lost")
