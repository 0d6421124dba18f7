"""Targets: stored tokens that stay codes where they can, and the units that they are learnt in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ...cache.statistics import floored
from ...errors import ConfigError, DataError

_ROUNDING = 2.0**-22
"""Of the size of values: what moves them less is not told from the rounding of float32."""


class Codes(NamedTuple):
    """Tokens that are still codes: int8 [B, N, D] times scales [B, N] times gain [D]."""

    codes: Tensor
    scales: Tensor
    gain: Tensor | None = None
    """Of every dimension; 1 where there is none, as in the store."""

    def decode(self) -> Tensor:
        """The tokens, float32 [B, N, D]."""
        z = self.codes.float() * self.scales.float().unsqueeze(-1)
        return z if self.gain is None else z * self.gain.float()


Target = Tensor | Codes
"""Tokens [B, N, D] of a space: floats, or codes that stay codes where they can."""


def floats(target: Target) -> Tensor:
    """The tokens as floats [B, N, D]."""
    return target.decode() if isinstance(target, Codes) else target


class SpaceMoments(Protocol):
    """Exact moments of a space's tokens; ``cache.statistics.Moments`` is one."""

    @property
    def mean(self) -> NDArray[np.float64]: ...
    @property
    def covariance(self) -> NDArray[np.float64]: ...
    def mean_square(self, centre: NDArray[np.float64]) -> NDArray[np.float64]: ...


class StoredSpace(Protocol):
    """What fits the units of a space; ``cache.Space`` is one."""

    @property
    def id(self) -> str: ...
    @property
    def mean(self) -> Tensor: ...
    @property
    def std(self) -> Tensor: ...
    def statistics(self) -> SpaceMoments: ...


class Standardised(nn.Module):
    """Every dimension with unit mean square about the store's centre. Codes stay codes.

    The store's z = (x - m) / s may have any s: the cache chooses it for its codes. With the exact
    mean mu and covariance C of a space's tokens x [D],

        y = gain * z = (x - m) / rms      gain_d = s_d / rms_d      rms_d^2 = C_dd + (mu_d - m_d)^2

    where no rms_d is less than 1e-4 of a typical one (``cache.statistics.floored``). Of a space
    that does not move at all they are 1.
    """

    gain: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("gain", torch.ones(dim))

    def fit(self, stored: StoredSpace) -> None:
        """Take the gain from the store's exact statistics."""
        centre, deviation = stored.mean.double().numpy(), stored.std.double().numpy()
        moments = stored.statistics()
        rms = np.sqrt(moments.mean_square(centre))
        rms = np.ones_like(rms) if _still(rms, moments) else floored(rms)
        self.gain.copy_(torch.from_numpy(deviation / rms))

    def forward(self, target: Target) -> Target:
        if isinstance(target, Codes):
            return Codes(target.codes, target.scales, self.gain)
        return target * self.gain

    def standardised(self, values: Tensor) -> Tensor:
        """The way back, to the units of the store."""
        return values / self.gain

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        # A run of an earlier version learnt the tokens as they were stored, and has no gain.
        state_dict.setdefault(f"{prefix}gain", torch.ones_like(self.gain))
        super()._load_from_state_dict(state_dict, prefix, *rest)


def _still(deviations: NDArray[np.float64], moments: SpaceMoments) -> bool:
    """Whether deviations [D] are nothing, but for rounding, beside the size of the tokens."""
    size = _ROUNDING * np.sqrt(np.mean(moments.mean**2))
    return not np.sqrt(np.mean(deviations**2)) > size


class Units(nn.Module):
    """The teacher's own units: x = std * z + mean."""

    mean: Tensor
    std: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(dim))
        self.register_buffer("std", torch.ones(dim))

    def fit(self, stored: StoredSpace) -> None:
        """Take the statistics that the store was standardised with."""
        self.mean.copy_(stored.mean)
        self.std.copy_(stored.std)

    def forward(self, target: Target) -> Target:
        return floats(target) * self.std + self.mean

    def standardised(self, values: Tensor) -> Tensor:
        """The way back, to the units of the store."""
        return (values - self.mean) / self.std


class PhiS(nn.Module):
    """PHI-S: the principal axes rotated so that all have one variance, and one scale for all.

    With the exact mean mu and covariance U diag(lambda) U^T of a space's tokens x [D],

        y = (1 / alpha) H U^T (x - mu)          alpha^2 = mean_i lambda_i

    where H is orthogonal and every entry of it squared is 1 / D (a Hadamard matrix over sqrt D), so
    that the variance of every y_i is (1 / alpha^2) sum_j lambda_j / D = 1, while distances are the
    teacher's up to the one factor. Standardisation has the former but not the latter.

    Where no Hadamard matrix of order D is at hand, H is a product of D - 1 plane rotations, each of
    which brings one variance to the mean (Schur-Horn): the same two properties.

    Source: Ranzinger et al. 2024, "PHI-S: Distribution Balancing for Label-Free Multi-Teacher
    Distillation", arXiv:2410.01680, section 3.
    """

    matrix: Tensor
    offset: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        # In the weights file: the eigenvectors of another machine may have other signs, and a run
        # that goes on there needs the axes that it began with.
        self.register_buffer("matrix", torch.eye(dim))
        self.register_buffer("offset", torch.zeros(dim))

    def fit(self, stored: StoredSpace) -> None:
        """Take the axes of the store's exact covariance.

        Raises:
            DataError: the tokens do not vary.
        """
        moments = stored.statistics()
        values, vectors = np.linalg.eigh(moments.covariance)
        values = np.maximum(values, 0.0)
        alpha = np.sqrt(values.mean())
        if _still(np.sqrt(values), moments):
            raise DataError(
                f"align.targets=phis: the tokens of {stored.id} do not vary in this store; "
                "leave it out by align.spaces, or choose other targets"
            )
        rotation = equal_variance_rotation(values) @ vectors.T / alpha
        # From the units of the store, x = std * z + mean, in one affine map.
        mean, std = stored.mean.double().numpy(), stored.std.double().numpy()
        self.matrix.copy_(torch.from_numpy(rotation * std))
        self.offset.copy_(torch.from_numpy(rotation @ (mean - moments.mean)))

    def forward(self, target: Target) -> Target:
        values = floats(target).to(self.matrix.dtype)
        with torch.autocast(values.device.type, enabled=False):  # it would round the targets
            return nn.functional.linear(values, self.matrix, self.offset)

    def standardised(self, values: Tensor) -> Tensor:
        """The way back, to the units of the store."""
        # The columns are orthogonal: the inverse is the transpose over their squared lengths.
        inverse = self.matrix / self.matrix.square().sum(0)
        return (values - self.offset) @ inverse


TARGETS: dict[str, type[Standardised | Units | PhiS]] = {
    "standardise": Standardised,
    "phis": PhiS,
    "none": Units,
}


def build_units(
    kind: str, dim: int, stored: Callable[[], StoredSpace] | None
) -> Standardised | Units | PhiS:
    """The units of one space, fitted to the store; unfitted where none is given (a loaded run finds
    them in its weights).

    Raises:
        ConfigError: no such units.
    """
    if kind not in TARGETS:
        raise ConfigError(f"align.targets={kind}: valid are {', '.join(TARGETS)}")
    units = TARGETS[kind](dim)
    if stored is not None:
        units.fit(stored())
    return units


def equal_variance_rotation(variances: NDArray[np.float64]) -> NDArray[np.float64]:
    """Orthogonal R [D, D] for which R diag(variances) R^T has one value along its diagonal."""
    dim = len(variances)
    signs = hadamard(dim)
    if signs is not None:
        return signs / np.sqrt(dim)
    rotation = np.eye(dim)
    matrix = np.diag(np.asarray(variances, dtype=np.float64))
    mean = float(np.mean(variances))
    for done in range(dim - 1):
        diagonal = np.diag(matrix)[done:]
        low, high = done + int(np.argmin(diagonal)), done + int(np.argmax(diagonal))
        if low == high:  # all equal
            break
        # The rotation of axes low and high after which axis low has the mean variance:
        # a c^2 - 2 b c s + d s^2 = mean, a quadratic in t = s / c.
        a, b, d = matrix[low, low], matrix[low, high], matrix[high, high]
        if d - mean <= 0 or mean - a <= 0:
            break
        t = (b + np.sqrt(b * b + (d - mean) * (mean - a))) / (d - mean)
        c = 1 / np.sqrt(1 + t * t)
        turn = np.array([[c, -t * c], [t * c, c]])
        pair = [low, high]
        rotation[pair] = turn @ rotation[pair]
        matrix[pair] = turn @ matrix[pair]
        matrix[:, pair] = matrix[:, pair] @ turn.T
        order = [done, low]
        if low != done:  # the finished axis goes to the front
            rotation[order] = rotation[order[::-1]]
            matrix[order] = matrix[order[::-1]]
            matrix[:, order] = matrix[:, order[::-1]]
    return rotation


def hadamard(order: int) -> NDArray[np.float64] | None:
    """A Hadamard matrix (entries +-1, rows orthogonal) by the constructions of Sylvester and Paley;
    None where these give none of this order."""
    half = order // 2
    if order in (1, 2):
        return np.array([[1.0, 1.0], [1.0, -1.0]])[:order, :order]
    if order % 4:
        return None
    if _is_prime(order - 1):  # order - 1 = 3 mod 4: Paley's first
        return np.eye(order) + _bordered(order - 1, -1)
    smaller = hadamard(half)
    if smaller is not None:
        return np.kron(np.array([[1.0, 1.0], [1.0, -1.0]]), smaller)
    if half % 4 == 2 and _is_prime(half - 1):  # half - 1 = 1 mod 4: Paley's second
        conference, one = _bordered(half - 1, 1), np.eye(half)
        return np.block(
            [[conference + one, conference - one], [conference - one, -conference - one]]
        )
    return None


def _bordered(prime: int, corner: int) -> NDArray[np.float64]:
    """The quadratic-residue (Jacobsthal) matrix of a prime with a border of ones."""
    residues = np.full(prime, -1.0)
    residues[np.arange(1, prime) ** 2 % prime] = 1.0
    residues[0] = 0.0
    index = np.arange(prime)
    bordered = np.zeros((prime + 1, prime + 1))
    bordered[1:, 1:] = residues[(index[:, None] - index[None, :]) % prime]
    bordered[0, 1:], bordered[1:, 0] = 1.0, corner
    return bordered


def _is_prime(number: int) -> bool:
    return number > 1 and all(number % d for d in range(2, int(number**0.5) + 1))
