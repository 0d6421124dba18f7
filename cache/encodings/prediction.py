"""Codes predicted from other codes, in integers; what is stored is the difference.

Dimensions of features are correlated, so a part of each code can be told from the others, as a
rotation to principal components would show; and what that leaves is correlated between neighbouring
tokens. The difference of integers can be undone without an error. The dimensions are cut into four
blocks. Codes of a block are predicted from those of the blocks before it by a matrix of small
integers; then every other token of the grid, as the black squares of a chessboard, from the four
beside it. The integers are fitted to the calibration sample and kept in the store. Every sum is one
of integers below 2^23, so that float32 holds it exactly in whatever order a library adds; NumPy and
torch on any device therefore give the same bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import numpy as np
import torch

from .base import Array, cast, namespace

BLOCKS = 4
UNIT = 128  # weights count in 1 / 128
LEVELS = 127
LARGEST_SUM = 1 << 16  # of the magnitudes of one dimension's weights
_RIDGE = 0.03  # of a Gaussian's variance: the rounding of codes, and other images than the sample
_WORTH = 0.9  # of the variance may be left, or the dimension is not predicted
_TOKENS = 1024  # at once, so that temporaries stay in the processor's cache
_TOKENS_ON_A_DEVICE = 1 << 16


def blocks(dim: int) -> list[tuple[int, int]]:
    """First dimension and end of every block that is predicted: all but the first."""
    width = -(-dim // BLOCKS)
    return [(start, min(start + width, dim)) for start in range(width, dim, width)]


@dataclass(frozen=True)
class Prediction:
    """How codes of a space are predicted.

    Attributes:
        weights: int8 ``[D, D]``, see :func:`fitted`; the diagonal belongs to neighbouring tokens,
            see :func:`neighbours`.
        grid: (height, width) of the tokens; None where they have none.
    """

    weights: Array
    grid: tuple[int, int] | None
    _elsewhere: dict[str, Prediction] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @classmethod
    def needed(cls, weights: np.ndarray, grid: tuple[int, int] | None) -> Prediction | None:
        """That of a space, without the parts that change nothing."""
        if not weights.any():
            return None
        return cls(torch.from_numpy(weights), grid if np.diagonal(weights).any() else None)

    def on(self, device: torch.device | str) -> Prediction:
        """The same on a device, of torch: copied there once, for every batch is restored there."""
        key = str(device)
        if key not in self._elsewhere:
            weights = self.weights.to(device)
            if weights is self.weights:
                return self
            self._elsewhere[key] = replace(self, weights=weights)
        return self._elsewhere[key]

    def residuals(self, codes: Array) -> Array:
        """What is stored for codes, int8 ``[..., N, D]`` in [-127, 127]: the same shape and range.

        Each is code - prediction, modulo 255.
        """
        return self._tokens(self._dimensions(codes, stored=False), stored=False)

    def restored(self, stored: Array) -> Array:
        """The codes whose :meth:`residuals` are given: int8 ``[..., N, D]``."""
        return self._dimensions(self._tokens(stored, stored=True), stored=True)

    def _dimensions(self, values: Array, *, stored: bool) -> Array:
        xp = namespace(values)
        factors = cast(self.weights, "float32").T / UNIT
        flat = values.reshape(-1, values.shape[-1])
        out = xp.empty_like(flat)
        step = _TOKENS_ON_A_DEVICE if _on_device(values) else _TOKENS
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

    def _tokens(self, values: Array, *, stored: bool) -> Array:
        if self.grid is None:
            return values
        xp = namespace(values)
        diagonal = cast(xp.diagonal(self.weights), "float32") / (4 * UNIT)
        if not stored:
            diagonal = -diagonal
        images = values.reshape(-1, *self.grid, values.shape[-1])
        out = xp.empty_like(images)
        tokens = _TOKENS_ON_A_DEVICE if _on_device(values) else _TOKENS
        step = max(1, tokens // (self.grid[0] * self.grid[1]))
        for first in range(0, len(images), step):
            padded = bordered(cast(images[first : first + step], "float32"))
            for centre, total in chequered(padded):
                centre[...] = _wrapped(centre + xp.round(total * diagonal))
            out[first : first + step] = cast(padded[:, 1:-1, 1:-1], "int8")
        return out.reshape(values.shape)


def bordered(images: Array) -> Array:
    """``[b, H, W, D]`` with a border of zeros: ``[b, H + 2, W + 2, D]``."""
    batch, height, width, dim = images.shape
    shape = (batch, height + 2, width + 2, dim)
    on_torch = isinstance(images, torch.Tensor)
    out = images.new_zeros(shape) if on_torch else np.zeros(shape, images.dtype)
    out[:, 1:-1, 1:-1] = images
    return out


def chequered(padded: Array) -> Iterator[tuple[Array, Array]]:
    """The tokens (y, x) with odd y + x, as views, and the sums of the four beside each.

    None of the four is such a token, so that the views may be changed as they come.

    Args:
        padded: ``[b, H + 2, W + 2, D]``, see :func:`bordered`.
    """
    for y, x in ((1, 2), (2, 1)):  # in the bordered image
        rows, columns = slice(y, -1, 2), slice(x, -1, 2)
        centre = padded[:, rows, columns]
        height, width = centre.shape[1:3]
        if not height or not width:
            continue
        above, below = (padded[:, y + d :: 2][:, :height, columns] for d in (-1, 1))
        left, right = (padded[:, rows, x + d :: 2][:, :, :width] for d in (-1, 1))
        yield centre, above + below + left + right


def _on_device(x: Array) -> bool:
    return isinstance(x, torch.Tensor) and x.device.type != "cpu"


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


def neighbours(left: np.ndarray, grid: tuple[int, int], rectified: np.ndarray) -> np.ndarray:
    """Weights of the tokens beside a token, by regression of each dimension on their mean.

    Args:
        left: int8 ``[b, N, D]``: what prediction from other dimensions leaves of some codes.
        grid: (height, width) of the N tokens.
        rectified: as for :func:`fitted`.

    Returns:
        int8 ``[D]`` in [0, 127]: of the sum of the four codes beside a token, in 1 / 512. Zero
        where prediction leaves nine tenths of the variance or more.
    """
    dim = left.shape[-1]
    cross, power, variance = np.zeros(dim), np.zeros(dim), np.zeros(dim)
    for image in left.reshape(-1, 1, *grid, dim):
        for centre, total in chequered(bordered(image.astype(np.float64))):
            cross += (centre * total).sum((0, 1, 2))
            power += (total * total).sum((0, 1, 2))
            variance += (centre * centre).sum((0, 1, 2))
    found = np.clip(np.rint(4 * UNIT * cross / np.maximum(power, 1)), 0, LEVELS)
    share = found / (4 * UNIT)
    worth = variance + share * (share * power - 2 * cross) < _WORTH * variance
    return np.where(worth & ~rectified, found, 0).astype(np.int8)


def problem(weights: np.ndarray, grid: tuple[int, int] | None) -> str | None:
    """Why weights are none: a sum that may not be exact, or a code predicted from later ones."""
    dim = len(weights)
    diagonal = np.diagonal(weights)
    if (diagonal < 0).any() or (grid is None and diagonal.any()):
        return "predict a token from others where it cannot be"
    allowed = np.eye(dim, dtype=bool)
    for start, end in blocks(dim):
        allowed[start:end, :start] = True
    if weights[~allowed].any():
        return "predict a code from one that is not in an earlier block"
    if int(np.abs(weights.astype(np.int64)).sum(1).max()) > LARGEST_SUM:
        return f"add up to more than {LARGEST_SUM}"
    if (weights < -LEVELS).any():
        return f"are not within {LEVELS}"
    return None
