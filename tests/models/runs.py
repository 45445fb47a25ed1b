"""What is explored: the right protocols, in several sizes; and each wrong one, in the smallest that shows it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

from .doorbell import WRONG as WRONG_DOORBELL
from .doorbell import Doorbell
from .explore import Model
from .lease import WRONG as WRONG_LEASE
from .lease import Lease
from .limits import WRONG as WRONG_LIMITS
from .limits import Limits
from .poison import WRONG as WRONG_POISON
from .poison import Poison


class Run(NamedTuple):
    text: str
    model: Callable[[], Model[Any]]
    slow: bool = False  # takes seconds; `make test` explores a smaller size of the same model
    long: bool = False  # takes minutes


ONE_KEY = ((0,), (0,), (0,))
TWO_KEYS = ((0,), (0, 1), (1,))

RUNS = [
    Run("doorbell: 3 enqueuers, 1 worker", lambda: Doorbell(3, (0,), 1)),
    Run("doorbell: 3 enqueuers, 2 workers", lambda: Doorbell(3, (0, 0), 1), slow=True),
    Run("doorbell: 2 enqueuers, 3 workers", lambda: Doorbell(2, (0, 0, 0), 1), slow=True),
    Run("doorbell: 2 enqueuers, 2 workers with 2 slots", lambda: Doorbell(2, (0, 0), 2)),
    Run("doorbell: 2 enqueuers, 2 workers with 3 slots", lambda: Doorbell(2, (0, 0), 3)),
    Run("doorbell: 3 enqueuers, 3 workers", lambda: Doorbell(3, (0, 0, 0), 1), long=True),
    Run("doorbell: 3 enqueuers, 3 workers with 2 slots", lambda: Doorbell(3, (0, 0, 0), 2), long=True),
    Run("doorbell: 3 enqueuers, 2 workers of two fleets", lambda: Doorbell(3, (0, 1), 1), long=True),
    Run("doorbell: 2 enqueuers, 3 workers of two fleets", lambda: Doorbell(2, (0, 0, 1), 1), long=True),
    Run("lease: 1 worker, 3 faults, a cancel and retries", lambda: Lease(1, 2, faults=3, cancels=1)),
    Run("lease: 2 workers, 1 fault", lambda: Lease(2, 2, faults=1, cancels=0), slow=True),
    Run("lease: 3 workers, each killed by the task", lambda: Lease(3, 2, faults=0, cancels=0, kills=True)),
    Run("lease: 2 workers, 1 fault, a cancel and retries", lambda: Lease(2, 2, faults=1, cancels=1), long=True),
    Run("poison: 2 workers, a culprit and 2 innocents, 2 kills", lambda: Poison(2, 2, kills=2)),
    Run("poison: 2 workers, a culprit and 3 innocents", lambda: Poison(3, 2)),
    Run("limits: 2 workers, 3 tasks of a key, limit 1, a kill", lambda: Limits(2, ONE_KEY, (1,), kills=1)),
    Run("limits: 2 workers, 3 tasks of a key, limit 2, a kill", lambda: Limits(2, ONE_KEY, (2,), kills=1), slow=True),
    Run("limits: 2 workers, 3 tasks of a key, a retry or a cancel", lambda: Limits(2, ONE_KEY, (1,), others=1)),
    Run(
        "limits: 2 workers, 3 tasks of two keys, a retry or a cancel",
        lambda: Limits(2, TWO_KEYS, (1, 1), others=1),
        slow=True,
    ),
    Run("limits: 1 worker, 3 tasks of a key, a paused queue", lambda: Limits(1, ONE_KEY, (1,), others=1, paused=True)),
    Run("limits: 2 workers, 3 tasks of two keys, all faults", lambda: Limits(2, TWO_KEYS, (2, 1), 1, 1), long=True),
]


# Each of these, right, is a part of a run above.


def wrong_doorbell(name: str) -> Doorbell:
    return Doorbell(2, (0, 0) if name in {"turn survives", "no turn"} else (0,), 3 if name == "long wait" else 1, name)


def wrong_lease(name: str) -> Lease:
    if name == "free rescue":
        return Lease(3, 2, faults=0, cancels=0, kills=True, wrong=name)
    two = name in {"no worker", "no liveness", "heartbeat's lock", "unowned stay"}
    return Lease(2 if two else 1, 2, faults=1 if two else 2, cancels=0, wrong=name)


def wrong_limits(name: str) -> Limits:
    if name == "no net":
        return Limits(1, ONE_KEY, (1,), others=1, paused=True, wrong=name)
    two = name == "no refill"
    return Limits(2, TWO_KEYS if two else ONE_KEY[:2], (1, 1) if two else (1,), others=1, wrong=name)


# What is changed, and the model of it.
WRONG: dict[str, Callable[[], Model[Any]]] = {
    **{f"doorbell: {text}": partial(wrong_doorbell, name) for name, text in WRONG_DOORBELL.items()},
    **{f"lease: {text}": partial(wrong_lease, name) for name, text in WRONG_LEASE.items()},
    **{f"poison: {text}": partial(Poison, 2, 2, wrong=name) for name, text in WRONG_POISON.items()},
    **{f"limits: {text}": partial(wrong_limits, name) for name, text in WRONG_LIMITS.items()},
}
