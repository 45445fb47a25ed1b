"""Ref: an enqueued task, to wait for and to cancel. Ids: the ids of many tasks."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol, TypeVar, overload

import msgspec

from .. import loops
from ..config import in_seconds, is_number
from ..errors import ConfigError, NotifyqError
from ..options import is_id
from ..task import Progress
from . import clock
from .calls import check_cancel

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_Result = TypeVar("_Result")


class RefResults(Protocol):
    """Where a Ref waits for results and progress: client.results.Results."""

    async def result(self, id: int, type: object, timeout: float | None, created_at: datetime | None) -> Any: ...
    def progress(self, id: int, created_at: datetime | None) -> AsyncIterator[Progress]: ...


class RefApp(Protocol):
    """The App that made a Ref, as the Ref uses it."""

    @property
    def results(self) -> RefResults: ...
    def check_loop(self, what: str, cure: str) -> None: ...
    async def _cancel(self, ref: Ref) -> bool: ...


def _check_result(ref: Ref, *_: object, **__: object) -> None:
    assert ref._app.results is not None  # it raises  # pyright: ignore[reportPrivateUsage]


def _check_cancel(ref: Ref) -> None:
    check_cancel(ref._app)  # pyright: ignore[reportPrivateUsage]


class Ref(msgspec.Struct, frozen=True, dict=True, eq=False, omit_defaults=True):
    """An enqueued task, by its id in notifyq.all_tasks.

    A Ref that enqueue or `app.ref(id)` returned can be waited for, inside `async with app.connect():`.

    created_at  when the task was created; enqueue sets it. One day another task may have the same id: after a failover
                to a standby that lagged, or TRUNCATE ... RESTART IDENTITY. The methods raise NotifyqError then
    """

    id: int
    created_at: datetime | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ref):
            return NotImplemented
        if self.id != other.id or self.created_at is None or other.created_at is None:
            return self.id == other.id
        mine, its = self.created_at, other.created_at
        return clock.is_same_time(mine, its) or clock.is_same_time(its, mine)

    def __ne__(self, other: object) -> bool:
        return not self == other  # a Struct's own goes by identity where it has no __eq__

    def __hash__(self) -> int:
        return hash(self.id)

    @overload
    async def result(self, /, *, timeout: float | timedelta | None = None) -> Any: ...
    @overload
    async def result(self, type: type[_Result], /, *, timeout: float | timedelta | None = None) -> _Result: ...
    @overload
    async def result(self, type: object, /, *, timeout: float | timedelta | None = None) -> Any: ...
    @loops.checked_at_call(_check_result)
    async def result(self, type: object = None, /, *, timeout: float | timedelta | None = None) -> Any:
        """Wait until the task has ended, through all its attempts, and return its result.

        type     the result is decoded as this type, any that msgspec knows. Without it, the result is what this app's
                 handler is annotated to return, or plain JSON if the app has no handler for the task
        timeout  seconds, or a timedelta, after which TimeoutError is raised; the task goes on

        Raises TaskDead or TaskCancelled if the task ended so, and NotifyqError if there is no such task: it was pruned,
        or its transaction (conn=) isn't committed. While the database can't be reached, it waits for the database.
        """
        timeout = in_seconds(timeout)
        if timeout is not None and not is_number(timeout):
            raise ConfigError(f"timeout is {timeout!r}; expected seconds, or a timedelta")
        return await self._app.results.result(self.id, type, timeout, self.created_at)

    def progress(self) -> AsyncIterator[Progress]:
        """Each new Progress that the handler reports by ctx.progress, until the task ends.

        async for step in ref.progress():
            print(f"{step.fraction:.0%}", step.note)
        """
        return self._app.results.progress(self.id, self.created_at)

    @loops.checked_at_call(_check_cancel)
    async def cancel(self) -> bool:
        """Cancel the task, and return whether this call did. See App.cancel."""
        return await self._app._cancel(self)  # pyright: ignore[reportPrivateUsage]

    @property
    def existed(self) -> bool:
        """Whether enqueue found a task with the same unique key, and inserted nothing: this is the Ref of that task."""
        return bool(getattr(self, "found", False))

    @property
    def _app(self) -> RefApp:
        app: RefApp | None = getattr(self, "app", None)
        if app is None:
            raise ConfigError(f"Ref({self.id}) belongs to no app here; make one that does: app.ref({self.id})")
        return app


def ref(app: RefApp, id: int, created: int | None = None, existed: bool = False) -> Ref:
    """A Ref that can be waited for. The app isn't a field: a Ref is compared, encoded and pickled without it.

    created  the task's created_at in microseconds since 1970, as the statements return it
    """
    made = Ref(id, None if created is None else EPOCH + timedelta(microseconds=created))
    msgspec.structs.force_setattr(made, "app", app)
    if existed:
        msgspec.structs.force_setattr(made, "found", True)
    return made


def ref_by_id(app: RefApp, id: int, created_at: datetime | None) -> Ref:
    """The Ref that App.ref returns. Raises ConfigError for an id or a time that can't be."""
    if not is_id(id):
        raise ConfigError(f"ref({id!r}): expected a task's id, as enqueue_many returns them")
    if created_at is not None and (not isinstance(created_at, datetime) or created_at.tzinfo is None):
        raise ConfigError(f"ref({id}, {created_at!r}): expected a datetime with a timezone, a Ref's created_at")
    made = ref(app, id)
    if created_at is not None:
        msgspec.structs.force_setattr(made, "created_at", created_at)
    return made


def check_same(id: int, expected: datetime | str | None, found: datetime | str) -> None:
    """Raise NotifyqError if the task with this id isn't the task of a Ref: their created_at differ.

    expected  the Ref's created_at; None if it isn't known
    found     the task's created_at. A str is a time as PostgreSQL prints it, which has times that Python hasn't
    """
    if expected is not None and found != expected and not clock.is_same_time(expected, found):
        raise NotifyqError(
            f"task {id} isn't the one that this Ref is of: it was created at {found}, and that one at {expected}. That "
            "one is lost: its server failed before the standby had it, or ids were given twice (TRUNCATE ... RESTART "
            "IDENTITY)"
        )


class Ids(list[int]):
    """The ids of enqueued tasks, in order: a list with one more attribute.

    existed  the ids of tasks that existed before, with the unique key of one that was to be enqueued
    """

    def __init__(self, ids: Iterable[int] = (), existed: Iterable[int] = ()) -> None:
        super().__init__(ids)
        self.existed = frozenset(existed)
