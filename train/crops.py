"""Random crops of whole images, and the same regions of the teachers' token grids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torchvision.ops import roi_align

from ..cache import Cache
from ..cache.views import Box, ViewPolicy
from ..errors import ConfigError
from .alignment.spaces import SpaceTarget, select_spaces


@dataclass(frozen=True)
class RandomCrop:
    """A student on random boxes of images whose `full` views were stored.

    The targets of a crop are the regions of the stored grids: the teacher saw the whole image, and
    its tokens there stand for the crop's. Nothing is mirrored: a mirrored grid is not the mirrored
    image's features.

    Attributes:
        scale: least and greatest area as a share of the image.
        ratio: least and greatest width over height.
        descriptors: keep the global spaces too, though they are those of the whole image; without
            them a teacher's descriptor is the mean of its tokens in the crop (`taught`).
        seed: of the boxes.

    Raises:
        ConfigError: a range is none.
    """

    scale: tuple[float, float] = (0.35, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    descriptors: bool = True
    seed: int = 0
    _policy: ViewPolicy = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        try:
            policy = ViewPolicy("random", scale=self.scale, ratio=self.ratio, seed=self.seed)
        except ConfigError as error:
            raise ConfigError(str(error).replace("views.", "recipe.crop.")) from None
        object.__setattr__(self, "_policy", policy)

    def check(self, cache: Cache) -> None:
        """Raises ConfigError unless the store holds whole images."""
        name = cache.plan.views.get("name")
        if name != "full":
            raise ConfigError(
                f"recipe.crop needs the tokens of whole images and {cache.location} was extracted "
                f"with views.name={name}: extract with views.name=full, or set recipe.crop=null"
            )

    def box(self, row: int, epoch: int, width: int, height: int) -> Box:
        """(left, top, right, bottom) in an image of the given size, from seed, epoch and row."""
        return self._policy.draw(f"{epoch}\0{row}", 0, width, height).box


def random_crop(options: Mapping[str, Any] | None, seed: int) -> RandomCrop | None:
    """What ``recipe.crop`` asks for: null, or any of scale, ratio and descriptors.

    Raises:
        ConfigError: another key, or a range that is none.
    """
    if options is None:
        return None
    valid = ("scale", "ratio", "descriptors")
    if unknown := sorted(set(options) - set(valid)):
        raise ConfigError(f"recipe.crop.{unknown[0]}: valid are {', '.join(valid)}")
    return RandomCrop(**options, seed=seed)


def taught(
    crop: RandomCrop | None,
    spaces: Mapping[str, SpaceTarget],
    wanted: str | Sequence[str] | None,
) -> dict[str, SpaceTarget]:
    """The spaces of a store that a student on such crops may be taught: all, or those on grids.

    Args:
        wanted: ``align.spaces``: names of spaces and teachers; None for all of the store.

    Raises:
        ConfigError: a teacher or a space that is wanted would be left out whole, or is not there.
    """
    if crop is None or crop.descriptors:
        return dict(spaces)
    on_grids = {name: space for name, space in spaces.items() if space.grid is not None}
    if wanted is None:
        wanted = list(dict.fromkeys(space.teacher for space in spaces.values()))
    asked = [wanted] if isinstance(wanted, str) else list(wanted)
    kept = [name for name in asked if select_spaces(spaces, [name]).keys() & on_grids]
    if lost := [name for name in asked if name not in kept]:
        others = f", or name the others alone, align.spaces=[{','.join(kept)}]" if kept else ""
        raise ConfigError(
            "recipe.crop.descriptors=false leaves out global spaces, and there is nothing else of "
            f"{', '.join(lost)} to learn: say recipe.crop.descriptors=true{others}"
        )
    return on_grids


def crop_tokens(tokens: Tensor, grid: tuple[int, int], regions: Tensor) -> Tensor:
    """The part of each token grid that a region covers, resampled to the whole grid.

    Bilinear at the centres of the new cells, half-pixel centres, edges held (RoIAlign with one
    sample a bin; He et al. 2017, arXiv:1703.06870, section 3).

    Args:
        tokens: float [B, rows * columns, D].
        grid: (rows, columns).
        regions: float [B, 4]: left, top, right, bottom as shares of the view of the tokens.

    Returns:
        [B, rows * columns, D], of the dtype of the tokens.
    """
    count, _, dim = tokens.shape
    rows, columns = grid
    maps = tokens.transpose(1, 2).reshape(count, dim, rows, columns)
    # Number by number: a tensor of them would be a copy that the device has to be waited for.
    scaled = torch.stack(
        [regions[:, side] * cells for side, cells in enumerate((columns, rows, columns, rows))], 1
    )
    numbers = torch.arange(count, device=tokens.device, dtype=tokens.dtype).unsqueeze(1)
    boxes = torch.cat([numbers, scaled.to(tokens.dtype)], dim=1)
    found: Tensor = roi_align(maps, boxes, grid, sampling_ratio=1, aligned=True)
    return found.flatten(2).transpose(1, 2)
