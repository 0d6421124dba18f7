"""``open_clip:ARCH/PRETRAINED``: the image tower of a contrastive model, as a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import open_clip
from open_clip.pretrained import get_pretrained_cfg, list_pretrained_tags_by_model
from torch import Tensor, nn

from ...checkpoints import read_checkpoint
from ...errors import TeacherError
from .base import Preprocessing, closest
from .network import NetworkTeacher, Offer, Tap, check_whole_patches, size_pair, taps_from
from .weights import first_sentence, hub_or_cache

_PREPROCESSING = ("mean", "std", "interpolation", "resize_mode")


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

    A checkpoint holds the whole model. PRETRAINED then says which preprocessing and activation
    the weights were trained with, and may be left out where all weights of the architecture that
    open_clip knows agree in them, or else the architecture's own are meant.

    Raises:
        TeacherError: there is no such architecture or tag, or the weights cannot be had or do not
            fit.
    """
    architecture, _, tag = source.partition(":")[2].partition("/")
    if architecture not in open_clip.list_models():
        raise TeacherError(
            f"teacher {name}: open_clip has no architecture {architecture!r}"
            + closest(architecture, open_clip.list_models())
        )
    config = get_pretrained_cfg(architecture, tag) if tag else {}
    if (tag and not config) or (not tag and checkpoint is None):
        tags = ", ".join(list_pretrained_tags_by_model(architecture)) or "none"
        raise TeacherError(
            f"teacher {name}: source {source!r} names {'unknown' if tag else 'no'} weights of "
            f"{architecture}; known: {tags}"
        )
    if not tag:
        config = _common(architecture)
    options: dict[str, Any] = {
        "precision": "fp32",
        "force_quick_gelu": bool(config.get("quick_gelu", False)),
        "force_image_size": _image_size(name, architecture, size),
        "force_preprocess_cfg": {key: config[key] for key in _PREPROCESSING if key in config},
        "require_pretrained": True,
    }
    if checkpoint is None:
        model = _from_hub(name, architecture, tag, options)
    else:
        read_checkpoint(checkpoint, TeacherError)  # refuses what is damaged in clear words
        try:
            model = open_clip.create_model(architecture, pretrained=checkpoint, **options)
        except Exception as error:  # a mismatch shows as any of several exceptions
            text = " ".join(line.strip() for line in str(error).splitlines()[:2])
            raise TeacherError(
                f"teacher {name}: checkpoint {checkpoint} does not fit open_clip:{architecture}: "
                f"{text[:400]}"
            ) from error
    if size is not None and size_pair(size) != _own_size(architecture):
        check_whole_patches(name, getattr(model.visual, "trunk", model.visual), size_pair(size))
    return OpenClipTeacher(name, model.visual, source, spaces)


def _own_size(architecture: str) -> tuple[int, int]:
    return size_pair(open_clip.get_model_config(architecture)["vision_cfg"].get("image_size", 224))


def _common(architecture: str) -> dict[str, Any]:
    """The preprocessing and activation of all known weights of an architecture; {} if they differ,
    or there are none."""
    found = []
    for tag in list_pretrained_tags_by_model(architecture):
        config = get_pretrained_cfg(architecture, tag)
        found.append({key: config.get(key) for key in (*_PREPROCESSING, "quick_gelu")})
    if not found or any(config != found[0] for config in found):
        return {}
    return {key: value for key, value in found[0].items() if value is not None}


def _image_size(
    teacher: str, architecture: str, size: int | tuple[int, int] | None
) -> int | tuple[int, int] | None:
    """A size as open_clip takes it: its ResNets know squares alone."""
    if size is None:
        return None
    height, width = size_pair(size)
    if height == width:
        return height
    if isinstance(open_clip.get_model_config(architecture)["vision_cfg"].get("layers"), list):
        raise TeacherError(
            f"teachers.{teacher}.size: {architecture} takes squares, not {height} x {width} pixels"
        )
    return height, width


def _from_hub(teacher: str, architecture: str, tag: str, options: dict[str, Any]) -> Any:
    with hub_or_cache() as hub:
        try:
            return open_clip.create_model(architecture, pretrained=tag, **options)
        except Exception as error:
            raise TeacherError(
                f"teacher {teacher}: the weights of open_clip:{architecture}/{tag} could not be "
                f"had from {hub} ({first_sentence(error)}); try again with a network, or set "
                f"teachers.{teacher}.checkpoint to a local .safetensors or .pt file of them"
            ) from error
