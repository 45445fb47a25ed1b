"""Settings: the DSN, and those of a worker. They are checked where they are made; units are in their names."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from datetime import timedelta
from typing import TypeGuard, TypeVar, cast

import msgspec

from .database.dsn import pair_parameters, url_of
from .errors import ConfigError

_Value = TypeVar("_Value")

NAME_LENGTH = 200  # characters of a queue, a type or a key; schema.sql has the same limit for keys

_ENCODE = "write / as %2F, ? as %3F, # as %23, @ as %40, : as %3A, [ as %5B, ] as %5D and % as %25"


class WorkerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """A worker's settings. A wrong value raises ConfigError that names the field and what is expected."""

    queues: dict[str, int | None]  # by name, at most how many of its tasks run at once in this worker; None: any number
    concurrency: int = 100  # how many handlers run at the same time
    threads: int | None = None  # how many of these may be plain handlers, in threads; None: default_threads()
    shutdown_timeout_seconds: float = 25.0  # after it, running handlers are cancelled and their tasks handed back
    poll_interval_seconds: float = 5.0  # between looks for tasks without a notification; 0: never
    lease_seconds: float = 30.0  # after this time without a heartbeat, the worker counts as dead
    history_seconds: float = 86400.0  # how long done and cancelled tasks are kept; 0: not at all
    drain: bool = False  # return when no task is left that could run now

    def __post_init__(self) -> None:
        if not self.queues:
            raise ConfigError("queues is empty; name at least one, such as 'default'")
        for queue, limit in self.queues.items():
            check_name("queue", queue)
            if limit is not None and (not is_int(limit) or limit < 1):
                raise ConfigError(f"queue {queue!r} has limit {limit!r}; expected 1 or more, or no limit")
        if not is_int(self.concurrency) or not 1 <= self.concurrency <= 10_000:
            raise ConfigError(f"concurrency is {self.concurrency!r}; expected 1 to 10000")
        if self.threads is not None and not (is_int(self.threads) and 1 <= self.threads <= 10_000):
            raise ConfigError(f"threads is {self.threads!r}; expected 1 to 10000")
        for name, least in (
            ("shutdown_timeout_seconds", 0.0),
            ("poll_interval_seconds", 0.0),
            ("lease_seconds", 6.0),  # the heartbeat is every 1.5 s and may miss a few
            ("history_seconds", 0.0),
        ):
            value = getattr(self, name)
            if not (is_number(value) and least <= value <= 366 * 86400):  # a NaN fails this too
                raise ConfigError(f"{name} is {value!r}; expected seconds, from {least:g} to a year")

    @property
    def most_threads(self) -> int:
        """At most how many plain handlers run at the same time."""
        return min(self.concurrency, self.threads or default_threads())


def default_threads() -> int:
    """4 more than the CPUs that this process may use, at most 32, as in Python's ThreadPoolExecutor."""
    affinity = getattr(os, "sched_getaffinity", None)
    return min(32, (len(affinity(0)) if affinity else os.cpu_count() or 1) + 4)


def check_name(what: str, name: str, expected: str = "its name, a str") -> None:
    """Raise ConfigError unless PostgreSQL can hold `name` and schema.sql allows it."""
    if not isinstance(name, str):
        raise ConfigError(f"{what} is {name!r}; expected {expected}")
    # A lone surrogate isn't a character, and can't be written as UTF-8.
    if not 1 <= len(name) <= NAME_LENGTH or "\x00" in name or any("\ud800" <= c <= "\udfff" for c in name):
        shown = name if len(name) <= 40 else name[:40] + "..."
        raise ConfigError(f"{what} {shown!r}: expected 1 to {NAME_LENGTH} characters, none of them NUL")


def check_queue(what: str, name: str) -> None:
    """Raise ConfigError for a queue's name that `notifyq worker -q` would read as several names, or one with a limit.

    Plain SQL may insert into a queue of such a name. run_worker can serve it: queues={name: None}.
    """
    check_name(what, name)
    if re.search(r"[\s,:]", name):
        raise ConfigError(
            f"{what} {name!r}: a name has no spaces, commas or colons; for several queues of a worker repeat -q, or "
            "put spaces between them in NOTIFYQ_QUEUE; a limit is a number, and said to the worker: -q mail:5"
        )


def is_int(value: object) -> TypeGuard[int]:
    """Whether this is an int. True and False aren't, though Python says so: as a number they are a mistake."""
    return isinstance(value, int) and not isinstance(value, bool)


def is_number(value: object) -> TypeGuard[int | float]:
    """Whether this is an int or a float, but not True or False."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def in_seconds(value: _Value | timedelta) -> _Value | float:
    """The seconds of a timedelta; any other value as it is."""
    return value.total_seconds() if isinstance(value, timedelta) else value


def parse_queues(queues: Iterable[str] | Mapping[str, int | None]) -> dict[str, int | None]:
    """{"mail": 5, "default": None} from ["mail:5", "default"]; a mapping is taken as it is.

    A name may have colons: a number after the last one is the limit. Raises ConfigError.
    """
    if isinstance(queues, Mapping):
        return dict(cast("Mapping[str, int | None]", queues))
    if isinstance(queues, str):
        raise ConfigError(f"queues is the string {queues!r}; expected a list of names, [{queues!r}]")
    parsed: dict[str, int | None] = {}
    for text in queues:
        if not isinstance(text, str):
            raise ConfigError(f"queues has {text!r} in it; expected names, or a mapping of names to limits")
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

    The "+driver" in the scheme of SQLAlchemy's URLs is dropped, and a string of key=value becomes a URL. A DSN of None
    means the PG* variables and libpq's defaults. database/hosts.py finds the servers of each. Raises ConfigError for
    any other text.
    """
    for text, source in (
        (dsn, "the given DSN"),
        (environ.get("NOTIFYQ_DSN"), "NOTIFYQ_DSN"),
        (environ.get("DATABASE_URL"), "DATABASE_URL"),
    ):
        if not text:
            continue
        scheme, separator, rest = text.strip().partition("://")
        if separator and scheme.partition("+")[0] in ("postgresql", "postgres"):
            _check_authority(rest, source)
            return f"postgresql://{rest}", source
        if re.match(r"\s*[a-z_]+\s*=", text):
            try:
                return url_of(pair_parameters(text)), source
            except ValueError as error:
                raise ConfigError(f"{source} can't be used: {error}") from None
        shown = f"{scheme}://..." if separator and re.fullmatch("[a-z][a-z0-9+.-]*", scheme) else "no URL"
        raise ConfigError(f"{source} is {shown}; expected postgresql://user:password@host:5432/database")
    return None, "the PG* environment variables"


def _check_authority(rest: str, source: str) -> None:
    """Raise ConfigError for a password with characters that end it: its rest would be shown in messages as a host."""
    before, _, query = rest.partition("?")
    authority, _, path = before.partition("/")
    servers = authority.rpartition("@")[2]
    if authority.count("[") != authority.count("]") or not re.fullmatch(r"(\[[^\[\]]*\]|[^\[\]])*", servers):
        raise ConfigError(f"{source} is no URL; in a password, {_ENCODE}")
    ports = [host.partition(":")[2] for host in re.sub(r"\[[^\]]*\]", "", servers).split(",")]
    # A user or a password stands before an @, so an @ after the path or the query has begun is part of a password.
    astray = "@" in path or ("@" in query and "@" not in authority and "/" not in before)
    if astray or not all(port == "" or (port.isascii() and port.isdigit() and int(port) < 65536) for port in ports):
        raise ConfigError(f"{source} has no number for a port; in a password, {_ENCODE}")


def redact(text: str) -> str:
    """`text` with the password of each URL and of each `password=` replaced by ***, to be shown in a message.

    It replaces too much rather than too little: up to the last @ of the text, and up to the next &.
    """
    text = re.sub(r"([?&]\w*password=)[^&]*", r"\1***", text, flags=re.IGNORECASE)
    text = re.sub(r"(://[^:]*):.*@", r"\1:***@", text, flags=re.DOTALL)
    return re.sub(r"(\bpassword=)[^&\s]*", r"\1***", text, flags=re.IGNORECASE)
