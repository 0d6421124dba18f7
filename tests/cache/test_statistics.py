"""Streaming moments against NumPy in float64 over all tokens at once."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preceptor.cache.encodings import ENCODINGS
from preceptor.cache.statistics import Accumulator, Moments, calibration


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


def test_calibration_keeps_dead_dimensions_from_being_blown_up() -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((500, 4)) * [1, 10, 1e-9, 0] + [0, 5, 7, 7]
    sums = Accumulator(torch.zeros(4))
    sums.add(torch.from_numpy(x.astype(np.float32)))
    mean, std = calibration(sums)
    assert mean.dtype == std.dtype == np.float32
    assert np.allclose(mean, x.mean(0), rtol=1e-5, atol=1e-6)
    assert np.allclose(std[:2], x.std(0)[:2], rtol=1e-5)
    floor = 1e-4 * np.sqrt((x.std(0) ** 2).mean())
    assert np.allclose(std[2:], floor, rtol=1e-4)
    still = Accumulator(torch.zeros(2))
    still.add(torch.ones(3, 2))
    assert (calibration(still)[1] == 1).all()


def test_rectified_dimensions_are_centred_on_their_zeros() -> None:
    rng = np.random.default_rng(1)
    x = np.maximum(rng.standard_normal((4000, 6)) * 3 - [4, 2, 0.2, -0.2, -9, -9], 0)
    x[:, 5] = x[:, 4] - 9  # as dense, and never exactly zero
    x = x.astype(np.float32)
    sums = Accumulator(torch.zeros(6))
    sums.add(torch.from_numpy(x))
    centre, std = calibration(sums)
    often = (x == 0).mean(0) >= 0.5
    assert often.tolist() == [True, True, True, False, False, False]
    assert np.allclose(centre, np.where(often, 0, x.mean(0, dtype=np.float64)), rtol=1e-6)
    around = np.sqrt(((x.astype(np.float64) - centre) ** 2).mean(0))
    assert np.allclose(std, around, rtol=1e-5)


def test_a_rectified_map_keeps_its_zeros_and_loses_under_one_percent() -> None:
    rng = np.random.default_rng(2)
    scale = np.exp(rng.standard_normal(640))
    x = np.maximum(rng.standard_normal((900, 640)) - 1.3, 0) * scale  # 90 % zeros
    x = x.astype(np.float32)
    sums = Accumulator(torch.zeros(640))
    sums.add(torch.from_numpy(x))
    centre, std = calibration(sums)
    int8 = ENCODINGS["int8"]
    decoded = int8.decode(int8.encode((x - centre) / std), 640) * std + centre
    assert (decoded[x == 0] == 0).all()
    assert np.linalg.norm(decoded - x) < 0.01 * np.linalg.norm(x)
    mean, deviation = x.mean(0), x.std(0)
    centred = int8.decode(int8.encode((x - mean) / deviation), 640) * deviation + mean
    assert np.linalg.norm(centred - x) > 2 * np.linalg.norm(decoded - x)


def test_a_vector_of_another_dimension_is_refused() -> None:
    with pytest.raises(ValueError, match="not the moments of 3"):
        Moments.unpacked(np.zeros(5), 3)
