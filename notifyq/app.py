"""The App: it holds the handlers, enqueues tasks, and runs a worker."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager, asynccontextmanager, nullcontext
from datetime import datetime, timedelta
from typing import TYPE_CHECKING, Any, Self, TypeVar, Unpack, overload

import anyio
import asyncpg
from anyio.abc import TaskStatus

from . import lifespan, log, loops, settings
from .client import drivers, enqueue
from .client.calls import NO_RESULTS, RESULT_ELSEWHERE, check_cancel, check_enqueue
from .client.cancel import cancel
from .client.crons import register_cron
from .client.enqueue import Via
from .client.options import EnqueueOptions, Options
from .client.pool import AppPool
from .client.ref import Ids, Ref, ref, ref_by_id
from .client.results import Results
from .config import WorkerConfig, in_seconds, is_number, parse_queues, resolve_dsn
from .cron import Cron, Missed
from .database.errors import translate_connect_errors
from .errors import ConfigError
from .loading import check_not_loading
from .registry import HandlerOptions, Registry
from .task import Middleware, Task
from .worker.signals import watched
from .worker.worker import WorkerInfo, work

if TYPE_CHECKING:
    Pool = asyncpg.Pool[asyncpg.Record]

_Handler = TypeVar("_Handler", bound=Callable[..., Any])
_Middleware = TypeVar("_Middleware", bound=Middleware)
_Lifespan = TypeVar("_Lifespan", bound=Callable[..., AbstractAsyncContextManager[Any] | AsyncIterator[Any]])


class App:
    """Handlers by the type of their task and, inside `async with app.connect():`, a pool of connections."""

    def __init__(self) -> None:
        self.registry = Registry()
        self._pool: AppPool | None = None
        self._loop: asyncio.AbstractEventLoop | None = None  # the loop that connect() runs on
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
        **unknown: Any,
    ) -> Any:
        """Register a handler. Use it as a decorator of an `async def`, or of a plain `def`, which runs in a thread.

        The first parameter is the task; its type, a subclass of Task, says which tasks the handler takes. Other
        parameters are given the Context, or what the lifespan yields, by their types. The return value is the task's
        result. Raises ConfigError for a handler that can't work.

        batch       the handler takes at most this many tasks at once: `(tasks: list[SendMail], ctxs: list[Context])`.
                    It returns None, or a list with an item for each task: its result, or an error as if it were raised
        linger      seconds, or a timedelta, that a batch waits for more tasks after its first; None: 0.05
        middleware  False: this handler runs without middleware; a batch handler needs that if the app has any
        """
        caller = inspect.currentframe()
        caller = caller.f_back if caller is not None else None
        for name in unknown:
            raise settings.unknown_option("handler", name, ("batch", "linger", "middleware"))
        options = HandlerOptions.validated(batch, linger, middleware)

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
        """Enqueue a task by the clock. Use it as a decorator, above @app.handler.

        expression  "0 3 * * *": minute, hour, day, month, weekday, as cronsim reads them; a sixth field in front is the
                    second
        tz          the time zone of the expression
        task        the task to enqueue; None: the handler's task, made without arguments
        name        the name of the schedule, for `notifyq cron`; None: the task's type
        queue, priority  None: what the task's class says. Its order_key and limits are the class's; `unique` of the
                    class is ignored
        missed      what happens to slots that pass while no worker runs: "once", one task for all of them, or "skip"

        Each slot enqueues one task, however many workers run. Raises ConfigError for a schedule that can't be.
        """
        if callable(expression):
            raise ConfigError("@app.cron needs its expression: @app.cron('0 3 * * *')")

        def schedule(function: _Handler) -> _Handler:
            handler = self.registry.of(function)
            if handler is None:
                raise ConfigError(
                    f"@app.cron got {function!r}, which is no handler of this app; put it above @app.handler"
                )
            cron = Cron(handler.type if name is None else name, expression, tz, missed=missed)
            register_cron(self.registry, handler, cron, queue, priority, task)
            return function

        return schedule

    def middleware(self, function: _Middleware) -> _Middleware:
        """Run `async def f(task, ctx, call)` around each handler. Use it as a decorator. The first is the outermost.

        `await call(task, ctx)` runs the next middleware, or the handler, and returns its result. The return value of
        the middleware is the task's result, and an error that it raises counts as the handler's. The task's timeout
        covers the middleware too.
        """
        self.registry.surround(function)
        return function

    def lifespan(self, function: _Lifespan) -> _Lifespan:
        """Register an `async def` with one `yield`. Use it as a decorator, with @asynccontextmanager below it or not.

        A worker runs the part before the `yield` when it starts, and the part after it when it has stopped. The
        function takes no argument, or the app. It yields one object, or a tuple of several. A handler's parameter is
        given the object whose class is the parameter's type, or else the only one whose class is a subclass of it.
        """
        if self.registry.lifespan is not None:
            raise ConfigError("this app has a lifespan already; one lifespan can enter and yield several things")
        self.registry.lifespan = lifespan.validated_lifespan(function, self)
        return function

    @asynccontextmanager
    async def connect(self, dsn: str | None = None, *, timeout: float | timedelta = 30.0) -> AsyncGenerator[Self, None]:
        """Open a pool of up to 10 connections to enqueue with. `dsn` None: the environment names the database.

        timeout  seconds, or a timedelta, up to an hour. A call that waits longer for a connection, or for the server's
                 answer, raises DatabaseError

        The pool belongs to the event loop that this runs on. Code on another event loop, or on none, uses SyncClient.
        Raises ConfigError for a wrong DSN or timeout, DatabaseError if the server can't be reached.
        """
        check_not_loading("app.connect()")
        loop = loops.running("app.connect()", "write `async with app.connect():` in a function that asyncio.run() runs")
        if self._pool is not None:
            raise ConfigError("this app is connected already; one `async with app.connect():` serves all tasks")
        timeout = in_seconds(timeout)
        if not (is_number(timeout) and 0 < timeout <= 3600):  # a NaN fails this too
            raise ConfigError(f"timeout is {timeout!r}; expected seconds above 0, up to an hour")
        url, source = resolve_dsn(dsn)
        with translate_connect_errors(url, source):
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

    @loops.checked_at_call(check_enqueue("enqueue"))
    async def enqueue(
        self,
        task: Task,
        *,
        conn: drivers.AsyncConnection | None = None,
        **options: Unpack[EnqueueOptions],
    ) -> Ref:
        """Enqueue a task and return its Ref. The task is committed then, unless `conn` has an open transaction.

        conn     a connection of yours: the task is inserted in its transaction, and is gone if that is rolled back.
                 One of asyncpg, psycopg's AsyncConnection, or SQLAlchemy's AsyncSession or AsyncConnection. SyncClient
                 takes connections that aren't async
        options  queue, delay, run_at, priority, ...: see EnqueueOptions

        Raises ConfigError for a task that doesn't validate against its own type or an option with a wrong value,
        DatabaseError or SchemaError if the database refuses it.
        """
        checked = Options.check(**options)
        return ref(self, *await enqueue.insert_one(self._connection(conn), self.registry, task, checked))

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
    @loops.checked_at_call(check_enqueue("enqueue_many"))
    async def enqueue_many(
        self,
        tasks: Iterable[Task],
        *,
        then: Task | None = None,
        conn: drivers.AsyncConnection | None = None,
        **options: Unpack[EnqueueOptions],
    ) -> Ids | tuple[list[int], Ref]:
        """Enqueue all of the tasks or none, of any types, with the same options, 2000 in a statement.

        Returns their ids in order: a list, whose attribute `existed` has the ids of unique tasks that existed before.
        It raises what `enqueue` raises.

        then  a task that runs when all of them are done, in the same queue, with the same priority and max_attempts.
              on_dead says what happens to it if one of them ends dead or cancelled. With `then`, at most 10,000 tasks
              are taken, and the return value is a tuple: the list of their ids, and the Ref of `then`
        """
        checked = Options.check(**options, has_follower=then is not None)
        if then is None:
            return await enqueue.insert_many(self._connection(conn), self.registry, tasks, checked)
        ids, last = await enqueue.insert_group(self._connection(conn), self.registry, tasks, then, checked)
        return ids, ref(self, *last)

    def ref(self, id: int, created_at: datetime | None = None) -> Ref:
        """Return the Ref of a task by its id, whichever process enqueued the task.

        created_at  the created_at of the Ref that enqueue returned, an aware datetime. The new Ref's methods raise
                    NotifyqError if the task with this id is another one by then

        Raises ConfigError for an id or a time that can't be.
        """
        return ref_by_id(self, id, created_at)

    @loops.checked_at_call(check_cancel)
    async def cancel(self, id: int) -> bool:
        """Cancel a task that hasn't ended, and return whether this call did.

        The handler of a running task is cancelled: at once if it has run for a second or so, else within 1.5 s. Raises
        ConfigError for a wrong id, DatabaseError without the right to cancel.
        """
        return await self._cancel(self.ref(id))

    async def _cancel(self, ref: Ref) -> bool:
        return await cancel(self._connected("cancel"), ref)

    @property
    def results(self) -> Results:
        """What Ref's methods wait for results by. Raises ConfigError outside of `async with app.connect():`."""
        if self._results is None:
            raise ConfigError(NO_RESULTS)
        self.check_loop("waiting for a task", RESULT_ELSEWHERE)
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
        """Run a worker until `stop` is set, a signal arrives (signals=True), or this call is cancelled.

        queues            names; "name:limit", or a mapping {name: limit}, for at most `limit` of its tasks at once
        concurrency       how many handlers run at the same time
        threads           how many of these may be plain `def` handlers, which run in threads; None: 4 more than the
                          process may use CPUs, at most 32
        dsn               None: the DSN of `connect`, else the environment names the database
        shutdown_timeout  seconds that running handlers may take after `stop`; then they are cancelled and handed back
        poll_interval     seconds between looks for tasks without a notification; 0: never
        lease             seconds without a heartbeat after which other workers take this one for dead; 6 or more
        history           seconds that done and cancelled tasks are kept; 0: not at all
        drain             True: return when no task is left that could run now
        signals           True: handle SIGTERM and SIGINT as `notifyq worker` does. The first sets `stop`, the second
                          `force`. If handlers block the event loop beyond all time limits, the process ends. This is
                          for a program of its own; in a server, which handles signals itself, set `stop` instead
        stop, force       set `stop` to finish running handlers and return, `force` to hand tasks back and return now

        `await task_group.start(app.run_worker)` returns a WorkerInfo when the worker is ready. A worker that is
        cancelled hands its tasks back at once. Raises ConfigError, DatabaseError or SchemaError if it can't start, and
        NotifyqError if the lifespan fails.
        """
        check_not_loading("app.run_worker()")
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
        """Raise ConfigError if `what`, a call, runs on another event loop than this app's connections, or on none.

        cure  what to write instead, for the message
        """
        loops.same(self._loop or loops.running(what, cure), what, "`async with app.connect():`", cure)

    def _connection(self, conn: drivers.AsyncConnection | None) -> Via:
        if conn is not None:
            return drivers.to_async(conn)
        return self._connected("enqueue", ", or pass conn=")

    def _connected(self, what: str, or_else: str = "") -> AppPool:
        if self._pool is None:
            raise ConfigError(f"not connected: {what} inside `async with app.connect():`{or_else}")
        return self._pool
