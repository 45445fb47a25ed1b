"""What a Task class says about itself, told apart from the payload's fields and from constants of its author's.

A setting is a class attribute without an annotation: `max_attempts = 5`. With an annotation and a value it would be a
field, and under another library's name (`max_retries = 3`) nothing at all: both did something else than they said, and
nobody heard of it. So a class is looked at when its handler is registered, or else when it is first enqueued.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from datetime import timedelta
from typing import Any, Final, cast, dataclass_transform

import msgspec

from .errors import ConfigError
from .options import OPTIONS

SETTINGS: Final = ("backoff", "timeout", *(name for name, option in OPTIONS.items() if option.of_class))
# Without `after`, which is a common name for a field of a payload.
ENQUEUE_ONLY: Final = tuple(name for name, option in OPTIONS.items() if not option.of_class and name != "after")
# What they are called elsewhere: in Celery, RQ, arq, dramatiq, taskiq, Oban, Sidekiq.
ALIASES: Final[Mapping[str, str]] = {
    **dict.fromkeys(
        (
            *("max_retries", "retries", "retry", "max_tries", "tries", "attempts", "retry_limit"),
            *("max_retry", "retry_count", "retry_attempts", "num_retries", "number_of_retries"),
        ),
        "max_attempts",
    ),
    **dict.fromkeys(("retry_backoff", "retry_delay", "default_retry_delay", "min_backoff", "max_backoff"), "backoff"),
    **dict.fromkeys(("time_limit", "soft_time_limit", "job_timeout", "task_timeout", "hard_time_limit"), "timeout"),
    **dict.fromkeys(("timeout_seconds", "timeout_s", "max_runtime", "max_run_time", "execution_timeout"), "timeout"),
    **dict.fromkeys(("concurrency", "max_concurrency", "concurrency_limit", "limit_running"), "limit"),
    **dict.fromkeys(("countdown", "defer_by", "delay_seconds"), "delay"),
    **dict.fromkeys(("eta", "defer_until", "scheduled_at", "schedule_at", "run_after"), "run_at"),
    "rate_limit": "rate",
    "queue_name": "queue",
    "routing_key": "queue",
    "prio": "priority",
    "unique_key": "unique",
    "concurrency_key": "limit_key",
}
MISSING: Final = ("expires", "expires_in", "expiry", "ttl", "job_ttl", "max_age")
NO_EXPIRY = "notifyq has no such setting; a handler can compare ctx.created_at with the time, and return notifyq.Cancel"
# Which errors are tried again, elsewhere a list of exceptions, is said by the handler.
BY_ERROR: Final = (
    *("autoretry_for", "dont_autoretry_for", "retry_for", "retry_on", "retry_when", "no_retry_on", "dont_retry_on"),
    *("dead_on", "discard_on", "throws"),
)
NO_LIST = (
    "notifyq has no such setting; a handler's error is tried again, unless the handler catches it and returns "
    "notifyq.Dead(error)"
)
NEAR = 0.85  # how similar a misspelt name is
LONG = 7  # letters of a name that is looked for among fields too: short words have too many neighbours


def meant(name: str, known: tuple[str, ...] = (*SETTINGS, *ENQUEUE_ONLY)) -> str | None:
    """The setting, or the option of enqueue, that somebody who writes this name means; None: none."""
    if name in known or (name in MISSING and known[: len(SETTINGS)] == SETTINGS):
        return name
    if name in ALIASES and ALIASES[name] in known:
        return ALIASES[name]
    near = difflib.get_close_matches(name, known, n=1, cutoff=NEAR)
    return near[0] if near else None


@dataclass_transform(field_specifiers=(msgspec.field,))
class StructMeta(msgspec.StructMeta):
    """The class of Task and its subclasses: a Struct's, with a better message for one mistake."""

    def __new__(mcls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **config: Any) -> Any:
        if "__slots__" in namespace and "__qualname__" not in namespace:
            # msgspec.defstruct, in the middle of making a class: it has `type` make it, which leaves that to this
            # metaclass, and then fills in by itself what the fields are.
            rest = {key: value for key, value in namespace.items() if key != "__slots__"}
            return super().__new__(mcls, name, bases, rest, kw_only=True)
        try:
            return super().__new__(mcls, name, bases, namespace, **config)
        except TypeError:
            # `timeout: float = 30.0` before a field: msgspec complains of an optional field before a required one.
            for field in namespace.get("__annotations__", {}):
                _check_field(name, field, namespace.get(field))
            raise


def check(cls: Any) -> None:
    """Raise ConfigError for what looks like a setting of this Task class, and is none."""
    for name, value in _defaults(cls):
        _check_field(cls.__name__, name, value)
    for name, value in _attributes(cls):
        _check_attribute(cls.__name__, name, value)


def _defaults(cls: Any) -> Iterator[tuple[str, object]]:
    return zip(reversed(cls.__struct_fields__), reversed(cls.__struct_defaults__), strict=False)


def _attributes(cls: Any) -> Iterator[tuple[str, object]]:
    """Those without an annotation, and ClassVars; inherited ones and those of mixins too."""
    for base in cls.__mro__:
        if base.__module__ not in (f"{__package__}.task", "builtins", "typing", "msgspec", "msgspec._core"):
            for name, value in cast("dict[str, object]", vars(base)).items():
                if not name.startswith("_") and name not in cls.__struct_fields__:
                    yield name, value


def _is_setting(value: object) -> bool:
    """Whether it could be meant as the value of a setting: 0, "", None, a list or a function says nothing."""
    return bool(value) and isinstance(value, int | float | str | tuple | timedelta)


def _check_field(task: str, name: str, value: object) -> None:
    if name in BY_ERROR and value:
        raise ConfigError(f"task {task}: {name!r}: {NO_LIST}")
    known = (*SETTINGS, *ENQUEUE_ONLY)
    if not _is_setting(value) or (setting := meant(name)) is None:
        return
    if name not in (*known, *ALIASES, *MISSING) and len(setting) < LONG:
        return
    other = (
        "or, if the payload is to have it, name the field otherwise: "
        f"`{name}_: ... = msgspec.field(default={value!r}, name={name!r})`"
    )
    if setting in MISSING or setting in ENQUEUE_ONLY:
        raise ConfigError(f"{_no_setting(task, name, setting)}; {other}")
    what = "is a setting of the class, not a field of the payload"
    if name != setting:
        what = f"is not a setting, and a field of the payload as it stands; did you mean {setting!r}?"
    raise ConfigError(f"task {task}: {name!r} {what}; write `{setting} = ...` without an annotation; {other}")


def _check_attribute(task: str, name: str, value: object) -> None:
    if name in BY_ERROR and value and not callable(getattr(value, "__get__", None)):
        raise ConfigError(f"task {task}: {name!r}: {NO_LIST}; a constant of your own: name it _{name}")
    if not _is_setting(value) or (setting := meant(name)) is None or (name == setting and setting in SETTINGS):
        return
    if setting in SETTINGS:
        raise ConfigError(
            f"task {task}: there is no setting {name!r}; did you mean {setting!r}? (a constant of your own: name it "
            f"_{name})"
        )
    raise ConfigError(f"{_no_setting(task, name, setting)}; a constant of your own: name it _{name}")


def _no_setting(task: str, name: str, meant: str) -> str:
    if meant in MISSING:
        return f"task {task}: {name!r}: {NO_EXPIRY}"
    return (
        f"task {task}: {name!r} is no setting of a class; it is said of each task when that is enqueued: "
        f"app.enqueue(task, {meant}=...)"
    )
