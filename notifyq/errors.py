"""Everything notifyq raises on purpose, one tree, and the exit code each has on the command line.

    NotifyqError            1   something failed
    ├── ConfigError         2   wrong usage: a flag, an app, a handler, a task, a setting
    │   └── EmbeddedError   2   the embedded PostgreSQL can't be had here
    ├── LeaseLost           1   a handler's task was taken from it before its transaction could settle it
    ├── TaskFailed          1   a task whose result was waited for has none
    │   ├── TaskDead        1   it is dead
    │   └── TaskCancelled   1   it was cancelled
    ├── DatabaseError       3   the database is unreachable, or refuses this user
    └── SchemaError         4   the schema is missing, or of another version

A message says three things: what is wrong, with its name; what was expected; what to do about it.
"""

from __future__ import annotations

from typing import ClassVar, cast


class NotifyqError(Exception):
    """Base of all; catch this one to catch whatever notifyq itself has to say."""

    exit_code: ClassVar[int] = 1


class ConfigError(NotifyqError, ValueError):
    """A mistake in code or configuration, found where it was written."""

    exit_code = 2


class EmbeddedError(ConfigError):
    """The embedded PostgreSQL can't be found or started on this machine."""


class LeaseLost(NotifyqError):
    """The task isn't this run's any more: it was cancelled, or others took its worker for dead."""


class TaskFailed(NotifyqError):
    """A task that was waited for ended without a result. `error` is what all_tasks says of it."""

    ended: ClassVar[str]

    def __init__(self, id: int, type: str, error: str | None) -> None:
        super().__init__(id, type, error)
        self.id = id
        self.type = type
        self.error = error

    def __str__(self) -> str:
        return f"task {self.id} ({self.type}) {self.ended}{f': {self.error}' if self.error else ''}"


class TaskDead(TaskFailed):
    """It is dead: out of attempts, or given up."""

    ended = "is dead"


class TaskCancelled(TaskFailed):
    """It was cancelled, by its handler or by somebody else; then `error` is None, or of an attempt before."""

    ended = "was cancelled"


def failure(id: int, type: str, state: str | None, error: str | None) -> TaskFailed | None:
    """What a task's end in this state is for who waited for it; None: nothing that failed."""
    if state == "dead":
        return TaskDead(id, type, error)
    return TaskCancelled(id, type, error) if state == "cancelled" else None


class DatabaseError(NotifyqError):
    """The database can't be reached, or doesn't let this user in."""

    exit_code = 3


class SchemaError(NotifyqError):
    """The `notifyq` schema is missing, older or newer than this version of the code."""

    exit_code = 4


def first_error(error: BaseException) -> BaseException:
    """The first error inside of groups of errors: what a task group was ended by, the others follow from it."""
    while isinstance(error, BaseExceptionGroup):
        error = cast("BaseExceptionGroup[BaseException]", error).exceptions[0]
    return error
