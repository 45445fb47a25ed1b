"""The settler by itself: what it does when the connection, or PostgreSQL, is in its way."""

from __future__ import annotations

from typing import Any

import asyncpg
import pytest

from notifyq.worker.outcome import Finished, Outcome
from notifyq.worker.outcome_writer import OutcomeWriter

from ..helpers.stages import Writing
from ..helpers.steps import Session, Steps, until_blocked
from ..helpers.verbs import held, states
from ..helpers.waiting import Seen


@pytest.mark.parametrize("moment", ["the second refusal", "the write"])
async def test_a_connection_lost_as_the_settler_changes_its_lock_timeout(
    s: Steps, w: Session, p: Session, dsn: str, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A table is locked. After the second refusal the settler waits for the lock as long as for anything else, and
    after the write for a shorter time again. A connection that ends then is replaced, and each outcome is written."""
    first, second = await w(held, 2)
    person = await s.session("person")
    refused, ended = Seen(), Seen()
    write = OutcomeWriter.write

    async def end(conn: Any) -> None:
        if not ended.items:
            [row] = await person("SELECT pg_terminate_backend($1, 10000)", conn.get_server_pid())
            ended.add(row[0])
            writing.settler.put(Finished(second, "done"))

    async def ending(self: Any, conn: Any, batch: list[Outcome], seconds: float) -> Any:
        try:
            kept = await write(self, conn, batch, seconds)
        except asyncpg.LockNotAvailableError:
            refused.add(1)
            if len(refused.items) == 2 and moment == "the second refusal":
                await end(conn)
            raise
        if moment == "the write":
            await end(conn)
        return kept

    monkeypatch.setattr(OutcomeWriter, "write", ending)
    await p("BEGIN")
    await p("LOCK TABLE notifyq.finished")
    writing = Writing(dsn, [Finished(first, "done")])
    async with writing:
        await refused.reach(2)
        await until_blocked(s.db, "settle", p)
        await p("COMMIT")
    assert ended.items == [True]
    assert len(writing.told.failures) == 1, "one connection was lost"
    assert await states(s.db) == {first.id: ("done", 1), second.id: ("done", 1)}
