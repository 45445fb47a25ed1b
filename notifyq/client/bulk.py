"""Many tasks in one call of enqueue_many. Unique tasks are held back until all tasks are known.

The unique tasks are sent sorted by key, so two calls with the same keys lock them in the same order and can't deadlock.
Of several tasks with the same key one is sent: the first, or the last if it replaces or moves the existing task.
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

CHUNK = 2000  # at most this many tasks in a statement
CHUNK_SIZE = 8_000_000  # and this many characters of their payloads together, unless one task has more
# Characters of payloads where all tasks must go in one statement. With four bytes for each character, or a backslash
# before each, the statement stays below the 1 GB that PostgreSQL takes.
ONE_STATEMENT = 200_000_000

Row: TypeAlias = tuple[str, str]  # type and payload
PlacedRow: TypeAlias = tuple[str, str, str, int, str | None]  # and queue, priority, options as JSON
Statement: TypeAlias = tuple[str, tuple[Any, ...]]  # its text and its parameters


class Bulk:
    """The tasks of one call. `rows` encodes a chunk, `statements` inserts it, `add_answer` takes the answer."""

    def __init__(self, to_row: Callable[[Task], Row], options: Options) -> None:
        if isinstance(options.unique.unique, str):
            raise ConfigError(
                f"unique is {options.unique.unique!r}, one key for many tasks, so only one of them would be enqueued; "
                "expected True, or a tuple of fields' names"
            )
        self._to_row = to_row
        self._options = options
        self._is_unique_asked = options.unique != NO_RULE
        self._keys: dict[int, str] = {}  # key by position in the call, of the unique tasks
        self._unique: dict[str, PlacedRow] = {}  # row by key
        self._plain: type[Task] | None = None  # the last class without rules and without a unique key
        self._found: dict[str, tuple[int, bool]] = {}  # id, and whether it existed, by key
        self._ids: list[int] = []  # ids of the tasks that aren't unique
        self.count = 0  # tasks so far
        self.size = 0  # characters of their payloads
        self._more = False

    def rows(self, tasks: Iterable[Task]) -> list[Row | PlacedRow]:
        """The rows of the next tasks, as many as go in a statement, without the unique tasks.

        Raises ConfigError for a task that can't be enqueued.
        """
        rows: list[Row | PlacedRow] = []
        last, full = self.count + CHUNK, self.size + CHUNK_SIZE
        self._more = True
        for task in tasks:
            row = self._to_row(task)
            if type(task) is self._plain:
                rows.append(row)
            else:
                self._add_row(task, row, rows)
            self.count += 1
            self.size += len(row[1])
            if self.count == last or self.size >= full:
                return rows
        self._more = False
        return rows

    def _add_row(self, task: Task, row: Row, rows: list[Row | PlacedRow]) -> None:
        """Add the row of a task that may be unique, or whose class may have rules."""
        options = self._options.for_task(task)
        unique = self._options.unique.for_task(task)
        if unique is None and options is self._options:
            rows.append(row)
            if not self._is_unique_asked and type(task).unique is False:
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
        """Whether there may be more tasks than `rows` has returned."""
        return self._more

    def statements(self, rows: list[Row | PlacedRow], *, whole: bool = False) -> Iterator[Statement]:
        """The statements that insert these rows and the unique tasks.

        whole  True: one statement for all of them
        """
        keys = sorted(self._unique)
        if not keys and rows:
            yield build_bulk_insert(rows, self._options)
        start = 0
        while start < len(keys):
            end = len(keys) if whole else self._find_chunk_end(keys, start)
            chosen = [self._unique[key] for key in keys[start:end]]
            start = end
            more, rows = rows, []
            yield _build_placed_insert("enqueue_many_unique", [*chosen, *more], self._options)

    def _find_chunk_end(self, keys: list[str], start: int) -> int:
        size = 0
        for place in range(start, min(start + CHUNK, len(keys))):
            size += len(self._unique[keys[place]][1])
            if size >= CHUNK_SIZE:
                return place + 1
        return min(start + CHUNK, len(keys))

    def add_answer(self, answer: Sequence[Any]) -> None:
        """Take what a statement returned."""
        if answer and len(answer[0]) == 1:
            self._ids += [row[0] for row in answer]
            return
        for id, key, existed in answer:
            if key is None:
                self._ids.append(id)
            else:
                self._found[key] = id, existed

    def ids(self) -> Ids:
        """The ids of all tasks, in their order."""
        if not self._keys:
            return Ids(self._ids)
        rest = iter(self._ids)
        ids = [self._found[self._keys[n]][0] if n in self._keys else next(rest) for n in range(self.count)]
        return Ids(ids, (id for id, existed in self._found.values() if existed))


def check_one_statement(size: int) -> None:
    """Raise ConfigError if payloads of `size` characters together are too large for one statement."""
    if size > ONE_STATEMENT:
        raise ConfigError(
            f"the payloads of these tasks have more than {ONE_STATEMENT:,} characters together, which is the limit of "
            "one statement, and with conn= or then= all tasks go in one; enqueue them in several calls (with conn= all "
            "calls are in its transaction)"
        )


def build_bulk_insert(rows: Sequence[Row | PlacedRow], options: Options) -> Statement:
    """The statement that inserts rows which aren't unique."""
    if any(len(row) > 2 for row in rows):
        return _build_placed_insert("enqueue_many_placed", rows, options)
    return SQL["enqueue_many"], (*columns(rows), *options.columns, options.text())


def _build_placed_insert(name: str, rows: Sequence[Row | PlacedRow], options: Options) -> Statement:
    """A statement that takes a queue, a priority and options for each row."""
    queue, delay, run_at, priority, max_attempts = options.columns
    rest = (queue, priority, options.text())
    whole = [(*row[:2], *(row[2:] or rest)) for row in rows]
    types, payloads, queues, priorities, texts = map(list, zip(*whole, strict=True))
    return SQL[name], (types, payloads, queues, delay, run_at, priorities, max_attempts, texts)


def columns(rows: Sequence[Row | PlacedRow]) -> tuple[list[str], list[str]]:
    """The types and the payloads of rows."""
    return [row[0] for row in rows], [row[1] for row in rows]
