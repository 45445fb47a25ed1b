"""Whatever a handler gives as its reason, its task ends as the handler says, with a text, and its worker goes on."""

from __future__ import annotations

import enum
from datetime import timedelta
from typing import Any

import pytest

import notifyq
from notifyq import Cancel, Dead, Retry, Task
from notifyq.testing import run_inline

from ..helpers.machine import limit
from ..helpers.running import working


class T(Task):
    how: str = ""
    max_attempts = 1


class Why(enum.StrEnum):
    BOUNCED = "bounced"


class Unprintable:
    def __str__(self) -> str:
        raise OSError


class Blank(Exception):
    def __str__(self) -> str:
        return " \n"


NOTHING: Any = None


class Bare(Dead):
    """It doesn't call its base's __init__."""

    def __init__(self) -> None:
        pass


class Soon(Retry):
    def __init__(self) -> None:
        super().__init__()
        self.delay = timedelta(seconds=7)  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]


class Never(Retry):
    def __init__(self) -> None:
        super().__init__()
        self.delay = "never"  # type: ignore[assignment]  # pyright: ignore[reportAttributeAccessIssue]


def verdicts(given: Any) -> list[Any]:
    return [Dead(given), Cancel(given), Retry(1, given)]


CASES: dict[str, tuple[list[Any], str | None]] = {
    "empty": (verdicts(""), None),
    "blank": (verdicts(" \n"), None),
    "none": (verdicts(None), None),
    "classes": ([Dead, Cancel, Retry], None),
    "exceptions": (verdicts(ValueError("no such user")), "ValueError: no such user"),
    "exceptions without a text": (verdicts(TimeoutError()), "TimeoutError"),
    "exceptions with a blank text": (verdicts(Blank()), "Blank"),
    "numbers": (verdicts(404), "404"),
    "enums": (verdicts(Why.BOUNCED), "bounced"),
    "unprintable": (verdicts(Unprintable()), "<its __str__ raised OSError>"),
}
DEFAULTS = ["given up by its handler", "cancelled by its handler", "retry asked for"]


@pytest.mark.parametrize("case", CASES)
async def test_reasons(case: str) -> None:
    given, expected = CASES[case]
    for verdict, state, default in zip(given, ["dead", "cancelled", "dead"], DEFAULTS, strict=True):
        for raises in (False, True):
            app = notifyq.App()

            @app.handler
            async def handler(task: T, verdict: Any = verdict, raises: bool = raises) -> Any:
                if raises:
                    raise verdict
                return verdict

            ran = await run_inline(app, T())
            assert (ran.state, ran.reason) == (state, expected or default)


async def test_subclasses() -> None:
    app = notifyq.App()
    kinds: dict[str, Any] = {"bare": Bare, "soon": Soon, "never": Never}

    class Twice(Task):
        how: str

    @app.handler
    async def handler(task: Twice) -> None:
        raise kinds[task.how]

    ran = await run_inline(app, Twice("bare"))
    assert (ran.state, ran.reason) == ("dead", "given up by its handler")
    ran = await run_inline(app, Twice("soon"))
    assert (ran.state, ran.delay) == ("retry", 7)
    ran = await run_inline(app, Twice("never"))
    assert ran.state == "retry"
    assert ran.delay is not None  # its class's backoff


@pytest.mark.parametrize("delay", ["5", -1, float("nan"), timedelta(days=400)])
def test_delays_that_cannot_be(delay: Any) -> None:
    with pytest.raises(ValueError, match=r"Retry\(delay=.*expected seconds, from 0 to a year, or a timedelta"):
        Retry(delay)


async def test_a_worker_goes_on_and_stores_a_text(dsn: str, db: Any) -> None:
    """Once an exception as a reason stopped the whole worker."""
    app = notifyq.App()
    odd: Any = ValueError("x")
    hows: dict[str, Any] = {"exception": Dead(odd), "empty": Dead(""), "class": Dead, "none": Retry(0, NOTHING)}

    @app.handler
    async def handler(task: T, ctx: notifyq.Context) -> Any:
        if task.how == "committed":
            async with ctx.transaction():
                pass
            return Dead("")
        return hows.get(task.how, "fine")

    async with app.connect(dsn), working(app, dsn):
        refs = [await app.enqueue(T(how)) for how in hows]
        for ref in refs:
            with pytest.raises(notifyq.TaskDead):
                await ref.result(timeout=limit())
        await (await app.enqueue(T("committed"))).result(timeout=limit())
        assert await (await app.enqueue(T("last"))).result(timeout=limit()) == "fine"
    errors = await db.fetch("SELECT errors -> -1 ->> 'error' FROM notifyq.all_tasks WHERE state = 'dead' ORDER BY id")
    given_up = "given up by its handler"
    assert [row[0] for row in errors] == ["ValueError: x", given_up, given_up, "retry asked for"]


async def test_a_batch(dsn: str) -> None:
    app = notifyq.App()

    odd: Any = ValueError("x")

    @app.handler(batch=2, linger=timedelta(seconds=0))
    async def handler(tasks: list[T]) -> Any:
        return Dead if tasks[0].how == "all" else [Dead(odd)]

    async with app.connect(dsn), working(app, dsn):
        for how, words in (("all", "given up by its handler"), ("one", "ValueError: x")):
            with pytest.raises(notifyq.TaskDead, match=words):
                await (await app.enqueue(T(how))).result(timeout=limit())
