"""The chores of the heartbeat's thread: a table of what to do and how often, and the functions that do it.

Each function gets the thread's connection and the worker's Upkeep, and does a bounded piece of work. It returns True if
more is left: then it is called again 0.05 s later, with a heartbeat in between if one is due. A statement that
PostgreSQL refuses is logged once, and the heartbeat and the other chores go on.

Two things aren't in the table, since they follow each heartbeat: the tasks of due cron slots are enqueued (crons.py),
and the tasks of dead workers are rescued.
"""

from __future__ import annotations

import random
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import asyncpg

from .. import log
from ..codec import NOTE_LENGTH, first_line, storable
from ..database.connection import SQL
from ..database.errors import schema_gone
from .crons import Crons
from .left_out import NOT_TAKEN_BACK, LeftOut
from .server_clock import ServerClock

if TYPE_CHECKING:
    from ..config import WorkerConfig
    from ..database.connection import Connection
    from ..registry import Registry
    from .runners import Runners
    from .silence import Silent

logger = log.logger("notifyq.maintenance")

RESCUE_AT_ONCE = 2000
PRUNE_AT_ONCE = 5000
PRUNE_STATEMENT_SECONDS = 0.5  # how long one statement should take: where rows are large, it deletes fewer
DEAD_KEPT_SECONDS = 30 * 86400.0
ENDED = (asyncpg.AdminShutdownError, asyncpg.CrashShutdownError, asyncpg.PostgresConnectionError)  # the session is over


class Upkeep:
    """What the chores of one worker remember. Used in the heartbeat's thread only."""

    def __init__(self, config: WorkerConfig, registry: Registry, runners: Runners) -> None:
        self.config = config
        self.runners = runners
        self.worker = 0  # its id; 0: not registered yet
        self.crons = Crons(registry.crons)
        self.left_out = LeftOut()  # tasks that PostgreSQL doesn't let this worker take back from others
        self.clock = ServerClock()
        self.findings: dict[str, tuple[str, str]] = {}  # what is wrong with the database, by object: problem, cure
        self.ids_cure = ""  # what to do, if ids are given out a second time
        self.rescue_at_once = RESCUE_AT_ONCE  # tasks in one statement; fewer after one that took too long
        self.prune_at_once: dict[str, int] = {}  # rows, by statement
        self.recheck_from = ""  # the key with which the next recheck goes on
        self._refused: dict[str, str] = {}  # the chores that PostgreSQL refuses, and its reasons

    @property
    def problems(self) -> list[str]:
        """What the worker's status says of this, as phrases."""
        return [*filter(None, [self.ids_cure]), *self.findings]

    async def attempt(self, conn: Connection, what: str, work: Awaitable[bool | None]) -> bool:
        """Await `work`. Returns whether more of it is left. Raises those of PostgreSQL's errors that end a session."""
        try:
            more = bool(await work)
        except asyncpg.PostgresError as error:
            if isinstance(error, ENDED) or conn.is_closed() or schema_gone(error):
                raise
            if what not in self._refused:
                self._refused[what] = first_line(error)
                logger.warning(
                    "the database refuses a chore; it is tried again, and everything else goes on",
                    extra={"fields": {"chore": what, "error": first_line(error)}},
                )
            return False
        if self._refused.pop(what, None) is not None:
            logger.info("the database accepts the chore again", extra={"fields": {"chore": what}})
        return more


async def write_progress(conn: Connection, upkeep: Upkeep) -> None:
    """Write the progress that handlers have reported, in one statement."""
    reports = {job: p for job, p in upkeep.runners.slots.take_reports().items() if job.worker == upkeep.worker}
    keys = [job.id for job in reports], [job.attempt for job in reports]
    fractions = [p.fraction for p in reports.values()]
    notes = [None if p.note is None else storable(p.note[:NOTE_LENGTH]) for p in reports.values()]
    try:
        rows = await conn.fetch(SQL["write_progress"], upkeep.worker, *keys, fractions, notes)
    except asyncpg.DataError:  # the database's encoding lacks a character of a note
        notes = [None if note is None else note.encode("ascii", "backslashreplace").decode() for note in notes]
        rows = await conn.fetch(SQL["write_progress"], upkeep.worker, *keys, fractions, notes)
    written = {row[0] for row in rows}
    for job, progress in reports.items():
        if job.id not in written:  # another session has locked its row, or its lease is lost
            upkeep.runners.slots.put_back_report(job, progress)


async def find_problems(conn: Connection, upkeep: Upkeep) -> None:
    """Log what is wrong with the database though no statement fails: when it is found, and when it is mended."""
    found = {about: (problem, cure) for about, problem, cure in await conn.fetch(SQL["list_findings"], False)}
    for about, (problem, cure) in found.items():
        if about not in upkeep.findings:
            logger.warning("%s. Cure: %s", problem, cure, extra={"fields": {"about": about}})
    for about in upkeep.findings.keys() - found.keys():
        logger.info("mended: %s", about, extra={"fields": {"about": about}})
    upkeep.findings = found
    if upkeep.worker:
        await upkeep.crons.log_conflicts(conn, upkeep.worker)


async def compare_ids(conn: Connection, upkeep: Upkeep) -> None:
    """Log it if new tasks get ids that older tasks have had. They do after TRUNCATE ... RESTART IDENTITY, or on a
    server to which the tables were copied without the sequence."""
    row = await conn.fetchrow(SQL["read_highest_ids"])
    assert row is not None
    highest, last = row
    before, upkeep.ids_cure = upkeep.ids_cure, ""
    if highest > last:
        cure = f"SELECT setval('notifyq.task_id_seq', {highest})"
        upkeep.ids_cure = f"ids are given a second time; run: {cure}"
        await conn.execute(SQL["forget_keys_of_future_ids"])
        if not before:
            logger.warning(
                "new tasks get ids that older ones have had: the sequence is behind the ids in the tables; where the "
                "outcome of a new task is written, the older task's is deleted. Run: %s",
                cure,
                extra={"fields": {"last": last, "highest": highest, "cure": cure}},
            )
    elif before:
        logger.info("new tasks get ids of their own again")


async def reclaim_unowned(conn: Connection, upkeep: Upkeep) -> None:
    await upkeep.left_out.reclaim_unowned(conn)


async def recheck_waiting(conn: Connection, upkeep: Upkeep) -> None:
    upkeep.recheck_from = await conn.fetchval(SQL["recheck_waiting"], upkeep.recheck_from) or ""


async def prune_finished(conn: Connection, upkeep: Upkeep) -> bool:
    now = upkeep.clock.at_most(await conn.fetchval("SELECT clock_timestamp()"))
    return await _prune(conn, upkeep, "prune_finished", (upkeep.config.history_seconds, DEAD_KEPT_SECONDS), (now,))


async def prune_rate_log(conn: Connection, upkeep: Upkeep) -> bool:
    return await _prune(conn, upkeep, "prune_rate_log")


async def prune_unique_keys(conn: Connection, upkeep: Upkeep) -> bool:
    return await _prune(conn, upkeep, "prune_unique_keys")


async def _prune(
    conn: Connection, upkeep: Upkeep, statement: str, before: tuple[object, ...] = (), after: tuple[object, ...] = ()
) -> bool:
    """Delete as many rows as can be deleted in about half a second. Returns whether more are left.

    before, after  the statement's arguments before and after the number of rows
    """
    most = upkeep.prune_at_once.get(statement, PRUNE_AT_ONCE)
    begin = time.monotonic()
    try:
        pruned = await conn.fetchval(SQL[statement], *before, most, *after)
    finally:
        took = time.monotonic() - begin
        if took > 2 * PRUNE_STATEMENT_SECONDS:
            upkeep.prune_at_once[statement] = max(1, most // 2)
        elif took < PRUNE_STATEMENT_SECONDS:
            upkeep.prune_at_once[statement] = min(PRUNE_AT_ONCE, most * 2)
    return bool(pruned >= most)


async def correct_misdated(conn: Connection, upkeep: Upkeep) -> None:
    """Find the tasks that wait too long since the server's clock was set back, and correct their times."""
    for queue in upkeep.config.queues:
        found = await conn.fetchrow(SQL["list_misdated"], queue)
        if found is not None and any(found) and (changed := await conn.fetchval(SQL["correct_misdated"], *found)):
            logger.warning(
                "the server's clock was set back: tasks waited for times that were computed while it was ahead",
                extra={"fields": {"queue": queue, "tasks": changed}},
            )


async def rescue(conn: Connection, upkeep: Upkeep, silent: Silent) -> None:
    """Take back what a silent worker holds, if it is dead. If it lives, end its backend at the bell."""

    async def rescue_tasks(ids: list[int] | None) -> int:
        return await _rescue(conn, upkeep, silent, ids)

    await upkeep.left_out.take_back(conn, silent.worker, rescue_tasks, NOT_TAKEN_BACK)


async def _rescue(conn: Connection, upkeep: Upkeep, silent: Silent, ids: list[int] | None) -> int:
    """Rescue these of the worker's tasks; None: all of them. Returns how many."""
    rescued = 0
    while True:
        most = upkeep.rescue_at_once
        try:
            row = await conn.fetchrow(SQL["rescue"], silent.worker, most, silent.seen, silent.seconds, ids)
        except TimeoutError:  # one of these rows takes too long: a statement for fewer rescues those before it
            upkeep.rescue_at_once = max(1, most // 2)
            raise
        upkeep.rescue_at_once = min(RESCUE_AT_ONCE, most * 2)
        assert row is not None
        name, ready, dead = row
        if name is None:
            await _end_bell_backend(conn, silent.worker)
            return rescued
        if not ready and not dead:
            return rescued
        rescued += ready + dead
        logger.warning(
            "rescued the tasks of a dead worker",
            extra={"fields": {"worker": name, "ready_again": ready, "dead": dead}},
        )


async def _end_bell_backend(conn: Connection, worker: int) -> None:
    """End the backend at the bell of a worker that is silent, and lives by its lock: it is frozen, or out of reach. So
    another worker gets the turn."""
    try:
        ended: int = await conn.fetchval(SQL["end_backends"], worker, ["bell"], 0)
    except asyncpg.InsufficientPrivilegeError:
        return
    if ended:
        logger.warning("took the turn from a worker that doesn't answer", extra={"fields": {"worker": worker}})


@dataclass(eq=False)
class Chore:
    """Something to do every `every` seconds, give or take the share `jitter` of that. When a session begins, only a
    random part of the first interval passes, so that workers that reconnect together don't do it together."""

    what: str  # as the log names it
    every: float
    run: Callable[[Connection, Upkeep], Awaitable[bool | None]]
    jitter: float = 0.5
    at_once: bool = False  # whether it is also done when a session begins

    def first(self) -> float:
        """Seconds from the beginning of a session to the first time."""
        return 0.0 if self.at_once else random.uniform(0.2, 1.0) * self.every

    def next(self) -> float:
        """Seconds from one time to the next."""
        return random.uniform(1 - self.jitter, 1 + self.jitter) * self.every


WRITE_PROGRESS = Chore("write progress", 1.0, write_progress, jitter=0.0, at_once=True)  # when there is any
FIND_PROBLEMS = Chore("look for what is wrong with the database", 60.0, find_problems)
COMPARE_IDS = Chore("compare ids", 60.0, compare_ids, at_once=True)
PRUNING = [
    Chore("prune notifyq.finished", 60.0, prune_finished),
    Chore("prune notifyq.rate_log", 60.0, prune_rate_log),
    Chore("prune notifyq.unique_key", 60.0, prune_unique_keys),
    Chore("find what a clock that was set back keeps waiting", 60.0, correct_misdated),
]
RECLAIM_UNOWNED = Chore("take back tasks of workers that are gone", 60.0, reclaim_unowned)
RECHECK_WAITING = Chore("look again at keys where tasks wait", 15.0, recheck_waiting)

CHORES = [WRITE_PROGRESS, *PRUNING, FIND_PROBLEMS, COMPARE_IDS, RECLAIM_UNOWNED, RECHECK_WAITING]
