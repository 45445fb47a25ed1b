"""The script of the demo: who does what, and when. What comes of it is for check.py to say."""

from __future__ import annotations

import signal
import socket
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import asynccontextmanager

import anyio
import httpx
from anyio.abc import TaskGroup

from notifyq.errors import NotifyqError

from .app import app
from .check import Drained, Facts, Killed
from .database import Database
from .processes import Child, Children
from .producers import CROWD, Plan, Producers
from .screen import Screen, Snapshot
from .smtp import MailServer
from .tasks import Tasks

WORKERS = 2
CONCURRENCY = 50
START_SECONDS = 30.0
SETTLE_SECONDS = 30.0  # without a task less to do; after that the checks say what is missing


class Story:
    """The demo, from its first task to its last."""

    def __init__(self, db: Database, children: Children, mail: MailServer, screen: Screen) -> None:
        self._db = db
        self._children = children
        self._mail = mail
        self._screen = screen
        self._workers: list[Child] = []
        self._told_to_go: set[Child] = set()

    async def tell(self, seconds: float, tasks: int) -> Facts:
        """All of it. Raises NotifyqError when a process that is needed ends or doesn't start."""
        facts = Facts(received=self._mail.received, refused=self._mail.refused)
        plan = Plan.of(seconds, tasks)
        async with (
            Tasks.connect(self._db) as ours,
            app.connect(self._db.dsn),
            anyio.create_task_group() as background,
            self._web(background) as http,
        ):
            await self._start_workers(background, ours)
            background.start_soon(self._watch)
            producers = Producers(self._db, self._children, http, facts, plan, seconds)
            await self._scenes(ours, producers, facts)
            facts.users = {str(row["id"]) for row in await ours.conn.fetch("SELECT id FROM users")}
            facts.rows = await ours.rows()
            background.cancel_scope.cancel()
        return facts

    async def _scenes(self, ours: Tasks, producers: Producers, facts: Facts) -> None:
        say = self._screen.event
        producers.begin()
        await producers.sign_up()
        async with anyio.create_task_group() as meanwhile:
            meanwhile.start_soon(producers.visit)
            meanwhile.start_soon(self._say_when_done, producers.use_psql)
            say(await producers.schedule())
            await producers.at(0.15)
            say(await producers.copy(ours.conn))
            await producers.at(0.3)
            say(await producers.get_it_wrong(ours.conn))
            await producers.at(0.45)
            meanwhile.start_soon(producers.crowd)
            facts.killed = await self._kill_one(ours)
            await self._rescue(ours, facts.killed)
        await _until(ours.unsettled, SETTLE_SECONDS)
        self._mail.refuse = 0.0  # a worker that drains takes no retries
        await producers.crowd()
        facts.drained = await self._drain(ours)

    # The processes.

    @asynccontextmanager
    async def _web(self, background: TaskGroup) -> AsyncGenerator[httpx.AsyncClient, None]:
        """The web application, on a socket that it is given; and a client, which no proxy setting diverts."""
        with socket.create_server(("127.0.0.1", 0), backlog=100) as listener:
            port, fd = listener.getsockname()[1], listener.fileno()
            command = f"uvicorn notifyq.demo.web:web --fd {fd} --log-level warning --no-access-log"
            child = await self._children.python("web", *command.split(), fds=[fd])
        background.start_soon(self._mind, child)
        self._screen.event(f"web on 127.0.0.1:{port}, mail on 127.0.0.1:{self._mail.port}")
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=30, trust_env=False) as client:
            yield client

    async def _start_workers(self, background: TaskGroup, ours: Tasks) -> None:
        command = f"notifyq worker notifyq.demo.app:app --queue {self._db.queue} --concurrency {CONCURRENCY}"
        command += " --history 365d"  # so that on a server of yours they don't prune what you keep
        for number in range(1, WORKERS + 1):
            worker = await self._children.python(f"worker {number}", *command.split())
            self._workers.append(worker)
            background.start_soon(self._mind, worker)

        async def missing() -> int:
            return WORKERS - await ours.workers()

        if not await _until(missing, START_SECONDS):
            said = "\n".join(f"  {worker.name} said:\n{worker.said()}" for worker in self._workers)
            raise NotifyqError(f"the workers aren't at work after {START_SECONDS:g} s\n{said}")
        self._screen.event(", ".join(f"{worker.name} is process {worker.pid}" for worker in self._workers))

    async def _mind(self, child: Child) -> None:
        """A child that ends by itself ends the demo."""
        await child.process.wait()
        if child not in self._told_to_go:
            raise NotifyqError(f"{child.name} ended, exit code {child.returncode}:\n{child.said()}")

    async def _kill_one(self, ours: Tasks) -> Killed:
        """SIGKILL to the worker with most in its hands."""
        worker, most = self._workers[0], 0
        with anyio.move_on_after(5):
            while most < CROWD // 6:
                held = {it: len(await ours.held(it.pid)) for it in self._workers}
                worker, most = max(held.items(), key=lambda item: item[1])
        killed_at = await ours.conn.fetchval("SELECT clock_timestamp()")
        self._told_to_go.add(worker)
        self._workers.remove(worker)
        # Before it is gone, which the table shows at once.
        self._screen.event(f"SIGKILL to {worker.name}, in the middle of its tasks")
        await worker.end(signal.SIGKILL, 5)
        held_tasks: dict[int, int] = {}
        for _ in range(10):  # what it had sent is still carried out: a claim, an outcome. The first rescue may be near
            held_tasks |= await ours.held(worker.pid)
            await anyio.sleep(0.02)
        self._screen.event(f"{worker.name} ran {len(held_tasks)} tasks when it was killed")
        return Killed(name=worker.name, pid=worker.pid, at=killed_at, held=held_tasks)

    async def _rescue(self, ours: Tasks, killed: Killed) -> None:
        async def still_held() -> int:
            return len(await ours.held(killed.pid))

        if await _until(still_held, SETTLE_SECONDS):
            self._screen.event(f"other workers have taken over the tasks of {killed.name}")

    async def _drain(self, ours: Tasks) -> list[Drained]:
        """SIGTERM to the workers that are left, with tasks in their hands."""

        async def ready() -> int:
            return (await ours.states())["ready"]

        await _until(ready, 5)
        drained: list[Drained] = []

        async def end(worker: Child, held: int) -> None:
            code = await worker.end(signal.SIGTERM, 30)
            self._screen.event(f"{worker.name} ended, exit code {code}")
            drained.append(Drained(name=worker.name, held=held, exit_code=code))

        async with anyio.create_task_group() as group:
            for worker in self._workers:
                held = len(await ours.held(worker.pid))
                self._screen.event(f"SIGTERM to {worker.name}, which runs {held} tasks")
                self._told_to_go.add(worker)
                group.start_soon(end, worker, held)
        return drained

    # What a person sees.

    async def _watch(self) -> None:
        workers = list(self._workers)
        async with Tasks.connect(self._db) as ours:
            while True:
                states, running = await ours.progress()
                now = Snapshot(tasks=states, received=self._mail.received.total(), refused=self._mail.refused.total())
                for worker in workers:
                    now.running[worker.name] = running[worker.pid] if worker.returncode is None else None
                self._screen.show(now)
                await anyio.sleep(self._screen.every)

    async def _say_when_done(self, producer: Callable[[], Awaitable[str]]) -> None:
        self._screen.event(await producer())


async def _until(remaining: Callable[[], Awaitable[int]], seconds: float) -> bool:
    """Ask until nothing remains; False once so long nothing has changed."""
    least = None
    with anyio.move_on_after(seconds) as limit:
        while count := await remaining():
            if least is None or count < least:
                least, limit.deadline = count, anyio.current_time() + seconds
            await anyio.sleep(0.02)
        return True
    return False
