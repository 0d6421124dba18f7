"""Teachers that are PyTorch modules, and how a configuration says what to take of them."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from typing import Any

import torch
from torch import Tensor, nn

from ...checkpoints import weights_sha256
from ...errors import TeacherError, first_sentence
from ...pixels import not_whole_patches
from .base import Preprocessing, SpaceShape, Teacher

TAKES = {
    "tokens": "the patch tokens or feature map, with their grid",
    "mean": "the mean of those tokens",
    "cls": "the class token",
    "pooled": "the network's own descriptor, before any classifier",
    "embedding": "the image embedding that is compared with text",
}
_TAKE_OF_NAME = {"patch": "tokens", "map": "tokens", **{take: take for take in TAKES}}


@dataclass(frozen=True)
class Tap:
    """Where a space leaves the network.

    Attributes:
        take: one of ``TAKES``.
        block: number of the block or stage, from 0; None for the network's final features.
        norm: whether the network's last normalisation is applied to that block's tokens.
    """

    take: str
    block: int | None = None
    norm: bool = False


@dataclass(frozen=True)
class Offer:
    """What a network can give: kinds of features, number of blocks, whether it has a final norm."""

    takes: tuple[str, ...]
    blocks: int
    norm: bool


def taps_from(
    spaces: Mapping[str, Mapping[str, Any] | None] | None,
    default: Mapping[str, Mapping[str, Any]],
    offer: Offer,
    teacher: str,
) -> dict[str, Tap]:
    """The taps that a configuration ``{space: {take:, block:, norm:}}`` asks for.

    ``take`` may be left out where the space's name says it: patch, map, tokens, mean, cls, pooled,
    embedding. A negative ``block`` counts from the last. ``norm`` is true unless said otherwise
    where the network ends with a normalisation of tokens.

    Raises:
        TeacherError: the network has no such space, block or option.
    """
    chosen = default if spaces is None else spaces
    if not isinstance(chosen, Mapping):
        raise TeacherError(
            f"teachers.{teacher}.spaces={chosen!r}: expected names with what to take, such as "
            "{patch: {}, mid: {take: tokens, block: 5}}, or null"
        )
    taps = {}
    for name, given in ((str(name), given) for name, given in chosen.items()):
        where = f"teachers.{teacher}.spaces.{name}"
        if not isinstance(given, Mapping | None):
            raise TeacherError(f"{where}={given!r}: expected {{take:, block:, norm:}}, or null")
        options = dict(given or {})
        unknown = set(options) - {field.name for field in fields(Tap)}
        if unknown or "/" in name:
            raise TeacherError(
                f"{where} knows take, block and norm, not {', '.join(unknown) or '/'}"
            )
        take = options.get("take", _TAKE_OF_NAME.get(name))
        if take not in offer.takes:
            asked = repr(name) if take is None else f"take={take!r}"
            raise TeacherError(
                f"{where}: the network has no {asked}; it has take="
                + ", ".join(f"{take} ({TAKES[take]})" for take in offer.takes)
            )
        block, norm = options.get("block"), options.get("norm")
        if type(block) not in (int, type(None)) or not isinstance(norm, bool | None):
            raise TeacherError(
                f"{where}: block={block!r}, norm={norm!r}: expected the number of a block and true "
                "or false, or null"
            )
        if block is not None:
            if take in ("pooled", "embedding"):
                raise TeacherError(f"{where}: {take} is made from the final features; drop block")
            if not -offer.blocks <= block < offer.blocks:
                has = f"blocks 0 to {offer.blocks - 1}" if offer.blocks else "no blocks to choose"
                raise TeacherError(f"{where}: there is no block {block}; the network has {has}")
            block %= offer.blocks
        if norm is not None and (block is None or not offer.norm):
            reason = "belongs to a block" if block is None else "is not there in this network"
            raise TeacherError(f"{where}: norm {reason}; drop it")
        taps[name] = Tap(
            take, block, norm=block is not None and (offer.norm if norm is None else norm)
        )
    if not taps:
        raise TeacherError(f"teachers.{teacher}.spaces is empty; name at least one space")
    return taps


class NetworkTeacher(Teacher):
    """A PyTorch network in evaluation mode without gradients, read at its taps.

    Args:
        name: of the teacher.
        source: where the network comes from, for its identity.
        network: with its weights loaded.
        preprocessing: of its input.
        taps: what to take, by name of the space.
        libraries: packages whose versions belong to its identity.

    Raises:
        TeacherError: the network cannot run at the size, or a feature has an unknown layout.
    """

    def __init__(
        self,
        name: str,
        source: str,
        network: nn.Module,
        preprocessing: Preprocessing,
        taps: Mapping[str, Tap],
        libraries: tuple[str, ...],
    ) -> None:
        self.name = name
        self.preprocessing = preprocessing
        self.taps = dict(taps)
        self.network = network.eval().requires_grad_(False)
        self._identity = {
            "source": source,
            "weights_sha256": weights_sha256(network),
            "preprocessing": preprocessing.describe(),
            "spaces": {space: asdict(tap) for space, tap in self.taps.items()},
            "versions": {library: version(library) for library in (*libraries, "torch")},
        }
        self._set_size(preprocessing.size)
        # Convolutions run faster on it, on CPUs and GPUs alike; everything else is indifferent.
        network.to(memory_format=torch.channels_last)
        parameter = next(network.parameters())
        blank = torch.zeros(1, 3, *preprocessing.size, device=parameter.device)
        try:
            with torch.no_grad():
                features = self._features(blank)
        except TeacherError:
            raise
        except Exception as error:  # every network has its own ways to refuse a size
            height, width = preprocessing.size
            raise TeacherError(
                f"teacher {name} ({source}) cannot run on {height} x {width} pixels: "
                f"{first_sentence(error)}; set teachers.{name}.size (null: its own), or other "
                f"teachers.{name}.spaces"
            ) from error
        self.spaces = tuple(self._shape(space, features[space]) for space in self.taps)

    @abstractmethod
    def _features(self, pixels: Tensor) -> dict[str, Tensor]:
        """Per space a map ``[B, D, rows, columns]`` or a descriptor ``[B, D]``."""

    def _set_size(self, size: tuple[int, int]) -> None:
        """Prepares the network for another input size than it was trained at."""

    def _shape(self, space: str, feature: Tensor) -> SpaceShape:
        if feature.ndim == 2:
            return SpaceShape(space, 1, feature.shape[1], None)
        if feature.ndim == 4:
            rows, columns = feature.shape[2:]
            return SpaceShape(space, rows * columns, feature.shape[1], (rows, columns))
        raise TeacherError(
            f"teacher {self.name}: space {space} has shape {tuple(feature.shape)}, "
            "neither a map nor a descriptor; choose another take or block"
        )

    @torch.no_grad()
    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        if pixels.ndim != 4 or pixels.shape[1:] != (3, *self.preprocessing.size):
            raise TeacherError(
                f"teacher {self.name} takes images [B, 3, {self.preprocessing.size[0]}, "
                f"{self.preprocessing.size[1]}], not {list(pixels.shape)}"
            )
        features = self._features(pixels.contiguous(memory_format=torch.channels_last))
        return {
            space: f.flatten(2).transpose(1, 2) if f.ndim == 4 else f.unsqueeze(1)
            for space, f in features.items()
        }

    def identity(self) -> dict[str, Any]:
        return dict(self._identity)

    def to(self, device: torch.device | str) -> NetworkTeacher:
        self.network.to(device)
        return self


def check_whole_patches(name: str, network: Any, size: tuple[int, int]) -> None:
    """Refuse an input size of which a network's patches would leave out the last pixels.

    Raises:
        TeacherError: names the next sizes that are whole.
    """
    if wrong := not_whole_patches(network, size):
        raise TeacherError(f"teachers.{name}.size: {wrong}")


def size_pair(size: int | tuple[int, int] | list[int]) -> tuple[int, int]:
    """(height, width) from one number or two.

    Raises:
        TeacherError: it is neither.
    """
    pair = tuple(size) if isinstance(size, list | tuple) else (size, size)
    if len(pair) != 2 or not all(type(side) is int and side > 0 for side in pair):
        raise TeacherError(
            f"size is one positive number of pixels or [height, width], not {size!r}"
        )
    return pair[0], pair[1]
