"""A picture of an ablation: means with their intervals, and differences to the baseline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .table import Outcome, Row

_SEEDS, _IMAGES, _RUN = "#1f4e79", "#9dc3e6", "#c55a11"


def draw(path: Path, rows: Sequence[Row], outcomes: Sequence[Outcome]) -> None:
    """Draw the rows of the first score, best first, and write a PNG."""
    shown = [row for row in rows if row.score == rows[0].score]
    figure = Figure(figsize=(10.5, 1.7 + 0.42 * len(shown)), layout="constrained")
    FigureCanvasAgg(figure)
    left, right = figure.subplots(1, 2, sharey=True)
    for place, row in enumerate(shown):
        runs = [o.scores[row.score] for o in outcomes if o.variant.name == row.variant]
        _mark(left, place, row.mean, row.over_seeds, row.over_images)
        left.plot([100 * run for run in runs], [place] * len(runs), "|", color=_RUN, markersize=9)
        if row.difference is not None:
            _mark(
                right,
                place,
                row.difference,
                row.difference_over_seeds,
                row.difference_over_images,
            )
    left.set_yticks(range(len(shown)), [row.variant for row in shown], parse_math=False)
    left.set_ylim(len(shown) - 0.5, -0.5)
    left.set_title(rows[0].score, fontsize=10, parse_math=False)
    left.set_xlabel("per cent")
    right.axvline(0, color="0.4", linewidth=0.8)
    right.set_title("paired difference to the baseline", fontsize=10)
    right.set_xlabel("points")
    for axes in (left, right):
        axes.grid(axis="x", color="0.9")
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    kinds = {"mean": ("o", _SEEDS), "one run": ("|", _RUN)}
    handles = [
        left.plot([], [], mark, color=colour, label=label)[0]
        for label, (mark, colour) in kinds.items()
    ]
    if any(row.over_seeds for row in shown):
        handles += left.plot([], [], color=_SEEDS, linewidth=2, label="t interval over seeds")
    if any(row.over_images for row in shown):
        label = "bootstrap over test images"
        handles += left.plot([], [], color=_IMAGES, linewidth=6, label=label)
    figure.legend(
        handles=handles, loc="outside lower center", ncols=len(handles), frameon=False, fontsize=9
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)


def _mark(
    axes: Axes,
    place: int,
    value: float,
    seeds: tuple[float, float] | None,
    images: tuple[float, float] | None,
) -> None:
    if images is not None:
        axes.plot(_percent(images), [place] * 2, color=_IMAGES, lw=6, solid_capstyle="butt")
    if seeds is not None:
        axes.plot(_percent(seeds), [place] * 2, color=_SEEDS, lw=2)
    axes.plot([100 * value], [place], "o", color=_SEEDS)


def _percent(bounds: Sequence[float]) -> list[float]:
    return [100 * bound for bound in bounds]
