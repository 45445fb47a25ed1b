"""The options of enqueue, one row each: what values an option takes, and where else it may be given.

These read the table:

    client/options.py  checks the keywords of enqueue, and writes their JSON
    rules.py, unique.py  check what a Task class says of its tasks
    settings.py        knows the names, for "did you mean"
    cli/enqueue.py     makes a flag of each row

CONTRIBUTING.md has the recipe for a new option.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, Final, Literal, NamedTuple, Protocol, TypeAlias, cast, get_args

from .config import check_name, check_queue, in_seconds, is_int, is_number
from .errors import ConfigError

State: TypeAlias = Literal["scheduled", "ready", "running", "done", "dead", "cancelled"]
STATES: tuple[str, ...] = get_args(State)
ENDED: Final = ("done", "dead", "cancelled")

AFTER_MOST: Final = 10_000  # ids that a task may wait for
LONGEST_SECONDS: Final = 1e9  # schema.sql has the same limit
TIME_UNITS: Final = {
    **dict.fromkeys(("s", "sec", "second"), 1),
    **dict.fromkeys(("m", "min", "minute"), 60),
    **dict.fromkeys(("h", "hour"), 3600),
    **dict.fromkeys(("d", "day"), 86400),
}
RATE: Final = re.compile(rf"([0-9]{{1,9}})\s*/\s*([0-9]{{0,9}})\s*({'|'.join(TIME_UNITS)})")


class Kind(Protocol):
    """What values an option takes."""

    def check(self, what: str, value: Any, /) -> Any:
        """Return the value as it is kept. Raises ConfigError that begins with `what`, the option's name."""
        ...


class Name(NamedTuple):
    """A key: 1 to 200 characters. A queue's name has no spaces, commas and colons either."""

    of_queue: bool = False

    def check(self, what: str, value: Any) -> str:
        if self.of_queue:
            check_queue(what, value)
        else:
            check_name(what, value, 'a key, a str such as "account:7"')
        return cast("str", value)


class Whole(NamedTuple):
    """A whole number from `low` to `high`."""

    low: int
    high: int
    expected: str = ""

    def check(self, what: str, value: Any) -> int:
        if not is_int(value) or not self.low <= value <= self.high:
            raise ConfigError(f"{what} is {value!r}; expected {self.expected or f'{self.low} to {self.high}'}")
        return value


class Seconds(NamedTuple):
    """Seconds or a timedelta, up to `most`; kept as seconds. 0 is refused if `above_zero`."""

    most: float
    above_zero: bool = False

    def check(self, what: str, value: Any) -> float:
        seconds: Any = in_seconds(value)
        # A NaN fails these comparisons too.
        if not (is_number(seconds) and 0 <= seconds <= self.most) or (self.above_zero and seconds == 0):
            least = "seconds above 0" if self.above_zero else "seconds, 0 or more"
            raise ConfigError(f"{what} is {seconds!r}; expected {least}, or a timedelta")
        return seconds


class Moment(NamedTuple):
    """An aware datetime."""

    def check(self, what: str, value: Any) -> datetime:
        if not isinstance(value, datetime) or value.tzinfo is None:
            raise ConfigError(
                f"{what} is {value!r}; expected a datetime with a timezone, as datetime.now(timezone.utc)"
            )
        return value


class Rate(NamedTuple):
    """A count and a time: "100/minute"."""

    def check(self, what: str, value: Any) -> str:
        parse_rate(value, what)
        return cast("str", value)


class OneOf(NamedTuple):
    """One of a few words."""

    words: tuple[str, ...]
    beside: str = ""

    def check(self, what: str, value: Any) -> str:
        if value not in self.words:
            raise ConfigError(f"{what} is {value!r}; expected {_listed(self.words)}{self.beside}")
        return cast("str", value)


class SomeOf(NamedTuple):
    """Some of a few words: any iterable of them, kept as a tuple."""

    words: tuple[str, ...]

    def check(self, what: str, value: Any) -> tuple[str, ...]:
        is_many = not isinstance(value, str) and isinstance(value, Iterable)
        chosen = tuple(cast("Iterable[str]", value)) if is_many else ()
        if not chosen or not all(word in self.words for word in chosen):
            raise ConfigError(f"{what} is {value!r}; expected a tuple of {', '.join(self.words)}")
        return chosen


class Ids(NamedTuple):
    """A list of ids of tasks; kept each once, in their order."""

    most: int

    def check(self, what: str, value: Any) -> list[int]:
        ids: list[Any] = value
        for id in ids:
            if not is_id(id):
                raise ConfigError(f"{what} has {id!r} in it; expected what enqueue returned, or ids")
        if len(ids) > self.most:
            raise ConfigError(f"{what} has {len(ids)} tasks; expected {self.most} at most")
        return list(dict.fromkeys(ids))


class UniqueRule(NamedTuple):
    """A key, or whether and of which fields one is made."""

    def check(self, what: str, value: Any) -> str | bool | tuple[str, ...]:
        if isinstance(value, str):
            check_name(what, value)
        elif not isinstance(value, bool) and not is_names(value):
            raise ConfigError(f"{what} is {value!r}; expected a key, True, or a tuple of the payload's fields' names")
        return cast("str | bool | tuple[str, ...]", value)


class Option(NamedTuple):
    """One option of enqueue. A value of None means that it isn't given, unless it is `required`."""

    kind: Kind
    metavar: str  # of its flag
    help: str  # of its flag
    flags: tuple[str, ...] = ()  # its flags, where they aren't --<name>
    of_class: bool = False  # a Task class may give it too
    required: bool = False
    json: str | None = None  # its name in the column `options`; None: it is a column of its own, or one of `unique`


OPTIONS: Final[Mapping[str, Option]] = {
    "queue": Option(
        Name(of_queue=True),
        "NAME",
        "into this queue  [default: its class's queue, with --app; else default]",
        flags=("-q", "--queue"),
        of_class=True,
        required=True,
    ),
    "delay": Option(
        Seconds(100 * 366 * 86400), "TIME", "don't start it before this time has passed: 90s, 15m, 12h, 1d"
    ),
    "run_at": Option(Moment(), "TIME", "don't start it before this moment: 2030-01-31T08:00:00Z"),
    "priority": Option(
        Whole(-32768, 32767),
        "N",
        "-32768 to 32767; tasks with a higher one start first",
        of_class=True,
        required=True,
    ),
    "max_attempts": Option(
        Whole(1, 32767),
        "N",
        "after this many failed attempts it is dead  [default: what its class says]",
        of_class=True,
    ),
    "order_key": Option(
        Name(),
        "KEY",
        "of the tasks with this key one runs at a time, in the order of their ids",
        of_class=True,
        json="order_key",
    ),
    "limit_key": Option(
        Name(),
        "KEY",
        "--limit and --rate are for the tasks with this key, over all workers",
        of_class=True,
        json="limit_key",
    ),
    "limit": Option(
        Whole(1, 2**31 - 1, "how many may run at once, 1 or more"),
        "N",
        "at most N tasks with the --limit-key run at the same time",
        flags=("--limit-running", "--limit"),
        of_class=True,
        json="limit_running",
    ),
    "rate": Option(
        Rate(),
        "RATE",
        "at most this many tasks with the --limit-key start in any such time: 100/minute, 5/s, 20/10s",
        of_class=True,
        json="limit_rate",
    ),
    "after": Option(Ids(AFTER_MOST), "ID", "start it when this task is done; repeatable", json="after"),
    "on_dead": Option(
        OneOf(("cancel", "run"), ", beside after=[...]"),
        "",
        "what to do if a task of --after ends dead or cancelled  [default: cancel]",
        json="on_dead",
    ),
    "expires": Option(
        Seconds(LONGEST_SECONDS, above_zero=True),
        "TIME",
        "cancel it if it hasn't started TIME after it was due",
        of_class=True,
        json="expires",
    ),
    "unique": Option(
        UniqueRule(),
        "KEY",
        "while another task with this key hasn't ended, enqueue nothing, and print that one's id",
        of_class=True,
    ),
    "unique_for": Option(
        Seconds(LONGEST_SECONDS, above_zero=True),
        "TIME",
        "count only a task that was enqueued within TIME; a done one counts too",
        of_class=True,
    ),
    "unique_states": Option(
        SomeOf(STATES),
        "STATE",
        "count only tasks in this state; repeatable  [default: those that haven't ended]",
        of_class=True,
    ),
    "on_conflict": Option(
        OneOf(("keep", "replace", "move")),
        "",
        "while that task waits: leave it alone, give it this payload, or give it this time  [default: keep]",
        of_class=True,
    ),
}


def to_json(given: Mapping[str, Any]) -> dict[str, object]:
    """The column `options` for these checked options, as schema.sql reads it."""
    stored: dict[str, object] = {}
    for name, value in given.items():
        option = OPTIONS[name]
        if isinstance(option.kind, Rate):
            stored["limit_rate"], stored["limit_seconds"] = parse_rate(value)
        elif option.json is not None:
            stored[option.json] = value
    return stored


def parse_rate(rate: str, what: str = "rate") -> tuple[int, float]:
    """(100, 60.0) of "100/minute": a count, and seconds. Raises ConfigError for anything else."""
    match = RATE.fullmatch(rate) if isinstance(rate, str) else None
    if match is None or not int(match[1]) or match[2] == "0":
        raise ConfigError(f'{what} is {rate!r}; expected how many in what time, as "100/minute", "5/s" or "20/10s"')
    seconds = float(int(match[2] or 1) * TIME_UNITS[match[3]])
    if seconds > LONGEST_SECONDS:
        raise ConfigError(f"{what} is {rate!r}; expected a time of 1e9 s at most")
    return int(match[1]), seconds


def is_id(id: object) -> bool:
    """Whether a task can have this id."""
    return is_int(id) and 1 <= id < 2**63


def is_names(names: object) -> bool:
    """Whether this is a tuple of names, at least one."""
    parts = cast("tuple[object, ...]", names) if isinstance(names, tuple) else ()
    return bool(parts) and all(isinstance(name, str) for name in parts)


def _listed(words: tuple[str, ...]) -> str:
    *first, last = map(repr, words)
    return f"{', '.join(first)} or {last}"
