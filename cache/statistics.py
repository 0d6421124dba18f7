"""Exact streaming mean and covariance in float64: what standardisation, PHI-S and PCA need.

Sums are taken of values shifted by the calibrated mean, one set a shard; shards are merged in
their order with the pairwise update of Chan, Golub & LeVeque (1979), so the result depends
neither on interruptions nor on which process extracted which shard.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from .encodings.prediction import Prediction, fitted, neighbours
from .plan import SpaceSpec


@dataclass(frozen=True)
class Moments:
    """Count, mean and sum of squared deviations of token vectors.

    Attributes:
        count: number of tokens.
        mean: float64 ``[D]``.
        scatter: float64 ``[D, D]``: sum of (x - mean)(x - mean)^T.
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @property
    def covariance(self) -> np.ndarray:
        """Population covariance (divisor: count), float64 ``[D, D]``."""
        return self.scatter / max(self.count, 1)

    @classmethod
    def empty(cls, dim: int) -> Moments:
        return cls(0, np.zeros(dim), np.zeros((dim, dim)))

    def merged(self, other: Moments) -> Moments:
        """The moments of both sets of tokens together."""
        if not self.count or not other.count:
            return other if other.count else self
        count = self.count + other.count
        delta = other.mean - self.mean
        mean = self.mean + delta * (other.count / count)
        weight = self.count * other.count / count
        return Moments(
            count, mean, self.scatter + other.scatter + np.multiply.outer(delta, delta) * weight
        )

    def packed(self) -> np.ndarray:
        """float64 vector: count, mean, upper triangle of the scatter, row by row."""
        upper = self.scatter[np.triu_indices(len(self.mean))]
        return np.concatenate([[float(self.count)], self.mean, upper]).astype("<f8")

    @classmethod
    def unpacked(cls, vector: np.ndarray, dim: int) -> Moments:
        """The inverse of :meth:`packed`.

        Raises:
            ValueError: when the length does not fit ``dim``.
        """
        if vector.shape != (1 + dim + dim * (dim + 1) // 2,):
            raise ValueError(f"{vector.size} numbers are not the moments of {dim} dimensions")
        upper = np.zeros((dim, dim))
        upper[np.triu_indices(dim)] = vector[1 + dim :]
        scatter = upper + np.triu(upper, 1).T
        return cls(int(vector[0]), vector[1 : 1 + dim].copy(), scatter)


class Accumulator:
    """Sums over batches of tokens, on the device where the tokens are.

    Args:
        shift: float32 ``[D]`` near the mean, so that the sums lose no digits.

    Attributes:
        count: how many tokens were added.
    """

    def __init__(self, shift: torch.Tensor) -> None:
        self._shift = shift.double()
        self.count = 0
        self._sum = torch.zeros_like(self._shift)
        self._zeros = torch.zeros(len(shift), dtype=torch.int64)
        self._products = torch.zeros(len(shift), len(shift), dtype=torch.float64)

    def add(self, tokens: torch.Tensor) -> None:
        """Add tokens ``[..., D]`` of any float dtype."""
        if self._sum.device != tokens.device:
            self._shift = self._shift.to(tokens.device)
            self._sum = self._sum.to(tokens.device)
            self._zeros = self._zeros.to(tokens.device)
            self._products = self._products.to(tokens.device)
        flat = tokens.reshape(-1, tokens.shape[-1])
        self._zeros += (flat == 0).sum(0)
        shifted = flat.double() - self._shift
        self.count += len(shifted)
        self._sum += shifted.sum(0)
        self._products.addmm_(shifted.T, shifted)

    @property
    def zeros(self) -> np.ndarray:
        """int64 ``[D]``: how many values were exactly zero."""
        return self._zeros.cpu().numpy()

    def moments(self) -> Moments:
        offset = self._sum / max(self.count, 1)
        scatter = self._products - torch.outer(offset, self._sum)
        return Moments(self.count, (self._shift + offset).cpu().numpy(), scatter.cpu().numpy())


def calibration(sums: Accumulator) -> tuple[np.ndarray, np.ndarray]:
    """The float32 centre and deviation that standardise a space, from a sample of its tokens.

    The centre is the mean; but zero for a dimension that is exactly zero in at least half of the
    tokens, as behind a rectifier: its zeros are then stored without an error, which is what an
    8-bit code with one scale a token owes to a token that is nearly empty. The deviation is around
    the centre. A dimension that hardly moves would be blown up to noise, so deviations are at
    least 1e-4 of their root mean square; where nothing moves at all they are 1.
    """
    moments = sums.moments()
    centre = np.where(2 * sums.zeros >= max(moments.count, 1), 0.0, moments.mean)
    square = np.diag(moments.scatter) / max(moments.count, 1) + (moments.mean - centre) ** 2
    deviation = np.sqrt(np.maximum(square, 0.0))
    floor = 1e-4 * np.sqrt(np.mean(deviation**2))
    deviation = np.maximum(deviation, floor) if floor > 0 else np.ones_like(deviation)
    return centre.astype(np.float32), deviation.astype(np.float32)


SAMPLE_ROWS = 32
"""So many rows show how alike neighbouring tokens are."""


def prediction_weights(
    space: SpaceSpec, moments: Moments, mean: np.ndarray, std: np.ndarray, tokens: torch.Tensor
) -> np.ndarray:
    """Weights that predict codes of a space from each other, from a sample of its tokens.

    Args:
        moments: of the sample, in the teacher's units.
        mean, std: float32 ``[D]``: the calibration that standardises it.
        tokens: ``[b, N, D]`` of SAMPLE_ROWS of its rows or fewer, in the teacher's units.

    Returns:
        int8 ``[D, D]``, see :class:`encodings.prediction.Prediction`; a dimension whose centre is
        zero, as :func:`calibration` has it for a rectified one, is not predicted.
    """
    scale, rectified = std.astype(np.float64), mean == 0
    covariance = moments.covariance / np.outer(scale, scale)
    weights = fitted(covariance, moments.count, rectified)
    if space.grid is not None:
        z = (tokens.detach().cpu().float().numpy() - mean) / std
        codes = space.how.encode(z)["codes"]
        left = Prediction(weights, None).residuals(codes)
        np.fill_diagonal(weights, neighbours(left, space.grid, rectified))
    return weights
