"""Claim, settle and rescue: one task, and the worker processes that may have it, a step for each statement.

A process has four parts, each of which goes on by itself: the heartbeat (heartbeat.py, which rescues too), the claimer
(claim.py), the runners (runners.py) and the settler (settle.py). The sessions of the heartbeat and of the claims share
the worker's advisory lock. A worker's id here is its process and how many times that process has registered.

A fault may come at any time. A process is killed, frozen and thawed, or told to stop. A connection is cut. An answer is
lost after its statement ran. The server crashes, and with it goes a claim that was committed without a flush. A person
at psql cancels and retries.

The model sees one thing that no program sees: for each job and outcome, whether the claim that it comes from is still
the last one of the task (`current`). An outcome of another claim must never be applied, whatever worker and attempt it
names. If a crash or a person at psql undid a claim, and the same worker claims the task again, both claims have the
same worker and attempt: they are the same lease.

What is merged or left out, and why that hides nothing:

* One task. Statements see each row by itself, the fence is by row, and a batch is the same step many times. Three facts
  concern several tasks only: locks are taken in the order of ids, LIMITs, and a rescue leaves what is being settled to
  the next round. The first can't change what is written, the others leave the remaining rows as they were.
* A statement is one step. Only the claim has three: its snapshot, which says whether the worker is registered; the
  locks on the rows that it takes; its answer. Its backend goes on when its client is gone.
* The settler's session shares the lock too. It is left out, so the model has fewer sessions that keep a worker alive.
* Silence is three steps (fresh, over 2 s, over the lease) that pass while no heartbeat comes. A worker whose heartbeat
  works is never silent. The heartbeat's grace period after an outage only delays rescues.
* A task of a type that no handler here knows (Unhandled) is a hand-back to another index.
* A worker registers at most twice.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator

from .explore import Comes, Promise, Step
from .lease_state import REGISTRATIONS, Job, Life, Says, State, Task, Worker, killed, outdated, put, renamed, sort_key

NOW, SOON, MAYBE = Comes.NOW, Comes.SOON, Comes.MAYBE


# Each is a change that looks harmless, and isn't.
WRONG = {
    "no worker": "the fence is the attempt alone",
    "no attempt": "the fence is the worker alone",
    "no liveness": "rescue doesn't ask whether the worker is dead",
    "heartbeat's lock": "rescue asks for the lock of the heartbeat's session, not of all the worker's sessions",
    "bare hand-back": "hand_back.sql isn't fenced",
    "known ids": "reclaim_unanswered.sql goes by the ids of the known tasks, not by their leases",
    "early reclaim": "reclaim_unanswered.sql doesn't wait for the end of the backend that claims",
    "no reclaim": "tasks of a claim whose answer was lost are left as they are",
    "unowned stay": "tasks that a claim took for a worker that was given up meanwhile are left as they are",
    "free rescue": "a rescue gives the attempt back",
}


class Lease:
    """faults, cancels: how many there may be. kills: the task's handler kills its worker each time."""

    def __init__(
        self, workers: int, attempts: int, faults: int, cancels: int, kills: bool = False, wrong: str = ""
    ) -> None:
        self.max_attempts = attempts
        self._kills = kills
        self._wrong = wrong
        self.start = State((Worker(),) * workers, faults=faults, cancels=cancels)
        self.promises: list[Promise[State]] = [
            Promise("the task never ends, though a worker is up: no worker has it, or ever will", SOON, self._ends)
        ]

    def _ends(self, state: State) -> bool:
        if self._kills:  # a killed worker is started again
            return state.task is Task.DEAD
        return state.task >= Task.DONE or not any(worker.life is Life.UP for worker in state.workers)

    def wrong(self, state: State) -> str | None:
        if not 0 <= state.attempts <= self.max_attempts + state.reclaimed:
            return f"{state.attempts} attempts of a task that is allowed {self.max_attempts}"
        return state.bad or None

    def same(self, state: State) -> Hashable:
        # None can't be compared with a job: sort by a key that can.
        return (tuple(sorted(state.workers, key=sort_key)), *state[1:])

    def steps(self, state: State) -> Iterator[Step[State]]:
        yield from self._sql(state)
        for n, worker in enumerate(state.workers):
            for text, after, comes in self._server(state, n, worker):
                yield Step(f"the server, for worker {n + 1}: {text}", after, comes)
            for text, after, comes in self._faults(state, n, worker):
                yield Step(f"worker {n + 1} {text}", after, comes)
            if worker.life <= Life.STOPPING:
                for part in (self._claims, self._runs, self._settles, self._keeps):
                    for text, after, comes in part(state, n, worker):
                        yield Step(f"worker {n + 1}: {text}", after, comes)
                if worker.life is Life.UP:
                    yield from self._rescues(state, n)

    # The task's row.

    def _free(self, state: State, task: Task, attempts: int) -> State:
        """No worker holds the row any more: every job that comes from it is of a past claim."""
        workers = tuple(outdated(worker._replace(owns=0)) for worker in state.workers)
        return state._replace(workers=workers, task=task, attempts=attempts, relaxed=False)

    def _sql(self, state: State) -> Iterator[Step[State]]:
        if state.task is Task.SCHEDULED:
            yield Step("its time has come (check_due.sql)", state._replace(task=Task.READY, relaxed=False), SOON)
        if state.cancels and state.task < Task.DONE:
            gone = self._free(state, Task.CANCELLED, state.attempts)
            yield Step("psql: notifyq.cancel", gone._replace(cancels=state.cancels - 1), MAYBE)
        if state.cancels and state.task in {Task.CANCELLED, Task.DEAD}:
            again = state._replace(task=Task.READY, attempts=0, reclaimed=0)
            yield Step("psql: notifyq.retry", again, MAYBE)

    def _server(self, state: State, n: int, worker: Worker) -> Iterator[tuple[str, State, Comes]]:
        """Backends go on, whatever happens to their clients; time passes."""
        if worker.sent:
            if state.task is Task.READY:
                attempt = state.attempts + 1
                answer = Job(worker.sent, attempt) if worker.sent > 0 else None
                taken = put(state, n, **renamed(worker, attempt)._asdict())
                taken = put(taken, n, owns=abs(worker.sent), sent=0, answer=answer)
                after = taken._replace(task=Task.RUNNING, attempts=attempt, relaxed=True)
                yield f"claim.sql takes the task, attempt {attempt}", after, NOW
            else:
                yield "claim.sql finds nothing", put(state, n, sent=0), NOW
        silent = worker.life >= Life.FROZEN or not worker.locked
        if worker.registered and silent and worker.silent < 2:
            passed = "2 s without a heartbeat" if worker.silent == 0 else "its lease's length without a heartbeat"
            yield passed, put(state, n, silent=worker.silent + 1), SOON if worker.life >= Life.FROZEN else MAYBE

    def _faults(self, state: State, n: int, worker: Worker) -> Iterator[tuple[str, State, Comes]]:
        if worker.life is Life.OVER:
            if not worker.registered and not worker.owns and not worker.sent:
                # With its old id, which no row has any more.
                yield "is started again", put(state, n, **Worker()._asdict()), NOW if self._kills else MAYBE
            return
        left = state._replace(faults=state.faults - 1)
        if worker.life is Life.FROZEN:
            yield "goes on (SIGCONT)", put(state, n, life=Life.UP), MAYBE
        elif state.faults:
            yield "is frozen (SIGSTOP)", put(left, n, life=Life.FROZEN), MAYBE
        if state.faults:
            yield "is killed", killed(left, n), MAYBE
            if worker.life is Life.UP:
                yield "is told to stop (SIGTERM)", put(left, n, life=Life.STOPPING), MAYBE
            if worker.connected:
                cut = put(left, n, connected=False, sent=-abs(worker.sent), answer=None)
                yield "loses its connection for claims", cut, MAYBE
            if worker.locked:
                yield "loses its heartbeat's connection, and the lock", put(left, n, locked=False), MAYBE
            if n == 0:
                crashed = left
                for m, other in enumerate(left.workers):
                    crashed = put(crashed, m, locked=False, connected=False, sent=0, answer=None)
                    if other.life is Life.OVER:
                        crashed = put(crashed, m, connected=True)
                yield "sees the server crash, and restart", crashed._replace(relaxed=False), MAYBE
                if state.relaxed:
                    undone = self._free(crashed, Task.READY, state.attempts - 1)
                    yield "sees the server crash; the claim wasn't flushed, so never was", undone, MAYBE

    # A worker that is up, by stages.

    def _claims(self, state: State, n: int, worker: Worker) -> Iterator[tuple[str, State, Comes]]:
        """Claimer, and Worker._claim around it."""
        if worker.answer is not None:
            job, text = worker.answer, "has the claim's answer"
            if worker.life is Life.STOPPING:
                job = job._replace(says=Says.HAND_BACK)
                yield f"{text}; too late (feed)", put(state, n, answer=None, outcomes=(*worker.outcomes, job)), NOW
            elif worker.held is None:
                yield f"{text}, and runs it", put(state, n, answer=None, held=job), NOW
            elif worker.behind is None:
                yield f"{text}; its old handler still winds up (feed)", put(state, n, answer=None, behind=job), NOW
        elif not worker.connected:
            if worker.life is Life.STOPPING:
                return
            if worker.sent > 0:
                return  # under its old id: it is answered first
            ended = worker.sent == -worker.id and self._wrong != "early reclaim"
            after = put(state, n, sent=0) if ended else state
            text = "end_backends.sql; reclaim_unanswered.sql"
            if worker.owns == worker.id and not self._knows(state, worker) and self._wrong != "no reclaim":
                after = self._free(after, Task.READY, state.attempts - 1)
                text += " takes back the task"
            yield f"{text}; claims on a new connection", put(after, n, connected=True), NOW
        elif not worker.sent and worker.life is Life.UP and worker.registered and state.task is Task.READY:
            yield "claim.sql begins, and sees it is registered", put(state, n, sent=worker.id), NOW

    def _knows(self, state: State, worker: Worker) -> bool:
        """Whether the worker knows of the lease that the row says it has."""
        known = [job for job in (worker.held, worker.behind, *worker.outcomes) if job is not None]
        if self._wrong == "known ids":
            return bool(known)
        return any((job.id, job.attempt, job.lost) == (worker.id, state.attempts, False) for job in known)

    def _runs(self, state: State, n: int, worker: Worker) -> Iterator[tuple[str, State, Comes]]:
        """Runners: when a handler ends, the job behind it begins."""
        if (job := worker.held) is None:
            return
        if self._kills:
            yield "is killed by the handler", killed(state, n), NOW
            return
        next_ = {"held": worker.behind, "behind": None}
        if len(worker.outcomes) < 2:
            for says in [Says.FINISH, Says.LATER] if job.attempt < self.max_attempts else [Says.FINISH]:
                text = "the handler returns" if says is Says.FINISH else "the handler raises, to be tried later"
                outcomes = (*worker.outcomes, job._replace(says=says, lost=False))
                yield text, put(state, n, outcomes=outcomes, **next_), NOW
        if worker.life is Life.STOPPING:
            back = tuple(job._replace(says=Says.HAND_BACK, lost=False) for job in (job, worker.behind) if job)
            after = put(state, n, outcomes=worker.outcomes + back, held=None, behind=None)
            yield "the handler is cancelled, to hand its task back", after, NOW
        elif job.lost:
            yield "the handler has ended, cancelled: nothing to write", put(state, n, **next_), NOW

    def _settles(self, state: State, n: int, worker: Worker) -> Iterator[tuple[str, State, Comes]]:
        """Settler: finish.sql, retry_later.sql, hand_back.sql."""
        if not worker.outcomes:
            return
        job = worker.outcomes[0]
        text = ("finish.sql", "retry_later.sql", "hand_back.sql")[job.says]
        owner = worker.owns == job.id or self._wrong == "no worker"
        attempt = state.attempts == job.attempt or self._wrong == "no attempt"
        if self._wrong == "bare hand-back" and job.says is Says.HAND_BACK:
            owner = attempt = True
        if state.task is not Task.RUNNING or not owner or not attempt:
            yield f"{text}: refused by the fence", put(state, n, outcomes=worker.outcomes[1:]), NOW
            return
        after = {
            Says.FINISH: (Task.DONE, state.attempts),
            Says.LATER: (Task.SCHEDULED, state.attempts),
            Says.HAND_BACK: (Task.READY, state.attempts - 1),
        }[job.says]
        applied = self._free(state, *after)
        if not job.current:
            applied = applied._replace(bad=f"{text} was applied by a worker that has lost the lease")
        done = put(applied, n, outcomes=applied.workers[n].outcomes[1:])
        yield f"{text} is applied", done, NOW
        if state.faults:
            yield f"{text} is applied, but its answer lost", applied._replace(faults=state.faults - 1), MAYBE

    def _keeps(self, state: State, n: int, worker: Worker) -> Iterator[tuple[str, State, Comes]]:
        """Heartbeat: send_heartbeat.sql; and the end."""
        if worker.life is Life.STOPPING and worker.held is None and worker.behind is None:
            # Outcomes that couldn't be written in time are given up.
            over = put(state, n, life=Life.OVER, registered=False, locked=False, silent=0, answer=None, outcomes=())
            if worker.owns == worker.id:
                over = self._free(over, Task.READY, state.attempts - 1)
            yield "hand_back_all.sql; unregister_worker.sql; ends", over, NOW
        if not worker.registered:
            if worker.id == REGISTRATIONS:
                yield "is given up for dead once more, and has had enough", killed(state, n), NOW
                return
            held = None if worker.held is None else worker.held._replace(lost=True)
            # Its session for claims ends too, but for a claim that is under way: that is answered first.
            after = put(state, n, id=worker.id + 1, registered=True, locked=True, silent=0, held=held, connected=False)
            yield "send_heartbeat.sql: isn't registered; register_worker.sql: goes on under a new id", after, NOW
            return
        held = worker.held
        if held is not None and not (worker.owns == worker.id == held.id and held.attempt == state.attempts):
            held = held._replace(lost=True)
        if (worker.silent, worker.locked, worker.held) != (0, True, held):
            text = "send_heartbeat.sql: the heartbeat" + ("; its lease is lost" if held != worker.held else "")
            yield text, put(state, n, silent=0, locked=True, held=held), NOW

    def _rescues(self, state: State, n: int) -> Iterator[Step[State]]:
        """Heartbeat: rescue.sql and reclaim_unowned.sql, for the other workers."""
        for m, other in enumerate(state.workers):
            if m != n and other.registered:
                alive = other.life is not Life.OVER and (other.locked or other.connected)
                alive = alive or other.sent != 0  # a backend that still claims
                well = other.life is Life.UP and other.silent < 2 and alive
                if self._wrong == "heartbeat's lock":
                    alive = other.locked
                dead = other.silent == 2 or (other.silent == 1 and not alive)
                if dead or self._wrong == "no liveness":
                    buried = put(state, m, registered=False, silent=0)
                    if other.owns == other.id:
                        spent = state.attempts >= self.max_attempts
                        attempts = state.attempts - (self._wrong == "free rescue")
                        buried = self._free(
                            buried, Task.DEAD if spent and attempts == state.attempts else Task.READY, attempts
                        )
                    if well:
                        buried = buried._replace(bad="a live worker lost a task that it runs")
                    yield Step(f"worker {n + 1}: rescue.sql, of worker {m + 1}", buried, NOW)
            if other.owns and not (other.registered and other.owns == other.id) and self._wrong != "unowned stay":
                again = self._free(state, Task.READY, state.attempts)._replace(reclaimed=state.reclaimed + 1)
                yield Step(f"worker {n + 1}: reclaim_unowned.sql takes back the task of worker {m + 1}", again, SOON)
