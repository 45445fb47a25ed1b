"""Drain: what a claimer does next with --drain, where a worker ends when it has nothing left to do. As decide.py, and
pure too.

It never sleeps, so it needs no turn, and no connection at the bell. It listens all the same: it hears at once that a
queue was paused or resumed.
"""

from __future__ import annotations

import math

from .decide import CHECK_DUE, DUE_BUSY_SECONDS, TABLE, Claim, Finish, LastCheck, Row, Wait, always

CHECK_AGAIN_SECONDS = 0.25  # from one last check to the next, if another must follow

_ROWS = {row.name: row for row in TABLE}

DRAIN: tuple[Row, ...] = (
    _ROWS["failed"],
    _ROWS["heartbeat"],
    _ROWS["release"],
    _ROWS["settings"],
    Row(
        "drain, due",
        lambda s, now, free: now >= s.due.next_at or now - s.due.checked_at > DUE_BUSY_SECONDS,
        CHECK_DUE,
        "Tasks come due while it works.",
    ),
    Row(
        "drain, claim",
        lambda s, now, free: s.claim_wanted and free.total > 0,
        lambda s, now: Claim() if s.backlog else Claim(answers=True, from_head=True),
        "It claims until nothing comes. The last of these claims must see all tasks, also those before the cursors.",
    ),
    Row(
        "drain, full",
        lambda s, now, free: not free.total and not free.is_idle,
        always(Wait(math.inf, then_claims=True, starts_batches=True)),
        "It can't claim until a handler ends, which frees a slot.",
    ),
    Row(
        "drain, busy",
        lambda s, now, free: not free.is_idle,
        lambda s, now: Wait(min(now + s.drain_wait, s.due.next_at), then_claims=True, starts_batches=True),
        "A handler may wait for a task that it has enqueued. No ring tells of that task, as this worker never sleeps. "
        "So it claims now and then, less often each time that it finds nothing, and when a task is due.",
    ),
    _ROWS["isolate"],
    Row(
        "drain, again",
        lambda s, now, free: s.last_check_begun and s.check_again and free.total > 0,
        lambda s, now: Wait(now + CHECK_AGAIN_SECONDS, then_claims=True),
        "Another worker will give tasks up soon: it is dead, or has no handler for a type (last_check.py).",
    ),
    Row(
        "drained",
        lambda s, now, free: s.last_check_begun or not free.total,
        always(Finish()),
        "Nothing is left. Or it can't claim, though it is idle: it keeps too many outcomes that PostgreSQL refuses.",
    ),
    Row(
        "drain, idle",
        lambda s, now, free: True,
        always(LastCheck()),
        "A handler may have enqueued a task as the last thing it did. Other tasks may be due, released or to isolate.",
    ),
)
