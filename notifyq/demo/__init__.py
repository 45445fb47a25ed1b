"""`notifyq demo`: notifyq at work on real input, and a summary that checks itself. Read app and web first.

app        the tasks and their handlers, as a user writes them; two `notifyq worker` processes run them
web        the HTTP application that enqueues; uvicorn runs it in a process of its own
smtp       the mail server that the handlers talk to
traffic    all clients that enqueue
story      what happens, and when
check      what must hold at the end
stage      the database and the mail server, and the variables by which all processes find them
processes  the child processes
screen     what the user sees
"""

from __future__ import annotations

import importlib.util
import math

import anyio

from notifyq import ConfigError, NotifyqError
from notifyq.errors import first_error

__all__ = ["main"]

NEEDED = ("starlette", "uvicorn", "aiosmtplib", "aiosmtpd", "httpx", "rich")


def main(seconds: float = 20.0, tasks: int = 5000, dsn: str | None = None) -> int:
    """Run the demo. Returns 0 if all checks hold, 1 if one fails or the demo was interrupted.

    seconds  how long there is traffic
    tasks    about how many tasks in all
    dsn      a PostgreSQL of yours to run it on, in a database that the demo creates and drops

    Raises ConfigError for arguments out of range and for missing libraries, DatabaseError for a server that can't be
    reached or a role that may not create databases.
    """
    if not (math.isfinite(seconds) and 5 <= seconds <= 3600):
        raise ConfigError(f"the demo can't take {seconds:g} seconds; expected 5 to 3600")
    if not 200 <= tasks <= 1_000_000:
        raise ConfigError(f"the demo can't have {tasks} tasks; expected 200 to 1000000")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"the demo needs {', '.join(missing)}; run: pip install 'notifyq[demo]'")
    from .stage import run
    from .traffic import Plan

    try:
        return anyio.run(run, Plan(seconds, tasks), dsn)
    except BaseExceptionGroup as group:
        # Several things may fail at once: raise the one that says why.
        ours, others = group.split(NotifyqError)
        if ours is None:
            raise
        raise first_error(ours) from others
