"""What linear probes of the tokens of a grid have in common: a strength, and scores of pixels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch.nn import functional

from .base import Array, Protocol, T, choose, defined
from .linear import STRENGTHS, check_strengths
from .ridge import AffineMap, RidgeSums

_CHUNK = 4_000_000  # outputs of pixels that are held at once
_TOKENS = 32_000_000  # numbers of tokens that are held at once


@dataclass(frozen=True)
class GridProbe(Protocol[T]):
    """A linear map from each token, resized from the grid to the maps and judged on their pixels.

    Attributes:
        strengths: L2 strengths to choose from; the first of the best.
    """

    reads: ClassVar[str] = "grid"
    named: ClassVar[str]
    """In messages."""

    strengths: Sequence[float] = STRENGTHS

    def __post_init__(self) -> None:
        check_strengths(self.named, self.strengths)

    def chosen(
        self, ridge: RidgeSums, validation: Callable[[AffineMap], float]
    ) -> tuple[float, float | None]:
        """The best of the strengths, and what the held-out images say of it."""
        scores = {(s,): validation(ridge.solve(s)) for s in self.strengths}
        best = choose(scores)
        return best[0], defined(scores[best])


def over_images(
    tokens: Array, outputs: int, images: NDArray[np.int64] | None = None
) -> list[NDArray[np.int64]]:
    """Positions of images, in parts that bound what is held at once.

    Args:
        tokens: [n, N, K].
        outputs: numbers that are held for each image beside its tokens.
        images: some of the n; all of them without.
    """
    most = max(1, min(_CHUNK // outputs, _TOKENS // tokens[0].size))
    chosen = np.arange(len(tokens)) if images is None else images
    return np.split(chosen, range(most, len(chosen), most))


def pixel_scores(
    probe: AffineMap, tokens: Array, grid: tuple[int, int], size: tuple[int, int]
) -> NDArray[np.float32]:
    """Outputs of tokens [b, N, K], resized bilinearly from their grid: float32 [b, T, *size]."""
    scores = torch.from_numpy(probe.scores(tokens)).transpose(1, 2).unflatten(2, grid)
    resized: NDArray[np.float32] = functional.interpolate(scores, size, mode="bilinear").numpy()
    return resized
