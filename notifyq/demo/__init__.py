"""`notifyq demo`: the main job on real input, and a summary that it checks itself. Read app and web first.

app        the tasks and their handlers, as a user writes them; run by two `notifyq worker` processes
web        the HTTP application that enqueues; run by uvicorn, in a process of its own
smtp       the mail server that they talk to
psql       the foreign client
producers  all who enqueue, and what they counted
tasks      what the database says of the tasks
database   where it all happens: an embedded PostgreSQL, or yours
processes  the children, none of which outlives us
screen     the live table, or lines
check      what must hold in the end
story      who does what, and when
"""

from __future__ import annotations

import importlib.util
import math
import signal
import sys
from typing import TYPE_CHECKING

import anyio

from notifyq.errors import ConfigError, NotifyqError, first_error

if TYPE_CHECKING:
    from .check import Facts
    from .screen import Screen

__all__ = ["main"]

NEEDED = ("starlette", "uvicorn", "aiosmtplib", "aiosmtpd", "httpx")


def main(seconds: float = 20.0, tasks: int = 5000, dsn: str | None = None) -> int:
    """Run the demo: 0 if all it claims holds, 1 if something doesn't, or if it was interrupted.

    seconds  how long there is traffic
    tasks    about how many in all
    dsn      a PostgreSQL of your own to run it on; the demo leaves nothing there but the schema notifyq

    Raises ConfigError for arguments that can't be and missing libraries, and what `notifyq migrate` raises.
    """
    if not (math.isfinite(seconds) and 5 <= seconds <= 3600):
        raise ConfigError(f"the demo can't take {seconds:g} seconds; expected 5 to 3600")
    if not 200 <= tasks <= 1_000_000:
        raise ConfigError(f"the demo can't have {tasks} tasks; expected 200 to 1000000")
    if missing := [name for name in NEEDED if importlib.util.find_spec(name) is None]:
        raise ConfigError(f"the demo needs {', '.join(missing)}; run: pip install 'notifyq[demo]'")
    try:
        return anyio.run(_run, seconds, tasks, dsn)
    except BaseExceptionGroup as group:
        # Of several things that failed at once, the one that says why.
        ours, others = group.split(NotifyqError)
        if ours is None:
            raise
        raise first_error(ours) from others


async def _run(seconds: float, tasks: int, dsn: str | None) -> int:
    async with anyio.create_task_group() as group:

        async def interrupt() -> None:
            hangup = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN  # it is under nohup
            with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, *[signal.SIGHUP] * hangup) as signals:
                async for _ in signals:
                    group.cancel_scope.cancel()

        group.start_soon(interrupt)
        code = await _demo(seconds, tasks, dsn)
        group.cancel_scope.cancel()
        return code
    print("interrupted; all processes are stopped", file=sys.stderr)
    return 1


async def _demo(seconds: float, tasks: int, dsn: str | None) -> int:
    from .database import database
    from .processes import Children
    from .screen import Screen
    from .smtp import MailServer
    from .story import Story

    with Screen() as screen:
        async with database(dsn, screen.event) as db, MailServer().serve() as mail:
            environment = {**db.environment, "DEMO_SMTP_PORT": str(mail.port)}
            async with Children(environment) as children:
                facts = await Story(db, children, mail, screen).tell(seconds, tasks)
    failed = _summary(facts, screen)
    for child in children.started if failed else []:
        screen.line(f"{child.name} said last:\n{child.said()}")
    return 1 if failed else 0


def _summary(facts: Facts, screen: Screen) -> int:
    """Print it. Returns how many checks failed."""
    from .check import by_type, findings

    screen.line("")
    screen.line(f"{'type':28}{'enqueued':>10}{'done':>10}{'dead':>8}{'run again':>12}", "bold")
    for type, enqueued, done, dead, again in by_type(facts):
        screen.line(f"{type:28}{enqueued:10,}{done:10,}{dead:8,}{again:12,}")
    screen.line("")
    found = findings(facts)
    for ok, text in found:
        screen.line(f"{'ok    ' if ok else 'FAILED'}  {text}", "green" if ok else "bold red")
    failed = sum(not ok for ok, _ in found)
    screen.line("")
    screen.line(f"{failed} of {len(found)} checks failed" if failed else f"all {len(found)} checks hold", "bold")
    if not failed:
        screen.line('what next: `notifyq dev` for a database to try things on, and README\'s "A first task"')
    return failed
