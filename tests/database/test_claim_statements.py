"""The statements that claim tasks, and check_due, which makes scheduled tasks ready."""

from __future__ import annotations

from collections.abc import AsyncIterator
from random import Random
from typing import Any

import anyio
import pytest

from notifyq.database import connection
from notifyq.database.connection import SQL
from notifyq.worker import job as claims
from notifyq.worker.cursors import FromCursor

from ..helpers.databases import Sessions
from ..helpers.machine import limit
from ..helpers.statements import held, insert, register, states, task


@pytest.fixture
async def worker(dsn: str) -> AsyncIterator[Any]:
    """A worker's connection to the test's database."""
    conn = await connection.connect_worker(dsn, "test")
    yield conn
    conn.terminate()


async def test_claim_goes_by_priority_then_by_id(worker: Any) -> None:
    me = await register(worker)
    low, first, second, top, last = [
        (await insert(worker, priority=priority))[0] for priority in (-32768, 5, 5, 32767, 0)
    ]
    jobs = await claims.claim(worker, me, {"default": 3}, 3)
    assert [job.id for job in jobs] == [top, first, second]
    assert [job.id for job in await claims.claim(worker, me, {"default": 3}, 3)] == [last, low]


async def test_a_claim_from_a_cursor_sees_no_task_before_it(worker: Any) -> None:
    """Of each level (a queue and a priority) it reads from the cursor on: the highest priority of a queue first, up to
    the queue's capacity. It reads no level without a cursor."""
    me = await register(worker)
    a = [await insert(worker, 4, queue="a", priority=priority) for priority in (0, 5)]
    b = await insert(worker, 4, queue="b")
    await insert(worker, 4, queue="b", priority=1)
    from_cursor = FromCursor(["a", "a", "b"], [5, 0, 0], [a[1][2], a[0][1], b[1]])
    jobs = await claims.claim(worker, me, {"a": 3, "b": 2}, 9, from_cursor=from_cursor)
    assert [job.id for job in jobs if job.queue == "a"] == [*a[1][2:], a[0][1]]
    assert [job.id for job in jobs if job.queue == "b"] == b[1:3]
    assert len(await claims.claim(worker, me, {"a": 9, "b": 9}, 2, from_cursor=from_cursor)) == 2
    assert [job.id for job in await claims.claim(worker, me, {"a": 9}, 9)] == [*a[1][:2], a[0][0]]


async def test_claim_keeps_to_each_queues_capacity_and_to_the_limit(worker: Any) -> None:
    me = await register(worker)
    for queue in "abc":
        await insert(worker, 5, queue=queue)
    jobs = await claims.claim(worker, me, {"a": 2, "b": 3, "nobody": 9}, 4)
    assert [job.queue for job in jobs] == ["a", "a", "b", "b"]
    jobs = await claims.claim(worker, me, {"b": 9, "a": 0}, 100)
    assert [job.queue for job in jobs] == ["b", "b", "b"]


async def test_a_claim_leaves_tasks_that_find_no_thread(worker: Any, connect: Sessions) -> None:
    """The result is compared with a count of one task after the other; and another worker can claim what is left."""
    me, random = await register(worker), Random(5)
    other = await connect()
    for _ in range(60):
        kinds = random.randint(1, 3)
        types = [f"Plain{n}" for n in range(kinds)]
        shares = [random.choice([1, 1, 2, 5]) for _ in types]
        threads = claims.Threads(types, shares, [random.randint(0, 6) for _ in types], random.randint(0, 4))
        levels = [random.randint(0, 1) for _ in range(24)]
        chosen = [random.choice([*types, "Async"]) for _ in levels]
        await worker.execute("INSERT INTO notifyq.task (type, priority) SELECT * FROM unnest($1::text[], $2::int2[])",
                             chosen, levels)  # fmt: skip
        rows = await worker.fetch("SELECT id, type, priority FROM notifyq.task ORDER BY priority DESC, id")
        limit = random.choice([1, 10, 24])
        want, held = [], dict(zip(types, threads.held, strict=True))
        spare = threads.spare
        for id, type, _ in rows[:limit]:
            if type in held:
                if held[type] % shares[types.index(type)] == 0:
                    if not spare:
                        continue
                    spare -= 1
                held[type] += 1
            want.append(id)
        from_cursor = random.choice([None, FromCursor(["default"] * 2, [1, 0], [1, 1])])
        jobs = await claims.claim(worker, me, {"default": limit}, limit, from_cursor=from_cursor, threads=threads)
        assert [job.id for job in jobs] == want, (threads, chosen, levels)
        assert threads.opened(jobs) == threads.spare - spare
        left = [id for id, _, _ in rows if id not in want]
        assert [job.id for job in await claims.claim(other, me, {"default": 24}, 24)] == left
        await worker.execute("DELETE FROM notifyq.task")


async def test_claim_says_what_a_handler_needs(worker: Any) -> None:
    me = await register(worker)
    (id,) = await insert(worker, payload='{"to": "ä"}', priority=7, max_attempts=3)
    (job,) = await claims.claim(worker, me, {"default": 1}, 1)
    assert (job.id, job.worker, job.attempt, job.priority, job.max_attempts) == (id, me, 1, 7, 3)
    assert (job.type, job.queue, job.payload) == ("Known", "default", '{"to": "ä"}'.encode())
    row = await task(worker, id)
    assert (row["state"], row["worker"], row["attempts"]) == ("running", "host:1", 1)
    assert row["processing_at"] > row["created_at"] == job.created_at


async def test_claim_leaves_running_scheduled_and_unhandled_tasks(worker: Any) -> None:
    me, _ = await held(worker, 1)
    await insert(worker, run_at="2999-01-01")
    await insert(worker, withheld=True)
    (promoted,) = await insert(worker, run_at="2999-01-01", promoted=True)
    (early,) = await insert(worker, run_at="-infinity")
    assert [job.id for job in await claims.claim(worker, me, {"default": 9}, 9)] == [promoted, early]


async def test_two_claims_at_once_share(worker: Any, dsn: str) -> None:
    """The second skips what the first has locked, without waiting. What the first rolls back can be claimed again."""
    me = await register(worker)
    all_ids = await insert(worker, 5)
    other: Any = await connection.connect_worker(dsn, "test")
    transaction = other.transaction()
    await transaction.start()
    with anyio.fail_after(limit()):
        assert [job.id for job in await claims.claim(other, me, {"default": 2}, 2)] == all_ids[:2]
        assert [job.id for job in await claims.claim(worker, me, {"default": 9}, 9)] == all_ids[2:]
        await transaction.rollback()
        assert [job.id for job in await claims.claim(worker, me, {"default": 9}, 9)] == all_ids[:2]
    other.terminate()


async def test_a_worker_that_was_given_up_claims_nothing(worker: Any) -> None:
    (id,) = await insert(worker)
    await insert(worker, withheld=True)
    assert await claims.claim(worker, 99, {"default": 9}, 9) == []
    assert await claims.claim(worker, 99, {"default": 9}, 9, from_cursor=FromCursor(["default"], [0], [1])) == []
    assert await claims.claim(worker, 99, {"default": 9}, 9, unhandled=["Known"]) == []
    assert (await task(worker, id))["attempts"] == 0


@pytest.mark.parametrize("at", ["infinity", "-infinity", "20000-01-01", "4000-01-01 BC", "0001-01-01"])
async def test_an_odd_created_at_is_claimed_all_the_same(worker: Any, at: str) -> None:
    """One row of a batch has a time that Python's datetime doesn't have, and the batch is leased already."""
    me = await register(worker)
    await insert(worker, 2)
    await insert(worker, created_at=at, run_at="-infinity")
    await insert(worker, created_at=at, withheld=True)
    assert len(await claims.claim(worker, me, {"default": 9}, 9)) == 3
    assert len(await claims.claim(worker, me, {"default": 9}, 9, unhandled=["Known"])) == 1


@pytest.mark.parametrize("attempts", [-32768, -1, 32766, 32767])
async def test_odd_attempts_are_claimed_all_the_same(worker: Any, attempts: int) -> None:
    """One row whose counter would overflow must not keep the whole queue from being claimed."""
    me = await register(worker)
    await insert(worker, attempts=attempts)
    await insert(worker, 2)
    jobs = await claims.claim(worker, me, {"default": 9}, 9)
    assert [job.attempt for job in jobs] == [min(attempts + 1, 32767), 1, 1]


async def test_a_claim_leaves_out_large_payloads(worker: Any) -> None:
    """Their size is what they are when they aren't compressed: 1 MB of x is 12 kB on disk. This holds for each claim
    statement."""
    me = await register(worker)
    insert_one = """INSERT INTO notifyq.task (type, payload, withheld) SELECT 'Known', to_jsonb(text), $1
                    FROM (VALUES (repeat('x', 3000)), (repeat('x', 1000000)), (repeat('x', 60000)),
                                 ((SELECT string_agg(md5(n::text), '') FROM generate_series(1, 1000) n)))
                         AS v (text) RETURNING id"""
    for statement in ("claim", "claim_from_cursor", "claim_fitting", "claim_from_cursor_fitting", "claim_unhandled"):
        all_ids = [row[0] for row in await worker.fetch(insert_one, statement == "claim_unhandled")]
        stored = "SELECT pg_column_size(payload) FROM notifyq.task WHERE id = $1"
        assert await worker.fetchval(stored, all_ids[1]) < 16000, "compressed"
        assert await worker.fetchval(stored, all_ids[2]) < 1000, "compressed, to a small part of what is allowed"
        from_cursor = FromCursor(["default"], [0], [1]) if "from_cursor" in statement else None
        unhandled = ["Known"] if statement == "claim_unhandled" else None
        threads = claims.Threads([], [], [], 0) if "fitting" in statement else None
        jobs = await claims.claim(
            worker, me, {"default": 9}, 9, from_cursor=from_cursor, unhandled=unhandled, threads=threads
        )
        assert [job.id for job in jobs] == all_ids
        assert [job.payload is None for job in jobs] == [False, True, True, True], statement
        assert jobs[0].payload == b'"' + b"x" * 3000 + b'"'
        await worker.execute("UPDATE notifyq.task SET worker = NULL, withheld = $1", statement == "claim_unhandled")
        jobs = await claims.claim(
            worker, me, {"default": 9}, 9, from_cursor=from_cursor, unhandled=unhandled, threads=threads, blind=True
        )
        assert [job.payload for job in jobs] == [None] * 4
        await worker.execute("DELETE FROM notifyq.task")


async def test_a_claim_for_many_takes_smaller_payloads_with_it(worker: Any) -> None:
    """All that an answer holds is bounded, so the size that each payload may have depends on how many tasks are asked
    for."""
    me = await register(worker)
    text = "SELECT string_agg(sha256(n::text::bytea)::text, '') FROM generate_series(1, 200) n"
    for capacity, inline in ((100, True), (1000, False)):
        (id,) = await insert(worker)
        await worker.execute(f"UPDATE notifyq.task SET payload = to_jsonb(({text})) WHERE id = $1", id)
        (job,) = await claims.claim(worker, me, {"default": capacity}, capacity)
        assert (job.payload is not None) is inline


async def test_sizes_are_asked_for_up_to_so_many_bytes(worker: Any) -> None:
    """At least one payload is returned. For a lost lease the answer says so, and it has only what was asked for."""
    me, mine = await held(worker, 4)
    await worker.execute("UPDATE notifyq.task SET payload = to_jsonb(repeat('x', 98))")
    await worker.execute("UPDATE notifyq.task SET attempts = 2 WHERE id = $1", mine[0])

    async def sizes(most: int) -> list[tuple[int, int | None]]:
        return [tuple(row) for row in await worker.fetch(SQL["measure_payloads"], me, mine, [1] * 4, most)]

    assert await sizes(1) == [(mine[0], None), (mine[1], 100)]
    assert await sizes(101) == [(mine[0], None), (mine[1], 100), (mine[2], 100)]
    assert len(await sizes(10**9)) == 4
    assert await worker.fetch(SQL["measure_payloads"], me, [], [], 1) == []
    got = await worker.fetch(SQL["fetch_payloads"], me, mine, [1] * 4)
    assert {row[0]: len(row[1]) for row in got} == dict.fromkeys(mine[1:], 100)


HOSTILE = [
    "it's",
    '"quoted"',
    "'); DROP SCHEMA notifyq CASCADE; --",
    "back\\slash",
    "{a,b}",
    "NULL",
    "$1",
    "%s",
    " ",
    "new\nline",
    "\ud83d\ude00".encode("utf-16", "surrogatepass").decode("utf-16"),
    "a\u0301\u202e",
    "\U0001f600" * 200,
]


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
async def test_hostile_names_of_queues_and_types(worker: Any, name: str) -> None:
    """They pass every array and every statement, to the end and back. 200 characters of four bytes fit each index."""
    me = await register(worker, types=[name])
    await insert(worker, 2, queue=name, type=name)
    jobs = await claims.claim(worker, me, {name: 9}, 9)
    keys = [job.id for job in jobs], [job.attempt for job in jobs]
    assert {(job.queue, job.type) for job in jobs} == {(name, name)}
    assert len(await worker.fetch(SQL["release_unhandled"], me, *keys)) == 2
    assert (await worker.fetchrow(SQL["send_heartbeat"], me, 0, "ok", [], [], [name], [name], False))["unhandled"]
    assert len(await claims.claim(worker, me, {name: 9}, 9, unhandled=[name])) == 2
    assert len(await worker.fetch(SQL["finish"], me, *keys, ["done"] * 2, [], [], True)) == 2
    assert await worker.fetchval("SELECT count(*) FROM notifyq.all_tasks WHERE queue = $1 AND type = $1", name) == 2


@pytest.mark.parametrize("length", [201, 1_000_000])
async def test_a_type_that_is_too_long_to_be_one_is_claimed_cut(worker: Any, length: int) -> None:
    """The claim returns 201 characters of it, which show that it is too long, and are all that a worker has to hold.
    The row keeps it whole."""
    me = await register(worker)
    (id,) = await insert(worker, type="x" * length)
    for from_cursor in (None, FromCursor(["default"], [0], [id])):
        (job,) = await claims.claim(worker, me, {"default": 9}, 9, from_cursor=from_cursor)
        assert (job.id, job.type) == (id, "x" * 201)
        assert len(await worker.fetch(SQL["hand_back"], me, [id], [1])) == 1
    assert await worker.fetchval("SELECT length(type) FROM notifyq.task WHERE id = $1", id) == length


async def test_a_queue_of_201_characters_is_served_by_no_worker(worker: Any) -> None:
    """No worker can serve it (test_config). It holds up no other queue, and a person sees the task and can cancel
    it."""
    me = await register(worker)
    (id,) = await insert(worker, queue="x" * 201)
    (good,) = await insert(worker)
    assert [job.id for job in await claims.claim(worker, me, {"default": 9}, 9)] == [good]
    assert (await task(worker, id))["state"] == "ready"
    assert await worker.fetchval("SELECT notifyq.cancel($1)", id)


async def test_claim_unhandled_takes_only_unhandled_tasks_of_known_types(worker: Any) -> None:
    me = await register(worker)
    await insert(worker)
    await insert(worker, withheld=True, type="Strange")
    await insert(worker, withheld=True, queue="mail")
    low, high = (await insert(worker, withheld=True))[0], (await insert(worker, withheld=True, priority=1))[0]
    jobs = await claims.claim(worker, me, {"default": 9}, 9, unhandled=["Known", "Other"])
    assert [job.id for job in jobs] == [high, low]
    assert await worker.fetchval("SELECT count(*) FROM notifyq.task WHERE withheld") == 2
    assert await claims.claim(worker, me, {"default": 1, "mail": 0}, 9, unhandled=["Strange"]) != []


async def test_due_promotes_and_tells_the_next(worker: Any) -> None:
    past: dict[str, Any] = {"created_at": "2000-01-01", "run_at": "2001-01-01"}
    overdue = await insert(worker, 3, **past)
    await insert(worker, queue="other", **past)
    await insert(worker, run_at="2999-01-01")
    (soon,) = await insert(worker)
    await worker.execute("UPDATE notifyq.task SET run_at = created_at + interval '1 h' WHERE id = $1", soon)
    row = await worker.fetchrow(SQL["check_due"], ["default", "none"], [], 2, None, None)
    assert row["promoted"] == 2, "at most so many"
    row = await worker.fetchrow(SQL["check_due"], ["default", "none"], [], 2, None, None)
    assert row["promoted"] == 1
    assert 3590 < row["next_seconds"] <= 3600
    assert (row["ready"], row["inserted"], row["echo"]) == (False, 6, None)
    assert {id for id, state in (await states(worker)).items() if state == "ready"} == set(overdue)


async def test_due_sees_tasks_in_a_queue_without_capacity(worker: Any) -> None:
    assert not (await worker.fetchrow(SQL["check_due"], [], ["default"], 9, None, None))["ready"]
    await insert(worker, run_at="2999-01-01")
    assert not (await worker.fetchrow(SQL["check_due"], [], ["default"], 9, None, None))["ready"]
    await insert(worker)
    assert (await worker.fetchrow(SQL["check_due"], [], ["none", "default"], 9, None, None))["ready"]


@pytest.mark.parametrize("at", ["infinity", "294276-12-31 23:59:59"])
async def test_a_run_at_beyond_all_days_stops_no_worker(worker: Any, at: str) -> None:
    await insert(worker, run_at=at)
    row = await worker.fetchrow(SQL["check_due"], ["default"], [], 9, None, None)
    assert row["next_seconds"] > 9e12
    await insert(worker, run_at="2999-01-01")
    assert (await worker.fetchrow(SQL["check_due"], ["default"], [], 9, None, None))["next_seconds"] < 9e12


async def test_due_of_two_workers_at_once(worker: Any, dsn: str) -> None:
    """check_due skips a row that another session promotes at this moment, and doesn't return it as the next one
    either."""
    await insert(worker, 2, created_at="2000-01-01", run_at="2001-01-01")
    other: Any = await connection.connect_worker(dsn, "test")
    transaction = other.transaction()
    await transaction.start()
    assert (await other.fetchrow(SQL["check_due"], ["default"], [], 9, None, None))["promoted"] == 2
    with anyio.fail_after(limit()):
        row = await worker.fetchrow(SQL["check_due"], ["default"], [], 9, None, None)
    assert (row["promoted"], row["next_seconds"]) == (0, None)
    await transaction.rollback()
    other.terminate()
