"""Ref: an enqueued task, to wait for and to cancel. Ids: those of many."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterable
from datetime import UTC, datetime, timedelta
from typing import Any, Protocol, TypeVar, overload

import msgspec

from .. import loops
from ..config import in_seconds, is_number
from ..errors import ConfigError, NotifyqError
from ..task import Progress

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)

_Result = TypeVar("_Result")


class RefResults(Protocol):
    """Where a Ref waits for results and progress: client.results.Results."""

    async def result(self, id: int, type: object, timeout: float | None, created_at: datetime | None) -> Any: ...
    def steps(self, id: int, created_at: datetime | None) -> AsyncIterator[Progress]: ...


class RefApp(Protocol):
    """What a Ref asks of the App that made it."""

    @property
    def results(self) -> RefResults: ...
    def check_cancel(self) -> None: ...
    async def _cancel(self, ref: Ref) -> bool: ...


def _check_result(ref: Ref, *_: object, **__: object) -> None:
    assert ref._app.results is not None  # pyright: ignore[reportPrivateUsage]


def _check_cancel(ref: Ref) -> None:
    ref._app.check_cancel()  # pyright: ignore[reportPrivateUsage]


class Ref(msgspec.Struct, frozen=True, dict=True, eq=False, omit_defaults=True):
    """An enqueued task, by its id in notifyq.all_tasks. One that enqueue returned, or `app.ref(id)`, can be waited for,
    inside of `async with app.connect():`.

    created_at  of the task that is meant, if it is known, as it is where enqueue returned this. The id may be another
                task's one day: after a failover to a standby that lagged, or TRUNCATE ... RESTART IDENTITY. Then what
                this Ref is asked for raises NotifyqError.
    """

    id: int
    created_at: datetime | None = None

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Ref):
            return NotImplemented
        return self.id == other.id and (
            self.created_at is None or other.created_at is None or self.created_at == other.created_at
        )

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
        """Wait for the task's end, however many attempts that takes, and return its result; at once, if it has ended.

        type     what the result is to be, anything that msgspec can decode. Without one, it is what this app's handler
                 is annotated to return, or plain JSON, where the app has no handler for it
        timeout  seconds, or a timedelta; then TimeoutError, and the task goes on

        Raises TaskDead or TaskCancelled if it ended so, and NotifyqError if nobody knows of such a task: it was pruned,
        or its transaction (conn=) isn't committed. Without a database it waits for that.
        """
        timeout = in_seconds(timeout)
        if timeout is not None and not is_number(timeout):
            raise ConfigError(f"timeout is {timeout!r}; expected seconds, or a timedelta")
        return await self._app.results.result(self.id, type, timeout, self.created_at)

    def progress(self) -> AsyncIterator[Progress]:
        """What its handler tells by ctx.progress, each new one, until the task ends.

        async for step in ref.progress():
            print(f"{step.fraction:.0%}", step.note)
        """
        return self._app.results.steps(self.id, self.created_at)

    @loops.checked_at_call(_check_cancel)
    async def cancel(self) -> bool:
        """As App.cancel."""
        return await self._app._cancel(self)  # pyright: ignore[reportPrivateUsage]

    @property
    def existed(self) -> bool:
        """Whether enqueue found the task there, with the same unique key, and this is that one's."""
        return bool(getattr(self, "found", False))

    @property
    def _app(self) -> RefApp:
        app: RefApp | None = getattr(self, "app", None)
        if app is None:
            raise ConfigError(f"Ref({self.id}) belongs to no app here; make one that does: app.ref({self.id})")
        return app


def ref(app: RefApp, id: int, created: int | None = None, existed: bool = False) -> Ref:
    """One that can be waited for. The app is no field: a Ref is compared, encoded and pickled without it.

    created  its created_at in microseconds since 1970, as the statements return it
    """
    made = Ref(id, None if created is None else EPOCH + timedelta(microseconds=created))
    msgspec.structs.force_setattr(made, "app", app)
    if existed:
        msgspec.structs.force_setattr(made, "found", True)
    return made


def check_same(id: int, expected: datetime | str | None, found: datetime | str) -> None:
    """Raise NotifyqError if a task with this id is another one than a Ref's.

    A str is a time as PostgreSQL prints it, since it has times that Python hasn't.
    """
    if expected is not None and found != expected:
        raise NotifyqError(
            f"task {id} isn't the one that this Ref is of: it was created at {found}, and that one at {expected}. That "
            "one is lost: its server failed before the standby had it, or ids were given twice (TRUNCATE ... RESTART "
            "IDENTITY)"
        )


class Ids(list[int]):
    """Of enqueued tasks, in order: a list, that knows which of them existed."""

    def __init__(self, ids: Iterable[int] = (), existed: Iterable[int] = ()) -> None:
        super().__init__(ids)
        self.existed = frozenset(existed)  # those that were found there, with the same unique keys
