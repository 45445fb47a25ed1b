"""What the flags of all commands share: their environment variables, and the types of their values."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Callable, Generator, Iterable
from contextlib import contextmanager
from datetime import datetime
from typing import Any, TypeVar

import click

from notifyq.errors import ConfigError
from notifyq.options import OPTIONS, parse_rate

Command = TypeVar("Command", bound=Callable[..., Any])

UNITS = {"": 1.0, "s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}
LONGEST_SECONDS = 100 * 366 * 86400.0
# The name of one of enqueue's options in a message: `limit_key` or `limit=`, but not the word "limit", and not a quoted
# 'limit_key'.
OPTION = re.compile(rf"(?<!['\w])(?=\w*[_=])({'|'.join(OPTIONS)})\b(= ?)?")


def option(*names: str, **settings: Any) -> Callable[[Command], Command]:
    """click.option without an environment variable: its value is meant for one call of a command.

    A container has one environment for all commands: NOTIFYQ_QUEUE of its worker must not name the queue into which
    `notifyq enqueue` puts a task.
    """
    settings.setdefault("show_default", "default" in settings)
    return click.option(*names, **settings)


def setting(*names: str, **settings: Any) -> Callable[[Command], Command]:
    """`option` with the environment variable NOTIFYQ_<FLAG>, which --help shows: for a setting of a whole process."""
    flag = next(name for name in names if name.startswith("--"))
    variable = "NOTIFYQ_" + flag[2:].replace("-", "_").upper()
    return option(*names, envvar=variable, show_envvar=True, **settings)


def dsn_option(command: Command) -> Command:
    """The flag --dsn. config.resolve_dsn reads its environment variables, so a message can name the one in use."""
    variables = "env var: NOTIFYQ_DSN, else DATABASE_URL, else PG*"
    return click.option("--dsn", metavar="URL", help=f"postgresql://user:password@host/database  [{variables}]")(
        command
    )


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'this' or 'that'?`, or "" if no known word is close."""
    close = difflib.get_close_matches(word.lower(), by_lower := {name.lower(): name for name in known}, n=3)
    return f"; did you mean {' or '.join(repr(by_lower[name]) for name in close)}?" if close else ""


@contextmanager
def as_flags() -> Generator[None, None, None]:
    """Rewrite a ConfigError about enqueue's options to name flags: --limit-key for limit_key, --limit 3 for limit=3."""
    try:
        yield
    except ConfigError as error:
        said = OPTION.sub(lambda m: f"--{m[1].replace('_', '-')}{' ' if m[2] else ''}", str(error))
        raise ConfigError(said) from error


# Types of values: functions that click calls. click adds the flag's name to a BadParameter.


def word(*words: str) -> Callable[[str], str]:
    """One of these words."""

    def convert(value: str) -> str:
        if (found := value.lower()) not in words:
            guess = did_you_mean(value, words)
            raise click.BadParameter(f"{value!r} is not one of {', '.join(words)}{guess}")
        return found

    return convert


def number(low: int, high: int) -> Callable[[str], int]:
    """A whole number from low to high."""

    def convert(value: str) -> int:
        if not (re.fullmatch(r"-?[0-9]{1,20}", text := str(value)) and low <= int(text) <= high):
            raise click.BadParameter(f"{value!r} is not a number from {low} to {high}")
        return int(text)

    return convert


task_id = number(1, 2**63 - 1)


def duration(value: str) -> float:
    """Seconds, or a number with a unit."""
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd]?)", value.strip())
    seconds = float(found[1]) * UNITS[found[2]] if found else math.inf
    if seconds > LONGEST_SECONDS:
        raise click.BadParameter(f"{value!r} is not a duration; expected seconds, or 90s, 15m, 12h, 1d")
    return seconds


def rate(value: str) -> str:
    """A count and a time, as 100/minute."""
    try:
        parse_rate(value)
    except ConfigError as error:
        raise click.BadParameter(str(error)) from None
    return value


def moment(value: str) -> datetime:
    """A time in ISO 8601 with its zone."""
    expected = "expected ISO 8601 with a zone: 2030-01-31T08:00:00Z or 2030-01-31T08:00:00+01:00"
    try:
        found = datetime.fromisoformat(value)
    except ValueError:
        raise click.BadParameter(f"{value!r} is not a time; {expected}") from None
    if found.tzinfo is None:
        raise click.BadParameter(f"{value!r} has no zone; {expected}")
    return found
