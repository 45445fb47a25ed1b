"""The errors that notifyq raises, as one tree, and the exit code of each on the command line.

    NotifyqError            1   something failed
    ├── ConfigError         2   wrong usage: a flag, an app, a handler, a task, a setting
    │   └── EmbeddedError   2   the embedded PostgreSQL can't run on this machine
    ├── LeaseLost           1   a handler's transaction can't settle its task, as the task isn't this run's any more
    ├── TaskFailed          1   a task ended without a result, and a caller waited for the result
    │   ├── TaskDead        1   it is dead
    │   └── TaskCancelled   1   it was cancelled
    ├── DatabaseError       3   the database is unreachable, or refuses this user
    └── SchemaError         4   the schema is missing, or of another version

A message says three things: what is wrong, by name; what is expected; what to do about it.
"""

from __future__ import annotations

from typing import ClassVar, cast


class NotifyqError(Exception):
    """The base class of all errors that notifyq raises itself."""

    exit_code: ClassVar[int] = 1


class ConfigError(NotifyqError, ValueError):
    """A mistake in code or configuration, raised where it is made: it is also a ValueError."""

    exit_code = 2


class EmbeddedError(ConfigError):
    """The embedded PostgreSQL can't be found or started on this machine."""


class LeaseLost(NotifyqError):
    """The task isn't this run's any more: it was cancelled, or other workers took its worker for dead."""


class TaskFailed(NotifyqError):
    """A task ended without a result while a caller waited for the result.

    id, type  of the task
    error     the last error of its row in notifyq.all_tasks; None if there is none
    """

    ended: ClassVar[str]

    def __init__(self, id: int, type: str, error: str | None) -> None:
        super().__init__(id, type, error)
        self.id = id
        self.type = type
        self.error = error

    def __str__(self) -> str:
        return f"task {self.id} ({self.type}) {self.ended}{f': {self.error}' if self.error else ''}"


class TaskDead(TaskFailed):
    """The task is dead: it has no attempts left, or its handler gave it up."""

    ended = "is dead"


class TaskCancelled(TaskFailed):
    """The task was cancelled, by its handler or by another program. `error` is None then, or of an earlier attempt."""

    ended = "was cancelled"


def failure(id: int, type: str, state: str | None, error: str | None) -> TaskFailed | None:
    """The error for a caller that waited for a task which ended in this state; None: the task hasn't failed."""
    if state == "dead":
        return TaskDead(id, type, error)
    return TaskCancelled(id, type, error) if state == "cancelled" else None


class DatabaseError(NotifyqError):
    """The database can't be reached, or refuses this user or this statement."""

    exit_code = 3


class SchemaError(NotifyqError):
    """The `notifyq` schema is missing, older or newer than this version of the code."""

    exit_code = 4


def first_error(error: BaseException) -> BaseException:
    """The first error inside nested exception groups: it ended the task group, and the others follow from it."""
    while isinstance(error, BaseExceptionGroup):
        error = cast("BaseExceptionGroup[BaseException]", error).exceptions[0]
    return error
