"""What feeds a student beside decoded views: epochs, stored pixels, damage, crops, colours."""

from __future__ import annotations

import io
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from preceptor.benchmarks.faults import flip
from preceptor.cache import Cache
from preceptor.cache.samples import SampleIndex
from preceptor.errors import ConfigError, DataError, StoreError
from preceptor.train.alignment.spaces import Space
from preceptor.train.crops import RandomCrop, crop_tokens, random_crop, taught
from preceptor.train.data import TrainData
from preceptor.train.epoch_views import EpochViews
from preceptor.train.photometric import ColorJitter
from preceptor.train.views import StoredViews, StorePixels, choose_views

BOTH = ["vit/patch", "vit/cls"]


# -- epochs ----------------------------------------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    views=st.integers(1, 5),
    images=st.integers(1, 12),
    seed=st.integers(0, 3),
    cycle=st.integers(0, 2),
    data=st.data(),
)
def test_an_epoch_has_one_view_of_every_image_and_a_cycle_has_all(
    views: int, images: int, seed: int, cycle: int, data: st.DataObject
) -> None:
    valid = np.array(
        data.draw(st.lists(st.booleans(), min_size=views * images, max_size=views * images))
    )
    chosen = EpochViews(valid, views, seed)
    alive = [i for i in range(images) if any(valid[i * views : (i + 1) * views])]
    assert chosen.images == len(alive)
    used: set[int] = set()
    for epoch in range(cycle * views, (cycle + 1) * views):
        shown = chosen.rows(epoch).tolist()
        assert [row // views for row in shown] == alive
        assert valid[shown].all()
        assert shown == EpochViews(valid, views, seed).rows(epoch).tolist()
        used |= set(shown)
    assert used == set(np.flatnonzero(valid).tolist())


@settings(max_examples=60, deadline=None)
@given(views=st.integers(1, 5), images=st.integers(1, 12), seed=st.integers(0, 3), data=st.data())
def test_the_first_views_are_those_of_a_store_that_has_no_others(
    views: int, images: int, seed: int, data: st.DataObject
) -> None:
    first = data.draw(st.integers(1, views))
    valid = np.array(
        data.draw(st.lists(st.booleans(), min_size=views * images, max_size=views * images))
    )
    chosen = EpochViews(valid, views, seed, first)
    alone = EpochViews(valid.reshape(images, views)[:, :first].ravel(), first, seed)
    assert chosen.images == alone.images
    for epoch in range(2 * first):
        image, view = np.divmod(alone.rows(epoch), first)
        assert chosen.rows(epoch).tolist() == (image * views + view).tolist()


def test_images_differ_in_the_view_that_an_epoch_shows() -> None:
    chosen = EpochViews(np.ones(4000, bool), 4, 0)
    shares = np.bincount(chosen.rows(0) % 4, minlength=4) / 1000
    assert (abs(shares - 0.25) < 0.05).all()
    assert (chosen.rows(0) != EpochViews(np.ones(4000, bool), 4, 1).rows(0)).any()
    assert (chosen.rows(0) != chosen.rows(4)).any()  # the next cycle has other offsets


# -- pixels of the store ---------------------------------------------------------------------------


def everything(data: TrainData, stop: int) -> list[tuple[torch.Tensor, ...]]:
    return [
        (b.rows, b.pixels, *(part for name in BOTH for part in b.tokens[name].parts.values()))
        for b in data.batches(0, stop)
    ]


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("jitter", [ColorJitter(), ColorJitter(0.4, 0.4, 0.4, 0.1, 0.2, 0.5, 0.2)])
def test_stored_pixels_are_what_decoding_gives_to_the_bit(
    pixel_bed, workers: int, jitter: ColorJitter
) -> None:
    cache = Cache.open(pixel_bed.cache)

    def refused() -> SampleIndex:
        raise AssertionError("the images are not needed")

    stored, told = choose_views(cache, refused, (32, 32), jitter=jitter, seed=4)
    assert isinstance(stored, StorePixels)
    assert told == "pixels: from the store (32 x 32, bicubic)"
    decoded = StoredViews(cache, pixel_bed.index, (32, 32), jitter=jitter, seed=4)
    sides = [
        everything(TrainData(cache, views, BOTH, 8, seed=2, workers=workers), 7)
        for views in (stored, decoded)
    ]
    for one, other in zip(*sides, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    rows = [(3, 1), (70, 0), (4, 2)]
    assert torch.equal(stored.__getitems__(rows), decoded.__getitems__(rows))


def test_other_sizes_and_resamplings_are_decoded_and_said(pixel_bed) -> None:
    cache = Cache.open(pixel_bed.cache)
    views, told = choose_views(cache, lambda: pixel_bed.index, (24, 16))
    assert isinstance(views, StoredViews)
    assert "decoded from data.shards (the store's are 32 x 32, bicubic, the student takes" in told
    views, told = choose_views(cache, lambda: pixel_bed.index, (32, 32), interpolation="bilinear")
    assert isinstance(views, StoredViews)
    with pytest.raises(ConfigError, match=r"data.shards is null .*24 x 16.*pixels.size=\[24,16\]"):
        choose_views(cache, None, (24, 16))


def test_without_stored_pixels_images_are_needed(bed) -> None:
    with pytest.raises(ConfigError, match=r"data.shards is null .*the store holds none"):
        choose_views(Cache.open(bed.cache), None, (32, 32))


# -- damage on the way -----------------------------------------------------------------------------


@pytest.fixture
def damaged(pixel_bed, tmp_path: Path) -> Path:
    """A copy of the store in which one group of codes, rows 40 to 43, is damaged."""
    path = tmp_path / "store"
    shutil.copytree(pixel_bed.cache, path)
    file = path / "spaces/vit/patch/codes/c.1.0.0"
    raw = bytearray(file.read_bytes())
    raw[2 * (4 * 16 * 24 + 4) + 7] ^= 1  # in the third group of four rows of shard 1
    file.write_bytes(bytes(raw))
    return path


def of(path: Path, bed, **options) -> TrainData:
    cache = Cache.open(path)
    views = StoredViews(cache, bed.index, (32, 32))
    return TrainData(cache, views, BOTH, 8, seed=5, **options)


def test_a_damaged_group_stops_with_its_name(damaged: Path, pixel_bed) -> None:
    with pytest.raises(StoreError, match=r"damaged in shard 1 of vit: group 2 of spaces/vit/patch"):
        list(of(damaged, pixel_bed).batches(0, 5))


def test_a_damaged_group_is_skipped_and_the_rest_of_the_epoch_is_as_it_was(
    damaged: Path, pixel_bed
) -> None:
    rows = set(range(40, 44))
    whole = list(of(Path(pixel_bed.cache), pixel_bed).batches(0, 10))
    found = list(of(damaged, pixel_bed, on_damaged="skip").batches(0, 10))
    again = list(of(damaged, pixel_bed, on_damaged="skip").batches(3, 10))
    assert len(found) == len(whole)  # equal steps
    skipped = 0
    for number, (good, batch) in enumerate(zip(whole, found, strict=True)):
        bad = [place for place, row in enumerate(good.rows.tolist()) if row in rows]
        kept = [place for place in range(8) if place not in bad]
        skipped += len(bad)
        assert len(batch.skipped) == len(bad)
        assert all("shard 1 of vit: group 2" in sentence for sentence in batch.skipped)
        assert not rows & set(batch.rows.tolist())
        assert batch.rows[kept].tolist() == good.rows[kept].tolist()
        for place, row in enumerate(batch.rows.tolist()):  # rows, pixels and tokens stay together
            like = good.rows.tolist().index(row)
            assert torch.equal(batch.pixels[place], good.pixels[like])
            for name in BOTH:
                for part, other in zip(
                    batch.tokens[name].parts.values(), good.tokens[name].parts.values(), strict=True
                ):
                    assert torch.equal(part[place], other[like])
        if number >= 3:
            assert batch.rows.tolist() == again[number - 3].rows.tolist()
    assert skipped == 4


def test_ranks_keep_equal_steps_when_one_meets_damage(damaged: Path, pixel_bed) -> None:
    parts = [
        list(of(damaged, pixel_bed, on_damaged="skip", rank=rank, world=2).batches(0, 4))
        for rank in range(2)
    ]
    assert [len(part) for part in parts] == [4, 4]
    assert all(len(batch.rows) == 8 for part in parts for batch in part)
    assert sum(len(batch.skipped) for part in parts for batch in part) > 0


def test_damaged_pixels_of_the_store_are_skipped_too(pixel_bed, tmp_path: Path) -> None:
    path = tmp_path / "store"
    shutil.copytree(pixel_bed.cache, path)
    flip(path / "pixels/c.0.0.0.0", np.random.default_rng(1))
    cache = Cache.open(path)
    data = TrainData(cache, StorePixels(cache), BOTH, 8, on_damaged="skip")
    sentences = {s for batch in data.batches(0, 10) for s in batch.skipped}
    assert len(sentences) == 1
    assert "shard 0 of pixels" in sentences.pop()


def test_a_batch_without_a_sound_row_stops(pixel_bed, tmp_path: Path) -> None:
    path = tmp_path / "store"
    shutil.copytree(pixel_bed.cache, path)
    for shard in range(3):
        file = path / f"spaces/vit/patch/scales/c.{shard}.0"
        file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(DataError, match=r"every row of a batch is damaged.*scales"):
        list(of(path, pixel_bed, on_damaged="skip").batches(0, 1))


@pytest.fixture
def bad_image(pixel_bed, tmp_path: Path) -> SampleIndex:
    """The shard with the data of one image overwritten: train-020."""
    path = tmp_path / "train.tar"
    raw = bytearray(Path(pixel_bed.shards).read_bytes())
    with tarfile.open(pixel_bed.shards) as tar:
        member = tar.getmember("train-020.png")
    at = raw.index(b"IDAT", member.offset_data) + 4
    raw[at : at + 60] = bytes(60)
    path.write_bytes(raw)
    return SampleIndex.from_shards(str(path))


@pytest.mark.parametrize("workers", [0, 2])
def test_an_image_that_cannot_be_decoded(pixel_bed, bad_image: SampleIndex, workers: int) -> None:
    cache = Cache.open(pixel_bed.cache)
    views = StoredViews(cache, bad_image, (32, 32))
    data = TrainData(cache, views, BOTH, 8, workers=workers)
    with pytest.raises(DataError, match=r"'train-020' in shard .*cannot be decoded"):
        list(data.batches(0, 5))
    data = TrainData(cache, views, BOTH, 8, workers=workers, on_damaged="skip")
    batches = list(data.batches(0, 5))
    assert [s for b in batches for s in b.skipped if "'train-020'" not in s] == []
    assert sum(len(b.skipped) for b in batches) == 1
    assert not {40, 41} & {row for b in batches for row in b.rows.tolist()}


# -- crops -----------------------------------------------------------------------------------------


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


def test_a_signal_to_all_processes_of_a_run_leaves_it_its_images(bed) -> None:
    """As Ctrl-C, torchrun and Slurm send them: the run finishes its step and saves.

    In a process of its own, as a run is: among all tests it failed in workers that were forked from
    a process with everything loaded, where a thread that does not block the signal may take it.
    """
    script = (
        "import multiprocessing, subprocess, sys, torch\n"
        "from preceptor.cache import Cache, SampleIndex\n"
        "from preceptor.train.loading import decoded\n"
        "from preceptor.train.views import StoredViews\n"
        "index = SampleIndex.from_shards(sys.argv[2])\n"
        "views = StoredViews(Cache.open(sys.argv[1]), index, (32, 32))\n"
        "orders = [[(row, 0)] for row in range(30)]  # more than workers hold ready\n"
        "images = decoded(views, orders, workers=2)\n"
        "found = [next(images), next(images)]  # one of each worker: both have begun\n"
        "pids = [str(worker.pid) for worker in multiprocessing.active_children()]\n"
        "assert len(pids) == 2\n"
        "for name in ('-INT', '-TERM'):\n"
        "    subprocess.run(['kill', name, *pids], check=True)\n"
        "found += images\n"
        "assert torch.equal(torch.cat(found), views.__getitems__(list(range(30))))\n"
        "again = decoded(views, orders, workers=1)\n"
        "next(again)\n"
        "(worker,) = multiprocessing.active_children()\n"
        "worker.terminate()  # by the run itself\n"
        "worker.join()\n"
        "assert worker.exitcode == 0\n"
        "print('whole', flush=True)\n"
    )
    command = [sys.executable, "-c", script, str(bed.cache), bed.shards]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.stdout.split() == ["whole"], done.stderr


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


# -- colours ---------------------------------------------------------------------------------------


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
