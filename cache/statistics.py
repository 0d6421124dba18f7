"""Exact streaming mean and covariance in float64: what standardisation, PHI-S and PCA need.

Sums are taken of values shifted by the calibrated mean, one set a shard; shards are merged in
their order with the pairwise update of Chan, Golub & LeVeque (1979), so the result depends
neither on interruptions nor on which process extracted which shard.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch


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
    """

    def __init__(self, shift: torch.Tensor) -> None:
        self._shift = shift.double()
        self._count = 0
        self._sum = torch.zeros_like(self._shift)
        self._products = torch.zeros(len(shift), len(shift), dtype=torch.float64)

    def add(self, tokens: torch.Tensor) -> None:
        """Add tokens ``[..., D]`` of any float dtype."""
        if self._sum.device != tokens.device:
            self._shift = self._shift.to(tokens.device)
            self._sum = self._sum.to(tokens.device)
            self._products = self._products.to(tokens.device)
        shifted = tokens.reshape(-1, tokens.shape[-1]).double() - self._shift
        self._count += len(shifted)
        self._sum += shifted.sum(0)
        self._products.addmm_(shifted.T, shifted)

    def moments(self) -> Moments:
        offset = self._sum / max(self._count, 1)
        scatter = self._products - torch.outer(offset, self._sum)
        return Moments(self._count, (self._shift + offset).cpu().numpy(), scatter.cpu().numpy())


def calibration(moments: Moments) -> tuple[np.ndarray, np.ndarray]:
    """The float32 mean and deviation that standardise a space.

    A dimension that hardly moves would be blown up to noise, so deviations are at least 1e-4 of
    their root mean square; where nothing moves at all they are 1.
    """
    deviation = np.sqrt(np.maximum(np.diag(moments.scatter) / max(moments.count, 1), 0.0))
    floor = 1e-4 * np.sqrt(np.mean(deviation**2))
    deviation = np.maximum(deviation, floor) if floor > 0 else np.ones_like(deviation)
    return moments.mean.astype(np.float32), deviation.astype(np.float32)
