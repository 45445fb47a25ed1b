"""The bell and the turn, statement by statement: enqueuers, sleepers and strangers, in an order made to go wrong.

Most tests have no worker: a session falls asleep by the worker's own functions, one listens, and one claims.
test_doorbell.py has the same with whole workers. The tests with a worker here need one that is awake.

In each docstring, "X during Y" means that X begins while Y is not committed yet. "Hidden" is an enqueuer that didn't
ring, since no worker slept when it inserted."""

from __future__ import annotations

from typing import Any

import anyio
import asyncpg
import pytest

from ..helpers.machine import limit
from ..helpers.steps import PREPARED, Session, Steps
from ..helpers.verbs import claim, fall_asleep, insert, register, retry, states

SOON = 3.0  # seconds, on an idle machine: only the bell finds a task that soon


@pytest.fixture
async def w(s: Steps) -> Session:
    """A worker's session for claims."""
    return await s.worker("claims")


class Heard:
    """What a session that listens has heard."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.rings: list[str] = []

    async def listen(self) -> None:
        await self.session.conn.add_listener("notifyq", lambda *args: self.rings.append(args[3]))

    async def so_far(self) -> list[str]:
        """All notifications that were committed before: a backend delivers them in the order of the commits."""
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


# --- Enqueuers that didn't ring


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
async def test_a_hidden_enqueuer(s: Steps, bell: Session, p: Session, w: Session, way: str, level: str) -> None:
    """Sleep during enqueue, in any isolation level, in any way: sleep is granted at the commit, and the next claim
    takes the task."""
    me = await w(register)
    await p(f"BEGIN ISOLATION LEVEL {level}")
    await p("SELECT FROM notifyq.task")
    await p(WAYS[way])
    waiting = await bell.blocked_by(p, fall_asleep)
    assert await w(claim, me) == []
    await p("COMMIT")
    assert await waiting
    assert len(await w(claim, me)) == 1


async def test_two_hidden_enqueuers(s: Steps, bell: Session, p: Session, w: Session) -> None:
    """Sleep during two enqueues: the last commit lets the worker sleep, and the claim after that takes both tasks."""
    q, me = await s.session("q"), await w(register)
    for session in (p, q):
        await session("BEGIN")
        await session(insert)
    waiting = await bell.blocked_by(p, fall_asleep)
    assert q.pid in await bell.blockers()
    await q("COMMIT")
    assert not waiting.over
    assert await bell.blockers() == [p.pid]
    await p("COMMIT")
    assert await waiting
    assert len(await w(claim, me)) == 2


@pytest.mark.parametrize("end", ["ROLLBACK", "killed"])
async def test_a_hidden_enqueuer_that_fails(s: Steps, bell: Session, p: Session, w: Session, end: str) -> None:
    """Sleep during an enqueue that is rolled back, or whose session is killed: the worker sleeps, and has missed no
    task."""
    await p("BEGIN")
    await p(insert)
    waiting = await bell.blocked_by(p, fall_asleep)
    if end == "killed":
        await s.db.fetch("SELECT pg_terminate_backend($1)", p.pid)
    else:
        await p(end)
    assert await waiting
    assert await w(claim, await w(register)) == []


@pytest.mark.parametrize("end", ["COMMIT", "ROLLBACK"])
async def test_a_hidden_enqueuer_that_is_prepared(s: Steps, bell: Session, p: Session, w: Session, end: str) -> None:
    """Sleep during an enqueue that is prepared, so that no session has it: it keeps its lock until COMMIT or ROLLBACK
    PREPARED."""
    me, name = await w(register), await s.db.fetchval("SELECT current_database()")
    await p("BEGIN")
    await p(insert)
    await p(f"PREPARE TRANSACTION '{name}'")
    waiting = await bell.blocked_by(PREPARED, fall_asleep)
    await p(f"{end} PREPARED '{name}'")
    assert await waiting
    assert len(await w(claim, me)) == (end == "COMMIT")


async def test_a_transaction_that_rang_can_not_be_prepared(s: Steps, bell: Session, p: Session) -> None:
    """PREPARE TRANSACTION while a worker sleeps: PostgreSQL refuses it, and no task is enqueued."""
    assert await bell(fall_asleep)
    await p("BEGIN")
    await p(insert)
    with pytest.raises(asyncpg.FeatureNotSupportedError, match="NOTIFY"):
        await p("PREPARE TRANSACTION 'rang'")
    assert await states(s.db) == {}


async def test_it_enqueues_again_while_a_worker_waits_for_it(
    s: Steps, bell: Session, p: Session, w: Session, heard: Heard
) -> None:
    """A transaction that a worker waits for enqueues once more: again it doesn't ring, and both tasks are seen."""
    me = await w(register)
    await p("BEGIN")
    await p(insert)
    waiting = await bell.blocked_by(p, fall_asleep)
    await p(insert)
    await p("COMMIT")
    assert await waiting
    assert len(await w(claim, me)) == 2
    assert await heard.so_far() == []


async def test_its_savepoint_is_rolled_back_while_a_worker_waits_for_it(
    s: Steps, bell: Session, p: Session, w: Session, heard: Heard
) -> None:
    """Sleep during a savepoint's enqueue: the worker sleeps when that is undone, and a later enqueue of the same
    transaction rings."""
    await p("BEGIN")
    await p("SAVEPOINT here")
    await p(insert)
    waiting = await bell.blocked_by(p, fall_asleep)
    await p("ROLLBACK TO SAVEPOINT here")
    assert await waiting
    await p(insert)
    assert await heard.so_far() == []
    await p("COMMIT")
    assert await heard.so_far() == [""]
    assert len(await w(claim, await w(register))) == 1


async def test_a_released_savepoint_keeps_its_promise(s: Steps, bell: Session, p: Session, w: Session) -> None:
    """Sleep during a savepoint's enqueue: when the savepoint is released, the worker goes on waiting for the
    transaction."""
    await p("BEGIN")
    await p("SAVEPOINT here")
    await p(insert)
    await p("RELEASE SAVEPOINT here")
    waiting = await bell.blocked_by(p, fall_asleep)
    await p("COMMIT")
    assert await waiting
    assert len(await w(claim, await w(register))) == 1


# --- Enqueuers that ring


async def test_an_enqueue_while_a_worker_waits_to_sleep(s: Steps, bell: Session, p: Session, heard: Heard) -> None:
    """Enqueue while a worker waits to sleep: it waits for no session, doesn't lengthen the worker's wait, and rings."""
    await p("BEGIN")
    await p(insert)
    waiting = await bell.blocked_by(p, fall_asleep)
    q = await s.session("q")
    await q("BEGIN")
    await q(insert)
    assert await heard.so_far() == []
    await p("COMMIT")
    assert await waiting, "q is open, and didn't ring"
    await q("COMMIT")
    assert await heard.so_far() == [""]


async def test_one_of_two_sleepers_wakes_up(s: Steps, bell: Session, p: Session, heard: Heard) -> None:
    """Enqueue while a second fleet sleeps: it rings until no worker sleeps."""
    other = await s.worker("bell 2")
    await other("BEGIN")
    assert await bell(fall_asleep)
    assert await other(fall_asleep), "both at once"
    await bell("ROLLBACK")
    await p(insert)
    assert await heard.so_far() == [""]
    await other("ROLLBACK")
    await p(insert)
    assert await heard.so_far() == []


async def test_one_ring_for_a_transaction(s: Steps, bell: Session, p: Session, heard: Heard) -> None:
    """NOTIFY is folded within a transaction, its savepoints included, and never across two."""
    assert await bell(fall_asleep)
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
async def test_what_people_do_while_a_worker_sleeps(
    s: Steps, bell: Session, p: Session, heard: Heard, what: str
) -> None:
    """A statement rings once for all its rows if a worker may have a task to claim, and otherwise not."""
    await p(insert, run_at="2999-01-01")
    assert await bell(fall_asleep)
    await p(SAID[what][0])
    assert await heard.so_far() == [""] * SAID[what][1]


async def test_a_listener_in_a_transaction_hears_at_its_end(s: Steps, bell: Session, p: Session, heard: Heard) -> None:
    """A ring during a listener's transaction isn't lost, but comes late. So claims and LISTEN are never in a
    transaction."""
    assert await bell(fall_asleep)
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
async def test_a_stranger_locks_the_bell(s: Steps, bell: Session, p: Session, heard: Heard, mode: str) -> None:
    """Enqueue while pg_dump, VACUUM or DDL has locked the bell: it never waits; it is silent, or rings. A worker that
    wants to sleep may, or waits for that session."""
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
        assert await bell(fall_asleep)
    else:
        waiting = await bell.blocked_by(stranger, fall_asleep)
        await stranger("COMMIT")
        assert await waiting
