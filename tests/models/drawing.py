"""The picture and the tables of docs/protocol.md, from what the exploration saw."""

from __future__ import annotations

import math
from collections import Counter
from html import escape
from typing import Any

from .doorbell import Bell, Doorbell, World
from .explore import Explored, Step, explore
from .runs import Run

PICTURED = "2 enqueuers and 2 workers"
WIDTH, LEGEND_Y = 1080, 375
AT = {
    Bell.AWAY: (80, 150),
    Bell.QUEUED: (310, 150),
    Bell.TURN: (540, 150),
    Bell.ARMING: (770, 150),
    Bell.ASLEEP: (1000, 150),
    Bell.REFUSED: (655, 290),
}
TELLS = {
    Bell.AWAY: "works, or is full",
    Bell.QUEUED: "in the turn's queue",
    Bell.TURN: "claims and listens",
    Bell.ARMING: "waits for SHARE",
    Bell.ASLEEP: "has SHARE: all ring",
    Bell.REFUSED: "between two tries",
}
BOW = {  # how far a line bows out, to the left of its way
    (Bell.TURN, Bell.AWAY): 130,
    (Bell.ASLEEP, Bell.TURN): -150,
    (Bell.QUEUED, Bell.AWAY): -70,
    (Bell.ARMING, Bell.REFUSED): -40,
    (Bell.REFUSED, Bell.ARMING): -30,
}


def pictured() -> tuple[Counter[tuple[Bell, Bell, str]], Explored[World]]:
    """Every move of a worker between positions at the bell, by what makes it, and how many steps made it."""
    moves: Counter[tuple[Bell, Bell, str]] = Counter()

    def seen(before: World, step: Step[World]) -> None:
        for worker, after in zip(before.workers, step.state.workers, strict=True):
            if worker.bell is not after.bell:
                moves[worker.bell, after.bell, step.label.partition(": ")[2] or "is killed"] += 1

    return moves, explore(Doorbell(2, (0, 0), 1), seen)


def draw() -> str:
    """The SVG: a worker's positions at the bell, each way between two of them, and which steps took it."""
    moves, explored = pictured()
    ways: dict[tuple[Bell, Bell], list[str]] = {}
    legend: list[str] = []
    for (here, there, text), count in sorted(moves.items()):
        if there is not Bell.DEAD:
            ways.setdefault((here, there), []).append(str(len(legend) + 1))
            legend.append(f"{len(legend) + 1}. {text}: {count:,}")
    killed = sum(count for (_, there, _), count in moves.items() if there is Bell.DEAD)
    legend.append(f"From every position: is killed: {killed:,}")
    half = (len(legend) + 1) // 2
    height = LEGEND_Y + 20 * half + 30
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
        '<defs><marker id="tip" viewBox="0 0 10 10" refX="9" refY="5" markerWidth="8" markerHeight="8" orient="auto">',
        '<path d="M0 0L10 5L0 10z" fill="#555"/></marker></defs>',
        f'<rect width="{WIDTH}" height="{height}" fill="#fff"/>',
    ]
    for (here, there), numbers in ways.items():
        parts += _way(here, there, ", ".join(numbers))
    for bell, (x, y) in AT.items():
        parts += [
            f'<rect x="{x - 70}" y="{y - 26}" width="140" height="52" rx="10" fill="#eef3fb" stroke="#3b5b8c"/>',
            f'<text x="{x}" y="{y - 4}" text-anchor="middle" font-weight="bold">{bell.name.lower()}</text>',
            f'<text x="{x}" y="{y + 15}" text-anchor="middle" font-size="13">{TELLS[bell]}</text>',
        ]
    for n, line in enumerate(legend):
        x, y = 20 + WIDTH // 2 * (n // half), LEGEND_Y + 20 * (n % half)
        parts.append(f'<text x="{x}" y="{y}" fill="#333">{escape(line)}</text>')
    told = f"With each, how many steps of the exploration it was: {PICTURED}, {explored.states:,} states in all."
    parts += [f'<text x="20" y="{height - 12}" fill="#555">{told}</text>', "</svg>"]
    return "\n".join(parts) + "\n"


def _way(here: Bell, there: Bell, label: str) -> list[str]:
    (x1, y1), (x2, y2) = AT[here], AT[there]
    length = math.hypot(x2 - x1, y2 - y1)
    bow = BOW.get((here, there), 0)
    # From edge to edge of the boxes, by way of a point beside the middle.
    x, y = (x1 + x2) / 2 + (y2 - y1) / length * bow, (y1 + y2) / 2 - (x2 - x1) / length * bow
    (left, top), (right, bottom) = _edge(x1, y1, x, y), _edge(x2, y2, x, y)
    at_x, at_y = (left + right) / 4 + x / 2, (top + bottom) / 4 + y / 2
    wide = 8 * len(label) + 6
    path = f"M{left:.0f} {top:.0f}Q{x:.0f} {y:.0f} {right:.0f} {bottom:.0f}"
    return [
        f'<path d="{path}" fill="none" stroke="#555" marker-end="url(#tip)"/>',
        f'<rect x="{at_x - wide / 2:.0f}" y="{at_y - 10:.0f}" width="{wide}" height="20" fill="#fff"/>',
        f'<text x="{at_x:.0f}" y="{at_y + 5:.0f}" text-anchor="middle" fill="#333">{label}</text>',
    ]


def _edge(x: float, y: float, to_x: float, to_y: float) -> tuple[float, float]:
    """Where the line from a box's middle to a point leaves the box."""
    scale = max(abs(to_x - x) / 72, abs(to_y - y) / 28)
    return x + (to_x - x) / scale, y + (to_y - y) / scale


def row(run: Run, explored: Explored[Any]) -> str:
    """A run's line in the table of what holds."""
    return f"| {run.text} | {explored.states:,} | {explored.steps:,} |"


def wrong_row(text: str, explored: Explored[Any]) -> str:
    """A wrong variant's line in the table of what doesn't: what is changed, what comes of it, after how many steps."""
    return f"| {text} | {explored.problem} | {len(explored.trace)} |"
