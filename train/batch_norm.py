"""Running statistics of batch norms that no training has set."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.optim.swa_utils import update_bn

IMAGES, BATCH = 512, 64
"""How many images settle the statistics, and how many of them at a time."""


def batch_norms(model: nn.Module) -> list[nn.Module]:
    """The batch norms of a model that keep statistics."""
    return [m for m in model.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]


def settling_images(count: int) -> list[NDArray[np.int64]]:
    """Positions among `count` images for `settle_batch_norms`: evenly spread, in equal batches."""
    chosen = min(count, IMAGES)
    if chosen > BATCH:
        chosen -= chosen % BATCH  # every batch counts alike
    spread = np.linspace(0, count - 1, chosen).astype(np.int64)
    return np.split(spread, range(BATCH, chosen, BATCH))


def settle_batch_norms(model: nn.Module, batches: Iterable[Tensor]) -> None:
    """Set the running statistics of a model's batch norms to the means of those of some batches.

    With the mean of 0 and the variance of 1 that they begin with, a network of random weights is in
    evaluation not what it is in training: its maps shrink or grow from layer to layer. Weights stay
    as they are and nothing is random: all but the batch norms is in evaluation mode, in which the
    model is left.

    Args:
        batches: normalised pixels [b, 3, H, W], where the model is.
    """
    with torch.no_grad():
        update_bn(batches, _NormsAlone(model.eval()))
    model.eval()


class _NormsAlone(nn.Module):
    """A model of which PyTorch's `update_bn` puts the batch norms alone into training mode; it
    would have the rest drop units and paths at random."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.norms = nn.ModuleList(batch_norms(model))
        self.run: Callable[[Tensor], Any] = model.__call__

    def forward(self, pixels: Tensor) -> Any:
        return self.run(pixels)
