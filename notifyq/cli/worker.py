"""`notifyq worker`: load the app, run it until a signal, and print what it serves when it is ready."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable

import anyio
import click

from notifyq import App, WorkerInfo, log
from notifyq.config import WorkerConfig, check_queue, parse_queues
from notifyq.errors import NotifyqError
from notifyq.worker.signals import Watch
from notifyq.worker.worker import work

from . import logs, supervisor
from .load import load_app
from .options import dsn_option, duration, number, setting, word
from .output import our_version, say

logger = log.logger("notifyq.cli")


@click.command()
@click.argument("app", metavar="MODULE:APP", envvar="NOTIFYQ_APP")
@setting(
    "-q",
    "--queue",
    "queues",
    metavar="NAME[:LIMIT]",
    multiple=True,
    default=["default"],
    help="a queue to work on, and how many of its tasks may run at the same time; repeatable",
)
@setting(
    "-c",
    "--concurrency",
    metavar="N",
    type=number(1, 10_000),
    default=100,
    help="how many handlers run at the same time",
)
@setting(
    "--threads",
    metavar="N",
    type=number(1, 10_000),
    help="how many of these may be plain `def` handlers, which run in threads  [default: CPUs + 4, at most 32]",
)
@setting(
    "--processes",
    metavar="N",
    type=number(1, 1000),
    default=1,
    help="how many worker processes, each with all of the above",
)
@setting("--drain", is_flag=True, help="exit when no task is left that could run now")
@setting(
    "--shutdown-timeout",
    type=duration,
    metavar="TIME",
    default="25s",
    help="how long running handlers may take to finish",
)
@setting(
    "--poll-interval",
    type=duration,
    metavar="TIME",
    default="5s",
    help="how often to look for tasks without a notification; 0: never",
)
@setting(
    "--lease",
    type=duration,
    metavar="TIME",
    default="30s",
    help="after how long without a heartbeat this worker counts as dead; 6s or more",
)
@setting(
    "--history",
    type=duration,
    metavar="TIME",
    default="1d",
    help="how long done and cancelled tasks are kept; 0: not at all",
)
@setting(
    "--log-level",
    type=word(*logs.LEVELS),
    metavar="LEVEL",
    default="info",
    help=f"the lowest level that is logged: {', '.join(logs.LEVELS)}",
)
@setting(
    "--log-format",
    type=word("text", "json"),
    metavar="FORMAT",
    default="text",
    help="text, or json: an object per line",
)
@dsn_option
@click.pass_context
def worker(
    ctx: click.Context,
    *,
    app: str,
    queues: tuple[str, ...],
    concurrency: int,
    threads: int | None,
    processes: int,
    drain: bool,
    shutdown_timeout: float,
    poll_interval: float,
    lease: float,
    history: float,
    log_level: str,
    log_format: str,
    dsn: str | None,
) -> int:
    """Run a worker for an app, such as myproject.tasks:app.

    MODULE:APP may come from NOTIFYQ_APP too.

    At the first SIGTERM or SIGINT (Ctrl-C) the worker claims nothing more, waits up to --shutdown-timeout for
    running handlers, hands the rest of its tasks back, and exits with 0. At the second it hands them back at
    once, and exits with 1.

    Times are seconds, or 90s, 15m, 12h, 1d.
    """
    parsed = parse_queues(queues)
    for name in parsed:
        check_queue("queue", name)
    config = WorkerConfig(
        queues=parsed,
        concurrency=concurrency,
        threads=threads,
        shutdown_timeout_seconds=shutdown_timeout,
        poll_interval_seconds=poll_interval,
        lease_seconds=lease,
        history_seconds=history,
        drain=drain,
    )
    parent = supervisor.parent_socket()
    logs.set_up(log_level, log_format, pid=parent is not None or processes > 1)
    if processes > 1 and parent is None:
        return asyncio.run(supervisor.supervise(ctx.obj, processes, shutdown_timeout, drain))
    return _run(load_app(app), config, dsn, parent, log_format)


def _run(app: App, config: WorkerConfig, dsn: str | None, parent: socket.socket | None, log_format: str) -> int:
    watch: Watch | None = None

    async def main() -> bool:
        nonlocal watch
        stop, force = anyio.Event(), anyio.Event()
        watch = Watch(stop, force, config.shutdown_timeout_seconds, parent)
        try:
            async with app.connect(dsn):  # so that handlers can enqueue
                started = Started(config, parent, log_format)
                return await work(app.registry, config, dsn, stop, force, started)
        finally:
            watch.loop_ends()

    code = 1
    with asyncio.Runner(loop_factory=_loop_factory()) as runner:
        try:
            if runner.run(main()):
                code = 0
            elif parent is not None:
                code = supervisor.UNWRITTEN
        except NotifyqError as error:
            say(str(error))
            code = error.exit_code
        finally:
            if watch:
                code = 1 if watch.forced else code
                watch.finish(code)
    return code


def _loop_factory() -> Callable[[], asyncio.AbstractEventLoop]:
    try:
        import uvloop
    except ImportError:
        return asyncio.new_event_loop
    return uvloop.new_event_loop


class Started:
    """A TaskStatus: when the worker is ready, it tells the user and the parent process."""

    def __init__(self, config: WorkerConfig, parent: socket.socket | None, log_format: str) -> None:
        self._config = config
        self._parent = parent
        self._log_format = log_format

    def started(self, value: WorkerInfo | None = None) -> None:
        assert value is not None
        if self._parent is not None:
            supervisor.tell_ready(self._parent)
        queues = [name if limit is None else f"{name} ({limit} at once)" for name, limit in value.queues.items()]
        bell = "polling only" if value.bell_ms is None else f"{value.bell_ms:.1f} ms"
        if self._parent is not None or self._log_format == "json":
            fields = {
                "id": value.id,
                "postgresql": value.server_version,
                "schema": value.schema_version,
                "queues": queues,
                "concurrency": value.concurrency,
                "threads": value.threads,
                "types": value.types,
                "bell": bell,
            }
            logger.info("worker started", extra={"fields": fields})
            return
        poll = self._config.poll_interval_seconds
        if value.bell_ms is None:
            bell = f"silent, polling every {poll:g} s (a pooler in transaction mode?)" if poll else "silent, no polling"
        else:
            bell = f"proven, {bell} there and back"
        where = f"PostgreSQL {value.server_version}, schema {value.schema_version}"
        lines = (
            f"notifyq {our_version()}: worker {value.id} ({value.name}) on {where}",
            f"  queues   {', '.join(queues)}; {value.concurrency} tasks at once, {value.threads} in threads",
            f"  types    {', '.join(value.types)}",
            f"  bell     {bell}",
            "  stop it  Ctrl-C or SIGTERM: once to let handlers end, twice to stop now",
        )
        click.echo("\n".join(lines), err=True)
