"""Tiny networks as teachers, such as ``call:preceptor.tests.extract.tiny_teachers:cnn``."""

from __future__ import annotations

from typing import Any

import torch
from preceptor.extract.teachers.base import Preprocessing, SpaceShape, Teacher
from torch import Tensor

SIDE, PATCH = 32, 8


class Tiny(Teacher):
    """One convolution with random weights of a seed: its map, and the map's mean."""

    def __init__(self, dim: int, seed: int) -> None:
        self.preprocessing = Preprocessing((SIDE, SIDE), (0.5,) * 3, (0.25,) * 3, "bicubic")
        grid = SIDE // PATCH
        self.spaces = (
            SpaceShape("patch", grid * grid, dim, (grid, grid)),
            SpaceShape("cls", 1, dim, None),
        )
        torch.manual_seed(seed)
        self.network = torch.nn.Conv2d(3, dim, PATCH, PATCH)
        self._identity = {"weights": f"seed {seed}", "preprocessing": self.preprocessing.describe()}

    def __call__(self, pixels: Tensor) -> dict[str, Tensor]:
        patches = self.network(pixels).flatten(2).transpose(1, 2)
        return {"patch": patches, "cls": patches.mean(1, keepdim=True)}

    def identity(self) -> dict[str, Any]:
        return dict(self._identity)

    def to(self, device: torch.device | str) -> Tiny:
        self.network.to(device)
        return self


def cnn() -> Tiny:
    return Tiny(12, 0)


def vit() -> Tiny:
    return Tiny(20, 1)


def other_vit() -> Tiny:
    """The same spaces with other weights."""
    return Tiny(20, 2)


def wide_vit() -> Tiny:
    return Tiny(24, 1)
