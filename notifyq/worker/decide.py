"""Decide: what a claimer does next, as a table. Pure: no clock, no connection, no event loop.

`next_action` returns the action of the first row that holds in a State (state.py). claim.py carries it out. A worker
goes by TABLE, or, with --drain, by the table in drain.py.

The doorbell's model (tests/models/doorbell.py) explores TABLE itself and the State's events: docs/protocol.md tells
what holds. After a change of either, `python -m tests.models` explores them anew.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .state import ASLEEP, AWAY, TURN, Position, State

if TYPE_CHECKING:
    from .capacity import Free

DUE_BUSY_SECONDS = 0.25  # from one due check to the next under a backlog, where due tasks queue up behind the others
UNLISTEN_SECONDS = 1.0  # for which a worker that has lost the turn still listens: it mostly has the turn again soon
# From one claim to the next while it waits for SHARE: this part of the wait so far; at least, and at most, in seconds.
ARMING_PART, ARMING_LEAST, ARMING_MOST = 0.02, 0.002, 0.05


class BellSilent(ConnectionError):
    """An echo that should have come by the bell didn't."""


@dataclass(frozen=True, slots=True)
class _Action:
    """`bell`: the position at the bell that is wanted from now on. None: the same as before."""

    bell: Position | None = field(default=None, kw_only=True)


@dataclass(frozen=True, slots=True)
class Fail(_Action):
    """End the session with this error."""

    error: BaseException


@dataclass(frozen=True, slots=True)
class WriteHeartbeat(_Action):
    """In place of the heartbeat's thread."""


@dataclass(frozen=True, slots=True)
class ReleaseWaiters(_Action):
    """Make ready the tasks that waited for one that has ended."""


@dataclass(frozen=True, slots=True)
class Isolate(_Action):
    """Run tasks whose workers have vanished, with no other task beside them."""


@dataclass(frozen=True, slots=True)
class Listen(_Action):
    """LISTEN to the bell."""


@dataclass(frozen=True, slots=True)
class Unlisten(_Action):
    """UNLISTEN."""


@dataclass(frozen=True, slots=True)
class CheckDue(_Action):
    """Promote due tasks, and set the timer for the next one. `poll`: also look for ready tasks in all queues."""

    poll: bool = False


@dataclass(frozen=True, slots=True)
class Claim(_Action):
    """`answers`: this claim answers all that has happened so far, so State.claim_wanted is cleared before it.
    `without_turn`: another worker has the turn. `from_head`: begin at the head, whatever the cursors say."""

    answers: bool = False
    without_turn: bool = False
    from_head: bool = False


@dataclass(frozen=True, slots=True)
class Sleep(_Action):
    """Do nothing for `seconds`, whatever happens. Then claim."""

    seconds: float


@dataclass(frozen=True, slots=True)
class Wait(_Action):
    """Do nothing until something happens, or until this time. `then_claims`: claim then, whatever happened.
    `starts_batches`: batches that wait for more tasks begin with those that they have."""

    until: float
    then_claims: bool = False
    starts_batches: bool = False


@dataclass(frozen=True, slots=True)
class LastCheck(_Action):
    """Before the end of --drain: ask once more for due tasks, waiters, ready tasks, tasks to isolate, and tasks that
    other workers may have to give up."""


@dataclass(frozen=True, slots=True)
class Finish(_Action):
    """End the session: nothing is left to do."""


Action = (
    Fail | WriteHeartbeat | ReleaseWaiters | Isolate | Listen | Unlisten | CheckDue | Claim | Sleep | Wait
    | LastCheck | Finish
)  # fmt: skip


@dataclass(frozen=True, slots=True)
class Row:
    name: str
    holds: Callable[[State, float, Free], bool]
    action: Callable[[State, float], Action]
    why: str


def _failure(s: State, now: float) -> Action:
    assert s.failure is not None
    return Fail(s.failure)


def _leaves_tasks(s: State, free: Free) -> bool:
    return s.backlog or (bool(s.left) and not s.left.isdisjoint(free.by_queue))


def _waits_away(s: State, now: float) -> Action:
    unlisten_at = s.away_since + UNLISTEN_SECONDS + 0.01 if s.listening else math.inf
    return Wait(min(s.poll_at, unlisten_at), bell=TURN)


def _waits_for_share(s: State, now: float) -> Action:
    armed = now - s.arming_since if s.wanted is ASLEEP else 0.0
    gap = min(max(armed * ARMING_PART, ARMING_LEAST), ARMING_MOST)
    return Wait(min(s.wakes_at, now + gap), then_claims=True, bell=ASLEEP)


def always(action: Action) -> Callable[[State, float], Action]:
    return lambda s, now: action


CHECK_DUE = always(CheckDue())


# The first row that holds is what happens next. Later rows may rely on the earlier ones not to hold.
TABLE: tuple[Row, ...] = (
    Row(
        "failed",
        lambda s, now, free: s.failure is not None,
        _failure,
        "A connection is lost, or the worker has a new id: end the session.",
    ),
    Row(
        "heartbeat",
        lambda s, now, free: s.heartbeat_wanted,
        always(WriteHeartbeat()),
        "The heartbeat's thread can't write it at the moment. Other workers give up a worker that stays silent.",
    ),
    Row(
        "release",
        lambda s, now, free: s.release_wanted,
        always(ReleaseWaiters()),
        "A task that waited for an ended one becomes ready by this, so this comes before any claim.",
    ),
    Row(
        "isolate",
        lambda s, now, free: s.isolation_wanted,
        always(Isolate()),
        "A task whose workers vanished twice, while they ran others too, is parked until a worker runs it isolated.",
    ),
    Row(
        "timer unknown",
        lambda s, now, free: s.timer_unknown,
        CHECK_DUE,
        "The last claim left slots free, so the worker may fall asleep: it must know when the next task is due.",
    ),
    Row(
        "no capacity",
        lambda s, now, free: not free.total,
        always(Wait(math.inf, bell=AWAY)),
        "It can't claim. Another worker may need the turn.",
    ),
    Row(
        "not listening",
        lambda s, now, free: s.position is not AWAY and not s.listening,
        always(Listen()),
        "LISTEN comes before the claim that comes before falling asleep, or a ring in between is lost.",
    ),
    Row(
        "settings",
        lambda s, now, free: s.settings_changed,
        CHECK_DUE,
        "A queue was paused, resumed or limited, or may have been while this worker heard nothing. The answer tells.",
    ),
    Row(
        "backlog, due",
        lambda s, now, free: _leaves_tasks(s, free) and now - s.due.checked_at > DUE_BUSY_SECONDS,
        CHECK_DUE,
        "Without this, no task would come due under a backlog.",
    ),
    Row(
        "backlog",
        lambda s, now, free: _leaves_tasks(s, free),
        always(Claim()),
        "More is ready, and known to be, so this needs no turn. A worker that has it gives it up if this claim comes "
        "back full too (State.claimed).",
    ),
    Row(
        "passing",
        lambda s, now, free: s.turn.passing,
        always(Wait(math.inf)),
        "The turn is on its way to another worker, and a claim here would take that one's tasks.",
    ),
    Row(
        "poll found",
        lambda s, now, free: s.poll_found and s.position is AWAY,
        always(Claim(answers=True, without_turn=True)),
        "The holder of the turn should have claimed these tasks. It may be a session that is no worker.",
    ),
    Row(
        "poll",
        lambda s, now, free: now >= s.poll_at,
        always(CheckDue(poll=True)),
        "The fallback, should the bell fail. In good health it finds nothing.",
    ),
    Row(
        "away, listening",
        lambda s, now, free: s.position is AWAY and s.listening and now - s.away_since > UNLISTEN_SECONDS,
        always(Unlisten(bell=TURN)),
        "Rings would wake it in vain. Not at once: it mostly has the turn again soon, and would have to LISTEN again.",
    ),
    Row(
        "away",
        lambda s, now, free: s.position is AWAY,
        _waits_away,
        "Only the holder of the turn claims when nothing is known to be ready: one task wakes one worker.",
    ),
    Row(
        "echo lost",
        lambda s, now, free: s.echo.is_lost(now),
        lambda s, now: Fail(BellSilent("LISTEN no longer hears what NOTIFY sends")),
        "The connection is open and hears nothing: begin a new session.",
    ),
    Row(
        "due",
        lambda s, now, free: now >= s.due.next_at,
        CHECK_DUE,
        "A scheduled task is due.",
    ),
    Row(
        "claim",
        lambda s, now, free: s.claim_wanted or now >= s.head_scan_at or now >= s.due.again_at,
        always(Claim(answers=True)),
        "Something happened. Or a claim is due: from the head, or of tasks that another session had locked.",
    ),
    Row(
        "awake",
        lambda s, now, free: s.moderation.is_awake(now),
        lambda s, now: Sleep(s.moderation.gap(), bell=TURN),
        "Tasks come in numbers: polling every 1 to 2 ms is cheaper than a ring for each.",
    ),
    Row(
        "echo",
        lambda s, now, free: s.echo.is_due(now),
        CHECK_DUE,
        "The due check sends the next echo.",
    ),
    Row(
        "arming",
        lambda s, now, free: s.position is TURN,
        _waits_for_share,
        "It asks for SHARE, which waits for open transactions that didn't ring. The first of them to commit notifies "
        "no worker, and SHARE waits for the last. So claim now and then, each time after 2 % of the wait so far.",
    ),
    Row(
        "asleep",
        lambda s, now, free: True,
        lambda s, now: Wait(s.wakes_at, bell=ASLEEP),
        "Each enqueue rings from now on.",
    ),
)


def next_action(state: State, now: float, free: Free, table: tuple[Row, ...] = TABLE) -> Action:
    """What to do at `now`, a time of the event loop, if `free` is what can be claimed."""
    for row in table:
        if row.holds(state, now, free):
            return row.action(state, now)
    raise AssertionError("the last row always holds")
