"""``open_clip:ARCH/PRETRAINED``: the image tower of a contrastive model, as a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from ...contrastive import create, own_size
from ...errors import TeacherError
from .base import Preprocessing
from .network import NetworkTeacher, Offer, Tap, check_whole_patches, size_pair, taps_from


class OpenClipTeacher(NetworkTeacher):
    """The image tower of an open_clip model; the text tower is dropped.

    Final tokens are those of the last block after the tower's last normalisation, as the tower
    itself returns them with ``output_tokens``; of a tower that pools by attention (CoCa) those of
    the last block as they are. ``embedding`` is its projected output, not yet of unit length.
    """

    def __init__(
        self,
        name: str,
        tower: nn.Module,
        source: str,
        spaces: Mapping[str, Mapping[str, Any] | None] | None = None,
    ) -> None:
        if not hasattr(tower, "forward_intermediates"):
            raise TeacherError(f"teacher {name}: {source} has an image tower without intermediates")
        self._norm, blocks, self._has_prefix = _parts(tower)
        takes = ("tokens", "mean", *(("cls",) if self._has_prefix else ()), "embedding")
        offer = Offer(takes, blocks, self._norm is not None)
        taps = taps_from(spaces, {"patch": {}, "embedding": {}}, offer, name)
        taps = {
            space: tap
            if tap.block is not None or tap.take == "embedding"
            else replace(tap, block=blocks - 1, norm=offer.norm)
            for space, tap in taps.items()
        }
        self._embedding = any(tap.take == "embedding" for tap in taps.values())
        wanted = {tap.block for tap in taps.values() if tap.block is not None}
        # Some towers run no further than the last block that was asked for.
        self._blocks = sorted(wanted | ({blocks - 1} if self._embedding else set()))
        super().__init__(
            name=name,
            source=source,
            network=tower,
            preprocessing=_preprocessing(tower),
            taps=taps,
            libraries=("open_clip_torch", "timm"),
        )

    def _features(self, pixels: Tensor) -> dict[str, Tensor]:
        network: Any = self.network
        found = network.forward_intermediates(
            pixels,
            indices=self._blocks,
            stop_early=not self._embedding,
            intermediates_only=not self._embedding,
            output_fmt="NCHW",
            output_extra_tokens=self._has_prefix,
        )
        grids = dict(zip(self._blocks, found["image_intermediates"], strict=True))
        prefixes = found.get("image_intermediates_prefix") or [None] * len(self._blocks)
        prefix = dict(zip(self._blocks, prefixes, strict=True))
        return {
            space: found["image_features"]
            if tap.block is None
            else self._tap(tap, grids[tap.block], prefix[tap.block])
            for space, tap in self.taps.items()
        }

    def _tap(self, tap: Tap, grid: Tensor, prefix: Tensor | None) -> Tensor:
        norm = self._norm if tap.norm and self._norm is not None else nn.Identity()
        if tap.take == "cls" and prefix is not None:
            return norm(prefix[:, 0])
        tokens = norm(grid.permute(0, 2, 3, 1)).permute(0, 3, 1, 2) if tap.norm else grid
        return tokens.mean((2, 3)) if tap.take == "mean" else tokens


def _parts(tower: Any) -> tuple[nn.Module | None, int, bool]:
    """A tower's norm over tokens, its number of blocks, and whether it has a class token."""
    if hasattr(tower, "trunk"):  # a network of timm
        trunk = tower.trunk
        is_vit = hasattr(trunk, "num_prefix_tokens") and hasattr(trunk, "blocks")
        has_class_token = getattr(trunk, "cls_token", None) is not None
        return (trunk.norm if is_vit else None), len(trunk.feature_info), has_class_token
    if hasattr(tower, "transformer"):
        normalised = tower.attn_pool is None and not tower.final_ln_after_pool
        return (tower.ln_post if normalised else None), len(tower.transformer.resblocks), True
    return None, 5, False  # CLIP's ResNet: its stem and four layers


def _preprocessing(tower: Any) -> Preprocessing:
    config = tower.preprocess_cfg
    mean, std = (tuple(float(value) for value in config[key]) for key in ("mean", "std"))
    size = config["size"]
    pair = size_pair(size if isinstance(size, int) else tuple(size))
    return Preprocessing(pair, mean, std, config["interpolation"])  # type: ignore[arg-type]


def load(
    name: str,
    source: str,
    size: int | tuple[int, int] | None = None,
    spaces: Mapping[str, Mapping[str, Any] | None] | None = None,
    checkpoint: str | None = None,
) -> OpenClipTeacher:
    """The teacher ``open_clip:ARCH/PRETRAINED``, or ``open_clip:ARCH`` with a local ``checkpoint``.

    See `contrastive.create`.

    Raises:
        TeacherError: there is no such architecture or tag, or the weights cannot be had or do not
            fit.
    """
    pair = None if size is None else size_pair(size)
    model = create(name, source, pair, checkpoint)
    if pair is not None and pair != own_size(source):
        check_whole_patches(name, getattr(model.visual, "trunk", model.visual), pair)
    return OpenClipTeacher(name, model.visual, source, spaces)
