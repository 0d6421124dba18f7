"""Mean and deviation of every dimension of every space, from a random sample of rows."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor


class Moments:
    """Streaming mean and variance of tokens, in float64.

    Batches are merged by the parallel formula of Chan, Golub and LeVeque (1979), which stays exact
    where a sum of squares would cancel (dimensions with a large common mean).
    """

    def __init__(self, dim: int) -> None:
        self.count = 0
        self.mean = np.zeros(dim)
        self._m2 = np.zeros(dim)

    def update(self, tokens: Tensor) -> None:
        """Add tokens [b, N, D] of any float dtype."""
        flat = tokens.detach().to("cpu", torch.float64).reshape(-1, tokens.shape[-1]).numpy()
        if not len(flat):
            return
        count, mean = len(flat), flat.mean(0)
        total = self.count + count
        shift = mean - self.mean
        self._m2 += ((flat - mean) ** 2).sum(0) + shift**2 * (self.count * count / total)
        self.mean = self.mean + shift * (count / total)
        self.count = total

    def std(self) -> np.ndarray:
        """Deviation [D], float64; a dimension that never moves gets 1, so that it stays zero."""
        std = np.sqrt(self._m2 / max(self.count, 1))
        return np.where(std > 1e-6 * max(float(std.max(initial=0.0)), 1e-30), std, 1.0)


def sample_rows(rows: int, wanted: int, seed: int) -> list[int]:
    """`wanted` distinct row numbers below `rows`, ascending, fixed by `seed`."""
    chosen = np.random.default_rng([seed, 0xCA11]).permutation(rows)[:wanted]
    return sorted(int(row) for row in chosen)


def update_all(moments: Mapping[str, Moments], tokens: Mapping[str, Tensor]) -> None:
    """Add one batch of tokens of several spaces."""
    for space, moment in moments.items():
        moment.update(tokens[space])
