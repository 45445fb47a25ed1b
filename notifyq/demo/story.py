"""The script of the demo: what happens, in which order, and when. check.py says what came of it."""

from __future__ import annotations

import itertools
import os
import signal
import socket
import sys
from collections import Counter
from dataclasses import dataclass, field

import anyio
import httpx
from anyio.abc import TaskGroup

from notifyq import NotifyqError

from .app import app
from .check import Facts, Row, Stopped
from .database import Database, open_database
from .processes import Child, run_child
from .screen import Screen
from .smtp import MailServer
from .traffic import CROWD, Traffic, make_plan

PATIENCE_SECONDS = 30.0
HELD = "SELECT id, attempts FROM tasks WHERE state = 'running' AND worker LIKE '%:' || $1"  # its name is host:pid


async def run(seconds: float, tasks: int, dsn: str | None) -> int:
    """The demo until its end, or until a signal. Returns the exit code."""
    async with anyio.create_task_group() as group:

        async def interrupt() -> None:
            hangup = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN  # nohup ignores it
            with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, *[signal.SIGHUP] * hangup) as signals:
                async for _ in signals:
                    group.cancel_scope.cancel()

        group.start_soon(interrupt)
        mail = MailServer()
        with Screen() as screen:
            async with open_database(dsn, screen.event) as db, mail.serve() as mail_port:
                story = Story(db, mail, mail_port, screen)
                await story.tell(seconds, tasks)
        failed = screen.summary(story.facts)
        for child in story.children if failed else []:
            screen.print(f"{child.name} said last:\n{child.last_lines()}")
        group.cancel_scope.cancel()
        return 1 if failed else 0
    print("interrupted; all processes are stopped", file=sys.stderr)
    return 1


@dataclass
class Story:
    """The demo, from its first task to its last."""

    db: Database
    mail: MailServer
    mail_port: int
    screen: Screen
    facts: Facts = field(default_factory=Facts)
    children: list[Child] = field(default_factory=list[Child])

    async def tell(self, seconds: float, tasks: int) -> None:
        """All of it. Raises NotifyqError when a child doesn't start, or ends by itself."""
        self.facts.received, self.facts.refused = self.mail.received, self.mail.refused
        async with app.connect(self.db.url), anyio.create_task_group() as group:
            url = await self.start_web(group)
            workers = await self.start_workers(group)
            group.start_soon(self.watch, workers)
            async with httpx.AsyncClient(base_url=url, timeout=30, trust_env=False) as http:
                traffic = Traffic(self.db, http, self.facts, make_plan(seconds, tasks), seconds, self.screen.event)
                await self.scenes(traffic, workers)
            await self.read_database()
            group.cancel_scope.cancel()

    async def scenes(self, traffic: Traffic, workers: list[Child]) -> None:
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
            survivor = await self.kill_one(workers)
        await self.zero("SELECT count(*) FROM tasks WHERE state NOT IN ('done', 'dead', 'cancelled')")
        self.mail.refuse = 0.0  # a worker that is stopping starts no retries
        await traffic.crowd()
        await self.zero("SELECT count(*) FROM tasks WHERE state = 'ready'")
        await self.stop(survivor)

    # The processes.

    async def start_web(self, group: TaskGroup) -> str:
        """Start the web application on a socket that takes connections from now on. Returns its URL."""
        with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
            url, fd = f"http://127.0.0.1:{listener.getsockname()[1]}", listener.fileno()
            command = f"uvicorn notifyq.demo.web:web --fd {fd} --log-level warning --no-access-log"
            await self.start(group, "web", command, fd)
        self.screen.event(f"web on {url}, mail on 127.0.0.1:{self.mail_port}")
        return url

    async def start_workers(self, group: TaskGroup) -> list[Child]:
        command = f"notifyq worker notifyq.demo.app:app --queue {self.db.queue} --concurrency 50"
        command += " --history 365d"  # so that on a server of yours they don't delete finished tasks of yours
        workers = [await self.start(group, name, command) for name in ("worker 1", "worker 2")]
        missing = "SELECT $2 - coalesce(sum(workers), 0) FROM notifyq.all_queues WHERE name = $1"
        if not await self.zero(missing, self.db.queue, len(workers)):
            said = "\n".join(f"  {worker.name} said:\n{worker.last_lines()}" for worker in workers)
            raise NotifyqError(f"the workers aren't at work after {PATIENCE_SECONDS:g} s\n{said}")
        self.screen.event(", ".join(f"{worker.name} is process {worker.process.pid}" for worker in workers))
        return workers

    async def start(self, group: TaskGroup, name: str, command: str, *fds: int) -> Child:
        """Start a child, without settings that are meant for real workers.

        What it needs to know isn't in its arguments, which other users of the machine can see.
        """
        environment = {name: value for name, value in os.environ.items() if not name.startswith("NOTIFYQ_")}
        environment |= {"NOTIFYQ_DSN": self.db.url, "DEMO_QUEUE": self.db.queue, "DEMO_SCHEMA": self.db.schema}
        environment |= {"DEMO_SMTP_PORT": str(self.mail_port)}
        child: Child = await group.start(run_child, name, command, environment, fds)
        self.children.append(child)
        return child

    async def kill_one(self, workers: list[Child]) -> Child:
        """Kill a worker while it runs several tasks, and wait until these run elsewhere. Returns the other worker."""
        with anyio.move_on_after(5):
            for victim in itertools.cycle(workers):
                if len(await self.held_by(victim)) >= CROWD // 6:
                    break
        now = await self.db.pool.fetchval("SELECT clock_timestamp()")
        self.screen.event(f"SIGKILL to {victim.name}, in the middle of its tasks")  # before the table shows it as gone
        code = await victim.end(signal.SIGKILL, 5)
        held: dict[int, int] = {}
        for _ in range(10):
            # What the worker had sent is still carried out: a claim, an outcome. The first rescue may be near.
            held |= await self.held_by(victim)
            await anyio.sleep(0.02)
        self.facts.killed = Stopped(victim.name, now, held, code)
        self.screen.event(f"{victim.name} ran {len(held)} tasks when it was killed")
        if await self.zero(f"SELECT count(*) FROM ({HELD}) AS held", str(victim.process.pid)):  # noqa: S608
            self.screen.event(f"the other worker has taken over the tasks of {victim.name}")
        return next(worker for worker in workers if worker is not victim)

    async def stop(self, worker: Child) -> None:
        now, held = await self.db.pool.fetchval("SELECT clock_timestamp()"), await self.held_by(worker)
        self.screen.event(f"SIGTERM to {worker.name}, which runs {len(held)} tasks")
        code = await worker.end(signal.SIGTERM, 30)
        self.screen.event(f"{worker.name} ended, exit code {code}")
        self.facts.drained = Stopped(worker.name, now, held, code)

    # Questions to the database.

    async def held_by(self, worker: Child) -> dict[int, int]:
        """The tasks that a worker runs, and the attempt that each is at."""
        rows = await self.db.pool.fetch(HELD, str(worker.process.pid))
        return {row["id"]: row["attempts"] for row in rows}

    async def zero(self, count: str, *args: object) -> bool:
        """Repeat a query until it returns 0. Returns False when its result hasn't fallen for PATIENCE_SECONDS."""
        least = float("inf")
        with anyio.move_on_after(PATIENCE_SECONDS) as limit:
            while left := await self.db.pool.fetchval(count, *args):
                if left < least:
                    least, limit.deadline = left, anyio.current_time() + PATIENCE_SECONDS
                await anyio.sleep(0.02)
        return not limit.cancelled_caught

    async def read_database(self) -> None:
        self.facts.users = {str(row["id"]) for row in await self.db.pool.fetch("SELECT id FROM users")}
        query = """
            SELECT id, type, state, attempts, created_at, run_at, processing_at, error,
                   coalesce(payload ->> 'verification_key', payload ->> 'reset_key') AS key,
                   payload #>> '{user,id}' AS user
            FROM tasks
        """
        self.facts.rows = [Row(*row) for row in await self.db.pool.fetch(query)]

    async def watch(self, workers: list[Child]) -> None:
        """Show how it goes."""
        query = "SELECT type, state, worker, count(*) FROM tasks GROUP BY 1, 2, 3"
        while True:
            tasks, running = Counter[tuple[str, str]](), Counter[str]()
            for type, state, worker, count in await self.db.pool.fetch(query):
                tasks[type, state] += count
                if state == "running":
                    running[worker.rpartition(":")[2]] += count
            note = f"{self.mail.received.total():,} mails, {self.mail.refused.total():,} refused"
            for worker in workers:
                gone = worker.process.returncode is not None
                note += f"; {worker.name} {'gone' if gone else f'runs {running[str(worker.process.pid)]}'}"
            self.screen.show(tasks, note)
            await anyio.sleep(self.screen.interval)
