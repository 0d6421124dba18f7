"""Encodings against float64 arithmetic, and torch against NumPy bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from preceptor.cache.encodings import ENCODINGS, Encoding, encoding
from preceptor.cache.encodings.base import folded_sum, round_up_to_half, to_numpy
from preceptor.errors import StoreError

EACH = pytest.mark.parametrize("how", ENCODINGS.values(), ids=ENCODINGS.keys())


@st.composite
def adversarial(draw: st.DrawFn) -> np.ndarray:
    """Tokens ``[rows, N, D]`` with massive dimensions, outliers, constants, zeros, denormals."""
    rows, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    dim = draw(st.sampled_from([1, 2, 3, 63, 64, 65, 130]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    z = rng.standard_normal((rows, tokens, dim))
    z *= draw(st.sampled_from([1.0, 1e-3, 1e3, 1e-30, 1e-41, 100.0]))
    if draw(st.booleans()):
        z[..., rng.integers(dim)] *= draw(st.sampled_from([1e2, 1e4, 0.0]))
    if draw(st.booleans()):
        z[rng.integers(rows), rng.integers(tokens)] *= draw(st.sampled_from([50.0, 1e-6, 0.0]))
    if draw(st.booleans()):
        z[rng.integers(rows), rng.integers(tokens)] = draw(
            st.floats(-6e4, 6e4, width=32, allow_subnormal=True)
        )
    return np.clip(z, -65504, 65504).astype(np.float32)


@EACH
@settings(max_examples=40, deadline=None)
@given(z=adversarial())
def test_the_error_is_within_the_bound_that_is_stated(how: Encoding, z: np.ndarray) -> None:
    decoded = how.decode(how.encode(z), z.shape[-1])
    error = np.abs(decoded.astype(np.float64) - z.astype(np.float64))
    assert (error <= how.bound(z).astype(np.float64)).all()


@EACH
def test_no_tokens_are_no_special_case(how: Encoding) -> None:
    """As of a part of a shard whose images are all corrupt."""
    for z in (np.zeros((0, 3, 70), np.float32), torch.zeros(0, 3, 70)):
        parts = how.encode(z)
        assert all(len(part) == 0 for part in parts.values())
        assert how.decode(parts, 70).shape == z.shape
        assert how.bound(z).shape[0] == 0


@EACH
@settings(max_examples=40, deadline=None)
@given(z=adversarial())
def test_torch_and_numpy_give_the_same_bits(how: Encoding, z: np.ndarray) -> None:
    ours = how.encode(z)
    theirs = how.encode(torch.from_numpy(z))
    assert ours.keys() == theirs.keys()
    for name, part in ours.items():
        assert part.dtype == to_numpy(theirs[name]).dtype
        assert part.tobytes() == to_numpy(theirs[name]).tobytes(), name
    decoded = how.decode(theirs, z.shape[-1])
    assert how.decode(ours, z.shape[-1]).tobytes() == decoded.numpy().tobytes()
    assert how.bound(z).tobytes() == how.bound(torch.from_numpy(z)).numpy().tobytes()


@EACH
@settings(max_examples=40, deadline=None)
@given(z=adversarial())
def test_shapes_are_those_declared_and_fill_values_never_occur(
    how: Encoding, z: np.ndarray
) -> None:
    parts = how.encode(z)
    declared = how.components(*z.shape[1:])
    assert [part.name for part in declared] == list(parts)
    for component in declared:
        part = parts[component.name]
        assert part.shape == (len(z), *component.row_shape)
        assert part.dtype == np.dtype(component.dtype)
        if np.isnan(component.fill):
            assert np.isfinite(part).all()
        else:
            assert (part != component.fill).all()


@EACH
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38])
def test_what_cannot_be_encoded_is_found(how: Encoding, value: float) -> None:
    z = np.ones((3, 4, 5), np.float32)
    assert how.refused(z) is None
    assert how.refused(torch.from_numpy(z)) is None
    z[2, 1, 4] = value
    assert how.refused(z) == (2, 1)
    assert how.refused(torch.from_numpy(z)) == (2, 1)


@EACH
def test_the_limit_itself_can_be_encoded(how: Encoding) -> None:
    z = np.full((1, 1, 3), how.limit, np.float32)
    assert how.refused(z) is None
    assert np.abs(how.decode(how.encode(z), 3) / z - 1).max() < 0.01


def test_int8_is_the_formula_in_float64() -> None:
    z = np.random.default_rng(0).standard_normal((4, 8, 48)).astype(np.float32)
    parts = encoding("int8").encode(z)
    scales = parts["scales"].astype(np.float64)
    exact = np.abs(z.astype(np.float64)).max(-1) / 127
    assert (scales >= exact * (1 - 1e-7)).all()
    assert (np.nextafter(parts["scales"], np.float16(0)).astype(np.float64) < exact).all()
    expected = np.rint(z.astype(np.float64) / scales[..., None])
    near_half = np.abs(np.abs(z / scales[..., None] % 1) - 0.5) < 1e-4
    assert ((parts["codes"] == expected) | near_half).all()


@pytest.mark.parametrize("step", [15 / 128, 1 / 8, 3 / 128, None])
@settings(max_examples=25, deadline=None)
@given(z=adversarial())
def test_compact_is_the_formula_in_float64(step: float | None, z: np.ndarray) -> None:
    how = encoding("compact").with_step(step)
    parts, exact = how.encode(z), z.astype(np.float64)
    part = 1 / 8 if step is None else step
    wanted = np.maximum(part * np.sqrt((exact**2).mean(-1)), np.abs(exact).max(-1) / 127)
    wanted = np.clip(wanted, 2.0**-24, 65504)
    scales = parts["scales"].astype(np.float64)
    below = np.nextafter(parts["scales"], np.float16(0)).astype(np.float64)
    # the least half that is not below, but for the rounding of a few float32 operations
    assert (scales >= wanted * (1 - 1e-6)).all()
    assert (below < wanted * (1 + 1e-6)).all()
    exact /= scales[..., None]
    near_half = np.abs(np.abs(exact) % 1 - 0.5) < 1e-4
    assert ((parts["codes"] == np.clip(np.rint(exact), -127, 127)) | near_half).all()
    in_torch = how.encode(torch.from_numpy(z))
    assert all(part.tobytes() == in_torch[n].numpy().tobytes() for n, part in parts.items())
    decoded = how.decode(parts, z.shape[-1])
    assert decoded.tobytes() == encoding("compact").decode(parts, z.shape[-1]).tobytes()


@pytest.mark.parametrize(("name", "worst"), [("fp16", 0.0005), ("int8", 0.01), ("compact", 0.0345)])
def test_relative_error_of_gaussian_tokens(name: str, worst: float) -> None:
    z = np.random.default_rng(1).standard_normal((2, 64, 384)).astype(np.float32)
    decoded = encoding(name).decode(encoding(name).encode(z), 384)
    errors = np.linalg.norm(decoded - z, axis=-1) / np.linalg.norm(z, axis=-1)
    assert errors.max() < worst * 1.1
    assert np.linalg.norm(decoded - z) / np.linalg.norm(z) < worst


def test_compact_keeps_its_relative_error_beside_an_outlier() -> None:
    z = np.random.default_rng(2).standard_normal((1, 32, 384)).astype(np.float32)
    z[..., 5] = 12.0  # a massive dimension: 12 standard deviations
    decoded = encoding("compact").decode(encoding("compact").encode(z), 384)
    cosine = (decoded * z).sum(-1) / np.linalg.norm(decoded, axis=-1) / np.linalg.norm(z, axis=-1)
    assert cosine.min() > 0.999


@settings(max_examples=100, deadline=None)
@given(st.floats(0, 65504, width=32, allow_subnormal=True))
def test_rounding_up_to_half_is_the_least_half_not_below(value: float) -> None:
    x = np.array([value], np.float32)
    half = round_up_to_half(x)
    assert float(half[0]) >= value
    assert value == 0 or float(np.nextafter(half[0], np.float16(-1))) < value
    assert round_up_to_half(torch.from_numpy(x)).numpy().tobytes() == half.tobytes()


@pytest.mark.parametrize("length", [1, 2, 3, 5, 64, 100])
def test_folded_sum_adds_everything(length: int) -> None:
    x = np.random.default_rng(length).standard_normal((3, length)).astype(np.float32)
    reference = x.astype(np.float64).sum(-1, keepdims=True)
    assert np.allclose(folded_sum(x), reference, atol=1e-5)


def test_an_unknown_encoding_is_answered_with_those_there_are() -> None:
    with pytest.raises(StoreError, match="fp16, int8, compact, int4"):
        encoding("int9")
