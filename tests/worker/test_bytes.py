"""Large payloads and results: every statement is bounded by bytes as well as rows, and one that takes too long is tried
again with less. Lines are slow here and timeouts short, so that a few MB are what a few hundred MB are elsewhere."""

from __future__ import annotations

import json
import secrets
from collections.abc import AsyncIterator, Iterator
from typing import Any
from urllib.parse import urlsplit

import anyio
import anyio.to_thread
import psycopg
import pytest

import notifyq
from notifyq.client import bulk, enqueue
from notifyq.database import connection, schema
from notifyq.embedded import Server
from notifyq.worker import large_payloads, unwritten
from notifyq.worker.settle import Settler

from ..helpers import verbs
from ..helpers.databases import admin, database
from ..helpers.logs import Logged
from ..helpers.machine import limit
from ..helpers.proxy import Proxy, free_port, proxy_to
from ..helpers.running import working
from ..helpers.waiting import Seen, eventually

pytestmark = pytest.mark.slow


# Text that PostgreSQL can't compress to less than two thirds.
NOISE = "(SELECT left(string_agg(sha256(n::text::bytea)::text, ''), {size}) FROM generate_series(1, {size} / 60 + 1) n)"


class Note(notifyq.Task):
    name: str
    ballast: str = ""
    waits: bool = False


class Make(notifyq.Task):
    name: str
    size: int
    ballast: str = ""


class Part(notifyq.Task):
    name: str
    ballast: str = ""


@pytest.fixture(scope="module")
def tcp() -> Iterator[Server]:
    """A server on TCP."""
    with Server(port=free_port()) as running:
        yield running


@pytest.fixture(scope="module")
async def tcp_template(tcp: Server) -> str:
    await admin(tcp, "CREATE DATABASE template_notifyq")
    conn = await connection.connect(tcp.dsn("template_notifyq"), role="test")
    await schema.migrate(conn)
    await conn.close()
    return "template_notifyq"


class Rig:
    """An app whose worker is behind a proxy, and a connection that isn't."""

    def __init__(self, proxy: Proxy, dsn: str, db: Any) -> None:
        self.proxy = proxy
        self.dsn = proxy.dsn(dsn)
        self.db = db
        self.app = notifyq.App()
        self.ran, self.parts, self.release = Seen(), Seen(), anyio.Event()

        @self.app.handler
        async def note(task: Note) -> None:
            self.ran.add((task.name, len(task.ballast)))
            if task.waits:
                await self.release.wait()

        @self.app.handler
        async def make(task: Make) -> str:
            self.ran.add((task.name, task.size))
            return secrets.token_hex(task.size // 2)

        @self.app.handler(batch=10)
        async def parts(tasks: list[Part]) -> None:
            self.parts.add([len(task.ballast) for task in tasks])

    async def insert(self, name: str, ballast: str, count: int = 1, type: str = "Note", **fields: Any) -> list[int]:
        sent = f"""INSERT INTO notifyq.task (type, payload)
                   SELECT $1, jsonb_build_object('name', $2::text, 'ballast', {ballast}) || $4::jsonb
                   FROM generate_series(1, $3::integer) RETURNING id"""
        rows = await self.db.fetch(sent, type, name, count, json.dumps(fields).encode())
        return [row[0] for row in rows]

    async def states(self) -> dict[str, int]:
        rows = await self.db.fetch("SELECT state, count(*) FROM notifyq.all_tasks GROUP BY state")
        return {row[0]: row[1] for row in rows}

    async def settled(self, states: dict[str, int], seconds: float = 60) -> None:
        await eventually(self.states, states, seconds)


@pytest.fixture
async def rig(tcp: Server, tcp_template: str) -> AsyncIterator[Rig]:
    async with database(tcp, tcp_template) as dsn, proxy_to(urlsplit(dsn).port or 0) as proxy:
        db = await connection.connect(dsn, role="test")
        yield Rig(proxy, dsn, db)
        await db.close()


# --- Claims


async def test_payloads_that_no_single_answer_can_carry(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them at once would take 6 s, and a statement has 2 s. None is lost, none runs twice, each has its own
    size, and they come in the order of their ids; a small one does too."""
    monkeypatch.setattr(connection, "WORKER_TIMEOUT_SECONDS", 2.0)
    for module in (connection, large_payloads):
        monkeypatch.setattr(module, "STATEMENT_BYTES", 500_000)
    for n in range(20):
        await rig.insert(f"{n}", NOISE.format(size=400_000 + n))
    await rig.insert("small", "''")
    rig.proxy.rates["*"] = 1.5e6
    async with working(rig.app, rig.dsn, concurrency=30):
        await rig.settled({"done": 21})
    assert sorted(rig.ran.items) == sorted([*((f"{n}", 400_000 + n) for n in range(20)), ("small", 0)])
    large = [int(name) for name, size in rig.ran.items if size]
    assert large == sorted(large), "in the order of their ids"
    assert await rig.db.fetchval("SELECT max(attempts) FROM notifyq.all_tasks") == 1


async def test_what_all_hold_at_once_is_bounded(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """40 payloads of 300 kB are 4 kB each on disk, and the worker may hold three of them. The others wait, and no other
    task waits for them."""
    monkeypatch.setattr(large_payloads, "HELD_BYTES", 900_000)
    monkeypatch.setattr(large_payloads, "STATEMENT_BYTES", 400_000)
    await rig.insert("large", "repeat('x', 300000)", 40, waits=True)
    async with working(rig.app, rig.dsn, concurrency=50):
        await rig.ran.reach(3)
        await rig.insert("small", "''")
        await rig.ran.reach(4)
        assert [name for name, _ in rig.ran.items] == ["large"] * 3 + ["small"]
        held = "SELECT count(*) FROM notifyq.task WHERE worker IS NOT NULL AND payload ->> 'name' = 'large'"
        assert await rig.db.fetchval(held) == 40, "their leases are held meanwhile"
        rig.release.set()
        await rig.settled({"done": 41})


@pytest.mark.parametrize("drain", [False, True])
async def test_in_a_batch_and_in_a_drain(rig: Rig, drain: bool) -> None:
    await rig.insert("part", "repeat('x', 300000)", 15, "Part")
    await rig.insert("note", "repeat('x', 100000)", 5)
    if drain:
        await rig.app.run_worker(dsn=rig.dsn, drain=True)
    else:
        async with working(rig.app, rig.dsn):
            await rig.settled({"done": 20})
    assert await rig.states() == {"done": 20}
    assert sorted(size for sizes in rig.parts.items for size in sizes) == [300_000] * 15
    assert all(len(sizes) <= 10 for sizes in rig.parts.items)


async def test_unhandled_tasks_of_other_workers(rig: Rig) -> None:
    """The statement that claims unhandled tasks leaves them out too."""
    await rig.insert("unhandled", "repeat('x', 300000)", 3)
    await rig.db.execute("UPDATE notifyq.task SET withheld = true")
    async with working(rig.app, rig.dsn):
        await rig.settled({"done": 3})
    assert rig.ran.items == [("unhandled", 300_000)] * 3


async def test_one_that_can_not_be_fetched_is_dead(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is tried three times, each with twice the time, and the error has the reason. A payload that comes at the
    second try runs. Small ones, which need no such answer, run meanwhile."""
    monkeypatch.setattr(connection, "WORKER_TIMEOUT_SECONDS", 0.5)
    monkeypatch.setattr(connection, "SLOWEST", 1e9)
    (hopeless,) = await rig.insert("hopeless", NOISE.format(size=300_000))
    await rig.insert("slow", NOISE.format(size=20_000))
    rig.proxy.rates["payloads"] = 20_000.0
    async with working(rig.app, rig.dsn):
        await rig.insert("small", "''")
        await rig.settled({"dead": 1, "done": 2})
    assert sorted(rig.ran.items) == [("slow", 20_000), ("small", 0)]
    row = await rig.db.fetchrow("SELECT * FROM notifyq.all_tasks WHERE id = $1", hopeless)
    assert row["attempts"] == 1
    for words in ("could not be fetched in 3 tries", "was given 2 s", "its size is 30", "limit is 16,777,216"):
        assert words in row["error"]
    assert len(row["payload"]) > 300_000, "kept where a person finds it"


async def test_a_server_that_is_away_is_no_tasks_fault(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, logged: Logged
) -> None:
    """The connection that fetches is cut in each answer, five times. Then an answer is whole, and the task runs,
    once."""
    monkeypatch.setattr(connection, "SLOWEST", 1e9)
    await rig.insert("large", NOISE.format(size=300_000))
    rig.proxy.rates["payloads"] = 100_000.0
    async with working(rig.app, rig.dsn):
        for _ in range(5):
            with anyio.fail_after(limit()):
                while not rig.proxy.open("payloads"):
                    await anyio.sleep(0.01)
            rig.proxy.reset("payloads")
        rig.proxy.rates.clear()
        await rig.settled({"done": 1})
    assert rig.ran.items == [("large", 300_000)]
    assert await rig.db.fetchval("SELECT attempts FROM notifyq.all_tasks") == 1
    stages = [fields["stage"] for fields in logged("lost the database")]
    assert stages == ["payloads"]
    assert [fields["stage"] for fields in logged("the database is back")] == ["payloads"]


async def test_a_claim_that_times_out_is_repeated_without_payloads(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are small, but too many for a very slow line. Whatever makes an answer take too long, the next one is
    smaller."""
    monkeypatch.setattr(connection, "WORKER_TIMEOUT_SECONDS", 2.0)
    await rig.insert("note", NOISE.format(size=15_000), 60)
    rig.proxy.rates["claims *"] = 100_000.0
    async with working(rig.app, rig.dsn):
        await rig.settled({"done": 60})
    assert rig.ran.items == [("note", 15_000)] * 60
    assert await rig.db.fetchval("SELECT max(attempts) FROM notifyq.all_tasks") == 1


async def test_a_stop_hands_back_what_waits_for_its_payload(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is handed back at once, since it hasn't begun. Running tasks may end."""
    monkeypatch.setattr(large_payloads, "HELD_BYTES", 100_000)
    await rig.insert("large", "repeat('x', 300000)", 5, waits=True)
    async with working(rig.app, rig.dsn, shutdown_timeout=60.0) as worker:
        await rig.ran.reach(1)
        worker.stop.set()
        await rig.settled({"running": 1, "ready": 4}, 20)
        assert await rig.db.fetchval("SELECT sum(attempts) FROM notifyq.task WHERE worker IS NULL") == 0
        rig.release.set()
    assert await rig.states() == {"done": 1, "ready": 4}


async def test_one_is_cancelled_while_it_waits_for_its_payload(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(large_payloads, "HELD_BYTES", 100_000)
    await rig.insert("first", "repeat('x', 300000)", waits=True)
    (second,) = await rig.insert("second", "repeat('x', 300000)")
    await rig.insert("third", "repeat('x', 300000)")
    async with working(rig.app, rig.dsn):
        await rig.ran.reach(1)
        await eventually(lambda: rig.db.fetchval("SELECT count(*) FROM notifyq.task WHERE worker IS NOT NULL"), 3)
        assert await rig.db.fetchval("SELECT notifyq.cancel($1)", second)
        rig.release.set()
        await rig.settled({"done": 2, "cancelled": 1})
    assert [name for name, _ in rig.ran.items] == ["first", "third"]


# --- Settling


async def test_results_that_no_single_write_can_carry(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of them at once would take 6 s, and a statement has 2 s. Each is kept whole, and small ones too."""
    monkeypatch.setattr(connection, "WORKER_TIMEOUT_SECONDS", 2.0)
    monkeypatch.setattr(unwritten, "STATEMENT_BYTES", 500_000)
    await rig.insert("large", "''", 20, "Make", size=400_000)
    await rig.insert("small", "''")
    rig.proxy.rates["settle"] = 1.5e6
    async with working(rig.app, rig.dsn):
        await rig.settled({"done": 21})
    sizes = await rig.db.fetch("SELECT length(result #>> '{}') FROM notifyq.finished WHERE result IS NOT NULL")
    assert [row[0] for row in sizes] == [400_000] * 20
    assert len(rig.ran.items) == 21


async def test_nothing_is_claimed_while_too_much_waits_to_be_written(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bytes are counted: results that can't be written as fast as they are made stay in memory."""
    monkeypatch.setattr(unwritten, "FULL_BYTES", 1_000_000)
    monkeypatch.setattr(unwritten, "STATEMENT_BYTES", 300_000)
    most = 0
    put = Settler.put

    def watched(self: Settler, outcome: Any) -> None:
        nonlocal most
        put(self, outcome)
        most = max(most, self._unwritten.size)

    monkeypatch.setattr(Settler, "put", watched)
    await rig.insert("large", "''", 40, "Make", size=200_000)
    rig.proxy.rates["settle"] = 2e6
    async with working(rig.app, rig.dsn, concurrency=2):
        await rig.settled({"done": 40})
    assert 400_000 < most < 2_500_000, "and what was claimed already"


async def test_a_result_that_can_not_be_written_in_time(
    rig: Rig, monkeypatch: pytest.MonkeyPatch, logged: Logged
) -> None:
    """The task is dead, with the reason. Small results don't wait for it for long."""
    monkeypatch.setattr(connection, "WORKER_TIMEOUT_SECONDS", 1.0)
    monkeypatch.setattr(connection, "SLOWEST", 1e9)
    (id,) = await rig.insert("large", "''", 1, "Make", size=400_000)
    rig.proxy.rates["settle"] = 20_000.0  # ten times too slow for it
    async with working(rig.app, rig.dsn):
        await rig.ran.reach(1)
        await rig.insert("small", "''", 3)
        await rig.settled({"done": 3, "dead": 1})
    error = await rig.db.fetchval("SELECT error FROM notifyq.all_tasks WHERE id = $1", id)
    assert "PostgreSQL can't store its outcome: its 400,002 bytes were not written within 2 s" in error
    assert logged("less of them is written")[0]["ids"] == [id]
    assert len(rig.ran.items) == 4


async def test_a_lock_is_no_results_fault(rig: Rig, monkeypatch: pytest.MonkeyPatch, logged: Logged) -> None:
    """The write of a large result waits for a lock: it is postponed, and written as it is when the lock is gone."""
    monkeypatch.setattr(connection, "WORKER_TIMEOUT_SECONDS", 1.0)
    await rig.insert("large", "''", 1, "Make", size=400_000)
    async with working(rig.app, rig.dsn):
        async with rig.db.transaction():
            await rig.db.execute("LOCK TABLE notifyq.finished")
            with anyio.fail_after(limit()):
                while not logged("can't be written in any form"):
                    await anyio.sleep(0.05)
        await rig.settled({"done": 1})
    assert len(rig.ran.items) == 1
    assert await rig.db.fetchval("SELECT length(result #>> '{}') FROM notifyq.finished") == 400_000


# --- Enqueue


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A statement takes 10,000 characters. The list has how many tasks were in each statement."""
    sent: list[int] = []
    made = bulk.columns

    def columns(rows: Any) -> tuple[list[str], list[str]]:
        sent.append(len(rows))
        return made(rows)

    def each(name: str, rows: Any, options: Any) -> bulk.Statement:
        sent.append(len(rows))
        return made_each(name, rows, options)

    made_each = bulk._build_placed_insert
    monkeypatch.setattr(bulk, "columns", columns)
    monkeypatch.setattr(bulk, "_build_placed_insert", each)
    monkeypatch.setattr(bulk, "CHUNK_SIZE", 10_000)
    monkeypatch.setattr(enqueue, "CHUNK_SIZE", 10_000)
    return sent


def notes(*sizes: int) -> list[Note]:
    return [Note(name=str(n), ballast="x" * size) for n, size in enumerate(sizes)]


async def enqueue_many(how: str, rig: Rig, dsn: str, tasks: Any) -> list[int]:
    if how == "async":
        async with rig.app.connect(dsn):
            return await rig.app.enqueue_many(tasks)
    with notifyq.SyncClient(rig.app).connect(dsn) as client:
        return await anyio.to_thread.run_sync(client.enqueue_many, tasks)


SIZES = [*range(2_400, 2_440), 30_000, *[1] * 500, 30_000, 30_000, 1]


@pytest.mark.parametrize("how", ["async", "sync"])
async def test_many_large_tasks_go_in_several_statements(rig: Rig, dsn: str, how: str, small_chunks: list[int]) -> None:
    """They go in one transaction, in their order. A task that is larger than a statement should be goes alone."""
    tasks: Any = notes(*SIZES)
    ids = await enqueue_many(how, rig, dsn, tasks)
    db = await connection.connect(dsn, role="test")
    rows = await db.fetch(
        "SELECT id, payload ->> 'name' AS n, length(payload ->> 'ballast') AS size, xmin FROM notifyq.task ORDER BY id"
    )
    assert [(row["id"], int(row["n"]), row["size"]) for row in rows] == [(id, n, SIZES[n]) for n, id in enumerate(ids)]
    assert len({row["xmin"] for row in rows}) == 1, "one transaction"
    assert sum(small_chunks) == len(SIZES)
    assert len(small_chunks) > 10
    await db.close()


@pytest.mark.parametrize("how", ["async", "sync"])
async def test_many_large_ones_are_all_or_none(rig: Rig, dsn: str, how: str, small_chunks: list[int]) -> None:
    """The last one can't be stored, after many statements have been sent."""
    tasks: Any = [*notes(*SIZES), Note(name="\x00")]
    with pytest.raises(notifyq.ConfigError, match="PostgreSQL can't store"):
        await enqueue_many(how, rig, dsn, tasks)
    assert len(small_chunks) > 10
    db = await connection.connect(dsn, role="test")
    assert await db.fetchval("SELECT count(*) FROM notifyq.task") == 0
    await db.close()


@pytest.mark.parametrize("how", ["async", "sync"])
async def test_unique_ones_go_in_several_statements_too(rig: Rig, dsn: str, how: str, small_chunks: list[int]) -> None:
    class Once(notifyq.Task):
        unique = ("name",)
        name: str
        ballast: str

    tasks: Any = [Once(name=str(n % 40), ballast="x" * 3_000) for n in range(50)]
    ids = await enqueue_many(how, rig, dsn, tasks)
    assert len(set(ids)) == 40
    assert ids[:10] == ids[40:]
    assert sum(small_chunks) == 40
    assert max(small_chunks) == 4


async def test_too_much_for_one_statement(rig: Rig, dsn: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it must be one statement (with conn= of a library that isn't asyncpg, with then=), the error comes before
    anything is sent."""
    monkeypatch.setattr(bulk, "ONE_STATEMENT", 50_000)
    monkeypatch.setattr(bulk, "CHUNK_SIZE", 10_000)
    tasks: Any = notes(*[3_000] * 20)
    with psycopg.connect(dsn) as blocking:
        with pytest.raises(notifyq.ConfigError, match=r"more than 50,000 characters .* enqueue them in several calls"):
            notifyq.SyncClient(rig.app).enqueue_many(tasks, conn=blocking)
        assert len(notifyq.SyncClient(rig.app).enqueue_many(tasks[:10], conn=blocking)) == 10
    async with rig.app.connect(dsn), await psycopg.AsyncConnection.connect(dsn) as conn:
        with pytest.raises(notifyq.ConfigError, match="more than 50,000 characters"):
            await rig.app.enqueue_many(tasks, conn=conn)
        with pytest.raises(notifyq.ConfigError, match="more than 50,000 characters"):
            await rig.app.enqueue_many(tasks, then=Note(name="last"))
        assert len(await rig.app.enqueue_many(tasks[:10], conn=conn)) == 10
        assert len((await rig.app.enqueue_many(tasks[:10], then=Note(name="last")))[0]) == 10


# --- What reads results, rescues and prunes


async def kept(db: Any, count: int, size: int) -> list[int]:
    """Tasks that are done, with results that PostgreSQL can't compress much."""
    rows = await db.fetch(f"""
        INSERT INTO notifyq.finished (id, created_at, run_at, processed_at, priority, attempts, state, queue, type,
                                      payload, result)
        SELECT 1000 + i, now(), now(), now(), 0, 1, 'done', 'default', 'Note', '{{}}',
               to_jsonb(i || {NOISE.format(size=size)})
        FROM generate_series(1, {count}) i RETURNING id""")
    return [row[0] for row in rows]


async def test_results_that_no_single_answer_can_carry(rig: Rig, dsn: str) -> None:
    """A caller that waits for many gets them in several answers, each result whole."""
    db = await connection.connect(dsn, role="test")
    ids = await kept(db, 12, 1_500_000)
    got: list[str] = []
    answers = 0
    async with rig.app.connect(dsn) as app:
        tell = app.results._look_at

        async def counted(conn: Any, asked: Any) -> None:
            nonlocal answers
            answers += 1
            await tell(conn, asked)

        app.results._look_at = counted  # type: ignore[method-assign, assignment]

        async def wait(id: int) -> None:
            got.append(await app.ref(id).result(str, timeout=limit()))

        async with anyio.create_task_group() as group:
            for id in ids:
                group.start_soon(wait, id)
    assert sorted(int(text.partition("\\")[0]) for text in got) == list(range(1, 13))
    assert min(map(len, got)) >= 1_500_000
    assert 3 <= answers <= 20
    await db.close()


async def test_results_of_predecessors_come_in_several_answers(rig: Rig, dsn: str) -> None:
    db = await connection.connect(dsn, role="test")
    ids = await kept(db, 12, 1_500_000)
    got: list[Any] = []
    app = notifyq.App()

    class Last(notifyq.Task):
        pass

    @app.handler
    async def last(task: Last, ctx: notifyq.Context) -> None:
        got.extend(await ctx.results())

    await db.execute("SELECT setval('notifyq.task_id_seq', 5000)")
    async with app.connect(dsn):
        await app.enqueue(Last(), after=ids)
        await app.run_worker(dsn=dsn, drain=True)
    assert [int(text.partition("\\")[0]) for text in got] == list(range(1, 13))
    await db.close()


async def test_a_rescue_moves_some_bytes_at_a_time(dsn: str) -> None:
    """It moves 64 MB in a statement, and the rest in the next."""
    worker: Any = await connection.connect_worker(dsn, "test")
    await worker.execute("ALTER TABLE notifyq.task ALTER payload SET STORAGE EXTERNAL")
    await worker.execute("""INSERT INTO notifyq.task (type, payload, max_attempts)
                            SELECT 'Known', to_jsonb(repeat('x', 15000000)), 1 FROM generate_series(1, 7)""")
    me = await verbs.register(worker)
    assert len(await verbs.claim(worker, me)) == 7
    await verbs.silent(worker, me)
    assert [(await verbs.rescue(worker, me))[1] for _ in range(3)] == [5, 2, 0]
    worker.terminate()


async def test_a_row_that_no_rescue_can_move(rig: Rig, dsn: str, logged: Logged) -> None:
    """The worker logs that once. All others are rescued, and the heartbeat goes on."""
    db: Any = await connection.connect(dsn, role="test")
    app = notifyq.App()
    await db.execute("""
        INSERT INTO notifyq.task (type, payload)
        SELECT 'Note', jsonb_build_object('name', 'n' || n) FROM generate_series(1, 40) n;
        ALTER TABLE notifyq.task ADD CONSTRAINT no CHECK (payload ->> 'name' <> 'n30' OR errors IS NULL)""")
    worker: Any = await connection.connect_worker(dsn, "test")
    dead = await verbs.register(worker)
    assert len(await verbs.claim(worker, dead, 40)) == 40
    await db.execute("UPDATE notifyq.worker SET seen_at = now() - interval '1 hour', lease = '1 second'")

    class Other(notifyq.Task):
        pass

    @app.handler
    async def other(task: Other) -> None: ...

    async with working(app, dsn):
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.task WHERE worker = $1", dead), 1)
        with anyio.fail_after(limit()):
            while not logged("be taken back from a worker that is gone"):
                await anyio.sleep(0.02)
        async with app.connect(dsn):
            await (await app.enqueue(Other())).result(timeout=limit())
    assert [line["ids"] for line in logged("be taken back from a worker that is gone")] == [[30]]
    assert not logged("refuses a chore")
    assert not logged("out of reach")
    worker.terminate()
    await db.close()
