"""Which statements ring while a worker sleeps: a ring that nothing needs would wake every fleet."""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable
from typing import Any

import anyio
import pytest

from notifyq.client.options import Options
from notifyq.database import connection
from notifyq.database.connection import SQL
from notifyq.worker import job as claims

from ..helpers.databases import Sessions
from ..helpers.machine import limit
from ..helpers.plans import rolled_back
from ..helpers.statements import held, insert, silent
from ..helpers.verbs import rescue


@pytest.fixture
async def worker(dsn: str) -> AsyncIterator[Any]:
    """A worker's connection to the test's database."""
    conn = await connection.connect_worker(dsn, "test")
    yield conn
    conn.terminate()


# Which statements ring. A claim or a promotion that rang would wake the whole fleet for nothing.
RINGS: dict[str, tuple[Any, Callable[[Any, int, int], Any]]] = {
    "claim": (False, lambda c, w, id: claims.claim(c, w, {"default": 9}, 9)),
    "check_due": (False, lambda c, w, id: c.fetchrow(SQL["check_due"], ["default"], [], 9, None, None)),
    "send_heartbeat": (
        False,
        lambda c, w, id: c.fetchrow(SQL["send_heartbeat"], w, 0, "ok", [id], [1], ["default"], ["Known"], True),
    ),
    "finish": (False, lambda c, w, id: c.fetch(SQL["finish"], w, [id], [1], ["done"], [], [], True)),
    "release_unhandled": ("unhandled", lambda c, w, id: c.fetch(SQL["release_unhandled"], w, [id], [1])),
    "retry_later": (True, lambda c, w, id: c.fetch(SQL["retry_later"], w, [id], [1], [9.0], [b"{}"])),
    "hand_back": (True, lambda c, w, id: c.fetch(SQL["hand_back"], w, [id], [1])),
    "reclaim_unanswered": (True, lambda c, w, id: c.fetchval(SQL["reclaim_unanswered"], w, [], [], None)),
    "cancel": (False, lambda c, w, id: c.fetchval("SELECT notifyq.cancel($1)", id)),
    "hand_back_all": (True, lambda c, w, id: c.fetchval(SQL["hand_back_all"], w, None)),
    "rescue": (True, lambda c, w, id: rescue(c, w, 9)),
    "insert": (True, lambda c, w, id: insert(c)),
    "enqueue": (True, lambda c, w, id: c.fetch(SQL["enqueue"], "T", "{}", *Options.check(queue="q").columns, None)),
    "enqueue_many": (
        True,
        lambda c, w, id: c.fetch(SQL["enqueue_many"], ["T"], ["{}"], *Options.check(queue="q").columns, None),
    ),
    "echo": ("hello", lambda c, w, id: c.fetchrow(SQL["check_due"], [], [], 9, "hello", None)),
}


@pytest.mark.parametrize("name", RINGS)
async def test_which_statements_ring_while_a_worker_sleeps(worker: Any, db: Any, connect: Sessions, name: str) -> None:
    want, act = RINGS[name]
    me, (id,) = await held(worker)
    await insert(worker, created_at="2000-01-01", run_at="2001-01-01")
    await silent(worker, me, 5)
    sleeper = await connect()
    heard: list[str] = []
    await db.add_listener("notifyq", lambda *args: heard.append(args[3]))
    async with sleeper.transaction():
        await sleeper.execute("LOCK TABLE notifyq.bell IN SHARE MODE")
        await act(worker, me, id)
        await worker.execute("NOTIFY notifyq, 'the end'")
        with anyio.fail_after(limit()):
            while "the end" not in heard:
                await anyio.sleep(0.001)
    assert heard[:-1] == ([""] if want is True else [want] if want else [])


async def test_a_ring_that_fails_aborts_no_insert(worker: Any) -> None:
    async with rolled_back(worker):
        await worker.execute("DROP TABLE notifyq.bell")
        assert len(await insert(worker)) == 1
