"""How an attempt ended, as a value: decided here, written by settle.

what happened                                    outcome
the handler returned                             Finish done
it raised, timed out, asked for Retry            Later; after the last attempt Finish dead
its batch handler returned no list that fits     the same
it raised or returned Dead, Cancel               Finish dead, Finish cancelled
the payload doesn't fit, the result isn't JSON   Finish dead: another run would end the same
nobody here knows the type                       Aside
not begun, or cut short by a shutdown            HandBack: the attempt doesn't count
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import Literal, TypeAlias

from .codec import describe, encode_error, encode_result
from .registry import Handler, is_awaitable
from .retry import backoff_seconds
from .store import Job
from .task import Cancel, Dead, Retry, Verdict

State: TypeAlias = Literal["done", "dead", "cancelled"]


class Finish:
    """The task is over."""

    __slots__ = ("error", "job", "result", "state")

    def __init__(self, job: Job, state: State, result: bytes | None = None, error: bytes | None = None) -> None:
        self.job = job
        self.state: State = state
        self.result = result
        self.error = error


class Later:
    """The attempt failed; another follows after `delay` seconds."""

    __slots__ = ("delay", "error", "job")

    def __init__(self, job: Job, delay: float, error: bytes) -> None:
        self.job = job
        self.delay = delay
        self.error = error


class HandBack:
    """The attempt didn't happen."""

    __slots__ = ("job",)

    def __init__(self, job: Job) -> None:
        self.job = job


class Aside:
    """For a worker that knows the type."""

    __slots__ = ("job",)

    def __init__(self, job: Job) -> None:
        self.job = job


Outcome: TypeAlias = Finish | Later | HandBack | Aside


def returned(job: Job, handler: Handler, value: object) -> Outcome:
    """Of a handler that returned."""
    if value is None:
        return Finish(job, "done")
    if isinstance(value, Verdict):
        return raised(job, handler, value)
    try:
        return Finish(job, "done", encode_result(value))
    except Exception as error:  # what a user's type makes of being encoded is anybody's guess
        why = f"its result, a {type(value).__name__}, can't be written as JSON: {describe(error)}{_hint(value)}"
        return Finish(job, "dead", error=encode_error(job.attempt, why))


def _hint(value: object) -> str:
    if is_awaitable(value):
        return "; the items of what a batch handler returns are results, so await them first"
    if isinstance(value, Iterator | AsyncIterator):
        return "; a handler returns its result as a whole: a list, say"
    return ""


def raised(job: Job, handler: Handler, error: BaseException) -> Outcome:
    """Of a handler that raised."""
    match error:
        case Cancel():
            return Finish(job, "cancelled", error=encode_error(job.attempt, error.reason))
        case Dead():
            return Finish(job, "dead", error=encode_error(job.attempt, error.reason))
        case Retry():
            return _again(job, handler, encode_error(job.attempt, error.reason), error.delay)
        case _:
            return _again(job, handler, encode_error(job.attempt, describe(error), error))


def timed_out(job: Job, handler: Handler) -> Outcome:
    """Of a handler that was cancelled at its timeout."""
    return failed(job, handler, f"timed out after {handler.timeout:g} s")


def failed(job: Job, handler: Handler, why: str) -> Outcome:
    """Of an attempt that failed for a reason that is no exception."""
    return _again(job, handler, encode_error(job.attempt, why))


def undecodable(job: Job, why: str) -> Outcome:
    """Of a payload that nothing was run with. Dead, since it won't be another one next time."""
    return Finish(job, "dead", error=encode_error(job.attempt, why))


def attempts_allowed(job: Job, handler: Handler) -> int:
    return handler.max_attempts if job.max_attempts is None else max(job.max_attempts, 1)


def _again(job: Job, handler: Handler, error: bytes, delay: float | None = None) -> Outcome:
    if job.attempt >= attempts_allowed(job, handler):
        return Finish(job, "dead", error=error)
    return Later(job, backoff_seconds(job.attempt, handler.backoff) if delay is None else delay, error)
