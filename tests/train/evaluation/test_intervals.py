"""Intervals against scipy, and statistics against repeated rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
from preceptor.errors import ConfigError
from preceptor.train.evaluation import Bootstrap, over_seeds
from preceptor.train.evaluation.intervals import R2, MeanIoU, MeanOf, PooledR2, _counts
from scipy import stats
from sklearn.metrics import r2_score


def test_the_interval_of_a_mean_is_scipys_percentile_bootstrap():
    values = (np.random.default_rng(0).random(400) < 0.8).astype(float)
    found = Bootstrap(resamples=4000).interval(MeanOf(values), 400)
    judge = stats.bootstrap(
        (values,), np.mean, method="percentile", n_resamples=4000, rng=np.random.default_rng(1)
    ).confidence_interval
    assert found.value == values.mean()
    assert (found.low, found.high) == pytest.approx((judge.low, judge.high), abs=0.006)


def test_intervals_of_95_per_cent_cover_the_truth_about_95_times_in_100():
    random, inside = np.random.default_rng(2), 0
    for trial in range(300):
        values = (random.random(200) < 0.7).astype(float)
        found = Bootstrap(resamples=300, seed=trial).interval(MeanOf(values), 200)
        inside += found.low <= 0.7 <= found.high
    assert 0.90 < inside / 300 < 0.99


def test_chunks_of_resamples_do_not_change_them(monkeypatch):
    statistic = MeanOf(np.random.default_rng(3).normal(size=50))
    whole = Bootstrap(resamples=64).interval(statistic, 50)
    monkeypatch.setattr("preceptor.train.evaluation.intervals._CHUNK", 50 * 7)
    _counts.cache_clear()
    assert Bootstrap(resamples=64).interval(statistic, 50) == whole


def test_paired_differences_are_narrower_than_their_parts():
    random = np.random.default_rng(4)
    hard = random.random(500)
    ours, theirs = (hard < 0.80).astype(float), (hard < 0.77).astype(float)
    bootstrap = Bootstrap()
    paired = bootstrap.difference(MeanOf(ours), MeanOf(theirs), 500)
    assert paired.value == pytest.approx(ours.mean() - theirs.mean())
    assert paired.low > 0  # though the intervals of both overlap
    alone = [bootstrap.interval(MeanOf(x), 500) for x in (ours, theirs)]
    assert alone[0].low < alone[1].high
    same = bootstrap.difference(MeanOf(ours), MeanOf(ours), 500)
    assert (same.low, same.high) == (0, 0)


def test_no_resamples_no_interval():
    found = Bootstrap(resamples=0).interval(MeanOf(np.ones(3)), 3)
    assert found.value == 1
    assert math.isnan(found.low)
    with pytest.raises(ConfigError, match=r"level=95 .*between 0 and 1"):
        Bootstrap(level=95)


def test_weights_of_r2_stand_for_repeated_images():
    random = np.random.default_rng(5)
    truth = random.normal(1e4, 1, size=(60, 3))
    predicted = truth + random.normal(0, 0.5, size=(60, 3))
    counts = random.integers(0, 4, size=60)
    again = np.repeat(np.arange(60), counts)
    found = R2(truth, predicted)(np.stack([np.ones(60), counts]).astype(float))
    assert found[0] == pytest.approx(r2_score(truth, predicted), abs=1e-9)
    assert found[1] == pytest.approx(r2_score(truth[again], predicted[again]), abs=1e-9)


def test_a_target_that_is_rare_does_not_blow_up_the_interval():
    # Of 200 images one differs: a resample without it has a spread of nothing but rounding.
    random = np.random.default_rng(7)
    truth = np.full((200, 1), 0.1)
    truth[7] = 0.47
    predicted = truth + random.normal(0, 0.02, size=truth.shape)
    residual = ((truth - predicted) ** 2)[:, 0]
    pixels = PooledR2(residual, truth[:, 0] - 3, (truth[:, 0] - 3) ** 2, np.ones(200))
    counts = np.concatenate([part for part in _counts(0, 1000, 200)])
    judges = [
        r2_score(np.repeat(truth, row, 0), np.repeat(predicted, row, 0)) if row[7] else np.nan
        for row in counts.astype(int)
    ]
    assert 300 < np.isnan(judges).sum() < 440  # 1/e of them
    for statistic in (R2(truth, predicted), pixels):
        found = statistic(counts.astype(float))
        np.testing.assert_allclose(found, judges, rtol=1e-8)
        interval = Bootstrap().interval(statistic, 200)
        expected = np.nanquantile(judges, [0.025, 0.975])
        assert (interval.low, interval.high) == pytest.approx(tuple(expected))


def test_classes_that_do_not_occur_are_left_out_of_the_mean():
    shared, joined = np.array([[2.0, 0, 0], [1, 1, 0]]), np.array([[4.0, 1, 0], [4, 1, 0]])
    found = MeanIoU(shared, joined)(np.array([[1.0, 1], [1, 0], [0, 1]]))
    assert found.tolist() == [(3 / 8 + 1 / 2) / 2, (2 / 4 + 0) / 2, (1 / 4 + 1) / 2]


def test_over_seeds_is_students_interval():
    values = [0.81, 0.84, 0.79, 0.83]
    judge = stats.ttest_1samp(values, 0).confidence_interval(0.95)
    found = over_seeds(values)
    assert (found.low, found.high) == pytest.approx((judge.low, judge.high))
    assert over_seeds([0.5]).value == 0.5
    assert math.isnan(over_seeds([0.5]).low)
