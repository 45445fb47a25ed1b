"""What the log says about how an attempt ended: a line for each failure, and for a success at DEBUG only."""

from __future__ import annotations

import logging
import time
from typing import Any

import msgspec

from .. import log
from ..registry import Handler
from .job import Job
from .outcome import Finished, HandedBack, Outcome, RetryLater, Unhandled

logger = log.logger("notifyq.run")


def is_debugging() -> bool:
    return logger.isEnabledFor(logging.DEBUG)


def log_outcome(handler: Handler, result: Outcome, began: float) -> None:
    """`began` is a time of time.monotonic()."""
    job, seconds = result.job, round(time.monotonic() - began, 3)
    if isinstance(result, Finished) and result.state == "done":
        if is_debugging():
            logger.debug("task done", extra=_fields(job, handler, seconds=seconds))
        return
    entry: dict[str, Any] = {}
    if isinstance(result, Finished | RetryLater) and result.error:
        entry = msgspec.json.decode(result.error)
    why = entry.get("error") or ""
    extra = _fields(job, handler, error=why.splitlines()[0][:300] if why else "", seconds=seconds)
    # The row has the traceback, and `notifyq show` prints it.
    show = {"more": f"notifyq show {job.id}"}
    if is_debugging():
        extra["trace"] = entry.get("traceback")
    match result:
        case Finished(state="cancelled"):
            logger.info("task cancelled", extra=extra)
        case Finished():
            extra["fields"] |= show
            logger.error("task dead", extra=extra)
        case RetryLater(delay=delay):
            extra["fields"] |= {"again_in": round(delay, 3), **show}
            logger.warning("task failed, trying again", extra=extra)
        case HandedBack() | Unhandled():
            pass


def log_ignored(handler: Handler, result: Outcome) -> None:
    """The attempt's own transaction has settled the task. If the handler returned or raised something after that, log
    that it doesn't count: its author may look for it."""
    if isinstance(result, Finished) and (result.state, result.result, result.error) == ("done", None, None):
        return
    error = getattr(result, "error", None)
    why = msgspec.json.decode(error)["error"].splitlines()[0][:300] if error else "it returned something"
    logger.warning(
        "what a handler returns or raises after its transaction doesn't count: the task is done",
        extra=_fields(result.job, handler, after=why),
    )


def log_unnameable(job: Job, why: str) -> None:
    logger.error("task dead", extra={"fields": {"id": job.id, "type": job.type[:40] + "...", "error": why}})


def _fields(job: Job, handler: Handler, **more: object) -> dict[str, Any]:
    return {
        "fields": {
            "id": job.id,
            "type": job.type,
            "queue": job.queue,
            "attempt": job.attempt,
            "handler": handler.name,
        }
        | more
    }
