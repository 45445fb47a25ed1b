"""The doorbell: schema.sql's enqueuers, and workers that decide by the very table of notifyq/worker/decide.py.

An enqueuer is one transaction: INSERT with trigger ring(), then COMMIT, whenever it likes, or ROLLBACK. A worker is its
connection at the bell (BellConnection.run: the turn, SHARE on the bell) and its loop (Claimer), which run side by side.
What the loop does next is `decide.next_action`, and what happens changes its State by State's own methods. The model
calls both. Its own part of the loop is what each action leads to. PostgreSQL's part: a SHARE that waits refuses ROW
EXCLUSIVE ... NOWAIT; the turn's queue is first come first served; rows are visible before the locks of their
transaction are released; a session that listens at a commit hears its NOTIFY, at any time after it.

What is merged or left out, and why that hides nothing:

* The position that an action asks for (`bell`) is wanted together with what it is decided from. Only the connection at
  the bell reads it, and one that acts late looks the same as a loop that decides late.
* A claim is one step: its begin, the statement's snapshot, and its answer. A ring in between is delivered at the
  statement's end and sets `claim_wanted` again, as it does a moment later; a task that is committed in between rings,
  or keeps SHARE away. Only the loop reads what the answer changes.
* A lock that is granted and the client's hearing of it are one step: meanwhile no other session is treated otherwise
  than while it waits. So are BEGIN and fall_asleep, and `position = AWAY` and pg_advisory_unlock.
* Time isn't modelled: a wait's timer may go off whenever the wait lasts, and `Moderation` may say anything after a
  claim. A wait of less than a second comes soon, a longer one maybe never.
* Handlers end when they like. Of the table's rows, those stay out of reach that a failure, the heartbeat, a timer, an
  echo, the fallback poll, a setting or a queue's limit leads to (OUT_OF_REACH): other stories, that end in
  `claim_wanted`, as a ring does, or in the end of the session. So a claim and the due check after it are one step. A
  session that fails is a worker killed and another that starts.
* Two rings that a worker hasn't heard yet are one; and one that comes while it is away is heard at once, as nothing
  comes of it: `claim_wanted` is set with the turn.
* What a worker ran when it was killed is the other model's story.
* Claims see all that is ready. From a cursor (cursors.py) they may overlook a task until the next claim from the head,
  which has a timer: tests/worker/test_cursors.py shows that it comes in time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from enum import IntEnum
from functools import cache
from typing import NamedTuple

from notifyq.worker import decide, state
from notifyq.worker.capacity import Free
from notifyq.worker.decide import TABLE, Action, Row
from notifyq.worker.moderation import Moderation
from notifyq.worker.state import Position

from .explore import Comes, Promise, Step

NOW, SOON, MAYBE = Comes.NOW, Comes.SOON, Comes.MAYBE


class Enqueuer(IntEnum):
    """One transaction."""

    __hash__ = int.__hash__  # an Enum's own is a call, and most of the time here goes into hashing

    IDLE = 0
    BEGUN = 1  # only where it matters: the variant that decides by its snapshot
    BEGUN_SLEEPER = 2  # and saw a sleeper
    SILENT = 3  # inserted, and was granted ROW EXCLUSIVE: no worker sleeps
    RINGS = 4  # inserted, and was refused: its NOTIFY goes out at commit
    VISIBLE = 5  # silent and committed, its lock not released yet
    DONE = 6
    NEEDLESS = 7  # rings though no worker sleeps


class Bell(IntEnum):
    """Where a worker's connection at the bell is. Its position is what the loop knows of it."""

    __hash__ = int.__hash__

    DEAD = 0
    AWAY = 1
    QUEUED = 2  # in take_turn
    TURN = 3
    ARMING = 4  # in fall_asleep
    REFUSED = 5  # between two tries of it, its transaction open
    ASLEEP = 6


TURN, ASLEEP, AWAY = Position.TURN, Position.ASLEEP, Position.AWAY
POSITION = {Bell.TURN: TURN, Bell.ARMING: TURN, Bell.REFUSED: TURN, Bell.ASLEEP: ASLEEP}


class Worker(NamedTuple):
    """Its connection at the bell, and what of the loop's State differs between the states of the model."""

    fleet: int
    bell: Bell = Bell.AWAY
    wanted: int = 1  # a Position, but hashed faster
    queued: int = 0  # rank in the turn's queue; 0: not in it
    listening: bool = True
    rung: bool = False  # a NOTIFY that isn't delivered yet
    claim_wanted: bool = False
    clearing: bool = False  # only in the variant that clears `claim_wanted` after the claim
    backlog: bool = False
    passing: bool = False
    awake: bool = False  # what Moderation says
    held: int = 0  # tasks that it runs


class Says(Moderation):
    """Says what the model wants it to say."""

    def __init__(self, awake: bool) -> None:
        super().__init__()
        self.says = awake

    def is_awake(self, now: float) -> bool:
        return self.says

    def update(self, now: float) -> bool:
        return self.says


def to_state(worker: Worker) -> state.State:
    """The worker's State, at time 0. No poll, no echo, nothing due: their times are never."""
    made = state.State(
        position=POSITION.get(worker.bell, AWAY),
        wanted=Position(worker.wanted),
        listening=worker.listening,
        claim_wanted=worker.claim_wanted,
        backlog=worker.backlog,
        moderation=Says(worker.awake),
    )
    made.turn.passing = worker.passing
    return made


def from_state(worker: Worker, now: state.State) -> Worker:
    return worker._replace(
        wanted=int(now.wanted),
        listening=now.listening,
        claim_wanted=now.claim_wanted,
        backlog=now.backlog,
        passing=now.turn.passing,
        awake=now.moderation.is_awake(0.0),
    )


class World(NamedTuple):
    enqueuers: tuple[Enqueuer, ...]
    workers: tuple[Worker, ...]
    rung: int = 0  # committed, ready tasks whose enqueuers rang
    silent: int = 0  # and those whose enqueuers didn't


class Sees(NamedTuple):
    """What a worker's next step depends on, beside the worker itself."""

    rung: int
    silent: int
    share_free: bool  # no enqueuer holds ROW EXCLUSIVE
    turn_free: bool
    last: int  # rank in the turn's queue


class Move(NamedTuple):
    text: str
    worker: Worker
    comes: Comes
    rung: int = 0  # tasks that it takes
    silent: int = 0


HOLDS_TURN = {Bell.TURN, Bell.ARMING, Bell.REFUSED, Bell.ASLEEP}
REFUSES = {Bell.ARMING, Bell.ASLEEP}  # SHARE, held or waited for

# Changes that look harmless, and aren't.
WRONG = {
    "late flag": "`claim_wanted` is cleared after the claim instead of before",
    "no last claim": "falling asleep isn't followed by a claim",
    "no share": "an enqueuer that is granted its lock doesn't keep it until commit",
    "late listen": "LISTEN after falling asleep instead of before",
    "one connection": "LISTEN on the connection that waits for the locks",
    "no claims while arming": "a worker that waits for SHARE doesn't claim now and then",
    "long wait": "the wait for SHARE goes on when the worker wants to be away",
    "locks first": "locks are released before the rows are visible",
    "flag row": "an enqueuer decides by its snapshot whether a worker sleeps, as with a flag in a row",
    "turn survives": "the turn is a row that names its holder, which a killed worker can't clear",
    "never again": "no LISTEN when the turn is back, after UNLISTEN while away",
    "always rings": "the trigger doesn't ask whether a worker sleeps",
    "no turn": "every worker listens and sleeps, without a turn",
}


def drop(name: str) -> tuple[Row, ...]:
    """The table without a row."""
    return tuple(row for row in TABLE if row.name != name)


def change(name: str, holds: Callable[[state.State, float, Free], bool]) -> tuple[Row, ...]:
    """The table with another condition in a row."""
    return tuple(replace(row, holds=holds) if row.name == name else row for row in TABLE)


def _waits_for_share(s: state.State, now: float) -> Action:
    return decide.Wait(s.wakes_at, bell=ASLEEP)


# The wrong variants that are another table.
WRONG_TABLES = {
    "late listen": change(
        "not listening", lambda s, now, free: s.position is ASLEEP and not s.listening and not s.claim_wanted
    ),
    "never again": drop("not listening"),
    "no claims while arming": tuple(
        replace(row, action=_waits_for_share) if row.name == "arming" else row for row in TABLE
    ),
}
# Rows that no state of the model reaches: see above.
OUT_OF_REACH = {
    "failed", "heartbeat", "release", "isolate", "timer unknown", "settings", "backlog, due", "poll found", "poll",
    "echo lost", "due", "echo",
}  # fmt: skip


class Doorbell:
    """`fleets`: the fleet of each worker. `slots`: how many tasks each runs at a time. `wrong`: a key of WRONG."""

    def __init__(self, enqueuers: int, fleets: tuple[int, ...], slots: int, wrong: str = "") -> None:
        self.slots = slots
        self.decided: dict[str, set[Worker]] = {}  # by row: the workers that it held for
        self._wrong = wrong
        self._table = tuple(self._noted(row) for row in WRONG_TABLES.get(wrong, TABLE))
        self._decided = cache(self._decide)
        workers = tuple(Worker(fleet, listening=wrong != "late listen") for fleet in fleets)
        self.start = World((Enqueuer.IDLE,) * enqueuers, workers)
        self.promises: list[Promise[World]] = [
            Promise(
                "a task that was rung for is never claimed, though a worker has a free slot",
                NOW,
                self._rung_served,
            ),
            Promise("a committed task is never claimed, though a worker has a free slot", SOON, self._served),
        ]
        self._says_nothing = {Enqueuer.SILENT, Enqueuer.VISIBLE}  # holds ROW EXCLUSIVE
        if wrong in {"no share", "flag row"}:
            self._says_nothing = set()
        elif wrong == "locks first":
            self._says_nothing = {Enqueuer.SILENT}
        self._moves = cache(
            lambda worker, sees: [*self._hears(worker), *self._loop(worker, sees), *self._move_bell(worker, sees)]
        )

    # What must hold.

    def wrong(self, state: World) -> str | None:
        if Enqueuer.NEEDLESS in state.enqueuers:
            return "an enqueuer rings though no worker sleeps or is about to"
        holders = [worker.fleet for worker in state.workers if worker.bell in HOLDS_TURN]
        if len(holders) > len(set(holders)):
            return "two workers of a fleet have the turn: one ring wakes both"
        return None

    def _free(self, state: World) -> bool:
        return any(worker.bell is not Bell.DEAD and worker.held < self.slots for worker in state.workers)

    def _served(self, state: World) -> bool:
        return not (state.rung or state.silent) or not self._free(state)

    def _rung_served(self, state: World) -> bool:
        return not state.rung or not self._free(state)

    def same(self, state: World) -> Hashable:
        return (*sorted(state.enqueuers), *sorted(state.workers), state.rung, state.silent)

    # What can happen.

    def steps(self, state: World) -> Iterator[Step[World]]:
        share_free = not self._says_nothing.intersection(state.enqueuers)
        for n in range(len(state.enqueuers)):
            yield from self._enqueuer(state, n)
        for n, worker in enumerate(state.workers):
            if worker.bell is Bell.DEAD:
                continue
            fleet = [other for other in state.workers if other.fleet == worker.fleet]
            turn_free = not any(other.bell in HOLDS_TURN or other.queued < 0 for other in fleet)
            last = max(other.queued for other in fleet)
            sees = Sees(state.rung, state.silent, share_free, turn_free, last)
            for text, moved, comes, rung, silent in self._moves(worker, sees):
                workers = [*state.workers]
                if worker.queued and not moved.queued:
                    workers = [_up(other, worker) for other in workers]
                workers[n] = moved
                after = World(state.enqueuers, tuple(workers), state.rung - rung, state.silent - silent)
                yield Step(f"worker {n + 1}: {text}", after, comes)

    def _enqueuer(self, state: World, n: int) -> Iterator[Step[World]]:
        def step(text: str, now: Enqueuer, comes: Comes, rung: int = 0, silent: int = 0) -> Step[World]:
            enqueuers = (*state.enqueuers[:n], now, *state.enqueuers[n + 1 :])
            workers = tuple(_told(worker) for worker in state.workers) if rung else state.workers
            return Step(
                f"enqueuer {n + 1}: {text}", World(enqueuers, workers, state.rung + rung, state.silent + silent), comes
            )

        here = state.enqueuers[n]
        sleeper = any(worker.bell in REFUSES for worker in state.workers)
        if here is Enqueuer.IDLE and self._wrong == "flag row":
            yield step("BEGIN, and its snapshot", Enqueuer.BEGUN_SLEEPER if sleeper else Enqueuer.BEGUN, MAYBE)
        elif here in {Enqueuer.IDLE, Enqueuer.BEGUN, Enqueuer.BEGUN_SLEEPER}:
            if self._wrong == "always rings" and not sleeper:
                yield step("INSERT; ring(): pg_notify", Enqueuer.NEEDLESS, MAYBE)
            elif here is Enqueuer.BEGUN:
                yield step("INSERT; ring(): no flag in its snapshot, so it is silent", Enqueuer.SILENT, MAYBE)
            elif here is Enqueuer.BEGUN_SLEEPER or (here is Enqueuer.IDLE and sleeper):
                yield step("INSERT; ring(): ROW EXCLUSIVE is refused, so pg_notify", Enqueuer.RINGS, MAYBE)
            else:
                yield step("INSERT; ring(): ROW EXCLUSIVE is granted, so it is silent", Enqueuer.SILENT, MAYBE)
        elif here is Enqueuer.RINGS:
            yield step("ROLLBACK", Enqueuer.DONE, MAYBE)
            yield step("COMMIT: its row is visible, and listeners are notified", Enqueuer.DONE, MAYBE, rung=1)
        elif here is Enqueuer.SILENT:
            yield step("ROLLBACK", Enqueuer.DONE, MAYBE)
            if self._wrong == "locks first":
                yield step("COMMIT: its lock is released", Enqueuer.VISIBLE, MAYBE)
            else:
                yield step("COMMIT: its row is visible", Enqueuer.VISIBLE, MAYBE, silent=1)
        elif here is Enqueuer.VISIBLE and self._wrong == "locks first":
            yield step("and now its row is visible", Enqueuer.DONE, NOW, silent=1)
        elif here is Enqueuer.VISIBLE:
            yield step("its lock is released", Enqueuer.DONE, NOW)

    def _hears(self, worker: Worker) -> Iterator[Move]:
        """What happens to it."""
        if worker.rung and not (self._wrong == "one connection" and worker.bell in {Bell.QUEUED, Bell.ARMING}):
            heard = self._event(worker._replace(rung=False), lambda s: s.notified())
            yield self._move("hears the bell (State.notified)", heard, NOW)
        if worker.held:
            yield self._move("a handler ends", worker._replace(held=worker.held - 1), MAYBE)
        # Its sessions end, and with them its locks and its place in the queue. What it ran is another model's story.
        survives = self._wrong == "turn survives" and worker.bell in HOLDS_TURN
        yield Move("is killed", Worker(worker.fleet, Bell.DEAD, queued=-1 if survives else 0), MAYBE)

    def _loop(self, worker: Worker, sees: Sees) -> Iterator[Move]:
        """What comes of the action that Claimer carries out."""
        if worker.clearing:
            cleared = worker._replace(clearing=False, claim_wanted=False)
            yield self._move("has the claim's answer, and clears `claim_wanted`", cleared, NOW)
            return
        match self._action(worker, 0.0):
            case decide.Wait() as wait:
                yield from self._waits(worker, wait)
            case decide.Listen():
                yield self._move("LISTEN, and will claim", self._event(worker, self._listens), NOW)
            case decide.Claim() as claim:
                text = (
                    "clears `claim_wanted` and claims" if claim.answers else "claims again, as the last came back full"
                )
                yield from self._claim(worker, sees, claim.answers, text)
            case decide.Sleep():
                slept = self._event(worker, lambda s: s.slept(False, 0.0))
                yield self._move("stays awake, and will claim", slept, NOW)
                late = self._event(worker, lambda s: s.slept(True, 0.0))
                yield self._move("wakes up late, so passes the turn on", late._replace(claim_wanted=False), MAYBE)
            case action:
                raise AssertionError(f"{action} is none that the model knows")

    def _waits(self, worker: Worker, wait: decide.Wait) -> Iterator[Move]:
        """The timer goes off."""
        if wait.until == math.inf:
            return
        if wait.then_claims:
            waited = self._event(worker, lambda s: s.waited(wait.then_claims))
            yield self._move("will claim again, while it waits for SHARE", waited, SOON if wait.until < 1.0 else MAYBE)
            return
        action = self._action(worker, wait.until)
        assert isinstance(action, decide.Unlisten), action
        yield self._move("UNLISTEN, away for a second", self._event(worker, lambda s: s.unlistened()), MAYBE)

    def _listens(self, s: state.State) -> None:
        wanted = s.claim_wanted
        s.listens()
        if self._wrong == "late listen":
            s.claim_wanted = wanted

    def _claim(self, worker: Worker, sees: Sees, answers: bool, text: str) -> Iterator[Move]:
        free = self.slots - worker.held
        taken = min(free, sees.rung + sees.silent)
        text = f"{text} (claim.sql: {taken or 'nothing'})"
        for rung in range(max(0, taken - sees.silent), min(taken, sees.rung) + 1):
            after = self._claimed(worker, answers, taken, awake=False, enough=False)
            yield self._move(text, after, NOW, rung, taken - rung)
            after = self._claimed(worker, answers, taken, awake=True, enough=False)
            yield self._move(f"{text}; more may come", after, NOW, rung, taken - rung)
            if taken and answers and (worker.held + taken) * 2 > self.slots:
                after = self._claimed(worker, answers, taken, awake=False, enough=True)
                yield self._move(f"{text}; that is work enough", after, NOW, rung, taken - rung)

    def _claimed(self, worker: Worker, answers: bool, taken: int, *, awake: bool, enough: bool) -> Worker:
        full = taken >= self.slots - worker.held

        def claim(s: state.State) -> None:
            if self._wrong != "late flag":
                s.claim_begins(answers)
            s.moderation = Says(awake)
            s.claimed(taken, 0.0, answers=answers, full=full, enough=enough)

        after = self._event(worker._replace(held=worker.held + taken), claim)
        return after._replace(clearing=answers and self._wrong == "late flag")

    def _move_bell(self, worker: Worker, sees: Sees) -> Iterator[Move]:
        """BellConnection.run. State.bell_moved sets `claim_wanted` with each new position but AWAY."""
        here, wanted = worker.bell, worker.wanted
        if here is Bell.AWAY and wanted != AWAY:
            queued = worker._replace(bell=Bell.QUEUED, queued=max(0, sees.last) + 1)
            yield self._move("take_turn: queues for the turn", queued, NOW)
        elif here is Bell.QUEUED:
            if (worker.queued == 1 and sees.turn_free) or self._wrong == "no turn":
                has_turn = self._arrives(worker._replace(queued=0), Bell.TURN)
                yield self._move("take_turn: has the turn", has_turn, NOW)
            yield self._move("take_turn: 5 s are over", worker._replace(bell=Bell.AWAY, queued=0), MAYBE)
        elif here is Bell.TURN and wanted == AWAY:
            yield self._move("pg_advisory_unlock: passes the turn on", self._arrives(worker, Bell.AWAY), NOW)
        elif here in {Bell.TURN, Bell.REFUSED} and wanted == ASLEEP:
            yield self._move("fall_asleep: waits for SHARE", worker._replace(bell=Bell.ARMING), NOW)
        elif here is Bell.REFUSED:
            yield self._move("ROLLBACK: doesn't fall asleep", self._arrives(worker, Bell.TURN), NOW)
        elif here is Bell.ARMING:
            if sees.share_free:
                yield self._move("fall_asleep: has SHARE", self._arrives(worker, Bell.ASLEEP), NOW)
            yield self._move("fall_asleep: its wait is over", worker._replace(bell=Bell.REFUSED), MAYBE)
            if wanted != ASLEEP and self._wrong != "long wait":
                yield self._move("fall_asleep: its wait is cancelled (want)", worker._replace(bell=Bell.REFUSED), NOW)
        elif here is Bell.ASLEEP and wanted != ASLEEP:
            yield self._move("ROLLBACK: wakes up", self._arrives(worker, Bell.TURN), NOW)
        elif here is Bell.ASLEEP:
            yield self._move("ROLLBACK: to fall asleep anew (renew_sleep)", self._arrives(worker, Bell.TURN), MAYBE)

    # The code.

    def _arrives(self, worker: Worker, bell: Bell) -> Worker:
        if self._wrong == "no last claim" and bell is Bell.ASLEEP:
            return worker._replace(bell=bell)
        return self._event(worker, lambda s: s.bell_moved(POSITION.get(bell, AWAY), 0.0))._replace(bell=bell)

    def _event(self, worker: Worker, event: Callable[[state.State], None]) -> Worker:
        s = to_state(worker)
        event(s)
        return from_state(worker, s)

    def _action(self, worker: Worker, now: float) -> Action:
        free = self.slots - worker.held
        self._deciding = worker
        return decide.next_action(to_state(worker), now, Free({"q": free} if free else {}, free), self._table)

    def _noted(self, row: Row) -> Row:
        """A row that notes for which workers it held."""

        def holds(s: state.State, now: float, free: Free) -> bool:
            if held := row.holds(s, now, free):
                self.decided.setdefault(row.name, set()).add(self._deciding)
            return held

        return replace(row, holds=holds)

    def _move(self, text: str, worker: Worker, comes: Comes, rung: int = 0, silent: int = 0) -> Move:
        return Move(text, self._decided(worker), comes, rung, silent)

    def _decide(self, worker: Worker) -> Worker:
        """With the position that the next action asks for."""
        if worker.bell not in POSITION:
            # Nothing of this is read before it is set again, with the turn, and by the first claim.
            worker = worker._replace(
                claim_wanted=False, awake=False, rung=worker.rung and self._wrong == "one connection"
            )
        if worker.clearing:
            return worker
        bell = self._action(worker, 0.0).bell
        return worker if bell is None else worker._replace(wanted=int(bell))


@cache
def _up(other: Worker, gone: Worker) -> Worker:
    """`other`, one place further in the turn's queue if it stood behind `gone`."""
    behind = other.fleet == gone.fleet and other.queued > gone.queued
    return other._replace(queued=other.queued - 1) if behind else other


@cache
def _told(worker: Worker) -> Worker:
    """Notified. While it is away, it hears at once, and this has no effect."""
    return (
        worker._replace(rung=True)
        if worker.listening and worker.bell not in {Bell.DEAD, Bell.AWAY, Bell.QUEUED}
        else worker
    )
