"""The whole command on scenes with every kind of label: tables, kept features, mistakes."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from preceptor.errors import DataError
from preceptor.train.batch import normalise
from preceptor.train.checkpoint import load_model
from preceptor.train.evaluation import (
    Features,
    Score,
    Targets,
    build_suite,
    features,
    over_seeds,
)
from preceptor.train.evaluation.corruptions import Corruption
from preceptor.train.evaluation.features import (
    LabelledRows,
    quarters,
)
from preceptor.train.evaluation.labels import Task
from preceptor.train.evaluation.run import RESAMPLES, read_resamples
from preceptor.train.evaluation.table import Row, print_tables
from preceptor.train.students import build_student
from rich.console import Console
from sklearn.linear_model import RidgeClassifier
from sklearn.preprocessing import StandardScaler


def row(result, **wanted):
    (found,) = (r for r in result["rows"] if all(r[key] == v for key, v in wanted.items()))
    return found


def test_every_protocol_has_its_rows(whole, runs):
    result, _, out = whole
    assert json.loads((out / "summary.json").read_text()) == result
    vectors = {
        "knn", "linear", "fewshot/1-shot", "fewshot/5-shot", "retrieval", "regression@position",
        "cka/vit/patch", "cka/vit/cls",
    }  # fmt: skip
    maps = {"dense@square", "dense_regression@height"}
    robust = {"robustness/mean", "robustness/contrast", "robustness/jpeg"}
    named = {"kind", "name", "readout", "dim", "width", "reduced", "scores"}
    student = row(result, name="cnn-s0", readout="pooled")
    assert set(student) - named == vectors | robust
    assert set(row(result, kind="untrained", readout="pooled", name="resnet_micro-s1")) >= robust
    # A teacher's cached features cannot see corruption: no figure, rather than an invented one.
    assert set(row(result, name="vit/cls")) - named == vectors
    assert set(row(result, kind="teacher", readout="map")) - named == maps
    assert row(result, kind="teacher", readout="map")["name"] == "vit/patch"
    assert set(row(result, name="cnn-s1", readout="map")) - named == maps
    assert row(result, name="vit/cls")["cka/vit/cls"] == pytest.approx(1)
    for one in student["scores"]:
        assert one["low"] <= one["high"]
        assert one["images"] == {"regression": 28}.get(one["protocol"], 36)
    assert [one["name"] for one in result["rows"] if one["kind"] == "untrained"].count(
        "resnet_micro-s0"
    ) >= 2


def test_means_over_seeds_are_students_intervals(whole):
    result, _, _ = whole
    entry = next(e for e in result["seeds"] if e["readout"] == "pooled")
    assert entry["names"] == ["cnn-s0", "cnn-s1"]
    values = [row(result, name=f"cnn-s{s}", readout="pooled")["knn"] for s in (0, 1)]
    expected = over_seeds(values)
    assert entry["means"]["knn"] == {
        "mean": expected.value, "low": expected.low, "high": expected.high
    }  # fmt: skip


def test_features_are_computed_once(whole):
    result, again, _ = whole
    first = result["features"]
    assert first["from_cache"] == 1  # a descriptor that is also a space for CKA
    second = again()
    assert second["features"] == {"computed": 0, "from_cache": first["computed"] + 1}
    assert second["rows"] == result["rows"]


def test_damaged_and_foreign_features_are_told_and_computed_again(whole, capsys):
    result, again, out = whole
    files = sorted((out / "features").iterdir())
    raw = bytearray(files[0].read_bytes())
    raw[-5] ^= 1
    files[0].write_bytes(raw)
    files[1].write_bytes(b"not a safetensors file")
    shutil.copy(files[3], files[2])
    assert again()["rows"] == result["rows"]
    told = capsys.readouterr().err
    assert f"{files[0]} is not used and computed again: it is damaged" in told
    assert f"{files[1]} is not used and computed again" in told
    assert f"{files[2]} is not used and computed again: it holds the features of something" in told
    assert again()["features"]["computed"] == 0


def test_other_weights_are_other_features(whole, runs, tmp_path):
    _, again, _ = whole
    copy = tmp_path / "cnn-s0"
    shutil.copytree(runs[0], copy)
    shutil.copy(f"{runs[1]}/student.safetensors", copy / "student.safetensors")
    found = again(f"students=[{copy}]", "with_floor=false", "protocols=[knn]", "readouts=[pooled]")
    assert found["features"]["computed"] == 2


@pytest.mark.parametrize("library", ["torch", "timm", "Pillow"])
def test_what_another_version_computed_is_computed_again(whole, runs, monkeypatch, library):
    _, again, _ = whole
    one = (f"students=[{runs[0]}]", "with_floor=false", "protocols=[knn]", "readouts=[pooled]")
    assert again(*one)["features"]["computed"] == 0
    monkeypatch.setitem(features._VERSIONS, library, "another")
    assert again(*one)["features"]["computed"] == 2


def test_nothing_is_kept_where_nothing_is_to_be_kept(whole, tmp_path):
    result, again, _ = whole
    found = again("features=null", "protocols=[knn,robustness]", f"out={tmp_path}")
    kept = {
        (one["kind"], one["name"], one["readout"], score["key"]): score["value"]
        for one in result["rows"]
        for score in one["scores"]
    }
    for one in found["rows"]:
        for score in one["scores"]:
            assert score["value"] == kept[one["kind"], one["name"], one["readout"], score["key"]]
    assert any(score["protocol"] == "robustness" for score in found["rows"][-1]["scores"])
    assert {path.name for path in tmp_path.iterdir()} == {"summary.json", "resamples.safetensors"}
    assert found["features"]["from_cache"] == 0


def test_a_row_is_what_the_parts_give_by_hand(whole, scenes, runs):
    result, _, _ = whole
    sides = [LabelledRows.open(side.cache, side.shards) for side in scenes]
    student, _, _ = load_model(Path(runs[0]))

    def pooled(images, corruption=None):
        found = []
        for at in images.rows:
            box = [float(edge) for edge in images.cache.boxes[at]]
            pixels = images.index.image(int(at)).resize((32, 32), 3, box=box)
            pixels = np.asarray(pixels)
            if corruption is not None:
                pixels = corruption(pixels, int(at))
            with torch.no_grad():
                seen = normalise(torch.from_numpy(pixels.copy())[None], torch.device("cpu"))
                found.append(student(seen).pooled[0].numpy())
        return np.stack(found)

    scaler = StandardScaler().fit(pooled(sides[0]))
    judge = RidgeClassifier(alpha=0.1 * 60).fit(scaler.transform(pooled(sides[0])), sides[0].labels)
    found = row(result, name="cnn-s0", readout="pooled")

    def accuracy(corruption=None):
        return judge.score(scaler.transform(pooled(sides[1], corruption)), sides[1].labels)

    assert found["linear"] == pytest.approx(accuracy())
    jpeg = np.mean([accuracy(Corruption("jpeg", severity)) for severity in (1, 5)])
    assert found["robustness/jpeg"] == pytest.approx(jpeg)


def test_the_floor_is_the_architecture_without_the_alignment(whole, scenes, runs):
    result, _, _ = whole
    images = [LabelledRows.open(side.cache, side.shards) for side in scenes]
    _, _, model = load_model(Path(runs[1]))
    untrained = build_student(model["student"], 1)
    sides = []
    for side in images:
        pixels = torch.stack(
            [
                torch.from_numpy(
                    np.asarray(
                        side.index.image(int(at)).resize(
                            (32, 32), 3, box=[float(edge) for edge in side.cache.boxes[at]]
                        )
                    ).copy()
                )
                for at in side.rows
            ]
        )
        with torch.no_grad():
            seen = normalise(pixels, torch.device("cpu"))
            if not sides:  # the 60 training images are one batch, which the batch norms take over
                for norm in untrained.modules():
                    if isinstance(norm, torch.nn.BatchNorm2d):
                        norm.momentum = 1.0
                untrained(seen)
                untrained.eval()
            sides.append(untrained(seen).pooled.numpy())
    scaler = StandardScaler().fit(sides[0])
    judge = RidgeClassifier(alpha=0.1 * 60).fit(scaler.transform(sides[0]), images[0].labels)
    expected = judge.score(scaler.transform(sides[1]), images[1].labels)
    found = row(result, name="resnet_micro-s1", readout="pooled")
    assert found["linear"] == pytest.approx(expected)


def test_teachers_on_the_grid_and_in_quarters_come_from_the_store(scenes):
    tokens = torch.arange(2 * 12 * 3.0).view(2, 12, 3)
    found = quarters(tokens, (4, 3))
    by_hand = tokens.view(2, 4, 3, 3)[:, :2, :2].mean((1, 2))  # windows overlap in odd columns
    torch.testing.assert_close(found[:, :3], by_hand)
    torch.testing.assert_close(found[:, 9:], tokens.view(2, 4, 3, 3)[:, 2:, 1:].mean((1, 2)))


def test_resamples_of_two_evaluations_can_be_subtracted(whole, tmp_path):
    _, again, out = whole
    result, rows = again(), read_resamples(out)
    assert len(rows) == len(result["rows"])
    for one, drawn in zip(result["rows"], rows, strict=True):
        assert set(drawn) == {score["key"] for score in one["scores"]}
        for score in one["scores"]:
            assert np.quantile(drawn[score["key"]], [0.025, 0.975]) == pytest.approx(
                [score["low"], score["high"]]
            )
    # Another command, with another selection of rows and protocols, draws the same images.
    other = again(f"out={tmp_path}", "protocols=[linear]", "with_teachers=false")
    place = other["rows"].index(row(other, name="cnn-s1", readout="pooled"))
    before = result["rows"].index(row(result, name="cnn-s1", readout="pooled"))
    assert np.array_equal(read_resamples(tmp_path)[place]["linear"], rows[before]["linear"])
    again(f"out={tmp_path}", "protocols=[linear]", "intervals.resamples=0")
    assert read_resamples(tmp_path) == []
    (tmp_path / "resamples.safetensors").write_bytes(b"x")
    with pytest.raises(DataError, match=r"resamples\.safetensors cannot be read"):
        read_resamples(tmp_path)


def test_figures_by_other_options_are_put_aside(whole, capsys):
    _, again, out = whole
    first, drawn = again(), read_resamples(out)
    there = {path.name for path in out.iterdir()}
    again()
    assert {path.name for path in out.iterdir()} == there
    capsys.readouterr()
    again("protocols=[knn]", "readouts=[pooled]")
    (kept,) = {path.name for path in out.glob("*-summary.json")} - there
    assert f"was of other options and is {kept} now" in capsys.readouterr().err
    earlier = json.loads((out / kept).read_text())
    assert [row["scores"] for row in earlier["rows"]] == [row["scores"] for row in first["rows"]]
    assert len(read_resamples(out)) < len(drawn)
    (out / kept.replace("summary.json", RESAMPLES)).rename(out / RESAMPLES)
    for one, other in zip(drawn, read_resamples(out), strict=True):
        assert all(np.array_equal(one[key], other[key]) for key in one)


def test_equal_width_is_the_same_reduction_for_everyone(whole):
    _, again, _ = whole
    found = again("width=6", "protocols=[knn,regression]")
    assert {r["dim"] for r in found["rows"]} == {6}
    both = again("width=[null,6]", "protocols=[knn,regression]")
    assert [r for r in both["rows"] if r["reduced"]] == found["rows"]
    assert len(both["rows"]) == 2 * len(found["rows"])


def test_a_run_is_one_seed_at_every_width_however_often_it_is_named(whole, runs, capsys):
    _, again, _ = whole
    quick = ("protocols=[knn]", "readouts=[pooled]", "with_teachers=false", "with_floor=false")
    capsys.readouterr()
    found = again(f"students=[{runs[0]},{runs[1]},{runs[0]}/]", "width=[128,256,128]", *quick)
    assert [(r["name"], r["dim"], r["width"]) for r in found["rows"]] == [
        (name, 16, width) for name in ("cnn-s0", "cnn-s1") for width in (128, 256)
    ]
    assert [(e["names"], e["dim"], e["width"]) for e in found["seeds"]] == [
        (["cnn-s0", "cnn-s1"], 16, width) for width in (128, 256)
    ]
    assert "2 seeds, cnn-s0 and so on, pooled at width=256: knn" in capsys.readouterr().out


def test_the_suite_is_usable_from_python(scenes):
    task = Task("position", "regression", ["json:x", "json:y"])
    learn, judge = (LabelledRows.open(side.cache, side.shards, [task]) for side in scenes)
    tokens = [side.cache["vit/patch"].read(side.rows).standardised() for side in (learn, judge)]
    features = Features(*(quarters(part, (4, 4)).numpy() for part in tokens))
    truth = Targets("position", learn.truths["position"], judge.truths["position"])
    suite = build_suite(["regression"])
    suite.check([truth])
    (score,) = suite.score(features, [truth])
    assert score.images == 28
    mean = Features(*(part.mean(1).numpy() for part in tokens))
    (pooled,) = suite.score(mean, [truth])
    better = suite.bootstrap.difference(score.statistic, pooled.statistic, score.images)
    assert better.value == pytest.approx(score.value - pooled.value)
    assert better.low < better.value < better.high


def test_tables_fit_120_columns_and_cut_no_name(whole):
    result, _, _ = whole
    rows = [
        Row(
            r["kind"], r["name"], r["readout"], r["dim"], None, r["readout"] == "map",
            [
                Score(
                    **{k: v for k, v in s.items() if k != "key"},
                    statistic=lambda w: w.mean(1), resampled=np.zeros(0),
                )
                for s in r["scores"]
            ],
        )
        for r in result["rows"]
    ]  # fmt: skip
    text = io.StringIO()
    print_tables(rows, "title", Console(file=text, width=120, force_terminal=False))
    lines = text.getvalue().splitlines()
    assert max(map(len, lines)) <= 120
    assert "…" not in text.getvalue()
    for heading in ("k-NN %", "5-shot %", "mAP %", "R² % position", "CKA vit/cls %", "corrupted %"):
        assert heading in text.getvalue()
    teacher = [line for line in lines if "vit/cls" in line and "teacher" in line]
    assert any(line.count(" - ") == 3 for line in teacher)


def test_long_names_are_folded_and_figures_are_not():
    def score(space: str) -> Score:
        return Score(
            "cka", space, "spaces", "CKA", 0.1234, 0.1, 0.2, None, {}, {}, 9,
            statistic=lambda w: w.mean(1), resampled=np.zeros(0),
        )  # fmt: skip

    spaces = [f"a_teacher_with_a_long_name_{n}/its_only_space" for n in range(4)]
    scores = [score(space) for space in spaces]
    rows = [Row("student", "a_run_whose_name_is_long" * 3, "predictions", 9, None, False, scores)]
    text = io.StringIO()
    print_tables(rows, "", Console(file=text, width=120, force_terminal=False))
    assert max(map(len, text.getvalue().splitlines())) <= 120
    assert text.getvalue().count("12.3 ±5.0") == 4
    assert "…" not in text.getvalue()
    cells = [line.replace("┃", "│").split("│") for line in text.getvalue().splitlines()]
    columns = ["".join(part.strip() for part in column) for column in zip(
        *(line for line in cells if len(line) == 10), strict=True
    )]  # fmt: skip
    for space in spaces:
        assert any(space in column.replace(" ", "") for column in columns)
