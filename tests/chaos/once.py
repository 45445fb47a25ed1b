"""The promises on tasks of which there is one, proven from a history.

P7  while a task with a unique_key has not ended, no other with it is inserted; a task that has ended prevents none; and
    a task that prevented an enqueue begins after that enqueuer's transaction
P9  each slot of a cron has one task, and in quiet it has it in time; P3 says when that starts

All enqueuers with keys here name the states until the end (scheduled, ready, running). An enqueuer looks under a lock
on the key, which it keeps until its commit. So of one key the ledger's rows of insertions are in the order in which
their enqueuers looked; and when the second row was written, the first one's end had been committed. A task that a
person has retried has no key any more.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator

from notifyq.worker.crons import AHEAD_SECONDS

from .app import TICK_SECONDS
from .checker import Breach
from .flow import SEEN_SECONDS
from .history import History, Row
from .timing import LAG_TIMES, LATE_SECONDS


def alone(history: History) -> Iterator[Breach]:
    born: dict[str, list[Row]] = defaultdict(list)
    for row in history.rows:
        if row.op == "I" and row.unique_key is not None:
            born[row.unique_key].append(row)
    for key, rows in born.items():
        for first, second in itertools.pairwise(sorted(rows, key=lambda row: row.seq)):
            end = next((row for row in history.rows_of[first.id] if row.op == "D"), None)
            if end is None or end.seq > second.seq or end.committed > second.at:
                yield Breach("P7", f"inserted with key {key}, which task {first.id} had", second.id, second.at)


def in_the_way(history: History) -> Iterator[Breach]:
    """An enqueue was refused for a task that was there sometime between its question and the answer."""
    for batch in history.batches:
        for id in batch.existed:
            there, why, rows = False, "no enqueuer has inserted", history.rows_of.get(id, [])
            for row in rows:
                if row.op == "D" and row.committed + SEEN_SECONDS < batch.began:
                    there, why = False, f"had ended {batch.began - row.committed:.1f} s before"
                elif row.op == "I" and row.at < batch.at:
                    there = True
            if not there:
                what = f"an enqueue by {batch.by} was refused for task {id}, which {why}"
                yield Breach("P7", what, id if rows else 0, batch.began)


def held_back(history: History) -> Iterator[Breach]:
    """A task that prevented an enqueue, and hasn't begun, begins when the enqueuer has ended: its handler sees what was
    written beside the enqueue."""
    for batch in history.batches:
        for id in batch.existed:
            leases = history.leases_of.get(id)
            if leases and batch.open[0] < leases[0].claim.at < batch.open[1] and batch.outcome != "unknown":
                what = f"claimed while an enqueue by {batch.by} was open, which it was in the way of"
                yield Breach("P7", what, id, leases[0].claim.at)


def slots(history: History) -> Iterator[Breach]:
    """A slot that a fault delayed is made up for, unless the workers were told to stop before that."""
    begin, end = history.cron
    found: dict[int, list[Row]] = {slot: [] for slot in range(math.ceil(begin), int(end)) if slot % TICK_SECONDS == 0}
    for rows in history.rows_of.values():
        if rows[0].op == "I" and rows[0].type == "Tick":
            found.setdefault(int(rows[0].run_at), []).append(rows[0])
    last = max((slot for slot, rows in found.items() if rows), default=0)
    for slot, rows in found.items():
        if len(rows) > 1:
            yield Breach("P9", f"it has task {rows[0].id}'s slot", rows[1].id, slot)
        quiet = slot > history.healed(slot)
        if not rows and (quiet or slot < last):
            yield Breach("P9", f"nothing was enqueued for slot {slot}", at=slot)
        elif rows and quiet:
            late = rows[0].committed - slot
            if late > LATE_SECONDS + LAG_TIMES * history.lag(slot - AHEAD_SECONDS, slot + late):
                yield Breach("P9", f"enqueued {late:.1f} s after its slot", rows[0].id, slot)


CHECKS = (alone, in_the_way, held_back, slots)
