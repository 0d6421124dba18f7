"""Protocols on the tokens of a grid, against scikit-learn, and against leaks of labels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from preceptor.errors import ConfigError
from preceptor.train.evaluation import Features, Maps, ValueMaps, build_suite
from preceptor.train.evaluation.base import split
from preceptor.train.evaluation.dense import _ridge, cell_shares
from scored import one
from sklearn.linear_model import Ridge
from sklearn.metrics import jaccard_score, r2_score
from sklearn.preprocessing import StandardScaler


@pytest.mark.parametrize(("size", "grid"), [((8, 8), (4, 2)), ((7, 5), (3, 4)), ((3, 3), (5, 5))])
def test_cells_hold_the_area_of_each_class(size, grid):
    random = np.random.default_rng(1)
    maps = random.integers(-1, 3, size=(2, *size))
    shares, weight = cell_shares(maps, grid, 3)
    # Every pixel and every cell as many small squares, so that areas can be counted.
    fine = np.repeat(np.repeat(maps, grid[0], 1), grid[1], 2)
    blocks = fine.reshape(2, grid[0], size[0], grid[1], size[1]).transpose(0, 1, 3, 2, 4)
    blocks = blocks.reshape(2, grid[0] * grid[1], -1)
    np.testing.assert_allclose(weight, (blocks >= 0).mean(-1), atol=1e-12)
    for kind in range(3):
        expected = (blocks == kind).mean(-1) / np.maximum((blocks >= 0).mean(-1), 1e-9)
        np.testing.assert_allclose(shares[..., kind], expected, atol=1e-9)


def test_the_dense_probe_is_weighted_ridge_regression():
    random = np.random.default_rng(4)
    tokens = random.normal(1, [1, 5, 0.1, 2], size=(9, 6, 4)).astype(np.float32)
    maps = random.integers(-1, 3, size=(9, 5, 7))
    shares, weight = cell_shares(maps, (2, 3), 3)
    x, y, w = tokens.reshape(-1, 4).astype(np.float64), shares.reshape(-1, 3), weight.ravel()
    scaler = StandardScaler().fit(x, sample_weight=w)
    judge = Ridge(alpha=0.2 * w.sum()).fit(scaler.transform(x), y, sample_weight=w)
    probe = _ridge(tokens, (2, 3), maps, 3).solve(0.2)
    np.testing.assert_allclose(
        probe.scores(tokens).reshape(-1, 3), judge.predict(scaler.transform(x)), atol=1e-5
    )


def segmented(count: int, seed: int, side: int = 8, grid: int = 4):
    """Blocks of three classes, aligned with the cells, and tokens that tell them noisily."""
    random = np.random.default_rng(seed)
    cells = random.integers(3, size=(count, grid, grid))
    tokens = np.eye(3)[cells.reshape(count, -1)] + random.normal(0, 0.4, (count, grid * grid, 3))
    maps = np.repeat(np.repeat(cells, side // grid, 1), side // grid, 2)
    maps[random.random(maps.shape) < 0.1] = -1
    return tokens.astype(np.float32), maps


def test_dense_scores_are_scikit_learns_jaccard_score():
    (x, maps), (queries, truth) = segmented(40, 1), segmented(25, 2)
    features = Features(x, queries, grid=(4, 4))
    (score,) = one("dense", features, Maps("parts", maps, truth), strengths=[0.01])
    probe = _ridge(x, (4, 4), maps, 3).solve(0.01)
    scores = torch.from_numpy(probe.scores(queries)).transpose(1, 2).unflatten(2, (4, 4))
    resized = torch.nn.functional.interpolate(scores, (8, 8), mode="bilinear")
    predicted, known = resized.argmax(1).numpy(), truth >= 0
    judged = jaccard_score(truth[known], predicted[known], average=None)
    assert score.details["iou"] == pytest.approx(judged, abs=1e-12)
    assert score.value == pytest.approx(judged.mean(), abs=1e-12)
    assert score.details["pixel_accuracy"] == pytest.approx(
        (predicted == truth)[known].mean(), abs=1e-12
    )
    assert score.value > 0.5  # neighbouring cells blur into each other at these eight pixels
    counts = np.random.default_rng(0).integers(0, 3, size=25)
    again = np.repeat(np.arange(25), counts)
    known = truth[again] >= 0
    assert score.statistic(counts[None].astype(float))[0] == pytest.approx(
        jaccard_score(truth[again][known], predicted[again][known], average="macro"), abs=1e-12
    )


def test_class_numbers_of_pixels_cost_nothing_by_their_size():
    (x, maps), (queries, truth) = segmented(40, 1), segmented(25, 2)
    features = Features(x, queries, grid=(4, 4))
    far = np.array([2, 7, 30_000, -1])  # in place of 0, 1, 2 and the unlabelled
    (near,) = one("dense", features, Maps("parts", maps, truth))
    (score,) = one("dense", features, Maps("parts", far[maps], far[truth]))
    assert (score.value, score.validation, score.chosen) == (
        near.value, near.validation, near.chosen
    )  # fmt: skip
    assert np.array_equal(score.resampled, near.resampled)
    iou = score.details["iou"]
    assert [iou[kind] for kind in far[:3]] == near.details["iou"]
    assert sum(one is not None for one in iou) == 3
    assert score.statistic.union.shape == (25, 3)


def slopes(count: int, seed: int, side: int = 8, grid: int = 4):
    """Maps far from zero whose cells have one value each but noise, and tokens that tell it."""
    random = np.random.default_rng(seed)
    cells = random.normal(size=(count, grid, grid))
    tokens = cells.reshape(count, -1, 1) * [1.0, -2.0] + random.normal(0, 0.3, (count, grid**2, 2))
    maps = 5000 + 3 * np.repeat(np.repeat(cells, side // grid, 1), side // grid, 2)
    maps += random.normal(0, 0.2, maps.shape)
    maps[random.random(maps.shape) < 0.1] = np.nan
    maps[0] = np.nan
    return tokens.astype(np.float32), maps


def test_dense_regression_is_scikit_learns_ridge_and_its_r2():
    (x, maps), (queries, truth) = slopes(60, 1), slopes(30, 2)
    strengths, features = [1e-3, 0.3, 30.0], Features(x, queries, grid=(4, 4))
    (score,) = one(
        "dense_regression", features, ValueMaps("depth", maps, truth), strengths=strengths
    )
    assert (score.key, score.images) == ("dense_regression@depth", 29)  # one has no pixel
    x, maps, queries, truth = x[1:], maps[1:], queries[1:], truth[1:]

    def pixels(strength, fit, asked):
        blocks = maps[fit].reshape(-1, 4, 2, 4, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 4)
        known = np.isfinite(blocks)
        w = known.mean(1)
        y = np.where(known, blocks, 0).sum(1) / np.maximum(known.sum(1), 1)
        rows = x[fit].reshape(-1, 2).astype(np.float64)
        scaler = StandardScaler().fit(rows, sample_weight=w)
        judge = Ridge(alpha=strength * w.sum())
        judge.fit(scaler.transform(rows), y, sample_weight=w)
        said = judge.predict(scaler.transform(asked.reshape(-1, 2).astype(np.float64)))
        said = torch.from_numpy(said).view(-1, 1, 4, 4)
        return torch.nn.functional.interpolate(said, (8, 8), mode="bilinear")[:, 0].numpy()

    def r2(said, true):
        known = np.isfinite(true)
        return r2_score(true[known], said[known])

    fit, held = split(59, 0.2, 0)
    found = {s: r2(pixels(s, fit, x[held]), maps[held]) for s in strengths}
    best = max(found, key=lambda s: found[s])
    assert score.chosen == {"strength": best}
    assert score.validation == pytest.approx(found[best], abs=1e-5)
    said = pixels(best, slice(None), queries)
    assert score.value == pytest.approx(r2(said, truth), abs=1e-5)
    assert 0.5 < score.value < 1
    error = (said - truth)[np.isfinite(truth)]
    assert score.details["rmse"] == pytest.approx(np.sqrt((error**2).mean()), rel=1e-5)
    assert score.details["mae"] == pytest.approx(np.abs(error).mean(), rel=1e-5)
    counts = np.random.default_rng(0).integers(0, 3, size=29)
    again = np.repeat(np.arange(29), counts)
    expected = r2(said[again], truth[again])
    assert score.statistic(counts[None].astype(float))[0] == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "made", "maps_of", "chance"),
    [("dense", segmented, Maps, 0.4), ("dense_regression", slopes, ValueMaps, 0.1)],
)
def test_nothing_is_learnt_from_test_or_validation_images(name, made, maps_of, chance):
    (x, maps), (queries, truth) = made(60, 1), made(40, 2)
    noise = np.random.default_rng(9).normal(size=x.shape).astype(np.float32)
    features = Features(noise, queries, grid=(4, 4))
    (score,) = one(name, features, maps_of("parts", maps, truth))
    assert score.value < chance
    assert score.validation < chance


def test_maps_that_tell_nothing_are_named():
    (_, maps), (_, truth) = slopes(60, 1), slopes(40, 2)
    suite = build_suite(["dense_regression"])
    flat = np.where(np.isfinite(truth), 7.0, np.nan)
    with pytest.raises(ConfigError, match="depth: all pixels of the test maps have one value"):
        suite.check([ValueMaps("depth", maps, flat)])
    with pytest.raises(ConfigError, match="no test image has a label"):
        suite.check([ValueMaps("depth", maps, truth * np.nan)])
    with pytest.raises(ConfigError, match="fewer than two classes"):
        build_suite(["dense"]).check([Maps("m", np.zeros((3, 2, 2), int), np.ones((3, 2, 2), int))])
