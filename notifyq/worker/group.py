"""The task group in which a worker's runners and batches run."""

from __future__ import annotations

import asyncio
import contextvars
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

import anyio
from anyio.abc import TaskGroup

from ..task import Run, current_run

T = TypeVar("T")


class RunGroup:
    """`start` coroutines in it between `ready` and `close`."""

    def __init__(self) -> None:
        self.ready = asyncio.Event()
        self._closing = asyncio.Event()
        self._group: TaskGroup | None = None

    async def serve(self) -> None:
        """Run until `close`, and until all that was started has ended. Fails when one of them fails."""
        async with anyio.create_task_group() as self._group:
            self.ready.set()
            await self._closing.wait()

    def start(self, run: Run, function: Callable[[T], Coroutine[Any, Any, None]], argument: T) -> None:
        """Start `function(argument)`, with `run` for its Contexts to talk to, and no other context variable."""
        assert self._group is not None
        context = contextvars.Context()
        context.run(current_run.set, run)
        context.run(self._group.start_soon, function, argument)

    @property
    def is_closed(self) -> bool:
        return self._closing.is_set()

    def close(self) -> None:
        self._closing.set()
