"""SyncClient: enqueue from code that isn't async, such as WSGI applications, scripts and Django."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, Self, Unpack, overload

from .. import forked
from ..config import redact, resolve_dsn
from ..database.errors import translate_errors
from ..database.hosts import conninfo
from ..errors import ConfigError, DatabaseError
from ..task import Task
from . import drivers
from .bulk import Bulk, Statement, build_bulk_insert, check_one_statement
from .enqueue import build_group_insert, build_insert, name_of, read_group_ids, validated_task
from .options import EnqueueOptions, Options
from .ref import Ids, Ref, ref

if TYPE_CHECKING:
    from ..app import App
    from .sync_pool import Bounded, Pool


class SyncClient:
    """Enqueues an app's tasks from any thread: on its own connections after `connect`, else on a connection of yours.

        client = notifyq.SyncClient(app)
        client.connect(dsn)                 # once, or `with client.connect(dsn):`, which closes it
        client.enqueue(task)
        client.enqueue(task, conn=session)

    `connect` needs psycopg and its pool: pip install 'notifyq[sync]'. A child that is forked from a connected process
    opens connections of its own.
    """

    def __init__(self, app: App) -> None:
        self._app = app
        self._registry = app.registry
        self._lock = threading.Lock()
        self._inherited: list[object] = []
        self._pool: tuple[int, Pool] | None = None  # the id of the process that made it, and the pool
        self._where: tuple[str, str] | None = None  # libpq's conninfo, and the server's name for messages
        forked.call_in_children(self._on_fork)

    def connect(self, dsn: str | None = None) -> Self:
        """Connect with up to 10 connections, opened when needed. `dsn` None: the environment names the database.

        Raises ConfigError for a wrong DSN or without psycopg, DatabaseError if the server can't be reached.
        """
        if self._where is not None:
            raise ConfigError("this client is connected already; one serves all threads")
        try:
            import psycopg
            import psycopg_pool  # noqa: F401 # pyright: ignore[reportUnusedImport] - fails here, not at the first task

            from . import sync_pool
        except ImportError as error:
            raise ConfigError(
                f"SyncClient.connect needs psycopg ({error}): pip install 'notifyq[sync]', and 'psycopg[binary]' where "
                "the system has no libpq"
            ) from error
        url, source = resolve_dsn(dsn)
        where = f"{source}: {redact(url)}" if url else source
        try:
            info = conninfo(url)
            sync_pool.connect(info).close()
        except psycopg.OperationalError as error:
            raise DatabaseError(f"can't connect to the database ({where}): {redact(str(error))}") from None
        except (psycopg.ProgrammingError, ValueError) as error:
            raise ConfigError(f"{source} can't be used: {redact(str(error))}") from None
        self._where = info, where
        return self

    def close(self) -> None:
        """Close the connections. `connect` may be called again."""
        with self._lock:
            pool, self._pool, self._where = self._pool, None, None
        if pool is not None and pool[0] == os.getpid():
            pool[1].close()

    def _on_fork(self) -> None:
        """In a forked child: make a new lock, as another thread may have held it, and forget the parent's pool."""
        self._lock = threading.Lock()
        self._inherited.append(self._pool)  # never deleted here: a pool's __del__ waits for its threads
        self._pool = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def enqueue(
        self,
        task: Task,
        *,
        conn: drivers.SyncConnection | None = None,
        **options: Unpack[EnqueueOptions],
    ) -> Ref:
        """As App.enqueue, but it blocks.

        conn  a psycopg.Connection, SQLAlchemy's Session or Connection, or django.db.connection: the task is inserted in
              its transaction. Without it, `connect` must have been called
        """
        checked_options = Options.check(**options)
        type, payload = validated_task(self._registry, task)
        query, args = build_insert(type, payload, checked_options.for_task(task), checked_options.unique.for_task(task))
        with translate_errors("enqueue", task=type):
            [row] = self._fetch(conn, query, args)
        return ref(self._app, *row)

    @overload
    def enqueue_many(
        self,
        tasks: Iterable[Task],
        *,
        then: None = None,
        conn: drivers.SyncConnection | None = None,
        **options: Unpack[EnqueueOptions],
    ) -> Ids: ...
    @overload
    def enqueue_many(
        self,
        tasks: Iterable[Task],
        *,
        then: Task,
        conn: drivers.SyncConnection | None = None,
        **options: Unpack[EnqueueOptions],
    ) -> tuple[list[int], Ref]: ...
    def enqueue_many(
        self,
        tasks: Iterable[Task],
        *,
        then: Task | None = None,
        conn: drivers.SyncConnection | None = None,
        **options: Unpack[EnqueueOptions],
    ) -> Ids | tuple[list[int], Ref]:
        """As App.enqueue_many, but it blocks. On `conn` it is one statement, of at most 200,000,000 characters of
        payloads."""
        checked_options = Options.check(**options, has_follower=then is not None)
        if then is not None:
            query, args = build_group_insert(self._registry, tasks, then, checked_options)
            with translate_errors("enqueue", task="(one of a group)"):
                ids, last = read_group_ids(self._fetch(conn, query, args))
            return ids, ref(self._app, *last)
        bulk = Bulk(partial(validated_task, self._registry), checked_options)
        rest = iter(tasks)
        first = bulk.rows(rest)
        if conn is not None:
            while bulk.has_more():
                first += bulk.rows(rest)
                check_one_statement(bulk.size)
        if not bulk.has_more():
            for query, args in bulk.statements(first, whole=True):
                with translate_errors("enqueue", task=name_of(args[0])):
                    bulk.add_answer(self._fetch(conn, query, args))
            return bulk.ids()
        with self._opened().connection() as own, own.transaction():
            while first or bulk.has_more():
                if first:
                    self._send(own, bulk, build_bulk_insert(first, checked_options))
                first = bulk.rows(rest)
            for each in bulk.statements([]):
                self._send(own, bulk, each)
        return bulk.ids()

    def _send(self, own: Bounded, bulk: Bulk, statement: Statement) -> None:
        query, args = statement
        with translate_errors("enqueue", task=name_of(args[0])):
            bulk.add_answer(own.run(query, args))

    def _fetch(self, conn: drivers.SyncConnection | None, query: str, args: Sequence[Any]) -> Sequence[Any]:
        if conn is not None:
            return drivers.fetch(conn, query, args)
        with self._opened().connection() as own:
            return own.run(query, args)

    def _opened(self) -> Pool:
        """The pool of this process: a server forks workers after it has loaded the app, and a child needs its own."""
        from .sync_pool import Pool

        with self._lock:
            if self._where is None:
                raise ConfigError("not connected: call connect() first, or pass conn=")
            if self._pool is None or self._pool[0] != os.getpid():
                self._pool = os.getpid(), Pool(*self._where)
            return self._pool[1]
