"""What the doorbell costs those who enqueue: single-row INSERTs by pgbench, with and without the trigger.

Clock: pgbench's own, over transactions that have committed. Each round runs every variant once, in turn; the ratio is
the median over the rounds of a variant's rate over the reference's in the same round.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import tempfile
from contextlib import nullcontext
from pathlib import Path

from notifyq import store

from .common import Line, median, worker_process

ROUNDS, SECONDS = 5, 2
INSERT = """INSERT INTO notifyq.task (type, payload) VALUES
('Mail', '{"user": {"id": "3f2b8a7e-0001", "email": "somebody@example.org"}, "key": "kkkkkkkkkkkkkkkkkkkkkkkk"}');
"""
ALWAYS = """CREATE OR REPLACE FUNCTION pg_temp_notify() RETURNS trigger LANGUAGE plpgsql AS
$$BEGIN PERFORM pg_notify('notifyq', ''); RETURN NULL; END$$;
CREATE TRIGGER always AFTER INSERT ON notifyq.task FOR EACH STATEMENT EXECUTE FUNCTION pg_temp_notify()"""


def pgbench(program: str, dsn: str, clients: int, options: str = "") -> float:
    """Transactions a second."""
    with tempfile.NamedTemporaryFile("w", suffix=".sql") as script:
        script.write(INSERT)
        script.flush()
        command = [
            program,
            "-n",
            "-M",
            "prepared",
            "-f",
            script.name,
            "-c",
            str(clients),
            "-j",
            "2",
            "-T",
            str(SECONDS),
            dsn,
        ]
        env = {**os.environ, "PGOPTIONS": options}
        done = subprocess.run(command, capture_output=True, text=True, check=True, env=env)
    found = re.search(r"tps = ([0-9.]+) \(without", done.stdout)
    assert found, done.stdout
    return float(found[1])


async def run(dsn: str, bin_dir: Path | None) -> list[Line]:
    program = shutil.which("pgbench", path=str(bin_dir)) if bin_dir else shutil.which("pgbench")
    if program is None:
        raise SystemExit("insert: no pgbench here (it comes with PostgreSQL's client programs)")
    conn = await store.connect(dsn)
    rates: dict[str, list[float]] = {}

    async def trigger(which: str) -> None:
        await conn.execute("DROP TRIGGER IF EXISTS always ON notifyq.task; TRUNCATE notifyq.task, notifyq.finished")
        await conn.execute(f"ALTER TABLE notifyq.task {'ENABLE' if which == 'ring' else 'DISABLE'} TRIGGER ring")
        if which == "always":
            await conn.execute(ALWAYS)

    async def measure(name: str, which: str, clients: int, worker: bool, options: str = "") -> None:
        await trigger(which)
        # Nobody rings without the trigger, so there the worker polls: it has the same work to do, and takes the same
        # share of the machine.
        poll = "0.002" if which == "none" else "5"
        with worker_process(dsn, "--poll-interval", poll) if worker else nullcontext():
            rates.setdefault(name, []).append(pgbench(program, dsn, clients, options))

    slow = "-c commit_delay=5000 -c commit_siblings=0"  # a flush that takes 5 ms, for those who share one too
    for _ in range(ROUNDS):
        await measure("16, no trigger, worker", "none", 16, True)
        await measure("16, ring, worker", "ring", 16, True)
        await measure("16, always, worker", "always", 16, True)
        await measure("16, no trigger", "none", 16, False)
        await measure("16, ring", "ring", 16, False)
        await measure("slow 8, always, worker", "always", 8, True, slow)
        await measure("slow 8, ring, worker", "ring", 8, True, slow)
    await trigger("ring")
    await conn.execute("DROP FUNCTION pg_temp_notify()")
    await conn.close()

    def line(what: str, name: str, other: str, reference: str, aim: str = "") -> Line:
        ratio = median(a / b for a, b in zip(rates[name], rates[other], strict=True))
        return Line(what, median(rates[name]), "/s", reference, ratio, aim)

    plain, always = "no trigger", "a trigger that always notifies"
    return [
        line("16 clients, a worker draining", "16, ring, worker", "16, no trigger, worker", plain, ">= 0.80"),
        line(
            "16 clients, always notify, a worker draining",
            "16, always, worker",
            "16, no trigger, worker",
            plain,
        ),
        line("16 clients, no worker", "16, ring", "16, no trigger", plain),
        line(
            "8 clients, flush of 5 ms, a worker draining",
            "slow 8, ring, worker",
            "slow 8, always, worker",
            always,
            ">= 5",
        ),
    ]
