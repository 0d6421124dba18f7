"""What an ablation found: means, intervals and paired differences, in four formats."""

from __future__ import annotations

import csv
import io
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from ...cache.durable import write_whole
from ...errors import ConfigError
from ...options import closest
from ...progress import plain_console
from ..alignment import ALIGNMENTS
from ..evaluation.intervals import Bootstrap, over_seeds
from .plan import Variant

Bounds = tuple[float, float]
CAPTION = (
    "Scores in per cent. In brackets Student's t interval over seeds; in braces the percentile "
    "bootstrap over test images, of the mean over seeds. Differences are to the baseline of the "
    "row, paired by seed and by image. Seconds are of training, a run."
)

LEGEND = "[95 % over seeds]  {95 % over test images}; differences are paired, to the baseline"


@dataclass(frozen=True)
class Outcome:
    """What one run gave.

    Attributes:
        seconds: of training.
        parameters: of student and alignment.
        scores: by READOUT/SCORE, larger is better.
        resampled: the same scores on bootstrap resamples of the test images, [B]; the resamples are
            those of every run, so that runs can be subtracted. Empty where there are none.
    """

    variant: Variant
    seed: int
    seconds: float
    parameters: Mapping[str, int]
    scores: Mapping[str, float]
    resampled: Mapping[str, Sequence[float]]


@dataclass(frozen=True)
class Row:
    """One variant's figure for one score. Scores and differences are shares, from 0 to 1.

    Attributes:
        variant, levels: its name, and its label by factor.
        score: READOUT/SCORE.
        mean: over seeds.
        over_seeds: t interval of the mean; None for a single seed.
        over_images: bootstrap interval of the mean; None where nothing was resampled.
        baseline: the variant that it is compared with; None for a baseline.
        difference: mean of the differences of runs of one seed; None for a baseline, and where no
            seed is common.
        difference_over_seeds, difference_over_images: its intervals.
        seconds: of training, mean over seeds.
        student_parameters, alignment_parameters: how many.
    """

    variant: str
    levels: Mapping[str, str]
    score: str
    seeds: tuple[int, ...]
    mean: float
    over_seeds: Bounds | None
    over_images: Bounds | None
    baseline: str | None
    difference: float | None
    difference_over_seeds: Bounds | None
    difference_over_images: Bounds | None
    seconds: float
    student_parameters: int
    alignment_parameters: int

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def compare(
    outcomes: Sequence[Outcome],
    baselines: Mapping[str, str | None],
    *,
    level: float = 0.95,
    score: str | None = None,
) -> list[Row]:
    """Rows of all variants and scores: `score` first, and by it the best variant first.

    Args:
        baselines: name of each variant -> name of the one it is compared with.
        level: coverage of the intervals.
        score: a READOUT/SCORE; the first of the first run where not given.

    Raises:
        ConfigError: no run has such a score.
    """
    of_variant: dict[str, dict[int, Outcome]] = {}
    for outcome in outcomes:
        of_variant.setdefault(outcome.variant.name, {})[outcome.seed] = outcome
    scores = list(dict.fromkeys(name for outcome in outcomes for name in outcome.scores))
    first = scores[0] if score is None else score
    if first not in scores:
        raise ConfigError(
            f"score={score}: no run has it{closest(str(score), scores)}; there are "
            f"{', '.join(scores)}"
        )
    scores.sort(key=lambda name: name != first)
    rows = []
    for name in scores:
        found = [
            _row(name, variant, runs, of_variant, baselines, level)
            for variant, runs in of_variant.items()
            if any(name in run.scores for run in runs.values())
        ]
        rows += found
    order = {row.variant: -row.mean for row in reversed(rows) if row.score == first}
    return sorted(rows, key=lambda row: (scores.index(row.score), order.get(row.variant, 0.0)))


def check_score(
    score: str, protocols: Sequence[str], tasks: Sequence[str], embeddings: Iterable[str] = ()
) -> None:
    """Refuse a READOUT/SCORE that no run can have, before any is done.

    Variants of a protocol (``fewshot/5-shot``) and what an alignment offers are left to `compare`.

    Args:
        protocols: those of the evaluation.
        tasks: names of its tasks.
        embeddings: teachers whose embeddings are read as students predict them.

    Raises:
        ConfigError: no alignment has the readout, or the evaluation no such protocol or task.
    """
    readout, _, key = score.partition("/")
    readout = re.sub(r"-\d+$", "", readout)  # its width, where it is reduced
    name, _, task = key.partition("@")
    name = name.split("/")[0]
    kinds = (alignment.readouts for alignment in ALIGNMENTS.values())
    readouts = list(dict.fromkeys([*(readout for own in kinds for readout in own), *embeddings]))
    for what, value, valid in (
        ("READOUT", readout, readouts),
        ("SCORE", name, protocols),
        *((("task", task, tasks),) if task else ()),
    ):
        if value not in valid:
            raise ConfigError(
                f"score={score}: expected READOUT/SCORE, such as {readouts[0]}/{protocols[0]}; "
                f"{value!r} is no {what}{closest(value, valid)}: there are {', '.join(valid)}"
            )


def _row(
    score: str,
    name: str,
    runs: Mapping[int, Outcome],
    of_variant: Mapping[str, Mapping[int, Outcome]],
    baselines: Mapping[str, str | None],
    level: float,
) -> Row:
    own = {seed: run for seed, run in sorted(runs.items()) if score in run.scores}
    mean, seeds = _mean([run.scores[score] for run in own.values()], level)
    baseline = baselines[name]
    other = of_variant.get(baseline, {}) if baseline is not None else {}
    common = [seed for seed in own if seed in other and score in other[seed].scores]
    difference, gap_seeds, gap_images = None, None, None
    if common:
        difference, gap_seeds = _mean(
            [own[seed].scores[score] - other[seed].scores[score] for seed in common], level
        )
        ours = _resampled([own[seed] for seed in common], score)
        theirs = _resampled([other[seed] for seed in common], score)
        if ours is not None and theirs is not None and ours.shape == theirs.shape:
            gap_images = _percentiles(ours - theirs, level)
    drawn = _resampled(list(own.values()), score)
    any_run = next(iter(own.values()))
    return Row(
        variant=name,
        levels=dict(any_run.variant.levels),
        score=score,
        seeds=tuple(own),
        mean=mean,
        over_seeds=seeds,
        over_images=None if drawn is None else _percentiles(drawn, level),
        baseline=baseline,
        difference=difference,
        difference_over_seeds=gap_seeds,
        difference_over_images=gap_images,
        seconds=float(np.mean([run.seconds for run in own.values()])),
        student_parameters=int(any_run.parameters["student"]),
        alignment_parameters=int(any_run.parameters["alignment"]),
    )


def _mean(values: Sequence[float], level: float) -> tuple[float, Bounds | None]:
    """Mean over runs that differ in their seed alone, and Student's t interval of it."""
    found = over_seeds(values, level)
    return found.value, None if len(values) == 1 else (found.low, found.high)


def _resampled(runs: Sequence[Outcome], score: str) -> NDArray[np.float64] | None:
    """The mean over runs on every resample, [B]."""
    parts = [np.asarray(run.resampled.get(score, ()), dtype=np.float64) for run in runs]
    if not all(len(part) and part.shape == parts[0].shape for part in parts):
        return None
    return np.asarray(np.mean(parts, axis=0))


def _percentiles(values: NDArray[np.float64], level: float) -> Bounds | None:
    low, high = Bootstrap(level=level).bounds(values)
    return None if math.isnan(low) else (low, high)


# -- formats ---------------------------------------------------------------------------------------


def write_tables(out: Path, rows: Sequence[Row]) -> None:
    """Write table.csv (every figure), table.md and table.tex (for people)."""
    buffer = io.StringIO()
    flat = [_flat(row) for row in rows]
    writer = csv.DictWriter(buffer, list(flat[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(flat)
    write_whole(out / "table.csv", buffer.getvalue().encode())
    write_whole(out / "table.md", _markdown(rows).encode())
    write_whole(out / "table.tex", _latex(rows).encode())


def print_table(rows: Sequence[Row], console: Console | None = None) -> None:
    """Print the rows of the first score, as wide as they are."""
    head, cells = _cells([row for row in rows if row.score == rows[0].score])
    table = Table(title=f"{rows[0].score}, in per cent")
    for number, column in enumerate(head):
        table.add_column(column, justify="right" if number else "left", no_wrap=True)
    for line in cells:
        # Each interval on a line of its own.
        table.add_row(*(cell.replace(" [", "\n[").replace(" {", "\n{") for cell in line))
    # Names and figures are never cut: the table is as wide as they are.
    file = (console or plain_console()).file
    width = plain_console(file=file, width=1000).measure(table).maximum
    plain_console(file=file, width=max(80, width)).print(table, LEGEND)


def _flat(row: Row) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in row.as_json().items():
        if key == "levels":
            found |= {f"factor.{factor}": label for factor, label in value.items()}
        elif key == "seeds":
            found[key] = " ".join(map(str, value))
        elif key.endswith(("over_seeds", "over_images")):
            low, high = value or (None, None)
            found |= {f"{key}_low": low, f"{key}_high": high}
        else:
            found[key] = value
    return found


def _cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Heads and cells of the rows of one score."""
    head = ["", "seeds", "mean", "difference", "seconds", "student M", "alignment M"]
    cells = [
        [
            row.variant,
            str(len(row.seeds)),
            f"{100 * row.mean:.2f}{_bounds(row.over_seeds, row.over_images)}",
            "baseline" if row.baseline is None else _difference(row),
            f"{row.seconds:.0f}",
            f"{row.student_parameters / 1e6:.2f}",
            f"{row.alignment_parameters / 1e6:.2f}",
        ]
        for row in rows
    ]
    return head, cells


def _difference(row: Row) -> str:
    if row.difference is None:
        return "nothing to pair"
    bounds = _bounds(row.difference_over_seeds, row.difference_over_images, sign="+")
    return f"{100 * row.difference:+.2f}{bounds}"


def _bounds(seeds: Bounds | None, images: Bounds | None, sign: str = "") -> str:
    found = ""
    for bounds, (left, right) in ((seeds, "[]"), (images, "{}")):
        if bounds is not None:
            low, high = (format(100 * bound, f"{sign}.2f") for bound in bounds)
            found += f" {left}{low}, {high}{right}"
    return found


def _by_score(rows: Sequence[Row]) -> dict[str, list[Row]]:
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(row.score, []).append(row)
    return found


def _markdown(rows: Sequence[Row]) -> str:
    parts = [CAPTION, ""]
    for score, own in _by_score(rows).items():
        head, cells = _cells(own)
        head[0] = score
        parts += [
            "| " + " | ".join(head) + " |",
            "|---|" + "---:|" * (len(head) - 1),
            *(
                "| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |"
                for line in cells
            ),
            "",
        ]
    return "\n".join(parts)


def _latex(rows: Sequence[Row]) -> str:
    """One tabular a score; needs booktabs."""
    parts = [f"% {CAPTION}"]
    for score, own in _by_score(rows).items():
        head, cells = _cells(own)
        head[0] = score
        parts += [
            "\\begin{tabular}{l" + "r" * (len(head) - 1) + "}",
            "\\toprule",
            " & ".join(map(_escaped, head)) + " \\\\",
            "\\midrule",
            *(" & ".join(map(_escaped, line)) + " \\\\" for line in cells),
            "\\bottomrule",
            "\\end{tabular}",
            "",
        ]
    return "\n".join(parts)


def _escaped(text: str) -> str:
    for sign in "&%$#_{}":
        text = text.replace(sign, f"\\{sign}")
    return text
