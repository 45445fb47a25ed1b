"""The doorbell: schema.sql's enqueuers, doorbell.py's and claim.py's workers, a step for each statement.

An enqueuer is one transaction: INSERT with trigger ring(), then COMMIT, whenever it likes, or ROLLBACK. A worker is its
door (Door.run: the turn, SHARE on the bell) and its loop (Claimer._serve), which run side by side. PostgreSQL's part:
a SHARE that waits refuses ROW EXCLUSIVE ... NOWAIT; the turn's queue is first come first served; rows can be seen
before the locks of their transaction are released; who listens at a commit hears its NOTIFY, at any time after it.

What is merged or left out, and why that hides nothing:

* What the loop only decides (`door.want`) happens together with what it decides from. Its door alone reads it, and a
  door that acts late looks the same as a loop that decides late.
* A claim is one step: clearing `_look`, the statement's snapshot, and its answer. What is rung for in between is
  delivered at the statement's end and sets `_look` again, as it does a moment later; what is committed in between
  rings, or keeps SHARE away. What the answer changes, only the loop reads.
* A lock that is granted and the client's hearing of it are one step: meanwhile nobody is treated otherwise than
  while it waits. So are BEGIN and fall_asleep, and `place = AWAY` and pg_advisory_unlock.
* Time isn't modelled: a timer may go off whenever its wait lasts, and `Moderation` may say anything after a claim.
* Handlers end when they like. The fallback poll is off; timers, echoes, set-asides and queues' limits are other stories
  that end in `_look`, as a ring does. A session that fails is a worker killed and another that starts.
* Two rings that a worker hasn't heard yet are one; and one that comes while it is away is heard at once, as nothing
  comes of it: `_look` is set with the turn.
* What a worker ran when it was killed is the other model's story.
* Claims see all that is ready. With marks (marks.py) they may overlook a task until the next claim from the front,
  which a timer owes: that this comes in time is for tests/worker/test_marks.py to show, and not shown here.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator
from enum import IntEnum
from functools import cache
from typing import NamedTuple

from .explore import Comes, Promise, Step

NOW, SOON, MAYBE = Comes.NOW, Comes.SOON, Comes.MAYBE


class Enqueuer(IntEnum):
    """One transaction."""

    __hash__ = int.__hash__  # an Enum's own is a call, and most of the time here goes into hashing

    IDLE = 0
    BEGUN = 1  # only where it matters: the variant that decides by its snapshot
    BEGUN_SLEEPER = 2  # and saw somebody asleep
    SILENT = 3  # inserted, and was granted ROW EXCLUSIVE: nobody sleeps
    RINGS = 4  # inserted, and was refused: its NOTIFY goes out at commit
    VISIBLE = 5  # silent and committed, its lock not released yet
    DONE = 6
    NEEDLESS = 7  # rings though nobody sleeps


class Door(IntEnum):
    """Where a worker's door connection is. The place is what the loop knows of it."""

    __hash__ = int.__hash__

    DEAD = 0
    AWAY = 1
    QUEUED = 2  # in take_turn
    TURN = 3
    ARMING = 4  # in fall_asleep
    REFUSED = 5  # between two tries of it, its transaction open
    ASLEEP = 6


PLACE = {Door.TURN: Door.TURN, Door.ARMING: Door.TURN, Door.REFUSED: Door.TURN, Door.ASLEEP: Door.ASLEEP}


class Worker(NamedTuple):
    """Its door, and what of the loop's state decides what it does next."""

    fleet: int
    door: Door = Door.AWAY
    wanted: Door = Door.TURN
    queued: int = 0  # rank in the turn's queue; 0: not in it
    listening: bool = True
    rung: bool = False  # a NOTIFY that isn't delivered yet
    look: bool = False
    clearing: bool = False  # only in the variant that clears `look` after the claim
    backlog: bool = False
    passing: bool = False
    awake: bool = False  # what Moderation says
    held: int = 0  # tasks it runs


class State(NamedTuple):
    enqueuers: tuple[Enqueuer, ...]
    workers: tuple[Worker, ...]
    rung: int = 0  # committed, ready tasks that somebody rang for
    silent: int = 0  # and that nobody did


class Sees(NamedTuple):
    """What of the rest a worker's next step depends on."""

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


HOLDS_TURN = {Door.TURN, Door.ARMING, Door.REFUSED, Door.ASLEEP}
REFUSES = {Door.ARMING, Door.ASLEEP}  # SHARE, held or waited for

# Each a change that looks harmless, and isn't.
WRONG = {
    "late flag": "`_look` is cleared after the claim instead of before",
    "no last claim": "falling asleep isn't followed by a claim",
    "no share": "an enqueuer that is told nobody sleeps doesn't keep its lock until commit",
    "late listen": "LISTEN after falling asleep instead of before",
    "deaf": "LISTEN on the connection that waits for the locks",
    "no arming look": "no look now and then while it waits for SHARE",
    "long wait": "the wait for SHARE goes on when the worker has no more use for it",
    "locks first": "locks are released before the rows can be seen",
    "flag row": "an enqueuer decides by what its snapshot shows of the sleepers, as it would with a row for a flag",
    "turn survives": "the turn is a row that names its holder, which a killed worker can't clear",
    "never again": "no LISTEN when the turn is back, after UNLISTEN while away",
    "always rings": "the trigger doesn't ask whether anybody sleeps",
    "no turn": "every worker listens and sleeps, without a turn",
}


class Doorbell:
    """`fleets`: that of each worker. `slots`: tasks that one runs at a time. `wrong`: a key of WRONG."""

    def __init__(self, enqueuers: int, fleets: tuple[int, ...], slots: int, wrong: str = "") -> None:
        self.slots = slots
        self._wrong = wrong
        workers = tuple(Worker(fleet, listening=wrong != "late listen") for fleet in fleets)
        self.start = State((Enqueuer.IDLE,) * enqueuers, workers)
        self.promises: list[Promise[State]] = [
            Promise(
                "a task that somebody rang for is never claimed, though a worker has a free slot",
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
            lambda worker, sees: [*self._hears(worker), *self._loop(worker, sees), *self._door(worker, sees)]
        )

    # What must hold.

    def wrong(self, state: State) -> str | None:
        if Enqueuer.NEEDLESS in state.enqueuers:
            return "an enqueuer rings though nobody sleeps or is about to"
        holders = [worker.fleet for worker in state.workers if worker.door in HOLDS_TURN]
        if len(holders) > len(set(holders)):
            return "two workers of a fleet have the turn: one ring wakes both"
        return None

    def _free(self, state: State) -> bool:
        return any(worker.door is not Door.DEAD and worker.held < self.slots for worker in state.workers)

    def _served(self, state: State) -> bool:
        return not (state.rung or state.silent) or not self._free(state)

    def _rung_served(self, state: State) -> bool:
        return not state.rung or not self._free(state)

    def same(self, state: State) -> Hashable:
        return (*sorted(state.enqueuers), *sorted(state.workers), state.rung, state.silent)

    # What can happen.

    def steps(self, state: State) -> Iterator[Step[State]]:
        share_free = not self._says_nothing.intersection(state.enqueuers)
        for n in range(len(state.enqueuers)):
            yield from self._enqueuer(state, n)
        for n, worker in enumerate(state.workers):
            if worker.door is Door.DEAD:
                continue
            fleet = [other for other in state.workers if other.fleet == worker.fleet]
            turn_free = not any(other.door in HOLDS_TURN or other.queued < 0 for other in fleet)
            last = max(other.queued for other in fleet)
            sees = Sees(state.rung, state.silent, share_free, turn_free, last)
            for text, moved, comes, rung, silent in self._moves(worker, sees):
                workers = [*state.workers]
                if worker.queued and not moved.queued:
                    workers = [_up(other, worker) for other in workers]
                workers[n] = moved
                after = State(state.enqueuers, tuple(workers), state.rung - rung, state.silent - silent)
                yield Step(f"worker {n + 1}: {text}", after, comes)

    def _enqueuer(self, state: State, n: int) -> Iterator[Step[State]]:
        def step(text: str, now: Enqueuer, comes: Comes, rung: int = 0, silent: int = 0) -> Step[State]:
            enqueuers = (*state.enqueuers[:n], now, *state.enqueuers[n + 1 :])
            workers = tuple(_told(worker) for worker in state.workers) if rung else state.workers
            return Step(
                f"enqueuer {n + 1}: {text}", State(enqueuers, workers, state.rung + rung, state.silent + silent), comes
            )

        here = state.enqueuers[n]
        sleeper = any(worker.door in REFUSES for worker in state.workers)
        if here is Enqueuer.IDLE and self._wrong == "flag row":
            yield step("BEGIN, and its snapshot", Enqueuer.BEGUN_SLEEPER if sleeper else Enqueuer.BEGUN, MAYBE)
        elif here in {Enqueuer.IDLE, Enqueuer.BEGUN, Enqueuer.BEGUN_SLEEPER}:
            if self._wrong == "always rings" and not sleeper:
                yield step("INSERT; ring(): pg_notify", Enqueuer.NEEDLESS, MAYBE)
            elif here is Enqueuer.BEGUN:
                yield step("INSERT; ring(): no flag in its snapshot, so it says nothing", Enqueuer.SILENT, MAYBE)
            elif here is Enqueuer.BEGUN_SLEEPER or (here is Enqueuer.IDLE and sleeper):
                yield step("INSERT; ring(): ROW EXCLUSIVE is refused, so pg_notify", Enqueuer.RINGS, MAYBE)
            else:
                yield step("INSERT; ring(): ROW EXCLUSIVE is granted, so it says nothing", Enqueuer.SILENT, MAYBE)
        elif here is Enqueuer.RINGS:
            yield step("ROLLBACK", Enqueuer.DONE, MAYBE)
            yield step("COMMIT: its row can be seen, and who listens is notified", Enqueuer.DONE, MAYBE, rung=1)
        elif here is Enqueuer.SILENT:
            yield step("ROLLBACK", Enqueuer.DONE, MAYBE)
            if self._wrong == "locks first":
                yield step("COMMIT: its lock is released", Enqueuer.VISIBLE, MAYBE)
            else:
                yield step("COMMIT: its row can be seen", Enqueuer.VISIBLE, MAYBE, silent=1)
        elif here is Enqueuer.VISIBLE and self._wrong == "locks first":
            yield step("and now its row can be seen", Enqueuer.DONE, NOW, silent=1)
        elif here is Enqueuer.VISIBLE:
            yield step("its lock is released", Enqueuer.DONE, NOW)

    def _hears(self, worker: Worker) -> Iterator[Move]:
        """What comes from outside."""
        if worker.rung and not (self._wrong == "deaf" and worker.door in {Door.QUEUED, Door.ARMING}):
            yield self._move("hears the bell (_rung)", worker._replace(rung=False, look=True), NOW)
        if worker.held:
            yield self._move("a handler ends (freed)", worker._replace(held=worker.held - 1), MAYBE)
        # Its sessions end, and with them its locks and its place in the queue. What it ran is another model's story.
        survives = self._wrong == "turn survives" and worker.door in HOLDS_TURN
        yield Move("is killed", Worker(worker.fleet, Door.DEAD, queued=-1 if survives else 0), MAYBE)

    def _loop(self, worker: Worker, sees: Sees) -> Iterator[Move]:
        """Claimer._serve, from one of its awaits to the next."""
        place = PLACE.get(worker.door, Door.AWAY)
        if worker.clearing:
            cleared = worker._replace(clearing=False, look=False)
            yield self._move("has the claim's answer, and clears _look", cleared, NOW)
        elif worker.held >= self.slots:
            return
        elif place is not Door.AWAY and not worker.listening and self._listens(worker):
            listens = worker._replace(listening=True, look=worker.look or self._wrong != "late listen")
            yield self._move("LISTEN, and will look (_listen)", listens, NOW)
        elif worker.backlog:
            yield from self._claim(worker, sees, "claims again, as the last came back full")
        elif worker.passing:
            return
        elif place is Door.AWAY:
            if worker.listening:
                yield self._move("UNLISTEN, away for a second (_unlisten)", worker._replace(listening=False), MAYBE)
        elif worker.look:
            yield from self._claim(worker, sees, "clears _look and claims")
        elif worker.awake:
            yield self._move("stays awake, and will look (Moderation.gap)", worker._replace(look=True), NOW)
            late = worker._replace(passing=True, wanted=Door.AWAY)
            yield self._move("wakes up late, so passes the turn on (_pass_on)", late, MAYBE)
        elif place is Door.TURN and self._wrong != "no arming look":
            yield self._move("will look, while it waits for SHARE (ARMING_SHARE)", worker._replace(look=True), SOON)

    def _listens(self, worker: Worker) -> bool:
        if self._wrong == "late listen":
            return worker.door is Door.ASLEEP and not worker.look
        return self._wrong != "never again"

    def _claim(self, worker: Worker, sees: Sees, text: str) -> Iterator[Move]:
        room = self.slots - worker.held
        taken = min(room, sees.rung + sees.silent)
        looks, full = not worker.backlog, taken >= room
        after = worker._replace(backlog=full, held=worker.held + taken, awake=False)
        if looks and self._wrong == "late flag":
            after = after._replace(clearing=True)
        elif looks:
            after = after._replace(look=False)
        elif full:
            after = after._replace(wanted=Door.AWAY)
        text = f"{text} (claim.sql: {taken or 'nothing'})"
        for rung in range(max(0, taken - sees.silent), min(taken, sees.rung) + 1):
            yield self._move(text, after, NOW, rung, taken - rung)
            yield self._move(f"{text}; more may come", after._replace(awake=True), NOW, rung, taken - rung)
            if taken and looks and after.held * 2 > self.slots:
                passes = after._replace(passing=True, wanted=Door.AWAY)
                yield self._move(f"{text}; that is work enough (_pass_on)", passes, NOW, rung, taken - rung)

    def _door(self, worker: Worker, sees: Sees) -> Iterator[Move]:
        """Door.run. `_door_moved` sets `_look` with each new place but AWAY."""
        here, wanted = worker.door, worker.wanted
        look = worker._replace(look=True)
        if here is Door.AWAY and wanted is not Door.AWAY:
            queued = worker._replace(door=Door.QUEUED, queued=max(0, sees.last) + 1)
            yield self._move("take_turn: queues for the turn", queued, NOW)
        elif here is Door.QUEUED:
            if (worker.queued == 1 and sees.turn_free) or self._wrong == "no turn":
                yield self._move("take_turn: has the turn", look._replace(door=Door.TURN, queued=0), NOW)
            yield self._move("take_turn: 5 s are over", worker._replace(door=Door.AWAY, queued=0), MAYBE)
        elif here is Door.TURN and wanted is Door.AWAY:
            yield self._move("pg_advisory_unlock: passes the turn on", worker._replace(door=Door.AWAY), NOW)
        elif here in {Door.TURN, Door.REFUSED} and wanted is Door.ASLEEP:
            yield self._move("fall_asleep: waits for SHARE", worker._replace(door=Door.ARMING), NOW)
        elif here is Door.REFUSED:
            yield self._move("ROLLBACK: doesn't fall asleep", look._replace(door=Door.TURN), NOW)
        elif here is Door.ARMING:
            if sees.share_free:
                asleep = worker if self._wrong == "no last claim" else look
                yield self._move("fall_asleep: has SHARE", asleep._replace(door=Door.ASLEEP), NOW)
            yield self._move("fall_asleep: its wait is over", worker._replace(door=Door.REFUSED), MAYBE)
            if wanted is not Door.ASLEEP and self._wrong != "long wait":
                yield self._move("fall_asleep: its wait is cancelled (want)", worker._replace(door=Door.REFUSED), NOW)
        elif here is Door.ASLEEP and wanted is not Door.ASLEEP:
            yield self._move("ROLLBACK: wakes up", look._replace(door=Door.TURN), NOW)
        elif here is Door.ASLEEP:
            yield self._move("ROLLBACK: to fall asleep anew (turn_over)", look._replace(door=Door.TURN), MAYBE)

    def _move(self, text: str, worker: Worker, comes: Comes, rung: int = 0, silent: int = 0) -> Move:
        return Move(text, self._decided(worker), comes, rung, silent)

    def _decided(self, worker: Worker) -> Worker:
        """What Claimer._serve makes of it before its next await: only what it wants of its door."""
        place = PLACE.get(worker.door, Door.AWAY)
        if place is Door.AWAY:
            # Nothing of this is read before it is set again, with the turn, and by the first claim.
            worker = worker._replace(look=False, awake=False, rung=worker.rung and self._wrong == "deaf")
        if worker.held >= self.slots:
            return worker._replace(wanted=Door.AWAY)
        if place is Door.AWAY:
            worker = worker._replace(passing=False)
        elif not worker.listening and self._listens(worker):
            return worker
        if worker.backlog or worker.passing:
            return worker
        if place is Door.AWAY:
            return worker._replace(wanted=Door.TURN)
        if worker.look or worker.clearing:
            return worker
        return worker._replace(wanted=Door.TURN if worker.awake else Door.ASLEEP)


@cache
def _up(other: Worker, gone: Worker) -> Worker:
    """`other`, one place further in the turn's queue if it stood behind `gone`."""
    behind = other.fleet == gone.fleet and other.queued > gone.queued
    return other._replace(queued=other.queued - 1) if behind else other


@cache
def _told(worker: Worker) -> Worker:
    """Notified. While it is away, it hears at once, and nothing comes of it."""
    return (
        worker._replace(rung=True)
        if worker.listening and worker.door not in {Door.DEAD, Door.AWAY, Door.QUEUED}
        else worker
    )
