"""Histories made up for the tests of the checker: a right one, and one for each broken promise."""

from __future__ import annotations

from typing import Any

from .history import Batch, History, Process, Row, Run, Window

T = 1000.0  # when everything begins
QUEUES: dict[str, int | None] = {"default": None}


def row(op: str, at: float, **fields: Any) -> Row:
    """A transition of task 1 at T + `at`, by the enqueuer by default."""
    fields = {"who": "notifyq", "n": "7", "run_at": T, **fields}
    row.seq += 1  # type: ignore[attr-defined]
    return Row(op=op, id=fields.pop("id", 1), seq=row.seq, at=T + at, committed=T + at, **fields)  # type: ignore[attr-defined]


row.seq = 0  # type: ignore[attr-defined]


def claim(at: float, worker: int = 1, attempt: int = 1) -> Row:
    who, app = f"w{worker}", f"notifyq claims {worker}"
    return row("U", at, worker=worker, attempts=attempt, was_attempts=attempt - 1, who=who, app=app)


def done(at: float, worker: int = 1, attempt: int = 1, by: int | None = None, run: str = "w1-1") -> list[Row]:
    """Settled as done by that worker's process. The lease is `worker`'s."""
    who, lease = f"w{by or worker}", {"was_worker": worker, "was_attempts": attempt, "attempts": attempt}
    gone = row("D", at, who=who, app="notifyq settle", **lease)
    return [gone, row("F", at, who=who, app="notifyq settle", attempts=attempt, note=f'done "run {run}"')]


def taken(at: float, by: int, worker: int = 1, attempt: int = 1) -> Row:
    """Rescued."""
    lease = {"was_worker": worker, "was_attempts": attempt, "attempts": attempt}
    return row("U", at, who=f"w{by}", app=f"notifyq heartbeat {by}", note="its worker vanished", **lease)


def ran(run: str, start: float, end: float | None, attempt: int = 1) -> Run:
    ended = None if end is None else T + end
    return Run(run=run, id=1, attempt=attempt, who=run.partition("-")[0], started=T + start, ended=ended)


def history(rows: list[Row], runs: list[Run], **fields: Any) -> History:
    born = [row("W", -9, id=number, who=f"w{number}") for number in (1, 2)]
    idle = [Process(who=f"w{number}", started=T - 9, queues=QUEUES, concurrency=10) for number in (1, 2)]
    batch = Batch(by="test", numbers=[7], outcome="committed", at=T)
    return History(rows=born + rows, runs=runs, **{"batches": [batch], "processes": idle, **fields})


def well() -> History:
    return history([row("I", 0), claim(0.01), *done(0.1)], [ran("w1-1", 0.02, 0.1)])


def kill(until: float = 1.1) -> Window:
    return Window(name="worker killed", since=T + 1, until=T + until, who={"w1"}, round=1)


def rescue(at: float, **fields: Any) -> History:
    """A worker is killed after a second with the task, which its successor ends."""
    dead = Process(who="w1", started=T - 9, queues=QUEUES, concurrency=10, killed=T + 1, ended=T + 1, code=-9)
    heir = Process(who="w2", started=T - 9, queues=QUEUES, concurrency=10)
    rows = [row("I", 0), claim(0.01), taken(at, 2), claim(at + 0.1, 2, 2), *done(at + 0.2, 2, 2, run="w2-1")]
    runs = [ran("w1-1", 0.02, None), ran("w2-1", at + 0.11, at + 0.2, 2)]
    return history(rows, runs, **{"windows": [kill()], "processes": [dead, heir], **fields})


def lost() -> History:
    return history([], [])


def half() -> History:
    return history([row("I", 0), claim(0.01), *done(0.1)], [ran("w1-1", 0.02, 0.1)],
                   batches=[Batch(by="test", numbers=[7, 8], at=T)])  # fmt: skip


def undead() -> History:
    batch = Batch(by="test", numbers=[7], outcome="rolled back", at=T)
    return history([row("I", 0), claim(0.01), *done(0.1)], [ran("w1-1", 0.02, 0.1)], batches=[batch])


def vanished() -> History:
    return history([row("I", 0), claim(0.01), done(0.1)[0]], [ran("w1-1", 0.02, 0.1)])


def stuck() -> History:
    return history([row("I", 0)], [], left={1: "Quick"})


def twice() -> History:
    return history([row("I", 0), claim(0.01), *done(0.1), done(0.2)[1]], [ran("w1-1", 0.02, 0.1)])


def stolen() -> History:
    rows = [row("I", 0), claim(0.01)]
    rows.append(row("U", 0.05, was_worker=1, was_attempts=1, worker=2, attempts=2, who="w2", app="notifyq claims 2"))
    rows += done(0.1, 2, 2, run="w2-1")
    return history(rows, [ran("w1-1", 0.02, 0.04), ran("w2-1", 0.06, 0.1, 2)])


def unfenced() -> History:
    """A worker was frozen, another has the lease now, and the first settles all the same."""
    frozen = Window(name="worker frozen", since=T + 0.03, until=T + 9, who={"w1"}, round=1)
    rows = [row("I", 0), claim(0.01), taken(7, 2), claim(7.1, 2, 2), *done(9.1, 2, 2, by=1)]
    return history(rows, [ran("w1-1", 0.02, 9.05), ran("w2-1", 7.2, 9.5, 2)], windows=[frozen])


def rescued_without_a_fault() -> History:
    """A rescue without a fault."""
    rows = [row("I", 0), claim(0.01), taken(7, 2), claim(7.1, 2, 2), *done(7.3, 2, 2, run="w2-1")]
    return history(rows, [ran("w1-1", 0.02, 0.5), ran("w2-1", 7.15, 7.3, 2)])


def at_once() -> History:
    rows = [row("I", 0), claim(0.01), taken(0.3, 1), claim(0.4, 2, 2), *done(0.6, 2, 2, run="w2-1")]
    return history(rows, [ran("w1-1", 0.02, 0.7), ran("w2-1", 0.41, 0.6, 2)])


def without_a_lease(crash: float = 2.0) -> History:
    """Its claim is not known. A crash that much later can't have lost it."""
    rows = [row("I", 0), claim(0.01), *done(0.1)]
    window = Window(name="server crashes", since=T + 0.03 + crash, until=T + 0.1 + crash, who={"w2"}, round=1)
    return history(rows, [ran("w1-1", 0.02, 0.1), ran("w2-1", 0.03, 0.05)], windows=[window])


def after_the_end() -> History:
    return history([row("I", 0), claim(0.01), *done(0.1)], [ran("w1-1", 0.02, 0.1), ran("w1-2", 0.3, 0.4)])


def not_woken() -> History:
    return history([row("I", 0), claim(4), *done(4.1)], [ran("w1-1", 4.05, 4.1)])


def not_healed() -> History:
    window = Window(name="connection ended", since=T - 3, until=T - 2, who=set(), round=1)
    return history([row("I", 0), claim(4), *done(4.1)], [ran("w1-1", 4.05, 4.1)], windows=[window])


def never_ends() -> History:
    told = Process(who="w1", started=T - 9, queues=QUEUES, concurrency=10, told=T + 5, ended=T + 25, code=0)
    return history([row("I", 0), claim(0.01), *done(0.1)], [ran("w1-1", 0.02, 0.1)], processes=[told])


def ended_by_itself() -> History:
    gone = Process(who="w1", started=T - 9, queues=QUEUES, concurrency=10, ended=T + 5, code=1)
    return history([row("I", 0), claim(0.01), *done(0.1)], [ran("w1-1", 0.02, 0.1)], processes=[gone])


def handed_back(type: str = "Thread", begun: bool = False, **keys: Any) -> History:
    """Claimed by a worker of one thread, in which another task runs, and claimed again later."""
    fields = {"who": "w1", "app": "notifyq settle", "was_worker": 1, "was_attempts": 1}
    busy = of(2, [row("I", 0, n="8"), claim(0.01), *done(0.2, run="w1-1")])
    rows = [row("I", 0), claim(0.02), row("U", 0.04, **fields), claim(0.3), *done(0.4, run="w1-2")]
    for one in (*busy, *rows):
        one.type = type if one.id == 1 else "Thread"
    for one in rows:
        for name, value in keys.items():
            setattr(one, name, value)
    runs = [ran("w1-1", 0.02, 0.2), ran("w1-2", 0.31, 0.4)]
    runs[0].id = 2
    if begun:
        runs.append(ran("w1-3", 0.03, 0.04))
    workers = [Process(who="w1", started=T - 9, queues=QUEUES, concurrency=10, threads=1)]
    batches = [Batch(by="test", numbers=[7, 8], outcome="committed", at=T)]
    return history(in_order([*busy, *rows]), runs, processes=workers, batches=batches)


def crashed(type: str = "Bystander", times: int = 2, beside: bool = True) -> History:
    """Its worker crashes so often, each time a new one, with another task beside it or not. Then it is dead."""
    rows, runs, dead = [row("I", 0, type=type)], [], []
    if beside:
        rows.append(row("I", 0, id=99, n="8", type=type))
    for attempt in range(1, times + 1):
        at = 10.0 * attempt
        ends = [taken(at + 3, 9, attempt, attempt)]
        rows += [row("W", at - 1, id=attempt, who=f"w{attempt}"), claim(at, attempt, attempt)]
        if attempt == times:
            ends = done(at + 3, attempt, attempt, by=9)
            ends[1].note = "dead its worker vanished"
            for end in ends:
                end.app = "notifyq heartbeat 9"
        rows += ends
        if beside:
            rows += of(99, [claim(at, attempt, attempt), taken(at + 3, 9, attempt, attempt)])
        runs.append(ran(f"w{attempt}-1", at + 0.1, None, attempt))
        killed = Process(who=f"w{attempt}", started=T, queues=QUEUES, concurrency=9, ended=T + at + 1, code=-9)
        killed.killed = killed.ended
        dead.append(killed)
    if beside:
        last = of(99, [claim(90, 8, times + 1), *done(91, 8, times + 1, run="w8-1")])
        rows += [row("W", 80, id=8, who="w8"), *last]
        runs.append(ran("w8-1", 90.01, 91, times + 1))
        runs[-1].id = 99
    for one in rows:
        one.type = type
    faults = [Window(name="worker killed", since=T, until=T + 99, who=None, round=1)]
    numbers = [7, 8] if beside else [7]
    batches = [Batch(by="test", numbers=numbers, outcome="committed", at=T)]
    return history(in_order(rows), runs, processes=dead, windows=faults, batches=batches)


def mixed_up() -> History:
    wrong = well()
    wrong.runs[0].n = 8
    return wrong


def cut_off() -> History:
    wrong = well()
    wrong.rows[-1].note, wrong.rows[-1].bytes = 'done "run w1-1, 1000 bytes', 999
    return wrong


def at_a_rate(count: int, gap: float) -> History:
    """That many start one after the other, of which 3 may start in 2 s."""
    rows: list[Row] = []
    runs: list[Run] = []
    for id in range(1, count + 1):
        at = gap * id
        rate: dict[str, Any] = {"limit_key": "k", "rate": 3, "seconds": 2.0}
        rows += of(id, [row("I", at - 0.01, n=str(id), **rate), claim(at), *done(at + 0.05, run=f"w1-{id}")])
        runs.append(ran(f"w1-{id}", at + 0.01, at + 0.05))
        runs[-1].id = id
    batches = [Batch(by="test", numbers=list(range(1, count + 1)), outcome="committed", at=T)]
    return history(in_order(rows), runs, batches=batches)


def together(key: str, **fields: Any) -> History:
    """Two tasks of one key, the second from halfway through the first."""
    rows = [row("I", 0, id=id, n=str(6 + id), **{key: "k"}, **fields) for id in (1, 2)]
    for id, since in ((1, 0.01), (2, 0.05)):
        claimed = claim(since)
        claimed.id = id
        ends = done(since + 0.09, run=f"w1-{id}")
        for end in ends:
            end.id = id
        rows += [claimed, *ends]
    runs = [ran("w1-1", 0.02, 0.1), ran("w1-2", 0.06, 0.14)]
    runs[1].id = 2
    rows.sort(key=lambda row: row.at)
    for seq, one in enumerate(rows, 1):
        one.seq = seq
    return history(rows, runs, batches=[Batch(by="test", numbers=[7, 8], outcome="committed", at=T)])


def over_the_limit() -> History:
    return together("limit_key", most=1)


def not_alone() -> History:
    return together("order_key")


def out_of_order() -> History:
    wrong = together("order_key")
    for one in wrong.rows:
        if one.id == 1 and one.op != "I":  # it comes much later, and was there all the time
            one.at, one.committed, one.seq = one.at + 9, one.committed + 9, one.seq + 10
        elif one.id == 2 and one.op != "I":
            one.at, one.committed = one.at + 5, one.committed + 5
    wrong.runs[0].started, wrong.runs[0].ended = T + 9.02, T + 9.1
    wrong.runs[1].started, wrong.runs[1].ended = T + 5.06, T + 5.14
    return wrong


def of(id: int, rows: list[Row]) -> list[Row]:
    """The same of another task."""
    for one in rows:
        one.id = id
    return rows


def impatient(answered: float = 0.005) -> History:
    """A task is claimed while an enqueuer that was refused because of it has its transaction open, after its answer."""
    wrong = well()
    wrong.batches.append(
        Batch(
            by="test",
            numbers=[],
            outcome="rolled back",
            began=T,
            at=T + 0.1,
            existed=[1],
            open=(T + answered, T + 0.05),
        )
    )
    return wrong


def in_order(rows: list[Row]) -> list[Row]:
    rows.sort(key=lambda row: row.at)
    for seq, one in enumerate(rows, 1):
        one.seq = seq
    return rows


def keyed(end: float, **second: Any) -> History:
    """Two tasks of a key, the second of which is inserted after a second; the first one ends at some time."""
    rows = [row("I", 0, unique_key="k"), claim(0.01), row("I", 1, **{"id": 2, "n": "8", "unique_key": "k", **second})]
    rows += [*of(2, [claim(1.01), *done(1.1, run="w1-2")]), *done(end)]
    runs = [ran("w1-1", 0.02, end), ran("w1-2", 1.02, 1.1)]
    runs[1].id = 2
    return history(in_order(rows), runs, batches=[Batch(by="test", numbers=[7, 8], outcome="committed", at=T)])


def before_its_end_was_committed() -> History:
    early = keyed(0.9)
    next(one for one in early.rows if one.op == "D").committed = T + 1.05
    return early


def refused(id: int = 1, began: float = 2.0) -> History:
    wrong = well()
    wrong.batches.append(Batch(by="test", numbers=[], began=T + began, at=T + began + 0.01, existed=[id]))
    return wrong


def waiting(
    end: float, told: float, state: str = "done", on_dead: str | None = None, by: str = "", born: float = 0.1
) -> History:
    """Task 2 comes after task 1, which ends in this state, at some time. It hears of that, and runs, or is cancelled by
    this role."""
    second: dict[str, Any] = {"after": [1], "on_dead": on_dead}
    lease = {"was_worker": 1, "was_attempts": 1, "who": "w1", "app": "notifyq claims 1"}
    first = [row("I", 0), claim(0.01), *done(end)]
    for one in first:
        one.type, one.note = "Verdict", f"{state} x"
    rows = of(2, [row("I", born, n="8", **second), claim(born + 0.01), row("U", born + 0.02, withheld=True, **lease)])
    runs = [ran("w1-1", 0.02, end)]
    if by:
        rows += of(2, [row("D", told, who=by), row("F", told, who=by, note="cancelled by a person")])
    else:
        rows += of(2, [row("U", told, run_at=T + told), claim(told + 0.01), *done(told + 0.1, run="w1-2")])
        runs += [ran("w1-2", told + 0.02, told + 0.1)]
        runs[1].id = 2
    return history(
        in_order([*first, *rows]), runs, batches=[Batch(by="test", numbers=[7, 8], outcome="committed", at=T)]
    )


def retried(born: float) -> History:
    """Task 1 is dead after a second, and a person retries it after two. From when on is the task there that comes after
    it?"""
    both = waiting(1, 2.5, "dead", "run", born=born)
    more = [row("X", 2), row("I", 2), claim(2.01), *done(3, run="w1-3")]
    both.rows = in_order([*both.rows, *more])
    both.runs.append(ran("w1-3", 2.02, 3))
    return both


def ticking(*slots: tuple[float, float]) -> History:
    """Six seconds of a cron. The tasks of these slots were enqueued at these times."""
    rows: list[Row] = []
    for id, (slot, at) in enumerate(slots, 1):
        start = max(slot, at)
        rows += of(
            id, [row("I", at, run_at=T + slot, type="Tick", n="0"), claim(start), *done(start + 0.1, run="w1-1")]
        )
    runs = [ran(f"w1-{id}", max(slot) + 0.01, max(slot) + 0.1) for id, slot in enumerate(slots, 1)]
    for id, run in enumerate(runs, 1):
        run.id = id
    for one in rows:
        one.note = one.note.replace("w1-1", f"w1-{one.id}")
    return history(in_order(rows), runs, cron=(T, T + 5), batches=[])
