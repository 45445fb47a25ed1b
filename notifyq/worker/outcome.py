"""How an attempt ended, as a value. It is decided here, and written by settle.py.

what happened                                       outcome
the handler returned                                Finished done
it raised, timed out, or asked for Retry            RetryLater; after the last attempt Finished dead
a batch handler returned no list of the right size  the same
it raised or returned Dead, Cancel                  Finished dead, Finished cancelled
the payload can't be decoded                        Finished dead: another attempt would end the same
the result isn't JSON, or exceeds RESULT_LIMIT      the same
its deadline passed before its handler began        Finished cancelled
the worker has no handler of the type               Unhandled
not begun, or cut short by a shutdown               HandedBack: the attempt doesn't count
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Sequence
from datetime import UTC, datetime
from typing import Literal, TypeAlias, cast

import msgspec

from ..codec import RESULT_LIMIT, describe, encode_error, encode_result, text_of
from ..config import in_seconds
from ..loops import is_awaitable
from ..registry import Handler
from ..task import Cancel, Dead, Retry, Verdict, is_delay
from .backoff import backoff_seconds
from .job import Job

State: TypeAlias = Literal["done", "dead", "cancelled"]


class Finished:
    """The task is over."""

    __slots__ = ("error", "job", "result", "size", "state")

    def __init__(self, job: Job, state: State, result: bytes | None = None, error: bytes | None = None) -> None:
        self.job = job
        self.state: State = state
        self.result = result
        self.error = error
        self.size = job.size  # about how many bytes its write moves; a large payload is copied into the history
        if result is not None:
            self.size += len(result)
        if error is not None:
            self.size += len(error)


class RetryLater:
    """The attempt failed; the next one follows after `delay` seconds."""

    __slots__ = ("delay", "error", "job", "size")

    def __init__(self, job: Job, delay: float, error: bytes) -> None:
        self.job = job
        self.delay = delay
        self.error = error
        self.size = job.size + len(error)


class HandedBack:
    """The attempt doesn't count: the task is ready again."""

    __slots__ = ("job", "size")

    def __init__(self, job: Job) -> None:
        self.job = job
        self.size = job.size


class Unhandled:
    """The task is left to a worker that has a handler of its type."""

    __slots__ = ("job", "size")

    def __init__(self, job: Job) -> None:
        self.job = job
        self.size = job.size


Outcome: TypeAlias = Finished | RetryLater | HandedBack | Unhandled


def returned(job: Job, handler: Handler, value: object) -> Outcome:
    """The outcome if the handler returned `value`."""
    if value is None:
        return Finished(job, "done")
    if isinstance(value, Verdict):
        return raised(job, handler, value)
    if is_verdict_class(value):  # `return Dead`, as one may `raise Dead`
        try:
            return raised(job, handler, cast("type[Verdict]", value)())
        except Exception as error:
            return raised(job, handler, error)
    try:
        result = encode_result(value)
    except Exception as error:  # a user's type may raise anything when it is encoded
        why = f"its result, a {type(value).__name__}, can't be written as JSON: {describe(error)}{_hint(value)}"
        return Finished(job, "dead", error=encode_error(job.attempt, why))
    if result is not None and len(result) > RESULT_LIMIT:
        why = (
            f"its result is {len(result):,} bytes of JSON, the limit is {RESULT_LIMIT:,}; store it elsewhere, and "
            "return where it is"
        )
        return Finished(job, "dead", error=encode_error(job.attempt, why))
    return Finished(job, "done", result)


def returned_by_batch(jobs: Sequence[Job], handler: Handler, value: object) -> Sequence[Outcome]:
    """The outcome of each task if the batch handler returned `value`."""
    if value is None or isinstance(value, Verdict) or is_verdict_class(value):
        return [returned(job, handler, value) for job in jobs]
    if not isinstance(value, list | tuple):
        why = f"its batch handler returned a {type(value).__name__}"
    elif len(items := cast("Sequence[object]", value)) != len(jobs):
        why = f"its batch handler returned a list of {len(items)} for {len(jobs)} tasks"
    else:
        return [
            raised(job, handler, item) if isinstance(item, BaseException) else returned(job, handler, item)
            for job, item in zip(jobs, items, strict=True)
        ]
    why += "; expected None, or a list with one item for each task"
    return [failed(job, handler, why) for job in jobs]


def _hint(value: object) -> str:
    if is_awaitable(value):
        return "; the items of what a batch handler returns are results, so await them first"
    if isinstance(value, Iterator | AsyncIterator):
        return "; a handler returns its result as a whole: a list, say"
    return ""


def raised(job: Job, handler: Handler, error: BaseException) -> Outcome:
    """The outcome if the handler raised `error`, or returned a Verdict."""
    match error:
        case Cancel():
            return Finished(job, "cancelled", error=encode_error(job.attempt, _reason(error, Cancel.reason)))
        case Dead():
            return Finished(job, "dead", error=encode_error(job.attempt, _reason(error, Dead.reason)))
        case Retry():
            delay = in_seconds(error.delay)
            why = encode_error(job.attempt, _reason(error, Retry.reason))
            return _again(job, handler, why, delay if is_delay(delay) else None)
        case _:
            return _again(job, handler, encode_error(job.attempt, describe(error), error))


def is_verdict_class(value: object) -> bool:
    return isinstance(value, type) and issubclass(value, Verdict)


def _reason(verdict: Verdict, default: str) -> str:
    """The reason that a handler gives, which may be an exception that it caught; or the default, for an empty one."""
    given = cast("object", verdict.reason)
    if isinstance(given, BaseException):
        return describe(given)
    return ("" if given is None else text_of(given)).strip() or default


def timed_out(job: Job, handler: Handler) -> Outcome:
    """The outcome if the handler was cancelled at its timeout."""
    return failed(job, handler, f"timed out after {handler.timeout:g} s")


def failed(job: Job, handler: Handler, why: str) -> Outcome:
    """The outcome of an attempt that failed for this reason, without an exception."""
    return _again(job, handler, encode_error(job.attempt, why))


def expired(job: Job, expires_at: datetime) -> Outcome:
    """The outcome of a task that didn't begin in time, in the words of cancel_expired in schema.sql."""
    why = f"expired: not started by {expires_at.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
    return Finished(job, "cancelled", error=encode_error(job.attempt, why))


def undecodable(job: Job, why: str) -> Outcome:
    """The outcome of a task whose payload can't be decoded: dead, since the payload stays the same."""
    return Finished(job, "dead", error=encode_error(job.attempt, why))


def attempts_allowed(job: Job, handler: Handler) -> int:
    """The number of the last attempt."""
    return job.excused + (handler.max_attempts if job.max_attempts is None else max(job.max_attempts, 1))


def _again(job: Job, handler: Handler, error: bytes, delay: float | None = None) -> Outcome:
    if job.attempt >= attempts_allowed(job, handler):
        return Finished(job, "dead", error=error)
    return RetryLater(job, backoff_seconds(job.attempt, handler.backoff) if delay is None else delay, error)


def smaller(outcome: Outcome, step: int, why: str) -> Outcome | None:
    """What to write instead of an outcome that PostgreSQL refuses, at the first, second, ... step. None: there is no
    smaller form. All forms have `why` as their error, with the first line of the outcome's own.

    done              dead; then dead, without the errors of earlier attempts
    dead, cancelled   the same state; then that, without the errors of earlier attempts
    retry later       the same, without the errors of earlier attempts; then dead
    unhandled         dead, without the errors of earlier attempts: no worker can take it
    handed back       nothing
    """
    job = outcome.job

    def error(*, alone: bool) -> bytes:
        said = ""
        if isinstance(outcome, Finished | RetryLater) and outcome.error is not None:
            said = f"{msgspec.json.decode(outcome.error)['error'].splitlines()[0][:300]} ("
        text = f"{said}PostgreSQL can't store its outcome: {why}{')' if said else ''}"
        # ASCII only, as the database's encoding may lack other characters.
        return encode_error(job.attempt, text.encode("ascii", "backslashreplace").decode(), alone=alone)

    match outcome:
        case Finished(state=state) if step <= 2:
            return Finished(job, "dead" if state == "done" else state, error=error(alone=step == 2))
        case RetryLater(delay=delay) if step == 1:
            return RetryLater(job, delay, error(alone=True))
        case RetryLater() if step == 2:
            return Finished(job, "dead", error=error(alone=True))
        case Unhandled() if step == 1:
            return Finished(job, "dead", error=error(alone=True))
        case _:
            return None
