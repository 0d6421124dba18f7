"""Views against torchvision and a float64 resampler."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from preceptor.cache import StoreWriter
from preceptor.cache.views import View, ViewPolicy
from preceptor.errors import ConfigError, DataError, StoreError
from scipy.stats import ks_2samp
from small_stores import make_plan
from torchvision.transforms import InterpolationMode, RandomResizedCrop
from torchvision.transforms import functional as F

sides = st.integers(1, 700)
keys = st.text(min_size=1, max_size=12)


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(
        np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    )


def cubic(x: np.ndarray) -> np.ndarray:
    x = np.abs(x)
    near = 1.5 * x**3 - 2.5 * x**2 + 1
    far = -0.5 * x**3 + 2.5 * x**2 - 4 * x + 2
    return np.where(x < 1, near, np.where(x < 2, far, 0.0))


def triangle(x: np.ndarray) -> np.ndarray:
    return np.clip(1 - np.abs(x), 0, None)


def weights(
    source: int, start: float, stop: float, target: int, kernel, reach: float
) -> np.ndarray:
    """Antialiased resampling of [start, stop) to ``target`` samples as a float64 matrix."""
    scale = (stop - start) / target
    wide = max(scale, 1.0)
    centre = start + (np.arange(target) + 0.5) * scale
    position = np.arange(source) + 0.5
    distance = position[None] - centre[:, None]
    matrix = np.where(np.abs(distance) <= reach * wide + 0.5, kernel(distance / wide), 0.0)
    return matrix / matrix.sum(1, keepdims=True)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(2, 60),
    st.integers(2, 60),
    st.integers(1, 40),
    st.integers(1, 40),
    st.data(),
    st.sampled_from([("bicubic", cubic, 2.0), ("bilinear", triangle, 1.0)]),
    st.booleans(),
)
def test_pixels_equal_a_float64_resampler(width, height, h, w, data, method, flip) -> None:
    left = data.draw(st.floats(0, width - 1))
    top = data.draw(st.floats(0, height - 1))
    right = data.draw(st.floats(left + 0.5, width))
    bottom = data.draw(st.floats(top + 0.5, height))
    image = photo(width, height)
    name, kernel, reach = method
    across = weights(width, left, right, w, kernel, reach)
    down = weights(height, top, bottom, h, kernel, reach)
    source = np.asarray(image, np.float64)
    # An 8-bit resampler rounds and clips between its two passes, in an order of its choice.
    row_first = np.clip(np.rint(np.einsum("xk,ykc->yxc", across, source)), 0, 255)
    row_first = np.clip(np.einsum("yk,kxc->yxc", down, row_first), 0, 255)
    column_first = np.clip(np.rint(np.einsum("yk,kxc->yxc", down, source)), 0, 255)
    column_first = np.clip(np.einsum("xk,ykc->yxc", across, column_first), 0, 255)
    pixels = View((left, top, right, bottom), flip).pixels(image, (h, w), name)
    assert pixels.shape == (h, w, 3)
    assert pixels.dtype == np.uint8
    assert pixels.flags["C_CONTIGUOUS"]
    if flip:
        pixels = pixels[:, ::-1]
    # Half a level of the last rounding, and one of the first through weights that add up to 1.3.
    assert min(np.abs(pixels - truth).max() for truth in (row_first, column_first)) <= 1.8


@pytest.mark.parametrize("name", ["bicubic", "bilinear", "nearest", "lanczos"])
def test_center_view_equals_torchvision(name: str) -> None:
    # With corners on whole pixels, both sides do the same single resize.
    image = photo(91, 64)
    view = ViewPolicy("center").draw("k", 0, 91, 64)
    assert view.box == (13.5, 0.0, 77.5, 64.0)
    square = photo(64, 64)
    whole = ViewPolicy("center").draw("k", 0, 64, 64).pixels(square, (32, 32), name)
    truth = F.resize(square, [32, 32], InterpolationMode(name))
    assert np.array_equal(whole, np.asarray(truth))
    even = photo(90, 64)
    same = ViewPolicy("center").draw("k", 0, 90, 64).pixels(even, (64, 64), name)
    assert np.array_equal(same, np.asarray(F.center_crop(even, [64, 64])))
    full = ViewPolicy("full").draw("k", 0, 91, 64).pixels(image, (20, 30), name)
    assert np.array_equal(full, np.asarray(F.resize(image, [20, 30], InterpolationMode(name))))


def test_random_views_are_distributed_as_torchvisions() -> None:
    scale, ratio, (width, height) = (0.2, 0.9), (3 / 4, 4 / 3), (640, 480)
    policy = ViewPolicy("random", count=1, scale=scale, ratio=ratio)
    ours = np.array([policy.draw(f"key{i}", 0, width, height).box for i in range(3000)])
    torch.manual_seed(0)
    blank = Image.new("L", (width, height))
    theirs = [RandomResizedCrop.get_params(blank, list(scale), list(ratio)) for _ in range(3000)]
    top, left, h, w = np.array(theirs, float).T
    pairs = {
        "area": ((ours[:, 2] - ours[:, 0]) * (ours[:, 3] - ours[:, 1]), h * w),
        "ratio": ((ours[:, 2] - ours[:, 0]) / (ours[:, 3] - ours[:, 1]), w / h),
        "left": (ours[:, 0], left),
        "top": (ours[:, 1], top),
    }
    for name, (a, b) in pairs.items():
        # Both samples are fixed by their seeds; 0.05 is the 0.1 % level at this size.
        assert ks_2samp(a, b).statistic < 0.05, name


@settings(max_examples=150, deadline=None)
@given(keys, st.integers(0, 5), sides, sides, st.integers(0, 2**40), st.booleans())
def test_random_views_stay_in_bounds_and_repeat(key, number, width, height, seed, flip) -> None:
    policy = ViewPolicy("random", count=6, flip=flip, seed=seed)
    view = policy.draw(key, number, width, height)
    assert view == ViewPolicy(**policy.describe()).draw(key, number, width, height)
    left, top, right, bottom = view.box
    assert 0 <= left < right <= width
    assert 0 <= top < bottom <= height
    assert tuple(np.float32(view.box).astype(float)) == view.box
    assert flip or not view.flip
    w, h = right - left, bottom - top
    if 3 / 4 <= width / height <= 4 / 3:  # then some box of half the area always fits the fallback
        assert w * h >= 0.5 * width * height * (1 - 1e-4)
    assert math.log(3 / 4) - 1e-3 <= math.log(w / h) <= math.log(4 / 3) + 1e-3


def test_random_views_differ_by_seed_key_and_number() -> None:
    views = {
        ViewPolicy("random", count=4, flip=True, seed=seed).draw(key, number, 99, 77).box
        for seed in range(4)
        for key in ("a", "b", "1", "11")
        for number in range(4)
    }
    assert len(views) == 64
    policy = ViewPolicy("random", flip=True)
    flips = [policy.draw(str(i), 0, 99, 77).flip for i in range(2000)]
    assert 900 < sum(flips) < 1100
    # A fixed point: rows of a store are computed from this box.
    assert ViewPolicy("random", seed=3).draw("n01440764_10026", 0, 500, 375).box == (
        63.3389778137207,
        19.017478942871094,
        431.1262512207031,
        370.776123046875,
    )


@given(sides, sides, st.floats(0.01, 1))
def test_center_view_is_the_largest_centred_square(width, height, crop) -> None:
    left, top, right, bottom = ViewPolicy("center", crop=crop).draw("k", 0, width, height).box
    side = min(width, height) * crop
    assert right - left == pytest.approx(side, rel=1e-3)
    assert bottom - top == pytest.approx(side, rel=1e-3)
    assert left + right == pytest.approx(width, rel=1e-5)
    assert top + bottom == pytest.approx(height, rel=1e-5)


def test_fixed_policies_mirror_their_second_view() -> None:
    image = photo(20, 30)
    for name in ("center", "full"):
        policy = ViewPolicy(name, count=2, flip=True)
        plain, mirrored = (policy.draw("k", n, 20, 30).pixels(image, (8, 8)) for n in range(2))
        assert np.array_equal(plain[:, ::-1], mirrored)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"name": "centre"}, "unknown view policy 'centre'; known: center, full, random"),
        ({"crop": 0.0}, "views.crop"),
        ({"crop": 1.5}, "views.crop"),
        ({"scale": (0.9, 0.5)}, "views.scale"),
        ({"scale": (0.5, 1.5)}, "views.scale"),
        ({"scale": (0.5,)}, "views.scale"),
        ({"ratio": (0.0, 1.0)}, "views.ratio"),
        ({"count": 0}, "views.count"),
        ({"count": 2}, "views.count=1"),
        ({"flip": True}, "views.count=2"),
    ],
)
def test_bad_options_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        ViewPolicy(**options)


def test_boxes_outside_the_image_are_refused() -> None:
    for box in ((0, 0, 11, 5), (-1, 0, 5, 5), (5, 5, 5, 9), (0, 0, math.nan, 5)):
        with pytest.raises(DataError, match="does not lie in an image of 10 x 10"):
            View(box).pixels(photo(10, 10), (4, 4))
    with pytest.raises(ConfigError, match="unknown interpolation 'cubic'"):
        View((0, 0, 5, 5)).pixels(photo(10, 10), (4, 4), "cubic")


def test_a_store_that_was_begun_with_a_crop_of_1_goes_on_with_one_of_1_0(tmp_path: Path) -> None:
    """And a new one states 1.0 whichever of the two is given."""
    now = ViewPolicy("center", crop=1).describe()
    assert repr(now["crop"]) == "1.0"
    begun = replace(make_plan(), views={**now, "crop": 1})
    manifest = StoreWriter.open_or_create(tmp_path, begun).manifest
    writer = StoreWriter.open_or_create(tmp_path, replace(begun, views=now))
    assert repr(writer.plan.views["crop"]) == "1"
    assert writer.manifest.configuration("rows") == manifest.configuration("rows")
    with pytest.raises(StoreError, match=r"views.crop is 1 in the store and 0\.5"):
        StoreWriter.open_or_create(tmp_path, replace(begun, views={**now, "crop": 0.5}))
