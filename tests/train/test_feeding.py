"""What feeds a student: the store's pixels, damage on the way, signals."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from preceptor.benchmarks.faults import flip
from preceptor.cache import Cache
from preceptor.cache.samples import SampleIndex
from preceptor.errors import ConfigError, DataError, StoreError
from preceptor.train.crops import RandomCrop
from preceptor.train.data import TrainData
from preceptor.train.photometric import ColorJitter
from preceptor.train.views import StoredViews, StorePixels, choose_views

BOTH = ["vit/patch", "vit/cls"]


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
    drop = f"`preceptor drop cache={cache.location} teacher=pixels` and store pixels"
    with pytest.raises(
        ConfigError, match=rf"data.shards is null .*24 x 16.* or {drop} .*pixels.size=\[24,16\]"
    ):
        choose_views(cache, None, (24, 16))
    with pytest.raises(ConfigError, match=r"or set recipe\.crop=null") as caught:
        choose_views(cache, None, (32, 32), crop=RandomCrop())
    assert "preceptor add" not in str(caught.value)  # whose pixels would not serve either


def test_without_stored_pixels_images_are_needed(bed) -> None:
    with pytest.raises(ConfigError, match=r"data.shards is null .*the store holds none") as no:
        choose_views(Cache.open(bed.cache), None, (32, 32))
    assert "drop" not in str(no.value)


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


# -- signals ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("start", ["default", "forkserver"])
def test_a_signal_to_all_processes_of_a_run_leaves_it_its_images(bed, start: str) -> None:
    """As Ctrl-C, torchrun and Slurm send them: the run finishes its step and saves.

    In a process of its own, as a run is: among all tests it failed in workers that were forked from
    a process with everything loaded, where a thread that does not block the signal may take it.
    """
    script = (
        "import multiprocessing, subprocess, sys, torch\n"
        "from multiprocessing.forkserver import _forkserver\n"
        "from preceptor.cache import Cache, SampleIndex\n"
        "from preceptor.train.loading import decoded\n"
        "from preceptor.train.views import StoredViews\n"
        f"if {start == 'forkserver'}:\n"
        "    SampleIndex.start_method = 'forkserver'  # as of shards in a bucket\n"
        "index = SampleIndex.from_shards(sys.argv[2])\n"
        "views = StoredViews(Cache.open(sys.argv[1]), index, (32, 32))\n"
        "orders = [[(row, 0)] for row in range(30)]  # more than workers hold ready\n"
        "images = decoded(views, orders, workers=2)\n"
        "found = [next(images), next(images)]  # one of each worker: both have begun\n"
        "pids = [str(worker.pid) for worker in multiprocessing.active_children()]\n"
        "assert len(pids) == 2\n"
        f"if {start == 'forkserver'}:\n"
        "    pids.append(str(_forkserver._forkserver_pid))\n"
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
