"""A cron of an app: its schedule, with the task that each slot enqueues."""

from __future__ import annotations

from ..config import check_name
from ..cron import Cron, check_schedule
from ..errors import ConfigError
from ..registry import Handler, Registry
from ..task import Task
from .enqueue import validated_task
from .options import options_for


def register_cron(
    registry: Registry, handler: Handler, cron: Cron, queue: str | None, priority: int | None, task: Task | None
) -> None:
    """Add `cron`, whose name and schedule are given, with what its task's row has.

    queue, priority  None: what the task's class says
    task             None: the handler's task, made without arguments

    Raises ConfigError for a task, a schedule or a name that can't be.
    """
    task = _task_of(handler) if task is None else task
    if type(task) is not handler.task:
        raise ConfigError(f"@app.cron of {handler.name}: task is {task!r:.100}, expected a {handler.task.__name__}")
    check_name("name", cron.name)
    check_schedule(cron.expression, cron.tz)
    options = options_for(queue, priority).for_task(task)
    if cron.missed not in ("once", "skip"):
        raise ConfigError(f"missed is {cron.missed!r}; expected 'once' or 'skip'")
    if cron.name in registry.crons:
        raise ConfigError(f"two crons are named {cron.name!r}; give one another name: @app.cron(..., name=...)")
    tag, payload = validated_task(registry, task)
    registry.crons[cron.name] = cron._replace(
        type=tag,
        payload=payload,
        queue=options.columns.queue,
        priority=options.columns.priority,
        options=options.text(),
    )


def _task_of(handler: Handler) -> Task:
    try:
        return handler.task()
    except TypeError as error:
        raise ConfigError(
            f"@app.cron of {handler.name}: {handler.task.__name__} can't be made without arguments ({error}); "
            f"say which: task={handler.task.__name__}(...)"
        ) from None
