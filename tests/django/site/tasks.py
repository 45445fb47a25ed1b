"""The project's tasks; a worker finds them by this module's name."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Any

from django.db import connection

import notifyq

if TYPE_CHECKING:
    from django.tasks import TaskContext, task
else:
    try:
        from django.tasks import TaskContext, task
    except ModuleNotFoundError:
        from django_tasks import TaskContext, task


class Refused(Exception):
    pass


def _add(a: int, b: int = 0) -> int:
    return a + b


add = task(_add)  # under another name than its function's


@task(queue_name="mail", priority=7, takes_context=True)
def told(context: TaskContext[..., Any], word: str, number: int, named: dict[str, Any]) -> dict[str, Any]:
    result = context.task_result
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_backend_pid()")
        (backend,) = cursor.fetchone()
    return {
        "attempt": context.attempt,
        "id": result.id,
        "args": result.args,
        "kwargs": result.kwargs,
        "queue": result.task.queue_name,
        "priority": result.task.priority,
        "backend": backend,
        "pid": os.getpid(),
    }


@task
async def doubled(number: int) -> int:
    return 2 * number


@task
def flaky(context: str) -> None:
    raise Refused(f"not {context}\nnor that")


@task(backend="once")
def once() -> None:
    raise ValueError("never")


@task
def given_up() -> notifyq.Dead:
    return notifyq.Dead("no use")


@task
def waits(statement: str) -> None:
    with connection.cursor() as cursor:
        cursor.execute("SET application_name = 'from Django'")
        cursor.execute(statement)
