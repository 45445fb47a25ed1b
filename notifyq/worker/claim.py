"""Claim: when to look, for how many, and what to do when nothing comes.

One loop decides, on two connections: its own, which claims and listens, and the door's. It looks

    * as long as claims come back full (nobody needs the turn while more is waiting anyway);
    * when a slot is free again in a queue with a limit that it left tasks in;
    * with the turn: when it gets it, when the bell rings, when it has fallen asleep, when a timer is due, and
      every 1 to 2 ms while it stays awake;
    * when the fallback poll is due, which in good health finds nothing.

How much is up to room.py; whether it may run, once it is claimed, to admit.py.
"""

from __future__ import annotations

import asyncio
import math
import random
import time
import uuid
from collections.abc import Callable
from datetime import datetime

import anyio
import asyncpg

from .. import log
from ..config import WorkerConfig
from ..database.connection import PROOF_SECONDS, SQL, Connection, connect_worker, is_pooled
from ..database.errors import is_refusal
from .admission import Admission
from .capacity import Room
from .cursors import OWED_TIMES, SLOW_SECONDS, Marks, Usual
from .doorbell import CHANNEL, Door, Moderation, Place, fleet_key
from .job import Job, Onward, Threads, claim, claim_suspects
from .left_out import LeftOut, unless_refused
from .outcome import HandedBack
from .runners import Runners
from .settle import Settler

logger = log.logger("notifyq.claim")

PROMOTED_AT_ONCE = 1000
ECHO_SECONDS = 10.0
ECHO_LIMIT_SECONDS = 3.0
DUE_AWAKE_SECONDS = 0.010  # how often to look for due tasks while awake,
DUE_BUSY_SECONDS = 0.25  # and under a backlog, where they queue up like everybody
PASS_SECONDS = 0.05  # not more often is the turn passed on for a queue that is full here; doubles up to 1 s
ARMING_SHARE, ARMING_LEAST, ARMING_MOST = 0.02, 0.002, 0.05  # of the time spent arming; seconds, seconds
UNLISTEN_SECONDS = 1.0  # for which a worker without the turn listens on: it mostly has the turn again soon
AGAIN_LEAST, AGAIN_MOST = 0.002, 0.5  # until it looks again for what somebody has locked; doubles
BLIND_SECONDS = 60.0  # after a claim that timed out, claims take no payloads with them
ISOLATED_AT_ONCE = {2: 16, 3: 4}  # by how often they have crashed; of those that have more often, one
PATIENCE_SECONDS = 30.0  # to wait until nothing else runs, and to let it run alone; doubles with each crash up to
PATIENCE_MOST = 600.0
REFUSED_SECONDS = 600.0  # of another's isolating
UNSURE_SECONDS = 0.02  # until it looks for what ended in the moment when somebody was parked to wait for it
LAG_SECONDS = 0.005  # a loop that wakes up so late has work enough


class BellSilent(ConnectionError):
    """An echo that should have come by the bell didn't."""


class Claimer:
    """Feeds runners. `run` is one session: from connecting until `stop`, or until a connection fails."""

    def __init__(
        self, dsn: str | None, config: WorkerConfig, types: list[str], runners: Runners, settler: Settler
    ) -> None:
        self._dsn = dsn
        self._config = config
        self._types = types
        self._left_out = LeftOut()  # tasks that PostgreSQL doesn't let be taken
        self._admission = Admission(types, self._left_out)
        self._runners = runners
        self._settler = settler
        self._room = Room(config, runners.slots)
        self._queues = self._room.queues
        self._wake = asyncio.Event()
        self._stopping = False
        self._failure: BaseException | None = None
        self._door: Door  # each session's own
        self._moderation = Moderation()
        self._marks = Marks()
        self._look = True  # something happened
        self._aside = True  # tasks set aside may be ours
        self._aside_plain = False  # so may be some of plain handlers, when a thread is free
        self._backlog = False  # the last claim came back full
        self._left: set[str] = set()  # queues with a limit that it left tasks in, maybe
        self._freed = False  # there may be tasks that wait for what has ended
        self._beats = False  # a heartbeat is asked for
        self._suspects = False  # there may be tasks to run isolated
        self._refused_since: float | None = None  # another does that
        self._changed = False  # what is said of the queues
        self._passing = False
        self._pass_after = 0.0
        self._pass_wait = PASS_SECONDS
        self._listening = False
        self._away_since = 0.0
        self._arming_since = 0.0
        self._echo = ""  # the one sent and not heard
        self._echoed = asyncio.Event()
        self._echo_sent = 0.0
        self._next_due = math.inf
        self._due_at = 0.0
        self._due_mark: datetime | None = None  # due tasks of before it were promoted, or are very late to be seen
        self._due_front_at = 0.0  # when to look for those
        self._due_usual = Usual()
        self._again_at = math.inf  # when to claim what was locked
        self._again_wait = 0.0
        self._blind_until = 0.0  # a claim had timed out: claim without payloads
        self._most: int | None = None  # at most so many at once, after claims that timed out
        self._poll_at = 0.0
        self._inserted = -1
        self._claimed = 0  # since _inserted was read
        self.bell_seconds: float | None = None  # the round trip that proved the bell; None: polling only
        self._robbed = False
        self._silent = False
        self._connections: list[Connection] = []
        self.door_pid: int | None = None  # of the backend that keeps the turn

    # Called by others on this loop.

    @property
    def stopping(self) -> bool:
        return self._stopping

    @property
    def trouble(self) -> str:
        """What is degraded, in words."""
        if self.bell_seconds is None:
            return "polling only: no NOTIFY arrives here"
        return "the turn at the bell is with a stranger" if self._robbed else self._left_out.trouble

    def stop(self) -> None:
        """Claim nothing more; `run` returns."""
        self._stopping = True
        self._wake.set()

    def freed(self) -> None:
        """A slot is free, or outcomes were written."""
        if self._aside_plain and self._room.fitting():
            self._aside_plain = False
            self._aside = self._look = True
        self._wake.set()

    def look_aside(self) -> None:
        """Somebody has set tasks aside that are ours."""
        self._aside = self._look = True
        self._wake.set()

    def isolate(self) -> None:
        """There are tasks to run isolated, since their workers have vanished."""
        self._suspects = True
        self._wake.set()

    def let_in(self) -> None:
        """Something has ended that others may wait for."""
        self._freed = True
        self._wake.set()

    def beat(self) -> None:
        """The heartbeat's thread can't send one at the moment: send it here."""
        self._beats = True
        self._wake.set()

    @property
    def asleep(self) -> bool:
        return self.door_pid is not None and self._door.place is Place.ASLEEP

    def let_go(self) -> None:
        """A statement of somebody's waits for the lock that the sleeper holds."""
        if self.asleep:
            self._door.let_go()

    def fail(self, error: BaseException) -> None:
        """End this session with `error`."""
        self._failure = self._failure or error
        self._wake.set()

    def abort(self) -> None:
        """Cut this session's connections, whatever is under way on them."""
        for connection in self._connections:
            connection.terminate()

    # A session.

    async def run(self, worker: int, ready: Callable[[], None]) -> None:
        """Claim as `worker` until `stop`. Raises one of store.TRANSIENT, alone or in groups, when it can't."""
        self._failure = None
        self._backlog = self._passing = self._listening = False
        self._look = self._aside = self._freed = True
        self._next_due, self._due_at = math.inf, 0.0
        self._poll_at = self._later(self._config.poll_interval_seconds)
        self._door = Door(fleet_key(self._queues, self._types), self._door_moved)
        try:
            conn = await connect_worker(self._dsn, f"claims {worker}", worker=worker, relaxed=True)
            self._connections.append(conn)
            if is_pooled(conn):
                self._warn_silent()
                await self._due(conn, worker, look=self._queues)
                ready()
                await (self._drain(conn, worker) if self._config.drain else self._serve(conn, worker))
                return
            # end_backends.sql finds it by this name, to end it when its worker is frozen.
            door = await connect_worker(self._dsn, f"door {worker}", worker=worker)
            self._connections.append(door)
            self.door_pid = door.get_server_pid()
            for connection in self._connections:
                connection.add_termination_listener(self._cut)
            await self._listen(conn)
            await self._prove(conn)
            await self._due(conn, worker, look=self._queues)
            async with anyio.create_task_group() as group:
                group.start_soon(self._door.run, door, name="notifyq door")
                ready()
                await (self._drain(conn, worker) if self._config.drain else self._serve(conn, worker))
                group.cancel_scope.cancel()
        finally:
            self.door_pid = None
            while self._connections:
                connection = self._connections.pop(0)
                connection.remove_termination_listener(self._cut)
                # Said good-bye to, where that is quick: an end of file is a line in the server's log.
                if self._stopping and self._failure is None and not connection.is_closed():
                    with anyio.move_on_after(1.0, shield=True):
                        await connection.close()
                connection.terminate()

    def _cut(self, _: object) -> None:
        self.fail(ConnectionError("the server closed the connection"))

    async def _serve(self, conn: Connection, worker: int) -> None:
        clock = asyncio.get_running_loop().time
        door, moderation = self._door, self._moderation
        while not self._stopping:
            self._wake.clear()  # first, so that what happens from here on is seen by the wait below
            if self._failure is not None:
                raise self._failure
            now = clock()
            if self._beats:
                await self._beat(conn, worker)
            if self._freed:
                await self._free(conn)
            if self._suspects:
                await self._isolate(conn, worker)
                continue
            rooms, room = self._rooms(now)
            if not room:
                door.want(Place.AWAY)
                await self._wait(math.inf)
                continue
            place = door.place
            if place is Place.AWAY:
                self._passing = False
            elif not self._listening:
                await self._listen(conn)
            if self._changed:
                await self._due(conn, worker)
            elif self._backlog or any(queue in self._left for queue in rooms):
                if now - self._due_at > DUE_BUSY_SECONDS:
                    await self._due(conn, worker)
                    rooms, room = self._rooms(now)
                await self._claim(conn, worker, rooms, room)
                if self._backlog:
                    door.want(Place.AWAY)
            elif self._passing:
                await self._wait(math.inf)
            elif now >= self._poll_at:
                self._poll_at = self._later(self._config.poll_interval_seconds)
                self._look |= await self._due(conn, worker, look=self._queues)
                if self._look and place is Place.AWAY:
                    self._look = False
                    if await self._claim(conn, worker, rooms, room):
                        door.suspect()
            elif place is Place.AWAY:
                door.want(Place.TURN)
                if self._listening and now - self._away_since > UNLISTEN_SECONDS:
                    await self._unlisten(conn)
                unlisten_at = self._away_since + UNLISTEN_SECONDS + 0.01 if self._listening else math.inf
                await self._wait(min(self._poll_at, unlisten_at))
            elif self._echo and now - self._echo_sent > ECHO_LIMIT_SECONDS:
                raise BellSilent("LISTEN no longer hears what NOTIFY sends")
            elif now >= self._next_due:
                await self._due(conn, worker)
            elif self._look or now >= min(self._marks.owed_at, self._again_at):
                self._look = False
                if await self._claim(conn, worker, rooms, room) and self._work_enough(now):
                    self._pass_on(now)
                await asyncio.sleep(0)  # what was claimed starts before anything else is asked
                if not self._backlog and (now - self._due_at > DUE_AWAKE_SECONDS or not moderation.awake(now)):
                    await self._due(conn, worker)
            elif moderation.awake(now):
                door.want(Place.TURN)
                gap = moderation.gap()
                await asyncio.sleep(gap)
                if clock() - now - gap > LAG_SECONDS:
                    self._pass_on(now)
                self._look = True
            elif now - self._echo_sent > ECHO_SECONDS and self.bell_seconds is not None:
                await self._due(conn, worker)
            else:
                if door.wanted is not Place.ASLEEP:
                    self._arming_since = now
                    door.want(Place.ASLEEP)
                echo_at = self._echo_sent + (ECHO_LIMIT_SECONDS if self._echo else ECHO_SECONDS) + 0.001
                if self.bell_seconds is None:
                    echo_at = math.inf
                until = min(self._next_due, self._poll_at, self._marks.owed_at, self._again_at, echo_at)
                if place is Place.TURN:
                    # Some transactions that said nothing are open, or this would be over. Who commits first of
                    # them tells nobody: the lock waits for the last. So look, after 2 % of the time it has lasted.
                    gap = min(max((now - self._arming_since) * ARMING_SHARE, ARMING_LEAST), ARMING_MOST)
                    until = min(until, now + gap)
                    await self._wait(until)
                    self._look = True
                else:
                    await self._wait(until)

    async def _drain(self, conn: Connection, worker: int) -> None:
        """--drain: as long as there is something to run. Neither bell nor turn: nothing is waited for."""
        clock = asyncio.get_running_loop().time
        while not self._stopping:
            self._wake.clear()
            if self._failure is not None:
                raise self._failure
            if self._beats:
                await self._beat(conn, worker)
            if self._freed:
                await self._free(conn)
            if clock() - self._due_at > DUE_BUSY_SECONDS:
                await self._due(conn, worker)
            rooms, room = self._rooms(clock())
            if room and await self._claim(conn, worker, rooms, room, front=not self._backlog):
                continue
            self._runners.start_batches()
            if room and not self._runners.held and not self._settler.pending:
                # Only now, as a handler's last words may have been to enqueue something.
                due = await self._due(conn, worker)
                if await self._free(conn) or await self._isolate(conn, worker):
                    continue
                # What was held above kept its queue, if that has a limit, out of the rooms.
                rooms, room = self._rooms(clock())
                if not due and not await self._claim(conn, worker, rooms, room, front=True):
                    return
                continue
            if not room and not self._runners.held and not self._settler.pending:
                return  # too many outcomes that PostgreSQL refuses
            await self._wait(math.inf)

    # What it does.

    async def _claim(
        self, conn: Connection, worker: int, rooms: dict[str, int], room: int, *, front: bool = False
    ) -> int:
        """Claim and feed. Never cancelled half-way: what it took would belong to nobody."""
        clock = asyncio.get_running_loop().time
        now = begin = clock()
        if not rooms:  # all are paused
            self._backlog = False
            self._marks.claimed([], False, 0.0, now)
            return 0
        jobs: list[Job] = []
        fed: list[Job] = []
        locked: list[Job] = []
        onward = None if front else self._marks.onward(begin, self._backlog)
        if self._most is not None:
            room = min(room, self._most)
        if self._left_out and (fitting := self._room.fitting()):
            room = min(room, fitting)
        threads = self._room.threads(room)
        blind = begin < self._blind_until
        with anyio.CancelScope(shield=True):
            try:
                jobs += await self._take(conn, worker, rooms, room, onward=onward, threads=threads, blind=blind)
            except TimeoutError:
                # The next session asks for less. What this claim took, if anything, is found by reclaim_unanswered.sql.
                self._blind_until = clock() + BLIND_SECONDS
                self._most = max(1, room // 2)
                raise
            if self._most is not None:
                self._most = self._most * 2 if self._most < self._config.concurrency else None
            now = clock()
            self._marks.claimed(jobs, onward is not None, now - begin, now)
            if self._aside and len(jobs) < room:
                await self._adopt(conn, worker, rooms, room, jobs, blind)
            fed, locked = await self._admission.admit(conn, worker, jobs)
            if self._admission.unsure:
                asyncio.get_running_loop().call_later(UNSURE_SECONDS, self.let_in)
        self._runners.add_jobs(fed)
        for job in locked:
            self._settler.put(HandedBack(job))
        unfit = self._room.claimed(jobs, rooms, room, threads, now)
        self._backlog = len(jobs) >= room
        taken: dict[str, int] = {}
        for job in jobs:
            taken[job.queue] = taken.get(job.queue, 0) + 1
        for queue, free in rooms.items():
            if seconds := self._room.left_alone(queue, now):
                self._left.add(queue)
                asyncio.get_running_loop().call_later(seconds, self._wake.set)
            elif self._room.is_bounded(queue) and taken.get(queue, 0) >= free:
                self._left.add(queue)
            else:
                self._left.discard(queue)
        self._claimed += len(jobs)
        self._moderation.arrived(len(jobs), now)
        if unfit and onward is None:
            await self._leave(conn, unfit, taking=bool(jobs))
        return len(jobs)

    async def _adopt(
        self, conn: Connection, worker: int, rooms: dict[str, int], room: int, jobs: list[Job], blind: bool
    ) -> None:
        """Add to `jobs` what others have set aside, if there is room."""
        for types, count in self._room.adoptable(self._types, jobs, room - len(jobs)):
            # Of each queue what room is left, counted on the safe side.
            left = {queue: free - len(jobs) for queue, free in rooms.items() if free > len(jobs)}
            if (most := min(count, room - len(jobs), sum(left.values()))) <= 0:
                break
            self._aside = False  # before the claim: somebody may ring meanwhile
            more = await self._take(conn, worker, left, most, aside=types, blind=blind)
            self._aside |= len(more) >= most
            jobs += more
        self._aside_plain = not self._room.fitting(jobs)

    async def _leave(self, conn: Connection, queues: list[str], *, taking: bool) -> None:
        """A claim may have left tasks in these queues for want of a thread. Leave those alone in which one is next.
        `taking`: that claim took others."""
        types: dict[str, str] = {row[0]: row[1] for row in await conn.fetch(SQL["list_next_types"], queues)}
        now = asyncio.get_running_loop().time()
        for queue in queues:
            if queue in types and not self._room.fits(types[queue]):
                self._room.leave_alone(queue, now)
                asyncio.get_running_loop().call_later(self._room.left_alone(queue, now), self._wake.set)
                self._left.add(queue)
                continue
            self._room.go_on(queue)
            # If that claim took nothing, the task has just come, or another has locked it: check_due.sql tells.
            if queue in types and (taking or self._room.fitting()):
                self._left.add(queue)

    async def _take(
        self,
        conn: Connection,
        worker: int,
        rooms: dict[str, int],
        room: int,
        *,
        onward: Onward | None = None,
        aside: list[str] | None = None,
        threads: Threads | None = None,
        blind: bool,
    ) -> list[Job]:
        """Claim, without what PostgreSQL doesn't let be claimed."""
        if not self._left_out:
            answer = await unless_refused(
                claim(conn, worker, rooms, room, onward=onward, aside=aside, threads=threads, blind=blind)
            )
            if answer is not None and ((jobs := self._left_out.taken(answer)) or not self._left_out):
                self._look |= bool(self._left_out)  # there may be more behind those that were left out just now
                return jobs
        without = threads.types if threads else []
        return await self._left_out.claim(conn, worker, rooms, room, aside=aside, without=without, blind=blind)

    async def _take_suspects(
        self, conn: Connection, worker: int, keys: list[str], crashes: int, most: int
    ) -> list[Job]:
        if not self._left_out:
            jobs = await unless_refused(claim_suspects(conn, worker, keys, self._types, crashes, most))
            if jobs is not None:
                return self._left_out.taken(jobs)
        return await self._left_out.claim_suspects(conn, worker, keys, self._types, crashes, most)

    async def _isolate(self, conn: Connection, worker: int) -> int:
        """Run some tasks without others beside them, as their workers have vanished. Returns how many it has begun.

        schema.sql tells the rules, under "Tasks whose worker vanished".
        """
        clock = asyncio.get_running_loop().time
        self._suspects = False
        keys = [f"crashed:{queue}" for queue in self._queues if queue not in self._admission.paused]
        crashes = await conn.fetchval(SQL["find_fewest_crashes"], keys, self._types, self._left_out.ids)
        if crashes is None:
            self._refused_since = None
            return 0
        locked = False
        if not is_pooled(conn):
            locked = await conn.fetchval("SELECT pg_try_advisory_lock(1852990835, 0)")
            if not locked:
                # Whoever has it isolates others, or is frozen, or a stranger. So not for ever.
                self._refused_since = self._refused_since or clock()
                if clock() - self._refused_since < REFUSED_SECONDS:
                    return 0
        self._refused_since = None
        patience = min(PATIENCE_SECONDS * 2 ** min(crashes - 2, 10), PATIENCE_MOST)
        jobs: list[Job] = []
        fed: list[Job] = []
        locked_rows: list[Job] = []
        held = self._runners.held
        try:
            self._door.want(Place.AWAY)
            self._runners.start_batches()
            alone = await self._until(conn, worker, lambda: not held and not self._settler.pending, patience)
            if self._stopping or self._failure is not None:
                return 0
            _, room = self._rooms(clock())
            if room <= 0:
                return 0  # it waits for a slot, as others do
            with anyio.CancelScope(shield=True):
                most = min(room, ISOLATED_AT_ONCE.get(crashes, 1))
                jobs += await self._take_suspects(conn, worker, keys, crashes, most)
                more, locked_rows = await self._admission.admit(conn, worker, jobs)
                fed += more
            self._runners.add_jobs(fed)
            for job in locked_rows:
                self._settler.put(HandedBack(job))
            if fed:
                fields = {"tasks": len(fed), "ids": [job.id for job in fed][:20], "alone": alone}
                logger.info("running tasks isolated, as their workers have vanished", extra={"fields": fields})
            self._runners.start_batches()
            if alone and fed:
                ids = {job.id for job in fed}
                await self._until(conn, worker, lambda: not (ids & held.keys()) and not self._settler.pending, patience)
        finally:
            if locked and not conn.is_closed():
                await conn.execute("SELECT pg_advisory_unlock(1852990835, 0)")
        self._look = True
        return len(fed)

    async def _until(self, conn: Connection, worker: int, done: Callable[[], bool], seconds: float) -> bool:
        """Wait for that, for so long at most, and claim nothing meanwhile. Returns whether it has come."""
        clock = asyncio.get_running_loop().time
        until = clock() + seconds
        while not self._stopping and self._failure is None:
            self._wake.clear()
            if self._beats:
                await self._beat(conn, worker)
            if self._freed:
                await self._free(conn)
            if done():
                return True
            if clock() >= until:
                break
            await self._wait(until)
        return False

    async def _beat(self, conn: Connection, worker: int) -> None:
        self._beats = False
        try:
            await conn.execute(SQL["send_heartbeat_only"], worker)
        except asyncpg.PostgresError as error:
            if not is_refusal(error):  # the heartbeat's thread, which is refused it too, says so
                raise

    async def _free(self, conn: Connection) -> int:
        """Let in who waited for what has ended. Those it lets in ring, but perhaps for another."""
        self._freed = False  # before it: more may end meanwhile
        ready = 0
        with anyio.CancelScope(shield=True):
            ready = await self._left_out.free(conn)
        self._look |= ready > 0
        return ready

    async def _due(self, conn: Connection, worker: int, look: list[str] | None = None) -> bool:
        """Promote what is due, set the timer, send an echo now and then. True: there is something to claim."""
        clock = asyncio.get_running_loop().time
        now = begin = clock()
        rooms, _ = self._rooms(now)
        self._changed = False  # before it is read
        open = [queue for queue in self._queues if queue not in self._admission.paused]
        full = [queue for queue in open if queue not in rooms]
        echo = None
        holds = self._door.place is not Place.AWAY
        if holds and not self._echo and self.bell_seconds is not None and now - self._echo_sent > ECHO_SECONDS / 3:
            echo = self._new_echo(now)
            self._door.turn_over()
        onward = look is None and now < self._due_front_at
        args = self._queues, [] if onward else full if full and look is None else open
        rest = echo, self._due_mark if onward else None
        timeout = PROOF_SECONDS if echo else None
        promoted = 0
        row = None
        if not self._left_out:
            row = await unless_refused(conn.fetchrow(SQL["check_due"], *args, PROMOTED_AT_ONCE, *rest, timeout=timeout))
        if row is None or row[0] is None:
            if row is not None:
                self._look = True  # some others may have been made ready
                rest = None, rest[1]  # the echo is sent
            promoted = await self._left_out.promote(conn, self._queues, PROMOTED_AT_ONCE)
            row = await conn.fetchrow(SQL["check_due"], *args, 0, *rest, timeout=timeout)
        assert row is not None
        more, seconds, ready, inserted, freed, settings, mark, _ = row
        promoted += more
        self._freed |= freed
        await self._admission.heard(conn, worker, settings)
        now = clock()
        self._due_at = now
        self._next_due = math.inf if seconds is None else now + max(0.0, seconds)
        if promoted < PROMOTED_AT_ONCE:
            self._due_mark = mark
        if onward:
            self._next_due = min(self._next_due, self._due_front_at)
        else:
            takes = self._due_usual.of(now - begin)
            self._due_front_at = now + (OWED_TIMES * takes if takes > SLOW_SECONDS else 0.0)
        if promoted:
            self._look = True
            if promoted >= PROMOTED_AT_ONCE:
                self._next_due = now
        if self._inserted >= 0:
            # Arrivals of other workers' queues: while those come in numbers, don't make them ring either.
            self._moderation.arrived(max(0, inserted - self._inserted - self._claimed), now)
        self._inserted, self._claimed = inserted, 0
        self._again_at = math.inf
        if ready and look is None and not full:
            # There is room, and yet it wasn't claimed: it has just come, or somebody has locked it, who won't ring when
            # he lets it go.
            self._again_wait = min(AGAIN_MOST, max(AGAIN_LEAST, self._again_wait * 2))
            self._again_at = now + self._again_wait
            ready = False
        else:
            self._again_wait = 0.0
        if ready and look is None and holds:
            if now >= self._pass_after:
                self._pass_wait = PASS_SECONDS if now > self._pass_after + 5.0 else min(1.0, self._pass_wait * 2)
                self._pass_after = now + self._pass_wait
                self._passing = True
                self._door.want(Place.AWAY)
            else:
                self._next_due = min(self._next_due, self._pass_after)
        return bool(promoted or (ready and look is not None))

    def _rooms(self, now: float) -> tuple[dict[str, int], int]:
        return ({}, 0) if self._settler.full else self._room.now(now, self._admission.paused, self._settler.pending)

    def _work_enough(self, now: float) -> bool:
        runners, config = self._runners, self._config
        enough = len(runners.held) * 2 > config.concurrency or runners.slots.threads_needed * 2 > config.most_threads
        return enough and now >= self._pass_after

    def _pass_on(self, now: float) -> None:
        """Let another have the turn, and queue for it again."""
        if now >= self._pass_after:
            self._pass_after = now + PASS_SECONDS
            self._passing = True
            self._door.want(Place.AWAY)

    # The bell.

    def _door_moved(self) -> None:
        if self._door.robbed is not self._robbed:
            self._robbed = self._door.robbed
            if self._robbed:
                logger.warning("somebody who is no worker has the turn at the bell; going without: each task wakes all")
            else:
                logger.info("the turn at the bell is back")
        if self._door.place is Place.AWAY:
            self._away_since = asyncio.get_running_loop().time()
        else:
            self._look = True  # the claim that follows getting the turn, and falling asleep
        self._wake.set()

    def _rung(self, _conn: object, _pid: int, _channel: str, payload: object) -> None:
        if self._silent:
            self._silent = False
            self.bell_seconds = ECHO_LIMIT_SECONDS  # or more; echoes go on from here
            logger.info("the bell rings again")
        if payload == "":
            self._look = True
        elif payload == "unhandled":
            self._look = self._aside = True
        elif payload == "queues":
            self._look = self._changed = True
        elif payload == self._echo:
            self._echo = ""
            self._echoed.set()
            return
        else:
            return  # another worker's echo
        self._wake.set()

    async def _listen(self, conn: Connection) -> None:
        await conn.add_listener(CHANNEL, self._rung)
        self._listening = self._look = self._aside = self._changed = True  # what was said before wasn't heard

    async def _unlisten(self, conn: Connection) -> None:
        await conn.remove_listener(CHANNEL, self._rung)
        self._listening = False
        self._echo = ""

    def _new_echo(self, now: float) -> str:
        self._echo = f"echo {uuid.uuid4()}"
        self._echoed.clear()
        self._echo_sent = now
        return self._echo

    async def _prove(self, conn: Connection) -> None:
        """A round trip through NOTIFY itself. Behind a pooler in transaction mode LISTEN succeeds and is in vain."""
        clock = time.perf_counter  # finer than a loop's time, which uvloop keeps in milliseconds
        sent = clock()
        echo = self._new_echo(asyncio.get_running_loop().time())
        await conn.execute("SELECT notifyq.notify_unless_full('notifyq', $1)", echo)
        before = self.bell_seconds
        with anyio.move_on_after(ECHO_LIMIT_SECONDS) as late:
            await self._echoed.wait()
        self._echo = ""
        self._silent = late.cancelled_caught
        if self._silent:
            self._warn_silent()
        else:
            self.bell_seconds = clock() - sent
            if before is None:
                logger.debug("the bell is proven", extra={"fields": {"seconds": round(self.bell_seconds, 4)}})

    def _warn_silent(self) -> None:
        self.bell_seconds = None
        logger.warning(
            "the bell is silent: LISTEN gets no NOTIFY here (a pooler in transaction mode, or the queue of"
            " notifications is full?); polling only",
            extra={"fields": {"poll_interval": self._config.poll_interval_seconds}},
        )

    # Waiting.

    async def _wait(self, until: float) -> None:
        """Until something happens, or that loop time."""
        if until == math.inf:
            await self._wake.wait()
            return
        timer = asyncio.get_running_loop().call_at(until, self._wake.set)
        try:
            await self._wake.wait()
        finally:
            timer.cancel()

    def _later(self, seconds: float) -> float:
        """A loop time in about so many seconds, jittered, so that workers don't poll in step; never for 0."""
        return asyncio.get_running_loop().time() + random.uniform(0.8, 1.2) * seconds if seconds else math.inf
