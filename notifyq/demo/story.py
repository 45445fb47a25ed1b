"""The script of the demo: what happens, in which order, and when. check.py compares the results."""

from __future__ import annotations

import itertools
import signal
import socket
from collections import Counter
from dataclasses import dataclass, field

import anyio
import asyncpg
import httpx

from notifyq import NotifyqError

from .app import app
from .check import Facts, Row, Stopped
from .processes import Child, Children
from .screen import Screen
from .smtp import MailServer
from .traffic import CROWD, Plan, Traffic

PATIENCE_SECONDS = 30.0

USERS = "CREATE TABLE users (id uuid PRIMARY KEY, email text NOT NULL UNIQUE, reset_key text)"
HELD = "SELECT id, attempts FROM notifyq.all_tasks WHERE state = 'running' AND worker LIKE '%:' || $1"  # it is host:pid
UNSETTLED = "SELECT count(*) FROM notifyq.all_tasks WHERE state NOT IN ('done', 'dead', 'cancelled')"
READY = "SELECT count(*) FROM notifyq.all_tasks WHERE state = 'ready'"
ROWS = """
    SELECT id, type, state, attempts, created_at, run_at, processing_at, error,
           coalesce(payload ->> 'verification_key', payload ->> 'reset_key') AS key, payload #>> '{user,id}' AS user
    FROM notifyq.all_tasks
"""


@dataclass
class Story:
    """The demo as it runs: its mail server, screen, database and processes."""

    mail: MailServer
    screen: Screen
    pool: asyncpg.Pool[asyncpg.Record] = field(init=False)
    children: Children = field(init=False)
    workers: list[Child] = field(init=False)

    async def tell(self, plan: Plan, source: str) -> int:
        """Run the demo from the first task to the summary. Returns how many checks failed.

        source  where the PostgreSQL is from, for the screen

        Raises NotifyqError when a child doesn't start, or ends by itself.
        """
        facts = Facts(received=self.mail.received, refused=self.mail.refused)
        async with asyncpg.create_pool(min_size=1) as self.pool, app.connect(), anyio.create_task_group() as group:
            self.screen.event(f"PostgreSQL {await self.pool.fetchval('SHOW server_version')} ({source})")
            await self.pool.execute(USERS)
            self.children = Children(group)
            url = await self.start_web()
            await self.start_workers()
            group.start_soon(self.watch)
            async with httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as http:
                await self.scenes(Traffic(self.pool, http, facts, plan, self.screen.event))
            facts.users = {str(row["id"]) for row in await self.pool.fetch("SELECT id FROM users")}
            facts.rows = [Row(*row) for row in await self.pool.fetch(ROWS)]
            group.cancel_scope.cancel()
        failed = self.screen.summary(facts)
        if failed:
            self.screen.print(f"the processes said last:\n{self.children.last_lines()}")
        return failed

    async def scenes(self, traffic: Traffic) -> None:
        async with anyio.create_task_group() as meanwhile:
            await traffic.sign_up()
            meanwhile.start_soon(traffic.visit)
            meanwhile.start_soon(traffic.use_psql)
            await traffic.schedule()
            await traffic.at(0.15)
            await traffic.copy()
            await traffic.at(0.3)
            await traffic.make_mistakes()
            await traffic.at(0.45)
            meanwhile.start_soon(traffic.crowd)
            traffic.facts.killed = await self.kill(await self.find_busy_worker())
        await self.until_zero(UNSETTLED)
        self.mail.refuse = 0.0  # a worker that is stopping starts no retries
        await traffic.crowd()
        await self.until_zero(READY)
        [survivor] = [worker for worker in self.workers if worker.process.returncode is None]
        traffic.facts.drained = await self.stop(survivor, signal.SIGTERM)

    async def start_web(self) -> str:
        """Start the web application on a socket that takes connections from now on. Returns its URL."""
        with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
            url, fd = f"http://127.0.0.1:{listener.getsockname()[1]}", listener.fileno()
            command = f"uvicorn notifyq.demo.web:web --fd {fd} --log-level warning --no-access-log"
            await self.children.start("web", command, fd)
        self.screen.event(f"web on {url}, mail on 127.0.0.1:{self.mail.port}")
        return url

    async def start_workers(self) -> None:
        command = "notifyq worker notifyq.demo.app:app --concurrency 50"
        self.workers = [await self.children.start(name, command) for name in ("worker 1", "worker 2")]
        missing = "SELECT $1 - coalesce(sum(workers), 0) FROM notifyq.all_queues"
        if not await self.until_zero(missing, len(self.workers)):
            said = self.children.last_lines()
            raise NotifyqError(f"the workers aren't at work after {PATIENCE_SECONDS:g} s. They said:\n{said}")
        self.screen.event(", ".join(f"{worker.name} is process {worker.process.pid}" for worker in self.workers))

    async def find_busy_worker(self) -> Child:
        """The first worker that is seen with several running tasks; after 5 s without one, any."""
        with anyio.move_on_after(5):
            for worker in itertools.cycle(self.workers):
                if len(await self.held_by(worker)) >= CROWD // 6:
                    return worker
        return self.workers[0]

    async def kill(self, worker: Child) -> Stopped:
        """Kill the worker, and wait until its tasks run in the other one."""
        stopped = await self.stop(worker, signal.SIGKILL)
        stopped.held.clear()
        for _ in range(10):  # the server may still carry out what the worker had sent: a claim, or outcomes
            stopped.held.update(await self.held_by(worker))
            await anyio.sleep(0.02)
        self.screen.event(f"{worker.name} ran {len(stopped.held)} tasks when it was killed")
        if await self.until_zero(f"SELECT count(*) FROM ({HELD}) AS held", str(worker.process.pid)):  # noqa: S608
            self.screen.event(f"the other worker has taken over the tasks of {worker.name}")
        return stopped

    async def stop(self, worker: Child, number: signal.Signals) -> Stopped:
        """Send the signal, and wait until the worker has ended, at most 30 s."""
        at, held = await self.pool.fetchval("SELECT clock_timestamp()"), await self.held_by(worker)
        self.screen.event(f"{number.name} to {worker.name}, which runs {len(held)} tasks")
        worker.may_end = True
        worker.process.send_signal(number)
        with anyio.move_on_after(30):
            await worker.process.wait()
        code = worker.process.returncode
        self.screen.event(f"{worker.name} is still there" if code is None else f"{worker.name} ended, exit code {code}")
        return Stopped(worker.name, at, held, code)

    async def held_by(self, worker: Child) -> dict[int, int]:
        """The tasks that a worker runs, and the attempt that each is at."""
        rows = await self.pool.fetch(HELD, str(worker.process.pid))
        return {row["id"]: row["attempts"] for row in rows}

    async def until_zero(self, count: str, *args: object) -> bool:
        """Repeat a query until it returns 0. Returns False when its result hasn't fallen for PATIENCE_SECONDS."""
        least = float("inf")
        with anyio.move_on_after(PATIENCE_SECONDS) as limit:
            while left := await self.pool.fetchval(count, *args):
                if left < least:
                    least, limit.deadline = left, anyio.current_time() + PATIENCE_SECONDS
                await anyio.sleep(0.02)
        return not limit.cancelled_caught

    async def watch(self) -> None:
        """Show how it goes."""
        query = "SELECT type, state, worker, count(*) FROM notifyq.all_tasks GROUP BY 1, 2, 3"
        while True:
            tasks, running = Counter[tuple[str, str]](), Counter[str]()
            for type, state, worker, count in await self.pool.fetch(query):
                tasks[type, state] += count
                if state == "running":
                    running[worker.rpartition(":")[2]] += count
            notes = [f"{self.mail.received.total():,} mails, {self.mail.refused.total():,} refused"]
            for child in self.workers:
                runs = f"runs {running[str(child.process.pid)]}" if child.process.returncode is None else "gone"
                notes.append(f"{child.name} {runs}")
            self.screen.show(tasks, "; ".join(notes))
            await anyio.sleep(0.25 if self.screen.is_terminal else 1.0)
