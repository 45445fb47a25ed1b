"""Which workers send no heartbeats any more, by the clock of the process that watches."""

from __future__ import annotations

from notifyq.worker.silence import GRACE_SECONDS, SILENT_SECONDS, SilenceWatch


def looks(watch: SilenceWatch, *rounds: tuple[float, dict[int, float]]) -> list[dict[int, float]]:
    """For each round (a time, and the last heartbeats by worker): which workers are silent, and for how long."""
    return [
        {worker: round(seconds, 3) for worker, _, seconds in watch.look(list(seen), list(seen.values()), now)}
        for now, seen in rounds
    ]


def test_it_is_silent_when_its_heartbeat_stays_the_same() -> None:
    watch = SilenceWatch()
    assert looks(watch, (10.0, {1: 5.0, 2: 5.0}), (11.5, {1: 5.0, 2: 6.5})) == [{}, {}]
    assert watch.due == 10.0 + SILENT_SECONDS
    assert looks(watch, (12.0, {1: 5.0, 2: 6.5}), (13.5, {1: 5.0, 2: 8.0})) == [{1: 2.0}, {1: 3.5}]
    assert looks(watch, (14.0, {2: 8.0}), (15.0, {1: 5.0, 2: 9.5})) == [{}, {}], "gone, and there again"


def test_the_server_s_clock_is_stepped() -> None:
    """A worker whose heartbeat changes is well, whatever time it names; one whose heartbeat stays is silent."""
    watch = SilenceWatch()
    for now, well in ((0.0, 100.0), (1.5, 3700.0), (3.0, 101.0), (4.5, float("inf")), (6.0, 102.0)):
        [silent] = looks(watch, (now, {1: well, 2: 86400.0}))
        assert silent == ({2: now} if now >= SILENT_SECONDS else {})


def test_what_it_did_not_watch_it_cannot_judge() -> None:
    """The watching process was frozen, or cut off: the others may have been as well."""
    watch = SilenceWatch()
    late = 1.5 + GRACE_SECONDS + 0.1
    assert looks(watch, (0.0, {1: 5.0}), (1.5, {1: 5.0}), (late, {1: 5.0})) == [{}, {}, {}]
    assert looks(watch, (late + SILENT_SECONDS, {1: 5.0})) == [{1: SILENT_SECONDS}]
