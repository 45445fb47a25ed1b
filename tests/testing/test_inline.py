"""run_inline: what it says of a task is what a worker would have done."""

from __future__ import annotations

import threading
from collections.abc import AsyncIterator
from datetime import UTC, datetime, timedelta

import anyio
import pytest

import notifyq
from notifyq.database import connection
from notifyq.errors import ConfigError
from notifyq.testing import (
    Drained,
    Ran,
    drain,
    run_inline,
)

from ..helpers.kit import NOW, Act, Mail, Receipt, Slow, Thread, Unhandled, app, contexts


@pytest.fixture
async def connected(dsn: str) -> AsyncIterator[notifyq.App]:
    async with app.connect(dsn):
        yield app


OUTCOMES = {
    "raise": ("retry", "KeyError: 'no such thing'"),
    "retry": ("retry", "busy"),
    "dead": ("dead", "refused"),
    "cancel": ("cancelled", "not needed"),
    "exit": ("retry", "SystemExit: 3"),
    "unwritable": (
        "dead",
        "its result, a object, can't be written as JSON: TypeError: Encoding objects of type object",
    ),
}


@pytest.mark.parametrize("how", OUTCOMES)
async def test_inline_is_what_a_worker_does(how: str, connected: notifyq.App, dsn: str) -> None:
    """The same outcome and the same words as in the row, from the same handler."""
    state, reason = OUTCOMES[how]
    ran = await run_inline(app, Act(how=how))
    assert (ran.state, ran.result) == (state, None)
    assert ran.reason is not None
    assert ran.reason.startswith(reason)
    await app.enqueue(Act(how=how))
    assert await drain(app) == Drained(**{state: 1})
    db = await connection.connect(dsn)
    assert await db.fetchval("SELECT error FROM notifyq.all_tasks") == ran.reason
    await db.close()
    last = await run_inline(app, Act(how=how), attempt=3)
    assert last.state == ("dead" if state == "retry" else state)


async def test_inline_delays() -> None:
    """A retry says how long it waits: as asked for, or by the type's backoff."""
    assert (await run_inline(app, Act(how="retry"))).delay == 30
    delays = [(await run_inline(app, Act(how="raise"))).delay for _ in range(20)]
    assert all(delay is not None and 0 <= delay <= 100 for delay in delays)
    assert len(set(delays)) > 1
    assert (await run_inline(app, Act(how="dead"))).delay is None


async def test_inline_results_are_typed() -> None:
    ran = await run_inline(app, Thread())
    assert ran.state == "done"
    assert isinstance(ran.result, Receipt)
    assert ran.result.at == NOW
    assert ran.result.number != threading.get_ident()
    assert await run_inline(app, Mail(to="x")) == Ran(state="done")


async def test_inline_context() -> None:
    contexts.clear()
    await run_inline(app, Act(), attempt=2, queue="mail", priority=5, id=77, created_at=NOW)
    await run_inline(app, Act(), max_attempts=9)
    asked, default = contexts
    expected = notifyq.Context(id=77, queue="mail", attempt=2, max_attempts=3, priority=5, created_at=NOW)
    assert asked == expected
    assert (default.id, default.queue, default.attempt, default.max_attempts) == (1, "default", 1, 9)
    assert abs(datetime.now(UTC) - default.created_at) < timedelta(minutes=1)


async def test_inline_timeout() -> None:
    ran = await run_inline(app, Slow())
    assert (ran.state, ran.reason) == ("retry", "timed out after 0.01 s")


async def test_inline_raises_when_asked() -> None:
    """What the handler raised, itself; but not what merely says how it ends."""
    with pytest.raises(KeyError, match="no such thing"):
        await run_inline(app, Act(how="raise"), raises=True)
    with pytest.raises(SystemExit):
        await run_inline(app, Act(how="exit"), raises=True)
    for how, (state, _) in OUTCOMES.items():
        if how not in ("raise", "exit"):
            assert (await run_inline(app, Act(how=how), raises=True)).state == state


async def test_inline_takes_what_enqueue_takes() -> None:
    with pytest.raises(ConfigError, match=r"task MAIL doesn't validate .*: Expected `str`, got `int` - at `\$\.to`"):
        await run_inline(app, Mail(to=5))  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="no handler takes type 'Unhandled'"):
        await run_inline(app, Unhandled())
    with pytest.raises(ConfigError, match="expected an instance"):
        await run_inline(app, Mail)  # type: ignore[call-overload]

    class Impostor(notifyq.Task, tag="MAIL"):
        pass

    with pytest.raises(ConfigError, match=r"type 'MAIL' is Mail in this app"):
        await run_inline(app, Impostor())


async def test_inline_can_be_cancelled() -> None:
    with anyio.move_on_after(0.05) as scope:
        await run_inline(endless, Act())
    assert scope.cancelled_caught


endless = notifyq.App()


@endless.handler
async def never(task: Act) -> None:
    await anyio.sleep_forever()
