"""Where the demo runs: in a database of its own, on an embedded PostgreSQL or on yours."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Generator
from contextlib import ExitStack, contextmanager

import anyio

from notifyq.database.dsn import VARIABLES, read
from notifyq.embedded import Server
from notifyq.testing import Databases

from .screen import Screen
from .smtp import MailServer
from .story import Story
from .traffic import Plan


async def run(plan: Plan, dsn: str | None) -> int:
    """Run the demo to its end, or until a signal. Returns the exit code."""
    failed, story_scope = 1, anyio.CancelScope()
    with ExitStack() as stack:
        screen = Screen()
        stack.enter_context(screen.live)
        source = "yours"
        if dsn is None:
            server = stack.enter_context(Server())
            dsn, source = server.dsn(), server.binaries.source
        async with anyio.create_task_group() as group:
            group.start_soon(cancel_at_signal, story_scope)
            async with Databases(dsn) as databases, databases.new() as url, MailServer().serve() as mail:
                # A signal cancels the story only, so that the databases are dropped.
                with story_scope, exported(url, mail.port):
                    failed = await Story(mail, screen).tell(plan, source)
            group.cancel_scope.cancel()
    if story_scope.cancelled_caught:
        print("interrupted; all processes are stopped", file=sys.stderr)
    return 1 if failed else 0


async def cancel_at_signal(scope: anyio.CancelScope) -> None:
    hangup = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN  # nohup ignores it
    with anyio.open_signal_receiver(signal.SIGINT, signal.SIGTERM, *[signal.SIGHUP] * hangup) as signals:
        async for _ in signals:
            scope.cancel()


@contextmanager
def exported(url: str, mail_port: int) -> Generator[None, None]:
    """Inside, variables tell this process and its children where the database is, and the mail server.

    They are PG* variables, which notifyq, asyncpg and psql all read. Arguments could be seen by other users of the
    machine.
    """
    before = dict(os.environ)
    for name in before:
        if name.startswith(("NOTIFYQ_", "PG")) or name == "DATABASE_URL":  # not meant for the demo's programs
            del os.environ[name]
    os.environ.update({VARIABLES[name]: value for name, value in read(url, before).items() if name in VARIABLES})
    os.environ["DEMO_SMTP_PORT"] = str(mail_port)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
