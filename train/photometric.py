"""Changes of colour and sharpness: what may vary freely, for it moves nothing in the image."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torchvision.transforms.v2 import functional as transforms

from ..errors import ConfigError

_BLUR_SIGMA = (0.1, 2.0)
_SOLARIZE_FROM = 128


@dataclass(frozen=True)
class ColorJitter:
    """Random photometric changes; teachers saw none of them, so they ask for invariance.

    Attributes:
        brightness, contrast, saturation: a factor from [1 - x, 1 + x].
        hue: a turn of the colour circle from [-x, x], in whole turns; at most 0.5.
        grayscale: probability of losing the colour.
        blur: probability of a Gaussian blur of sigma 0.1 to 2 pixels, over a tenth of the shorter
            side (Chen et al. 2020, arXiv:2002.05709, appendix A).
        solarize: probability that values from 128 up are inverted (Grill et al. 2020,
            arXiv:2006.07733, appendix B).

    Raises:
        ConfigError: a value is out of its range.
    """

    brightness: float = 0.0
    contrast: float = 0.0
    saturation: float = 0.0
    hue: float = 0.0
    grayscale: float = 0.0
    blur: float = 0.0
    solarize: float = 0.0

    def __post_init__(self) -> None:
        highest = {"hue": 0.5, "grayscale": 1.0, "blur": 1.0, "solarize": 1.0}
        for name, value in asdict(self).items():
            if not 0 <= value <= highest.get(name, float("inf")):
                most = f" to {highest[name]}" if name in highest else " up"
                raise ConfigError(f"recipe.color_jitter.{name}={value}: expected 0{most}")

    def __call__(self, pixels: NDArray[np.uint8], entropy: Sequence[int]) -> NDArray[np.uint8]:
        """uint8 [H, W, 3] to the same; equal entropy gives equal pixels."""
        random = np.random.default_rng(list(entropy))
        image = torch.from_numpy(pixels.copy()).permute(2, 0, 1)
        for strength, adjust in (
            (self.brightness, transforms.adjust_brightness),
            (self.contrast, transforms.adjust_contrast),
            (self.saturation, transforms.adjust_saturation),
        ):
            if strength:
                image = adjust(image, float(random.uniform(max(0.0, 1 - strength), 1 + strength)))
        if self.hue:
            image = transforms.adjust_hue(image, float(random.uniform(-self.hue, self.hue)))
        if self.grayscale and random.random() < self.grayscale:
            image = transforms.rgb_to_grayscale(image, num_output_channels=3)
        if self.blur and random.random() < self.blur:
            width = max(3, min(image.shape[-2:]) // 10 | 1)  # odd
            sigma = float(random.uniform(*_BLUR_SIGMA))
            image = transforms.gaussian_blur(image, [width, width], [sigma, sigma])
        if self.solarize and random.random() < self.solarize:
            image = transforms.solarize(image, _SOLARIZE_FROM)
        return np.asarray(image.permute(1, 2, 0).contiguous().numpy())

    def __bool__(self) -> bool:
        return any(asdict(self).values())
