"""Around the server, with what a distribution brings: TLS, a pooler, a standby that takes over, a full disk.

Debian's packages postgresql-15 and pgbouncer, and openssl; the disk wants root. Nothing is skipped: what isn't there
is a failure, of `make test-servers`.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from pathlib import Path
from typing import Any

import anyio
import asyncpg
import pytest

import notifyq
from notifyq.database import connection, errors, schema
from notifyq.embedded import Binaries, Server
from notifyq.embedded.account import find_account

from ..helpers.logs import Logged
from ..helpers.proxy import free_port
from ..helpers.running import working
from ..helpers.waiting import Seen, eventually

pytestmark = pytest.mark.servers

DEBIAN = Path("/usr/lib/postgresql/15/bin")
LOST = errors.TRANSIENT


def debian(data_dir: Path | None = None, **settings: str) -> Server:
    """Debian's PostgreSQL on a port of its own."""
    if not (DEBIAN / "postgres").exists():
        pytest.fail(f"needs Debian's postgresql-15: there is no {DEBIAN}/postgres")
    return Server(data_dir, port=free_port(), settings=settings, binaries=Binaries(DEBIAN, "15", "Debian"))


@contextmanager
def open_folder() -> Iterator[Path]:
    """A folder that the account that runs the server can pass."""
    with tempfile.TemporaryDirectory(prefix="notifyq-test-") as name:
        folder = Path(name)
        folder.chmod(0o711)
        yield folder


async def migrated(dsn: str) -> Any:
    """A connection to it, with the schema."""
    conn = await connection.connect(dsn, role="test")
    await schema.migrate(conn)
    return conn


async def command(*args: str) -> tuple[int, str]:
    """`notifyq ARGS`: exit code and stderr."""
    done = await anyio.run_process([sys.executable, "-m", "notifyq", *args], check=False)
    return done.returncode, done.stderr.decode()


class Note(notifyq.Task):
    seconds: float = 0


class Bench:
    """An app whose handler counts its runs."""

    def __init__(self) -> None:
        self.app = notifyq.App()
        self.ran = Seen()

        @self.app.handler
        async def note(task: Note, ctx: notifyq.Context) -> None:
            self.ran.add(ctx.id)
            await anyio.sleep(task.seconds)

    async def woken(self, db: Any, seconds: float) -> float:
        began = time.monotonic()
        id = await db.fetchval("INSERT INTO notifyq.task (type) VALUES ('Note') RETURNING id")
        with anyio.fail_after(seconds):
            while id not in self.ran.items:
                await anyio.sleep(0.002)
        return time.monotonic() - began

    async def enqueue_until(self, over: anyio.Event, dsn: str) -> list[int]:
        """Enqueue, whatever errors come. Returns the ids that were acknowledged."""
        acknowledged = list[int]()
        while not over.is_set():
            try:
                async with self.app.connect(dsn):
                    while not over.is_set():
                        acknowledged += await self.app.enqueue_many([Note(seconds=0.02)] * 5)
                        await anyio.sleep(0.01)
            except LOST:
                await anyio.sleep(0.05)
        return acknowledged


# TLS.


def certificate(folder: Path, name: str) -> Path:
    """For localhost, signed by itself; its key is beside it."""
    path = folder / f"{name}.crt"
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=localhost -addext subjectAltName=DNS:localhost"
    key = path.with_suffix(".key")
    subprocess.run(["openssl", *words.split(), "-keyout", key, "-out", path], check=True, capture_output=True)
    key.chmod(0o600)
    account = find_account(None)
    if account.switch:
        os.chown(key, account.uid, account.gid)
    return path


async def test_tls() -> None:
    """Every connection of app and worker is encrypted. A server with another CA is refused at the start, and so is one
    without TLS."""
    with open_folder() as folder:
        ours, other = certificate(folder, "ours"), certificate(folder, "other")
        with debian(ssl="on", ssl_cert_file=str(ours), ssl_key_file=str(ours.with_suffix(".key"))) as server:
            plain = server.dsn().partition("?")[0].replace("127.0.0.1", "localhost")
            db = await migrated(server.dsn())
            for mode in (f"verify-full&sslrootcert={ours}", "require"):
                bench, dsn = Bench(), f"{plain}?sslmode={mode}"
                async with bench.app.connect(dsn), working(bench.app, dsn):
                    await bench.app.enqueue(Note())
                    await bench.ran.reach(1)
                    roles = await db.fetch(
                        "SELECT application_name, ssl FROM pg_stat_ssl JOIN pg_stat_activity USING (pid)"
                        " WHERE application_name LIKE 'notifyq %' AND application_name <> 'notifyq test'"
                    )
                    assert {row[0].split()[1] for row in roles} >= {"app", "bell", "claims", "heartbeat"}
                    assert all(row[1] for row in roles)
            await db.close()
            code, said = await command(
                "worker", "tests.helpers.workers:app", "--dsn", f"{plain}?sslmode=verify-full&sslrootcert={other}"
            )
            print(said)
            assert code == 3
            assert "certificate verify failed" in said.lower()
            assert "check sslmode and sslrootcert" in said
            code, said = await command(
                "worker",
                "tests.helpers.workers:app",
                "--dsn",
                f"{plain}?sslmode=verify-full&sslrootcert={folder}/none.crt",
            )
            print(said)
            assert code == 3
            assert "check sslmode and sslrootcert" in said
    with debian() as server:
        code, said = await command("stats", "--dsn", server.dsn().replace("sslmode=disable", "sslmode=require"))
        print(said)
        assert code == 3
        assert "check sslmode and sslrootcert" in said


# A standby.


@asynccontextmanager
async def standby_of(primary: Server) -> AsyncIterator[Server]:
    with open_folder() as folder:
        account = find_account(None)
        account.own(folder / "data")
        port = primary.dsn().partition("?")[0].rpartition(":")[2].partition("/")[0]
        words = f"-h 127.0.0.1 -p {port} -U notifyq -R -X stream -c fast --no-sync -D {folder}/data"
        done = await anyio.to_thread.run_sync(lambda: account.run([primary._bin_dir / "pg_basebackup", *words.split()]))
        assert done.returncode == 0, done.stdout
        standby = Server(folder, port=free_port(), binaries=primary.binaries)
        await anyio.to_thread.run_sync(standby.start)
        try:
            yield standby
        finally:
            standby.stop()


def both(primary: Server, standby: Server) -> str:
    """A DSN of two hosts."""
    first, second = (server.dsn().split("@")[1].partition("/")[0] for server in (primary, standby))
    return f"postgresql://notifyq@{first},{second}/notifyq?sslmode=disable&target_session_attrs=read-write"


@pytest.mark.parametrize("synchronous", [True, False])
async def test_failover(synchronous: bool, logged: Logged) -> None:
    """The primary crashes under load and the standby is promoted: workers and enqueuers connect to it by themselves.
    With synchronous replication every acknowledged task is done; without it, every replicated one. Only tasks that ran
    at the failover may have run twice."""
    with debian() as primary:
        db = await migrated(primary.dsn())
        async with standby_of(primary) as standby:
            if synchronous:
                await db.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
                await db.execute("SELECT pg_reload_conf()")
                await eventually(lambda: db.fetchval("SELECT sync_state FROM pg_stat_replication"), "sync")
            await db.close()
            bench, dsn, over, acknowledged = Bench(), both(primary, standby), anyio.Event(), list[int]()

            async def enqueue() -> None:
                acknowledged.extend(await bench.enqueue_until(over, dsn))

            async with (
                working(bench.app, dsn, concurrency=30),
                working(bench.app, dsn, concurrency=30),
                anyio.create_task_group() as group,
            ):
                group.start_soon(enqueue)
                await bench.ran.reach(200)
                await anyio.to_thread.run_sync(primary.stop, "immediate")
                before = len(bench.ran.items)
                promoting = await connection.connect(standby.dsn(), role="test")
                assert await promoting.fetchval("SELECT pg_promote()")
                began = time.monotonic()
                took = await bench.woken(promoting, 10)
                print(f"healed {took:.2f} s after the promotion")
                await bench.ran.reach(len(bench.ran.items) + 200)
                over.set()
                print(f"enqueuer and workers: {time.monotonic() - began:.2f} s")
            async with working(bench.app, dsn):
                await eventually(lambda: promoting.fetchval("SELECT count(*) FROM notifyq.task"), 0)
            done = {row[0] for row in await promoting.fetch("SELECT id FROM notifyq.finished WHERE state = 'done'")}
            assert len(done) == await promoting.fetchval("SELECT count(*) FROM notifyq.finished")
            await promoting.close()
    lost = set(acknowledged) - done
    again = [id for id, runs in Counter(bench.ran.items).items() if runs > 1]
    print(f"{len(acknowledged)} acknowledged, {len(lost)} lost, {len(again)} run again")
    if synchronous:
        assert not lost
    assert set(again) <= set(bench.ran.items[:before]), "only those that had begun before"
    assert len(again) < 200


async def test_a_standby_at_the_start() -> None:
    """Exit code 3, and it says so."""
    with debian() as primary:
        await (await migrated(primary.dsn())).close()
        async with standby_of(primary) as standby:
            code, said = await command("worker", "tests.helpers.workers:app", "--dsn", standby.dsn())
            print(said)
            assert (code, "read-only (a standby?)" in said) == (3, True)
            dsn = f"{standby.dsn()}&target_session_attrs=read-write"
            code, said = await command("worker", "tests.helpers.workers:app", "--dsn", dsn)
            print(said)
            assert (code, "no server of the given DSN will do" in said) == (3, True)


# A pooler.


@contextmanager
def pooler(server: Server, folder: Path) -> Iterator[str]:
    """pgbouncer in transaction mode, as it is configured by default: the DSN of the server's database through it."""
    program = shutil.which("pgbouncer", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.fail("needs Debian's pgbouncer: there is none")
    port, behind = free_port(), server.dsn().partition("@127.0.0.1:")[2].partition("/")[0]
    (folder / "ini").write_text(
        f"""[databases]
            notifyq = host=127.0.0.1 port={behind} user=notifyq
            [pgbouncer]
            listen_addr = 127.0.0.1
            listen_port = {port}
            unix_socket_dir =
            auth_type = any
            pool_mode = transaction
            default_pool_size = 8"""
    )
    account = find_account(None)
    who: dict[str, Any] = {"user": account.uid, "group": account.gid, "extra_groups": []} if account.switch else {}
    with (folder / "log").open("w") as log:
        running = subprocess.Popen([program, folder / "ini"], stdout=log, stderr=log, cwd="/", **who)
    try:
        deadline = time.monotonic() + 10
        while "process up" not in (folder / "log").read_text():
            assert time.monotonic() < deadline, (folder / "log").read_text()
            time.sleep(0.02)
        yield f"postgresql://notifyq@127.0.0.1:{port}/notifyq?sslmode=disable"
    finally:
        running.terminate()
        running.wait(10)


async def test_a_pooler_before_enqueuers() -> None:
    """Any way of enqueuing, also many at once, wakes a worker that is connected directly."""
    with debian() as server, open_folder() as folder, pooler(server, folder) as pooled:
        db = await migrated(server.dsn())
        bench = Bench()
        async with bench.app.connect(pooled), working(bench.app, server.dsn()):
            ref = await bench.app.enqueue(Note())
            await bench.ran.reach(1, 1)
            assert await ref.result(timeout=5) is None
            await bench.app.enqueue_many([Note()] * 4500)  # several statements
            await bench.ran.reach(4501, 10)

            async def enqueue() -> None:
                for _ in range(50):
                    await bench.app.enqueue(Note())

            async with anyio.create_task_group() as group:
                for _ in range(20):  # more than the pooler has connections
                    group.start_soon(enqueue)
            conn = await asyncpg.connect(pooled, statement_cache_size=0)
            await conn.execute("INSERT INTO notifyq.task (type) VALUES ('Note')")
            async with conn.transaction():
                await bench.app.enqueue(Note(), conn=conn)
            await conn.close()
            await bench.ran.reach(5503, 5)
            took = [await bench.woken(db, 1) for _ in range(3)]
            print(f"woken after {max(took):.3f} s")
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.finished WHERE state = 'done'"), 5506)
        assert len(set(bench.ran.items)) == len(bench.ran.items) == 5506
        await db.close()


async def test_a_pooler_before_a_worker(logged: Logged) -> None:
    """This is a mistake. The worker says so in its log and its status, polls, and works; and it hinders no other
    worker."""
    with debian() as server, open_folder() as folder, pooler(server, folder) as pooled:
        db = await migrated(server.dsn())
        mistaken, right = Bench(), Bench()
        async with mistaken.app.connect(pooled), working(mistaken.app, pooled, poll_interval=0.3) as worker:
            assert worker.info.bell_ms is None
            assert logged("the bell is silent")
            status = "SELECT status FROM notifyq.worker"
            await eventually(lambda: db.fetchval(status), "polling only: no NOTIFY arrives here")
            await mistaken.app.enqueue_many([Note(seconds=0.01)] * 500)
            await mistaken.ran.reach(500)
            await mistaken.app.enqueue(Note(), delay=0.2)
            await mistaken.ran.reach(501)
            async with working(right.app, server.dsn()):
                for _ in range(3):
                    await db.execute("INSERT INTO notifyq.task (type) VALUES ('Note')")
                    with anyio.fail_after(2):
                        while len(mistaken.ran.items) + len(right.ran.items) < 502:
                            await anyio.sleep(0.002)
                    right.ran.items.pop() if right.ran.items else mistaken.ran.items.pop()
                turn = "SELECT count(*) FROM pg_locks WHERE locktype = 'advisory' AND classid = 1852990836"
                assert await db.fetchval(turn) == 1, "the right one's"
        await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.finished WHERE state = 'done'"), 504)
        assert await db.fetchval("SELECT count(*) FROM notifyq.task") == 0
        assert not logged("lost the database")
        code, said = await command("stats", "--dsn", pooled)
        assert code == 0, said
        await db.close()


# A disk that is full.


async def test_a_full_disk() -> None:
    """The server's disk is full. Acknowledged tasks are done when there is space again."""
    with open_folder() as folder:
        words = ["mount", "-t", "tmpfs", "-o", "size=180m,mode=711", "tmpfs"]
        mounted = subprocess.run([*words, folder], check=False, capture_output=True, text=True)
        if mounted.returncode:
            pytest.fail(f"needs root, to mount a small disk: {mounted.stderr}")
        try:
            await fill(folder)
        finally:
            subprocess.run(["umount", folder], check=True)


def use_up(ballast: Path) -> None:
    with ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(65536))


LARGE = """INSERT INTO notifyq.task (type, payload)
           SELECT 'Note', jsonb_build_object('x', (SELECT string_agg(md5((n * m)::text), '')
                                                   FROM generate_series(1, 1000) AS m))
           FROM generate_series(1, 500) AS n"""


async def fill(disk: Path) -> None:
    server = debian(disk / "home")
    await anyio.to_thread.run_sync(server.start)
    try:
        db = await migrated(server.dsn())
        await db.close()
        bench, over, acknowledged = Bench(), anyio.Event(), list[int]()

        async def enqueue() -> None:
            acknowledged.extend(await bench.enqueue_until(over, server.dsn()))

        async with working(bench.app, server.dsn()), anyio.create_task_group() as group:
            group.start_soon(enqueue)
            await bench.ran.reach(100)
            with pytest.raises(OSError, match="No space left"):
                use_up(disk / "ballast")
            # Tasks with payloads that don't fit any more: until the queue's own table can't grow.
            refusals, began = 0, time.monotonic()
            while refusals < 5:
                assert time.monotonic() < began + 60
                try:
                    load = await connection.connect(server.dsn(), role="test")
                    try:
                        await load.execute(LARGE)
                    finally:
                        load.terminate()
                except asyncpg.DiskFullError as error:
                    refusals += 1
                    print(error)
            (disk / "ballast").unlink()
            try:
                db = await connection.connect(server.dsn(), role="test")
            except notifyq.DatabaseError as error:
                print("a PANIC:", error)  # it was WAL that found no space; then a person has to start the server
                await anyio.to_thread.run_sync(server.restart)
                db = await connection.connect(server.dsn(), role="test")
            print(f"healed {await bench.woken(db, 10):.2f} s after")
            await bench.ran.reach(len(bench.ran.items) + 50)
            over.set()
        async with working(bench.app, server.dsn()):
            await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.task"), 0)
        done = {row[0] for row in await db.fetch("SELECT id FROM notifyq.finished WHERE state = 'done'")}
        await db.close()
        print(f"{len(acknowledged)} acknowledged")
        assert set(acknowledged) <= done
    finally:
        server.stop("immediate")
