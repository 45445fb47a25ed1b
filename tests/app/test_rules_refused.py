"""What a Task class can't say of how its tasks are enqueued is refused where the class is written."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import msgspec
import pytest

import notifyq
from notifyq import Task

from .test_rules import Plain

# What a class body may not say, and words of the message.

WRONG_ATTRIBUTES: dict[str, str] = {
    "max_retries = 3": "did you mean 'max_attempts'",
    "retries = 3": "did you mean 'max_attempts'",
    "max_attempt = 3": "did you mean 'max_attempts'",
    "time_limit = 3": "did you mean 'timeout'",
    "time_out = 3.0": "did you mean 'timeout'",
    "retry_backoff = True": "did you mean 'backoff'",
    "rate_limit = '10/m'": "did you mean 'rate'",
    "queue_name = 'mail'": "did you mean 'queue'",
    "quue = 'mail'": "did you mean 'queue'",
    "priorty = 5": "did you mean 'priority'",
    "delay = 3": r"app\.enqueue\(task, delay=\.\.\.\)",
    "countdown = 3": r"app\.enqueue\(task, delay=\.\.\.\)",
    "eta = 3": r"app\.enqueue\(task, run_at=\.\.\.\)",
    "expires_in = 60": "did you mean 'expires'",
    "ttl = 60": "did you mean 'expires'",
    "max_retry = 3": "did you mean 'max_attempts'",
    "timeout_seconds = 3": "did you mean 'timeout'",
    "autoretry_for = (ValueError,)": r"the handler catches it and returns notifyq\.Dead",
    "dont_retry_on = [ValueError]": r"the handler catches it and returns notifyq\.Dead",
    "tag = 'X'": r"write class Wrong\(notifyq\.Task, tag='X'\)",
    "type = 'X'": r"write class Wrong\(notifyq\.Task, tag='X'\)",
    "task_name = 'X'": r"write class Wrong\(notifyq\.Task, tag='X'\)",
    "discard_on = KeyError": r"the handler catches it and returns notifyq\.Dead",
}
WRONG_FIELDS: dict[str, str] = {
    "queue: str = 'mail'": "'queue' is a setting of the class, not a field",
    "priority: int = 5": "'priority' is a setting of the class, not a field",
    "timeout: float = 30.0": "'timeout' is a setting of the class, not a field",
    "max_retries: int = 3": "did you mean 'max_attempts'",
    "rate_limit: str = '5/s'": "did you mean 'rate'",
    "max_atempts: int = 3": "did you mean 'max_attempts'",
    "delay: float = 3.0": r"app\.enqueue\(task, delay=\.\.\.\)",
    "expires: int = 60": "'expires' is a setting of the class, not a field",
    "limit: int = 100": "name='limit'",
}


def define(body: str, bases: str = "notifyq.Task", **names: Any) -> Any:
    lines = "\n    ".join(body.split("\n"))
    space: dict[str, Any] = {"notifyq": notifyq, "ClassVar": ClassVar, "msgspec": msgspec, "Any": Any, **names}
    text = f"class Wrong({bases}):\n    {lines}"
    exec(compile(text, "wrong.py", "exec", dont_inherit=True), {"__name__": "somewhere"} | space, space)
    return space["Wrong"]


@pytest.mark.parametrize("line", WRONG_ATTRIBUTES)
async def test_attributes_that_mean_nothing_are_refused(dsn: str, line: str) -> None:
    name, _, value = line.partition(" = ")
    wrong = [define(body) for body in (line, f"x: int = 1\n{line}", f"{name}: ClassVar[Any] = {value}")]
    wrong.append(define("x: int = 1", "Mixin, notifyq.Task", Mixin=type("Mixin", (), {name: eval(value)})))
    wrong.append(define("x: int = 1", "Wrong", Wrong=wrong[0]))
    wrong.append(msgspec.defstruct("Wrong", [("x", int, 1)], bases=(wrong[0],)))
    app = notifyq.App()
    async with app.connect(dsn):
        for cls in wrong:
            with pytest.raises(notifyq.ConfigError, match=WRONG_ATTRIBUTES[line]) as caught:
                app.handler(handler_of(cls))
            assert str(caught.value).startswith("task Wrong: ")
            assert f"name it _{name}" in str(caught.value)
            for enqueue in (app.enqueue(cls()), app.enqueue_many([cls()]), app.enqueue_many([], then=cls())):
                with pytest.raises(notifyq.ConfigError, match=WRONG_ATTRIBUTES[line]):
                    await enqueue


@pytest.mark.parametrize("line", WRONG_FIELDS)
def test_so_are_fields_that_look_like_settings(line: str) -> None:
    """This also holds before another field, where msgspec raises an error of its own."""
    for body in (line, f"{line}\nx: int", f"x: int\n{line}", f"x: int = 1\n{line}"):
        with pytest.raises(notifyq.ConfigError, match=WRONG_FIELDS[line]):
            notifyq.App().handler(handler_of(define(body)))
    for cls in (
        define(f"{line}\nx: int", "notifyq.Task, kw_only=True"),
        define("x: int = 1", "Common, notifyq.Task", Common=struct(line)),
        define("y: int = 1", "Base", Base=define(f"x: int\n{line}")),
    ):
        with pytest.raises(notifyq.ConfigError, match=WRONG_FIELDS[line]):
            notifyq.App().handler(handler_of(cls))


def struct(line: str) -> Any:
    space: dict[str, Any] = {"msgspec": msgspec}
    exec(compile(f"class Common(msgspec.Struct):\n    {line}", "common.py", "exec", dont_inherit=True), space, space)
    return space["Common"]


@pytest.mark.parametrize(
    "body",
    [
        "x: int = 1\ny: str = ''",
        "expires: Any = None",
        "limit_: int = msgspec.field(default=100, name='limit')",
        "limits: list = []",
        "rates: dict = {}",
        "rated: float = 1.0",
        "_max_retries = 3",
        "URL = 'https://example.com'\ntemplate = 'a.html'",
        "def delay(self): ...",
        "type: str = 'X'\ntag: str = 'Y'",
        "_type = 'X'\ntype = None",
        "retries: int",
        "queue: str = ''\npriority: int = 0\nexpires: bool = False",
        "ttl: int",
        "max_attempts = 3\nbackoff = 0.5\ntimeout = 3\nqueue = 'a'\nx: int",
        "max_attempts: ClassVar[int] = 3\nqueue: ClassVar[str] = 'q'",
    ],
)
def test_what_a_class_may_have(body: str) -> None:
    notifyq.App().handler(handler_of(define(body)))


@pytest.mark.parametrize(
    ("argument", "cure"),
    [
        ("queue='X'", r"'queue'; it is a setting: write `queue = 'X'` in the class's body"),
        ("max_retries=3", r"'max_retries'; it is a setting: write `max_attempts = 3` in"),
        ("type='X'", r"'type'; write class Wrong\(notifyq\.Task, tag='X'\)"),
    ],
)
def test_a_setting_is_no_argument_of_the_class(argument: str, cure: str) -> None:
    with pytest.raises(notifyq.ConfigError, match=cure):
        define("x: int = 1", f"notifyq.Task, {argument}")
    with pytest.raises(TypeError, match="colour"):
        define("x: int = 1", "notifyq.Task, colour=5")


def handler_of(cls: Any) -> Callable[..., Any]:
    def handler(task: Any) -> None: ...

    handler.__annotations__["task"] = cls
    return handler


def test_msgspec_s_own_errors_stay() -> None:
    with pytest.raises(TypeError, match="Required field 'y' cannot follow optional fields"):
        define("x: int = 1\ny: int")


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ("queue = 5", "task Wrong: queue is 5"),
        ("queue = ''", "task Wrong: queue ''"),
        ("priority = 'high'", "task Wrong: priority is 'high'"),
        ("priority = 40000", "task Wrong: priority is 40000"),
        ("priority = True", "task Wrong: priority is True"),
        ("priority = False", "task Wrong: priority is False"),
        ("limit = True", "task Wrong: limit is True"),
        ("queue = 'default mail'", "task Wrong: queue 'default mail': a name has no spaces, commas or colons"),
        ("queue = 'mail:5'", "task Wrong: queue 'mail:5': a name has no"),
        ("order_key = 5", "task Wrong: order_key is 5"),
        ("order_key = 'x'\nx: int", "which is a field"),
        ("order_key = ('y',)\nx: int", "order_key has 'y' in it, which is no field; its fields: x"),
        ("limit_key = ()", "limit_key is ()"),
        ("limit = 0", "task Wrong: limit is 0"),
        ("limit = '3'", "task Wrong: limit is '3'"),
        ("rate = 5", "task Wrong: rate is 5"),
        ("rate = 'often'", "task Wrong: rate is 'often'"),
        ("@property\ndef queue(self): return 'x'", "task Wrong: queue is <property"),
    ],
)
async def test_rules_that_cannot_be(dsn: str, body: str, words: str) -> None:
    """The error comes where a handler is registered, or, without one, where a task is enqueued."""
    import re

    cls = define(body)
    with pytest.raises(notifyq.ConfigError, match=re.escape(words)):
        notifyq.App().handler(handler_of(cls))
    app = notifyq.App()
    async with app.connect(dsn):
        task = cls(**dict.fromkeys(cls.__struct_fields__, 1))
        for enqueue in (app.enqueue(task), app.enqueue_many([task]), app.enqueue_many([], then=task)):
            with pytest.raises(notifyq.ConfigError, match=re.escape(words)):
                await enqueue


async def test_a_key_without_a_limit_says_so(dsn: str) -> None:
    class Keyed(Task):
        limit_key = ("n",)
        n: int = 0

    app = notifyq.App()
    async with app.connect(dsn):
        with pytest.raises(notifyq.ConfigError, match=r"limit_key is 'Keyed:0', and no limit; .* class$"):
            await app.enqueue(Keyed())
        await app.enqueue(Keyed(), limit=3)
        for wrong in ({"limit": 3}, {"limit_key": "k"}):
            with pytest.raises(notifyq.ConfigError, match="limit_key"):
                await app.enqueue(Plain(), **wrong)
            with pytest.raises(notifyq.ConfigError, match="limit_key"):
                await app.enqueue_many([Plain()], **wrong)
