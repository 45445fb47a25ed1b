"""State: all that decides what a claimer does next, as values. Pure: no clock, no connection, no event loop.

decide.py reads a State and never changes it. Only the events do, which are methods here. The claimer and its parts call
them, all on the worker's event loop.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum
from typing import NamedTuple

from .cursors import HEAD_SCAN_TIMES, SLOW_SECONDS, Usual
from .moderation import Moderation

ECHO_SECONDS = 10.0  # from one echo to the next, if no due check comes in between
ECHO_LIMIT_SECONDS = 3.0  # an echo that isn't heard for longer is lost
DUE_AWAKE_SECONDS = 0.010  # from one due check to the next while awake
PASS_SECONDS, PASS_MOST = 0.05, 1.0  # from passing the turn on to doing so again; doubles for a queue that stays full
PASS_FORGET_SECONDS = 5.0  # without passing it on, after which it begins at PASS_SECONDS again
AGAIN_LEAST, AGAIN_MOST = 0.002, 0.5  # until a claim of what another session had locked; doubles
# With --drain: until it claims again while handlers run; doubles with each claim that finds nothing.
DRAIN_LEAST, DRAIN_MOST = 0.01, 0.5
QUIET_SECONDS = 0.5  # with --drain: how long it must find nothing, beside a worker that has other handlers
PROMOTED_AT_ONCE = 1000  # due tasks of a queue, at most


class Position(IntEnum):
    """Where a worker stands at the bell (doorbell.py)."""

    AWAY = 0
    TURN = 1
    ASLEEP = 2


AWAY, TURN, ASLEEP = Position  # quicker than an attribute of the class


@dataclass(slots=True)
class Echo:
    """The notification that a worker sends to itself, to prove that it still hears the bell."""

    on: bool = False  # whether echoes are sent: the bell was heard here
    text: str = ""  # of the echo that was sent and not heard yet
    sent_at: float = 0.0

    def sent(self, text: str, now: float) -> None:
        self.text, self.sent_at = text, now

    def may_be_sent(self, now: float) -> bool:
        return self.on and not self.text and now - self.sent_at > ECHO_SECONDS / 3

    def is_due(self, now: float) -> bool:
        return self.on and now - self.sent_at > ECHO_SECONDS

    def is_lost(self, now: float) -> bool:
        return self.text != "" and now - self.sent_at > ECHO_LIMIT_SECONDS

    @property
    def next_at(self) -> float:
        """When `is_lost` or `is_due` holds next."""
        if not self.on:
            return math.inf
        return self.sent_at + (ECHO_LIMIT_SECONDS if self.text else ECHO_SECONDS) + 0.001


@dataclass(slots=True)
class TurnPassing:
    """Passing the turn on: leaving it to another worker, and queueing for it again."""

    passing: bool = False  # the turn is to be passed on, and the worker isn't away yet
    not_before: float = 0.0  # when it may be passed on again
    wait: float = PASS_SECONDS  # after it was passed on for a full queue

    def pass_on(self, now: float) -> bool:
        """This worker has work enough. Returns whether it passes the turn on."""
        if now < self.not_before:
            return False
        self.not_before = now + PASS_SECONDS
        self.passing = True
        return True

    def pass_on_for_full_queue(self, now: float) -> bool:
        """Tasks are ready in a queue that is full here. Returns whether it passes the turn on."""
        if now < self.not_before:
            return False
        self.wait = PASS_SECONDS if now > self.not_before + PASS_FORGET_SECONDS else min(PASS_MOST, self.wait * 2)
        self.not_before = now + self.wait
        self.passing = True
        return True


class Found(NamedTuple):
    """What a due check found."""

    promoted: int  # due tasks that it made ready
    seconds: float | None  # until the next one is due; None: there is none
    ready: bool  # tasks are ready in the queues that it was asked about
    inserted: int  # how many tasks were ever inserted into these queues
    next_cursor: datetime | None  # no task is scheduled for an earlier time


@dataclass(slots=True)
class DueTimer:
    """When the next task is due, and from which time on a due check needs to read."""

    next_at: float = math.inf
    checked_at: float = 0.0
    again_at: float = math.inf  # when to claim what another session had locked
    again_wait: float = 0.0
    cursor: datetime | None = None  # all tasks due before it are promoted, but those that become visible very late
    head_scan_at: float = 0.0  # when to look for such late ones
    usual: Usual = field(default_factory=Usual)

    def reads_from_cursor(self, now: float) -> bool:
        return now < self.head_scan_at

    def checked(self, found: Found, now: float, *, seconds: float, from_cursor: bool) -> None:
        """A due check was answered at `now`, after `seconds`."""
        self.checked_at = now
        self.next_at = math.inf if found.seconds is None else now + max(0.0, found.seconds)
        if found.promoted < PROMOTED_AT_ONCE:
            self.cursor = found.next_cursor
        if from_cursor:
            self.next_at = min(self.next_at, self.head_scan_at)
        else:
            takes = self.usual.note(seconds)
            self.head_scan_at = now + (HEAD_SCAN_TIMES * takes if takes > SLOW_SECONDS else 0.0)
        if found.promoted >= PROMOTED_AT_ONCE:
            self.next_at = now
        self.again_at = math.inf

    def claim_again(self, now: float) -> None:
        self.again_wait = min(AGAIN_MOST, max(AGAIN_LEAST, self.again_wait * 2))
        self.again_at = now + self.again_wait


@dataclass(slots=True)
class State:
    """All that decides what a claimer does next. Times are the event loop's. The methods are the events."""

    position: Position = AWAY
    wanted: Position = AWAY
    listening: bool = False
    claim_wanted: bool = False  # something happened since the last claim that answers (decide.Claim)
    backlog: bool = False  # the last claim came back full
    left: set[str] = field(default_factory=set[str])  # queues with a limit in which it may have left tasks
    timer_unknown: bool = False  # due tasks weren't looked for since the last claim
    poll_found: bool = False  # the last poll found tasks, and it was made without the turn
    unhandled: bool = False  # this worker may have handlers for tasks that other workers had none for
    unhandled_plain: bool = False  # such tasks may be left, for want of a thread
    release_wanted: bool = False  # tasks may wait for one that has ended
    heartbeat_wanted: bool = False
    isolation_wanted: bool = False  # there may be tasks to isolate
    settings_changed: bool = False  # a queue may have been paused, resumed or limited
    stopping: bool = False
    draining: bool = False  # it ends when nothing is left to do (--drain)
    drain_wait: float = DRAIN_LEAST  # until it claims again while handlers run; only with `draining`
    last_check_begun: bool = False  # and nothing was found since, and no task ended; only with `draining`
    check_again: bool = False  # another last check must follow, even if this one finds nothing
    quiet_since: float = math.inf  # when the first of the last checks that found nothing began
    failure: BaseException | None = None
    poll_at: float = math.inf
    head_scan_at: float = math.inf  # when to claim from the head even if nothing happens (cursors.py)
    away_since: float = 0.0
    arming_since: float = 0.0  # when it began to wait for SHARE
    inserted: int = -1  # how many tasks were ever inserted, by the last due check; -1: there was none
    claimed_since: int = 0  # tasks, since that check
    echo: Echo = field(default_factory=Echo)
    turn: TurnPassing = field(default_factory=TurnPassing)
    due: DueTimer = field(default_factory=DueTimer)
    moderation: Moderation = field(default_factory=Moderation)

    def session_began(self, poll_at: float) -> None:
        self.position = self.wanted = AWAY
        self.failure = None
        self.backlog = self.listening = self.turn.passing = self.timer_unknown = self.poll_found = False
        self.last_check_begun = False
        self.quiet_since = math.inf
        self.claim_wanted = self.unhandled = self.release_wanted = True
        self.echo.text = ""
        self.due.next_at, self.due.checked_at = math.inf, 0.0
        self.poll_at = poll_at

    # The bell.

    def want(self, position: Position, now: float) -> None:
        if position is ASLEEP:
            self.moderation.update(now)
            if self.wanted is not position:
                self.arming_since = now
        self.wanted = position

    def bell_moved(self, position: Position, now: float) -> None:
        self.position = position
        if position is AWAY:
            self.away_since = now
            self.turn.passing = False
        else:
            self.claim_wanted = True  # the claim that follows getting the turn, and falling asleep

    def listens(self) -> None:
        # Notifications that came before weren't heard.
        self.listening = self.claim_wanted = self.unhandled = self.settings_changed = True

    def unlistened(self) -> None:
        self.listening = False
        self.echo.text = ""

    def notified(self, *, unhandled: bool = False, settings: bool = False) -> None:
        self.claim_wanted = True
        self.unhandled |= unhandled
        self.settings_changed |= settings

    # Claims.

    def slot_released(self) -> None:
        """A slot is free, or outcomes were written."""
        if self.draining:
            self._found_something()

    def thread_released(self) -> None:
        """One more task fits, also if its handler is a plain one. Called only while `unhandled_plain` is true."""
        self.unhandled_plain = False
        self.unhandled = self.claim_wanted = True

    def claim_begins(self, answers: bool) -> None:
        """Called before the statement. If this claim answers what has happened so far, what happens from here on asks
        for another."""
        if answers:
            self.claim_wanted = self.poll_found = False

    def claimed(
        self, count: int, now: float, *, answers: bool, without_turn: bool = False, full: bool, enough: bool
    ) -> None:
        """`count` tasks came. `full`: as many as were asked for. `enough`: they keep this worker busy."""
        self.backlog = full
        self.claimed_since += count
        self.moderation.arrived(count, now)
        if self.draining and count:
            self._found_something()
        elif self.draining:
            self.drain_wait = min(DRAIN_MOST, 2 * self.drain_wait)
        if not answers:
            if full:
                self.wanted = AWAY
        elif not without_turn:
            if count and enough:
                self.pass_on(now)
            if not full and (now - self.due.checked_at > DUE_AWAKE_SECONDS or not self.moderation.update(now)):
                self.timer_unknown = True

    def pass_on(self, now: float) -> None:
        """Let another worker have the turn, and queue for it again."""
        if self.position is not AWAY and self.turn.pass_on(now):
            self.wanted = AWAY

    def slept(self, late: bool, now: float) -> None:
        """`late`: the event loop has so much to do that another worker should have the turn."""
        self.moderation.update(now)
        if late:
            self.pass_on(now)
        self.claim_wanted = True

    def waited(self, then_claims: bool) -> None:
        self.claim_wanted |= then_claims
        if self.check_again:
            self.last_check_begun = self.check_again = False

    def last_check_begins(self, now: float, *, awaits_rescue: bool, others: bool) -> None:
        """Nothing seems to be left to do. Ask for all that may still be.

        awaits_rescue  a dead worker holds tasks that will be ready soon
        others         a worker without some of the handlers may hold tasks for a moment
        """
        self.claim_wanted = self.release_wanted = self.isolation_wanted = self.unhandled = True
        self.last_check_begun = True
        self.due.checked_at = -math.inf
        self.quiet_since = min(self.quiet_since, now)
        self.check_again = awaits_rescue or (others and now - self.quiet_since < QUIET_SECONDS)

    def _found_something(self) -> None:
        """Tasks came or became ready, or one ended, which may have enqueued others."""
        self.claim_wanted = True
        self.last_check_begun = False
        self.drain_wait = DRAIN_LEAST
        self.quiet_since = math.inf

    # Due tasks.

    def due_check_begins(self) -> None:
        self.settings_changed = self.timer_unknown = False  # before they are read

    def due_checked(
        self, found: Found, now: float, *, seconds: float, from_cursor: bool, full: Sequence[str], poll: bool
    ) -> None:
        """A due check was answered at `now`. `full`: the queues that it can't claim from, but for paused ones."""
        self.due.checked(found, now, seconds=seconds, from_cursor=from_cursor)
        if found.promoted:
            self._found_something()
        if self.inserted >= 0:
            # Tasks for other workers have arrived too. While they come in numbers, don't make them ring either.
            self.moderation.arrived(max(0, found.inserted - self.inserted - self.claimed_since), now)
        self.inserted, self.claimed_since = found.inserted, 0
        if found.ready and not poll and not full:
            # It wasn't claimed, though there is capacity: it has just come, or another session has locked it, which
            # doesn't ring when it unlocks it.
            self.due.claim_again(now)
            return
        self.due.again_wait = 0.0
        if poll:
            self.claim_wanted |= found.ready
        elif found.ready and self.position is not AWAY:
            if self.turn.pass_on_for_full_queue(now):
                self.wanted = AWAY
            else:
                self.due.next_at = min(self.due.next_at, self.turn.not_before)

    def polled(self, found: bool, next_at: float) -> None:
        """`found`: ready tasks, or due ones, which are ready now."""
        self.poll_at = next_at
        self.poll_found = found and self.position is AWAY

    @property
    def wakes_at(self) -> float:
        """When a worker with the turn has something to do, if nothing happens before."""
        due = self.due
        return min(due.next_at, self.poll_at, self.head_scan_at, due.again_at, self.echo.next_at)
