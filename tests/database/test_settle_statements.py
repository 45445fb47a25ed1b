"""The statements that settle tasks: fenced by the lease, a batch at a time."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import asyncpg
import pytest

from notifyq.database import connection
from notifyq.database.connection import SQL
from notifyq.worker import job as claims

from ..helpers.statements import held, ids, insert, register, states, task


@pytest.fixture
async def worker(dsn: str) -> AsyncIterator[Any]:
    """A worker's connection to the test's database."""
    conn = await connection.connect_worker(dsn, "test")
    yield conn
    conn.terminate()


FENCED: dict[str, list[Any]] = {
    "finish": [["done"], [], [], True],
    "retry_later": [[0.0], [b'{"error": "x"}']],
    "hand_back": [],
    "release_unhandled": [],
}


@pytest.mark.parametrize("name", [*FENCED, "finish_in_transaction"])
async def test_a_lost_lease_settles_nothing(worker: Any, name: str) -> None:
    """The lease of another worker, of another attempt or of an unknown id settles nothing: the row stays as it is, to
    the last column."""

    async def settle(by: int, target: int, attempt: int) -> list[Any]:
        if name == "finish_in_transaction":  # one task, and it returns no id
            return list(await worker.fetch(SQL[name], by, target, attempt, True))
        return ids(await worker.fetch(SQL[name], by, [target], [attempt], *FENCED[name]))

    me, (id,) = await held(worker)
    other = await register(worker, "other:1")
    (unclaimed,) = await insert(worker)
    before = await worker.fetch("SELECT * FROM notifyq.task ORDER BY id")
    for by, target, attempt in (
        (other, id, 1),
        (me, id, 2),
        (me, id, 0),
        (me, unclaimed, 0),
        (me, unclaimed, 1),
        (me, 10**15, 1),
        (99, id, 1),
    ):
        assert await settle(by, target, attempt) == []
        assert await worker.fetch("SELECT * FROM notifyq.task ORDER BY id") == before
    assert await worker.fetchval("SELECT count(*) FROM notifyq.finished") == 0
    assert len(await settle(me, id, 1)) == 1
    assert await settle(me, id, 1) == [], "a second time nothing"


@pytest.mark.parametrize("name", FENCED)
async def test_a_batch_applies_to_what_is_still_held(worker: Any, name: str) -> None:
    me, mine = await held(worker, 3)
    await worker.execute("UPDATE notifyq.task SET attempts = 2 WHERE id = $1", mine[1])
    args = [argument * 3 if isinstance(argument, list) else argument for argument in FENCED[name]]
    rows = await worker.fetch(SQL[name], me, mine, [1, 1, 1], *args)
    assert ids(rows) == [mine[0], mine[2]]
    assert (await task(worker, mine[1]))["state"] == "running"


@pytest.mark.parametrize("name", FENCED)
async def test_an_empty_batch_is_nothing(worker: Any, name: str) -> None:
    args = [[] if isinstance(argument, list) else argument for argument in FENCED[name]]
    assert await worker.fetch(SQL[name], 1, [], [], *args) == []


async def test_finish_keeps_the_outcome(worker: Any) -> None:
    me, (done, dead, cancelled) = await held(worker, 3, payload='{"a": 1}', priority=2, max_attempts=4)
    errors = [None, b'{"attempt": 1, "error": "oh", "traceback": "..."}', b'{"attempt": 1, "error": "no"}']
    results = [b'{"x": [1]}', None, None]
    rows = await worker.fetch(
        SQL["finish"], me, [done, dead, cancelled], [1, 1, 1], ["done", "dead", "cancelled"], results, errors, True
    )  # fmt: skip
    assert ids(rows) == [done, dead, cancelled]
    row = await task(worker, done)
    assert (row["state"], row["result"], row["error"], row["errors"]) == ("done", b'{"x": [1]}', None, None)
    assert (row["worker"], row["payload"], row["priority"], row["max_attempts"]) == (
        "host:1",
        b'{"a": 1}',
        2,
        4,
    )
    assert row["created_at"] <= row["processing_at"] <= row["processed_at"]
    row = await task(worker, dead)
    (error,) = json.loads(row["errors"])
    assert (row["state"], row["error"], error["traceback"], error["attempt"]) == ("dead", "oh", "...", 1)
    assert error["at"].startswith("20")
    assert (await task(worker, cancelled))["error"] == "no"
    assert await worker.fetchval("SELECT count(*) FROM notifyq.task") == 0


async def test_without_history_only_the_dead_are_kept(worker: Any) -> None:
    me, all_ids = await held(worker, 3)
    rows = await worker.fetch(SQL["finish"], me, all_ids, [1, 1, 1], ["done", "dead", "cancelled"], [], [], False)
    assert ids(rows) == all_ids
    assert await states(worker) == {all_ids[1]: "dead"}


async def test_an_unknown_state_is_refused_whole(worker: Any) -> None:
    me, all_ids = await held(worker, 2)
    with pytest.raises(asyncpg.CheckViolationError):
        await worker.fetch(SQL["finish"], me, all_ids, [1, 1], ["done", "lost"], [], [], True)
    assert set((await states(worker)).values()) == {"running"}


async def test_retry_later_schedules_and_remembers(worker: Any) -> None:
    me, (soon, later) = await held(worker, 2)
    errors = [b'{"attempt": 1, "error": "one"}'] * 2
    await worker.fetch(SQL["retry_later"], me, [soon, later], [1, 1], [0.0, 3600.0], errors)
    assert await states(worker) == {soon: "ready", later: "scheduled"}
    row = await task(worker, later)
    assert 3590 < (row["run_at"] - row["processed_at"]).total_seconds() < 3610
    assert (row["attempts"], row["worker"], row["error"]) == (1, None, "one")
    await claims.claim(worker, me, {"default": 1}, 1)
    await worker.fetch(SQL["retry_later"], me, [soon], [2], [9.0], [b'{"attempt": 2, "error": "two", "at": "x"}'])
    first, second = json.loads((await task(worker, soon))["errors"])
    assert (first["error"], second["error"]) == ("one", "two")
    assert second["at"] > first["at"], "by the database's clock, whatever the worker says"


async def test_a_handed_back_attempt_did_not_happen(worker: Any) -> None:
    me, (id,) = await held(worker, 1)
    await worker.fetch(SQL["hand_back"], me, [id], [1])
    row = await task(worker, id)
    assert (row["state"], row["attempts"], row["errors"], row["processed_at"]) == ("ready", 0, None, None)
    (job,) = await claims.claim(worker, me, {"default": 1}, 1)
    assert job.attempt == 1


async def test_a_due_task_that_is_handed_back_is_still_ready(worker: Any) -> None:
    await insert(worker, created_at="2000-01-01", run_at="2001-01-01")
    await worker.fetchrow(SQL["check_due"], ["default"], [], 9, None, None)
    me = await register(worker)
    (job,) = await claims.claim(worker, me, {"default": 1}, 1)
    await worker.fetch(SQL["hand_back"], me, [job.id], [1])
    assert await states(worker) == {job.id: "ready"}


async def test_an_unhandled_task_holds_up_no_other(worker: Any) -> None:
    me, (id,) = await held(worker, 1)
    await worker.fetch(SQL["release_unhandled"], me, [id], [1])
    row = await task(worker, id)
    assert (row["state"], row["attempts"]) == ("ready", 0)
    assert await claims.claim(worker, me, {"default": 1}, 1) == []
    (job,) = await claims.claim(worker, me, {"default": 1}, 1, unhandled=["Known"])
    assert (job.id, job.attempt) == (id, 1)
