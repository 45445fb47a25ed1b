"""Many tasks at once, some of which may be unique: those are set aside until all are known.

They go sorted by key, so that two who enqueue the same keys in bulk wait for each other in one order, never in a
circle; and of several with the same key one goes: the first, or the last if it is to replace or move what is there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from ..database.connection import SQL
from ..errors import ConfigError
from ..task import Task
from ..unique import NO_RULE
from .options import Options
from .ref import Ids

CHUNK = 2000  # tasks in a statement,
CHUNK_SIZE = 8_000_000  # and characters of their payloads together, or one task
# Characters in a statement that can't be several: four bytes for each, or a backslash before each, are less than the GB
# that PostgreSQL takes.
ONE_STATEMENT = 200_000_000

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
        self._asked = options.unique != NO_RULE
        self._keys: dict[int, str] = {}  # of the unique ones, by position
        self._unique: dict[str, Placed] = {}  # by key
        self._plain: type[Task] | None = None  # a class that says nothing of how its tasks are enqueued
        self._found: dict[str, tuple[int, bool]] = {}
        self._ids: list[int] = []  # of the others
        self.count = 0
        self.size = 0  # characters of all payloads
        self._more = False

    def rows(self, tasks: Iterable[Task]) -> list[Row | Placed]:
        """Of the next ones, as many as a statement may have: those that aren't unique.

        Raises ConfigError for what can't be enqueued.
        """
        rows: list[Row | Placed] = []
        last, full = self.count + CHUNK, self.size + CHUNK_SIZE
        self._more = True
        for task in tasks:
            row = self._encode(task)
            if type(task) is self._plain:
                rows.append(row)
            else:
                self._place(task, row, rows)
            self.count += 1
            self.size += len(row[1])
            if self.count == last or self.size >= full:
                return rows
        self._more = False
        return rows

    def _place(self, task: Task, row: Row, rows: list[Row | Placed]) -> None:
        """A task that may be unique, or of a class with rules."""
        options = self._options.for_task(task)
        unique = self._options.unique.for_task(task)
        if unique is None and options is self._options:
            rows.append(row)
            if not self._asked and type(task).unique is False:
                self._plain = type(task)
            return
        placed = (*row, options.columns.queue, options.columns.priority, options.text(unique))
        if unique is None:
            rows.append(placed)
        else:
            self._keys[self.count] = unique.key
            if unique.key not in self._unique or unique.on_conflict != "keep":
                self._unique[unique.key] = placed

    def has_more(self) -> bool:
        """Whether `rows` has ended before the tasks did, or may have."""
        return self._more

    def statements(self, rows: list[Row | Placed], *, whole: bool = False) -> Iterator[Statement]:
        """To insert these, and the unique ones, as many in each as a statement may have; `whole`: all in one."""
        keys = sorted(self._unique)
        if not keys and rows:
            yield insert(rows, self._options)
        start = 0
        while start < len(keys):
            end = len(keys) if whole else self._end_of_chunk(keys, start)
            chosen = [self._unique[key] for key in keys[start:end]]
            start = end
            more, rows = rows, []
            yield _each("enqueue_many_unique", [*chosen, *more], self._options)

    def _end_of_chunk(self, keys: list[str], start: int) -> int:
        size = 0
        for place in range(start, min(start + CHUNK, len(keys))):
            size += len(self._unique[keys[place]][1])
            if size >= CHUNK_SIZE:
                return place + 1
        return min(start + CHUNK, len(keys))

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


def check_one_statement(size: int) -> None:
    """Raises ConfigError if so many characters are too much for one statement."""
    if size > ONE_STATEMENT:
        raise ConfigError(
            f"the payloads of these tasks have more than {ONE_STATEMENT:,} characters together, and with conn= or "
            "then= they go in one statement, which may not have more; enqueue them in several calls (with conn= they "
            "are all in its transaction)"
        )


def insert(rows: Sequence[Row | Placed], options: Options) -> Statement:
    """To insert rows that aren't unique."""
    if any(len(row) > 2 for row in rows):
        return _each("enqueue_many_placed", rows, options)
    return SQL["enqueue_many"], (*columns(rows), *options.columns, options.text())


def _each(name: str, rows: Sequence[Row | Placed], options: Options) -> Statement:
    """A statement that takes the queue, the priority and the options of each row."""
    queue, delay, run_at, priority, max_attempts = options.columns
    rest = (queue, priority, options.text())
    whole = [(*row[:2], *(row[2:] or rest)) for row in rows]
    types, payloads, queues, priorities, texts = map(list, zip(*whole, strict=True))
    return SQL[name], (types, payloads, queues, delay, run_at, priorities, max_attempts, texts)


def columns(rows: Sequence[Row | Placed]) -> tuple[list[str], list[str]]:
    return [row[0] for row in rows], [row[1] for row in rows]
