"""Scenes: one figure, at an angle, a place and a size, before a background; all of it known."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from . import sources, surfaces
from .surfaces import SIZE, Pixels, Random


@dataclass(frozen=True, eq=False)
class Figure:
    """What is shown.

    Attributes:
        source: where it comes from; what may not be shared between splits.
        coverage: uint8 [h, w], 255 where it is.
        shade: uint8 [h, w], its own brightness; None for a flat figure.
        label: its class.
    """

    source: str
    coverage: NDArray[np.uint8]
    shade: NDArray[np.uint8] | None
    label: int


@dataclass(frozen=True)
class Pose:
    """How it is shown.

    Attributes:
        angle: counterclockwise, in radians.
        x, y: of its centre from the middle of the image, as parts of half the image's side; x to
            the right, y downwards.
        scale: side of the figure's square over the image's.
    """

    angle: float
    x: float
    y: float
    scale: float

    @classmethod
    def draw(cls, random: Random, turn: float = math.pi) -> Pose:
        """Anywhere, at any angle from -turn to turn, from six to nine tenths of the image."""
        scale = math.exp(random.uniform(math.log(0.6), math.log(0.9)))
        free = 1.0 - 0.8 * scale
        return cls(
            float(random.uniform(-turn, turn)),
            float(random.uniform(-free, free)),
            float(random.uniform(-free, free)),
            scale,
        )

    @property
    def targets(self) -> tuple[float, float, float, float, float]:
        """cos and sin of the angle, x, y and the logarithm of the scale."""
        return math.cos(self.angle), math.sin(self.angle), self.x, self.y, math.log(self.scale)

    @property
    def named(self) -> dict[str, float]:
        """`targets` by name."""
        return dict(zip(("cos", "sin", "x", "y", "log_scale"), self.targets, strict=True))


@dataclass(frozen=True, eq=False)
class Scene:
    """Attributes: pixels uint8 [size, size, 3], mask uint8 [size, size] (1 where the figure is),
    pose."""

    pixels: Pixels
    mask: NDArray[np.uint8]
    pose: Pose


def letter(face: str, character: str, label: int) -> Figure:
    """A character of a typeface; its source is the typeface."""
    return Figure(f"face/{face}", sources.glyph(face, character), None, label)


def garment(split: str, place: int) -> Figure:
    """A garment of a split, cut out of its black ground."""
    names, pixels, labels = sources.garments(split)
    image = pixels[place % len(names)]
    coverage = np.clip(image.astype(np.int64) * 8, 0, 255).astype(np.uint8)
    return Figure(names[place % len(names)], coverage, image, int(labels[place % len(names)]))


def digit(split: str, place: int) -> Figure:
    """A handwritten digit of a split."""
    names, pixels, labels = sources.digits(split)
    square = Image.fromarray(pixels[place % len(names)]).resize((32, 32), Image.Resampling.BICUBIC)
    coverage = np.clip(np.asarray(square).astype(np.int64) * 2 - 128, 0, 255).astype(np.uint8)
    return Figure(names[place % len(names)], coverage, None, int(labels[place % len(names)]))


def compose(
    figure: Figure, pose: Pose, ground: Pixels, random: Random, fill: Pixels | None = None
) -> Scene:
    """Put a figure before a ground.

    Args:
        ground: uint8 [size, size, 3], which fixes the size of the scene.
        fill: what a figure is made of, uint8 [size, size, 3]; without one, a colour that stands out
            from the ground, darkened by the figure's own shade.
    """
    size = len(ground)
    alpha = _placed(figure.coverage, pose, size)[..., None] / 255.0
    if fill is None:
        mean = float((ground * (alpha > 0.5)).sum() / max(1.0, 3 * (alpha > 0.5).sum()))
        colour = random.uniform(0, 1, 3)
        bright = random.uniform(170, 255) if mean < 128 else random.uniform(20, 85)
        colour *= bright / max(colour.mean(), 0.05)
        paint = np.broadcast_to(np.clip(colour, 0, 255), ground.shape)
        if figure.shade is not None:
            shade = _placed(figure.shade, pose, size)[..., None] / 255.0
            paint = paint * (0.35 + 0.65 * shade)
    else:
        paint = fill.astype(np.float64)
    pixels = ground * (1 - alpha) + paint * alpha
    return Scene(pixels.astype(np.uint8), (alpha[..., 0] > 0.5).astype(np.uint8), pose)


def ground(
    split: str, random: Random, photographs: float = 0.25, size: int = SIZE
) -> tuple[str, Pixels]:
    """Something to stand before: a photograph, else plain or a surface; and its source."""
    if random.uniform() < photographs:
        return surfaces.photograph(split, random, size)
    if random.uniform() < 0.6:
        return "made", surfaces.plain(random, size)
    return "made", surfaces.any_surface(random, size)


def _placed(values: NDArray[np.uint8], pose: Pose, size: int) -> NDArray[np.float64]:
    """A square of values, turned, scaled and moved: float64 [size, size], 0 outside."""
    side = values.shape[0]
    zoom = side / (size * pose.scale)  # source pixels a target pixel
    cos, sin = math.cos(pose.angle) * zoom, math.sin(pose.angle) * zoom
    cx, cy = size / 2 * (1 + pose.x), size / 2 * (1 + pose.y)
    # From target to source; y points downwards, so counterclockwise is (cos -sin; sin cos).
    matrix = (
        cos, -sin, side / 2 - cos * cx + sin * cy,
        sin, cos, side / 2 - sin * cx - cos * cy,
    )  # fmt: skip
    placed = Image.fromarray(values).transform(
        (size, size), Image.Transform.AFFINE, matrix, Image.Resampling.BILINEAR
    )
    return np.asarray(placed).astype(np.float64)
