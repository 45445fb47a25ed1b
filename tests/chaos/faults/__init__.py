"""What is done to notifyq: each fault is a function that does it and returns when it is over, and a row of the list.

A fault says by `hit.who` which processes it touched. With `everybody` it may touch all. Without either it touches no
worker: then nothing may be rescued or run again because of it, only late. A fault that finds nothing to do raises
Missed."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import msgspec

if TYPE_CHECKING:
    from ..stage import Stage


class Missed(Exception):
    """There was nothing to hit."""


class Hit(msgspec.Struct):
    who: set[str] = msgspec.field(default_factory=set)


Act = Callable[["Stage", Hit], Awaitable[None]]


class Fault(msgspec.Struct, frozen=True):
    name: str
    act: Act
    everybody: bool = False
    heal: float = 5.0  # seconds after which all is as before


FAULTS: list[Fault] = []


def fault(name: str, *, everybody: bool = False, heal: float = 5.0) -> Callable[[Act], Act]:
    def add(act: Act) -> Act:
        FAULTS.append(Fault(name, act, everybody, heal))
        return act

    return add


from . import database, processes, sessions, tasks  # noqa: E402 (they fill the list)

__all__ = ["FAULTS", "Fault", "Hit", "Missed", "database", "fault", "processes", "sessions", "tasks"]
