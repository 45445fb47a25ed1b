"""What a claimer does next: each row of both tables, the order of the rows, and the values that they read."""

from __future__ import annotations

import math
from collections.abc import Callable
from datetime import UTC, datetime

import pytest

from notifyq.worker import decide
from notifyq.worker.capacity import Free
from notifyq.worker.decide import TABLE, BellSilent, next_action
from notifyq.worker.drain import CHECK_AGAIN_SECONDS, DRAIN
from notifyq.worker.moderation import Moderation
from notifyq.worker.state import (
    AGAIN_LEAST,
    ECHO_LIMIT_SECONDS,
    ECHO_SECONDS,
    PASS_FORGET_SECONDS,
    PASS_SECONDS,
    PROMOTED_AT_ONCE,
    QUIET_SECONDS,
    DueTimer,
    Echo,
    Found,
    Position,
    State,
    TurnPassing,
)

NOW = 1000.0
FREE, FULL = Free({"q": 3}, 3), Free({}, 0)
NEXT = datetime.now(UTC)


def asleep() -> State:
    """A worker that sleeps, and that has nothing to do."""
    state = State(position=Position.ASLEEP, wanted=Position.ASLEEP, listening=True)
    state.due.checked_at = NOW
    return state


def row(state: State, free: Free = FREE) -> str:
    return next(row.name for row in TABLE if row.holds(state, NOW, free))


def burst(state: State) -> None:
    state.moderation = Moderation()
    state.moderation.arrived(9, NOW)


def lose_echo(state: State) -> None:
    state.echo = Echo(on=True, text="echo 1", sent_at=NOW - ECHO_LIMIT_SECONDS - 1)


def be_away(state: State) -> None:
    state.position, state.listening, state.away_since = Position.AWAY, False, NOW


def be_away_for_long(state: State) -> None:
    state.listening, state.away_since = True, NOW - 2


def leave(state: State) -> None:
    state.position, state.turn.passing = Position.TURN, True


# What makes each row hold, from the last row to the first. None of it makes a row before it hold.
MAKES: dict[str, Callable[[State], object]] = {
    "asleep": lambda s: None,
    "arming": lambda s: setattr(s, "position", Position.TURN),
    "echo": lambda s: setattr(s, "echo", Echo(on=True, sent_at=NOW - ECHO_SECONDS - 1)),
    "awake": burst,
    "claim": lambda s: s.notified(),
    "due": lambda s: setattr(s.due, "next_at", NOW),
    "echo lost": lose_echo,
    "away": be_away,
    "away, listening": be_away_for_long,
    "poll": lambda s: setattr(s, "poll_at", NOW),
    "poll found": lambda s: setattr(s, "poll_found", True),
    "passing": leave,
    "backlog": lambda s: setattr(s, "backlog", True),
    "backlog, due": lambda s: setattr(s.due, "checked_at", NOW - 1),
    "settings": lambda s: s.notified(settings=True),
    "not listening": lambda s: s.unlistened(),
    "no capacity": lambda s: None,
    "timer unknown": lambda s: setattr(s, "timer_unknown", True),
    "isolate": lambda s: setattr(s, "isolation_wanted", True),
    "release": lambda s: setattr(s, "release_wanted", True),
    "heartbeat": lambda s: setattr(s, "heartbeat_wanted", True),
    "failed": lambda s: setattr(s, "failure", ConnectionError("cut")),
}


def test_each_row_comes_before_all_that_follow_it() -> None:
    assert list(MAKES) == [row.name for row in reversed(TABLE)]
    state, free = asleep(), FREE
    for name, make in MAKES.items():
        make(state)
        free = FULL if name == "no capacity" else free
        assert row(state, free) == name


def test_a_decision_changes_nothing() -> None:
    state, free = asleep(), FREE
    for name, make in MAKES.items():
        make(state)
        before = repr(state), vars(state.moderation).copy()
        next_action(state, NOW, free)
        assert (repr(state), vars(state.moderation)) == before, name


@pytest.mark.parametrize("left", [{"q"}, {"other"}])
def test_a_queue_that_it_left_tasks_in_is_claimed_from_when_it_has_capacity(left: set[str]) -> None:
    state = asleep()
    state.left = left
    assert row(state) == ("backlog" if left == {"q"} else "asleep")


def test_it_waits_until_the_first_of_its_timers() -> None:
    state = asleep()
    state.due.next_at, state.poll_at, state.head_scan_at = NOW + 3, NOW + 2, NOW + 1
    assert next_action(state, NOW, FREE) == decide.Wait(NOW + 1, bell=Position.ASLEEP)
    state.due.again_at = NOW + 0.5
    assert next_action(state, NOW, FREE) == decide.Wait(NOW + 0.5, bell=Position.ASLEEP)


def test_it_looks_ever_more_rarely_while_it_waits_for_share() -> None:
    state = asleep()
    state.position, state.wanted = Position.TURN, Position.TURN
    gaps = []
    for armed in (0.0, 0.01, 1.0, 60.0):
        state.want(Position.TURN, NOW)
        state.want(Position.ASLEEP, NOW - armed)
        action = next_action(state, NOW, FREE)
        assert isinstance(action, decide.Wait)
        assert action.then_claims
        gaps.append(round(action.until - NOW, 4))
    assert gaps == [0.002, 0.002, 0.02, 0.05]


def test_an_echo_that_is_not_heard_ends_the_session() -> None:
    state = asleep()
    state.echo.on = True
    state.echo.sent("echo 1", NOW - 1)
    assert row(state) == "asleep"
    lose_echo(state)
    action = next_action(state, NOW, FREE)
    assert isinstance(action, decide.Fail)
    assert isinstance(action.error, BellSilent)


def test_without_the_turn_it_claims_only_what_the_poll_found() -> None:
    state = asleep()
    be_away(state)
    state.claim_wanted = True
    state.polled(False, NOW + 5)
    assert row(state) == "away", "it would claim, but the poll found nothing"
    state.polled(True, NOW + 5)
    assert next_action(state, NOW, FREE) == decide.Claim(answers=True, without_turn=True)
    state.claim_begins(answers=True)
    assert row(state) == "away"


def test_a_claim_is_followed_by_a_due_check_unless_it_came_full_or_more_may_come() -> None:
    for full, checked_at, follows in ((False, NOW - 1, True), (False, NOW, True), (True, NOW - 1, False)):
        state = asleep()
        state.due.checked_at = checked_at
        state.claimed(1, NOW, answers=True, full=full, enough=False)
        assert state.timer_unknown is follows
    state = asleep()
    state.claimed(9, NOW, answers=True, full=False, enough=False)
    assert not state.timer_unknown, "it stays awake, and has looked a moment ago"


def test_a_second_full_claim_leaves_the_turn_to_others() -> None:
    state = asleep()
    state.claimed(3, NOW, answers=True, full=True, enough=False)
    wanted = [state.wanted]
    state.claimed(3, NOW, answers=False, full=True, enough=False)
    assert [*wanted, state.wanted] == [Position.ASLEEP, Position.AWAY]


def test_the_turn_is_not_passed_on_too_often() -> None:
    turn = TurnPassing()
    assert turn.pass_on(NOW)
    assert not turn.pass_on(NOW + PASS_SECONDS / 2)
    assert turn.pass_on(NOW + PASS_SECONDS)
    waits, now = [], NOW + 60
    for _ in range(7):
        assert turn.pass_on_for_full_queue(now)
        assert not turn.pass_on_for_full_queue(now)
        waits.append(round(turn.not_before - now, 2))
        now = turn.not_before
    assert waits == [0.05, 0.1, 0.2, 0.4, 0.8, 1.0, 1.0]
    assert turn.pass_on_for_full_queue(now + PASS_FORGET_SECONDS + 1)
    assert turn.wait == PASS_SECONDS


def found(promoted: int = 0, seconds: float | None = None, *, ready: bool = False) -> Found:
    return Found(promoted, seconds, ready, 0, NEXT)


def test_the_due_timer() -> None:
    due = DueTimer()
    due.checked(found(1, 2.5), NOW, seconds=0.001, from_cursor=False)
    assert (due.next_at, due.checked_at, due.cursor) == (NOW + 2.5, NOW, NEXT)
    assert not due.reads_from_cursor(NOW), "it was quick"
    due.checked(found(PROMOTED_AT_ONCE, 2.5), NOW, seconds=0.001, from_cursor=False)
    assert due.next_at == NOW, "there may be more"
    for _ in range(2):
        due.checked(found(), NOW, seconds=1.0, from_cursor=False)
    assert due.reads_from_cursor(NOW + 7)
    due.checked(found(), NOW, seconds=0.001, from_cursor=True)
    assert due.next_at == NOW + 8, "and then from the head"


def test_ready_tasks_that_it_could_not_claim_are_tried_again_or_left_to_others() -> None:
    state = asleep()
    for wait in (AGAIN_LEAST, 2 * AGAIN_LEAST):
        state.due_checked(found(ready=True), NOW, seconds=0.001, from_cursor=False, full=[], poll=False)
        assert state.due.again_at == pytest.approx(NOW + wait)
    state.due_checked(found(ready=True), NOW, seconds=0.001, from_cursor=False, full=["q"], poll=False)
    assert (state.due.again_at, state.due.again_wait) == (math.inf, 0.0)
    assert state.turn.passing
    assert state.wanted is Position.AWAY
    state.bell_moved(Position.AWAY, NOW)
    assert not state.turn.passing


# With --drain.

BUSY, IDLE, REFUSED = Free({"q": 3}, 3), Free({"q": 3}, 3, is_idle=True), Free({}, 0, is_idle=True)


def drained() -> State:
    """A worker with --drain that has found nothing, and then has looked once more."""
    state = State(draining=True, last_check_begun=True)
    state.due.checked_at = NOW
    return state


def drain_row(state: State, free: Free = IDLE) -> str:
    return next(row.name for row in DRAIN if row.holds(state, NOW, free))


def find(state: State, *, count: int, full: bool = False) -> None:
    """Carry out the claim that is next, which finds this."""
    action = next_action(state, NOW, BUSY, DRAIN)
    assert isinstance(action, decide.Claim)
    state.claim_begins(action.answers)
    state.claimed(count, NOW, answers=action.answers, full=full, enough=True)


# As above: from the last row to the first.
MAKES_DRAIN: dict[str, Callable[[State], object]] = {
    "drain, idle": lambda s: setattr(s, "last_check_begun", False),
    "drained": lambda s: setattr(s, "last_check_begun", True),
    "drain, again": lambda s: setattr(s, "check_again", True),
    "isolate": lambda s: setattr(s, "isolation_wanted", True),
    "drain, busy": lambda s: None,
    "drain, full": lambda s: None,
    "drain, claim": lambda s: s.notified(),
    "drain, due": lambda s: setattr(s.due, "checked_at", NOW - 1),
    "settings": lambda s: s.notified(settings=True),
    "release": lambda s: setattr(s, "release_wanted", True),
    "heartbeat": lambda s: setattr(s, "heartbeat_wanted", True),
    "failed": lambda s: setattr(s, "failure", ConnectionError("cut")),
}


def test_each_row_of_a_drain_comes_before_all_that_follow_it() -> None:
    assert list(MAKES_DRAIN) == [row.name for row in reversed(DRAIN)]
    state, free = drained(), IDLE
    for name, make in MAKES_DRAIN.items():
        make(state)
        free = {"drain, busy": BUSY, "drain, full": FULL, "drain, claim": BUSY}.get(name, free)
        assert drain_row(state, free) == name
        before = repr(state), vars(state.moderation).copy()
        next_action(state, NOW, free, DRAIN)
        assert (repr(state), vars(state.moderation)) == before, name


def test_a_drain_claims_until_nothing_comes_and_last_from_the_head() -> None:
    state = drained()
    state.claim_wanted = True
    for count, full, from_head in ((3, True, True), (3, True, False), (2, False, False), (1, False, True)):
        assert next_action(state, NOW, BUSY, DRAIN) == decide.Claim(answers=from_head, from_head=from_head)
        find(state, count=count, full=full)
    find(state, count=0)
    assert drain_row(state, BUSY) == "drain, busy"


def test_a_drain_that_has_a_free_slot_claims_now_and_then_while_handlers_run() -> None:
    state, waits = drained(), []
    state.slot_released()
    for _ in range(8):
        find(state, count=0)
        action = next_action(state, NOW, BUSY, DRAIN)
        assert isinstance(action, decide.Wait)
        assert action.then_claims
        waits.append(round(action.until - NOW, 4))
        state.waited(action.then_claims)
    assert waits == [0.02, 0.04, 0.08, 0.16, 0.32, 0.5, 0.5, 0.5]
    find(state, count=1)
    find(state, count=0)
    assert next_action(state, NOW, BUSY, DRAIN) == decide.Wait(NOW + 0.02, then_claims=True, starts_batches=True)
    state.due.next_at = NOW + 0.01
    assert next_action(state, NOW, BUSY, DRAIN) == decide.Wait(NOW + 0.01, then_claims=True, starts_batches=True)
    state.due.next_at = NOW
    assert drain_row(state, BUSY) == "drain, due"


def test_a_drain_that_is_full_waits_for_a_handler_to_end() -> None:
    state = drained()
    state.due.next_at = NOW + 1
    assert next_action(state, NOW, FULL, DRAIN) == decide.Wait(math.inf, then_claims=True, starts_batches=True)


def test_a_drain_looks_once_more_for_all_that_may_be_left() -> None:
    state = State(draining=True)
    state.due.checked_at = NOW
    assert next_action(state, NOW, IDLE, DRAIN) == decide.LastCheck()
    state.last_check_begins(NOW, awaits_rescue=False, others=False)
    assert state.unhandled
    rows = [drain_row(state)]
    state.release_wanted = False
    rows.append(drain_row(state))
    state.due_check_begins()
    state.due_checked(found(), NOW, seconds=0.001, from_cursor=False, full=[], poll=False)
    rows.append(drain_row(state))
    assert next_action(state, NOW, IDLE, DRAIN) == decide.Claim(answers=True, from_head=True)
    find(state, count=0)
    rows.append(drain_row(state))
    state.isolation_wanted = False
    assert [*rows, drain_row(state)] == ["release", "drain, due", "drain, claim", "isolate", "drained"]
    assert next_action(state, NOW, IDLE, DRAIN) == decide.Finish()


@pytest.mark.parametrize("what", ["promoted", "claimed", "ended"])
def test_a_drain_that_finds_something_does_not_end_yet(what: str) -> None:
    state = drained()
    assert drain_row(state) == "drained"
    if what == "promoted":
        state.due_checked(found(1), NOW, seconds=0.001, from_cursor=False, full=[], poll=False)
    elif what == "claimed":
        state.claim_wanted = True
        find(state, count=1)
    else:
        state.slot_released()
    find(state, count=0)
    assert drain_row(state) == "drain, idle"


@pytest.mark.parametrize("why", ["rescue", "others"])
def test_a_drain_looks_again_while_other_workers_may_give_tasks_up(why: str) -> None:
    """Until a rescue, however long it takes, and for a moment beside a worker that has other handlers."""
    state = drained()
    for seconds in (0.0, QUIET_SECONDS - 0.01):
        state.last_check_begins(NOW + seconds, awaits_rescue=why == "rescue", others=why == "others")
        state.release_wanted = state.claim_wanted = state.isolation_wanted = False
        state.due.checked_at = NOW
        again = decide.Wait(NOW + CHECK_AGAIN_SECONDS, then_claims=True)
        assert next_action(state, NOW, IDLE, DRAIN) == again
        assert next_action(state, NOW, REFUSED, DRAIN) == decide.Finish()
        state.waited(again.then_claims)
        find(state, count=0)
        assert next_action(state, NOW, IDLE, DRAIN) == decide.LastCheck()
    state.last_check_begins(NOW + QUIET_SECONDS, awaits_rescue=why == "rescue", others=why == "others")
    assert state.check_again is (why == "rescue")
    state.slot_released()
    state.last_check_begins(NOW + QUIET_SECONDS, awaits_rescue=False, others=True)
    assert state.check_again, "it has found something since"


def test_a_drain_ends_when_it_can_claim_no_more() -> None:
    state = drained()
    state.slot_released()
    assert drain_row(state, FULL) == "drain, full"
    assert next_action(state, NOW, REFUSED, DRAIN) == decide.Finish()


def test_without_drain_a_free_slot_alone_is_no_reason_to_claim() -> None:
    state = asleep()
    state.unhandled_plain = True
    state.slot_released()
    assert row(state) == "asleep"
    state.thread_released()
    assert (row(state), state.unhandled, state.unhandled_plain) == ("claim", True, False)
