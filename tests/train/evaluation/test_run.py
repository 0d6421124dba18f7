"""Features and table on real stores."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from preceptor.cache import Cache
from preceptor.errors import ConfigError, DataError
from preceptor.train.evaluation.features import LabelledRows
from preceptor.train.evaluation.run import evaluate, prepare, warn_of_views
from preceptor.train.evaluation.runs import Run, distinct_names
from preceptor.train.evaluation.stored import descriptors, space_features
from preceptor.train.loop import train
from sklearn.neighbors import KNeighborsClassifier
from torch import nn


def test_rows_are_the_first_view_of_valid_labelled_images(bed):
    images = LabelledRows.open(bed.cache, bed.shards)
    assert images.rows.tolist() == list(range(0, 80, 2))  # row 5 is a second view
    assert images.labels.tolist() == [sample % 3 for sample in range(40)]


def test_teacher_features_are_the_stored_descriptors(bed):
    images = LabelledRows.open(bed.cache, bed.shards)
    cache = Cache.open(bed.cache)
    assert descriptors(cache) == {"vit/cls": "vit/cls"}
    found = torch.from_numpy(space_features(images, "vit/cls", "mean"))
    codes = cache["vit/cls"].read(images.rows)
    by_hand = codes.codes[:, 0].double() * codes.scales.double()
    by_hand = by_hand * cache["vit/cls"].std + cache["vit/cls"].mean
    torch.testing.assert_close(found.double(), by_hand, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("side", ["train", "test"])
def test_other_images_than_the_store_s_are_refused_by_their_option(
    eval_config, test_bed, bed, side
):
    other = {"train": test_bed, "test": bed}[side]
    with pytest.raises(DataError, match=rf"the store was made from are not in {side}\.shards"):
        prepare(eval_config(f"{side}.shards={other.shards}"))


def test_random_crops_to_learn_from_are_told(eval_config, capsys, test_bed):
    warn_of_views(*prepare(eval_config())[1:3])  # two random views an image, and one centred
    assert "probes learn from random crops" in capsys.readouterr().err
    same = (f"train.cache={test_bed.cache}", f"train.shards={test_bed.shards}")
    warn_of_views(*prepare(eval_config(*same))[1:3])
    assert "random crops" not in capsys.readouterr().err


def test_table_of_students_teachers_and_floor(train_config, eval_config, bed, test_bed, tmp_path):
    folders = []
    for align in ("regression", "model_token"):
        train(train_config(f"align={align}", "recipe.steps=12", "recipe.lr=0.003", out=align))
        folders.append(str(tmp_path / align))
    result = evaluate(eval_config(f"students=[{','.join(folders)}]", "knn.k=5"))
    assert json.loads((tmp_path / "eval" / "summary.json").read_text()) == result
    assert result["images"] == {"train": 40, "test": 21}
    rows = [(s["kind"], s["name"], s["readout"], s["dim"]) for s in result["rows"]]
    assert rows == [
        ("teacher", "vit/cls", "store", 24),
        ("teacher", "vit/patch", "spatial", 96),
        ("student", "regression", "pooled", 16),
        ("student", "regression", "spatial", 64),
        ("student", "regression", "predictions", 24),
        ("untrained", "resnet_micro-s0", "pooled", 16),
        ("untrained", "resnet_micro-s0", "spatial", 64),
        ("student", "model_token", "pooled", 16),
        ("student", "model_token", "spatial", 64),
        ("student", "model_token", "predictions", 24),
        ("student", "model_token", "tokens", 512),
        ("student", "model_token", "both", 528),
    ]
    assert all(0 <= s["knn"] <= 1 and 0 <= s["linear"] <= 1 for s in result["rows"])

    # The teacher's row, from the store to the score, in scikit-learn.
    sides = []
    for side in (bed, test_bed):
        images = LabelledRows.open(side.cache, side.shards)
        features = space_features(images, "vit/cls", "mean").astype(np.float64)
        sides.append((features, images.labels))
    judge = KNeighborsClassifier(
        5, metric="cosine", algorithm="brute", weights=lambda d: np.exp((1 - d) / 0.07)
    ).fit(*sides[0])
    assert result["rows"][0]["knn"] == pytest.approx(judge.score(*sides[1]), abs=1e-9)


def test_the_floor_of_a_student_that_started_from_weights_has_none_of_them(
    train_config, eval_config
):
    align = "align=regression"
    plain = train(train_config(align, "recipe.steps=12", "recipe.lr=0.003", out="plain"))["out"]
    start = f"student.checkpoint={plain}/student.safetensors"
    onwards = train(train_config(align, "recipe.steps=1", start, out="onwards"))["out"]
    floors = [
        [row for row in evaluate(eval_config(f"students=[{run}]", "with_teachers=false"))["rows"]
         if row["kind"] == "untrained"]
        for run in (plain, onwards)
    ]  # fmt: skip
    assert floors[0] == floors[1]
    both = evaluate(eval_config(f"students=[{plain},{onwards}]", "with_teachers=false"))["rows"]
    assert [row for row in both if row["kind"] == "untrained"] == floors[0]


def test_the_floor_of_other_training_images_is_another(
    train_config, eval_config, full_bed, tmp_path
):
    """Its batch norms are settled on them, so kept features of the test images are not its own."""
    run = train(train_config("align=regression", "recipe.steps=1", "log.to=[]"))["out"]
    kept = tmp_path / "kept"

    def floor(*options: str):
        own = (f"students=[{run}]", "readouts=[pooled]", "with_teachers=false")
        found = evaluate(eval_config(*own, *options))
        return [row for row in found["rows"] if row["kind"] == "untrained"], found["features"]

    others = (f"train.cache={full_bed.cache}", f"train.shards={full_bed.shards}")
    assert floor(f"features={kept}")[1] == {"computed": 4, "from_cache": 0}
    # The student's features of the test images are the only ones to be found.
    again, features = floor(f"features={kept}", *others)
    assert features == {"computed": 3, "from_cache": 1}
    assert again == floor("features=null", *others)[0]
    assert floor(f"features={kept}", *others) == (again, {"computed": 0, "from_cache": 4})


def test_averaged_and_best_weights_have_their_runs_name_and_means_over_seeds(
    train_config, eval_config, tmp_path, monkeypatch
):
    kept = ("recipe.ema=0.5", "keep.best=loss", "recipe.steps=4", "align=regression")
    folders = []
    for seed in (0, 1):
        run = train(train_config(*kept, f"seed={seed}", out=f"run-s{seed}"))["out"]
        folders += [f"{run}/ema", f"{run}/best", run]
    quick = ("readouts=[pooled]", "protocols=[knn]", "knn.k=5", "with_teachers=false")
    found = evaluate(eval_config(f"students=[{','.join(folders)}]", *quick, "with_floor=false"))
    names = [row["name"] for row in found["rows"]]
    assert names == [f"run-s{seed}{part}" for seed in (0, 1) for part in ("/ema", "/best", "")]
    assert [entry["names"] for entry in found["seeds"]] == [
        [f"run-s0{part}", f"run-s1{part}"] for part in ("/ema", "/best", "")
    ]

    monkeypatch.chdir(tmp_path / "run-s1")  # a name is not lost with the way to the folder
    (row,) = evaluate(eval_config("students=[ema]", *quick, "with_floor=false"))["rows"]
    assert row["name"] == "run-s1/ema"


def test_folders_of_one_name_are_told_apart_and_a_copy_is_no_seed(
    train_config, eval_config, tmp_path, capsys
):
    options = ("align=regression", "recipe.steps=2", "log.to=[]", "recipe.ema=0.5")
    for seed in (0, 1):
        train(train_config(*options, f"seed={seed}", out=f"a/run-s{seed}"))
    shutil.copytree(tmp_path / "a" / "run-s0", tmp_path / "b" / "run-s0")
    folders = [str(tmp_path / run) for run in ("a/run-s0", "b/run-s0", "a/run-s1", "b/run-s0/ema")]
    capsys.readouterr()
    quick = ("readouts=[pooled]", "protocols=[knn]", "knn.k=5", "with_teachers=false")
    found = evaluate(eval_config(f"students=[{','.join(folders)}]", *quick))
    names = [row["name"] for row in found["rows"] if row["kind"] == "student"]
    assert names == ["a/run-s0", "b/run-s0", "run-s1", "b/run-s0/ema"]
    assert [entry["names"] for entry in found["seeds"]] == [["a/run-s0", "run-s1"]]
    assert found["repeated"] == {"b/run-s0": "a/run-s0"}
    told = [line for line in capsys.readouterr().err.splitlines() if "seed" in line]
    assert told == [
        "warning: b/run-s0 has the configuration and the seed of a/run-s0: it has rows of its own "
        "and does not count as another seed in the means"
    ]


def test_names_are_as_long_as_they_must_be():
    model = {"student": {"name": "cnn"}, "seed": 0}
    paths = [Path(f"/runs/{path}") for path in ("a/x/s0", "b/x/s0", "y/s0", "s1", "../s0")]
    runs = [Run(path, nn.Identity(), nn.Identity(), model) for path in paths]
    assert list(distinct_names(runs).values()) == ["a/x/s0", "b/x/s0", "y/s0", "s1", "../s0"]


def test_floors_of_one_name_are_told_apart_by_their_runs(train_config, eval_config):
    runs = [
        train(train_config("align=regression", "recipe.steps=1", "log.to=[]", *options, out=out))
        for out, options in (("wide", ()), ("narrow", ["student.options.channels=[8,8,8,8]"]))
    ]
    quick = ("readouts=[pooled]", "protocols=[knn]", "knn.k=5", "with_teachers=false")
    found = evaluate(eval_config(f"students=[{','.join(run['out'] for run in runs)}]", *quick))
    floors = [row["name"] for row in found["rows"] if row["kind"] == "untrained"]
    assert floors == ["resnet_micro-s0 of wide", "resnet_micro-s0 of narrow"]


def test_mistakes_are_told(train_config, eval_config, tmp_path):
    run = train(train_config("align=regression", "recipe.steps=1"))["out"]
    with pytest.raises(DataError, match="holds no trained student"):
        evaluate(eval_config(f"students=[{tmp_path}]", "with_teachers=false"))
    with pytest.raises(ConfigError, match="no student has tokens; there are pooled"):
        evaluate(eval_config(f"students=[{run}]", "readouts=[tokens]"))
    with pytest.raises(ConfigError, match="64-true: students are evaluated in 32-true or mixed"):
        evaluate(eval_config(f"students=[{run}]", "engine.precision=64-true"))
    with pytest.raises(ConfigError, match="nothing to score"):
        evaluate(eval_config("with_teachers=false"))
    with pytest.raises(ConfigError, match=r"write a list, students=\[x\]"):
        evaluate(eval_config("students=x"))
    with pytest.raises(ConfigError, match=r"train\.cache is required"):
        evaluate(eval_config("train.cache=???"))
