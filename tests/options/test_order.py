"""Order: of one order_key one task runs at a time, in the order of ids."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import Any

import anyio
import pytest

import notifyq
from notifyq.database import connection

from ..helpers import verbs
from ..helpers.plans import MOMENTS, rolled_back, touched
from ..helpers.running import working
from ..helpers.steps import steps
from ..helpers.verbs import admit, free
from ..helpers.waiting import Seen, eventually

ORDER: dict[str, Any] = {"options": '{"order_key": "a"}'}


async def test_one_at_a_time_in_the_order_of_ids(dsn: str, db: Any) -> None:
    """This holds for any number of workers, priorities and keys. Tasks without a key pass."""
    app, began = notifyq.App(), Seen()
    running: dict[str, int] = {}

    class Step(notifyq.Task):
        key: str

    @app.handler
    async def step(task: Step, ctx: notifyq.Context) -> None:
        running[task.key] = running.get(task.key, 0) + 1
        assert running[task.key] == 1 or not task.key
        await anyio.sleep(0.002)
        running[task.key] -= 1
        began.add((task.key, ctx.id))

    async with app.connect(dsn):
        for n in range(15):
            for key in ("a", "b"):
                await app.enqueue(Step(key=key), order_key=key, priority=n % 3)
            await app.enqueue(Step(key=""))
        async with working(app, dsn), working(app, dsn), working(app, dsn):
            await began.reach(45)
            await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.task"), 0)
    for key in ("a", "b"):
        ids = [id for name, id in began.items if name == key]
        assert ids == sorted(ids)
        assert len(ids) == 15
    assert [name for name, _ in began.items[:15]].count("") > 5


@pytest.fixture
async def worker(db: Any) -> int:
    return await verbs.register(db)


async def test_a_retry_holds_back_what_follows(db: Any, worker: int) -> None:
    """It holds them back until it has ended, however long that takes: that is what the order is for."""
    first, second = await verbs.insert(db, 2, **ORDER)
    jobs = await verbs.claim(db, worker)
    assert await admit(db, jobs) == [(first, None), (second, "order")]
    assert await verbs.later(db, jobs[:1], 3600.0) == [first]
    assert await free(db) == 0
    assert await db.fetchval("SELECT notifyq.retry($1)", first)
    jobs = await verbs.claim(db, worker)
    assert await admit(db, jobs) == [(first, None)]
    assert await verbs.finish(db, jobs, "dead") == [first]
    assert await free(db) == 1
    assert await admit(db, await verbs.claim(db, worker)) == [(second, None)]


async def test_a_scheduled_task_holds_back_no_other_until_its_time(db: Any, worker: int) -> None:
    in_an_hour = datetime.now(UTC) + timedelta(hours=1)
    [future] = await verbs.insert(db, **ORDER, run_at=in_an_hour)
    first, second = await verbs.insert(db, 2, **ORDER)
    jobs = await verbs.claim(db, worker)
    assert await admit(db, jobs) == [(first, None), (second, "order")]
    assert await verbs.retry(db, future)  # now
    due = await verbs.claim(db, worker)
    assert await admit(db, due) == [(future, "order")], "one at a time"
    assert await verbs.finish(db, jobs[:1]) == [first]
    assert await free(db) == 1
    assert await admit(db, await verbs.claim(db, worker)) == [(future, None)], "it has the lowest id"


@pytest.mark.parametrize("how", ["cancelled", "deleted", "handed back", "unhandled"])
async def test_what_happens_to_the_first(db: Any, worker: int, how: str) -> None:
    first, second = await verbs.insert(db, 2, **ORDER)
    jobs = await verbs.claim(db, worker)
    assert await admit(db, jobs) == [(first, None), (second, "order")]
    match how:
        case "cancelled":
            assert await verbs.cancel(db, first)
        case "deleted":
            await db.execute("DELETE FROM notifyq.task WHERE id = $1", first)
        case "handed back":
            assert await verbs.hand_back(db, jobs[:1]) == [first]
        case _:
            assert await verbs.release_unhandled(db, jobs[:1]) == [first]
    gone = how in ("cancelled", "deleted")
    assert await free(db) == gone
    if how == "unhandled":
        assert not await verbs.claim(db, worker)
        assert await admit(db, await verbs.claim_unhandled(db, worker)) == [(first, None)]
    else:
        assert await admit(db, await verbs.claim(db, worker)) == [(second if gone else first, None)]


async def test_a_lower_id_that_is_seen_late(dsn: str) -> None:
    """The order is that of the ids that can be seen. In any case one task runs at a time."""
    async with steps(dsn) as s:
        late, worker = await s.session("late"), await s.worker("claims")
        id = await verbs.register(s.db)
        await late("BEGIN")
        [first] = await late(verbs.insert, **ORDER)
        [second] = await verbs.insert(s.db, **ORDER)
        running = await worker(verbs.claim, id)
        assert await worker(admit, running) == [(second, None)]
        await late("COMMIT")
        assert await worker(admit, await worker(verbs.claim, id)) == [(first, "order")]
        assert await worker(verbs.finish, running) == [second]
        assert await worker(free) == 1
        assert await worker(admit, await worker(verbs.claim, id)) == [(first, None)]


async def test_claims_of_two_workers(dsn: str) -> None:
    """Each worker has claimed tasks of one key, and the later ids are admitted first: they wait, and the first runs at
    once."""
    async with steps(dsn) as s:
        a, b = await s.worker("claims a"), await s.worker("claims b")
        one, two = await verbs.register(s.db), await verbs.register(s.db)
        first, second, third = await verbs.insert(s.db, 3, **ORDER)
        earlier = await a(verbs.claim, one, 1)
        later = await b(verbs.claim, two)
        assert await b(admit, later) == [(second, "order"), (third, "order")]
        assert await a(admit, earlier) == [(first, None)]
        assert await a(verbs.finish, earlier) == [first]
        assert await b(free) == 1
        assert await b(admit, await b(verbs.claim, two)) == [(second, None)]


async def test_in_a_crowd_of_its_key(dsn: str, db: Any) -> None:
    """Of 50,000 tasks half are scheduled, the others parked. Which one is admitted, and which is released next, is
    found in the index by all of its columns, and not by reading all entries of the key, or all that is parked."""
    id, first, second = await verbs.register(db), 25_001, 25_002
    await db.execute(
        f"""INSERT INTO notifyq.task (type, run_at, options)
            SELECT 'Known', now() + CASE WHEN i < {first} THEN interval '1 hour' ELSE '0' END, '{{"order_key": "a"}}'
            FROM generate_series(1, 50000) AS i;
            UPDATE notifyq.task SET withheld = true, parked = 'order', waiting_on = 'order:a' WHERE id >= {second}"""
    )
    await db.execute("VACUUM (ANALYZE) notifyq.task")
    [last] = await verbs.insert(db, options='{"order_key": "a", "limit_key": "b", "limit_running": 1}')
    worker = await connection.connect_worker(dsn, "test")
    for moment in MOMENTS:
        async with rolled_back(worker, moment):
            jobs = await verbs.claim(worker, id)
            said, to_judge = await touched(worker, lambda jobs=jobs: admit(worker, jobs))  # type: ignore[misc]
            assert said == [(first, None), (last, "order")]
            assert await verbs.finish(worker, jobs[:1]) == [first]
            ready, to_free = await touched(worker, lambda: free(worker))
            assert ready == 1
            jobs = await verbs.claim(worker, id)
            said, next_one = await touched(worker, lambda jobs=jobs: admit(worker, jobs))  # type: ignore[misc]
            assert said == [(second, None)]
            print(f"{moment}: {to_judge}, {to_free}, {next_one} entries and rows")
            assert max(to_judge, to_free, next_one) < 200
    worker.terminate()
