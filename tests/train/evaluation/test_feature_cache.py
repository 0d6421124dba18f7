"""Features that are kept: whose they are, and how many of them are held at once."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from lightning_fabric import Fabric
from preceptor.cache.samples import SampleIndex
from preceptor.errors import ConfigError, DataError
from preceptor.tests.train.limits import largest_file
from preceptor.train.evaluation.corruptions import Corruption
from preceptor.train.evaluation.feature_cache import FeatureCache
from preceptor.train.evaluation.features import LabelledRows, Reader, cached_run, run_student
from preceptor.train.students import build_student
from safetensors.numpy import load_file

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


def test_a_disk_without_room_is_named_before_the_student_runs(tmp_path):
    kept = FeatureCache(tmp_path / "features")
    with (
        largest_file(1 << 20),
        pytest.raises(
            ConfigError, match=r"features: .*features has no room for 0.0041 GB .*=\.\.\."
        ),
    ):
        kept.room((1024, 1000))
    assert list((tmp_path / "features").iterdir()) == []


def test_other_libraries_read_the_features(tmp_path):
    features = np.random.default_rng(0).normal(size=(5, 4, 3)).astype(np.float32)
    FeatureCache(tmp_path).put({"a": "é"}, features)
    (file,) = tmp_path.iterdir()
    assert np.array_equal(load_file(file)["features"], features)


def test_a_damaged_file_is_told_and_not_used(tmp_path, capsys):
    features = np.ones((5, 3), dtype=np.float32)
    kept = FeatureCache(tmp_path)
    kept.put({"a": 1}, features)
    (file,) = tmp_path.iterdir()
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    assert FeatureCache(tmp_path).get({"a": 1}, 5) is None
    assert f"{file} is not used and computed again: it is damaged" in capsys.readouterr().err


def test_what_is_done_to_features_changes_no_file(tmp_path):
    features = np.ones((5, 3), dtype=np.float32)
    FeatureCache(tmp_path).put({"a": 1}, features)
    FeatureCache(tmp_path).get({"a": 1}, 5)[:] = 0
    assert np.array_equal(FeatureCache(tmp_path).get({"a": 1}, 5), features)


def test_pixels_of_the_store_are_not_decoded_again(bed, pixel_bed, monkeypatch):
    student, found = build_student(MICRO, 0), []
    reader = Reader(student, {"pooled": lambda output: output.pooled})
    options = {"batch_size": 8, "workers": 0, "interpolation": "bicubic", "max_pixels": None}
    for side in (bed, pixel_bed):
        images = LabelledRows.open(side.cache, side.shards)
        wanted = [("pooled", None), ("pooled", Corruption("contrast", 2))]
        fabric = Fabric(accelerator="cpu")
        found.append(run_student(fabric, student, reader, images, wanted, title="", **options))
        # the second store has them
        monkeypatch.setattr(SampleIndex, "images", lambda *_, **__: pytest.fail("decoded"))
    for key in wanted:
        assert np.array_equal(found[0][key], found[1][key])


def test_features_are_never_held_together(scenes, tmp_path):
    """All readouts of all images, and 75 times those of corrupted ones, are more than memory."""
    _, test = (LabelledRows.open(side.cache, side.shards) for side in scenes)
    width, corruptions = 200_000, [Corruption("contrast", severity) for severity in range(1, 6)]
    corruptions += [Corruption("brightness", severity) for severity in range(1, 6)]
    whole = len(test.rows) * width * 4

    def wide(output):
        return output.pooled.mean(1, keepdim=True) * torch.arange(1, width + 1)

    def wider(output):
        return 2 * wide(output)

    student = build_student(MICRO, 0)
    reader = Reader(student, {"wide": wide, "wider": wider})
    wanted = [("wide", None), *(("wide", corruption) for corruption in corruptions)]
    wanted.append(("wider", None))
    options = {"batch_size": 2, "workers": 0, "interpolation": "bicubic", "max_pixels": None}
    for _ in ("computed", "from the cache"):
        tracemalloc.start()
        found = cached_run(
            FeatureCache(tmp_path), Fabric(accelerator="cpu"), student, reader, test, wanted, {},
            title="", **options,
        )  # fmt: skip
        figures = {key: float(found[key][:, 2].mean()) for key in found}
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < whole  # of twelve
    assert len(set(figures.values())) == 12
    seen = run_student(
        Fabric(accelerator="cpu"), student, reader, test, wanted, title="", **options
    )
    assert figures == {key: float(seen[key][:, 2].mean()) for key in wanted}
    assert all(file.suffix == ".safetensors" for file in tmp_path.iterdir())
