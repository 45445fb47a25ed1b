"""The App: where handlers are registered, tasks are enqueued from, and a worker is run."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Generator, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, contextmanager, nullcontext
from contextvars import ContextVar
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack, overload

import anyio
import asyncpg
import msgspec
from anyio.abc import TaskStatus

from . import lifespan, log, loops
from .client import drivers, enqueue
from .client.cancel import cancel
from .client.enqueue import Via
from .client.options import EnqueueOptions, Options, options_for
from .client.pool import AppPool
from .client.ref import Ids, Ref, ref
from .client.results import Results
from .config import WorkerConfig, check_name, in_seconds, is_number, parse_queues, resolve_dsn
from .cron import Cron, Missed, check_schedule
from .database.connection import explained
from .errors import ConfigError
from .options import is_id
from .registry import Handler, HandlerOptions, Registry
from .task import Middleware, Task
from .worker.signals import watched
from .worker.worker import WorkerInfo, work

if TYPE_CHECKING:
    Pool = asyncpg.Pool[asyncpg.Record]

_Handler = TypeVar("_Handler", bound=Callable[..., Any])
_Middleware = TypeVar("_Middleware", bound=Middleware)
_Lifespan = TypeVar("_Lifespan", bound=Callable[..., AbstractAsyncContextManager[Any] | AsyncIterator[Any]])

_loading: ContextVar[bool] = ContextVar("notifyq_loading", default=False)


@contextmanager
def loading() -> Generator[None, None, None]:
    """Around the import of a user's modules by the command line. A program that begins there, where it lacks its
    `if __name__ == "__main__":`, would run in place of the command: what it does first is refused."""
    token = _loading.set(True)
    try:
        yield
    finally:
        _loading.reset(token)


def _check_not_loading(what: str) -> None:
    if _loading.get():
        raise ConfigError(
            f"{what} is called while this module is imported, and would run in place of the command; put what calls "
            'it under `if __name__ == "__main__":`'
        )


# What works where nothing can be awaited, for messages.
_ENQUEUE_ELSEWHERE = (
    "write `await` in an async function; in a plain `def` handler, anyio.from_thread.run(app.{0}, ...); in any other "
    "code without async, notifyq.SyncClient(app).{0}(...)"
)
_CANCEL_ELSEWHERE = (
    "write `await` in an async function; in a plain `def` handler, anyio.from_thread.run(app.cancel, id); in any other "
    "code without async, SELECT notifyq.cancel(id)"
)
_RESULT_ELSEWHERE = (
    "write `await` in an async function; in a plain `def` handler, anyio.from_thread.run(ref.result); in any other "
    "code without async, look into notifyq.all_tasks"
)


def _check_enqueue(name: str) -> Callable[..., None]:
    """What `App.enqueue` and `App.enqueue_many` check when they are called."""

    def check(app: App, *_: object, conn: drivers.AsyncConnection | None = None, **__: object) -> None:
        what, cure = f"app.{name}()", _ENQUEUE_ELSEWHERE.format(name)
        if conn is None:
            app.check_loop(what, cure)
        else:
            drivers.awaited(conn)  # it says so of one that blocks
            loops.same(getattr(conn, "_loop", None) or loops.running(what, cure), what, "`conn`", cure)  # asyncpg's

    return check


def _check_cancel(app: App, *_: object, **__: object) -> None:
    app.check_cancel()


class App:
    """Holds the handlers by type and, inside `async with app.connect():`, a pool of connections."""

    def __init__(self) -> None:
        self.registry = Registry()
        self._pool: AppPool | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # the one that connect() ran on
        self._dsn: str | None = None
        self._results: Results | None = None

    @overload
    def handler(self, function: _Handler, /) -> _Handler: ...
    @overload
    def handler(
        self, /, *, batch: int | None = None, linger: float | timedelta | None = None, middleware: bool = True
    ) -> Callable[[_Handler], _Handler]: ...
    def handler(
        self,
        function: Any = ...,
        /,
        *,
        batch: int | None = None,
        linger: float | timedelta | None = None,
        middleware: bool = True,
    ) -> Any:
        """Register a handler, an `async def` or, to run in a thread, a plain `def`; use it as a decorator.

        The type of its first parameter, a subclass of Task, says what it handles; the others are given the Context
        or what the lifespan yields, by their types. What it returns is the task's result. Raises ConfigError for
        anything that can't work.

        batch       run it with up to so many tasks at once: `(tasks: list[SendMail], ctxs: list[Context])`. It returns
                    None, or a list that says of each task what a handler of one would have returned, or raised
        linger      seconds, or a timedelta, to wait after the first of a batch for more; None: 0.05
        middleware  False: not around this one; a batch handler can't have any
        """
        caller = inspect.currentframe()
        caller = caller.f_back if caller is not None else None
        options = HandlerOptions.checked(batch, linger, middleware)

        def register(function: _Handler) -> _Handler:
            self.registry.add(function, caller.f_locals if caller is not None else {}, options)
            return function

        return register if function is ... else register(function)

    def cron(
        self,
        expression: str,
        *,
        tz: str = "UTC",
        task: Task | None = None,
        name: str | None = None,
        queue: str | None = None,
        priority: int | None = None,
        missed: Missed = "once",
    ) -> Callable[[_Handler], _Handler]:
        """Enqueue a task by the clock; use it as a decorator, above @app.handler.

        expression  "0 3 * * *": minute, hour, day, month, weekday, by cronsim; a sixth field in front is the second
        tz          in whose time that is meant
        task        what to enqueue; None: the handler's task, if it can be made without arguments
        queue, priority  None: what its class says, as order_key and limits are; whether it is unique isn't asked
        name        of the schedule, by which it is paused and listed; None: the task's type
        missed      of slots that came while no worker ran: "once", one run for all of them, or "skip"

        Each slot has one task, however many workers there are. Raises ConfigError for what can't work.
        """
        if callable(expression):
            raise ConfigError("@app.cron needs its expression: @app.cron('0 3 * * *')")

        def schedule(function: _Handler) -> _Handler:
            handler = self.registry.of(function)
            if handler is None:
                raise ConfigError(
                    f"@app.cron got {function!r}, which is no handler of this app; put it above @app.handler"
                )
            called = handler.type if name is None else name
            self._schedule(handler, Cron(called, expression, tz, missed=missed), queue, priority, task)
            return function

        return schedule

    def _schedule(
        self, handler: Handler, cron: Cron, queue: str | None, priority: int | None, task: Task | None
    ) -> None:
        try:
            task = task or handler.task()
        except TypeError as error:
            raise ConfigError(
                f"@app.cron of {handler.name}: {handler.task.__name__} can't be made without arguments ({error}); "
                f"say which: task={handler.task.__name__}(...)"
            ) from None
        if type(task) is not handler.task:
            raise ConfigError(f"@app.cron of {handler.name}: task is {task!r:.100}, expected a {handler.task.__name__}")
        check_name("name", cron.name)
        check_schedule(cron.expression, cron.tz)
        options = options_for(queue, priority).for_task(task)
        if cron.missed not in ("once", "skip"):
            raise ConfigError(f"missed is {cron.missed!r}; expected 'once' or 'skip'")
        if cron.name in self.registry.crons:
            raise ConfigError(f"two crons are named {cron.name!r}; give one another name: @app.cron(..., name=...)")
        tag, payload = enqueue.validated_task(self.registry, task)
        self.registry.crons[cron.name] = cron._replace(
            type=tag,
            payload=payload,
            queue=options.columns.queue,
            priority=options.columns.priority,
            options=options.text(),
        )

    def middleware(self, function: _Middleware) -> _Middleware:
        """Put `async def f(task, ctx, call)` around each handler; use it as a decorator. The first is the outermost.

        `await call(task, ctx)` goes on, in the end to the handler, and returns what that returns. What the middleware
        returns is the task's result; what it raises counts as the handler's. The task's timeout is for all of it.
        """
        self.registry.surround(function)
        return function

    def lifespan(self, function: _Lifespan) -> _Lifespan:
        """An `async def` with one `yield`: a worker runs what comes before it first and what comes after it last. Use
        it as a decorator, over @asynccontextmanager or without.

        It is called without arguments, or with the app. What it yields is one thing, or a tuple of several, each given
        to the handlers' parameters of its type: of that very class, or else of a class above it that no other has.
        """
        if self.registry.lifespan is not None:
            raise ConfigError("this app has a lifespan; it has one, which can enter and yield several things")
        self.registry.lifespan = lifespan.checked(function, self)
        return function

    @asynccontextmanager
    async def connect(self, dsn: str | None = None, *, timeout: float | timedelta = 30.0) -> AsyncGenerator[Self, None]:
        """A pool of up to 10 connections to enqueue with, to `dsn` or where the environment says.

        timeout  seconds, or a timedelta, that a call waits for a connection, or for the server's answer; after them it
                 raises DatabaseError

        It belongs to the event loop that this runs on: code on another one, or on none, has a SyncClient. Raises
        ConfigError for a DSN that can't be one, DatabaseError for a server that can't be reached.
        """
        _check_not_loading("app.connect()")
        loop = loops.running("app.connect()", "write `async with app.connect():` in a function that asyncio.run() runs")
        if self._pool is not None:
            raise ConfigError("this app is connected already; one `async with app.connect():` serves all tasks")
        timeout = in_seconds(timeout)
        if not (is_number(timeout) and 0 < timeout <= 3600):  # a NaN fails this too
            raise ConfigError(f"timeout is {timeout!r}; expected seconds above 0, up to an hour")
        url, source = resolve_dsn(dsn)
        with explained(url, source):
            pool = await AppPool.open(url, timeout)
        log.enable()
        results = Results(dsn, self.registry)
        try:
            self._pool, self._loop, self._dsn, self._results = pool, loop, dsn, results
            yield self
        finally:
            self._pool = self._loop = self._dsn = self._results = None
            with anyio.move_on_after(5, shield=True):
                await results.close()
                await pool.close()
            pool.terminate()

    @loops.checked_at_call(_check_enqueue("enqueue"))
    async def enqueue(
        self,
        task: Task,
        *,
        conn: drivers.AsyncConnection | None = None,
        **options: Unpack[EnqueueOptions],
    ) -> Ref:
        """Enqueue a task and return its Ref; on return it is committed, unless `conn` has an open transaction.

        conn     a connection to do it on, in your transaction: rolled back, it never existed. asyncpg's, psycopg's
                 AsyncConnection, SQLAlchemy's AsyncSession or AsyncConnection; for others: SyncClient
        options  queue, delay, run_at, priority, ...: EnqueueOptions says what each is

        Raises ConfigError for a task that doesn't validate against its own type, or an option that can't be.
        """
        checked = Options.check(**options)
        return ref(self, *await enqueue.one(self._via(conn), self.registry, task, checked))

    @overload
    async def enqueue_many(
        self,
        tasks: Iterable[Task],
        *,
        then: None = None,
        conn: drivers.AsyncConnection | None = None,
        **options: Unpack[EnqueueOptions],
    ) -> Ids: ...
    @overload
    async def enqueue_many(
        self,
        tasks: Iterable[Task],
        *,
        then: Task,
        conn: drivers.AsyncConnection | None = None,
        **options: Unpack[EnqueueOptions],
    ) -> tuple[list[int], Ref]: ...
    @loops.checked_at_call(_check_enqueue("enqueue_many"))
    async def enqueue_many(
        self,
        tasks: Iterable[Task],
        *,
        then: Task | None = None,
        conn: drivers.AsyncConnection | None = None,
        **options: Unpack[EnqueueOptions],
    ) -> Ids | tuple[list[int], Ref]:
        """Enqueue all or none, of any types, with the same options, 2000 in a statement. Returns the ids in order:
        a list, whose `existed` are those of unique tasks that were found there.

        then  a task to run when all of them are done, in the same queue, with the same priority and max_attempts;
              on_dead says what becomes of it if one isn't. Up to 10,000 tasks, and it returns their ids, and its Ref.
        """
        checked = Options.check(**options, has_follower=then is not None)
        if then is None:
            return await enqueue.many(self._via(conn), self.registry, tasks, checked)
        ids, last = await enqueue.group(self._via(conn), self.registry, tasks, then, checked)
        return ids, ref(self, *last)

    def ref(self, id: int, created_at: datetime | None = None) -> Ref:
        """Of any task, by its id, in whatever process it was enqueued: to wait for its result, say.

        created_at  as the Ref that enqueue returned has it; what this one is asked for is refused if the task with this
                    id is another one by then
        """
        if not is_id(id):
            raise ConfigError(f"ref({id!r}): expected a task's id, as enqueue_many returns them")
        if created_at is not None and (not isinstance(created_at, datetime) or created_at.tzinfo is None):
            raise ConfigError(f"ref({id}, {created_at!r}): expected a datetime with a timezone, a Ref's created_at")
        made = ref(self, id)
        if created_at is not None:
            msgspec.structs.force_setattr(made, "created_at", created_at)
        return made

    @loops.checked_at_call(_check_cancel)
    async def cancel(self, id: int) -> bool:
        """Cancel a task that hasn't ended; return whether it did that. The handler of a running one is cancelled: at
        once if it has run for a second or so, and else within 1.5 s."""
        return await self._cancel(self.ref(id))

    async def _cancel(self, ref: Ref) -> bool:
        return await cancel(self._connected("cancel"), ref)

    @property
    def results(self) -> Results:
        """Who waits for results here; Ref's methods do."""
        if self._results is None:
            raise ConfigError("not connected: wait for results inside `async with app.connect():`")
        self.check_loop("waiting for a task", _RESULT_ELSEWHERE)
        return self._results

    async def run_worker(
        self,
        queues: Iterable[str] | Mapping[str, int | None] = ("default",),
        concurrency: int = 100,
        *,
        threads: int | None = None,
        dsn: str | None = None,
        shutdown_timeout: float = 25.0,
        poll_interval: float = 5.0,
        lease: float = 30.0,
        history: float = 86400.0,
        drain: bool = False,
        signals: bool = False,
        stop: anyio.Event | None = None,
        force: anyio.Event | None = None,
        task_status: TaskStatus[WorkerInfo] = anyio.TASK_STATUS_IGNORED,
    ) -> None:
        """Run a worker here until `stop` is set, a signal says so (signals=True), or it is cancelled.

        queues            names, or "name:limit" for at most so many of it at once, or {name: limit}
        concurrency       handlers that run at the same time
        threads           of these, plain ones, which run in threads; None: 4 more than there are CPUs, at most 32
        dsn               None: that of `connect`, else the environment's
        shutdown_timeout  seconds handlers may go on after `stop`, before they are cancelled and handed back
        poll_interval     seconds between looks that don't need the bell; 0: never
        lease             seconds without a heartbeat after which others take the worker for dead
        history           seconds that done and cancelled tasks are kept; 0: not at all
        drain             return when nothing is runnable
        signals           True: take SIGTERM and SIGINT, as `notifyq worker` does. The first sets `stop`, the second
                          `force`; if handlers block the event loop beyond all time limits, the process ends. For a
                          program of its own. Inside of a server, which has signals of its own, set `stop` instead.
        stop, force       set `stop` to drain and return, `force` to hand back and return at once

        With `await task_group.start(app.run_worker)` it returns a WorkerInfo when it works. Cancelled, it hands its
        tasks back at once. Raises ConfigError, DatabaseError or SchemaError if it can't start, and NotifyqError if
        the lifespan fails.
        """
        _check_not_loading("app.run_worker()")
        loops.running("app.run_worker()", "a worker runs on asyncio: asyncio.run(app.run_worker())")
        if not self.registry.types:
            raise ConfigError("this app has no handlers, so there is nothing to run; decorate one with @app.handler")
        config = WorkerConfig(
            queues=parse_queues(queues),
            concurrency=concurrency,
            threads=threads,
            shutdown_timeout_seconds=shutdown_timeout,
            poll_interval_seconds=poll_interval,
            lease_seconds=lease,
            history_seconds=history,
            drain=drain,
        )
        stop, force = stop or anyio.Event(), force or anyio.Event()
        with watched(stop, force, shutdown_timeout) if signals else nullcontext():
            await work(self.registry, config, dsn or self._dsn, stop, force, task_status)

    def check_loop(self, what: str, cure: str) -> None:
        """Raise ConfigError if `what`, which uses this app's connections, is called on another event loop than theirs.

        cure  what to write instead
        """
        loops.same(self._loop or loops.running(what, cure), what, "`async with app.connect():`", cure)

    def check_cancel(self) -> None:
        """Raise ConfigError if `cancel` can't be awaited here."""
        self.check_loop("app.cancel()", _CANCEL_ELSEWHERE)

    def _via(self, conn: drivers.AsyncConnection | None) -> Via:
        if conn is not None:
            return drivers.awaited(conn)
        return self._connected("enqueue", ", or pass conn=")

    def _connected(self, what: str, or_else: str = "") -> AppPool:
        if self._pool is None:
            raise ConfigError(f"not connected: {what} inside `async with app.connect():`{or_else}")
        return self._pool
