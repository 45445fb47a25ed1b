"""Whose heartbeats don't come any more, by the clock of who watches."""

from __future__ import annotations

from notifyq.worker.heartbeat import GRACE_SECONDS, SILENT_SECONDS, Unseen


def looks(unseen: Unseen, *rounds: tuple[float, dict[int, float]]) -> list[dict[int, float]]:
    """Of each round (a time, and the last heartbeats by worker): who is silent, and for how long."""
    return [
        {worker: round(seconds, 3) for worker, _, seconds in unseen.look(list(seen), list(seen.values()), now)}
        for now, seen in rounds
    ]


def test_it_is_silent_when_its_heartbeat_stays_the_same() -> None:
    unseen = Unseen()
    assert looks(unseen, (10.0, {1: 5.0, 2: 5.0}), (11.5, {1: 5.0, 2: 6.5})) == [{}, {}]
    assert unseen.due == 10.0 + SILENT_SECONDS
    assert looks(unseen, (12.0, {1: 5.0, 2: 6.5}), (13.5, {1: 5.0, 2: 8.0})) == [{1: 2.0}, {1: 3.5}]
    assert looks(unseen, (14.0, {2: 8.0}), (15.0, {1: 5.0, 2: 9.5})) == [{}, {}], "gone, and there again"


def test_the_server_s_clock_is_stepped() -> None:
    """A heartbeat that changes is one, whatever time it names; one that doesn't is none, though it be of tomorrow."""
    unseen = Unseen()
    for now, well in ((0.0, 100.0), (1.5, 3700.0), (3.0, 101.0), (4.5, float("inf")), (6.0, 102.0)):
        [silent] = looks(unseen, (now, {1: well, 2: 86400.0}))
        assert silent == ({2: now} if now >= SILENT_SECONDS else {})


def test_what_it_did_not_watch_it_cannot_judge() -> None:
    """It was frozen, or cut off: the others may have been as well."""
    unseen = Unseen()
    late = 1.5 + GRACE_SECONDS + 0.1
    assert looks(unseen, (0.0, {1: 5.0}), (1.5, {1: 5.0}), (late, {1: 5.0})) == [{}, {}, {}]
    assert looks(unseen, (late + SILENT_SECONDS, {1: 5.0})) == [{1: SILENT_SECONDS}]
