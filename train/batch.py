"""One step's rows of the store, and what of them reaches the device."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..cache import Tokens
from ..pixels import normalise as normalised
from .alignment import Codes, Target
from .crops import crop_tokens
from .students import IMAGENET_MEAN, IMAGENET_STD


@dataclass(frozen=True)
class TrainBatch:
    """Rows of the store with the pixels they were computed from.

    Attributes:
        rows: int64 [b], row numbers of the store.
        pixels: uint8 [b, H, W, 3], the stored views at the student's size.
        tokens: encoded tokens [b, N, D] per space.
        regions: float32 [b, 4], the part of each stored view that the pixels show (left, top,
            right, bottom as shares of it); None where they show all of it.
        grids: (rows, columns) per space of tokens on a grid.
        skipped: what was wrong with each damaged row whose place another row took.
    """

    rows: Tensor
    pixels: Tensor
    tokens: dict[str, Tokens]
    regions: Tensor | None = None
    grids: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    skipped: tuple[str, ...] = ()


def to_device(batch: TrainBatch, device: torch.device) -> tuple[Tensor, dict[str, Target]]:
    """Normalised pixels [B, 3, H, W] and targets [B, N, D] per space, standardised as stored.

    Tokens travel as codes; int8 ones stay codes until the loss reads them, unless only a region of
    their grid is wanted.
    """
    targets: dict[str, Target] = {}
    regions = None if batch.regions is None else batch.regions.to(device, non_blocking=True)
    for name, tokens in batch.tokens.items():
        moved = tokens.to(device, non_blocking=True)
        if regions is not None and name in batch.grids:
            targets[name] = crop_tokens(moved.standardised(), batch.grids[name], regions)
        elif moved.encoding == "int8" and moved.scales is not None:
            targets[name] = Codes(moved.codes, moved.scales)
        else:
            targets[name] = moved.standardised()
    return normalise(batch.pixels, device), targets


def normalise(pixels: Tensor, device: torch.device) -> Tensor:
    """uint8 [b, H, W, 3] to float32 [b, 3, H, W] on `device`, by ImageNet's mean and deviation.

    The result is channels-last in memory, which convolutions prefer.
    """
    channels_first = pixels.permute(0, 3, 1, 2)
    return normalised(channels_first, IMAGENET_MEAN, IMAGENET_STD, device)
