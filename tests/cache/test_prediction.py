"""Predicted codes against the document's formulas in integers, and the fit against regression."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preceptor.cache import SpaceSpec
from preceptor.cache.encodings.prediction import (
    LARGEST_SUM,
    Prediction,
    blocks,
    fitted,
    neighbours,
    problem,
)
from preceptor.cache.statistics import CalibrationSums, calibration, prediction_weights
from preceptor.cache.tokens import Tokens
from small_stores import some_weights

DIMS = st.sampled_from([1, 2, 3, 4, 5, 7, 64, 65, 130])


def by_the_document(
    codes: np.ndarray, weights: np.ndarray, grid: tuple[int, int] | None = None
) -> np.ndarray:
    """Section 5, one number after another."""
    left = np.zeros_like(codes)
    block = -(-codes.shape[-1] // 4)
    for place in np.ndindex(codes.shape):
        token, d = codes[place[:-1]].tolist(), place[-1]
        total = sum(int(weights[d, e]) * token[e] for e in range(block * (d // block)))
        predicted = min(max(divided(total, 128), -127), 127)
        left[place] = (token[d] - predicted + 127) % 255 - 127
    stored = left.copy()
    for b, n, d in np.ndindex(codes.shape) if grid else ():
        y, x = divmod(n, grid[1])
        beside = [(y - 1, x), (y + 1, x), (y, x - 1), (y, x + 1)] if (y + x) % 2 else []
        inside = [i * grid[1] + j for i, j in beside if 0 <= i < grid[0] and 0 <= j < grid[1]]
        total = sum(int(weights[d, d]) * int(left[b, m, d]) for m in inside)
        stored[b, n, d] = (int(left[b, n, d]) - divided(total, 512) + 127) % 255 - 127
    return stored


def divided(total: int, by: int) -> int:
    """Rounded to an integer, ties to even."""
    whole, rest = divmod(total, by)
    return whole + (rest > by // 2 or (rest == by // 2 and whole % 2 == 1))


Case = tuple[np.ndarray, np.ndarray, tuple[int, int] | None]


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """Codes of any kind, and weights of any that may be frozen: small, or as large as can be."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dim = draw(DIMS)
    grid = draw(st.none() | st.tuples(st.integers(1, 5), st.integers(1, 4)))
    largest = draw(st.sampled_from([1, 10, 127]))
    codes = rng.integers(-largest, largest + 1, (2, grid[0] * grid[1] if grid else 1, dim))
    if draw(st.booleans()):
        codes = np.where(rng.random(codes.shape) < 0.5, largest, -largest)
    weights = some_weights(dim, draw(st.sampled_from([3, 40, 127])), rng, grid=grid is not None)
    return codes.astype(np.int8), weights, grid


@settings(max_examples=60, deadline=None)
@given(cases())
def test_stored_are_the_document_s_numbers_and_nothing_is_lost(case: Case) -> None:
    codes, weights, grid = case
    assert problem(weights, grid) is None
    stored = Prediction(weights, grid).residuals(codes)
    assert stored.tobytes() == by_the_document(codes, weights, grid).tobytes()
    assert (stored != -128).all()  # the fill value
    assert Prediction(weights, grid).restored(stored).tobytes() == codes.tobytes()


@settings(max_examples=60, deadline=None)
@given(cases())
def test_torch_gives_the_same_bits(case: Case) -> None:
    codes, weights, grid = case
    in_torch = Prediction(torch.from_numpy(weights), grid)
    stored = in_torch.residuals(torch.from_numpy(codes))
    assert stored.dtype == torch.int8
    assert stored.numpy().tobytes() == Prediction(weights, grid).residuals(codes).tobytes()
    assert in_torch.restored(stored).numpy().tobytes() == codes.tobytes()


@pytest.fixture
def imprecise() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    yield
    torch.set_float32_matmul_precision(before)


def largest_sums() -> tuple[np.ndarray, np.ndarray]:
    """Codes and weights whose sums reach the greatest magnitude that is allowed, and odd ones."""
    dim = 700
    rng = np.random.default_rng(0)
    weights = some_weights(dim, 127, rng)
    weights[-1, :516] = 127
    weights[-1, 516:] = 0
    weights[-1, 516] = LARGEST_SUM - 127 * 516
    codes = rng.integers(-127, 128, (1, 300, dim)).astype(np.int8)
    codes[0, :100] = 127
    codes[0, 100:200] = -127
    return codes, weights


def test_the_largest_sums_are_exact_in_every_precision(imprecise: None) -> None:
    codes, weights = largest_sums()
    assert np.abs(weights[-1].astype(int)).sum() == LARGEST_SUM
    exact = codes.reshape(-1, 700).astype(np.int64) @ weights.T.astype(np.int64)
    predicted = np.clip(np.rint(exact / 128), -127, 127).astype(int).reshape(codes.shape)
    expected = (codes - predicted + 127) % 255 - 127
    in_torch = Prediction(torch.from_numpy(weights), None)
    for kind in (torch.bfloat16, torch.float16):
        with torch.autocast("cpu", kind):
            stored = in_torch.residuals(torch.from_numpy(codes))
            again = in_torch.restored(stored)
        np.testing.assert_array_equal(stored.numpy(), expected)
        np.testing.assert_array_equal(again.numpy(), codes)
    np.testing.assert_array_equal(Prediction(weights, None).residuals(codes), expected)


def test_more_tokens_than_are_taken_at_once() -> None:
    rng = np.random.default_rng(1)
    codes = rng.integers(-127, 128, (13, 180, 8)).astype(np.int8)
    one = Prediction(some_weights(8, 90, rng, grid=True), (12, 15))
    stored = one.residuals(codes)
    expected = by_the_document(codes[11:], one.weights, one.grid)
    np.testing.assert_array_equal(stored[11:], expected)
    np.testing.assert_array_equal(one.restored(stored), codes)
    nothing = codes[:0]
    assert one.residuals(nothing).shape == one.restored(nothing).shape == (0, 180, 8)


# -- the fit ---------------------------------------------------------------------------------------


def sample(tokens: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Tokens that lie near a subspace of a third of the dimensions, of different spread."""
    random = torch.Generator().manual_seed(seed)
    basis = torch.randn(max(1, dim // 3), dim, generator=torch.Generator().manual_seed(5))
    x = torch.randn(tokens, max(1, dim // 3), generator=random) @ basis
    x += 0.3 * torch.randn(tokens, dim, generator=random)
    return x * torch.logspace(-1, 1, dim) + 5


def weights_of(x: torch.Tensor, parts: int = 1, grid: tuple[int, int] | None = None) -> np.ndarray:
    sums = CalibrationSums(x.reshape(-1, x.shape[-1])[0])
    for part in x.chunk(parts):
        sums.add(part)
    space = SpaceSpec("t", "s", grid[0] * grid[1] if grid else 1, x.shape[-1], grid, "compact")
    few = x[:32].reshape(-1, space.tokens, space.dim)
    return prediction_weights(space, sums.moments(), *calibration(sums), few)


def smooth(images: int, dim: int, seed: int = 0) -> torch.Tensor:
    """Tokens of grids of 6 x 7 that are like those beside them: ``[images, 42, dim]``."""
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(images, dim, 8, 9, generator=random)
    x = torch.nn.functional.avg_pool2d(x, 3, 1) * 3 + 0.3 * torch.randn(x[..., 1:-1, 1:-1].shape)
    return x.flatten(2).transpose(1, 2).contiguous()


def test_weights_of_neighbours_are_those_of_a_regression() -> None:
    x = smooth(32, 8)
    x[..., 5] = torch.randn(32, 42, generator=torch.Generator().manual_seed(1))
    z = (x - x.mean((0, 1))) / x.std((0, 1))
    codes = (z * 8).round().clamp(-127, 127).to(torch.int8).numpy()
    rectified = np.arange(8) == 3
    found = neighbours(codes, (6, 7), rectified)
    images = np.pad(codes.reshape(32, 6, 7, 8).astype(float), ((0, 0), (1, 1), (1, 1), (0, 0)))
    total = images[:, :-2, 1:-1] + images[:, 2:, 1:-1] + images[:, 1:-1, :-2] + images[:, 1:-1, 2:]
    odd = np.add.outer(np.arange(6), np.arange(7)) % 2 == 1
    for d in range(8):
        own, beside = images[:, 1:-1, 1:-1][:, odd][..., d], total[:, odd][..., d]
        exact = np.linalg.lstsq(beside.reshape(-1, 1), own.ravel(), rcond=None)[0][0] * 512
        expected = 0 if d in (3, 5) else min(round(exact), 127)
        assert found[d] == expected, d
    assert (found > 50).sum() == 6


def test_grids_that_are_smooth_need_fewer_bits_and_others_are_left_alone() -> None:
    weights = weights_of(smooth(40, 8), grid=(6, 7))
    other = smooth(60, 8, seed=1)
    z = (other - other.mean((0, 1))) / other.std((0, 1))
    codes = (z * 8).round().clamp(-127, 127).to(torch.int8)
    left = Prediction(torch.from_numpy(weights), (6, 7)).residuals(codes)
    assert bits(left.numpy()) < bits(codes.numpy()) - 0.2
    rough = torch.randn(200, 42, 8, generator=torch.Generator().manual_seed(2))
    assert not weights_of(rough, grid=(6, 7)).any()
    assert not weights_of(smooth(9, 8).relu() * 0, grid=(6, 7)).any()


def test_weights_are_those_of_a_ridge_regression_of_the_tokens() -> None:
    x = sample(4000, 24)
    x[:, 3] = (x[:, 3] - 5).sign() * (x[:, 3] - 5).abs() ** 1.5  # more large values than a Gaussian
    found = weights_of(x)
    z = x.double().numpy() - x.double().mean(0).numpy()
    z /= ((z**4).mean(0) / 3) ** 0.25
    assert abs(z[:, 3].var() - 1) > 0.1
    for start, end in blocks(24):
        ridge = np.sqrt(0.03 * len(z)) * np.eye(start)
        sides = np.concatenate([z[:, :start], ridge])
        targets = np.concatenate([z[:, start:end], np.zeros((start, end - start))])
        exact = np.linalg.lstsq(sides, targets, rcond=None)[0].T * 128
        assert np.abs(found[start:end, :start] - np.clip(exact, -127, 127)).max() < 0.501
        assert (found[start:end, start:] == 0).all()
    assert (found[6:] != 0).any(1).all()
    assert (found[:6] == 0).all()


def test_the_same_sample_gives_the_same_weights_however_it_comes_in() -> None:
    x = sample(3000, 40)
    expected = weights_of(x)
    assert expected.any()
    for parts in (3, 50):
        assert (weights_of(x.flip(0), parts) == expected).all()


def test_other_tokens_need_fewer_bits() -> None:
    weights = weights_of(sample(4000, 48))
    other = sample(2000, 48, seed=1)
    z = (other - other.mean(0)) / other.std(0)
    codes = (z * 8).round().clamp(-127, 127).to(torch.int8)
    left = Prediction(torch.from_numpy(weights), None).residuals(codes)
    assert bits(left.numpy()) < bits(codes.numpy()) - 0.8


def bits(codes: np.ndarray) -> float:
    """Mean entropy of a dimension's codes."""
    total = 0.0
    for column in codes.reshape(-1, codes.shape[-1]).T:
        share = np.unique(column, return_counts=True)[1] / len(column)
        total -= float((share * np.log2(share)).sum())
    return total / codes.shape[-1]


def test_nothing_is_predicted_where_it_does_not_pay() -> None:
    assert not weights_of(torch.randn(9000, 32, generator=torch.Generator().manual_seed(1))).any()
    assert not weights_of(sample(10, 48)).any()  # fewer tokens than dimensions
    assert not weights_of(torch.ones(50, 12)).any()  # nothing moves
    assert weights_of(sample(50, 1)).shape == (1, 1)
    x = sample(4000, 24)
    x[:, 7] = 3.0
    x[:, 9] = (x[:, 9] - x[:, 9].quantile(0.6)).clamp_min(0)
    rows = np.flatnonzero((weights_of(x) != 0).any(1))
    assert not {7, 9} & set(rows.tolist())
    assert {8, 10, 23} <= set(rows.tolist())


def test_a_few_tokens_more_than_dimensions_do_not_make_codes_larger() -> None:
    random = torch.Generator().manual_seed(3)
    x = torch.randn(60, 48, generator=random)  # most of which 36 dimensions explain, by chance
    codes = (torch.randn(4000, 48, generator=random) * 8).round().clamp(-127, 127).to(torch.int8)
    left = Prediction(torch.from_numpy(weights_of(x)), None).residuals(codes)
    assert bits(left.numpy()) < bits(codes.numpy()) + 0.02


def test_weights_that_would_not_be_exact_are_not_fitted() -> None:
    dim, known = 720, 540
    covariance = np.eye(dim)
    for target, share in ((600, 1.0), (601, 0.9)):  # the sum of all dimensions before its block
        covariance[target, :known] = covariance[:known, target] = share
        covariance[target, target] = known * share**2
    weights = fitted(covariance, 10**6, np.zeros(dim, bool))
    assert problem(weights, None) is None
    assert (weights[601, :known] == round(0.9 / 1.03 * 128)).all()
    assert round(1 / 1.03 * 128) * known > LARGEST_SUM
    assert not weights[600].any()


@pytest.mark.parametrize(
    ("place", "value", "why"),
    [
        ((0, 1), 1, "earlier block"),
        ((5, 7), 1, "earlier block"),
        ((9, 0), -128, "within 127"),
        ((9, 9), -1, "where it cannot be"),
    ],
)
def test_weights_that_cannot_be_undone_are_named(
    place: tuple[int, int], value: int, why: str
) -> None:
    weights = some_weights(16, 50, np.random.default_rng(0), grid=True)
    assert problem(weights, (2, 2)) is None
    assert "where it cannot be" in str(problem(weights, None))
    weights[place] = value
    assert why in str(problem(weights, (2, 2)))


def test_weights_with_too_large_a_sum_are_named() -> None:
    _, weights = largest_sums()
    assert problem(weights, None) is None
    weights[-1, 517] = -1
    assert "add up to more than 65536" in str(problem(weights, None))


def test_weights_go_to_a_device_once() -> None:
    rng = np.random.default_rng(0)
    prediction = Prediction(torch.from_numpy(some_weights(8, 90, rng, grid=True)), (2, 2))
    batch = Tokens(torch.zeros(3, 4, 8, dtype=torch.int8), None, "compact", 8, prediction)
    one, other = (batch[part].to("meta") for part in (slice(1), slice(1, 3)))
    assert one.prediction is other.prediction
    assert (one.prediction.weights.device.type, one.prediction.grid) == ("meta", (2, 2))
    assert batch.to("cpu").prediction is prediction
