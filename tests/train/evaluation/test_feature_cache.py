"""Features that are kept: whose they are, and how many of them are held at once."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from preceptor.errors import DataError
from preceptor.train.evaluation.corruptions import Corruption
from preceptor.train.evaluation.feature_cache import FeatureCache
from preceptor.train.evaluation.features import LabelledRows, Reader, cached_run, run_student
from preceptor.train.students import build_student

MICRO = {
    "model": "resnet10t",
    "options": {"channels": [8, 8, 16, 16], "output_stride": 16},
    "size": 32,
}


def test_a_feature_file_says_whose_it_is(tmp_path):
    kept = FeatureCache(tmp_path)
    features = np.random.default_rng(0).normal(size=(5, 3)).astype(np.float32)
    kept.put({"a": 1}, features)
    assert np.array_equal(FeatureCache(tmp_path).get({"a": 1}, 5), features)
    assert FeatureCache(tmp_path).get({"a": 2}, 5) is None
    assert FeatureCache(tmp_path).get({"a": 1}, 6) is None  # other rows than were asked for
    assert np.array_equal(FeatureCache(tmp_path).read({"a": 1}, 5), features)
    with pytest.raises(DataError, match=r"cannot be read any more \(.*: evaluate again"):
        FeatureCache(tmp_path).read({"a": 2}, 5)


def test_features_of_corrupted_images_are_never_held_together(scenes, tmp_path):
    """75 times the features of all images are more than a machine has."""
    _, test = (LabelledRows.open(side.cache, side.shards) for side in scenes)
    width, corruptions = 20_000, [Corruption("contrast", severity) for severity in range(1, 6)]
    corruptions += [Corruption("brightness", severity) for severity in range(1, 6)]
    whole = len(test.rows) * width * 4

    def wide(output):
        return output.pooled.mean(1, keepdim=True) * torch.arange(1, width + 1)

    student = build_student(MICRO, 0)
    wanted = [("wide", None), *(("wide", corruption) for corruption in corruptions)]
    options = {"batch_size": 8, "workers": 0, "interpolation": "bicubic", "max_pixels": None}
    for _ in ("computed", "from the cache"):
        tracemalloc.start()
        found = cached_run(
            FeatureCache(tmp_path), Fabric(accelerator="cpu"), student,
            Reader(student, {"wide": wide}), test, wanted, {}, title="", **options,
        )  # fmt: skip
        figures = {key: float(found[key][:, 2].mean()) for key in found}
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 6 * whole  # of eleven
    assert len(set(figures.values())) == 11
    seen = run_student(
        Fabric(accelerator="cpu"), student, Reader(student, {"wide": wide}), test, wanted,
        title="", **options,
    )  # fmt: skip
    assert figures == {key: float(seen[key][:, 2].mean()) for key in wanted}
    assert all(file.suffix == ".safetensors" for file in tmp_path.iterdir())
