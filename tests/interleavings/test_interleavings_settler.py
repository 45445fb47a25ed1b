"""The settler by itself: what it does when the connection, or PostgreSQL, is in its way."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest

from notifyq.worker import unwritten
from notifyq.worker.outcome import Finished, Outcome
from notifyq.worker.outcome_writer import OutcomeWriter

from ..helpers.logs import Logged
from ..helpers.stages import OUTCOMES, Told, Writing
from ..helpers.steps import Session, Steps, until_blocked
from ..helpers.verbs import held, states
from ..helpers.waiting import Seen, eventually


@pytest.mark.parametrize("moment", ["the second refusal", "the write"])
async def test_a_connection_lost_as_the_settler_changes_its_lock_timeout(
    s: Steps, w: Session, p: Session, dsn: str, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table is locked. After the second refusal the settler waits for the lock as long as for anything else, and
    after the write for a shorter time again. A connection that ends then is replaced, and each outcome is written."""
    first, second = await w(held, 2)
    person = await s.session("person")
    refused, ended = Seen(), Seen()
    write = OutcomeWriter.write

    async def end(conn: Any) -> None:
        if not ended.items:
            [row] = await person("SELECT pg_terminate_backend($1, 10000)", conn.get_server_pid())
            ended.add(row[0])
            writing.settler.put(Finished(second, "done"))

    async def ending(self: Any, conn: Any, batch: list[Outcome], seconds: float) -> Any:
        try:
            kept = await write(self, conn, batch, seconds)
        except asyncpg.LockNotAvailableError:
            refused.add(1)
            if len(refused.items) == 2 and moment == "the second refusal":
                await end(conn)
            raise
        if moment == "the write":
            await end(conn)
        return kept

    monkeypatch.setattr(OutcomeWriter, "write", ending)
    await p("BEGIN")
    await p("LOCK TABLE notifyq.finished")
    writing = Writing(dsn, [Finished(first, "done")])
    async with writing:
        await refused.reach(2)
        await until_blocked(s.db, "settle", p)
        await p("COMMIT")
    assert ended.items == [True]
    assert len(writing.told.failures) == 1, "one connection was lost"
    assert await states(s.db) == {first.id: ("done", 1), second.id: ("done", 1)}


OLDER = """INSERT INTO notifyq.finished (id, created_at, run_at, processed_at, priority, attempts, state, queue, type,
                                         payload)
           VALUES ($1, now(), now(), now(), 0, 1, 'done', 'default', 'Older', '{}')"""
HISTORY = "SELECT id, type, state FROM notifyq.all_tasks ORDER BY id, type"


async def test_a_smaller_form_whose_id_is_in_the_history(
    s: Steps, w: Session, dsn: str, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """PostgreSQL refuses every form of an outcome. Later it would take a smaller one, and the history has its id. That
    form is tried in a transaction that is rolled back, and then written. Other outcomes don't wait for it."""
    monkeypatch.setattr(unwritten, "PAUSE_LEAST", 0.05)
    odd, good = await w(held, 2)
    tried = Seen()
    write = OutcomeWriter.write

    async def counted(self: Any, conn: Any, batch: list[Outcome], seconds: float) -> Any:
        tried.add(batch)
        return await write(self, conn, batch, seconds)

    monkeypatch.setattr(OutcomeWriter, "write", counted)
    await s.db.execute(OLDER, odd.id)
    await s.db.execute("ALTER TABLE notifyq.finished ADD CONSTRAINT no CHECK (type <> 'Known')")
    writing = Writing(dsn, [Finished(odd, "done", b'"\\u0000"')])
    async with writing:
        await tried.reach(4)  # three forms, and after a pause the first one again
        await s.db.execute("ALTER TABLE notifyq.finished DROP CONSTRAINT no")
        writing.settler.put(Finished(good, "done"))
        await writing.told.calls.reach(1)
    assert not writing.told.failures
    assert writing.told.calls.items == ["on_ids_reused"]
    rows = [tuple(row) for row in await s.db.fetch(HISTORY)]
    assert rows == [(odd.id, "Known", "dead"), (good.id, "Known", "done")]
    assert [line["ids"] for line in logged("deleted from the history")] == [[odd.id]]


async def test_a_rehearsed_write(s: Steps, w: Session, logged: Logged) -> None:
    """It changes nothing, and neither the worker nor the log is told. The write itself tells both."""
    [job] = await w(held, watched="true")
    await s.db.execute(OLDER, job.id)
    before = await s.db.fetch(HISTORY)
    told = Told()
    writer = OutcomeWriter(True, told)
    assert await writer.rehearse(w.conn, Finished(job, "done"), 8.0)
    assert await s.db.fetch(HISTORY) == before
    assert not logged("")
    assert not told.calls.items
    assert await writer.write(w.conn, [Finished(job, "done")], 8.0) == {}
    assert [tuple(row) for row in await s.db.fetch(HISTORY)] == [(job.id, "Known", "done")]
    assert [line["ids"] for line in logged("deleted from the history")] == [[job.id]]
    assert sorted(told.calls.items) == ["on_ids_reused", "on_released"]


async def test_the_worker_is_told_after_the_commit(s: Steps, w: Session, p: Session) -> None:
    """Outcomes of two kinds are one transaction. It waits for the row of the second, and nothing is told meanwhile; the
    waiting tasks would not find the slot free."""
    first, second = await w(held, 2, watched="true")
    told = Told()
    await p("BEGIN")
    await p("SELECT FROM notifyq.task WHERE id = $1 FOR UPDATE", second.id)
    batch = [OUTCOMES["finish"](first), OUTCOMES["later"](second)]
    waiting = await w.blocked_by(p, lambda conn: OutcomeWriter(True, told).write(conn, batch, 8.0))
    assert not told.calls.items
    await p("COMMIT")
    assert await waiting == {}
    assert told.calls.items == ["on_released"]


@pytest.mark.parametrize("kind", OUTCOMES)
async def test_each_kind_is_given_a_time(s: Steps, w: Session, p: Session, kind: str) -> None:
    """The time that the settler computes for a batch holds for the statement of each kind."""
    [job] = await w(held)
    await p("BEGIN")
    await p("SELECT FROM notifyq.task FOR UPDATE")
    await w("SET lock_timeout = '5s'")  # so that a statement without that time fails otherwise
    with pytest.raises(TimeoutError):
        await OutcomeWriter(True, Told()).write(w.conn, [OUTCOMES[kind](job)], 0.05)


async def test_a_proof_that_is_not_granted_is_tried_again(s: Steps, w: Session, p: Session, dsn: str) -> None:
    """Another session has the lock that proves that the worker lives. The settler writes, and asks for the lock again
    with the next outcome."""
    first, second = await w(held, 2)
    await p("SELECT pg_advisory_lock(1852990827, $1::integer)", first.worker)
    writing = Writing(dsn, [Finished(first, "done")])
    writing.settler.work_as(first.worker)
    proof = """SELECT count(*) FROM pg_locks JOIN pg_stat_activity USING (pid)
               WHERE application_name = 'notifyq settle' AND locktype = 'advisory' AND mode = 'ShareLock' AND granted"""
    async with writing:
        await eventually(lambda: states(s.db), {first.id: ("done", 1), second.id: ("running", 1)})
        assert await s.db.fetchval(proof) == 0
        await p("SELECT pg_advisory_unlock_all()")
        writing.settler.put(Finished(second, "done"))
        await eventually(lambda: s.db.fetchval(proof), 1)
