"""Limits hold while workers are killed at random."""

from __future__ import annotations

import itertools
import math
import random
import signal
import time
from collections.abc import Iterable, Mapping
from typing import Any

import anyio
import pytest

from ..helpers.limits import STARTS, begun, closest
from ..helpers.processes import Spawn, Story, started
from ..helpers.waiting import eventually


class Ledger:
    """What worker processes did, as they said themselves: when each run began, and when it was over. A run that was
    killed was over when its process was."""

    def __init__(self, spawn: Spawn, *options: str) -> None:
        self._spawn = spawn
        self._options = options
        self._alive: list[Story] = []
        self._stories: list[tuple[Story, list[float]]] = []  # and when it was killed

    async def hire(self) -> None:
        story = await started(self._spawn, *self._options)
        self._alive.append(story)
        self._stories.append((story, []))

    async def kill(self) -> None:
        """Kill one that runs a task, if there is one."""
        events = {story: [line["event"] for _, line in story.lines] for story in self._alive}
        busy = [story for story, seen in events.items() if seen.count("ran") > seen.count("over")]
        victim = random.choice(busy or self._alive)
        self._alive.remove(victim)
        victim.process.signal(signal.SIGKILL)
        next(dead for story, dead in self._stories if story is victim).append(time.time())
        await victim.process.wait()

    def runs(self) -> list[tuple[float, float, int]]:
        """(began, over, id), the earliest first."""
        found: list[tuple[float, float, int]] = []
        for story, dead in self._stories:
            open: dict[tuple[int, int], float] = {}
            for line in [line for _, line in story.lines if line["event"] in ("ran", "over")]:
                run = line["id"], line["attempt"]
                if line["event"] == "ran":
                    open[run] = line["at"]
                else:
                    found.append((open.pop(run), line["at"], line["id"]))
            found += [(began, dead[0] if dead else math.inf, id) for (id, _), began in open.items()]
        return sorted(found)


def most_at_once(runs: Iterable[tuple[float, float, int]]) -> int:
    changes = sorted(change for began, over, _ in runs for change in ((began, 1), (over, -1)))
    return max(itertools.accumulate(change for _, change in changes))


SLOW_ADMISSION = """
    CREATE FUNCTION slow() RETURNS trigger LANGUAGE plpgsql AS $$
    BEGIN PERFORM pg_sleep(0.005); RETURN NULL; END $$;
    CREATE TRIGGER slow AFTER UPDATE OF admitted_at ON notifyq.task EXECUTE FUNCTION slow()
"""
SEVEN_TASKS = """
    INSERT INTO notifyq.task (type, payload, queue, priority, options)
    SELECT 'Step', '{"seconds": 0.15, "fails": 0.1}', queue, (random() * 2)::integer,
           jsonb_build_object('limit_key', limit_key, 'limit_running', running, 'limit_rate', rate,
                              'limit_seconds', CASE WHEN rate > 0 THEN 0.5 END, 'order_key', order_key)
    FROM (VALUES ('default', 'one', 1, NULL, NULL), ('default', 'three', 3, NULL, 'mixed'),
                 ('default', 'rate', NULL, 8, NULL), ('default', NULL, NULL, NULL, 'order'),
                 ('narrow', 'three', 3, NULL, NULL), ('narrow', NULL, NULL, NULL, NULL),
                 ('narrow', NULL, NULL, NULL, 'both'))
         AS t (queue, limit_key, running, rate, order_key)
"""


@pytest.mark.slow
async def test_killed_at_random(spawn: Spawn, db: Any) -> None:
    """Two fleets, 4 processes, killed one by one with what they run: no limit, rate or order is ever broken, and in
    the end all is done."""
    await db.execute(f"{STARTS}; {SLOW_ADMISSION}; SELECT notifyq.limit_queue('narrow', 2, 10, 0.5)")
    wide, both = Ledger(spawn, 'queues=["default"]'), Ledger(spawn, 'queues=["narrow", "default"]')
    for ledger in (wide, both):
        await ledger.hire()
        await ledger.hire()
    over, inserts, kills = anyio.Event(), 0, 0

    async def enqueue() -> None:
        nonlocal inserts
        while inserts < 45 or kills < 4:  # so that they meet at the keys' locks
            await db.execute(SEVEN_TASKS)
            inserts += 1
            await anyio.sleep(random.uniform(0, 0.15))
        over.set()

    async with anyio.create_task_group() as group:
        group.start_soon(enqueue)
        while not over.is_set():
            await anyio.sleep(random.uniform(0, 0.5))
            ledger = random.choice((wide, both))
            await ledger.kill()
            kills += 1
            await ledger.hire()
    await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.task"), 0, 120)
    await eventually(lambda: db.fetchval("SELECT count(*) FROM notifyq.slot_released"), 0)
    done = {
        row["id"]: row
        for row in await db.fetch(
            """SELECT id, state, queue, options ->> 'limit_key' AS limit_key, options ->> 'order_key' AS order_key
               FROM notifyq.finished"""
        )
    }
    assert {row["state"] for row in done.values()} == {"done"}
    assert len(done) == 7 * inserts
    vanished = "SELECT count(*) FROM notifyq.finished WHERE errors::text LIKE '%vanished while it ran%'"
    assert await db.fetchval(vanished) > 3
    await assert_held(db, sorted(wide.runs() + both.runs()), done)


async def assert_held(db: Any, runs: list[tuple[float, float, int]], done: Mapping[int, Any]) -> None:
    """No limit, rate or order was broken by these runs of the tasks in `done`."""

    def of(**columns: str) -> list[tuple[float, float, int]]:
        return [run for run in runs if all(done[run[2]][name] == value for name, value in columns.items())]

    at_once = {"one": 1, "three": 3}
    assert {key: most_at_once(of(limit_key=key)) for key in at_once} == at_once
    assert most_at_once(of(queue="narrow")) == 2
    for order in ("order", "mixed", "both"):
        ids = [id for _, _, id in of(order_key=order)]
        assert ids == sorted(ids)
        assert most_at_once(of(order_key=order)) == 1
    for key, count in (("limit:rate", 8), ("queue:narrow", 10)):
        starts = await begun(db, key)
        assert len(starts) >= 40
        window = closest(starts, count)
        print(f"{key}: {len(starts)} starts, {count + 1} in no less than {window:.6f} s")
        assert window > 0.5 - 0.000_001
