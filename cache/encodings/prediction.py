"""Codes predicted from other codes of their token, in integers; what is stored is the difference.

Dimensions of features are correlated, so a part of each code can be told from the others, as a
rotation to principal components would show; but the difference of integers can be undone without
an error. The dimensions are cut into four blocks. Codes of a block are predicted from those of the
blocks before it by a matrix of small integers, fitted to the calibration sample and kept in the
store. Every sum is one of integers below 2^23, so that float32 holds it exactly in whatever order
a library adds; NumPy and torch on any device therefore give the same bits.
"""

from __future__ import annotations

import numpy as np
import torch

from .base import Array, cast, namespace

BLOCKS = 4
UNIT = 128  # weights count in 1 / 128
LEVELS = 127
LARGEST_SUM = 1 << 16  # of the magnitudes of one dimension's weights
_RIDGE = 0.03  # of a dimension's variance: the rounding of codes, and other images than the sample
_WORTH = 0.9  # of the variance may be left, or the dimension is not predicted
_TOKENS = 1024  # at once, so that temporaries stay in the processor's cache
_TOKENS_ON_A_DEVICE = 1 << 16


def blocks(dim: int) -> list[tuple[int, int]]:
    """First dimension and end of every block that is predicted: all but the first."""
    width = -(-dim // BLOCKS)
    return [(start, min(start + width, dim)) for start in range(width, dim, width)]


def residuals(codes: Array, weights: Array) -> Array:
    """What is stored for codes.

    Args:
        codes: int8 ``[..., D]`` in [-127, 127].
        weights: int8 ``[D, D]``, see :func:`fitted`.

    Returns:
        int8 ``[..., D]`` in [-127, 127]: code - prediction, modulo 255.
    """
    return _block_by_block(codes, weights, stored=False)


def restored(stored: Array, weights: Array) -> Array:
    """The codes whose :func:`residuals` are given: int8 ``[..., D]``."""
    return _block_by_block(stored, weights, stored=True)


def _block_by_block(values: Array, weights: Array, *, stored: bool) -> Array:
    xp = namespace(values)
    factors = cast(weights, "float32").T / UNIT
    flat = values.reshape(-1, values.shape[-1])
    out = xp.empty_like(flat)
    on_device = xp is torch and flat.device.type != "cpu"
    step = _TOKENS_ON_A_DEVICE if on_device else _TOKENS
    for first in range(0, len(flat), step):
        part = slice(first, first + step)
        found = cast(flat[part], "float32")
        known = found if stored else cast(flat[part], "float32")
        for start, end in blocks(values.shape[-1]):
            predicted = _predicted(known[:, :start], factors[:start, start:end])
            if not stored:
                predicted = -predicted
            found[:, start:end] = _wrapped(found[:, start:end] + predicted)
        out[part] = cast(found, "int8")
    return out.reshape(values.shape)


def _predicted(codes: Array, factors: Array) -> Array:
    if isinstance(codes, torch.Tensor):
        with torch.autocast(codes.device.type, enabled=False):  # it would round the sums
            return (codes @ factors).round_().clamp_(-LEVELS, LEVELS)
    return np.clip(np.rint(codes @ factors), -LEVELS, LEVELS)


def _wrapped(x: Array) -> Array:
    """Whole numbers of magnitude up to 254, modulo 255, in [-127, 127]."""
    xp = namespace(x)
    span = 2 * LEVELS + 1
    return x - span * xp.round(x * (1 / span))  # never near a half: 127 / 255 and 128 / 255


def fitted(covariance: np.ndarray, count: int, rectified: np.ndarray) -> np.ndarray:
    """Weights for a space, by ridge regression of each block on the blocks before it.

    Args:
        covariance: float64 ``[D, D]`` of the sample's standardised tokens.
        count: how many tokens the sample had.
        rectified: bool ``[D]``: dimensions that are mostly zero, and compress well as they are.

    Returns:
        int8 ``[D, D]`` in [-127, 127]: code d is predicted as the sum over e of weights[d, e]
        times code e, over 128. A row is zero where prediction does not pay: the dimension is
        rectified or hardly moves, or the variance to expect on other tokens, by the sample's
        times (count + n) / (count - n) for n predictors, is above nine tenths of the dimension's.
    """
    dim = len(covariance)
    weights = np.zeros((dim, dim), np.int8)
    for start, end in blocks(dim):
        if count <= start:
            break
        among, across = covariance[:start, :start], covariance[:start, start:end]
        exact = np.linalg.solve(among + _RIDGE * np.eye(start), across)
        found = np.clip(np.rint(exact * UNIT), -LEVELS, LEVELS)
        shares = found / UNIT
        variance = np.diag(covariance)[start:end]
        left = variance + (shares * (among @ shares - 2 * across)).sum(0)
        worth = left * (count + start) < _WORTH * variance * (count - start)
        worth &= ~rectified[start:end] & (np.abs(found).sum(0) <= LARGEST_SUM)
        weights[start:end, :start] = np.where(worth, found, 0).T
    return weights


def problem(weights: np.ndarray) -> str | None:
    """Why weights are none: a sum that may not be exact, or a code predicted from later ones."""
    dim = len(weights)
    allowed = np.zeros((dim, dim), bool)
    for start, end in blocks(dim):
        allowed[start:end, :start] = True
    if weights[~allowed].any():
        return "predict a code from one that is not in an earlier block"
    if int(np.abs(weights.astype(np.int64)).sum(1).max()) > LARGEST_SUM:
        return f"add up to more than {LARGEST_SUM}"
    if (weights < -LEVELS).any():
        return f"are not within {LEVELS}"
    return None
