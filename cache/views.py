"""Views: which part of an image a row is computed from, and the pixels of that part."""

from __future__ import annotations

import hashlib
import math
import random
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ..errors import ConfigError, DataError

POLICIES = ("center", "full", "random")
INTERPOLATIONS = {
    "nearest": Image.Resampling.NEAREST,
    "box": Image.Resampling.BOX,
    "bilinear": Image.Resampling.BILINEAR,
    "hamming": Image.Resampling.HAMMING,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_TRIES = 10

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class View:
    """A part of one image: ``box`` is (left, top, right, bottom) in source pixels, the image itself
    being (0, 0, width, height); ``flip`` mirrors left and right after resizing."""

    box: Box
    flip: bool = False

    def pixels(
        self, image: Image.Image, size: tuple[int, int], interpolation: str = "bicubic"
    ) -> NDArray[np.uint8]:
        """The view resampled once, straight from the source image, with antialiasing.

        Args:
            image: the whole source image; converted to RGB if it is not.
            size: (height, width) of the result in pixels.
            interpolation: one of ``INTERPOLATIONS``.

        Returns:
            uint8 ``[height, width, 3]``, contiguous.

        Raises:
            ConfigError: the interpolation is unknown.
            DataError: the box is empty or does not lie in the image.
        """
        resample = INTERPOLATIONS.get(interpolation)
        if resample is None:
            raise ConfigError(
                f"unknown interpolation {interpolation!r}; known: {', '.join(INTERPOLATIONS)}"
            )
        left, top, right, bottom = self.box
        if not (0 <= left < right <= image.width and 0 <= top < bottom <= image.height):
            raise DataError(
                f"view box {self.box} does not lie in an image of {image.width} x {image.height} "
                "pixels; the image is not the one that the box was drawn for"
            )
        height, width = size
        if image.mode != "RGB":  # `convert` would copy one that is
            image = image.convert("RGB")
        # No reducing_gap: a reduced copy first would be faster and would change the pixels.
        resized = image.resize((width, height), resample, box=self.box)
        pixels = np.asarray(resized)
        return np.ascontiguousarray(pixels[:, ::-1] if self.flip else pixels)


@dataclass(frozen=True)
class ViewPolicy:
    """How the views of an image are chosen; the same (seed, key, view number) gives the same view.

    Attributes:
        name: ``center``: the largest centred square, its side times ``crop``. ``full``: the whole
            image, squashed to the teacher's size. ``random``: boxes of random area and aspect ratio
            (Inception's augmentation, as torchvision's RandomResizedCrop samples it).
        count: views an image. The two fixed policies have one, or two with ``flip``.
        crop: side of the centred square as a part of the shorter image side, in (0, 1].
        scale: least and greatest area of a random box as a part of the image, in (0, 1].
        ratio: least and greatest width over height of a random box.
        flip: mirror a random view with probability one half; of the fixed policies, view 1.
        seed: of the random views.

    Raises:
        ConfigError: a value is out of its range.
    """

    name: str = "center"
    count: int = 1
    crop: float = 1.0
    scale: tuple[float, float] = (0.5, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in POLICIES:
            raise ConfigError(f"unknown view policy {self.name!r}; known: {', '.join(POLICIES)}")
        for field in ("scale", "ratio"):  # a list, where it comes from a configuration file
            low_high = tuple(float(value) for value in getattr(self, field))
            if len(low_high) != 2 or not 0 < low_high[0] <= low_high[1] < math.inf:
                raise ConfigError(f"views.{field} must be two ascending numbers over 0")
            object.__setattr__(self, field, low_high)
        object.__setattr__(self, "crop", float(self.crop))  # 1, too, so that it is written as 1.0
        if self.scale[1] > 1:
            raise ConfigError(f"views.scale is a part of the image's area, at most 1: {self.scale}")
        if not 0 < self.crop <= 1:
            raise ConfigError(f"views.crop must lie in (0, 1]: {self.crop}")
        if self.count < 1:
            raise ConfigError(f"views.count must be at least 1: {self.count}")
        distinct = 2 if self.flip else 1
        if self.name != "random" and self.count != distinct:
            raise ConfigError(
                f"views.name={self.name} with flip={self.flip} has {distinct} distinct view(s), "
                f"not {self.count}; set views.count={distinct} or views.name=random"
            )

    def describe(self) -> dict[str, Any]:
        """The policy as JSON, for the manifest."""
        return {**asdict(self), "scale": list(self.scale), "ratio": list(self.ratio)}

    def draw(self, key: str, view: int, width: int, height: int) -> View:
        """View number ``view`` (from 0 to ``count`` - 1) of the image ``key`` of the given size.

        The box is exact in float32, in which the store keeps it.

        Raises:
            IndexError: there is no such view.
        """
        if not 0 <= view < self.count:
            raise IndexError(f"view {view} of {self.count}")
        if self.name == "full":
            return View((0.0, 0.0, float(width), float(height)), flip=view == 1)
        if self.name == "center":
            side = min(width, height) * self.crop
            return View(_box(width / 2, height / 2, side, side, width, height), flip=view == 1)
        text = f"{self.seed}\0{view}\0{key}".encode("utf-8", "surrogateescape")
        # The standard library promises that random() keeps its sequence for a given seed.
        uniform = random.Random(int.from_bytes(hashlib.sha256(text).digest(), "little")).random
        flip = uniform() < 0.5 and self.flip
        return View(self._random_box(uniform, width, height), flip)

    def _random_box(self, uniform: Any, width: int, height: int) -> Box:
        low, high = math.log(self.ratio[0]), math.log(self.ratio[1])
        for _ in range(_TRIES):
            area = width * height * (self.scale[0] + (self.scale[1] - self.scale[0]) * uniform())
            ratio = math.exp(low + (high - low) * uniform())
            w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
            x, y = uniform(), uniform()
            if w <= width and h <= height:
                return _box(w / 2 + x * (width - w), h / 2 + y * (height - h), w, h, width, height)
        # No box of such an area fits: the largest centred one within the range of ratios.
        ratio = min(max(width / height, self.ratio[0]), self.ratio[1])
        w, h = min(width, height * ratio), min(height, width / ratio)
        return _box(width / 2, height / 2, w, h, width, height)


def _box(x: float, y: float, w: float, h: float, width: int, height: int) -> Box:
    """The box of size (w, h) around (x, y), clipped to the image and rounded to float32."""
    edges = (
        max(x - w / 2, 0.0),
        max(y - h / 2, 0.0),
        min(x + w / 2, float(width)),
        min(y + h / 2, float(height)),
    )
    left, top, right, bottom = (float(np.float32(edge)) for edge in edges)
    return left, top, right, bottom
