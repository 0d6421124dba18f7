"""Intervals and pairing against SciPy and a plain loop; every format holds the same figures."""

from __future__ import annotations

import csv
import io
import json

import numpy as np
import pytest
from PIL import Image
from preceptor.errors import ConfigError
from preceptor.train.ablate.figure import draw
from preceptor.train.ablate.plan import Variant
from preceptor.train.ablate.table import Outcome, compare, print_table, write_tables
from rich.console import Console
from scipy import stats

A, B = Variant({"align": "plain_one"}, {}), Variant({"align": "b & c"}, {})
BASELINES = {A.name: None, B.name: A.name}
IMAGES, RESAMPLES = 40, 300


def correct(variant: Variant, seed: int) -> np.ndarray:
    """Which test images a made-up run has right."""
    random = np.random.default_rng([seed, variant is A])
    hard = np.random.default_rng(9).random(IMAGES)
    return (random.random(IMAGES) > 0.7 * hard + 0.1 * (variant is A)).astype(float)


def drawn() -> np.ndarray:
    return np.random.default_rng(0).integers(IMAGES, size=(RESAMPLES, IMAGES))


def outcome(variant: Variant, seed: int, **scores: float) -> Outcome:
    right = correct(variant, seed)
    return Outcome(
        variant=variant,
        seed=seed,
        seconds=10.0 + seed,
        parameters={"student": 1_000_000, "alignment": 500_000 if variant is A else 250_000},
        scores={"pooled/knn": float(right.mean()), **scores},
        resampled={"pooled/knn": right[drawn()].mean(1)},
    )


def test_means_intervals_and_paired_differences():
    seeds_a, seeds_b = (0, 1, 2, 3), (1, 2, 3, 7)
    outcomes = [outcome(A, s) for s in seeds_a] + [outcome(B, s) for s in seeds_b]
    rows = {row.variant: row for row in compare(outcomes, BASELINES, level=0.9)}
    a = np.array([correct(A, s) for s in seeds_a])
    row = rows[A.name]
    assert row.seeds == seeds_a
    assert row.mean == pytest.approx(a.mean())
    interval = stats.ttest_1samp(a.mean(1), 0).confidence_interval(0.9)
    assert row.over_seeds == pytest.approx((interval.low, interval.high))
    resampled = [a[:, list(images)].mean() for images in drawn()]
    assert row.over_images == pytest.approx(np.quantile(resampled, [0.05, 0.95]))
    assert (row.baseline, row.difference, row.difference_over_seeds) == (None, None, None)
    assert row.seconds == pytest.approx(11.5)
    assert (row.student_parameters, row.alignment_parameters) == (1_000_000, 500_000)

    # Paired: the seeds that both have, and the images of one resample for both.
    common = (1, 2, 3)
    ours, theirs = (np.array([correct(v, s) for s in common]) for v in (B, A))
    row = rows[B.name]
    assert row.difference == pytest.approx((ours - theirs).mean())
    interval = stats.ttest_rel(ours.mean(1), theirs.mean(1)).confidence_interval(0.9)
    assert row.difference_over_seeds == pytest.approx((interval.low, interval.high))
    resampled = [(ours - theirs)[:, list(images)].mean() for images in drawn()]
    assert row.difference_over_images == pytest.approx(np.quantile(resampled, [0.05, 0.95]))


def test_a_single_seed_has_no_interval_over_seeds_but_one_over_images():
    rows = compare([outcome(A, 0), outcome(B, 0)], BASELINES)
    assert all(row.over_seeds is None and row.over_images is not None for row in rows)
    (row,) = [row for row in rows if row.variant == B.name]
    assert row.difference_over_seeds is None
    assert row.difference_over_images is not None


def test_runs_that_failed_leave_nothing_to_pair():
    for outcomes in ([outcome(B, 0)], [outcome(A, 0), outcome(B, 1)]):
        row = next(r for r in compare(outcomes, BASELINES) if r.variant == B.name)
        assert (row.baseline, row.difference) == (A.name, None)


def test_the_best_variant_of_the_chosen_score_is_first():
    outcomes = [outcome(A, 0, other=0.1), outcome(B, 0, other=0.9, only_b=0.5)]
    rows = compare(outcomes, BASELINES, score="other")
    assert [(row.score, row.variant) for row in rows[:2]] == [("other", B.name), ("other", A.name)]
    assert [row.variant for row in rows if row.score == "only_b"] == [B.name]
    with pytest.raises(ConfigError, match=r"score=othr.*did you mean other\?.*pooled/knn, other"):
        compare(outcomes, BASELINES, score="othr")


def test_every_format_holds_the_same_figures(tmp_path):
    outcomes = [outcome(v, s) for v in (A, B) for s in (0, 1)]
    rows = compare(outcomes, BASELINES)
    write_tables(tmp_path, rows)
    read = list(csv.DictReader(io.StringIO((tmp_path / "table.csv").read_text())))
    assert [line["factor.align"] for line in read] == [row.variant for row in rows]
    for line, row in zip(read, json.loads(json.dumps([r.as_json() for r in rows])), strict=True):
        assert float(line["mean"]) == row["mean"]
        assert [float(line[f"over_seeds_{end}"]) for end in ("low", "high")] == row["over_seeds"]
        assert line["baseline"] == (row["baseline"] or "")
        assert line["difference"] == ("" if row["difference"] is None else str(row["difference"]))

    text = io.StringIO()
    print_table(rows, Console(file=text, width=40))
    markdown, latex = ((tmp_path / f"table.{end}").read_text() for end in ("md", "tex"))
    for row in rows:
        for shown in (markdown, latex, text.getvalue()):
            assert f"{100 * row.mean:.2f}" in shown
            assert row.difference is None or f"{100 * row.difference:+.2f}" in shown
    assert "plain_one" in text.getvalue()  # not cut in a narrow terminal
    assert "plain\\_one" in latex
    assert "b \\& c" in latex
    assert latex.count("\\begin{tabular}") == latex.count("\\end{tabular}") == 1


def test_the_figure_is_a_picture_with_something_in_it(tmp_path):
    outcomes = [outcome(v, s) for v in (A, B) for s in (0, 1)]
    draw(tmp_path / "figure.png", compare(outcomes, BASELINES), outcomes)
    pixels = np.asarray(Image.open(tmp_path / "figure.png").convert("RGB"))
    assert pixels.shape[1] > 1000
    marks = (np.abs(pixels.astype(int) - (0x1F, 0x4E, 0x79)).sum(2) < 30).sum(0)
    assert (marks[: len(marks) // 2] > 0).any()  # means on the left
    assert (marks[len(marks) // 2 :] > 0).any()  # a difference on the right
