"""What eval refuses or tells before anything is computed, and which stores it takes together."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image
from preceptor.cache import Cache, SampleIndex, TeacherRecord, ViewPolicy
from preceptor.cache.convert import convert_store
from preceptor.errors import ConfigError
from preceptor.train.evaluation import PROTOCOLS


def test_all_protocols_are_those_that_have_a_task(whole, tmp_path, capsys):
    _, again, _ = whole
    found = again(f"out={tmp_path}", "~tasks.position", "~tasks.height", "with_floor=false")
    keys = {score["protocol"] for row in found["rows"] for score in row["scores"]}
    assert keys == set(PROTOCOLS) - {"regression", "dense_regression", "zeroshot"}
    told = capsys.readouterr().out
    assert (
        "protocols=all: all but regression, dense_regression, zeroshot, for which there is no task"
        in told
    )


def test_mistakes_are_told_before_anything_is_computed(whole, scenes, tmp_path, capsys):
    _, again, _ = whole
    cases = {
        ("protocols=[knn,cnn]",): "protocols names 'cnn'",
        ("protocols=knn",): r"write all, or a list, protocols=\[knn\]",
        ("protocols=[regression]", "~tasks.position"): "regression needs a regression task",
        ("fewshot.shots=[1,50]",): "ask for fewer shots",
        ("readouts=[pooled,poled]",): "no student has poled",
        ("robustness.corruptions=[fog]",): "'fog': valid are gaussian_noise",
        ("width=0", "protocols=[knn]"): "width=0",
        ("width=[]",): r"width=\[\]",
        ("width=true",): "width=True",
        ("readouts=null",): "readouts=null: write all, or a list",
        ("seed=-1",): "seed=-1: expected a number from 0 up",
        (f"out={scenes[0].shards}/eval",): "eval cannot be made",
        ("batch_size=0",): "batch_size=0",
        ("engine.devices=2",): "preceptor eval works in one process, on one device",
    }
    for overrides, message in cases.items():
        capsys.readouterr()
        with pytest.raises(ConfigError, match=message):
            again(f"out={tmp_path}", *overrides)
        assert "images/s" not in capsys.readouterr().err or "width" in message


def test_stores_of_other_teachers_are_refused(scenes, whole, tmp_path, make_store, monkeypatch):
    _, again, _ = whole
    index, real = SampleIndex.from_shards(scenes[1].shards), TeacherRecord.__init__

    def other(self, name, spaces, identity):
        real(self, name, spaces, {**identity, "weights_sha256": "cafe"})

    monkeypatch.setattr(TeacherRecord, "__init__", other)
    make_store(tmp_path / "other", index, ViewPolicy(name="center"))
    monkeypatch.undo()
    assert Cache.open(tmp_path / "other").plan.teachers[0].identity["weights_sha256"] == "cafe"
    with pytest.raises(ConfigError, match=r"the teacher vit of .* is not that of .*weights_sha256"):
        again(f"test.cache={tmp_path}/other", "protocols=[knn]")


def test_a_converted_store_is_of_the_same_teachers(scenes, whole, tmp_path):
    _, again, _ = whole
    convert_store(scenes[0].cache, tmp_path / "fp16", "fp16")
    found = again(
        f"train.cache={tmp_path}/fp16", f"out={tmp_path}", "students=[]", "protocols=[knn]"
    )
    assert [r["name"] for r in found["rows"]] == ["vit/cls"]


def test_a_class_folder_that_one_side_lacks_is_told(scenes, tmp_path, make_store, whole):
    # The folders of the test images are numbered by themselves: without b, c would be class 1.
    _, again, _ = whole
    random = np.random.default_rng(0)
    for side, kinds in {"learn": "abc", "gap": "ac", "end": "ab"}.items():
        for kind in kinds:
            (tmp_path / side / kind).mkdir(parents=True)
            for number in range(5):
                pixels = random.integers(0, 255, (20, 20, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / side / kind / f"{number}.png")
        index = SampleIndex.from_shards(tmp_path / side)
        make_store(tmp_path / f"{side}-store", index, ViewPolicy(name="center"))

    def judged(side):
        return again(
            f"train.cache={tmp_path}/learn-store", f"train.shards={tmp_path}/learn",
            f"test.cache={tmp_path}/{side}-store", f"test.shards={tmp_path}/{side}",
            f"out={tmp_path}", "students=[]", "protocols=[knn]",
        )  # fmt: skip

    with pytest.raises(ConfigError, match=r"class 1 is the folder 'b' in train.* and 'c' in test"):
        judged("gap")
    assert judged("end")["images"] == {"train": 15, "test": 10}
