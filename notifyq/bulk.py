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
from .unique import NOTHING, Unique

Row: TypeAlias = tuple[str, str]  # type and payload
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
        self._unique: dict[str, tuple[Row, Unique]] = {}
        self._found: dict[str, tuple[int, bool]] = {}
        self._ids: list[int] = []  # of the others
        self.count = 0

    def rows(self, tasks: Iterable[Task]) -> list[Row]:
        """Of the next ones, those that aren't unique. Raises ConfigError for what can't be enqueued."""
        rows: list[Row] = []
        for task in tasks:
            row = self._encode(task)
            if (self._asked or type(task).unique) and (unique := self._options.unique.of(task)) is not None:
                self._keys[self.count] = unique.key
                if unique.key not in self._unique or unique.on_conflict != "keep":
                    self._unique[unique.key] = row, unique
            else:
                rows.append(row)
            self.count += 1
        return rows

    def statements(self, rows: list[Row], most: int | None = None) -> Iterator[Statement]:
        """To insert these, and at most so many unique ones in each."""
        keys = sorted(self._unique)
        if not keys and rows:
            yield plain(rows, self._options)
        for start in range(0, len(keys), most or len(keys) or 1):
            chosen = [self._unique[key] for key in keys[start:][:most]]
            more, rows = rows, []
            texts = [*(self._options.text(unique) for _, unique in chosen), *([self._options.text()] * len(more))]
            types, payloads = columns([*(row for row, _ in chosen), *more])
            yield SQL["enqueue_many_unique"], (types, payloads, *self._options.values, texts)

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


def plain(rows: list[Row], options: Options) -> Statement:
    return SQL["enqueue_many"], (*columns(rows), *options.values, options.text())


def columns(rows: list[Row]) -> tuple[list[str], list[str]]:
    return [type for type, _ in rows], [payload for _, payload in rows]
