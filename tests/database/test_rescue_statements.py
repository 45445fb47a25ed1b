"""The statements of the heartbeat and of maintenance: rescue, reclaim, prune, hand back."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from typing import Any

import anyio
import pytest

from notifyq.database import connection, errors
from notifyq.database.connection import SQL
from notifyq.worker import job as claims
from notifyq.worker.left_out import LeftOut

from ..helpers.machine import limit
from ..helpers.statements import held, insert, register, silent, states, task
from ..helpers.verbs import reclaim_unowned, rescue, unseen


@pytest.fixture
async def worker(dsn: str) -> AsyncIterator[Any]:
    """A worker's connection to the test's database."""
    conn = await connection.connect_worker(dsn, "test")
    yield conn
    conn.terminate()


async def test_a_heartbeat_is_recorded_and_hears_of_lost_leases(worker: Any) -> None:
    me, (mine, gone, again) = await held(worker, 3)
    quiet, quieter = await register(worker, "quiet:1"), await register(worker, "quieter:1")
    await silent(worker, me, 20)
    await silent(worker, quiet, 3)
    await silent(worker, quieter, 5)
    loud = await register(worker, "loud:1")
    await worker.execute("DELETE FROM notifyq.task WHERE id = $1", gone)
    await worker.execute("UPDATE notifyq.task SET attempts = 2 WHERE id = $1", again)
    args = (me, 2, "busy", [mine, gone, again], [1, 1, 1], ["default"], ["Known"], False)
    row = await worker.fetchrow(SQL["send_heartbeat"], *args)
    assert row["registered"]
    assert not row["unhandled"]
    assert sorted(row["lost"]) == [gone, again]
    others = sorted((quiet, quieter, loud))
    assert row["others"] == others
    assert row["seen"] == [(await unseen(worker, other))[0] for other in others]
    seen = await worker.fetchrow(
        "SELECT running, status, now() - seen_at < interval '9 s' FROM notifyq.worker WHERE id = $1", me
    )
    assert tuple(seen) == (2, "busy", True)
    assert not (await worker.fetchrow(SQL["send_heartbeat"], 99, *args[1:]))["registered"]


async def test_a_heartbeat_sees_only_unhandled_tasks_that_it_could_run(worker: Any) -> None:
    me = await register(worker)
    await insert(worker, withheld=True, type="Strange")
    await insert(worker, withheld=True, queue="mail")
    await insert(worker)

    async def unhandled(queues: list[str], types: list[str]) -> bool:
        row = await worker.fetchrow(SQL["send_heartbeat"], me, 0, "ok", [], [], queues, types, False)
        return bool(row["unhandled"])

    assert not await unhandled(["default"], ["Known"])
    assert await unhandled(["default", "mail"], ["Other", "Known"])


LOCK = "SELECT pg_try_advisory_lock_shared(1852990827, $1)"


@pytest.mark.parametrize(
    ("seconds", "locked", "rescued"),
    [(0, False, False), (1, False, False), (2.5, False, True), (2.5, True, False), (31, True, True)],
)
async def test_rescue_only_of_the_dead(worker: Any, dsn: str, seconds: float, locked: bool, rescued: bool) -> None:
    """A worker is dead if its lock is free and it hasn't been seen for 2 seconds, or if it hasn't been seen for its
    lease of 30 s, with or without the lock."""
    me, (id,) = await held(worker)
    its_own = await connection.connect_worker(dsn, "test")
    if locked:
        assert await its_own.fetchval(LOCK, me)
    await silent(worker, me, seconds)
    row = await rescue(worker, me, 100)
    assert tuple(row) == (("host:1", 1, 0) if rescued else (None, 0, 0))
    assert (await task(worker, id))["state"] == ("ready" if rescued else "running")
    its_own.terminate()


async def test_rescue_counts_as_an_attempt_and_says_why(worker: Any) -> None:
    me, (id,) = await held(worker)
    await silent(worker, me, 5)
    await rescue(worker, me, 100)
    row = await task(worker, id)
    (error,) = json.loads(row["errors"])
    assert (row["attempts"], error["attempt"]) == (1, 1)
    assert row["error"] == "its worker host:1 vanished while it ran this task alone"
    other = await register(worker, "other:1")
    (job,) = await claims.claim(worker, other, {"default": 1}, 1)
    assert job.attempt == 2


@pytest.mark.parametrize(
    ("columns", "allowed", "dead"),
    [
        ({"attempts": 8}, 10, False),
        ({"attempts": 9}, 10, True),
        ({"attempts": 2}, 3, True),
        ({"attempts": 2, "max_attempts": 4}, 3, False),
        ({"attempts": 0, "max_attempts": 1}, 3, True),
        ({"attempts": 0, "max_attempts": 0}, 3, True),
        ({"attempts": 0, "max_attempts": -5}, 3, True),
        ({"attempts": 8, "type": "Strange"}, 3, False),
        ({"attempts": 9, "type": "Strange"}, 3, True),
    ],
)
async def test_rescue_ends_what_has_spent_its_attempts(
    worker: Any, columns: dict[str, Any], allowed: int, dead: bool
) -> None:
    """The number of attempts is that of the row, or else what its worker said of the type, or else 10."""
    me = await register(worker, allowed=[allowed])
    _, (id,) = await held(worker, worker=me, payload='{"a": 1}', **columns)
    await silent(worker, me, 5)
    row = await rescue(worker, me, 100)
    assert tuple(row) == ("host:1", int(not dead), int(dead))
    row = await task(worker, id)
    assert row["state"] == ("dead" if dead else "ready")
    assert (row["attempts"], row["payload"]) == (columns["attempts"] + 1, b'{"a": 1}')
    assert "vanished" in row["error"]
    assert row["worker"] == ("host:1" if dead else None)


CRASHES = "SELECT crashes, crashes_alone, parked, attempts FROM notifyq.task WHERE id = $1"


async def test_a_crash_beside_others_is_no_failure(worker: Any) -> None:
    """The task is ready again after the first crash, though it allows one attempt. After the second it is parked, and
    claimed as a suspect."""
    ids: list[int] = []
    for crash in (1, 2, 3):
        if crash == 1:
            me, ids = await held(worker, 3, max_attempts=1)
        else:
            me = await register(worker)
            crashed = await worker.fetch(
                SQL["list_crashed"], ["crashed:other", "crashed:default"], ["Known", "X"], [], 9
            )
            assert [row["crashes"] for row in crashed] == ([2, 2, 2] if crash == 3 else [])
            if crash == 2:
                jobs = await claims.claim(worker, me, {"default": 9}, 9)
            else:
                assert await claims.claim(worker, me, {"default": 9}, 9) == []
                assert await LeftOut().claim_crashed(worker, me, ["crashed:default"], ["Known"], 3, 9) == []
                jobs = await LeftOut().claim_crashed(worker, me, ["crashed:default"], ["Known"], 2, 2)
                assert len(jobs) == 2
            assert {(job.attempt, job.excused) for job in jobs} == {(crash, crash - 1)}
        await silent(worker, me, 5)
        assert await rescue(worker, me, 9) == ("host:1", 2 if crash == 3 else 3, 0)
        parked = None if crash == 1 else "crashed"
        assert tuple(await worker.fetchrow(CRASHES, ids[0])) == (crash, None, parked, crash)
    row = await task(worker, ids[0])
    assert (row["state"], row["waits_for"]) == ("scheduled", "crashed")
    assert row["error"] == "its worker host:1 vanished while it ran this task and others"


async def test_three_crashes_alone_are_the_end(worker: Any) -> None:
    """Ten attempts are allowed, and that doesn't count; nor do earlier crashes beside others."""
    me, (id,) = await held(worker, 1, attempts=7, crashes=7)
    for crash in (1, 2, 3):
        await silent(worker, me, 5)
        assert await rescue(worker, me, 9) == ("host:1", int(crash < 3), int(crash == 3))
        if crash < 3:
            assert tuple(await worker.fetchrow(CRASHES, id)) == (7, crash, "crashed", 7 + crash)
            me = await register(worker)
            [job] = await LeftOut().claim_crashed(worker, me, ["crashed:default"], ["Known"], 7 + crash, 9)
            assert (job.id, job.attempt, job.excused) == (id, 8 + crash, 7)
    row = await task(worker, id)
    assert (row["state"], row["error"]) == (
        "dead",
        "its worker host:1 vanished while it ran this task alone, 3 times by now",
    )


async def test_the_last_of_many_was_not_alone(worker: Any) -> None:
    """A rescue in pieces, or one that leaves what is locked, sees only one task in the end."""
    me, _ = await held(worker, 3)
    await silent(worker, me, 5)
    for _ in range(3):
        await rescue(worker, me, 1)
    rows = await worker.fetch("SELECT crashes, crashes_alone FROM notifyq.task")
    assert [tuple(row) for row in rows] == [(1, None)] * 3


async def test_a_rescue_in_pieces_buries_the_worker_at_the_end(worker: Any) -> None:
    me, _ = await held(worker, 5)
    await silent(worker, me, 5)
    found = [tuple(await rescue(worker, me, 2)) for _ in range(5)]
    assert found == [
        ("host:1", 2, 0),
        ("host:1", 2, 0),
        ("host:1", 1, 0),
        ("host:1", 0, 0),
        (None, 0, 0),
    ]
    assert await worker.fetchval("SELECT count(*) FROM notifyq.worker") == 0


async def test_two_rescuers_take_turns(worker: Any, dsn: str) -> None:
    me, _ = await held(worker, 2)
    await silent(worker, me, 5)
    other: Any = await connection.connect_worker(dsn, "test")
    transaction = other.transaction()
    await transaction.start()
    assert tuple(await rescue(other, me, 1)) == ("host:1", 1, 0)
    with anyio.fail_after(limit()):
        assert tuple(await rescue(worker, me, 9)) == (None, 0, 0)
    await transaction.commit()
    assert tuple(await rescue(worker, me, 9)) == ("host:1", 1, 0)
    other.terminate()


async def test_rescue_leaves_what_is_being_settled(worker: Any, dsn: str) -> None:
    """The worker wasn't quite dead: what it settles at this moment is settled, once."""
    me, (first, second) = await held(worker, 2)
    await silent(worker, me, 5)
    settler: Any = await connection.connect_worker(dsn, "test")
    transaction = settler.transaction()
    await transaction.start()
    await settler.fetch(SQL["finish"], me, [first], [1], ["done"], [], [], True)
    with anyio.fail_after(limit()):
        assert tuple(await rescue(worker, me, 9)) == ("host:1", 1, 0)
    await transaction.commit()
    assert await states(worker) == {first: "done", second: "ready"}
    settler.terminate()


async def test_unowned_tasks_are_ready_again(worker: Any) -> None:
    _, (mine,) = await held(worker)
    gone, (unowned,) = await held(worker, worker=await register(worker, "gone:1"))
    await worker.execute("DELETE FROM notifyq.worker WHERE id = $1", gone)
    assert await reclaim_unowned(worker) == 1
    assert await states(worker) == {mine: "running", unowned: "ready"}
    assert await reclaim_unowned(worker) == 0


async def test_prune_by_age_each_state_by_its_own(worker: Any) -> None:
    me, all_ids = await held(worker, 6)
    outcomes = ["done", "dead", "cancelled"] * 2
    await worker.fetch(SQL["finish"], me, all_ids, [1] * 6, outcomes, [], [], True)
    await worker.execute(
        "UPDATE notifyq.finished SET processed_at = now() - interval '1 h' WHERE id = ANY ($1)", all_ids[:3]
    )
    await insert(worker)
    assert await worker.fetchval(SQL["prune_finished"], 7200.0, 7200.0, 100, None) == 0
    assert await worker.fetchval(SQL["prune_finished"], 60.0, 7200.0, 100, None) == 2
    assert await worker.fetchval(SQL["prune_finished"], 60.0, 60.0, 100, None) == 1
    assert await worker.fetchval(SQL["prune_finished"], 0.0, 60.0, 1, None) == 1, "no more than the limit"
    assert await worker.fetchval(SQL["prune_finished"], 0.0, 60.0, 1, None) == 1
    assert await worker.fetchval(SQL["prune_finished"], 0.0, 60.0, 1, None) == 0
    assert sorted((await states(worker)).values()) == ["dead", "ready"]


async def test_hand_back_all_hands_back_all_of_one_worker(worker: Any) -> None:
    me, mine = await held(worker, 3)
    _, (other,) = await held(worker, worker=await register(worker, "other:1"))
    assert await worker.fetchval(SQL["hand_back_all"], me, None) == 3
    assert await states(worker) == {**dict.fromkeys(mine, "ready"), other: "running"}
    assert await worker.fetchval("SELECT max(attempts) FROM notifyq.task WHERE worker IS NULL") == 0


async def test_a_worker_that_holds_a_task_stays_registered(worker: Any) -> None:
    me, _ = await held(worker)
    await worker.execute(SQL["unregister_worker"], me)
    assert await worker.fetchval("SELECT count(*) FROM notifyq.worker") == 1
    await worker.fetchval(SQL["hand_back_all"], me, None)
    await worker.execute(SQL["unregister_worker"], me)
    assert await worker.fetchval("SELECT count(*) FROM notifyq.worker") == 0


async def test_a_rescuer_ends_the_bell_connection_of_that_worker_and_no_other(worker: Any, dsn: str, db: Any) -> None:
    bells = [await connection.connect_worker(dsn, role) for role in ("bell 7", "bell 77", "claims 7")]
    assert await worker.fetchrow(SQL["end_backends"], 7, ["bell"], 0) == (1, 0)
    assert await worker.fetchrow(SQL["end_backends"], 8, ["bell"], 0) == (0, 0)
    with pytest.raises(errors.TRANSIENT):
        await bells[0].fetchval("SELECT 1")
    assert [await bell.fetchval("SELECT 1") for bell in bells[1:]] == [1, 1]
    for bell in bells:
        bell.terminate()


async def test_a_worker_ends_its_own_backends_and_no_others(worker: Any, dsn: str) -> None:
    conns = [await connection.connect_worker(dsn, role) for role in ("claims 7", "bell 7", "claims 77", "bell 77")]
    both = ["claims", "bell"]
    assert await worker.fetchrow(SQL["end_backends"], 7, both, 2000) == (2, 0)
    names = "SELECT count(*) FROM pg_stat_activity WHERE application_name IN ('notifyq claims 7', 'notifyq bell 7')"
    assert await worker.fetchval(names) == 0
    assert await worker.fetchrow(SQL["end_backends"], 7, both, 2000) == (0, 0), "there is none"
    assert [await conn.fetchval("SELECT 1") for conn in conns[2:]] == [1, 1]
    for conn in conns:
        conn.terminate()


async def test_an_unanswered_claim_took_what_the_worker_does_not_know_of(worker: Any) -> None:
    me, mine = await held(worker, 3)
    _, (other,) = await held(worker, worker=await register(worker, "other:1"))
    assert await worker.fetchval(SQL["reclaim_unanswered"], me, mine[:1], [1], None) == 2
    assert await states(worker) == {mine[0]: "running", mine[1]: "ready", mine[2]: "ready", other: "running"}
    assert await worker.fetchval("SELECT max(attempts) FROM notifyq.task WHERE worker IS NULL") == 0
    # Of the remaining task it knows an earlier attempt. That one was lost, so the claim of this one is unanswered.
    assert await worker.fetchval(SQL["reclaim_unanswered"], me, mine[:1], [0], None) == 1
