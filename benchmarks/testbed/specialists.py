"""Three small teachers that this repository trains itself, each blind to what the next one sees.

- ``letters``, a CNN of outlines, names a letter whatever its typeface, colour, surface, place and
  angle.
- ``pose``, a CNN that is given coordinates, tells angle, place and size of a letter or digit,
  whichever it is.
- ``materials``, a CNN that sees 17 pixels at a time and is trained on shuffled pieces, names a
  surface whatever its shape, place, colour and angle.

In a configuration they are ``call:preceptor.benchmarks.testbed.specialists:letters`` and so on,
with the ``checkpoint`` that `training.py` wrote.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional

from ...errors import TeacherError
from ...extract.teachers.base import Preprocessing
from ...extract.teachers.network import NetworkTeacher, Offer, taps_from
from .surfaces import SIZE

HALF = (0.5, 0.5, 0.5)

Spaces = Mapping[str, Mapping[str, Any] | None]


class Specialist(nn.Module):
    """A small backbone with a head of its own.

    Args:
        backbone: pixels [B, 3, 48, 48] to a map [B, width, 6, 6].
        width: of the map.
        outputs: numbers that the head gives from the map's mean.
    """

    def __init__(self, backbone: nn.Module, width: int, outputs: int) -> None:
        super().__init__()
        self.backbone = backbone
        self.head = nn.Linear(width, outputs)

    def forward(self, pixels: Tensor) -> Tensor:
        """Normalised pixels [B, 3, 48, 48] to [B, outputs]."""
        return self.head(self.backbone(pixels).mean((2, 3)))


class _Located(nn.Module):
    """Puts two channels with the coordinates, from -1 to 1, beside the pixels (CoordConv, Liu et
    al. 2018, arXiv:1807.03247), without which the mean of a map could not tell a place."""

    def forward(self, x: Tensor) -> Tensor:
        line = torch.linspace(-1, 1, SIZE, dtype=x.dtype, device=x.device)
        across = line.expand(len(x), 1, SIZE, SIZE)
        return torch.cat([x, across, across.transpose(2, 3)], 1)


class _Outlines(nn.Module):
    """The length of the brightness gradient (Sobel) in place of the pixels: shape without colour,
    so that light on dark and dark on light are the same."""

    kernels: Tensor

    def __init__(self) -> None:
        super().__init__()
        down = torch.tensor([[1.0, 2.0, 1.0], [0.0, 0.0, 0.0], [-1.0, -2.0, -1.0]]) / 4
        kernels = torch.stack([down, down.t()]).unsqueeze(1)
        self.register_buffer("kernels", kernels, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        bright = functional.pad(x.mean(1, keepdim=True), (1, 1, 1, 1), mode="replicate")
        steps = functional.conv2d(bright, self.kernels.to(x.dtype))
        return (steps.square().sum(1, keepdim=True) + 1e-6).sqrt()


def letters_network() -> Specialist:
    return Specialist(nn.Sequential(_Outlines(), *_convolutions(1, *_DEEP)), 128, 18)


def pose_network() -> Specialist:
    backbone = nn.Sequential(_Outlines(), _Located(), *_convolutions(3, *_DEEP))
    return Specialist(backbone, 128, 5)


def materials_network() -> Specialist:
    stages = ((24, 2, 5), (48, 2, 3), (96, 2, 3), (96, 1, 1))
    return Specialist(_convolutions(3, *stages), 96, 9)


_DEEP = ((24, 2, 3), (48, 2, 3), (48, 1, 3), (96, 2, 3), (96, 1, 3), (128, 1, 3), (128, 1, 3))
NETWORKS = {"letters": letters_network, "pose": pose_network, "materials": materials_network}


def letters(checkpoint: str, spaces: Spaces | None = None) -> NetworkTeacher:
    """Names letters: ``map`` 6 x 6 x 128 and its ``mean``."""
    return _teacher("letters", checkpoint, spaces)


def pose(checkpoint: str, spaces: Spaces | None = None) -> NetworkTeacher:
    """Tells angle, place and size: ``map`` 6 x 6 x 128 and its ``mean``."""
    return _teacher("pose", checkpoint, spaces)


def materials(checkpoint: str, spaces: Spaces | None = None) -> NetworkTeacher:
    """Names surfaces: ``map`` 6 x 6 x 96 and its ``mean``."""
    return _teacher("materials", checkpoint, spaces)


def load(name: str, checkpoint: str | Path) -> Specialist:
    """A trained specialist.

    Raises:
        TeacherError: the checkpoint is missing, damaged or another network's.
    """
    network = NETWORKS[name]()
    try:
        network.load_state_dict(load_file(checkpoint))
    except (OSError, SafetensorError, RuntimeError) as error:
        raise TeacherError(
            f"{checkpoint} does not hold the specialist {name} ({str(error).splitlines()[0]}); "
            "run benchmarks/testbed/make.py"
        ) from error
    return network.eval()


class _SpecialistTeacher(NetworkTeacher):
    def _features(self, pixels: Tensor) -> dict[str, Tensor]:
        seen: Tensor = self.network.backbone(pixels)
        return {
            space: seen if tap.take == "tokens" else seen.mean((2, 3))
            for space, tap in self.taps.items()
        }


def _teacher(name: str, checkpoint: str, spaces: Spaces | None) -> NetworkTeacher:
    offer = Offer(takes=("tokens", "mean"), blocks=0, norm=False)
    return _SpecialistTeacher(
        name,
        f"call:{__name__}:{name}",
        load(name, checkpoint),
        Preprocessing((SIZE, SIZE), HALF, HALF, "bicubic"),
        taps_from(spaces, {"map": {}, "mean": {}}, offer, name),
        (),
    )


def _convolutions(source: int, *stages: tuple[int, int, int]) -> nn.Sequential:
    """Convolution, batch norm and ReLU a stage of (channels, stride, kernel)."""
    layers: list[nn.Module] = []
    for target, stride, kernel in stages:
        layers += [
            nn.Conv2d(source, target, kernel, stride, kernel // 2, bias=False),
            nn.BatchNorm2d(target),
            nn.ReLU(inplace=True),
        ]
        source = target
    return nn.Sequential(*layers)
