"""Handlers that fork: a signal to a child stops no worker, and a child keeps none of a worker's sockets open."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from notifyq.embedded import Server

from ..helpers.processes import Program, Start
from ..helpers.waiting import eventually

pytestmark = pytest.mark.slow

APP = """
import asyncio, ctypes, multiprocessing as mp, os, signal, subprocess, sys, threading, time
from concurrent.futures import ProcessPoolExecutor
import anyio
import notifyq

app = notifyq.App()
fork = mp.get_context("fork")

class Fork(notifyq.Task, tag="FORK"):
    max_attempts = 1
    how: str

class FromLoop(Fork, tag="FROM_LOOP"):
    pass

class Hold(notifyq.Task, tag="HOLD"):
    pass

class Use(notifyq.Task, tag="USE"):
    pass

def rest(started=None):
    if started is not None:
        started.set()
    # A handler of Python that is due right before a sleep runs after it. So SIGINT has to wait for a short one only.
    for _ in range(12000):
        time.sleep(0.05)

def fails(n):
    raise ValueError(n)

def one_child():
    started = fork.Event()
    child = fork.Process(target=rest, args=(started,), daemon=True)
    child.start()
    started.wait()
    return child

def ended(pid):
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])

def run(how):
    if how == "terminate":
        child = one_child()
        child.terminate()
        child.join()
        return child.exitcode
    if how == "terminate at once":
        codes = set()
        for _ in range(50):
            child = fork.Process(target=rest, daemon=True)
            child.start()
            child.terminate()
            child.join()
            codes.add(child.exitcode)
        return sorted(codes)
    if how == "interrupt":
        child = one_child()
        os.kill(child.pid, signal.SIGINT)
        child.join()
        return child.exitcode
    if how == "pool left early":
        with fork.Pool(2) as pool:
            return pool.map(abs, [-1, -2])
    if how == "pool that fails":
        with fork.Pool(2) as pool:
            try:
                pool.map(fails, range(3))
            except ValueError:
                return "failed"
    if how == "executor":
        with ProcessPoolExecutor(2, mp_context=fork) as pool:
            return [pool.submit(pow, 2, n).result() for n in range(3)]
    if how in ("spawn", "forkserver"):
        with mp.get_context(how).Pool(1) as pool:
            return pool.map(abs, [-1, -2])
    if how == "preexec":
        child = subprocess.Popen(["sleep", "600"], preexec_fn=lambda: os.kill(os.getpid(), signal.SIGTERM))
        return child.wait()
    if how == "fork":
        reading, writing = os.pipe()
        if (pid := os.fork()) == 0:
            os.write(writing, b"+")
            time.sleep(600)
            os._exit(0)
        os.read(reading, 1)
        os.kill(pid, signal.SIGTERM)
        return ended(pid)
    if how == "fork of C":
        # Python doesn't know of this child: it has the handlers of its parent, and SIGTERM doesn't end it. It runs C
        # only: Python would wait in it for a thread of its parent, if one had asked for the GIL before.
        libc = ctypes.CDLL(None)
        stack = ctypes.create_string_buffer(1 << 16)
        top = (ctypes.addressof(stack) + len(stack)) & ~15
        pid = libc.clone(libc.pause, ctypes.c_void_p(top), signal.SIGCHLD, None)  # -1, once a handler has run
        while (found := os.waitpid(pid, os.WNOHANG)) == (0, 0):
            os.kill(pid, signal.SIGTERM)  # once more, as one that comes before the pause doesn't end that
            time.sleep(0.02)
        return os.waitstatus_to_exitcode(found[1])
    if how == "exits":
        if (pid := os.fork()) == 0:
            sys.exit(7)
        return ended(pid)
    if how == "raises":
        if (pid := os.fork()) == 0:
            raise ValueError("in the child")
        return ended(pid)
    if how == "returns":
        if (pid := os.fork()) == 0:
            return "in the child"
        return ended(pid)
    raise ValueError(how)

@app.handler
def forks(task: Fork) -> object:
    return run(task.how)

@app.handler
async def forks_from_loop(task: FromLoop) -> object:
    return run(task.how)

@app.handler
async def hold(task: Hold) -> None:
    child = one_child()
    print("child", child.pid, flush=True)
    await asyncio.sleep(600)

class Rest(notifyq.Task, tag="REST"):
    pass

@app.handler
async def two_that_rest(task: Rest) -> None:
    pids = [one_child().pid for _ in range(2)]
    print("children", *pids, flush=True)
    await asyncio.sleep(1)
    print("ended by itself", flush=True)

@app.handler
async def use(task: Use, ctx: notifyq.Context) -> None:
    # A connection of each kind that a worker can have.
    await ctx.results()
    ref = await app.enqueue(Fork(how="executor"))
    async with asyncio.timeout(60):
        await ref.result()
    async with ctx.transaction() as conn:
        await conn.execute("SELECT 1")
"""

EMBEDDED = """
import asyncio, signal, sys
import anyio
from forks import app

async def main():
    stop = anyio.Event()
    if sys.argv[1] == "own":
        asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stop.set)
    async with app.connect(), anyio.create_task_group() as group:
        await group.start(lambda task_status: app.run_worker(
            stop=stop, signals=sys.argv[1] == "signals", task_status=task_status))
        print("stop it", flush=True)
    print("clean", flush=True)

if __name__ == "__main__":  # spawn imports this file
    asyncio.run(main())
"""

LOOPS = {"uvloop": "", "asyncio": "sys.modules['uvloop'] = None"}
INSERT = "INSERT INTO notifyq.task (type, payload) VALUES ($1, $2) RETURNING id"
FROM_THREADS = {
    "terminate": -signal.SIGTERM,
    "terminate at once": [-signal.SIGTERM],
    "interrupt": 1,  # KeyboardInterrupt
    "pool left early": [1, 2],
    "pool that fails": "failed",
    "executor": [1, 2, 4],
    "spawn": [1, 2],
    "forkserver": [1, 2],
    "fork": -signal.SIGTERM,
    "fork of C": 255,
    "exits": 7,
    "raises": 1,
    "returns": 0,
}


@pytest.fixture
def start(tmp_path: Path, dsn: str) -> Iterator[Start]:
    (tmp_path / "forks.py").write_text(APP)
    (tmp_path / "embedded.py").write_text(EMBEDDED)
    programs: list[Program] = []

    def start(*words: str) -> Program:
        programs.append(Program(tmp_path, dsn, *words))
        return programs[-1]

    yield start
    for program in programs:
        program.kill_all()


def worker(*words: str, loop: str = "uvloop") -> list[str]:
    code = f"import sys; {LOOPS[loop]}\nfrom notifyq.cli import main\nsys.exit(main(sys.argv[1:]))"
    return [sys.executable, "-c", code, "worker", "forks:app", *words]


async def result(db: Any, id: int) -> Any:
    """The result of a task, once it is done."""
    query = "SELECT state, result, error FROM notifyq.all_tasks WHERE id = $1 AND state IN ('done', 'dead')"
    await eventually(lambda: db.fetchval(f"SELECT EXISTS ({query})", id))
    state, value, error = await db.fetchrow(query, id)
    assert state == "done", error
    return None if value is None else json.loads(value)


async def all_ways(db: Any, type: str, expected: dict[str, Any]) -> None:
    for how, value in expected.items():
        id = await db.fetchval(INSERT, type, json.dumps({"how": how}).encode())
        assert (how, await result(db, id)) == (how, value)


@pytest.mark.parametrize("loop", LOOPS)
async def test_a_signal_to_a_child_ends_the_child(start: Start, db: Any, loop: str) -> None:
    """The signal comes from a thread or from the event loop, however the child was made. The worker lives, and one
    signal to it ends it."""
    program = start(*worker(loop=loop))
    await program.line("stop it")
    await all_ways(db, "FORK", FROM_THREADS)
    await all_ways(db, "FROM_LOOP", {"preexec": -signal.SIGTERM, **FROM_THREADS})
    assert "stopping" not in program.said
    assert program.said.count("ValueError: in the child") == 2
    assert program.said.count("a forked child returned") == 2
    program.popen.send_signal(signal.SIGTERM)
    assert await program.end() == 0
    assert program.said.count("stopping") <= 1
    assert "lost the database" not in program.said


async def test_with_several_processes(start: Start, db: Any) -> None:
    program = start(*worker("--processes", "2"))
    await program.line("worker started", 2)
    for _ in range(3):
        await all_ways(db, "FORK", {how: FROM_THREADS[how] for how in ("terminate", "pool left early")})
    assert "ended by itself" not in program.said
    program.popen.send_signal(signal.SIGTERM)
    assert await program.end() == 0


@pytest.mark.parametrize("signals", ["own", "signals"])
async def test_in_a_program_of_ones_own(start: Start, db: Any, signals: str) -> None:
    """Whether run_worker takes the signals or the program does."""
    program = start(sys.executable, "embedded.py", signals)
    await program.line("stop it")
    ways = dict(FROM_THREADS)
    if signals == "own":
        del ways["fork of C"]  # its signals go where those of the program do
    await all_ways(db, "FORK", ways)
    assert program.popen.poll() is None
    program.popen.send_signal(signal.SIGTERM)
    assert await program.end() == 0
    assert program.said.endswith("clean\n")


ALONE = """
import os, signal
from notifyq import forked

def in_child(told):
    with forked.signals_are_ours():
        if (pid := os.fork()) == 0:
            print(told(), flush=True)
            os._exit(0)
        os.waitpid(pid, 0)

signal.signal(signal.SIGTERM, lambda *_: None)
signal.signal(signal.SIGINT, signal.SIG_IGN)
in_child(lambda: [signal.getsignal(number).name for number in (signal.SIGTERM, signal.SIGINT)])
def interrupted():
    signal.raise_signal(signal.SIGINT)
signal.signal(signal.SIGINT, signal.default_int_handler)
forked._free_signals = interrupted
in_child(lambda: signal.pthread_sigmask(signal.SIG_BLOCK, ()))
"""


def test_what_a_child_starts_with() -> None:
    """What the program ignores, its children ignore, as everywhere; and none of them is left with SIGTERM blocked, even
    if a Ctrl-C comes while it gets its signals."""
    ended = subprocess.run([sys.executable, "-c", ALONE], capture_output=True, text=True, check=True)
    assert ended.stdout.splitlines() == ["['SIG_DFL', 'SIG_IGN']", "set()"]
    assert "KeyboardInterrupt" in ended.stderr, "it would prove nothing"


async def test_a_signal_to_the_whole_group_counts_once(start: Start, db: Any) -> None:
    """A service manager sends it so. The children end, and the worker lets its handler finish."""
    program = start(*worker("--shutdown-timeout", "60"))
    await program.line("stop it")
    id = await db.fetchval(INSERT, "REST", b"{}")
    children = [int(pid) for pid in (await program.line("children")).split()[1:]]
    os.killpg(program.popen.pid, signal.SIGTERM)
    assert await program.end() == 0
    assert "ended by itself" in program.said
    assert "handing their tasks back" not in program.said
    assert await result(db, id) is None
    await eventually(lambda: gone(children))


async def gone(pids: list[int]) -> bool:
    return not any(Path(f"/proc/{pid}").exists() for pid in pids)


BACKENDS = """
SELECT count(*) FROM pg_stat_activity
WHERE datname = current_database() AND application_name LIKE 'notifyq%' AND application_name <> 'notifyq test'"""


@pytest.mark.parametrize("loop", LOOPS)
async def test_a_killed_worker_with_a_living_child(start: Start, db: Any, loop: str) -> None:
    """The server sees that the worker is gone, so its tasks needn't wait for the lease; nothing of it is left."""
    first = start(*worker(loop=loop))
    await first.line("stop it")
    await result(db, await db.fetchval(INSERT, "USE", b"{}"))
    id = await db.fetchval(INSERT, "HOLD", b"{}")
    child = int((await first.line("child")).split()[1])
    # So that only a free lock tells, and not that the lease has passed.
    await db.execute("UPDATE notifyq.worker SET lease = '1 hour'")
    first.popen.kill()
    await first.end()
    await eventually(lambda: db.fetchval(BACKENDS), 0)
    second = start(*worker())
    await second.line("child")
    assert not await gone([child]), "it would prove nothing"
    assert await db.fetchval("SELECT attempts FROM notifyq.all_tasks WHERE id = $1", id) == 2
    os.kill(child, signal.SIGKILL)


SYNC = """
import os, sys, threading, time
import notifyq

app = notifyq.App()
class Mail(notifyq.Task): pass
@app.handler
def mail(task: Mail) -> None: ...
client = notifyq.SyncClient(app).connect()
client.enqueue(Mail())
client._lock.acquire()  # as another thread has it that is about to make the pool
if os.fork() == 0:
    print("child enqueued", client.enqueue(Mail()).id, flush=True)
    client.close()
    time.sleep(600)
print("parent", flush=True)
time.sleep(600)
"""


async def test_a_sync_client(start: Start, db: Any, tmp_path: Path) -> None:
    """A child has connections of its own, even if another thread was using the client, and none of its parent's."""
    (tmp_path / "client.py").write_text(SYNC)
    program = start(sys.executable, "client.py")
    await program.line("child enqueued")
    await program.line("parent")
    program.popen.kill()
    await program.end()
    await eventually(lambda: db.fetchval(BACKENDS), 0)


LOCKED = """
import os, sys, time
from pathlib import Path
from notifyq.embedded import Server

server = Server(Path(sys.argv[1])).start()
if os.fork() == 0:
    print("child", os.getpid(), flush=True)
    time.sleep(600)
time.sleep(600)
"""


@pytest.fixture
async def kept() -> AsyncIterator[Path]:
    """A folder that the account which runs PostgreSQL for root may pass; pytest's are closed."""
    import tempfile

    with tempfile.TemporaryDirectory(prefix="nq-", dir="/tmp") as name:
        Path(name).chmod(0o755)
        yield Path(name)


async def test_an_embedded_server(start: Start, tmp_path: Path, kept: Path) -> None:
    """A child that outlives the owner of a kept server doesn't keep others from its folder."""
    (tmp_path / "locked.py").write_text(LOCKED)
    program = start(sys.executable, "locked.py", str(kept / "data"))
    await program.line("child")
    program.popen.kill()
    await program.end()
    with Server(kept / "data") as server:
        assert server.pid
