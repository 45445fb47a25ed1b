"""Checks of App's and Ref's calls, made when a function is called and not when it is awaited.

A call that isn't awaited does nothing, and a connection that two event loops use breaks. loops.py explains why both are
checked at the call; the messages here say what to write instead.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final, Protocol

from .. import loops
from . import drivers

_ELSEWHERE: Final = (
    "write `await` in an async function; in a plain `def` handler, anyio.from_thread.run({blocking}); in any other "
    "code without async, {other}"
)
CANCEL_ELSEWHERE: Final = _ELSEWHERE.format(blocking="app.cancel, id", other="SELECT notifyq.cancel(id)")
RESULT_ELSEWHERE: Final = _ELSEWHERE.format(blocking="ref.result", other="look into notifyq.all_tasks")

NO_RESULTS: Final = (
    "not connected: wait for results inside `async with app.connect():`. A SyncClient can't wait for results; without "
    "async, read the task's state and result in notifyq.all_tasks"
)


class HasLoop(Protocol):
    """An App, as the checks see it."""

    def check_loop(self, what: str, cure: str) -> None: ...


def check_enqueue(name: str) -> Callable[..., None]:
    """The check of App.enqueue or App.enqueue_many, by its name: on the event loop of the app, or of `conn`."""
    cure = _ELSEWHERE.format(blocking=f"app.{name}, ...", other=f"notifyq.SyncClient(app).{name}(...)")
    what = f"app.{name}()"

    def check(app: HasLoop, *_: object, conn: drivers.AsyncConnection | None = None, **__: object) -> None:
        if conn is None:
            app.check_loop(what, cure)
        else:
            drivers.to_async(conn)  # raises for a connection that blocks
            # Only asyncpg's connections know their loop.
            loops.same(getattr(conn, "_loop", None) or loops.running(what, cure), what, "`conn`", cure)

    return check


def check_cancel(app: HasLoop, *_: object, **__: object) -> None:
    """The check of App.cancel and Ref.cancel."""
    app.check_loop("app.cancel()", CANCEL_ELSEWHERE)
