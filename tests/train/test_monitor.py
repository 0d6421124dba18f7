"""The k-NN on the way where the store holds the pixels: what it reads, and of which rows."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections import Counter

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from preceptor.benchmarks.faults import flip
from preceptor.cache import Cache
from preceptor.cache.gather import Gatherer
from preceptor.cache.samples import SampleIndex
from preceptor.errors import DataError, StoreError
from preceptor.train.alignment import build_alignment
from preceptor.train.alignment.base import Space
from preceptor.train.batch import normalise
from preceptor.train.monitor import KnnMonitor, _of_groups, _read_together
from preceptor.train.students import build_student
from preceptor.train.views import StoredViews, StorePixels
from sklearn.neighbors import KNeighborsClassifier


@pytest.mark.parametrize("batch", [3, 16, 64])
def test_every_group_that_is_drawn_is_read_once(pixel_bed, monkeypatch, batch):
    cache = Cache.open(pixel_bed.cache)
    group, views = cache.plan.group_rows, StorePixels(cache)
    read = Counter()
    fill = Gatherer.fill

    def counted(self, destination, part, names=None):
        read[destination.unit, part.shard, part.chunk] += 1
        fill(self, destination, part, names)

    monkeypatch.setattr(Gatherer, "fill", counted)
    monitor = KnnMonitor(
        Fabric(accelerator="cpu", devices=1), cache, views,
        images=17, neighbours=3, seed=4, batch_size=batch, workers=0,
    )  # fmt: skip
    student = build_student({"model": "resnet10t", "size": 32}, 0)
    space = Space("vit", 1, 4, None)
    alignment = build_alignment({"name": "regression"}, student, {"vit/cls": space})
    found = monitor.accuracy(student, alignment)

    rows, asked = monitor._rows, monitor._asked.numpy()
    groups = np.unique(rows // group)
    assert set(read.values()) == {1}
    assert len(read) == len(groups) < -(-len(cache) // group)
    labels = np.asarray(cache.labels)
    usable = [row for row in range(0, len(cache), 2) if cache.valid[row] and labels[row] >= 0]
    assert rows.tolist() == [row for row in usable if row // group in groups]
    assert 17 <= len(rows) < 17 + group
    assert asked.sum() == round(0.2 * len(rows))
    assert 0 < np.flatnonzero(asked).mean() < len(rows) - asked.sum()  # not the first ones

    with torch.no_grad():
        pixels = normalise(views.__getitems__(rows.tolist()), torch.device("cpu"))
        features = student.eval()(pixels).pooled.double().numpy()
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    judge = KNeighborsClassifier(
        3, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07), algorithm="brute"
    ).fit(features[~asked], labels[rows[~asked]])
    expected = (judge.predict(features[asked]) == labels[rows[asked]]).mean()
    assert found == pytest.approx(expected)


@pytest.mark.parametrize("stored", [True, False], ids=["stored", "decoded"])
def test_damaged_images_are_left_out_of_the_knn_where_damage_is_skipped(
    pixel_bed, tmp_path, monkeypatch, capsys, stored
):
    path = tmp_path / "store"
    shutil.copytree(pixel_bed.cache, path)
    cache = Cache.open(path)
    if stored:
        flip(path / "pixels/c.0.0.0.0", np.random.default_rng(1))
        views, lost, told = StorePixels(cache), None, "shard 0 of pixels"
    else:
        index = pixel_bed.index
        views, lost, told = StoredViews(cache, index, (32, 32)), {20, 40}, "train-0[12]0"
        image = SampleIndex.image

        def bad(self, sample, *limit):
            if sample in (10, 20):
                raise DataError(f"image {self.keys[sample]!r} cannot be decoded")
            return image(self, sample, *limit)

        monkeypatch.setattr(SampleIndex, "image", bad)

    def monitor(**options):
        return KnnMonitor(
            Fabric(accelerator="cpu", devices=1), cache, views,
            images=40, neighbours=3, seed=4, batch_size=16, workers=0, **options,
        )  # fmt: skip

    student = build_student({"model": "resnet10t", "size": 32}, 0)
    space = Space("vit", 1, 4, None)
    alignment = build_alignment({"name": "regression"}, student, {"vit/cls": space})
    with pytest.raises((StoreError, DataError), match=told):
        monitor().accuracy(student, alignment)
    skipping = monitor(skip=True)
    found = skipping.accuracy(student, alignment)
    assert skipping.accuracy(student, alignment) == found
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == (1 if stored else 2)
    assert all(re.search(f"left out of the k-NN: .*{told}", warning) for warning in warnings)

    rows, asked = skipping._rows, skipping._asked.numpy()
    if lost is None:
        _, problems = views.take([(int(row), 0) for row in rows])
        lost = {int(rows[place]) for place in problems}
        assert len({row // cache.plan.group_rows for row in lost}) == 1
    kept = np.array([row not in lost for row in rows.tolist()])
    assert 0 < (~kept).sum() <= 2
    labels = np.asarray(cache.labels)[rows]
    whole = StorePixels(Cache.open(pixel_bed.cache)) if stored else views
    pixels = torch.zeros((len(rows), 32, 32, 3), dtype=torch.uint8)
    pixels[torch.from_numpy(kept)] = whole.__getitems__(rows[kept].tolist())
    with torch.no_grad():
        features = student.eval()(normalise(pixels, torch.device("cpu"))).pooled.double().numpy()
    features /= np.linalg.norm(features, axis=1, keepdims=True)
    judge = KNeighborsClassifier(
        3, weights=lambda d: np.exp((1 - d**2 / 2) / 0.07), algorithm="brute"
    ).fit(features[~asked & kept], labels[~asked & kept])
    expected = (judge.predict(features[asked & kept]) == labels[asked & kept]).mean()
    assert found == pytest.approx(expected)


RANKS = """
import sys, preceptor, torch
from pathlib import Path
from omegaconf import OmegaConf
from preceptor.cache import Cache
from preceptor.engine import launch
from preceptor.train.alignment import build_alignment
from preceptor.train.alignment.base import Space
from preceptor.train.monitor import KnnMonitor
from preceptor.train.students import build_student
from preceptor.train.views import StorePixels
configs = Path(preceptor.__file__).parent / "configs"
fabric = launch(OmegaConf.load(configs / "engine" / "cpu.yaml"))
student = build_student({"model": "resnet10t", "size": 32}, 0)
alignment = build_alignment({"name": "regression"}, student, {"vit/cls": Space("vit", 1, 4, None)})
for name, buffer in student.named_buffers():
    if name.endswith("running_mean"):
        buffer += fabric.global_rank  # as batches of its own have left it
cache = Cache.open(sys.argv[1])
monitor = KnnMonitor(fabric, cache, StorePixels(cache), images=40, neighbours=3, seed=4,
                     batch_size=16, workers=0)
features, _ = monitor._features(student.eval(), alignment.eval())
if fabric.global_rank == 0:
    torch.save((features, torch.from_numpy(monitor._rows)), sys.argv[2])
"""


def test_all_ranks_look_with_the_statistics_of_the_first(pixel_bed, tmp_path):
    script, found = tmp_path / "ranks.py", tmp_path / "found.pt"
    script.write_text(RANKS)
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", str(script)]
    given = [sys.executable, *command, pixel_bed.cache, str(found)]
    done = subprocess.run(given, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    features, rows = torch.load(found)
    student = build_student({"model": "resnet10t", "size": 32}, 0).eval()
    with torch.no_grad():
        pixels = StorePixels(Cache.open(pixel_bed.cache)).__getitems__(rows.tolist())
        expected = student(normalise(pixels, torch.device("cpu"))).pooled
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-5)


def test_a_knn_of_which_nothing_is_left_is_none(pixel_bed, tmp_path):
    path = tmp_path / "store"
    shutil.copytree(pixel_bed.cache, path)
    cache = Cache.open(path)
    for file in (path / "pixels").glob("c.*"):
        file.write_bytes(bytes(file.stat().st_size))
    monitor = KnnMonitor(
        Fabric(accelerator="cpu", devices=1), cache, StorePixels(cache),
        images=40, neighbours=3, seed=4, batch_size=16, workers=0, skip=True,
    )  # fmt: skip
    student = build_student({"model": "resnet10t", "size": 32}, 0)
    space = Space("vit", 1, 4, None)
    alignment = build_alignment({"name": "regression"}, student, {"vit/cls": space})
    assert monitor.accuracy(student, alignment) is None


def test_groups_are_drawn_by_the_seed_and_cut_nowhere():
    rows = np.flatnonzero(np.arange(1000) % 3 > 0)
    drawn = [_of_groups(rows, 32, 100, np.random.default_rng(seed)) for seed in (0, 0, 1)]
    assert np.array_equal(drawn[0], drawn[1])
    assert not np.array_equal(drawn[0], drawn[2])
    for some in drawn:
        whole = [row for row in rows if row // 32 in set(some // 32)]
        assert some.tolist() == whole
        assert 100 <= len(some) < 100 + 32
    assert np.array_equal(_of_groups(rows, 32, 10_000, np.random.default_rng(0)), rows)
    parts = _read_together(drawn[0], 32, 40)
    assert np.array_equal(np.concatenate(parts), drawn[0])
    groups = [set(part // 32) for part in parts]
    assert sum(map(len, groups)) == len(set.union(*groups))
    assert all(len(part) >= 40 for part in parts[:-1])
    # rows of images that are decoded one by one, in any order
    assert [len(part) for part in _read_together(np.arange(10)[::-1], 1, 4)] == [4, 4, 2]
