"""What a stranger who may only enqueue, or not even that, can do to a worker; docs/security.md says it in words.

Any role that may connect can take every advisory lock, NOTIFY, LISTEN and name its session: nothing that
matters may rest on those alone.
"""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import msgspec
import pytest

import notifyq
from notifyq.cli.logs import JsonLines, TextLines
from notifyq.cli.output import table
from notifyq.codec import PAYLOAD_LIMIT
from notifyq.database import connection, schema
from notifyq.database.connection import SQL
from notifyq.embedded import Server
from notifyq.worker import doorbell, intake
from notifyq.worker import job as claims

from ..helpers.databases import Sessions
from ..helpers.logs import Logged
from ..helpers.machine import Probe, limit
from ..helpers.running import working
from ..helpers.verbs import rescue
from ..helpers.waiting import Seen, eventually

pytestmark = pytest.mark.slow

ENQUEUE = "SELECT notifyq.enqueue('Good')"


class Good(notifyq.Task):
    name: str = ""
    anything: Any = None


class Bench:
    def __init__(self) -> None:
        self.app = notifyq.App()
        self.seen = seen = Seen()

        @self.app.handler
        async def good(task: Good, ctx: notifyq.Context) -> None:
            seen.add(ctx.id)


@pytest.fixture
def bench() -> Bench:
    return Bench()


# --- Locks


async def test_an_enqueuer_locks_no_row_and_no_table_but_the_bell(as_role: Any) -> None:
    """It locks the bell only as every INSERT does, or in a weaker mode: that keeps workers awake, and stops none."""
    enqueuer = await as_role("enqueuer")
    may = set[tuple[str, str]]()
    modes = ("ACCESS SHARE", "ROW SHARE", "ROW EXCLUSIVE", "SHARE UPDATE EXCLUSIVE", "SHARE", "ACCESS EXCLUSIVE")
    for name in ("bell", "task", "finished", "worker", "schema_version", "all_tasks"):
        for mode in modes:
            try:
                async with enqueuer.transaction():
                    await enqueuer.execute(f"LOCK TABLE notifyq.{name} IN {mode} MODE")
                    may.add((name, mode))
            except asyncpg.InsufficientPrivilegeError:
                pass
    assert may <= {("bell", mode) for mode in modes[:3]}
    assert ("bell", "ROW EXCLUSIVE") in may
    await enqueuer.execute(ENQUEUE)
    for statement in (
        "SELECT id FROM notifyq.task FOR UPDATE",
        "SELECT id FROM notifyq.task FOR KEY SHARE",
        "CREATE TABLE notifyq.mine (id bigint REFERENCES notifyq.task)",
        "CREATE TRIGGER t AFTER INSERT ON notifyq.task EXECUTE FUNCTION notifyq.ring()",
        "CREATE RULE r AS ON INSERT TO notifyq.task DO INSTEAD NOTHING",
        "SET session_replication_role = replica",  # would silence the trigger
        "COPY notifyq.task (type) FROM PROGRAM 'id'",
    ):
        with pytest.raises(asyncpg.PostgresError) as refused:
            await enqueuer.execute(statement)
        assert refused.value.sqlstate == "42501", statement


async def test_a_stranger_who_keeps_workers_awake(
    bench: Bench, roles: Any, as_role: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A transaction has the bell's lock and never ends. Tasks start soon all the same, since a worker looks every 50
    ms."""
    calls = 0

    async def counted(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        return await claims.claim(*args, **options)

    monkeypatch.setattr(intake, "claim", counted)
    stranger, enqueuer = await as_role("enqueuer"), await as_role("enqueuer")
    async with working(bench.app, roles("worker")):
        await stranger.execute("BEGIN; LOCK TABLE notifyq.bell IN ROW EXCLUSIVE MODE")
        await enqueuer.execute(ENQUEUE)  # wakes the worker, which can't sleep again
        await bench.seen.reach(1)
        await anyio.sleep(1)
        before, began = calls, time.monotonic()
        for count in range(2, 6):
            await anyio.sleep(0.2)
            await enqueuer.execute(ENQUEUE)
            await bench.seen.reach(count)
        rate = (calls - before) / (time.monotonic() - began)
        print(f"{rate:.0f} claims a second")
        assert rate < 400  # 2 ms apart at the most, for the first tenth of a second after each task


async def test_a_stranger_who_holds_the_turn(
    bench: Bench, roles: Any, as_role: Any, logged: Logged, monkeypatch: pytest.MonkeyPatch, probe: Probe
) -> None:
    """A poll finds out. From then on the workers go without the turn, and say so; and with it again once they can."""
    monkeypatch.setattr(doorbell, "TURN_WAIT_MS", 300)
    stranger, enqueuer = await as_role("enqueuer"), await as_role("enqueuer")
    key = doorbell.fleet_key(["default"], bench.app.registry.types)
    assert await stranger.fetchval("SELECT notifyq.take_turn($1, 1000)", key)
    async with (
        working(bench.app, roles("worker"), poll_interval=1.0),
        working(bench.app, roles("worker"), poll_interval=0),
    ):
        sent = 0
        with anyio.fail_after(limit()):
            while not logged("no worker has the turn"):
                await enqueuer.execute(ENQUEUE)
                sent += 1
                await bench.seen.reach(sent)
        waits, first = [], time.monotonic()
        for _ in range(10):
            await anyio.sleep(0.03)  # let it fall asleep
            began = time.monotonic()
            await enqueuer.execute(ENQUEUE)
            sent += 1
            await bench.seen.reach(sent)
            waits.append(time.monotonic() - began)
        print(f"commit to start {sorted(waits)[5] * 1000:.1f} ms at the median")
        assert sorted(waits)[5] < 0.3 + probe.late(first), "the poll is slower"
        reader = await as_role("reader")
        told = "SELECT count(*) FROM notifyq.worker WHERE status = 'the turn at the bell is with a stranger'"
        await eventually(lambda: reader.fetchval(told), 1)
        await stranger.execute("SELECT pg_advisory_unlock_all()")
        with anyio.fail_after(limit()):
            while not logged("the turn at the bell is back"):  # a burst has them step back, and try
                await enqueuer.execute(f"{ENQUEUE} FROM generate_series(1, 20)")
                await bench.seen.reach(sent := sent + 20)
                await anyio.sleep(0.05)


async def test_a_stranger_who_holds_a_dead_workers_lock(db: Any, dsn: str, connect: Sessions) -> None:
    """The dead worker's tasks are taken back at the end of its lease, and not after 2 s."""
    stranger: Any = await connect()
    worker: Any = await connection.connect_worker(dsn, "test")
    id = await worker.fetchval(SQL["register_worker"], "host:1", ["default"], ["Good"], [10], 1, 30.0)
    await db.execute("INSERT INTO notifyq.task (type, worker, attempts) VALUES ('Good', $1, 1)", id)
    await stranger.execute("SELECT pg_advisory_lock(1852990827, $1)", id)
    for age, ready in ((5, 0), (20, 0), (31, 1)):
        await db.execute("UPDATE notifyq.worker SET seen_at = now() - make_interval(secs => $1)", age)
        assert (await rescue(worker, id))[1] == ready, age
    await worker.close()


# --- Names


async def test_sessions_that_are_named_like_a_workers(
    bench: Bench, roles: Any, as_role: Any, db: Any, logged: Logged
) -> None:
    """A worker ends what is left of its own lost connection. A session that it may not end isn't its own, and doesn't
    hinder it."""
    stranger, enqueuer = await as_role("enqueuer"), await as_role("enqueuer")
    async with working(bench.app, roles("worker")) as worker:
        await stranger.execute(f"SET application_name = 'notifyq claims {worker.info.id}'")
        ended = await db.fetchval(
            """SELECT count(*) FILTER (WHERE pg_terminate_backend(pid)) FROM pg_stat_activity
               WHERE application_name = 'notifyq claims ' || $1::integer AND usename = 'worker'""",
            worker.info.id,
        )
        assert ended == 1
        await enqueuer.execute(ENQUEUE)
        await bench.seen.reach(1)
        assert len(logged("the database is back")) == 1
        conn = await as_role("worker")
        await stranger.execute("SET application_name = 'notifyq bell 7'")
        assert await conn.fetchval(SQL["end_backends"], 7, ["bell"], 0) == 0
    assert await stranger.fetchval("SELECT 1") == 1


HOSTILE = (
    "\x1b[2Jcleared", "\x9b2Jcleared", "two\nlines", "carriage\rreturn", "\u202eright to left", "\u2028separated",
    "\x7f", "[red]markup[/]", "%s %d {}", 'level=ERROR task="dead"',
)  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE, ids=range(len(HOSTILE)))
def test_names_that_a_terminal_would_obey(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """In tables and in logs they are one line of printable characters, and can't look like fields of notifyq."""
    record = logging.LogRecord("notifyq.run", logging.ERROR, __file__, 1, "task dead", None, None)
    record.fields = {"type": name, "types": [name, "Good"], "error": name}
    line = TextLines(pid=False).format(record)
    assert line.isprintable()
    outside = re.sub(r'"(\\.|[^"\\])*"', "", line)  # of quotes
    assert re.findall(r"(\w+)=", outside) == ["type", "types", "error"]
    line = JsonLines().format(record)
    assert line.isprintable()
    assert json.loads(line)["type"] == name
    table(("queue", "type"), [(name, name)])
    shown = capsys.readouterr().out
    assert shown.count("\n") == 2
    assert shown.replace("\n", "").isprintable()


async def test_functions_in_public_are_not_called(db: Any, dsn: str) -> None:
    """Up to PostgreSQL 14 any role may create one there. It could fit a call better than the system's function, and
    would run with the caller's rights."""
    body = (
        "RETURNS json LANGUAGE plpgsql AS 'BEGIN INSERT INTO public.called VALUES (current_user); RETURN ''{}''; END'"
    )
    await db.execute(f"""
        CREATE TABLE public.called (who text);
        CREATE FUNCTION public.to_json(record) {body};
        CREATE FUNCTION public.step(json, record) {body};
        CREATE AGGREGATE public.json_agg(record) (sfunc = public.step, stype = json);
    """)
    await db.execute(ENQUEUE)
    for words in (["tasks"], ["stats"]):
        found = await anyio.run_process([sys.executable, "-m", "notifyq", *words, "--dsn", dsn], check=False)
        assert found.returncode == 0, found.stderr
    assert await db.fetchval("SELECT count(*) FROM public.called") == 0


async def test_temporary_tables_of_the_same_names(db: Any) -> None:
    """They come first in every search_path, and hinder no one."""
    await db.execute(
        "CREATE TEMP TABLE task (id bigint); CREATE TEMP TABLE bell (x int); CREATE TEMP TABLE worker (x int)"
    )
    await db.execute("CREATE TEMP TABLE finished (id bigint); SET search_path = pg_temp, pg_catalog")
    id = await db.fetchval("SELECT notifyq.enqueue('T')")
    assert await db.fetchval("SELECT notifyq.cancel($1)", id)
    assert await db.fetchval("SELECT notifyq.retry($1)", id)
    assert await db.fetchval("SELECT state FROM notifyq.all_tasks WHERE id = $1", id) == "ready"


# --- Notifications


async def test_forged_rings(bench: Bench, roles: Any, as_role: Any, logged: Logged) -> None:
    """Any role can NOTIFY. A worker looks, finds nothing, and goes on. A session that listens learns nothing but
    that."""
    stranger, enqueuer = await as_role("enqueuer"), await as_role("enqueuer")
    heard: list[str] = []
    await stranger.add_listener("notifyq", lambda *args: heard.append(args[3]))
    async with working(bench.app, roles("worker")) as worker:
        for count in range(1, 40):
            for payload in ("", "unhandled", "echo", "echo 00000000-0000-0000-0000-000000000000", "x" * 7999, "{}"):
                await stranger.execute("SELECT pg_notify('notifyq', $1)", payload)
            await enqueuer.execute("SELECT notifyq.enqueue('Good', '{\"name\": \"secret\"}')")
            await bench.seen.reach(count)
        assert not worker.done.is_set()
    assert not logged("lost the database")
    assert "secret" not in "".join(heard)
    kinds = {text.split(" ")[0].rstrip("x") for text in heard}
    assert kinds <= {"", "unhandled", "echo", "{}"}


@pytest.fixture
async def small(db: Any) -> AsyncIterator[str]:
    """A server whose queue of notifications is half a MB."""
    if int(await db.fetchval("SHOW server_version_num")) < 170_000:
        pytest.skip("before PostgreSQL 17 the queue of notifications is 8 GB, too many to fill here")
    server = Server(settings={"max_notify_queue_pages": "64"})
    await anyio.to_thread.run_sync(server.start)
    try:
        conn = await connection.connect(server.dsn(), role="test")
        await schema.migrate(conn)
        await conn.close()
        yield server.dsn()
    finally:
        with anyio.CancelScope(shield=True):
            await anyio.to_thread.run_sync(server.stop)


async def fill(conn: Any) -> None:
    with pytest.raises(asyncpg.ProgramLimitExceededError, match="too many notifications"):  # noqa: PT012
        while True:
            await conn.execute("SELECT pg_notify('it', gen_random_uuid()::text || repeat('x', 7900))")


async def test_a_full_queue_of_notifications(bench: Bench, small: str, logged: Logged) -> None:
    """A stranger listens in a transaction that never ends, and notifies. Enqueuing goes on, workers poll, and unhandled
    tasks too are found. When the stranger has gone, all is as before."""
    stranger, conn = await connection.connect(small, role="test"), await connection.connect(small, role="test")
    await stranger.execute("LISTEN it")
    await stranger.execute("BEGIN; SELECT 1")
    await fill(conn)
    async with working(bench.app, small, poll_interval=0.2):
        assert len(logged("the bell is silent")) == 1
        for count in range(1, 5):
            await conn.execute("SELECT notifyq.enqueue('Unknown')")
            await conn.execute(ENQUEUE)
            await bench.seen.reach(count)
        await eventually(lambda: conn.fetchval("SELECT count(*) FROM notifyq.task WHERE withheld"), 4)
        await stranger.execute("ROLLBACK")
        with anyio.fail_after(limit()):
            count = 4
            while not logged("the bell rings again"):
                await conn.execute(ENQUEUE)
                await bench.seen.reach(count := count + 1)
                await anyio.sleep(0.03)
    assert not logged("lost the database")
    await stranger.close()
    await conn.close()


# --- Payloads


async def test_payloads_that_grow(
    bench: Bench, db: Any, dsn: str, logged: Logged, monkeypatch: pytest.MonkeyPatch
) -> None:
    """144 kB of numbers are more than a GB as text, which PostgreSQL won't send: the task is dead, with PostgreSQL's
    message. Those that were claimed with it run."""
    # To write that much takes seconds of a processor, and its connection's timeout is another matter.
    monkeypatch.setattr(connection, "WORKER_TIMEOUT_SECONDS", limit())
    await db.execute(
        """INSERT INTO notifyq.task (type, payload)
           SELECT 'Good', jsonb_build_object('anything', jsonb_agg('1e131071'::jsonb)) FROM generate_series(1, 8200)
           UNION ALL SELECT 'Good', '{}' FROM generate_series(1, 30)"""
    )
    async with working(bench.app, dsn):
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.task"), 0)
    assert len(bench.seen.items) == 30
    dead = "SELECT error FROM notifyq.all_tasks WHERE state = 'dead' AND attempts = 1"
    assert (await db.fetchval(dead)).startswith("PostgreSQL can't read out its payload: ")
    assert await db.fetchval("SELECT count(*) FROM notifyq.finished WHERE state = 'done' AND attempts = 1") == 30
    assert not logged("lost the database")


@pytest.mark.parametrize(
    ("payload", "rows", "length"),
    [
        ("to_jsonb(repeat('x', 16000000))", 1, 16_000_002),
        ("to_jsonb(repeat('x', 70000000))", 1, None),
        ("jsonb_agg(n % 10)", 2_000_000, 6_000_000),
    ],
    ids=["within", "beyond", "digits"],
)
async def test_compressed_payloads_are_measured_as_they_are(
    db: Any, dsn: str, payload: str, rows: int, length: int | None
) -> None:
    """Large ones count with all that they hold. Payloads of digits, which take four times the space, are not refused
    for that."""
    worker = await connection.connect_worker(dsn, "test")
    id = await worker.fetchval(SQL["register_worker"], "host:1", ["default"], ["Good"], [10], 1, 30.0)
    await db.execute(
        f"INSERT INTO notifyq.task (type, payload) SELECT 'Good', {payload} FROM generate_series(1, $1::integer) n",
        rows,
    )
    assert 65_536 < await db.fetchval("SELECT pg_column_size(payload) FROM notifyq.task") < 16_777_216
    [job] = await claims.claim(worker, id, {"default": 1}, 1)
    assert job.payload is None, "it is fetched apart"
    lease = id, [job.id], [job.attempt]
    [(_, size)] = await worker.fetch(SQL["measure_payloads"], *lease, connection.STATEMENT_BYTES)
    assert (size <= PAYLOAD_LIMIT) is (length is not None)
    if length is not None:
        [(_, found)] = await worker.fetch(SQL["fetch_payloads"], *lease)
        assert len(found) == length
    await worker.close()


async def test_poison_beside_good_tasks(bench: Bench, db: Any, dsn: str) -> None:
    """Unknown types and payloads that don't fit, four to one: every good task is done, each of the others once."""
    await db.execute(
        """INSERT INTO notifyq.task (type, payload)
           SELECT CASE WHEN n % 5 IN (1, 2) THEN 'Unknown' || n % 7 ELSE 'Good' END,
                  CASE WHEN n % 5 IN (3, 4) THEN '{"name": 5}' ELSE '{}' END::jsonb
           FROM generate_series(1, 5000) n"""
    )
    async with working(bench.app, dsn):
        left = "SELECT count(*) FROM notifyq.task WHERE NOT withheld"
        await eventually(lambda: db.fetchval(left), 0)
    assert len(bench.seen.items) == 1000
    rows = await db.fetch("SELECT state, attempts, count(*) FROM notifyq.all_tasks GROUP BY state, attempts")
    assert {tuple(row) for row in rows} == {("done", 1, 1000), ("dead", 1, 2000), ("ready", 0, 2000)}


# --- Secrets


class Secret(notifyq.Task):
    max_attempts = 1
    timeout = 0.05
    key: str
    how: str
    n: int = 0


async def test_payloads_are_not_told(db: Any, dsn: str, caplog: pytest.LogCaptureFixture) -> None:
    """They are neither in the log, at any level, nor in the errors column, unless the handler's own message has
    them."""
    caplog.set_level(logging.DEBUG)
    app = notifyq.App()

    @app.handler
    async def secret(task: Secret) -> Any:
        if task.how == "slow":
            await anyio.sleep(60)
        if task.how == "result":
            return object()
        raise ValueError("no")

    for payload in (
        {"key": "hunter2", "how": "raise"},
        {"key": "hunter2", "how": "slow"},
        {"key": "hunter2", "how": "result"},
        {"key": "hunter2", "how": "x", "n": "hunter2"},
        {"key": ["hunter2"], "how": "x"},
        {"hunter2": "hunter2"},
    ):
        for type in ("Secret", "Unknown"):
            text = msgspec.json.encode(payload).decode()
            await db.execute("INSERT INTO notifyq.task (type, payload) VALUES ($1, $2::text::jsonb)", type, text)
    async with app.connect(dsn), working(app, dsn):
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.task WHERE NOT withheld"), 0)
        with pytest.raises(notifyq.ConfigError) as refused:
            await app.enqueue(Secret(key="hunter2\x00", how="x"))
    told = [(getattr(record, "summary", ""), getattr(record, "fields", {})) for record in caplog.records]
    assert any("task dead" in message for message, _ in told)
    assert "hunter2" not in str(told)
    assert "hunter2" not in str(refused.value)
    kept = await db.fetch("SELECT errors::text FROM notifyq.finished")
    assert len(kept) == 6
    assert "hunter2" not in str([row[0] for row in kept])


APP = """
import notifyq
app = notifyq.App()

class T(notifyq.Task):
    pass

@app.handler
async def t(task: T) -> None:
    pass
"""


async def test_a_password_is_not_to_be_seen(db: Any, dsn: str, tmp_path: Path) -> None:
    """A password in NOTIFYQ_DSN is in no command line, the children's included, and in no line of the log."""
    (tmp_path / "secretive.py").write_text(APP)
    env = {**os.environ, "NOTIFYQ_DSN": dsn.replace("notifyq@", "notifyq:hunter2@")}
    words = [sys.executable, "-m", "notifyq", "worker", "secretive:app", "--processes", "2", "--log-level", "debug"]
    process = subprocess.Popen(words, env=env, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        pids = "SELECT split_part(name, ':', 2)::integer FROM notifyq.worker"
        await eventually(lambda: db.fetchval(f"SELECT count(*) FROM ({pids}) p"), 2)
        for pid in (process.pid, *[row[0] for row in await db.fetch(pids)]):
            line = Path(f"/proc/{pid}/cmdline").read_text()
            assert "secretive:app" in line
            assert "hunter2" not in line
        end = "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE application_name LIKE 'notifyq claims%'"
        assert await db.fetch(f"{end} AND datname = current_database()")
    finally:
        process.terminate()
        told = await anyio.to_thread.run_sync(lambda: process.communicate(timeout=limit())[1])
    assert "hunter2" not in told
    assert "notifyq" in told
