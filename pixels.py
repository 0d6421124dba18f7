"""Pixels on their way into a network."""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

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


def not_whole_patches(network: Any, size: tuple[int, int]) -> str | None:
    """What is wrong with an input of which a network's patches would leave out the last pixels.

    Args:
        network: of timm or open_clip.
        size: (height, width) of the input.

    Returns:
        A sentence that names the next sizes that are whole; None where nothing is left out.
    """
    embed = getattr(network, "patch_embed", network)
    patch = getattr(embed, "patch_size", None)
    patch = (patch, patch) if isinstance(patch, int) else patch
    if not isinstance(patch, tuple | list) or getattr(embed, "dynamic_img_pad", False):
        return None
    patch = tuple(map(int, patch))
    if getattr(getattr(embed, "proj", None), "stride", patch) != patch:  # patches that overlap
        return None
    if all(side % edge == 0 for side, edge in zip(size, patch, strict=True)):
        return None
    below, above = (
        [step(side / edge) * edge for side, edge in zip(size, patch, strict=True)]
        for step in (math.floor, math.ceil)
    )
    choices = [" x ".join(map(str, sides)) for sides in (below, above) if all(sides)]
    return (
        f"{size[0]} x {size[1]} pixels are no whole patches of {patch[0]} x {patch[1]}; say "
        f"{' or '.join(choices)}"
    )


@lru_cache(maxsize=64)
def _moments(mean: Channels, std: Channels, device: torch.device) -> tuple[Tensor, Tensor]:
    # Made once: a constant from the host makes a step wait for the device.
    with torch.inference_mode(False):
        shift, scale = (
            torch.tensor(side, dtype=torch.float32).view(1, 3, 1, 1) * 255.0 for side in (mean, std)
        )
        return shift.to(device), scale.to(device)
