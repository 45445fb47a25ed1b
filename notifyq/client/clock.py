"""How far notifyq.testing has moved the times of tasks back, which a Ref that was made before doesn't know."""

from __future__ import annotations

from datetime import datetime
from typing import Final

MICROSECONDS: Final = 1e-6  # to which PostgreSQL and Python round


class Move:
    """Each task that was created before `made_at` may have been moved back by so many seconds.

    made_at  the database's time after the move; None while it is made
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.made_at: datetime | None = None
        _moves.append(self)


_moves: Final[list[Move]] = []  # of all databases of this process: a Ref doesn't know its own


def is_same_time(before: datetime | str, after: datetime | str) -> bool:
    """Whether a task that was created at `before` may say `after` now: the same time, or one by moves earlier.

    A task that got another one's id was created later than that one, so it isn't mistaken for it.
    """
    if before == after or not _moves or isinstance(before, str) or isinstance(after, str):
        return before == after
    moves = [move.seconds for move in _moves if move.made_at is None or before <= move.made_at]
    return 0 <= (before - after).total_seconds() <= sum(moves) + len(moves) * MICROSECONDS
