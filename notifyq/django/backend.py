"""The backend: it enqueues Django tasks on Django's connection, in its transaction, and reads their results there."""

from __future__ import annotations

import re
import sys
from datetime import datetime
from typing import Any, ParamSpec, TypeVar, cast

import msgspec
from django.core import checks
from django.core.exceptions import ImproperlyConfigured
from django.db import DEFAULT_DB_ALIAS, connections
from django.utils import timezone

from notifyq.app import App
from notifyq.client import drivers
from notifyq.client.sync import SyncClient
from notifyq.database.connection import SQL
from notifyq.errors import ConfigError
from notifyq.registry import check_task

from .declared import BY_TYPE, call_class, declare
from .framework import (
    BaseTaskBackend,
    InvalidTask,
    Task,
    TaskError,
    TaskResult,
    TaskResultDoesNotExist,
    TaskResultStatus,
    task_enqueued,
)

_P = ParamSpec("_P")
_R = TypeVar("_R")

_client = SyncClient(App())  # not connected: it only enqueues on Django's connections

_STATUS = {
    "scheduled": TaskResultStatus.READY,
    "ready": TaskResultStatus.READY,
    "running": TaskResultStatus.RUNNING,
    "done": TaskResultStatus.SUCCESSFUL,
    "dead": TaskResultStatus.FAILED,
    "cancelled": TaskResultStatus.FAILED,
}


SETTINGS = ("max_attempts", "backoff", "timeout")


class TaskBackend(BaseTaskBackend):
    """The backend that TASKS names. Its OPTIONS:

    database      the alias of the database; default: "default"
    max_attempts, backoff, timeout
                  settings of each task that is declared for this backend, as a Task class has them; defaults: 10, 2 s,
                  None
    """

    supports_defer = True
    supports_async_task = True
    supports_get_result = True
    supports_priority = True

    def __init__(self, alias: str, params: dict[str, Any]) -> None:
        super().__init__(alias, params)
        if unknown := self.options.keys() - {"database", *SETTINGS}:
            raise ImproperlyConfigured(
                f"TASKS[{alias!r}] has the OPTIONS {', '.join(sorted(unknown))}; notifyq knows database, "
                f"{', '.join(SETTINGS)}"
            )
        self._settings = {name: value for name, value in self.options.items() if name in SETTINGS}
        try:
            check_task(call_class("OPTIONS", __name__, "options", self._settings))
        except ConfigError as error:
            raise ImproperlyConfigured(f"TASKS[{alias!r}]: {error}") from None
        self._database: str = self.options.get("database", DEFAULT_DB_ALIAS)
        self._max_attempts: int | None = self.options.get("max_attempts")

    def validate_task(self, task: Task[..., Any]) -> None:
        super().validate_task(task)
        declare(task, self._settings)

    def enqueue(self, task: Task[_P, _R], args: Any, kwargs: Any) -> TaskResult[_P, _R]:
        """Enqueue in the transaction that is open on Django's connection. The result's id is the row's id."""
        self.validate_task(task)
        result = TaskResult(
            task=task,
            id="",
            status=TaskResultStatus.READY,
            enqueued_at=None,
            started_at=None,
            finished_at=None,
            last_attempted_at=None,
            args=args,
            kwargs=kwargs,
            backend=self.alias,
            errors=[],
            worker_ids=[],
        )
        run_at = task.run_after
        if run_at is not None and timezone.is_naive(run_at):  # USE_TZ = False
            run_at = timezone.make_aware(run_at)
        ref = _client.enqueue(
            declare(task, self._settings).call(args=result.args, kwargs=result.kwargs),
            queue=task.queue_name,
            run_at=run_at,
            priority=task.priority,
            max_attempts=self._max_attempts,
            conn=connections[self._database],
        )
        object.__setattr__(result, "id", str(ref.id))  # the class is frozen; Django's own backends do the same
        object.__setattr__(result, "enqueued_at", timezone.now())
        task_enqueued.send(type(self), task_result=result)
        return result

    def get_result(self, result_id: str) -> TaskResult[..., Any]:
        """The result as notifyq.all_tasks has it, until the task is pruned. Of earlier attempts only the errors are
        known.

        Raises TaskResultDoesNotExist for an id without a row, or a task of another type than Django's.
        """
        id = int(result_id) if re.fullmatch("[0-9]{1,18}", str(result_id)) else 0
        rows = drivers.fetch(connections[self._database], SQL["read_django_result"], (id,))
        if not rows or (known := BY_TYPE.get(rows[0][0])) is None:
            what = f"is of type {rows[0][0]}, which is no task here" if rows else "isn't in notifyq.all_tasks"
            raise TaskResultDoesNotExist(f"{result_id} {what}")
        _, queue, priority, state, attempts, created_at, run_at, begun_at, ended_at, payload, value, worker, errors = (
            rows[0]
        )
        call = msgspec.json.decode(payload, type=known.call)
        status = _STATUS[state]
        result = TaskResult(
            task=as_sent(known.task, queue, priority, run_at if run_at > created_at else None, self.alias),
            id=str(result_id),
            status=status,
            enqueued_at=created_at,
            started_at=begun_at,
            finished_at=ended_at if status in {TaskResultStatus.SUCCESSFUL, TaskResultStatus.FAILED} else None,
            last_attempted_at=begun_at,
            args=call.args,
            kwargs=call.kwargs,
            backend=self.alias,
            errors=[_error(entry) for entry in msgspec.json.decode(errors or "[]", type=list[dict[str, Any]])],
            worker_ids=worker_ids(attempts, worker or ""),
        )
        if value is not None:
            object.__setattr__(result, "_return_value", msgspec.json.decode(value))
        return result

    def check(self, **kwargs: Any) -> list[Any]:
        """The errors for `manage.py check`."""
        found = list(super().check(**kwargs))
        if (vendor := connections[self._database].vendor) != "postgresql":
            message = f"TASKS[{self.alias!r}] is notifyq's, and its database {self._database!r} is {vendor}."
            hint = "Name a PostgreSQL database in OPTIONS: {'database': ALIAS}."
            found.append(checks.Error(message, hint=hint, id="notifyq.E001"))
        return found


def as_sent(
    task: Task[..., Any], queue: str, priority: int, run_after: datetime | None, backend: str
) -> Task[..., Any]:
    """The task with the options of its row, if Django allows them: plain SQL may have set others."""
    try:
        return task.using(queue_name=queue, priority=priority, run_after=run_after, backend=backend)
    except InvalidTask:
        return task


def worker_ids(attempts: int, last: str) -> list[str]:
    """An id for each attempt, since Django counts attempts by these. Only the last attempt's worker is known."""
    return ["unknown"] * (attempts - 1) + [last] * min(attempts, 1)


class RowError(TaskError):
    """An error in a row. Django's own class imports the exception that the row names; here it must be imported
    already."""

    __slots__ = ()

    @property
    def exception_class(self) -> type[BaseException]:
        module, _, name = self.exception_class_path.rpartition(".")
        found = vars(sys.modules[module]).get(name) if module in sys.modules else None
        if not (isinstance(found, type) and issubclass(found, BaseException)):
            raise ValueError(f"{self.exception_class_path!r} is no exception that this process has imported.")
        return found


def _error(entry: dict[str, Any]) -> TaskError:
    """An entry of a row's errors, for Django. The exception's full name is in the last lines of its traceback. An entry
    without a traceback is an error of notifyq's own."""
    text, trace = str(entry.get("error", "")), cast("str | None", entry.get("traceback"))
    path = "notifyq.errors.NotifyqError"
    if trace is not None:
        name = text.partition(":")[0]
        whole = re.findall(rf"^((?:[\w.<>]+\.)?{re.escape(name)})(?::|$)", trace, re.MULTILINE)
        path = whole[-1] if whole and "." in whole[-1] else f"builtins.{name}"
    return RowError(exception_class_path=path, traceback=trace or text)
