"""Draw plots as SVG, the same bytes for the same figures. Without matplotlib there are none, and that is said."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from .common import Plot

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MARKERS = "osD^vPX*"


def draw(folder: Path, plots: Sequence[Plot]) -> None:
    """Write `folder`/NAME.svg for each name."""
    if not plots:
        return
    try:
        import matplotlib as mpl
    except ImportError:
        print("  no plots: matplotlib isn't installed (`make bench` does that)", file=sys.stderr)
        return
    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "notifyq"
    from matplotlib.figure import Figure

    for name, group in groupby(plots, key=lambda plot: plot.name):
        panels = list(group)
        figure = Figure(figsize=(6.4 * len(panels), 4.4), layout="constrained")
        for axes, plot in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
            _panel(axes, plot)
        figure.savefig(folder / f"{name}.svg", metadata={"Date": None})


def _panel(axes: Axes, plot: Plot) -> None:
    for marker, (label, points) in zip(MARKERS * 9, plot.series.items(), strict=False):
        axes.plot([x for x, _ in points], [y for _, y in points], marker=marker, markersize=5, label=label)
    axes.set(title=plot.title, xlabel=plot.x, ylabel=plot.y)
    from matplotlib.ticker import NullFormatter

    if plot.log_x:
        axes.set_xscale("log")
        ticks = sorted({x for points in plot.series.values() for x, _ in points})
        axes.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
        axes.minorticks_off()
    if plot.log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_formatter("{x:,g}")
        axes.yaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_ylim(bottom=0)
    axes.grid(which="both", alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize="small")
