"""Labels from archives against what was written into them, and mistakes in both."""

from __future__ import annotations

import json

import numpy as np
import pytest
from labelled_scenes import encoded, members, write_tar
from PIL import Image
from preceptor.cache import Cache
from preceptor.cache.samples import SampleIndex
from preceptor.cache.views import View, ViewPolicy
from preceptor.errors import ConfigError, DataError
from preceptor.train.evaluation.features import LabelledRows
from preceptor.train.evaluation.labels import Task

TASKS = (
    Task("class", "classification", "cls"),
    Task("kind", "classification", "json:kind"),
    Task("position", "regression", ["json:x", "json:y"]),
    Task("square", "dense", "mask.png", size=20),
)


def test_every_source_gives_what_was_written(scenes):
    learn, _ = scenes
    images = LabelledRows.open(learn.cache, learn.shards, TASKS)
    random = np.random.default_rng(0)
    written = [members(n, random) for n in range(60)]
    assert images.rows.tolist() == list(range(60))
    assert images.labels.tolist() == [n % 3 for n in range(60)]
    for n, parts in enumerate(written):
        stored = json.loads(parts.get("json", b"{}"))
        assert images.truths["class"][n] == n % 3
        assert images.truths["kind"][n] == stored.get("kind", -1)
        expected = [np.nan if stored.get(key) is None else stored[key] for key in ("x", "y")]
        np.testing.assert_equal(images.truths["position"][n], expected)


def test_maps_are_cut_as_the_image_was(tmp_path, make_store):
    # Pixels and their classes go through the same view: nearest pixels of both must agree.
    random = np.random.default_rng(3)
    pixels = random.integers(0, 200, size=(30, 44), dtype=np.uint8)
    samples = {
        f"m{n}": {
            "png": encoded(Image.fromarray(pixels)),
            "cls": b"0",
            "mask.png": encoded(Image.fromarray(np.where(pixels < 9, 255, pixels))),
        }
        for n in range(4)
    }
    shards = write_tar(tmp_path / "maps.tar", samples)
    policy = ViewPolicy(name="random", count=2, flip=True, seed=5)
    make_store(tmp_path / "store", SampleIndex.from_shards(shards), policy)
    task = Task("square", "dense", "mask.png", size=24)
    images = LabelledRows.open(str(tmp_path / "store"), shards, [task])
    cache = Cache.open(tmp_path / "store")
    assert {bool(cache.flips[row]) for row in images.rows} == {True, False}
    for row, found in zip(images.rows, images.truths["square"], strict=True):
        view = View(tuple(float(edge) for edge in cache.boxes[row]), bool(cache.flips[row]))
        seen = view.pixels(Image.fromarray(pixels), (24, 24), "nearest")[..., 0].astype(int)
        assert (found == np.where(seen < 9, -1, seen)).mean() > 0.99  # ties on pixel borders


def test_maps_may_have_another_resolution_and_sixteen_bits(tmp_path, one_row):
    halves = np.zeros((10, 10), np.uint16)
    halves[:, 5:] = 300
    halves[0] = 65535
    parts = {"parts.png": encoded(Image.fromarray(halves))}
    shards = write_tar(tmp_path / "x.tar", {"a": IMAGE | parts})
    images = LabelledRows.open(one_row, shards, [Task("parts", "dense", "parts.png", size=10)])
    expected = np.where(halves == 65535, -1, halves.astype(int))
    assert np.array_equal(images.truths["parts"][0], expected)


def test_maps_of_numbers_keep_all_values_but_the_unknown_one(tmp_path, one_row):
    depth = np.arange(100, dtype=np.uint16).reshape(10, 10) * 655
    depth[3, 3] = 65535
    grey = np.full((10, 10), 255, np.uint8)
    palette = Image.fromarray(grey).convert("P")
    parts = {"depth.png": depth, "all.png": grey}
    parts = {name: encoded(Image.fromarray(pixels)) for name, pixels in parts.items()}
    shards = write_tar(tmp_path / "x.tar", {"a": IMAGE | parts | {"p.png": encoded(palette)}})

    def read(label, **more):
        task = Task("t", "dense_regression", label, size=10, **more)
        return LabelledRows.open(one_row, shards, [task]).truths["t"][0]

    assert np.array_equal(read("depth.png"), depth.astype(float))
    known = np.where(depth == 0, np.nan, depth.astype(float))
    assert np.array_equal(read("depth.png", unknown=0), known, equal_nan=True)
    assert (read("all.png") == 255).all()
    with pytest.raises(DataError, match=r"no image has a label \(\.no\.png\) of task t"):
        read("no.png")
    with pytest.raises(
        DataError, match=r"\.p\.png of sample 'a' .* has a palette: numbers are 8 or"
    ):
        read("p.png")


def test_images_without_any_label_are_left_out(scenes):
    learn, _ = scenes
    images = LabelledRows.open(learn.cache, learn.shards, TASKS[2:])
    assert images.rows.tolist() == [n for n in range(60) if n % 9 != 5]
    assert (images.truths["square"][4] >= 0).any()
    every = LabelledRows.open(learn.cache, learn.shards, ())
    assert len(every.rows) == 60


IMAGE = {"png": encoded(Image.fromarray(np.zeros((40, 40, 3), np.uint8))), "cls": b"0"}


@pytest.fixture(scope="module")
def one_row(tmp_path_factory, make_store) -> str:
    """The store of a single image, whose other members a test may choose."""
    folder = tmp_path_factory.mktemp("one")
    shards = write_tar(folder / "x.tar", {"a": IMAGE})
    make_store(folder / "store", SampleIndex.from_shards(shards), ViewPolicy())
    return str(folder / "store")


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"{", r"\.json of sample 'a' in shard .* is no JSON"),
        (b"[" * 20000, "is no JSON"),
        (b"[1]", "no JSON object with the field 'x'"),
        (b'{"x": "3"}', "the field 'x' is '3', not a number"),
        (b'{"x": true}', "the field 'x' is True, not a number"),
        (b'{"x": NaN}', "the field 'x' is nan, not a number"),
        (b'{"x": 1e999}', "the field 'x' is inf, not a number"),
        (b'{"x": ' + b"9" * 400 + b"}", "not a number"),
        (b'{"x": 1}' + b" " * 70000, "has 70,008 bytes, more than 65,536"),
        (b'{"y": 1}', r"no image has a label \(\.json, field x\) of task t"),
    ],
)
def test_numbers_that_are_none_are_told(raw, message, tmp_path, one_row):
    shards = write_tar(tmp_path / "x.tar", {"a": IMAGE | {"json": raw}})
    with pytest.raises(DataError, match=message):
        LabelledRows.open(one_row, shards, [Task("t", "regression", "json:x")])


def test_classes_are_whole_numbers(tmp_path, one_row):
    shards = write_tar(tmp_path / "x.tar", {"a": IMAGE | {"json": b'{"x": 1.5}'}})
    with pytest.raises(DataError, match=r"field 'x' is 1\.5, not a class number from 0 up"):
        LabelledRows.open(one_row, shards, [Task("t", "classification", "json:x")])


def test_maps_that_are_none_are_told(tmp_path, one_row):
    colour = encoded(Image.fromarray(np.zeros((4, 4, 3), np.uint8)))
    whole = encoded(Image.fromarray(np.zeros((90, 90), np.uint8)))
    noise = np.random.default_rng(0).integers(9, size=(30, 30), dtype=np.uint8)
    short = encoded(Image.fromarray(noise))[:200]
    maps = {"a.png": colour, "b.png": b"no picture", "c.png": whole, "d.png": short}
    shards = write_tar(tmp_path / "x.tar", {"a": IMAGE | maps})
    for kind, message in {
        "a.png": "has the mode RGB",
        "b.png": r"\.b\.png of sample 'a' .* cannot be decoded",
        "c.png": "is 90 x 90, more than 8,000 pixels",
        "d.png": "cannot be decoded",
    }.items():
        with pytest.raises(DataError, match=message):
            LabelledRows.open(one_row, shards, [Task("t", "dense", kind)], max_pixels=8000)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("cls", r"tasks\.t=cls: give it a kind and a label"),
        ({"kind": "dense"}, "give it a kind and a label"),
        ({"kind": "regresion", "label": "json:x"}, r"did you mean regression\?"),
        ({"kind": "regression", "label": "cls"}, "takes json:FIELD or a list"),
        ({"kind": "regression", "label": "json:"}, "takes json:FIELD or a list"),
        ({"kind": "classification", "label": ["json:a", "json:b"]}, "takes cls or json:FIELD"),
        ({"kind": "dense", "label": "json:x"}, r"such as mask\.png"),
        ({"kind": "dense", "label": "mask.png", "size": 0}, "expected a positive whole number"),
        ({"kind": "dense", "label": "mask.png", "size": "8"}, "expected a positive whole number"),
        ({"kind": "dense_regression", "label": "json:x"}, r"such as depth\.png"),
        ({"kind": "regression", "label": 5}, "takes json:FIELD or a list"),
        ({"kind": "dense_regression", "label": "m.png", "unknown": "0"}, "expected a whole number"),
        ({"kind": "dense", "label": "m.png", "unknown": 0}, "only a dense_regression task has it"),
        ({"kind": "dense", "label": "mask.png", "sise": 3}, "no option sise: valid are kind"),
    ],
)
def test_tasks_that_are_none_are_told(options, message):
    with pytest.raises(ConfigError, match=message):
        Task.parse("t", options)
