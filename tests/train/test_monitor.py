"""The k-NN on the way where the store holds the pixels: what it reads, and of which rows."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from preceptor.cache import Cache
from preceptor.cache.gather import Gatherer
from preceptor.train.alignment import build_alignment
from preceptor.train.alignment.base import Space
from preceptor.train.batch import normalise
from preceptor.train.monitor import KnnMonitor, _of_groups, _read_together
from preceptor.train.students import build_student
from preceptor.train.views import StorePixels
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
