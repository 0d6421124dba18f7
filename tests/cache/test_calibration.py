"""Calibration against NumPy in float64 over all tokens at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preceptor.cache.encodings import ENCODINGS
from preceptor.cache.statistics import CalibrationSums, calibration, floored


def sums_of(x: np.ndarray, parts: int = 1) -> CalibrationSums:
    """Sums as extraction takes them: around the mean of the first tokens."""
    sums = CalibrationSums(torch.from_numpy(x[:50].mean(0, dtype=np.float32)))
    for part in np.array_split(x, parts):
        sums.add(torch.from_numpy(part))
    return sums


def fourth_root(x: np.ndarray, centre: np.ndarray) -> np.ndarray:
    """The deviation of a Gaussian with the fourth moment of x about a centre: float64 [D]."""
    return (((x.astype(np.float64) - centre) ** 4).mean(0) / 3) ** 0.25


@settings(max_examples=50, deadline=None)
@given(
    count=st.integers(1, 200),
    offset=st.sampled_from([0.0, 1e4]),
    power=st.integers(1, 3),
    seed=st.integers(0, 2**31),
)
def test_fourth_moments_are_those_of_all_tokens(
    count: int, offset: float, power: int, seed: int
) -> None:
    """About the mean, zero for dimensions that are mostly so, and somewhere else."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((count, 5)) ** power * [1, 1, 3, 0.1, 0] + offset
    x = (x * (rng.random((count, 5)) < [1, 0.3, 1, 0.6, 1])).astype(np.float32)
    sums = sums_of(x, parts=3)
    wide = x.astype(np.float64)
    elsewhere = wide.mean(0) + np.array([1, -1, 3, 0.5, 2])
    for centre in (wide.mean(0), np.zeros(5), elsewhere):
        expected = ((wide - centre) ** 4).mean(0)
        shift = wide[:50].mean(0)
        reach = np.abs(wide - shift).max(0) + np.abs(shift - centre)  # what digits are lost to
        gap = np.abs(sums.fourth_moment(centre) - expected)
        assert (gap <= 1e-10 * expected + 1e-13 * reach**4).all()
    mean, std = calibration(sums)
    zero = (x == 0).mean(0) >= 0.5
    assert (sums.mostly_zero == zero).all()
    assert (mean == np.where(zero, 0, wide.mean(0).astype(np.float32))).all()
    expected = fourth_root(x, np.where(zero, 0, wide.mean(0)))
    # of a single token, what is left of rounding is nothing
    expected = np.where(expected < 2.0**-23 * np.abs(wide.mean(0)), 0, expected)
    typical = np.sqrt((expected**2).mean())
    if typical:
        typical = min(typical, 100 * np.median(expected[expected > 0]))
        expected = np.where(expected < 1e-4 * typical, typical, expected)
    else:
        expected[:] = np.sqrt((wide.mean(0) ** 2).mean()) or 1
    assert np.allclose(std, expected, rtol=1e-3)


def test_the_deviation_is_that_of_a_gaussian() -> None:
    rng = np.random.default_rng(3)
    x = (rng.standard_normal((200_000, 3)) * [0.01, 1, 100] + [0, -5, 1000]).astype(np.float32)
    mean, std = calibration(sums_of(x, parts=4))
    assert np.allclose(std, [0.01, 1, 100], rtol=0.01)
    assert np.allclose(mean, [0, -5, 1000], rtol=0.01, atol=1e-4)


def test_calibration_keeps_dead_dimensions_from_being_blown_up() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 4)) * [1, 10, 1e-9, 0] + [0, 5, 7, 7]
    mean, std = calibration(sums_of(x.astype(np.float32)))
    assert mean.dtype == std.dtype == np.float32
    assert np.allclose(mean, x.mean(0), rtol=1e-5, atol=1e-6)
    gaussian = fourth_root(x, x.mean(0))
    assert np.allclose(std[:2], gaussian[:2], rtol=1e-5)
    assert np.allclose(std[2:], np.sqrt((gaussian**2).mean()), rtol=1e-4)
    assert (calibration(sums_of(np.ones((3, 2), np.float32)))[1] == 1).all()


def test_a_few_massive_dimensions_do_not_pass_all_others_for_dead() -> None:
    """As in the residual stream of a ViT: two dimensions a million times as large as the others."""
    rng = np.random.default_rng(0)
    x = (rng.standard_normal((4000, 64)) * 0.01).astype(np.float32)
    x[:, [3, 40]] *= 1e6
    x[:, 5] = 0
    mean, std = calibration(sums_of(x))
    others = np.delete(np.arange(64), [3, 5, 40])
    assert np.allclose(std[others], 0.01, rtol=0.1)
    assert np.allclose(std[[3, 40]], 1e4, rtol=0.1)
    assert np.isclose(std[5], 1, rtol=0.1)  # 100 of the others: what it may be is not known
    found = decoded_by("int8", x, mean, std)
    assert relative_error(found[:, others], x[:, others]) < 0.02
    assert np.allclose(floored(x.std(0))[others], 0.01, rtol=0.1)  # and so training has them


@pytest.mark.parametrize("scale", [1e-30, 1e-3, 1.0, 1e30])
def test_what_does_not_move_is_measured_by_its_size(scale: float) -> None:
    """A sample of one token tells of no deviation, and the other tokens are still to be held."""
    rng = np.random.default_rng(0)
    later = ((3 + rng.standard_normal((500, 16))) * scale).astype(np.float32)
    mean, std = calibration(sums_of(later[:1]))
    assert np.allclose(std, np.sqrt((later[0].astype(np.float64) ** 2).mean()))
    found = decoded_by("int8", later, mean, std)
    assert relative_error(found / np.float32(scale), later / np.float32(scale)) < 0.01
    assert (calibration(sums_of(np.zeros((3, 2), np.float32)))[1] == 1).all()


def test_rounding_is_no_deviation() -> None:
    """The same image thrice, in batches that a teacher sums in another order."""
    rng = np.random.default_rng(0)
    x = np.repeat(rng.standard_normal((1, 16)) + 3, 3, 0).astype(np.float32)
    x[1] = np.nextafter(x[1], np.float32(9))
    assert (calibration(sums_of(x))[1] > 1).all()


def test_deviations_of_denormal_tokens_are_positive() -> None:
    x = np.zeros((12, 2), np.float32)
    x[5] = 2.0**-149
    assert (calibration(sums_of(x))[1] > 0).all()


@pytest.mark.parametrize("encoding", ["int8", "compact"])
def test_a_dimension_that_moves_after_the_sample_alone_spoils_no_token(encoding: str) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((4000, 64)).astype(np.float32)
    x[:1000, 7] = 0
    mean, std = calibration(sums_of(x[:1000]))
    later = x[1000:]
    assert relative_error(decoded_by(encoding, later, mean, std), later) < 0.05
    assert p1_cosine(decoded_by(encoding, later, mean, std), later) > 0.998


def test_rectified_dimensions_are_centred_on_their_zeros() -> None:
    rng = np.random.default_rng(1)
    x = np.maximum(rng.standard_normal((4000, 6)) * 3 - [4, 2, 0.2, -0.2, -9, -9], 0)
    x[:, 5] = x[:, 4] - 9  # as dense, and never exactly zero
    x = x.astype(np.float32)
    centre, std = calibration(sums_of(x))
    often = (x == 0).mean(0) >= 0.5
    assert often.tolist() == [True, True, True, False, False, False]
    assert np.allclose(centre, np.where(often, 0, x.mean(0, dtype=np.float64)), rtol=1e-6)
    assert np.allclose(std, fourth_root(x, centre), rtol=1e-5)


def decoded_by(encoding: str, x: np.ndarray, mean: np.ndarray, std: np.ndarray) -> np.ndarray:
    """What a store gives back of tokens [n, D] that it standardised so."""
    how = ENCODINGS[encoding]
    z = ((x - mean) / std).astype(np.float32)
    return how.decode(how.encode(z), x.shape[1]) * std + mean


def relative_error(found: np.ndarray, x: np.ndarray) -> float:
    return float(np.linalg.norm(found - x) / np.linalg.norm(x))


def p1_cosine(found: np.ndarray, x: np.ndarray) -> float:
    norms = np.linalg.norm(found, axis=1) * np.linalg.norm(x, axis=1)
    return float(np.percentile((found * x).sum(1) / norms, 1))


def test_a_rectified_map_keeps_its_zeros_and_loses_under_one_percent() -> None:
    rng = np.random.default_rng(2)
    scale = np.exp(rng.standard_normal(640))
    x = np.maximum(rng.standard_normal((900, 640)) - 1.3, 0) * scale  # 90 % zeros
    x = x.astype(np.float32)
    found = decoded_by("int8", x, *calibration(sums_of(x)))
    assert (found[x == 0] == 0).all()
    assert relative_error(found, x) < 0.01
    centred = decoded_by("int8", x, x.mean(0), x.std(0))
    assert relative_error(centred, x) > 2 * relative_error(found, x)


@pytest.mark.parametrize("seed", range(3))
def test_dimensions_that_fire_rarely_do_not_cost_the_others_their_digits(seed: int) -> None:
    """A rectified map of which some dimensions fire in four tokens of ten and others in a few of
    a thousand: 127 steps of a token's largest value, in units of s, are to do for all of them."""
    rng = np.random.default_rng(seed)
    often = np.exp(rng.uniform(np.log(0.002), np.log(0.4), 640))
    fires = rng.random((2000, 640)) < often
    x = (rng.gamma(1.5, size=fires.shape) * fires).astype(np.float32)
    mean, std = calibration(sums_of(x))
    assert not mean.any()
    rms = floored(np.sqrt((x.astype(np.float64) ** 2).mean(0)))
    found, before = decoded_by("int8", x, mean, std), decoded_by("int8", x, mean, rms)
    assert relative_error(found, x) < 0.01 < 0.015 < relative_error(before, x)
    assert p1_cosine(found, x) > 0.9995 > 0.9993 > p1_cosine(before, x)
    found, before = decoded_by("compact", x, mean, std), decoded_by("compact", x, mean, rms)
    assert p1_cosine(found, x) > 0.9995 > 0.9993 > p1_cosine(before, x)
