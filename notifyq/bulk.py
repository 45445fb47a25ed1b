"""Many tasks at once, some of which may be unique: those are set aside until all are known.

They go sorted by key, so that two who enqueue the same keys in bulk wait for each other in one order, never in a
circle; and of several with the same key one goes: the first, or the last if it is to replace or move what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from .errors import ConfigError
from .options import Options
from .store import SQL
from .task import Ids, Task
from .unique import NOTHING

Row: TypeAlias = tuple[str, str]  # type and payload
Placed: TypeAlias = tuple[str, str, str, int, str | None]  # and queue, priority, options as JSON: of a class with rules
Statement: TypeAlias = tuple[str, tuple[Any, ...]]  # and its parameters


class Bulk:
    """The tasks of one call: `encode` makes rows of them, `statements` sends those, and `took` is told the answers."""

    def __init__(self, encode: Callable[[Task], Row], options: Options) -> None:
        if isinstance(options.unique.unique, str):
            raise ConfigError(
                f"unique is {options.unique.unique!r}, one key for many tasks, which would be one; expected True, or a "
                "tuple of fields' names"
            )
        self._encode = encode
        self._options = options
        self._asked = options.unique != NOTHING
        self._keys: dict[int, str] = {}  # of the unique ones, by position
        self._unique: dict[str, Placed] = {}  # by key
        self._plain: type[Task] | None = None  # a class that says nothing of how its tasks are enqueued
        self._found: dict[str, tuple[int, bool]] = {}
        self._ids: list[int] = []  # of the others
        self.count = 0

    def rows(self, tasks: Iterable[Task]) -> list[Row | Placed]:
        """Of the next ones, those that aren't unique. Raises ConfigError for what can't be enqueued."""
        rows: list[Row | Placed] = []
        for task in tasks:
            row = self._encode(task)
            if type(task) is self._plain:
                rows.append(row)
            else:
                self._place(task, row, rows)
            self.count += 1
        return rows

    def _place(self, task: Task, row: Row, rows: list[Row | Placed]) -> None:
        """A task that may be unique, or of a class with rules."""
        options = self._options.of(task)
        unique = self._options.unique.of(task)
        if unique is None and options is self._options:
            rows.append(row)
            if not self._asked and type(task).unique is False:
                self._plain = type(task)
            return
        placed = (*row, options.values[0], options.values[3], options.text(unique))
        if unique is None:
            rows.append(placed)
        else:
            self._keys[self.count] = unique.key
            if unique.key not in self._unique or unique.on_conflict != "keep":
                self._unique[unique.key] = placed

    def statements(self, rows: list[Row | Placed], most: int | None = None) -> Iterator[Statement]:
        """To insert these, and at most so many unique ones in each."""
        keys = sorted(self._unique)
        if not keys and rows:
            yield insert(rows, self._options)
        for start in range(0, len(keys), most or len(keys) or 1):
            more, rows = rows, []
            chosen = [self._unique[key] for key in keys[start:][:most]]
            yield _each("enqueue_many_unique", [*chosen, *more], self._options)

    def took(self, answer: Sequence[Any]) -> None:
        """What a statement said."""
        if answer and len(answer[0]) == 1:
            self._ids += [row[0] for row in answer]
            return
        for id, key, existed in answer:
            if key is None:
                self._ids.append(id)
            else:
                self._found[key] = id, existed

    def ids(self) -> Ids:
        """Of all, in order."""
        if not self._keys:
            return Ids(self._ids)
        rest = iter(self._ids)
        ids = [self._found[self._keys[n]][0] if n in self._keys else next(rest) for n in range(self.count)]
        return Ids(ids, (id for id, existed in self._found.values() if existed))


def insert(rows: Sequence[Row | Placed], options: Options) -> Statement:
    """To insert rows that aren't unique."""
    if any(len(row) > 2 for row in rows):
        return _each("enqueue_many_placed", rows, options)
    return SQL["enqueue_many"], (*columns(rows), *options.values, options.text())


def _each(name: str, rows: Sequence[Row | Placed], options: Options) -> Statement:
    """A statement that takes the queue, the priority and the options of each row."""
    queue, delay, run_at, priority, max_attempts = options.values
    rest = (queue, priority, options.text())
    whole = [(*row[:2], *(row[2:] or rest)) for row in rows]
    types, payloads, queues, priorities, texts = map(list, zip(*whole, strict=True))
    return SQL[name], (types, payloads, queues, delay, run_at, priorities, max_attempts, texts)


def columns(rows: Sequence[Row | Placed]) -> tuple[list[str], list[str]]:
    return [row[0] for row in rows], [row[1] for row in rows]
