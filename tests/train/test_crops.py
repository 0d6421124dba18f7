"""Random crops of stored views, and the regions of the teachers' grids that go with them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image
from preceptor.cache import Cache
from preceptor.errors import ConfigError
from preceptor.train.alignment.spaces import Space
from preceptor.train.crops import RandomCrop, crop_tokens, random_crop, taught
from preceptor.train.data import TrainData
from preceptor.train.views import StoredViews

BOTH = ["vit/patch", "vit/cls"]


def bilinear(tokens: np.ndarray, grid: tuple[int, int], region: np.ndarray) -> np.ndarray:
    """float64 [h * w, D]: the grid sampled at the centres of the region's cells, in plain loops."""
    rows, columns = grid
    maps = tokens.astype(np.float64).reshape(rows, columns, -1)
    left, top, right, bottom = region.astype(np.float64)
    out = np.zeros_like(maps)
    for i in range(rows):
        for j in range(columns):
            y = (top + (i + 0.5) / rows * (bottom - top)) * rows - 0.5
            x = (left + (j + 0.5) / columns * (right - left)) * columns - 0.5
            y, x = min(max(y, 0), rows - 1), min(max(x, 0), columns - 1)
            a, b = int(y), int(x)
            c, d = min(a + 1, rows - 1), min(b + 1, columns - 1)
            u, v = y - a, x - b
            out[i, j] = (1 - u) * ((1 - v) * maps[a, b] + v * maps[a, d])
            out[i, j] += u * ((1 - v) * maps[c, b] + v * maps[c, d])
    return out.reshape(rows * columns, -1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("grid", [(4, 4), (7, 5), (1, 3)])
def test_regions_of_a_grid_are_bilinear(grid: tuple[int, int], dtype: torch.dtype) -> None:
    random = np.random.default_rng(0)
    tokens = torch.from_numpy(random.normal(size=(6, grid[0] * grid[1], 3))).to(dtype)
    low, high = random.uniform(0, 0.5, (6, 2)), random.uniform(0.5, 1, (6, 2))
    regions = torch.from_numpy(np.concatenate([low, high], 1).astype(np.float32))
    regions[0] = torch.tensor([0.0, 0.0, 1.0, 1.0])
    found = crop_tokens(tokens, grid, regions)
    assert found.dtype == dtype
    for one, part, region in zip(found, tokens, regions, strict=True):
        expected = bilinear(part.numpy(), grid, region.numpy())
        # boxes are shares in float32
        np.testing.assert_allclose(one.numpy(), expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(found[0], tokens[0], rtol=0, atol=1e-6)  # all of it is itself


def test_crops_show_the_region_whose_tokens_they_bring(full_bed) -> None:
    """Pixels are cut from the image by PIL, tokens belong to that part, mirrored views included."""
    cache, crop = Cache.open(full_bed.cache), RandomCrop((0.2, 0.6), seed=3)
    views = StoredViews(cache, full_bed.index, (20, 28), crop=crop)
    seen = set()
    for number, batch in enumerate(TrainData(cache, views, BOTH, 8, seed=1).batches(0, 10)):
        assert batch.grids == {"vit/patch": (4, 4)}
        assert batch.regions is not None
        for pixels, row, region in zip(
            batch.pixels, batch.rows.tolist(), batch.regions, strict=True
        ):
            image, mirrored = full_bed.index.image(row // 2), row % 2 == 1
            width, height = image.size
            left, top, right, bottom = crop.box(row, number // 5, width, height)
            assert 0 <= left < right <= width
            assert 0 <= top < bottom <= height
            assert 0.1 < (right - left) * (bottom - top) / (width * height) < 0.65
            cut = image.resize((28, 20), Image.Resampling.BICUBIC, box=(left, top, right, bottom))
            expected = np.asarray(cut)[:, ::-1] if mirrored else np.asarray(cut)
            assert np.array_equal(pixels.numpy(), expected)
            if mirrored:
                left, right = width - right, width - left
            shares = [left / width, top / height, right / width, bottom / height]
            np.testing.assert_allclose(region.numpy(), shares, rtol=1e-6)
            seen.add((row, tuple(shares)))
    assert len(seen) == 80  # another box for every row


def test_crops_need_whole_images_and_known_options(bed) -> None:
    cache = Cache.open(bed.cache)
    with pytest.raises(ConfigError, match=r"recipe.crop needs .*views.name=random"):
        StoredViews(cache, bed.index, (32, 32), crop=RandomCrop())
    with pytest.raises(ConfigError, match=r"recipe.crop.scales: valid are scale, ratio"):
        random_crop({"scales": [0.1, 1]}, 0)
    with pytest.raises(ConfigError, match=r"recipe.crop.scale is a part of the image's area"):
        random_crop({"scale": [0.1, 2]}, 0)
    assert random_crop(None, 0) is None


DENSE, GLOBAL = Space("vit", 4, 8, (2, 2)), Space("vit", 1, 8, None)
STORED = {"vit/patch": DENSE, "vit/cls": GLOBAL, "face/id": Space("face", 1, 4, None)}


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [("vit", {"vit/patch"}), (["vit"], {"vit/patch"}), (["vit/patch"], {"vit/patch"})],
)
def test_crops_without_descriptors_teach_what_is_on_grids(wanted, kept) -> None:
    assert taught(RandomCrop(descriptors=False), STORED, wanted).keys() == kept
    for crop in (None, RandomCrop()):
        assert taught(crop, STORED, wanted) == STORED


@pytest.mark.parametrize(
    ("wanted", "told"),
    [
        (None, r"nothing else of face to learn: .*=true, or .* align.spaces=\[vit\]$"),
        (["face", "vit/cls"], r"nothing else of face, vit/cls to learn: say .*=true$"),
        (["vit/patch", "vit/cls"], r"nothing else of vit/cls to learn: .*=\[vit/patch\]$"),
        ("face/id", r"nothing else of face/id to learn: say .*=true$"),
        (["clip"], r"'clip', .*; there are vit/patch, vit/cls, face/id$"),
    ],
)
def test_what_was_asked_for_does_not_vanish_from_crops(wanted, told) -> None:
    with pytest.raises(ConfigError, match=told):
        taught(RandomCrop(descriptors=False), STORED, wanted)
