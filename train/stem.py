"""Weights trained on pixels of another normalisation, made to expect a student's pixels."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import timm
import torch
from lightning_fabric.utilities.rank_zero import rank_zero_only
from timm.models.eva import Eva
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from ..pixels import Channels

CONFIG = "config.json"
"""What timm keeps beside weights, with their normalisation."""


def expect(
    model: Any,
    mean: Channels,
    std: Channels,
    *,
    name: str,
    checkpoint: str | None,
    run: str,
    size: tuple[int, int],
) -> None:
    """Have a model that starts from given weights take pixels normalised by `mean` and `std`.

    Where these are not the ones that the weights were trained with, the difference goes into the
    first layer, exactly; where it cannot, and where nobody says what the weights were trained with,
    standard error says so. That is no error: the weights are only where training begins.

    Args:
        model: with its weights loaded, timm's or those of `checkpoint`.
        name: of the model in timm, with the tag of its weights if it was given one.
        run: file that lies beside the weights of a trained student, which expect such pixels.
        size: (height, width) of the input.
    """
    own: Mapping[str, Any] | None = model.pretrained_cfg or {}
    if checkpoint is not None:
        if (Path(checkpoint).parent / run).exists():
            return
        # A name without a tag stands for an architecture, whose weights may be anybody's.
        tagged = timm.models.get_pretrained_cfg(name) if "." in name else None
        own = _beside(checkpoint) or (tagged.to_dict() if tagged is not None else None)
    cfg = own or model.pretrained_cfg or {}
    their_mean, their_std = (tuple(map(float, cfg.get(key) or ())) for key in ("mean", "std"))
    if (their_mean, their_std) == (mean, std) or len(their_mean) != 3 or len(their_std) != 3:
        return
    words = f"mean {list(their_mean)} and deviation {list(their_std)}"
    if own is None:
        _warn(
            f"student.checkpoint={checkpoint} is taken to expect pixels normalised as ImageNet's; "
            f"timm's own weights of {name} expect {words}: if these are they, put their {CONFIG} "
            "beside the file, or name the model with its tag, student.model=NAME.TAG"
        )
        return
    scale, shift = (
        torch.tensor(values, dtype=torch.float64)
        for values in (
            [s / t for s, t in zip(std, their_std, strict=True)],
            [(m - n) / t for m, n, t in zip(mean, their_mean, their_std, strict=True)],
        )
    )
    if not _fold(model, scale, shift, size):
        _warn(
            f"the weights that student {name} starts from expect pixels of {words}, and get "
            f"ImageNet's, {list(mean)} and {list(std)}: its first layer pads the image or has no "
            "bias, so that the difference cannot be put into it; choose weights that were trained "
            "with ImageNet's (timm.get_pretrained_cfg says), or let the student unlearn it"
        )


def _fold(model: Any, scale: Tensor, shift: Tensor, size: tuple[int, int]) -> bool:
    """Let a model take x where it took x * scale + shift, of channels [3]; False where it cannot.

    Exact where patches lie side by side. Where a convolution pads, its zeros mean another colour
    than before; one of standardised weights has no scale; one without bias has nowhere to put the
    shift, but in position embeddings that are added to its output.
    """
    first = (model.pretrained_cfg or {}).get("first_conv")
    conv: Any = dict(model.named_modules()).get(first) if isinstance(first, str) else None
    if (
        type(conv) is not nn.Conv2d  # and not timm's, which pad or standardise weights
        or conv.in_channels != 3
        or conv.padding != (0, 0)
        or conv.kernel_size != conv.stride
        or any(side % edge for side, edge in zip(size, conv.stride, strict=True))
    ):
        return False
    weight = conv.weight.detach().double()
    added = torch.einsum("oihw,i->o", weight, shift.to(weight.device))
    grid = [side // edge for side, edge in zip(size, conv.stride, strict=True)]
    positions = getattr(model, "pos_embed", None)
    with torch.no_grad():
        if conv.bias is not None:
            conv.bias.copy_(conv.bias.double() + added)
        elif (
            isinstance(model, VisionTransformer | Eva)
            and isinstance(positions, Tensor)
            and isinstance(model.patch_embed.norm, nn.Identity)
            and positions.shape[1] >= grid[0] * grid[1]
        ):
            patches = positions[:, positions.shape[1] - grid[0] * grid[1] :]  # after class tokens
            patches.copy_(patches.double() + added)
        else:
            return False
        conv.weight.copy_(weight * scale.to(weight.device).view(1, 3, 1, 1))
    return True


def _beside(checkpoint: str) -> Mapping[str, Any] | None:
    """Of the configuration that timm and `preceptor export` keep beside weights, what is about
    them; None where there is none that says a normalisation."""
    try:
        found = json.loads((Path(checkpoint).parent / CONFIG).read_text(encoding="utf-8"))
        own: Mapping[str, Any] = found.get("pretrained_cfg", found)
        return own if {"mean", "std"} <= set(own) else None
    except (OSError, ValueError, AttributeError, TypeError):
        return None


@rank_zero_only
def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
