"""The bell and the turn, statement by statement: enqueuers, sleepers and strangers, in an order made to go wrong.

Most of it without a worker: a session that falls asleep by the worker's own functions, one that listens, and a claim.
test_doorbell.py has the same of whole workers; here are those that need one because it must be found awake.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import anyio
import asyncpg
import pytest

import notifyq

from ..helpers.machine import limit
from ..helpers.running import working
from ..helpers.steps import PREPARED, Session, Steps, frozen, steps
from ..helpers.verbs import OVERDUE, cancel, claim, fall_asleep, insert, register, retry, states, take_turn
from ..helpers.waiting import Seen, asleep, eventually

SOON = 3.0  # seconds, on an idle machine: nothing but the bell finds what is here that soon


@pytest.fixture
async def s(dsn: str) -> AsyncIterator[Steps]:
    async with steps(dsn) as s:
        yield s


@pytest.fixture
async def door(s: Steps) -> Session:
    """A worker's connection for the turn and the bell; in the transaction in which it will sleep."""
    door = await s.worker("door")
    await door("BEGIN")
    return door


@pytest.fixture
async def p(s: Steps) -> Session:
    """Who enqueues, or whatever else people do."""
    return await s.session("p")


@pytest.fixture
async def w(s: Steps) -> Session:
    """A worker's connection for claims."""
    return await s.worker("claims")


class Heard:
    """What a session that listens has heard."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.rings: list[str] = []

    async def listen(self) -> None:
        await self.session.conn.add_listener("notifyq", lambda *args: self.rings.append(args[3]))

    async def so_far(self) -> list[str]:
        """Everything that was committed before: a backend delivers in the order of the commits."""
        await self.session("NOTIFY notifyq, 'end'")
        with anyio.fail_after(limit()):
            while "end" not in self.rings:
                await anyio.sleep(0.001)
        rings, self.rings = self.rings[: self.rings.index("end")], []
        return rings


@pytest.fixture
async def heard(s: Steps) -> Heard:
    heard = Heard(await s.session("listener"))
    await heard.listen()
    return heard


async def locks(s: Steps, session: Session) -> list[str]:
    """The session's locks on the bell, and its advisory ones."""
    rows = await s.db.fetch(
        """SELECT CASE locktype WHEN 'advisory' THEN 'turn' ELSE mode END AS what FROM pg_locks
           WHERE pid = $1 AND granted AND (locktype = 'advisory' OR relation = to_regclass('notifyq.bell'))""",
        session.pid,
    )
    return [row[0] for row in rows]


# --- Enqueuers that said nothing


async def copy(conn: Any) -> None:
    await conn.copy_records_to_table("task", schema_name="notifyq", records=[("Known",)], columns=["type"])


WAYS: dict[str, Any] = {
    "INSERT": insert,
    "COPY": copy,
    "INSERT SELECT": "INSERT INTO notifyq.task (type) SELECT 'Known' FROM generate_series(1, 1)",
    "enqueue()": "SELECT notifyq.enqueue('Known')",
    "ON CONFLICT": "INSERT INTO notifyq.task (type) VALUES ('Known') ON CONFLICT DO NOTHING",
    "WITH": "WITH new AS (INSERT INTO notifyq.task (type) VALUES ('Known') RETURNING id) SELECT id FROM new",
}


@pytest.mark.parametrize(
    ("way", "level"),
    [*((way, "READ COMMITTED") for way in WAYS), ("INSERT", "REPEATABLE READ"), ("INSERT", "SERIALIZABLE")],
)
async def test_a_hidden_enqueuer(s: Steps, door: Session, p: Session, w: Session, way: str, level: str) -> None:
    """Sleep during enqueue, in any isolation level, by any way: granted at the commit, and the next claim has it."""
    me = await w(register)
    await p(f"BEGIN ISOLATION LEVEL {level}")
    await p("SELECT FROM notifyq.task")
    await p(WAYS[way])
    waiting = await door.blocked_by(p, fall_asleep)
    assert await w(claim, me) == []
    await p("COMMIT")
    assert await waiting
    assert len(await w(claim, me)) == 1


async def test_two_hidden_enqueuers(s: Steps, door: Session, p: Session, w: Session) -> None:
    """Sleep during two enqueues: whichever commits last lets it sleep, and the claim after that has both."""
    q, me = await s.session("q"), await w(register)
    for session in (p, q):
        await session("BEGIN")
        await session(insert)
    waiting = await door.blocked_by(p, fall_asleep)
    assert q.pid in await door.blockers()
    await q("COMMIT")
    assert not waiting.over
    assert await door.blockers() == [p.pid]
    await p("COMMIT")
    assert await waiting
    assert len(await w(claim, me)) == 2


@pytest.mark.parametrize("end", ["ROLLBACK", "killed"])
async def test_a_hidden_enqueuer_that_fails(s: Steps, door: Session, p: Session, w: Session, end: str) -> None:
    """Sleep during an enqueue that is rolled back, or whose session is killed: it sleeps, and has missed nothing."""
    await p("BEGIN")
    await p(insert)
    waiting = await door.blocked_by(p, fall_asleep)
    if end == "killed":
        await s.db.fetch("SELECT pg_terminate_backend($1)", p.pid)
    else:
        await p(end)
    assert await waiting
    assert await w(claim, await w(register)) == []


@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
async def test_a_hidden_enqueuer_that_is_prepared(s: Steps, door: Session, p: Session, w: Session, end: str) -> None:
    """Sleep during an enqueue that is prepared, of no session any more: its promise holds until it is decided."""
    me, name = await w(register), await s.db.fetchval("SELECT current_database()")
    await p("BEGIN")
    await p(insert)
    await p(f"PREPARE TRANSACTION '{name}'")
    waiting = await door.blocked_by(PREPARED, fall_asleep)
    await p(f"{end} PREPARED '{name}'")
    assert await waiting
    assert len(await w(claim, me)) == (end == "COMMIT")


async def test_who_rang_can_not_be_prepared(s: Steps, door: Session, p: Session) -> None:
    """PREPARE TRANSACTION while somebody sleeps: refused by PostgreSQL, with nothing enqueued."""
    assert await door(fall_asleep)
    await p("BEGIN")
    await p(insert)
    with pytest.raises(asyncpg.FeatureNotSupportedError, match="NOTIFY"):
        await p("PREPARE TRANSACTION 'rang'")
    assert await states(s.db) == {}


async def test_it_enqueues_again_while_somebody_waits_for_it(
    s: Steps, door: Session, p: Session, w: Session, heard: Heard
) -> None:
    """Enqueue during sleep, by the transaction that is waited for: it says nothing again, and both are seen."""
    me = await w(register)
    await p("BEGIN")
    await p(insert)
    waiting = await door.blocked_by(p, fall_asleep)
    await p(insert)
    await p("COMMIT")
    assert await waiting
    assert len(await w(claim, me)) == 2
    assert await heard.so_far() == []


async def test_its_savepoint_is_rolled_back_while_somebody_waits_for_it(
    s: Steps, door: Session, p: Session, w: Session, heard: Heard
) -> None:
    """Sleep during a savepoint's enqueue: it sleeps when that is undone, and what comes then in the same transaction
    rings."""
    await p("BEGIN")
    await p("SAVEPOINT here")
    await p(insert)
    waiting = await door.blocked_by(p, fall_asleep)
    await p("ROLLBACK TO SAVEPOINT here")
    assert await waiting
    await p(insert)
    assert await heard.so_far() == []
    await p("COMMIT")
    assert await heard.so_far() == [""]
    assert len(await w(claim, await w(register))) == 1


async def test_a_released_savepoint_keeps_its_promise(s: Steps, door: Session, p: Session, w: Session) -> None:
    """Sleep during a savepoint's enqueue: released, it goes on to be waited for."""
    await p("BEGIN")
    await p("SAVEPOINT here")
    await p(insert)
    await p("RELEASE SAVEPOINT here")
    waiting = await door.blocked_by(p, fall_asleep)
    await p("COMMIT")
    assert await waiting
    assert len(await w(claim, await w(register))) == 1


# --- Enqueuers that ring


async def test_a_newcomer_while_somebody_waits_to_sleep(s: Steps, door: Session, p: Session, heard: Heard) -> None:
    """Enqueue during arming: it waits for nobody, doesn't lengthen the wait, and rings."""
    await p("BEGIN")
    await p(insert)
    waiting = await door.blocked_by(p, fall_asleep)
    q = await s.session("q")
    await q("BEGIN")
    await q(insert)
    assert await heard.so_far() == []
    await p("COMMIT")
    assert await waiting, "q is open, and told nobody that it says nothing"
    await q("COMMIT")
    assert await heard.so_far() == [""]


async def test_one_of_two_sleepers_wakes_up(s: Steps, door: Session, p: Session, heard: Heard) -> None:
    """Enqueue while a second fleet sleeps: it rings until nobody sleeps."""
    other = await s.worker("door 2")
    await other("BEGIN")
    assert await door(fall_asleep)
    assert await other(fall_asleep), "both at once"
    await door("ROLLBACK")
    await p(insert)
    assert await heard.so_far() == [""]
    await other("ROLLBACK")
    await p(insert)
    assert await heard.so_far() == []


async def test_one_ring_for_a_transaction(s: Steps, door: Session, p: Session, heard: Heard) -> None:
    """NOTIFY is folded within a transaction, its savepoints included, and never across two."""
    assert await door(fall_asleep)
    await p("BEGIN")
    for _ in range(3):
        await p(insert)
        await p("SAVEPOINT here")
    await p("COMMIT")
    assert await heard.so_far() == [""]
    await p(insert)
    await p(insert)
    assert await heard.so_far() == ["", ""]


SAID: dict[str, tuple[Any, int]] = {
    "an INSERT ... SELECT of nothing": ("INSERT INTO notifyq.task (type) SELECT 'Known' WHERE false", 1),
    "a conflict, and nothing done": (
        "INSERT INTO notifyq.task (id, type) OVERRIDING SYSTEM VALUE VALUES (1, 'Known') ON CONFLICT (id) DO NOTHING",
        1,
    ),
    "a conflict, and an UPDATE": (
        """INSERT INTO notifyq.task (id, type) OVERRIDING SYSTEM VALUE VALUES (1, 'Known')
           ON CONFLICT (id) DO UPDATE SET run_at = now()""",
        1,
    ),
    "COPY": (copy, 1),
    "a person's UPDATE OF run_at": ("UPDATE notifyq.task SET run_at = now() WHERE id = 1", 1),
    "a person's UPDATE of no row": ("UPDATE notifyq.task SET run_at = now() WHERE false", 1),
    "a person's UPDATE of something else": ("UPDATE notifyq.task SET priority = 1", 0),
    "DELETE": ("DELETE FROM notifyq.task", 0),
    "TRUNCATE": ("TRUNCATE notifyq.task", 0),
    "retry of a scheduled task": (lambda conn: retry(conn, 1), 1),
    "rolled back": ("DO $$ BEGIN INSERT INTO notifyq.task (type) VALUES ('x'); ROLLBACK; END $$", 0),
}


@pytest.mark.parametrize("what", SAID)
async def test_what_people_do_while_somebody_sleeps(
    s: Steps, door: Session, p: Session, heard: Heard, what: str
) -> None:
    """One ring if there may be something to look at, once for all its rows, and else none."""
    await p(insert, run_at="2999-01-01")
    assert await door(fall_asleep)
    await p(SAID[what][0])
    assert await heard.so_far() == [""] * SAID[what][1]


async def test_a_listener_in_a_transaction_hears_at_its_end(s: Steps, door: Session, p: Session, heard: Heard) -> None:
    """Ring during a listener's transaction: not lost, but late; hence claims and listening never are in one."""
    assert await door(fall_asleep)
    await heard.session("BEGIN")
    await p(insert)
    await heard.session("SELECT 1")
    assert heard.rings == []
    await heard.session("COMMIT")
    assert await heard.so_far() == [""]


MODES = [
    "ACCESS SHARE", "ROW SHARE", "ROW EXCLUSIVE", "SHARE UPDATE EXCLUSIVE",
    "SHARE", "SHARE ROW EXCLUSIVE", "EXCLUSIVE", "ACCESS EXCLUSIVE",
]  # fmt: skip


@pytest.mark.parametrize("mode", MODES)
async def test_a_stranger_locks_the_bell(s: Steps, door: Session, p: Session, heard: Heard, mode: str) -> None:
    """Enqueue while pg_dump, VACUUM or DDL has the bell: it never waits; it is silent, or rings; and who wants to
    sleep may, or waits for the stranger."""
    stranger = await s.session("stranger")
    await stranger("BEGIN")
    await stranger(f"LOCK TABLE notifyq.bell IN {mode} MODE")
    await p("BEGIN")
    await p(insert)
    silent = await locks(s, p) == ["RowExclusiveLock"]
    assert silent == (mode in MODES[:4])
    await p("COMMIT")
    assert await heard.so_far() == ([] if silent else [""])
    if mode in ("ACCESS SHARE", "ROW SHARE", "SHARE"):
        assert await door(fall_asleep)
    else:
        waiting = await door.blocked_by(stranger, fall_asleep)
        await stranger("COMMIT")
        assert await waiting


# --- Falling asleep and the turn: refused, cancelled, killed


async def test_an_arming_that_gives_up(s: Steps, door: Session, p: Session) -> None:
    """Sleep during enqueue, for 20 ms: refused, it holds nothing, and may ask again in the same transaction."""
    await p("BEGIN")
    await p(insert)
    assert not await door(fall_asleep, 20)
    assert await locks(s, door) == []
    q = await s.session("q")
    await q("BEGIN")
    await q(insert)
    assert await locks(s, q) == ["RowExclusiveLock"], "nobody waits any more"
    await q("COMMIT")
    await p("COMMIT")
    assert await door(fall_asleep, 20)


async def test_an_arming_that_is_cancelled(s: Steps, door: Session, p: Session) -> None:
    """Sleep during enqueue, and a cancel request: it holds nothing, and its transaction goes on."""
    await p("BEGIN")
    await p(insert)
    waiting = await door.blocked_by(p, fall_asleep)
    await s.db.fetch("SELECT pg_cancel_backend($1)", door.pid)
    assert await waiting is False
    await p("COMMIT")
    assert await locks(s, door) == []
    assert await door(fall_asleep)


async def late(s: Steps, why: str, waiter: Session, ms: int) -> None:
    """While the waiter's backend is frozen: end its wait of `ms`, so that it finds it both granted and ended."""
    if why == "cancelled":
        await s.db.fetch("SELECT pg_cancel_backend($1)", waiter.pid)
    else:
        await s.db.fetch("SELECT pg_sleep($1)", ms / 1000 + 0.1)


@pytest.mark.parametrize("why", ["cancelled", "timed out"])
async def test_an_arming_that_is_granted_when_it_ends(s: Steps, door: Session, p: Session, why: str) -> None:
    """Sleep, granted at the moment at which the wait ends: what it says is what it holds."""
    await p("BEGIN")
    await p(insert)
    ms = int(limit(0.6) * 1000)  # it is frozen before that is over
    waiting = await door.blocked_by(p, fall_asleep, ms)
    with frozen(door):
        await p("COMMIT")
        await late(s, why, door, ms)
    granted = await waiting
    assert await locks(s, door) == (["ShareLock"] if granted else [])


@pytest.mark.parametrize("why", ["cancelled", "timed out"])
async def test_a_turn_that_is_granted_when_the_wait_ends(s: Steps, why: str) -> None:
    """The turn, granted at the moment at which the wait ends: what it says is what it holds, and it is passed on."""
    first, second, third = [await s.worker(f"door {n}") for n in range(3)]
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
    """Turn: first come, first served; at once when its holder steps back, or is killed; other fleets have their own."""
    first, second, third, other = [await s.worker(f"door {n}") for n in range(4)]
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


# --- With a worker


class Known(notifyq.Task):
    pass


class Work:
    """An app whose handler notes what it runs."""

    def __init__(self) -> None:
        self.app, self.seen = notifyq.App(), Seen()
        self.release: anyio.Event | None = None

        @self.app.handler
        async def known(_: Known, ctx: notifyq.Context) -> None:
            self.seen.add(ctx.id)
            if self.release is not None:
                await self.release.wait()


@pytest.fixture
def work() -> Work:
    return Work()


async def sleeper(s: Steps) -> int:
    """The backend that sleeps at the bell."""
    await asleep(s.db)
    return int(
        await s.db.fetchval("SELECT pid FROM pg_locks WHERE relation = 'notifyq.bell'::regclass AND mode = 'ShareLock'")
    )


@pytest.mark.parametrize(
    "ddl",
    [
        "VACUUM notifyq.bell",
        "ALTER TABLE notifyq.bell ADD other integer",
        "DROP TABLE notifyq.bell",
    ],
)
async def test_ddl_on_the_bell_while_a_worker_sleeps(s: Steps, p: Session, work: Work, dsn: str, ddl: str) -> None:
    """It waits for the sleeper, and nobody waits for it: enqueuers ring, the worker runs what they enqueue."""
    async with working(work.app, dsn):
        waiting = await p.blocked_by(await sleeper(s), ddl)
        await insert(s.db)
        await work.seen.reach(1, SOON)
        assert not waiting.over
        await waiting.cancelled()
        await p("SELECT 1")  # waits until the server has heard of it: once nobody sleeps, the bell would be dropped


async def test_vacuum_has_the_bell_while_a_worker_wants_to_sleep(s: Steps, p: Session, work: Work, dsn: str) -> None:
    """Enqueuers are silent, and the worker can't sleep: it looks."""
    await p("BEGIN")
    await p("LOCK TABLE notifyq.bell IN SHARE UPDATE EXCLUSIVE MODE")
    async with working(work.app, dsn):
        for n in range(3):
            await insert(s.db)
            await work.seen.reach(n + 1, SOON)


@pytest.mark.parametrize(
    "how", ["ALTER TABLE notifyq.task DISABLE TRIGGER ring", "SET session_replication_role = replica"]
)
async def test_a_trigger_that_does_not_fire(s: Steps, p: Session, work: Work, dsn: str, how: str) -> None:
    """Nobody rings, nobody said that nobody sleeps: it is the fallback poll that finds the task."""
    await p(how)
    async with working(work.app, dsn, poll_interval=0.2):
        await asleep(s.db)
        await p(insert)
        await work.seen.reach(1, SOON)
    await p("ALTER TABLE notifyq.task ENABLE TRIGGER ring")


async def test_truncate_under_a_worker_that_sleeps_and_holds_tasks(s: Steps, p: Session, work: Work, dsn: str) -> None:
    """What it held is gone: it settles nothing of it, and the next task is rung for and run."""
    work.release = anyio.Event()
    async with working(work.app, dsn):
        await p(insert, 3)
        await work.seen.reach(3, SOON)
        await asleep(s.db)
        await p("TRUNCATE notifyq.task")
        work.release.set()
        [id] = await p(insert)
        assert (await work.seen.reach(4, SOON))[3] == id
    assert await states(s.db) == {id: ("done", 1)}


async def test_a_stranger_who_listens_in_a_transaction(s: Steps, p: Session, work: Work, dsn: str) -> None:
    """It keeps the queue of notifications from being emptied, and nobody from hearing the bell."""
    await p("LISTEN notifyq")
    await p("BEGIN")
    await p("SELECT 1")
    async with working(work.app, dsn):
        for n in range(3):
            await asleep(s.db)
            await insert(s.db)
            await work.seen.reach(n + 1, SOON)


async def test_a_person_puts_a_task_forward(s: Steps, p: Session, work: Work, dsn: str) -> None:
    """UPDATE OF run_at in a transaction that stays open while the worker has looked and slept again: run at its
    commit."""
    [id] = await insert(s.db, run_at="2999-01-01")
    async with working(work.app, dsn):
        await asleep(s.db)
        await p("BEGIN")
        await p("UPDATE notifyq.task SET run_at = now() WHERE id = $1", id)
        [other] = await insert(s.db)
        await work.seen.reach(1, SOON)
        await asleep(s.db)
        await p("COMMIT")
        assert await work.seen.reach(2, SOON) == [other, id]


@pytest.mark.parametrize("level", ["repeatable read", "serializable"])
async def test_a_database_whose_default_is_strict(s: Steps, work: Work, dsn: str, level: str) -> None:
    """Sleep in a database with another default isolation: no snapshot is held, or vacuum would stop."""
    name = await s.db.fetchval("SELECT current_database()")
    await s.db.execute(f"ALTER DATABASE {name} SET default_transaction_isolation = '{level}'")
    try:
        async with working(work.app, dsn):
            pid = await sleeper(s)
            held = "SELECT backend_xmin IS NULL AND backend_xid IS NULL FROM pg_stat_activity WHERE pid = $1"
            assert await s.db.fetchval(held, pid)
    finally:
        await s.db.execute(f"ALTER DATABASE {name} RESET ALL")


@pytest.mark.parametrize("state", ["ready", "overdue"])
async def test_a_row_lock_that_is_given_up(s: Steps, p: Session, work: Work, dsn: str, state: str) -> None:
    """Claim and promotion during a cancel that is rolled back: nobody rings for that, and the worker sleeps."""
    [id] = await insert(s.db, **(OVERDUE if state == "overdue" else {}))
    await p("BEGIN")
    await p(cancel, id)
    async with working(work.app, dsn):
        await asleep(s.db)
        quiet = """SELECT bool_and(clock_timestamp() - state_change > interval '0.3 s') FROM pg_stat_activity
                   WHERE application_name LIKE 'notifyq claims %' AND datname = current_database()"""
        await eventually(lambda: s.db.fetchval(quiet))
        await p("ROLLBACK")
        assert await work.seen.reach(1, SOON) == [id]
