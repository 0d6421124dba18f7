"""Colours varied in ways that teachers did not see."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image
from preceptor.errors import ConfigError
from preceptor.train.photometric import ColorJitter


@pytest.fixture
def photograph() -> np.ndarray:
    random = np.random.default_rng(2)
    coarse = Image.fromarray(random.integers(0, 256, (6, 6, 3), dtype=np.uint8))
    buffer = io.BytesIO()
    coarse.resize((40, 40), Image.Resampling.BICUBIC).save(buffer, "jpeg")
    return np.asarray(Image.open(buffer))


def test_each_change_does_what_its_name_says(photograph: np.ndarray) -> None:
    import colorsys

    gray = ColorJitter(grayscale=1.0)(photograph, [0])
    assert (gray[..., 0] == gray[..., 1]).all()
    luma = photograph @ np.array([0.299, 0.587, 0.114])
    assert abs(gray[..., 0] - luma).max() <= 1.5

    inverted = ColorJitter(solarize=1.0)(photograph, [0])
    expected = np.where(photograph >= 128, 255 - photograph, photograph)
    assert (inverted == expected).all()

    blurred = ColorJitter(blur=1.0)(photograph, [3]).astype(float)
    for axis in (0, 1):
        before = np.abs(np.diff(photograph.astype(float), axis=axis)).mean()
        assert np.abs(np.diff(blurred, axis=axis)).mean() < before
    assert abs(blurred.mean() - photograph.mean()) < 1

    turned = ColorJitter(hue=0.5)(photograph, [1])
    hues = [
        [colorsys.rgb_to_hsv(*pixel)[0] for pixel in image.reshape(-1, 3) / 255]
        for image in (photograph, turned)
    ]
    vivid = np.ptp(photograph.reshape(-1, 3), axis=1) > 60
    turn = (np.array(hues[1]) - np.array(hues[0]))[vivid] % 1
    assert np.ptp(turn) < 0.05  # one turn for all pixels
    drawn = np.random.default_rng([1]).uniform(-0.5, 0.5)
    assert abs(turn.mean() - drawn % 1) < 0.01


def test_probabilities_are_kept_and_draws_are_repeatable(photograph: np.ndarray) -> None:
    jitter = ColorJitter(grayscale=0.25)
    gray = [
        bool((found[..., 0] == found[..., 2]).all())
        for found in (jitter(photograph, [1, 0, row]) for row in range(400))
    ]
    assert 70 < sum(gray) < 130
    whole = ColorJitter(0.4, 0.4, 0.4, 0.1, 0.5, 0.5, 0.5)
    assert (whole(photograph, [1, 2, 3]) == whole(photograph, [1, 2, 3])).all()
    assert (whole(photograph, [1, 2, 3]) != whole(photograph, [1, 2, 4])).any()
    assert bool(whole)
    assert not ColorJitter()


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"hue": 0.6}, "recipe.color_jitter.hue=0.6: expected 0 to 0.5"),
        ({"blur": 1.5}, "recipe.color_jitter.blur=1.5: expected 0 to 1.0"),
        ({"contrast": -0.1}, "recipe.color_jitter.contrast=-0.1: expected 0 up"),
    ],
)
def test_impossible_changes_are_refused(options: dict[str, float], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        ColorJitter(**options)
