"""The history checker on made-up histories, right ones and wrong ones; and a short run of the chaos itself."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from . import report
from .checker import check
from .faults import FAULTS
from .fleet import PLACES
from .history import Batch, History, Lag, Window
from .made_up import (
    T,
    after_the_end,
    at_a_rate,
    at_once,
    before_its_end_was_committed,
    crashed,
    cut_off,
    ended_by_itself,
    half,
    handed_back,
    impatient,
    keyed,
    lost,
    mixed_up,
    never_ends,
    not_alone,
    not_healed,
    not_woken,
    out_of_order,
    over_the_limit,
    refused,
    rescue,
    rescued_without_a_fault,
    retried,
    stolen,
    stuck,
    ticking,
    together,
    twice,
    undead,
    unfenced,
    vanished,
    waiting,
    well,
    without_a_lease,
)
from .mutants import MUTANTS, breed
from .play import play


def test_a_history_in_which_all_is_well() -> None:
    """Another history has a fault, and all is well too."""
    assert check(well()) == []
    assert check(rescue(3.0)) == []


WRONG: dict[Callable[[], History], str] = {
    lost: "P1 lost: numbers [7] by test were committed",
    half: "P1 of numbers [7, 8] by test only [7] are there",
    undead: "P1 numbers [7] by test were rolled back",
    vanished: "P1 lost: it is gone without an outcome",
    stuck: "P1 a Quick has not ended",
    twice: "P2 settled twice",
    stolen: "P2 claimed by 2 under the lease of 1",
    unfenced: "P2 settled by w1, which didn't hold the lease",
    rescued_without_a_fault: "P2 taken from w1, which no fault had touched",
    at_once: "P2 runs w1-1 and w2-1 at once",
    without_a_lease: "P2 run w2-1 began without a lease",
    handed_back: "P2 taken from w1, which no fault had touched, by w1",
    lambda: handed_back("Quick"): "P2 taken from w1, which no fault had touched, by w1",
    lambda: handed_back("Quick", begun=True, limit_key="k", most=9): "P2 taken from w1, which no fault had touched",
    crashed: "P1 a Bystander ends done, and this one is dead",
    lambda: crashed("Quick", 3): "P1 a Quick ends done, and this one is dead",
    lambda: crashed("Quick", 2, beside=False): "P1 a Quick ends done, and this one is dead",
    mixed_up: "P2 run w1-1 was given the payload of number 8, and its task is number 7",
    cut_off: "P2 its result has 999 bytes of 1,000",
    lambda: at_a_rate(4, 0.1): "P6 run w1-4 is one more of k than its rate allows",
    after_the_end: "P2 run w1-2 began after its lease had ended",
    over_the_limit: "P6 run w1-2 is number 2 of k, which has a limit of 1",
    not_alone: "P6 runs w1-1 and w1-2 of k at once",
    out_of_order: "P6 run w1-2 of k before task 1",
    lambda: keyed(1.05): "P7 inserted with key k, which task 1 had",
    lambda: keyed(2): "P7 inserted with key k, which task 1 had",
    before_its_end_was_committed: "P7 inserted with key k, which task 1 had",
    refused: "P7 an enqueue by test was refused for task 1, which had ended 1.9 s before",
    impatient: "P7 claimed while an enqueue by test was open",
    lambda: refused(2): "P7 an enqueue by test was refused for task 2, which no enqueuer has inserted",
    lambda: waiting(1, 0.5): "P8 run w1-2 began before task 1 had ended",
    lambda: retried(2.2): "P8 run w1-2 began before task 1 had ended",
    lambda: waiting(1, 3.1): "P8 told 2.1 s after the last one's end",
    lambda: waiting(1, 1, "dead"): "P8 run w1-2 began, though task 1 wasn't done",
    lambda: waiting(1, 1, by="w2"): "P8 cancelled, and all that it came after are done",
    lambda: waiting(1, 1, "cancelled", "run", "w2"): "P8 cancelled, and was to run all the same",
    lambda: ticking((0, -3), (2, -1), (2, 1.9), (4, 1)): "P9 it has task 2's slot",
    lambda: ticking((0, -3), (4, 1)): "P9 nothing was enqueued for slot 1002",
    lambda: ticking((0, -3), (2, -1)): "P9 nothing was enqueued for slot 1004",
    lambda: ticking((0, -3), (2, 2.5), (4, 1)): "P9 enqueued 0.5 s after its slot",
    not_woken: "P3 started 4.050 s after its time, before any fault",
    not_healed: "P3 started 4.050 s after its time, 6.0 s after connection ended",
    lambda: rescue(8.0): "P4 its worker w1 was killed, and 7.0 s later",
    never_ends: "P4 worker w1 was told to stop, and ended after 20.0 s",
    ended_by_itself: "P5 worker w1 ended by itself, with 1",
}


@pytest.mark.parametrize(("made_up", "breach"), WRONG.items(), ids=list(WRONG.values()))
def test_a_promise_that_is_broken(made_up: Callable[[], History], breach: str) -> None:
    """Each is found, and told with its task's story."""
    wrong = made_up()
    found = check(wrong)
    assert any(f"{one.promise} {one.what}".startswith(breach) for one in found), found
    story = report.told(wrong, found)[1:]
    assert any("inserted" in line for line in story) or not any(one.id for one in found)
    assert len(report.table(wrong, found)) == 1 + len({window.name for window in wrong.windows})


def test_a_crash_that_may_have_lost_a_claim() -> None:
    found = {one.what for one in check(without_a_lease(crash=0.01))}
    assert found == {"runs w1-1 and w2-1 at once"}


def test_below_the_limit() -> None:
    """It may be the limit or the rate."""
    assert check(together("limit_key", most=2)) == []
    assert check(at_a_rate(3, 0.1)) == []
    assert check(at_a_rate(5, 0.7)) == []


def test_handed_back_while_another_worker_admits_a_task_of_its_key() -> None:
    assert check(handed_back("Quick", limit_key="k", most=9)) == []


@pytest.mark.parametrize(("type", "times"), [("Bystander", 2), ("Quick", 3)])
def test_a_task_whose_worker_crashed_with_nothing_beside_it(type: str, times: int) -> None:
    """It may be the cause, so it may be dead after as many attempts as it has, or after three."""
    assert check(crashed(type, times, beside=False)) == []


def test_one_after_the_other() -> None:
    """They have one key, or two."""
    assert check(keyed(0.9)) == []
    assert check(keyed(2, unique_key="other")) == []


@pytest.mark.parametrize("began", [0.05, 0.5])
def test_refused_for_what_is_there(began: float) -> None:
    """Or it was there a moment ago."""
    assert check(refused(began=began)) == []
    assert check(impatient(0.02)) == []


def test_what_is_in_the_way_of_an_enqueue_begins_after_it() -> None:
    late = not_woken()
    late.batches.append(Batch(by="test", numbers=[], began=T + 0.01, at=T + 3.9, existed=[1]))
    assert check(late) == []


def test_after_the_end_of_another() -> None:
    """This is right for any end, if on_dead is "run"."""
    assert check(waiting(1, 1.1)) == []
    assert check(waiting(1, 1.1, "dead", "run")) == []
    assert check(waiting(1, 1.1, "dead", by="w2")) == []
    assert check(waiting(1, 0.5, by="notifyq")) == []


def test_after_one_that_was_retried() -> None:
    """The end that it came before is enough."""
    assert check(retried(0.1)) == []


def test_slots() -> None:
    """After a fault they may come late, or, if all was over before that, not at all."""
    assert check(ticking((0, -3), (2, -1), (4, 1))) == []
    fault = Window(name="server frozen", since=T + 1, until=T + 2.4, who=None, round=1)
    for slots in ([(0.0, -3.0), (2.0, 2.5), (4.0, 2.5)], [(0.0, -3.0), (2.0, 2.5)]):
        late = ticking(*slots)
        late.windows = [fault]
        assert check(late) == []


@pytest.mark.parametrize("excuse", ["no free slot", "a lag of the machine", "a slow machine"])
def test_a_late_start_with_an_excuse(excuse: str) -> None:
    """All slots were taken, or the canary was late as well, or slow."""
    late = not_woken()
    if excuse == "no free slot":
        late.processes = []
    elif excuse == "a lag of the machine":
        late.lags = [Lag(at=T + 2, seconds=1.5)]
    else:
        late.lags = [Lag(at=T + 2, slow=20.0)]
    assert check(late) == []


def test_a_machine_that_is_slow_and_not_so_slow() -> None:
    late = not_woken()
    late.lags = [Lag(at=T + 2, slow=20.0), Lag(at=T + 3, slow=5.0), Lag(at=T + 9, slow=50.0)]
    assert [breach.promise for breach in check(late)] == ["P3"]


@pytest.mark.parametrize("mutant", MUTANTS)
def test_mutants_are_of_this_notifyq(mutant: str, tmp_path: Path) -> None:
    """The code that they change is there."""
    breed(mutant, tmp_path)


@pytest.mark.slow
async def test_chaos(tmp_path: Path) -> None:
    """A few quick faults against two workers: `make chaos` has the others, and the time."""
    names = ("connection ended: bell", "connection ended: claims", "connection ended: settle", "worker killed with")
    faults = [fault for fault in FAULTS if fault.name.startswith(names)]
    history = await play(5, 4, tmp_path, faults=faults, places=PLACES[:2], patience=0.0)
    breaches = check(history)
    assert not breaches, "\n".join(report.told(history, breaches))
    assert {window.name for window in history.windows} > {"(no fault)"}
    assert len(history.runs) > 30
