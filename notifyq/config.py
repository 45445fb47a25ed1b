"""What can be set: the DSN, and a worker's dozen settings. Checked where it is made; units are in the names."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping

import msgspec

from .errors import ConfigError

NAME_LENGTH = 200  # of a queue or a type, in characters: schema.sql has the same CHECK


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's settings. `__post_init__` raises ConfigError, naming the field and what was expected."""

    queues: dict[str, int | None]  # name -> how many may run at once in this worker
    concurrency: int = 100  # handlers at once
    shutdown_timeout_seconds: float = 25.0  # until running handlers are cancelled and handed back
    poll_interval_seconds: float = 5.0  # the fallback for a bell that fails; 0 switches it off
    lease_seconds: float = 30.0  # without a heartbeat for so long, a worker counts as dead
    history_seconds: float = 86400.0  # how long done and cancelled tasks are kept; 0: not at all
    drain: bool = False  # return when nothing is runnable

    def __post_init__(self) -> None:
        if not self.queues:
            raise ConfigError("queues is empty; name at least one, such as 'default'")
        for queue, limit in self.queues.items():
            check_name("queue", queue)
            if limit is not None and limit < 1:
                raise ConfigError(f"queue {queue!r} has limit {limit}; expected 1 or more, or no limit")
        if self.concurrency < 1 or self.concurrency > 10_000:
            raise ConfigError(f"concurrency is {self.concurrency}; expected 1 to 10000")
        for name, least in (
            ("shutdown_timeout_seconds", 0.0),
            ("poll_interval_seconds", 0.0),
            ("lease_seconds", 6.0),  # the heartbeat is every 1.5 s and may miss a few
            ("history_seconds", 0.0),
        ):
            value = getattr(self, name)
            if not (math.isfinite(value) and least <= value <= 366 * 86400):
                raise ConfigError(f"{name} is {value}; expected seconds, from {least:g} to a year")


def check_name(what: str, name: str) -> None:
    """Raise ConfigError unless PostgreSQL can hold `name` and schema.sql allows it."""
    if not name or len(name) > NAME_LENGTH or "\x00" in name:
        shown = name if len(name) <= 40 else name[:40] + "..."
        raise ConfigError(f"{what} {shown!r}: expected 1 to {NAME_LENGTH} characters, none of them NUL")


def parse_queues(queues: Iterable[str] | Mapping[str, int | None]) -> dict[str, int | None]:
    """{"mail": 5, "default": None} from ["mail:5", "default"]; a mapping is taken as it is.

    A name may hold colons; what follows the last one is the limit if it is a number.
    """
    if isinstance(queues, Mapping):
        return dict(queues)
    if isinstance(queues, str):
        raise ConfigError(f"queues is the string {queues!r}; expected a list of names, [{queues!r}]")
    parsed: dict[str, int | None] = {}
    for text in queues:
        name, colon, limit = text.rpartition(":")
        if not colon:
            name, number = text, None
        elif re.fullmatch(r"[0-9]{1,5}", limit):
            number = int(limit)
        elif name and (not limit or re.fullmatch(r"[-+]?[0-9.]+", limit)):
            raise ConfigError(f"queue {text!r}: expected NAME or NAME:LIMIT, the limit a number from 1")
        else:
            name, number = text, None
        if name in parsed:
            raise ConfigError(f"queue {name!r} is named twice")
        parsed[name] = number
    return parsed


def resolve_dsn(dsn: str | None, environ: Mapping[str, str] = os.environ) -> tuple[str | None, str]:
    """The DSN to use and where it comes from: `dsn`, else NOTIFYQ_DSN, else DATABASE_URL, else libpq's PG*.

    A "+driver" in the scheme, which SQLAlchemy's URLs have, is dropped. None as a DSN leaves it to asyncpg,
    which reads PG* and has libpq's defaults. Raises ConfigError for what isn't a PostgreSQL URL.
    """
    for text, source in (
        (dsn, "--dsn"),
        (environ.get("NOTIFYQ_DSN"), "NOTIFYQ_DSN"),
        (environ.get("DATABASE_URL"), "DATABASE_URL"),
    ):
        if not text:
            continue
        scheme, separator, rest = text.strip().partition("://")
        if not separator or scheme.partition("+")[0] not in ("postgresql", "postgres"):
            shown = f"{scheme}://..." if separator else "no URL"
            raise ConfigError(f"{source} is {shown}; expected postgresql://user:password@host:5432/database")
        return f"postgresql://{rest}", source
    return None, "the PG* environment variables"


def redact(text: str) -> str:
    """`text` with the password of every URL and `password=` in it replaced by ***, for people's eyes."""
    text = re.sub(r"(://[^:/@\s]*):[^\s]*@", r"\1:***@", text)
    return re.sub(r"(password=)[^&\s]*", r"\1***", text, flags=re.IGNORECASE)
