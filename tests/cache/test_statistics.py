"""Streaming moments and calibration against NumPy in float64 over all tokens at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preceptor.cache.encodings import ENCODINGS
from preceptor.cache.statistics import (
    Accumulator,
    CalibrationSums,
    Moments,
    calibration,
    floored,
)


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
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=6),
    dim=st.integers(1, 6),
    offset=st.sampled_from([0.0, 1e4]),
    seed=st.integers(0, 2**31),
)
def test_merged_parts_are_the_whole(lengths, dim: int, offset: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    parts = [(rng.standard_normal((n, dim)) + offset).astype(np.float32) for n in lengths]
    merged = Moments.empty(dim)
    for part in parts:
        sums = Accumulator(torch.full((dim,), offset + 0.5))
        for piece in np.array_split(part, 3):
            sums.add(torch.from_numpy(piece))
        moments = sums.moments()
        again = Moments.unpacked(moments.packed(), dim)
        assert again.count == moments.count
        assert (again.mean == moments.mean).all()
        assert np.allclose(again.scatter, moments.scatter, rtol=1e-12, atol=1e-12)
        merged = merged.merged(again)
    whole = np.concatenate(parts).astype(np.float64)
    assert merged.count == len(whole)
    if len(whole):
        assert np.allclose(merged.mean, whole.mean(0), rtol=1e-13)
        reference = (whole - whole.mean(0)).T @ (whole - whole.mean(0))
        assert np.allclose(merged.scatter, reference, rtol=1e-9, atol=1e-8)
        assert np.allclose(merged.covariance, reference / len(whole), rtol=1e-9, atol=1e-9)
        about = whole[0] - 2
        square = ((whole - about) ** 2).mean(0)
        assert np.allclose(merged.mean_square(about), square, rtol=1e-9, atol=1e-8)


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
    assert np.allclose(std, floored(fourth_root(x, np.where(zero, 0, wide.mean(0)))), rtol=1e-3)


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
    floor = 1e-4 * np.sqrt((gaussian**2).mean())
    assert np.allclose(std[2:], floor, rtol=1e-4)
    assert (calibration(sums_of(np.ones((3, 2), np.float32)))[1] == 1).all()


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


def test_a_vector_of_another_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match="not the moments of 3"):
        Moments.unpacked(np.zeros(5), 3)
