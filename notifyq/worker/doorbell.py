"""The doorbell, from the worker's side; schema.sql tells the enqueuer's.

Two locks, both kept on a connection that does nothing else:

    turn     an advisory lock, exclusive, of the workers that serve the same queues and types ("fleet"): only its
             holder claims when nothing is known to be waiting, listens, and sleeps. So one task wakes one worker,
             and a holder that dies is replaced by the lock queue, at once.
    asleep   SHARE on notifyq.bell, which all sleepers may hold together, and no enqueuer's ROW EXCLUSIVE beside
             it. While it is held, or waited for, every enqueue rings.

The order that no wake-up is lost by: LISTEN; take the turn; claim until nothing comes; fall asleep, which waits for
every transaction that was told nobody sleeps, and by then its rows can be seen; claim once more; sleep. Whoever
enqueues from the moment falling asleep *begins* rings, and the ring is heard since LISTEN came before.

    away ──take_turn──▶ turn ──fall_asleep──▶ asleep
      ▲                  │ ▲                    │
      └────pass on───────┘ └──────wake up───────┘

SHARE is in the way of VACUUM, ANALYZE, ALTER PUBLICATION and most other statements that name the table. Each
heartbeat asks whether one of them waits (`notifyq.bell_wanted`); then the sleeper lets go, and falls asleep anew behind
it.

Nothing here waits long in one statement, since a SELECT that waits holds a snapshot, and with it vacuum: 5 s for the
turn, 20 to 800 ms to fall asleep, then asked again. A transaction that only holds SHARE has no snapshot.

Interrupts and polling, as a network card has both: a ring costs an enqueuer a commit all by itself (a transaction
that notified doesn't share its flush), so under a burst the worker stays awake and polls instead, and nobody rings.
Falling asleep at each quiet moment would gain nothing: fast workers have one after each task. `Moderation` decides.

Any role of the database can take any advisory lock, and keep it. A turn that is with somebody who is no worker
("robbed") is noticed once a poll has found what the bell should have told of; then the workers go without it: they
all sleep and listen, which loses nothing, and a task wakes them all.

What listens is the claims' connection: a backend delivers notifications only between statements, so one that waits
for a lock would hear the bell when it needs to no more.
"""

from __future__ import annotations

import asyncio
import math
import zlib
from collections import deque
from collections.abc import Callable, Iterable
from enum import IntEnum

import anyio

from ..database.connection import PROOF_SECONDS, SQL, Connection

CHANNEL = "notifyq"
TURN_WAIT_MS = 5000
ASLEEP_WAIT_MS = (20, 50, 100, 200, 400, 800)  # below the deadlock timeout: a waiter of 1 s is looked at
ASLEEP_SECONDS = 120.0
DOUBT_SECONDS = 5.5  # and PROOF_SECONDS, and the two polls (of 4 to 6 s) that it may take to ask: below 15 s
LEAVE_SECONDS = 0.005  # for that wait to end by itself, as it mostly does; to cancel it takes a connection

WINDOW_SECONDS = 0.020  # two arrivals within it are the beginning of a burst
BURST = 5  # arrivals within it keep the worker awake: 250 a second
PATIENCE_SECONDS = 1.0  # until a burst that was none may be taken for one again


class Place(IntEnum):
    """Where a worker stands at the bell."""

    AWAY = 0
    TURN = 1
    ASLEEP = 2


def fleet_key(queues: Iterable[str], types: Iterable[str]) -> int:
    """The turn's advisory key: workers that would claim the same tasks share it. A signed 32-bit integer."""
    text = "\0".join(sorted(queues)) + "\1" + "\0".join(sorted(types))
    return int.from_bytes(zlib.crc32(text.encode()).to_bytes(4, "big"), "big", signed=True)


class Door:
    """Moves its connection to the place that is wanted, step by step, and says where it is."""

    def __init__(self, fleet: int, moved: Callable[[], None]) -> None:
        self._fleet = fleet
        self._moved = moved
        self._changed = asyncio.Event()
        self._in_transaction = False
        self._refresh = False
        self._asleep_since = 0.0
        self._heard = 0.0
        self._doubted = False
        self._waiting = anyio.CancelScope()  # for SHARE
        self._suspicious = False
        self.robbed = False  # in TURN and ASLEEP: without the turn itself
        self.place = Place.AWAY
        self._wanted = Place.AWAY

    @property
    def wanted(self) -> Place:
        return self._wanted

    def want(self, place: Place) -> None:
        """Go there. A wait that is under way is finished first; but who waits for SHARE keeps the turn, which others
        may have use for: so that wait is cut short by who wants to be away."""
        if place is not self._wanted:
            self._wanted = place
            self._changed.set()
            self._waiting.deadline = anyio.current_time() + LEAVE_SECONDS if place is Place.AWAY else math.inf

    def turn_over(self) -> None:
        """Asleep for a while, ask whether the server is still there, as nothing else is said on that connection. Asleep
        for long, fall asleep anew: a transaction that is open for hours looks like somebody's mistake."""
        now = anyio.current_time()
        if self.place is not Place.ASLEEP or now < self._heard + DOUBT_SECONDS:
            return
        self._heard = now
        if now > self._asleep_since + ASLEEP_SECONDS:
            self._refresh = True
        else:
            self._doubted = True
        self._changed.set()

    def let_go(self) -> None:
        """Asleep, fall asleep anew, behind the statements that wait for a lock on the bell by now."""
        if self.place is Place.ASLEEP:
            self._refresh = True
            self._changed.set()

    def suspect(self) -> None:
        """Somebody who has the turn should have claimed what was found without it."""
        self._suspicious = True

    async def run(self, conn: Connection) -> None:
        """Runs until it is cancelled or the connection fails; its locks are gone with the connection."""
        self._in_transaction = self.robbed = False
        self._arrive(Place.AWAY)
        tries = 0
        while True:
            wanted = self._wanted  # which may change during any await
            refused = self._in_transaction and self.place is Place.TURN  # to fall asleep, so far
            if self._refresh or wanted < self.place or (refused and wanted is Place.TURN):
                self._refresh = False
                await self._step_back(conn)
            elif self._doubted:
                self._doubted = False
                await conn.execute("SET lock_timeout = 0", timeout=PROOF_SECONDS)  # takes no snapshot
            elif wanted is self.place:
                tries = 0
                self._changed.clear()
                await self._changed.wait()
            elif self.place is Place.AWAY:
                wait_ms = 1 if self.robbed else TURN_WAIT_MS
                if await conn.fetchval("SELECT notifyq.take_turn($1, $2)", self._fleet, wait_ms):
                    self.robbed = False
                    self._arrive(Place.TURN)
                elif self._suspicious or self.robbed:
                    self._suspicious = False
                    self.robbed = bool(await conn.fetchval(SQL["is_turn_stolen"], self._fleet))
                    self._arrive(Place.TURN if self.robbed else Place.AWAY)
            elif not self._in_transaction:
                self._in_transaction = True
                await conn.execute("BEGIN")
            else:
                wait_ms = ASLEEP_WAIT_MS[min(tries, len(ASLEEP_WAIT_MS) - 1)]
                tries += 1
                asleep = False
                with anyio.CancelScope() as self._waiting:
                    # Cancelled, it may have SHARE all the same: the transaction that has it is rolled back.
                    asleep = await conn.fetchval("SELECT notifyq.fall_asleep($1)", wait_ms)
                if asleep:
                    # asyncpg leaves its portal open, and with it that SELECT's snapshot, until the transaction
                    # ends; another statement takes the portal's place. (Without: vacuum stops while we sleep.)
                    await conn.execute("SET LOCAL lock_timeout = 0")
                    self._asleep_since = self._heard = anyio.current_time()
                    self._arrive(Place.ASLEEP)

    async def _step_back(self, conn: Connection) -> None:
        if self._in_transaction:
            await conn.execute("ROLLBACK")
            self._in_transaction = False
            self._arrive(Place.AWAY if self.robbed else Place.TURN)  # robbed: to see if it still is
        elif self.place is Place.TURN:
            self.place = Place.AWAY
            if not self.robbed:
                await conn.execute("SELECT pg_advisory_unlock(1852990836, $1::integer)", self._fleet)
            self._moved()

    def _arrive(self, place: Place) -> None:
        self.place = place
        self._moved()


class Moderation:
    """When to stay awake, and how often to look. Pure: it is told times, and keeps none of its own.

    A lone arrival is no burst: the worker stays asleep, so that the next one rings too, and both idle latency and
    idle cost are the bell's. Two within the window might be, so it wakes up and sees. Where enqueuers were only held
    up by ringing, they now come in numbers, and it stays awake for as long as they do; where there weren't more, it
    goes back to sleep and doesn't try again for a while: 100 tasks a second are cheaper rung for than polled for.
    """

    def __init__(self) -> None:
        self._arrivals: deque[tuple[float, int]] = deque()
        self._in_window = 0
        self._awake_since: float | None = None
        self._not_before = 0.0

    def arrived(self, count: int, now: float) -> None:
        """`count` tasks were claimed at `now` (seconds)."""
        if count:
            self._arrivals.append((now, count))
            self._in_window += count
        self._forget(now)

    def awake(self, now: float) -> bool:
        """Whether to go without the bell for now."""
        self._forget(now)
        if self._awake_since is None:
            if self._in_window >= 2 and (now >= self._not_before or self._in_window >= 2 * BURST):
                self._awake_since = now
                return True
            return False
        if now - self._awake_since < WINDOW_SECONDS or self._in_window >= BURST:
            return True
        if now - self._awake_since < 2 * WINDOW_SECONDS:
            self._not_before = now + PATIENCE_SECONDS
        self._awake_since = None
        return False

    def gap(self) -> float:
        """Seconds until the next look, while awake."""
        return 0.001 if self._in_window >= 4 * BURST else 0.002

    def _forget(self, now: float) -> None:
        while self._arrivals and self._arrivals[0][0] < now - WINDOW_SECONDS:
            self._in_window -= self._arrivals.popleft()[1]
