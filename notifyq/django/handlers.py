"""A handler for each declared Django task, which runs it in a thread."""

from __future__ import annotations

from collections.abc import Callable
from traceback import format_exception
from typing import Any

from django.db import close_old_connections
from django.utils import timezone

from notifyq.app import App
from notifyq.errors import ConfigError
from notifyq.task import Cancel, Context, Dead, Verdict

from .backend import as_sent, worker_ids
from .declared import BY_TYPE, Call, Declared
from .framework import TaskContext, TaskError, TaskResult, TaskResultStatus, task_finished, task_started


def add_tasks(app: App) -> None:
    """Register a handler in `app` for each Django task that is declared by now. Raises ConfigError if none is."""
    if not BY_TYPE:
        raise ConfigError(
            "no Django task is declared for notifyq; expected an @task in a module that is imported by now, and "
            'BACKEND "notifyq.django.TaskBackend" in TASKS'
        )
    for declared in BY_TYPE.values():
        app.registry.add(_handler(declared), {})


def _handler(declared: Declared) -> Callable[[Call, Context], object]:
    def run(call: Call, ctx: Context) -> object:
        close_old_connections()  # as Django does before and after a request
        try:
            return _run(declared, call, ctx)
        finally:
            close_old_connections()

    function = declared.task.func
    run.__name__, run.__qualname__, run.__module__ = function.__name__, function.__qualname__, function.__module__
    run.__annotations__ = {"call": declared.call, "ctx": Context}
    return run


def _run(declared: Declared, call: Call, ctx: Context) -> object:
    now = timezone.now()
    task = as_sent(declared.task, ctx.queue, ctx.priority, None, declared.task.backend)
    result = TaskResult(
        task=task,
        id=str(ctx.id),
        status=TaskResultStatus.RUNNING,
        enqueued_at=ctx.created_at,
        started_at=now,
        finished_at=None,
        last_attempted_at=now,
        args=call.args,
        kwargs=call.kwargs,
        backend=task.backend,
        errors=[],
        worker_ids=worker_ids(ctx.attempt, "this"),
    )
    sender = type(task.get_backend())
    task_started.send(sender, task_result=result)
    first = (TaskContext(task_result=result),) if task.takes_context else ()
    try:
        value: object = task.call(*first, *result.args, **result.kwargs)
        if isinstance(value, Verdict):
            raise value
    except BaseException as error:
        result.errors.append(
            TaskError(
                exception_class_path=f"{type(error).__module__}.{type(error).__qualname__}",
                traceback="".join(format_exception(error)),
            )
        )
        if isinstance(error, Dead | Cancel) or ctx.attempt >= ctx.max_attempts:  # else it is tried again
            _end(result, TaskResultStatus.FAILED)
            task_finished.send(sender, task_result=result)
        raise
    object.__setattr__(result, "_return_value", value)
    _end(result, TaskResultStatus.SUCCESSFUL)
    task_finished.send(sender, task_result=result)
    return value


def _end(result: TaskResult[..., Any], status: TaskResultStatus) -> None:
    object.__setattr__(result, "finished_at", timezone.now())
    object.__setattr__(result, "status", status)
