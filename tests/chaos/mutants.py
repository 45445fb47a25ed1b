"""notifyq, broken on purpose: each a known mistake, made in a copy of the package, which the workers then run.

A run with one is to fail, or the checker proves nothing: make chaos MUTANT=fence.
"""

from __future__ import annotations

import shutil
from pathlib import Path

import notifyq

Change = tuple[str, str, str]

MUTANTS: dict[str, list[Change]] = {
    # No fence: a worker that was frozen past its lease settles the task that its successor runs.
    "fence": [
        (
            f"database/sql/worker/{name}.sql",
            "t.id = ANY (ARRAY[o.id]) AND t.worker IS NOT DISTINCT FROM $1 AND t.attempts = o.attempt",
            "t.id = ANY (ARRAY[o.id]) AND ($1::integer IS NOT NULL OR t.attempts = o.attempt)",
        )
        for name in ("finish", "retry_later", "hand_back")
    ],
    # No claim after the worker has fallen asleep: a task waits that was committed in between, whose enqueuer saw no
    # sleeper. Chance seldom finds this one: one of four runs of half a minute did. The doorbell's model always does.
    "final claim": [
        (
            "worker/state.py",
            "self.claim_wanted = True  # the claim that follows getting the turn, and falling asleep",
            "self.claim_wanted |= position is TURN",
        ),
        (
            "worker/state.py",
            "self.claim_wanted |= then_claims",
            "self.claim_wanted |= then_claims and self.position is TURN",
        ),
    ],
    # A rescuer takes every other worker for dead, whatever its lock and its heartbeat say.
    "liveness": [
        ("database/sql/worker/rescue.sql", "AND CASE WHEN", "AND CASE WHEN true OR"),
        ("worker/silence.py", "SILENT_SECONDS = 2.0", "SILENT_SECONDS = 0.0"),
    ],
    # A crash ends each task that the worker held, whichever of them caused it.
    "crash": [
        ("database/sql/worker/rescue.sql", "           w.status <> 'vanished'\n           AND", "           true OR"),
        ("database/sql/worker/rescue.sql", "coalesce(t.crashes_alone, 0) >= 2", "true"),
    ],
    # The insert trigger looks whether a worker sleeps, and holds no lock until its commit.
    "peek": [
        (
            "schema.sql",
            "LOCK TABLE notifyq.bell IN ROW EXCLUSIVE MODE NOWAIT;",
            """IF EXISTS (SELECT FROM pg_catalog.pg_locks WHERE relation = 'notifyq.bell'::regclass
                          AND mode = 'ShareLock') THEN RAISE EXCEPTION 'ring'; END IF;""",
        )
    ],
    # An enqueuer with a unique key reads which task has the key, and locks nothing.
    "only one": [
        (
            "schema.sql",
            "BEGIN\n    INSERT INTO notifyq.unique_key AS k",
            """BEGIN
    SELECT k.task, k.enqueued_at INTO old, since FROM notifyq.unique_key k WHERE k.key = my_key;
    IF NOT FOUND THEN INSERT INTO notifyq.unique_key AS k""",
        ),
        ("schema.sql", "INTO old, since;\n    IF old", "INTO old, since;\n    END IF;\n    IF old"),
    ],
    # The task that has the key isn't locked: it may begin at any time.
    "in the way": [
        (
            "schema.sql",
            "t.options ->> 'unique_key' = my_key\n        FOR KEY SHARE;",
            "t.options ->> 'unique_key' = my_key;",
        )
    ],
    # A task that waits for several others is released by the end of the first.
    "after": [
        ("schema.sql", "\n          AND NOT EXISTS (SELECT FROM notifyq.dependency d WHERE d.task = t.id);", ";"),
    ],
    # A predecessor is recorded, and not watched: its end is announced to no worker.
    "told": [
        ("schema.sql", "live := notifyq.watch_ends(needed);\n        EXIT WHEN", "live := needed;\n        EXIT WHEN"),
    ],
    # Claims don't count threads, and tasks that were claimed beyond them are handed back.
    "threads": [
        ("worker/intake.py", "threads = self._capacity.threads(limit)", "threads = None"),
        (
            "worker/intake.py",
            "        self._runners.add_jobs(ready)\n        for job in locked:\n",
            """        surplus, now = [], asyncio.get_running_loop().time()
        for job in ready:
            if self._capacity.fits(job.type):
                self._runners.add_jobs([job])
            else:
                surplus.append(job)
                self._capacity.leave_alone(job.queue, now)
        for job in (*locked, *surplus):
""",
        ),
    ],
    # Payloads that are fetched apart are paired with the tasks in the order of both, though some tasks may have none.
    "payloads": [
        (
            "worker/large_payloads.py",
            "payloads: dict[int, bytes] = {row[0]: row[1] for row in rows}",
            "payloads = {job.id: row[1] for job, row in zip(jobs, rows)}",
        )
    ],
    # The age of a heartbeat is computed from the server's clock and the worker's.
    "heartbeat": [
        ("worker/silence.py", "import math\n", "import math\nimport time\n"),
        ("worker/silence.py", "if now - since >= SILENT_SECONDS:", "if time.time() - at >= SILENT_SECONDS:"),
        (
            "worker/silence.py",
            "silent.append(Silent(worker, at, now - since))",
            "silent.append(Silent(worker, at, time.time() - at))",
        ),
    ],
    # A cron waits for the slot that a wrong clock gave it.
    "slot": [("worker/crons.py", "IMPLAUSIBLE_SECONDS = 60.0", "IMPLAUSIBLE_SECONDS = 1e9")],
    # A start in the future counts until that time.
    "rate": [
        (
            "schema.sql",
            "IF EXISTS (SELECT FROM notifyq.rate_log s WHERE s.key = ANY (keys) AND s.at > moment)",
            "IF false",
        )
    ],
    # A rate is read, and never applied.
    "no rate": [("schema.sql", "m.limit_rate < m.place + r.started", "m.limit_rate < 0")],
    # A forked child keeps its parent's signal handlers, and the socket that wakes the parent's loop.
    "forked": [("forked.py", "        _free_signals()\n", "        pass\n")],
    # A table whose rows are deleted has no key, though a publication needs one.
    "publication": [
        (
            "schema.sql",
            "n             bigint      GENERATED ALWAYS AS IDENTITY PRIMARY KEY,\n    task          bigint",
            "n             bigint      GENERATED ALWAYS AS IDENTITY,\n    task          bigint",
        )
    ],
    # Each worker that has seen a slot become due enqueues it.
    "cron": [("database/sql/worker/enqueue_cron_slot.sql", "AND c.next_at IS NOT DISTINCT FROM $2::timestamptz ", "")],
}


def breed(name: str, folder: Path) -> Path:
    """A project with that mistake in its copy of the package, in `folder`."""
    package = Path(notifyq.__file__).parent
    copy = folder / "notifyq"
    shutil.copytree(package, copy, ignore=shutil.ignore_patterns("__pycache__"))
    schema = package.parent / "schema.sql"
    shutil.copy(schema, folder / "schema.sql")
    for file, old, new in MUTANTS[name]:
        path = (folder if file == "schema.sql" else copy) / file
        text = path.read_text(encoding="utf-8")
        if old not in text:
            raise ValueError(f"mutant {name!r}: {file} has changed, and has no {old!r}")
        path.write_text(text.replace(old, new), encoding="utf-8")
    (folder / "tests").symlink_to(package.parent / "tests")
    return folder
