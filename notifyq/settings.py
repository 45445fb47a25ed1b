"""The settings of a Task class, told apart from fields of the payload and from constants of the author's own.

A setting is a class attribute without an annotation: `max_attempts = 5`. With an annotation and a value it is a field
of the payload, and under another library's name (`max_retries = 3`) it has no effect. Both are silent mistakes. So a
class is checked when its handler is registered, or else when a task of it is first enqueued.
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
# Names of the same in other libraries: Celery, RQ, arq, dramatiq, taskiq, Oban, Sidekiq.
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
    **dict.fromkeys(("expires_in", "expiry", "ttl", "job_ttl", "max_age"), "expires"),
    "rate_limit": "rate",
    "queue_name": "queue",
    "routing_key": "queue",
    "prio": "priority",
    "unique_key": "unique",
    "concurrency_key": "limit_key",
}

# Other libraries list the exceptions that are tried again. Here the handler decides.
BY_ERROR: Final = (
    *("autoretry_for", "dont_autoretry_for", "retry_for", "retry_on", "retry_when", "no_retry_on", "dont_retry_on"),
    *("dead_on", "discard_on", "throws"),
)
NO_LIST = (
    "notifyq has no such setting; a handler's error is tried again, unless the handler catches it and returns "
    "notifyq.Dead(error)"
)
# By what else the type of a task goes: it is no attribute but an argument of the class.
NAMES_OF_TAG: Final = ("tag", "type", "type_name", "task_name", "task_type")
NEAR = 0.85  # how similar a misspelt name is to the right one
LONG = 7  # letters: a misspelt field is compared with settings of this length only, as short words are often similar


def find_meant(name: str, known: tuple[str, ...] = (*SETTINGS, *ENQUEUE_ONLY)) -> str | None:
    """The setting, or the option of enqueue, that an author who writes this name means; None: none of them."""
    if name in known:
        return name
    if name in ALIASES and ALIASES[name] in known:
        return ALIASES[name]
    near = difflib.get_close_matches(name, known, n=1, cutoff=NEAR)
    return near[0] if near else None


def unknown_option(function: str, name: str, known: tuple[str, ...]) -> ConfigError:
    """The error for an option that a function, of these `known` options, doesn't have."""
    if name in SETTINGS:
        hint = f"it is a setting of the task's class: write `{name} = ...` there"
    else:
        near = find_meant(name, known)
        hint = f"did you mean {near}?" if near else f"it has {', '.join(known)}"
    return ConfigError(f"{function} has no option {name!r}; {hint}")


@dataclass_transform(field_specifiers=(msgspec.field,))
class StructMeta(msgspec.StructMeta):
    """The metaclass of Task and its subclasses: msgspec's, with a better message for one mistake."""

    def __new__(mcls, name: str, bases: tuple[type, ...], namespace: dict[str, Any], **config: Any) -> Any:
        if "__slots__" in namespace and "__qualname__" not in namespace:
            # The call comes from msgspec.defstruct: it lets `type` make the class, which calls this metaclass, and
            # fills in the fields afterwards.
            rest = {key: value for key, value in namespace.items() if key != "__slots__"}
            return super().__new__(mcls, name, bases, rest, kw_only=True)
        try:
            return super().__new__(mcls, name, bases, namespace, **config)
        except TypeError:
            # `timeout: float = 30.0` before a required field: msgspec would name that field and not the setting.
            for field in namespace.get("__annotations__", {}):
                _check_field(name, field, namespace.get(field))
            for argument, value in config.items():
                _check_argument(name, argument, value)
            raise


def check(cls: Any) -> None:
    """Raise ConfigError for a field or attribute of this Task class that looks like a setting, and isn't one."""
    for name, value in _defaults(cls):
        _check_field(cls.__name__, name, value)
    for name, value in _attributes(cls):
        _check_attribute(cls.__name__, name, value)


def _defaults(cls: Any) -> Iterator[tuple[str, object]]:
    return zip(reversed(cls.__struct_fields__), reversed(cls.__struct_defaults__), strict=False)


def _attributes(cls: Any) -> Iterator[tuple[str, object]]:
    """The class attributes without an annotation, and ClassVars; those of base classes and mixins too."""
    for base in cls.__mro__:
        if base.__module__ not in (f"{__package__}.task", "builtins", "typing", "msgspec", "msgspec._core"):
            for name, value in cast("dict[str, object]", vars(base)).items():
                if not name.startswith("_") and name not in cls.__struct_fields__:
                    yield name, value


def _is_setting(value: object) -> bool:
    """Whether a setting may have this value: 0, "", None, a list and a function aren't meant as one."""
    return bool(value) and isinstance(value, int | float | str | tuple | timedelta)


def _check_field(task: str, name: str, value: object) -> None:
    if name in BY_ERROR and value:
        raise ConfigError(f"task {task}: {name!r}: {NO_LIST}")
    known = (*SETTINGS, *ENQUEUE_ONLY)
    if not _is_setting(value) or (setting := find_meant(name)) is None:
        return
    if name not in (*known, *ALIASES) and len(setting) < LONG:
        return
    other = (
        "or, if the payload is to have it, name the field otherwise: "
        f"`{name}_: ... = msgspec.field(default={value!r}, name={name!r})`"
    )
    if setting in ENQUEUE_ONLY:
        raise ConfigError(f"{_no_setting(task, name, setting)}; {other}")
    what = "is a setting of the class, not a field of the payload"
    if name != setting:
        what = f"is not a setting, and a field of the payload as it stands; did you mean {setting!r}?"
    raise ConfigError(f"task {task}: {name!r} {what}; write `{setting} = ...` without an annotation; {other}")


def _check_argument(task: str, name: str, value: object) -> None:
    """Raise ConfigError for an argument of a class, `class T(Task, queue="mail")`, that isn't one of msgspec's."""
    if name in NAMES_OF_TAG and name != "tag":
        raise ConfigError(f"task {task}: a class takes no {name!r}; write class {task}(notifyq.Task, tag={value!r})")
    if (setting := find_meant(name, SETTINGS)) is not None:
        raise ConfigError(
            f"task {task}: a class takes no {name!r}; it is a setting: write `{setting} = {value!r}` in the class's "
            "body"
        )


def _check_attribute(task: str, name: str, value: object) -> None:
    if name in NAMES_OF_TAG and value and isinstance(value, str):
        raise ConfigError(
            f"task {task}: {name!r} in the body of the class doesn't name its type; write class "
            f"{task}(notifyq.Task, tag={value!r}) (a constant of your own: name it _{name})"
        )
    if name in BY_ERROR and value and not callable(getattr(value, "__get__", None)):
        raise ConfigError(f"task {task}: {name!r}: {NO_LIST}; a constant of your own: name it _{name}")
    if not _is_setting(value) or (setting := find_meant(name)) is None or (name == setting and setting in SETTINGS):
        return
    if setting in SETTINGS:
        raise ConfigError(
            f"task {task}: there is no setting {name!r}; did you mean {setting!r}? (a constant of your own: name it "
            f"_{name})"
        )
    raise ConfigError(f"{_no_setting(task, name, setting)}; a constant of your own: name it _{name}")


def _no_setting(task: str, name: str, meant: str) -> str:
    return (
        f"task {task}: {name!r} is no setting of a class; it is an option of each enqueue: "
        f"app.enqueue(task, {meant}=...)"
    )
