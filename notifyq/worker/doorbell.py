"""The doorbell, from the worker's side; schema.sql tells the enqueuer's.

Two locks, both kept on a connection that does nothing else:

    turn     an exclusive advisory lock of the workers that serve the same queues and types ("fleet"). Only its holder
             claims when nothing is known to be ready, listens, and sleeps. So one task wakes one worker. If the holder
             dies, the lock's queue replaces it at once.
    asleep   SHARE on notifyq.bell. All sleepers may hold it together, and no enqueuer can have ROW EXCLUSIVE beside
             it. While it is held, or waited for, every enqueue rings.

The order that loses no wake-up: LISTEN; take the turn; claim until nothing comes; fall asleep; claim once more; sleep.
Falling asleep waits for every transaction that was told that no worker sleeps, and then its rows are visible. A
transaction that enqueues after falling asleep *began* rings, and the ring is heard, since LISTEN came before.

    away ──take_turn──▶ turn ──fall_asleep──▶ asleep
      ▲                  │ ▲                    │
      └────pass on───────┘ └──────wake up───────┘

SHARE blocks VACUUM, ANALYZE, ALTER PUBLICATION and most other statements that name the table. Each heartbeat asks
whether one of them waits (`notifyq.bell_wanted`). If so, the sleeper releases SHARE, and falls asleep anew behind it.

No statement here waits long: a SELECT that waits holds a snapshot, which holds back vacuum. So one waits 5 s for the
turn, or 20 to 800 ms to fall asleep, and is then repeated. A transaction that only holds SHARE has no snapshot.

Any role of the database can take any advisory lock, and keep it. When a poll finds tasks of which no ring told, this
worker asks whether a session that is no worker holds the turn ("stolen"). If so, the workers go without it:
all of them listen and sleep, which loses no task, and each task wakes them all.
"""

from __future__ import annotations

import asyncio
import math
import zlib
from collections.abc import Callable, Iterable

import anyio

from .. import log
from ..database.connection import PROOF_SECONDS, SQL, Connection
from .state import Position

logger = log.logger("notifyq.claim")

CHANNEL = "notifyq"
TURN_WAIT_MS = 5000
ASLEEP_WAIT_MS = (20, 50, 100, 200, 400, 800)  # below deadlock_timeout (1 s), after which PostgreSQL checks a waiter
ASLEEP_SECONDS = 120.0  # then it falls asleep anew
# After the last answer. The next poll (one in 4 to 6 s) then asks. So, with PROOF_SECONDS, a server that is gone is
# noticed within 15 s.
DOUBT_SECONDS = 5.5
LEAVE_SECONDS = 0.005  # for a wait for SHARE to end by itself, as it mostly does: a cancel request opens a connection


def fleet_key(queues: Iterable[str], types: Iterable[str]) -> int:
    """The turn's advisory key: the same for workers that would claim the same tasks. A signed 32-bit integer."""
    text = "\0".join(sorted(queues)) + "\1" + "\0".join(sorted(types))
    return int.from_bytes(zlib.crc32(text.encode()).to_bytes(4, "big"), "big", signed=True)


class BellConnection:
    """Moves its connection to the position that is wanted, step by step, and calls `moved` after each step."""

    def __init__(self, fleet: int, moved: Callable[[], None]) -> None:
        self._fleet = fleet
        self._moved = moved
        self._changed = asyncio.Event()
        self._in_transaction = False
        self._refresh = False  # fall asleep anew
        self._asleep_since = 0.0
        self._answered_at = 0.0
        self._doubted = False  # prove that the server answers
        self._waiting = anyio.CancelScope()  # of the wait for SHARE
        self._theft_suspected = False
        self.turn_stolen = False  # then it goes to TURN and ASLEEP without having the turn
        self.position = Position.AWAY
        self._wanted = Position.AWAY

    def reset(self) -> None:
        """Before each `run`: its locks are gone with the last connection."""
        self._in_transaction = self._refresh = self._doubted = False
        self.position = self._wanted = Position.AWAY
        self._note_stolen(False)

    def want(self, position: Position) -> None:
        """Go to this position. A wait that is under way is finished first, with one exception. A worker that waits for
        SHARE keeps the turn, which other workers may need. So AWAY cuts this wait short."""
        if position is not self._wanted:
            self._wanted = position
            self._changed.set()
            self._waiting.deadline = anyio.current_time() + LEAVE_SECONDS if position is Position.AWAY else math.inf

    def renew_sleep(self) -> None:
        """Called now and then. A worker that has slept for a while asks whether the server is still there, since
        nothing else is sent on this connection. One that has slept for ASLEEP_SECONDS falls asleep anew, since a
        transaction that is open for hours looks like a mistake."""
        now = anyio.current_time()
        if self.position is not Position.ASLEEP or now < self._answered_at + DOUBT_SECONDS:
            return
        self._answered_at = now
        if now > self._asleep_since + ASLEEP_SECONDS:
            self._refresh = True
        else:
            self._doubted = True
        self._changed.set()

    def release_share(self) -> None:
        """If asleep, fall asleep anew, behind the statements that now wait for a lock on notifyq.bell."""
        if self.position is Position.ASLEEP:
            self._refresh = True
            self._changed.set()

    def suspect_theft(self) -> None:
        """A claim without the turn found tasks, which the holder of the turn should have claimed."""
        self._theft_suspected = True

    async def run(self, conn: Connection) -> None:
        """Run until it is cancelled or the connection fails."""
        self._arrive(Position.AWAY)
        tries = 0
        while True:
            wanted = self._wanted  # which may change during any await
            is_refused = self._in_transaction and self.position is Position.TURN  # it doesn't have SHARE yet
            if self._refresh or wanted < self.position or (is_refused and wanted is Position.TURN):
                self._refresh = False
                await self._step_back(conn)
            elif self._doubted:
                self._doubted = False
                await conn.execute("SET lock_timeout = 0", timeout=PROOF_SECONDS)  # takes no snapshot
            elif wanted is self.position:
                tries = 0
                self._changed.clear()
                await self._changed.wait()
            elif self.position is Position.AWAY:
                wait_ms = 1 if self.turn_stolen else TURN_WAIT_MS
                if await conn.fetchval("SELECT notifyq.take_turn($1, $2)", self._fleet, wait_ms):
                    self._note_stolen(False)
                    self._arrive(Position.TURN)
                elif self._theft_suspected or self.turn_stolen:
                    self._theft_suspected = False
                    self._note_stolen(bool(await conn.fetchval(SQL["is_turn_stolen"], self._fleet)))
                    self._arrive(Position.TURN if self.turn_stolen else Position.AWAY)
            elif not self._in_transaction:
                self._in_transaction = True
                await conn.execute("BEGIN")
            else:
                wait_ms = ASLEEP_WAIT_MS[min(tries, len(ASLEEP_WAIT_MS) - 1)]
                tries += 1
                asleep = False
                with anyio.CancelScope() as self._waiting:
                    # Cancelled, it may have SHARE all the same: the ROLLBACK that follows releases it.
                    asleep = await conn.fetchval("SELECT notifyq.fall_asleep($1)", wait_ms)
                if asleep:
                    # asyncpg leaves the SELECT's portal open, and with it its snapshot, until the transaction ends
                    # or another statement takes the portal's place. Without this one, a sleeper would stop vacuum.
                    await conn.execute("SET LOCAL lock_timeout = 0")
                    self._asleep_since = self._answered_at = anyio.current_time()
                    self._arrive(Position.ASLEEP)

    async def _step_back(self, conn: Connection) -> None:
        if self._in_transaction:
            await conn.execute("ROLLBACK")
            self._in_transaction = False
            self._arrive(Position.AWAY if self.turn_stolen else Position.TURN)  # stolen: ask whether it still is
        elif self.position is Position.TURN:
            self.position = Position.AWAY
            if not self.turn_stolen:
                await conn.execute("SELECT pg_advisory_unlock(1852990836, $1::integer)", self._fleet)
            self._moved()

    def _note_stolen(self, stolen: bool) -> None:
        if stolen and not self.turn_stolen:
            logger.warning("a session that is no worker has the turn at the bell; going without: each task wakes all")
        elif self.turn_stolen and not stolen:
            logger.info("the turn at the bell is back")
        self.turn_stolen = stolen

    def _arrive(self, position: Position) -> None:
        self.position = position
        self._moved()
