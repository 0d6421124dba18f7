"""Common corruptions of images, after Hendrycks and Dietterich 2019 (arXiv:1903.12261)."""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from ...errors import ConfigError

Pixels = NDArray[np.uint8]
SEVERITIES = (1, 2, 3, 4, 5)

_SIDES = (32, 224)  # pixels of the images of the benchmark's two sets, CIFAR-10-C and ImageNet-C


@dataclass(frozen=True)
class Corruption:
    """One kind of corruption at one severity.

    Six of the benchmark's kinds: ``gaussian_noise``, ``gaussian_blur``, ``contrast``,
    ``brightness``, ``jpeg`` and ``pixelate``. They are applied to the pixels that the model is
    given, at its own input size, with the strengths that the benchmark states for 32 and for 224
    pixels, interpolated in the logarithm of the shorter side. They are deterministic: noise depends
    on the severity, the seed and the image's number alone.

    Attributes:
        name: a key of `CORRUPTIONS`.
        severity: 1 to 5.
        seed: of the noise.

    Raises:
        ConfigError: unknown name or severity.
    """

    name: str
    severity: int
    seed: int = 0

    def __post_init__(self) -> None:
        if self.name not in CORRUPTIONS:
            raise ConfigError(
                f"robustness.corruptions names {self.name!r}: valid are {', '.join(CORRUPTIONS)}"
            )
        if self.severity not in SEVERITIES:
            raise ConfigError(f"robustness.severities={self.severity}: valid are 1 to 5")

    def __call__(self, pixels: Pixels, number: int = 0) -> Pixels:
        """uint8 [H, W, 3] to the same; `number` tells the noise of images apart."""
        small, large, apply = CORRUPTIONS[self.name]
        strength = float(
            np.interp(
                math.log(min(pixels.shape[:2])),
                [math.log(side) for side in _SIDES],
                [small[self.severity - 1], large[self.severity - 1]],
            )
        )
        return apply(pixels, strength, np.random.default_rng([self.seed, number, self.severity]))


def _gaussian_noise(pixels: Pixels, deviation: float, random: np.random.Generator) -> Pixels:
    return _bytes(pixels / 255.0 + random.normal(0.0, deviation, pixels.shape))


def _gaussian_blur(pixels: Pixels, deviation: float, random: np.random.Generator) -> Pixels:
    from scipy.ndimage import gaussian_filter

    return _bytes(gaussian_filter(pixels / 255.0, (deviation, deviation, 0), mode="nearest"))


def _contrast(pixels: Pixels, factor: float, random: np.random.Generator) -> Pixels:
    x = pixels / 255.0
    mean = x.mean((0, 1), keepdims=True)
    return _bytes((x - mean) * factor + mean)


def _brightness(pixels: Pixels, added: float, random: np.random.Generator) -> Pixels:
    # Adds to the value of HSV at constant hue and saturation: all channels grow in proportion.
    x = pixels / 255.0
    value = x.max(2, keepdims=True)
    grown = np.minimum(value + added, 1.0)
    return _bytes(np.where(value > 0, x * grown / np.where(value > 0, value, 1.0), grown))


def _jpeg(pixels: Pixels, quality: float, random: np.random.Generator) -> Pixels:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "JPEG", quality=round(quality))
    return np.asarray(Image.open(buffer, formats=["JPEG"]).convert("RGB"))


def _pixelate(pixels: Pixels, share: float, random: np.random.Generator) -> Pixels:
    image = Image.fromarray(pixels)
    width, height = (max(1, int(edge * share)) for edge in image.size)
    fewer = image.resize((width, height), Image.Resampling.BOX)
    return np.asarray(fewer.resize(image.size, Image.Resampling.NEAREST))


Strengths = tuple[float, float, float, float, float]
Apply = Callable[[Pixels, float, np.random.Generator], Pixels]

CORRUPTIONS: dict[str, tuple[Strengths, Strengths, Apply]] = {
    "gaussian_noise": (
        (0.04, 0.06, 0.08, 0.09, 0.10),
        (0.08, 0.12, 0.18, 0.26, 0.38),
        _gaussian_noise,
    ),
    "gaussian_blur": ((0.4, 0.6, 0.7, 0.8, 1.0), (1, 2, 3, 4, 6), _gaussian_blur),
    "contrast": ((0.75, 0.5, 0.4, 0.3, 0.15), (0.4, 0.3, 0.2, 0.1, 0.05), _contrast),
    "brightness": ((0.05, 0.1, 0.15, 0.2, 0.3), (0.1, 0.2, 0.3, 0.4, 0.5), _brightness),
    "jpeg": ((80, 65, 58, 50, 40), (25, 18, 15, 10, 7), _jpeg),
    "pixelate": ((0.95, 0.9, 0.85, 0.75, 0.65), (0.6, 0.5, 0.4, 0.3, 0.25), _pixelate),
}
"""Name -> strengths of severities 1 to 5 at 32 and at 224 pixels, and what applies them."""


def _bytes(x: NDArray[np.float64]) -> Pixels:
    return (np.clip(x, 0.0, 1.0) * 255.0).round().astype(np.uint8)
