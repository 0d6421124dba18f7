"""Corruptions against their formulas, and readouts of equal width against the SVD."""

from __future__ import annotations

import colorsys
import io

import numpy as np
import pytest
from PIL import Image
from preceptor.errors import ConfigError
from preceptor.train.evaluation import Features, reduce_width
from preceptor.train.evaluation.corruptions import CORRUPTIONS, SEVERITIES, Corruption


@pytest.fixture
def photo():
    y, x = np.mgrid[0:230, 0:224]
    waves = [np.sin(x / (3 + c)) * np.cos(y / (4 - c)) for c in range(3)]
    return (127.5 + 100 * np.stack(waves, -1)).astype(np.uint8)


@pytest.mark.parametrize("name", CORRUPTIONS)
def test_severer_is_farther_and_nothing_is_left_to_chance(name, photo):
    before = photo.copy()
    distances = []
    for severity in SEVERITIES:
        found = Corruption(name, severity)(photo, 3)
        assert (found.dtype, found.shape) == (np.uint8, photo.shape)
        assert np.array_equal(found, Corruption(name, severity)(photo, 3))
        distances.append(np.square(found.astype(float) - photo).mean())
    assert distances == sorted(distances)
    assert distances[0] > 0
    assert np.array_equal(photo, before)


def test_noise_differs_between_images_and_has_the_stated_deviation():
    grey = np.full((224, 224, 3), 128, np.uint8)
    first, second = (Corruption("gaussian_noise", 2)(grey, n).astype(float) for n in (0, 1))
    assert np.std(first - 128) / 255 == pytest.approx(0.12, rel=0.02)
    assert abs(np.corrcoef(first.ravel(), second.ravel())[0, 1]) < 0.02


def test_brightness_adds_to_the_value_of_hsv(photo):
    found = Corruption("brightness", 3)(photo)
    for y, x in ((0, 0), (7, 21), (140, 99)):
        h, s, v = colorsys.rgb_to_hsv(*(photo[y, x] / 255))
        expected = np.array(colorsys.hsv_to_rgb(h, s, min(v + 0.3, 1))) * 255
        np.testing.assert_allclose(found[y, x], expected, atol=0.51)
    black = np.zeros((4, 4, 3), np.uint8)
    assert (Corruption("brightness", 1)(black) == 13).all()


def test_contrast_shrinks_deviations_from_the_mean(photo):
    found = Corruption("contrast", 1)(photo).astype(float)
    mean = photo.astype(float).mean((0, 1))
    np.testing.assert_allclose(found, mean + 0.4 * (photo - mean), atol=0.51)


def test_jpeg_is_what_pillow_writes_at_that_quality(photo):
    buffer = io.BytesIO()
    Image.fromarray(photo).save(buffer, "JPEG", quality=10)
    assert np.array_equal(Corruption("jpeg", 4)(photo), np.asarray(Image.open(buffer)))


def test_pixelate_makes_blocks():
    steps = np.arange(224)[:, None, None]
    found = Corruption("pixelate", 5)(np.broadcast_to(steps, (224, 224, 3)).astype(np.uint8))
    assert [len(set(column)) for column in found[:, 0].T] == [56, 56, 56]
    assert found[:4, 0, 0].tolist() == [2, 2, 2, 2]  # mean of 0, 1, 2, 3, rounded


def test_strengths_are_those_of_the_benchmarks_two_sizes():
    for side, deviation in ((32, 0.06), (224, 0.12), (512, 0.12), (85, 0.0902)):
        grey = np.full((side, side + 9, 3), 128, np.uint8)
        found = [Corruption("gaussian_noise", 2)(grey, n).astype(float) for n in range(6)]
        assert np.std(np.concatenate(found) - 128) / 255 == pytest.approx(deviation, rel=0.03)


@pytest.mark.parametrize("deviation", [0.4, 6.0])
def test_blur_is_a_normalised_gaussian(deviation):
    side = {0.4: 32, 6.0: 224}[deviation]
    severity = {0.4: 1, 6.0: 5}[deviation]
    image = np.zeros((side, side, 3), np.uint8)
    image[:, side // 2 :] = 255
    found = Corruption("gaussian_blur", severity)(image)[0, :, 0] / 255
    offset = np.arange(-40, 41)
    kernel = np.exp(-(offset**2) / (2 * deviation**2))
    step = np.pad(image[0, :, 0] / 255, 40, mode="edge")
    expected = np.convolve(step, kernel / kernel.sum(), mode="valid")
    np.testing.assert_allclose(found, expected, atol=0.003)


def test_mistakes_are_told():
    with pytest.raises(ConfigError, match=r"'fog': valid are gaussian_noise"):
        Corruption("fog", 1)
    with pytest.raises(ConfigError, match="1 to 5"):
        Corruption("jpeg", 6)
    with pytest.raises(ConfigError, match="width=0"):
        reduce_width(Features(np.ones((2, 2), "f4"), np.ones((2, 2), "f4")), 0)


@pytest.mark.parametrize("grid", [None, (2, 3)])
@pytest.mark.parametrize("images", [6, 50])
def test_reduction_is_the_svd_of_centred_training_features(grid, images):
    random = np.random.default_rng(1)
    shape = (20,) if grid is None else (6, 20)
    spread = random.normal(size=(20, 20))
    train, test, noisy = (
        (random.normal(2, 1, size=(n, *shape)) @ spread).astype(np.float32) for n in (images, 9, 9)
    )
    found = reduce_width(Features(train, test, grid, {("jpeg", 1): noisy}), 4)
    rows = train.reshape(-1, 20).astype(np.float64)
    mean = rows.mean(0)
    basis = np.linalg.svd(rows - mean, full_matrices=False)[2][:4].T
    parts = ((found.train, train), (found.test, test), (found.corrupted["jpeg", 1], noisy))
    for part, source in parts:
        expected = (source - mean) @ basis
        sign = np.sign((part * expected).reshape(-1, 4).sum(0))
        np.testing.assert_allclose(part, expected * sign, atol=5e-3)
    assert found.width == 4
    # Test images play no part in it.
    other = reduce_width(Features(train, test * 100, grid), 4)
    assert np.array_equal(other.train, found.train)


def test_features_that_are_narrower_keep_their_distances():
    train = np.random.default_rng(2).normal(3, 1, size=(30, 5)).astype(np.float32)
    found = reduce_width(Features(train, train), 64)
    assert found.width == 5
    np.testing.assert_allclose(
        np.linalg.norm(found.train[:1] - found.train, axis=1),
        np.linalg.norm(train[:1] - train, axis=1),
        atol=1e-4,
    )
