"""Pixels on their way into a network."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

Channels = tuple[float, float, float]


def normalise(pixels: Tensor, mean: Channels, std: Channels, device: torch.device) -> Tensor:
    """uint8 [b, 3, h, w] to float32 [b, 3, h, w] on `device`, in the memory format that it has.

    Args:
        mean, std: of the red, green and blue channel, for pixels in [0, 1].
    """
    shift, scale = _moments(mean, std, device)
    return (pixels.to(device, non_blocking=True).float() - shift) / scale


@lru_cache(maxsize=64)
def _moments(mean: Channels, std: Channels, device: torch.device) -> tuple[Tensor, Tensor]:
    # Made once: a constant from the host makes a step wait for the device.
    with torch.inference_mode(False):
        shift, scale = (
            torch.tensor(side, dtype=torch.float32).view(1, 3, 1, 1) * 255.0 for side in (mean, std)
        )
        return shift.to(device), scale.to(device)
