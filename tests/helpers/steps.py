"""Sessions that a test steps by hand, as PostgreSQL's isolation tester does.

    async with steps(dsn) as s:
        a, b = await s.session("a"), await s.session("b")
        await a("BEGIN")
        await a("LOCK TABLE notifyq.bell IN ROW EXCLUSIVE MODE")
        waiting = await b.blocked_by(a, "LOCK TABLE notifyq.bell IN SHARE MODE")
        await a("COMMIT")
        await waiting

A step is a statement and its parameters, or a function that takes the connection first (see verbs.py). The server
says that a step waits, and for which session: no test guesses that after a while. Each wait has a limit, which only a
failing test reaches.
"""

from __future__ import annotations

import asyncio
import os
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Generator, Iterator
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeAlias

import anyio

from notifyq.database import connection

from .machine import limit

PREPARED = None  # a prepared transaction, as one that is waited for

Step: TypeAlias = str | Callable[..., Awaitable[Any]]


class Waiting:
    """A step that waits for a session. Await it for its result."""

    def __init__(self, name: str, task: asyncio.Task[Any]) -> None:
        self._name = name
        self._task = task

    @property
    def over(self) -> bool:
        return self._task.done()

    def __await__(self) -> Generator[Any, None, Any]:
        return self._result().__await__()

    async def _result(self) -> Any:
        done, _ = await asyncio.wait([self._task], timeout=limit())
        assert done, f"{self._name} still waits"
        return self._task.result()

    async def cancelled(self) -> None:
        """Cancel the step, as a cancelled `await` of asyncpg does."""
        self._task.cancel()
        await asyncio.wait([self._task])


class Session:
    """One connection. `await a(step)` takes a step that must not wait."""

    def __init__(self, name: str, conn: Any, db: Any) -> None:
        self.name = name
        self.conn = conn
        self.pid: int = conn.get_server_pid()
        self._db = db
        self._tasks: list[asyncio.Task[Any]] = []

    async def __call__(self, step: Step, *args: Any, **more: Any) -> Any:
        task = self._start(step, args, more)
        done, _ = await asyncio.wait([task], timeout=limit())
        assert done, f"{self.name} should not wait, and waits for backends {await self.blockers()}: {step}"
        return task.result()

    async def blocked_by(self, other: Session | int | None, step: Step, *args: Any, **more: Any) -> Waiting:
        """Take a step that has to wait for `other`: a session, a backend's pid, or PREPARED."""
        task = self._start(step, args, more)
        pid = other.pid if isinstance(other, Session) else other or 0
        with anyio.move_on_after(limit()):
            while pid not in await self.blockers() and not task.done():
                await asyncio.sleep(0.001)
        assert not task.done(), f"{self.name} should wait, and didn't: {step} returned {task.result()!r}"
        assert pid in await self.blockers(), f"{self.name} doesn't wait: {step}"
        return Waiting(self.name, task)

    async def blockers(self) -> list[int]:
        return await blockers(self._db, self.pid)

    def _start(self, step: Step, args: tuple[Any, ...], more: dict[str, Any]) -> asyncio.Task[Any]:
        async def run() -> Any:
            return await (self.conn.fetch(step, *args) if isinstance(step, str) else step(self.conn, *args, **more))

        task = asyncio.create_task(run(), name=f"session {self.name}")
        self._tasks.append(task)
        return task

    def close(self) -> None:
        self.conn.terminate()
        for task in self._tasks:
            task.cancel()


class Steps:
    """The sessions of a test. `db` is one more session, which is never in a transaction, to look and to help with."""

    def __init__(self, dsn: str, db: Any) -> None:
        self._dsn = dsn
        self.db = db
        self.sessions: list[Session] = []

    async def session(self, name: str) -> Session:
        """A session with the settings of any client."""
        return self._add(name, await connection.connect(self._dsn, role=name))

    async def worker(self, name: str) -> Session:
        """A session with a worker's settings. The one for claims also commits without waiting for the disk."""
        return self._add(name, await connection.connect_worker(self._dsn, name, relaxed=name.startswith("claims")))

    def _add(self, name: str, conn: Any) -> Session:
        self.sessions.append(Session(name, conn, self.db))
        return self.sessions[-1]


@asynccontextmanager
async def steps(dsn: str) -> AsyncIterator[Steps]:
    """Sessions that have all ended with the block, whatever they waited for."""
    db = await connection.connect(dsn, role="test")
    s = Steps(dsn, db)
    try:
        yield s
    finally:
        with anyio.CancelScope(shield=True):
            pids = [session.pid for session in s.sessions]
            for session in s.sessions:
                session.close()
            await db.fetch(
                "SELECT pg_terminate_backend(pid, 2000) FROM pg_stat_activity WHERE pid = ANY ($1::integer[])", pids
            )
            db.terminate()


async def blockers(db: Any, pid: int) -> list[int]:
    """Whom a backend waits for; 0 is a prepared transaction."""
    return list(await db.fetchval("SELECT pg_blocking_pids($1)", pid))


async def until_blocked(db: Any, role: str, by: Session) -> None:
    """Wait until the backend of a worker's connection, such as "settle", waits for a session."""
    found = (
        "SELECT pid FROM pg_stat_activity WHERE application_name = 'notifyq ' || $1 AND datname = current_database()"
    )
    with anyio.fail_after(limit()):
        while not any([by.pid in await blockers(db, row[0]) for row in await db.fetch(found, role)]):
            await asyncio.sleep(0.001)


@contextmanager
def frozen(session: Session) -> Iterator[None]:
    """Its backend is stopped inside the block. What happens to it meanwhile, it learns all at once at the end."""
    os.kill(session.pid, signal.SIGSTOP)
    try:
        yield
    finally:
        os.kill(session.pid, signal.SIGCONT)
