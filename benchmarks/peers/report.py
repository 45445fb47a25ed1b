"""From what the rounds gave: a table of figures, one of ratios, and the aims."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from ..common import Line, Plot, median, percentile, ratio
from .driven import Peer

BLOAT = ("notifyq", "graphile-worker", "pg-boss", "pgqueuer")  # the peers that are measured so

Figures = dict[str, dict[str, list[Any]]]  # step -> queue -> what each round gave

# title -> its step, the figure in what a round gave, and how it is shown
COLUMNS: dict[str, tuple[str, Callable[[Any], float], str]] = {
    "drain/s": ("drain", lambda gave: gave["rate"], ",.0f"),
    "at defaults": ("defaults", lambda gave: gave["rate"], ",.4g"),
    "bulk rows/s": ("drain", lambda gave: gave["bulk"], ",.0f"),
    "enqueues/s": ("enqueue", float, ",.0f"),
    "+ worker": ("consuming", float, ",.0f"),
    "p50 ms": ("latency", median, ".2f"),
    "p99 ms": ("latency", lambda gave: percentile(gave, 0.99), ".2f"),
    "snapshot/s": ("bloat", lambda gave: gave["rate"], ",.0f"),
    "last/first": ("bloat", lambda gave: gave["tenths"][-1] / gave["tenths"][0], ".2f"),
}


def rounds(found: Figures, column: str, name: str) -> list[float]:
    step, pick, _ = COLUMNS[column]
    return [pick(gave) for gave in found[step].get(name, [])]


def figures(peers: Sequence[Peer], found: Figures) -> str:
    """Medians of the rounds; under them notifyq / peer, the median of the rounds' ratios; and the settings."""
    rows = [["", "version", *COLUMNS]]
    for peer in peers:
        values = {column: rounds(found, column, peer.name) for column in COLUMNS}
        shown = [format(median(v), COLUMNS[column][2]) if v else "-" for column, v in values.items()]
        rows.append([peer.name, peer.about.version, *shown])
        if peer.name != "notifyq":
            ours = {column: rounds(found, column, "notifyq") for column in COLUMNS}
            rows.append(
                ["", "notifyq is", *(f"x {ratio(ours[c], v):.3g}" if v and ours[c] else "" for c, v in values.items())]
            )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    said = [
        f"{peer.name} ({peer.about.runtime}): {msgspec.json.encode(peer.about.settings['tuned']).decode()}"
        for peer in peers
    ]
    return "\n".join(
        [
            *("  ".join([row[0].ljust(widths[0]), row[1].ljust(widths[1])] + [
                cell.rjust(width) for cell, width in zip(row[2:], widths[2:], strict=True)
            ]).rstrip() for row in rows),
            "",
            "settings, but for the column `at defaults`; notifyq has its defaults everywhere",
            *("  " + line for line in said),
            "",
        ]
    )  # fmt: skip


def lines(found: Figures) -> list[Line]:
    """The aims, each with its figure."""

    def beside(what: str, column: str, unit: str, peer: str, least: float | None, most: float | None = None) -> None:
        ours, theirs = rounds(found, column, "notifyq"), rounds(found, column, peer)
        if ours and theirs:
            result.append(Line(what, median(ours), unit, peer, ratio(ours, theirs), least, most))

    def best(column: str, pick: Callable[..., str] = max) -> str:
        names = [name for name in found[COLUMNS[column][0]] if name != "notifyq" and rounds(found, column, name)]
        return pick(names, key=lambda name: median(rounds(found, column, name)), default="")

    result: list[Line] = []
    for peer, least in (("graphile-worker", 1.2), ("pgqueuer", 2.5), ("procrastinate", 50.0)):
        beside("drain", "drain/s", "tasks/s", peer, least)
    beside("enqueue_many, beside the best peer's bulk", "bulk rows/s", "rows/s", best("bulk rows/s"), 1.0)
    beside("app.enqueue by 16, worker consuming, best peer", "+ worker", "tasks/s", best("+ worker"), 2.0)
    beside("idle latency p50, beside the best peer's", "p50 ms", "ms", best("p50 ms", min), None, 0.65)
    for peer in BLOAT:
        if tenths := rounds(found, "last/first", peer):
            what = f"drain with a snapshot held, last tenth / first: {peer}"
            result.append(Line(what, median(tenths), "", least=0.9 if peer == "notifyq" else None))
    return result


def plots(found: Figures) -> list[Plot]:
    """The drain by tenths while a snapshot is held."""
    series = {
        name: [(i + 1, median(tenth)) for i, tenth in enumerate(zip(*(g["tenths"] for g in gave), strict=True))]
        for name, gave in found["bloat"].items()
        if gave
    }
    if not series:
        return []
    return [Plot("peers-bloat", "Drain with a snapshot held", "tenth of the tasks", "tasks/s", series)]
