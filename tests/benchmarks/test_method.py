"""The comparison: judged as by hand, paired as by hand, and made of real runs end to end."""

from __future__ import annotations

import itertools
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from preceptor.benchmarks import method
from preceptor.benchmarks.comparison import judge, report, runs, timing
from preceptor.benchmarks.comparison.bed import Bed, Outputs
from preceptor.benchmarks.comparison.options import changed, trained_with
from preceptor.benchmarks.comparison.plan import Plan
from preceptor.benchmarks.comparison.runs import cost, load_trained
from preceptor.benchmarks.comparison.variants import STUDENTS, choose, variants
from preceptor.benchmarks.testbed import shards
from preceptor.errors import ConfigError
from preceptor.options import compose_options
from preceptor.train.alignment import ALIGNMENTS, build_alignment
from preceptor.train.alignment.base import Space
from preceptor.train.batch import normalise
from preceptor.train.students import build_student
from scipy import stats
from sklearn.decomposition import PCA

TASKS = ("letters", "pose", "masks", "instances")
"""Those of the fixture `bed`."""


def outputs(bed, value):
    """A model whose readout holds the truth itself among noise, where `value` is 1."""
    random = np.random.default_rng(0)
    found = {}
    for name, pixels in Bed(bed).pixels.items():
        x = random.normal(size=(len(pixels), 40)).astype(np.float32)
        if name != "pool":
            labels = Bed(bed).labels[name]
            known = np.eye(40)[labels.classes.clip(0)] if labels.classes.max() >= 0 else x * 0
            if labels.targets.shape[1]:
                known[:, : labels.targets.shape[1]] = labels.targets
            x = x * (1 - value) * 0.1 + (10 * value * known).astype(np.float32)
        tokens = random.normal(size=(len(pixels), 9, 16)).astype(np.float32)
        found[name] = Outputs({"pooled": x, "noise": tokens[:, 0]}, tokens, (3, 3))
    return found


def test_a_readout_that_holds_the_truth_is_chosen_and_scores_everything(bed):
    scores = judge.judge(Bed(bed), outputs(bed, 1.0))
    assert set(scores) == set(TASKS)
    best = judge.chosen(scores)
    assert all(best[task] == "pooled" for task in TASKS if task != "masks")
    for task in ("letters", "pose", "instances"):
        assert scores[task]["pooled"]["test"] > 99
        assert scores[task]["noise"]["test"] < 40


def test_the_reduction_is_that_of_the_pool_alone():
    random = np.random.default_rng(0)
    look, x = random.normal(size=(50, 12)), random.normal(size=(7, 3, 12))
    reduced = judge.Reduction(look.astype(np.float32), width=5)(x.astype(np.float32))
    expected = PCA(5).fit(look).transform(x.reshape(21, 12)).reshape(7, 3, 5)
    np.testing.assert_allclose(np.abs(reduced), np.abs(expected), atol=1e-4)


def one_run(seed, figures, **more):
    scores = {
        task: {"pooled": {"validation": v, "test": v}, "spatial": {"validation": 0, "test": 99.0}}
        for task, v in figures.items()
    }
    seconds = {"train": 60 + (seed or 0)}
    run = {"seed": seed, "scores": scores, "kind": "rival", "losses": {}, "cosines": {}}
    return {**run, "seconds": seconds, **more}


def test_differences_are_paired_by_seed_and_task():
    ours = [one_run(s, {"a": 50 + s, "b": 70}) for s in range(3)]
    theirs = [one_run(s, {"a": 49 + s, "b": 67}) for s in (2, 0, 1)]
    found = report.difference(ours, theirs)
    assert found["mean"] == pytest.approx(2.0)
    assert found["by_task"] == {"a": 1.0, "b": 3.0}
    assert (found["seeds"], found["tasks"]) == (3, 2)
    assert found["over_seeds"] == pytest.approx([2.0, 2.0])
    assert found["over_tasks"] == pytest.approx([1.0, 3.0])


def test_the_interval_over_seeds_is_students():
    ours = [one_run(s, {"a": 50 + [0, 1, 5][s]}) for s in range(3)]
    theirs = [one_run(s, {"a": 50}) for s in range(3)]
    low, high = report.difference(ours, theirs)["over_seeds"]
    reach = stats.t.ppf(0.975, 2) * np.std([0, 1, 5], ddof=1) / math.sqrt(3)
    assert (low, high) == pytest.approx((2 - reach, 2 + reach))


def test_the_interval_over_tasks_draws_tasks_and_the_same_seeds_for_all():
    gaps = np.array([[0.0, 9.0], [3.0, 20.0]])  # by seed and task
    ours = [one_run(s, {"a": gaps[s, 0], "b": gaps[s, 1]}) for s in (0, 1)]
    theirs = [one_run(s, {"a": 0, "b": 0}) for s in (0, 1)]
    pairs = list(itertools.product((0, 1), repeat=2))
    everything = [gaps[np.ix_(seeds, tasks)].mean() for seeds in pairs for tasks in pairs]
    expected = np.quantile(everything, [0.025, 0.975], method="inverted_cdf")
    assert report.difference(ours, theirs)["over_tasks"] == pytest.approx(expected)


def test_only_common_seeds_are_paired_and_teachers_stand_beside_all():
    ours = [one_run(s, {"a": 50 + s}) for s in range(3)]
    assert report.difference(ours, [one_run(1, {"a": 40})])["mean"] == 11
    assert report.difference(ours, [one_run(None, {"a": 40})])["mean"] == 11
    with pytest.raises(ValueError, match="no seed"):
        report.difference(ours, [one_run(7, {"a": 40})])


def test_the_best_rival_is_chosen_on_the_seeds_that_both_have():
    cost = {"student": 1, "alignment": 1, "operations": 1}
    runs = {
        "model_token": [one_run(s, {"a": 50 + 10 * s}, kind="ours", cost=cost) for s in range(3)],
        "regression": [one_run(s, {"a": 49 + 10 * s}, cost=cost) for s in range(3)],  # behind by 1
        "ladder": [one_run(0, {"a": 51}, cost=cost)],  # ahead by 1, with the lowest mean of all
    }
    found = report.summarise(runs, {})
    assert found["best_rival"]["name"] == "ladder"
    assert found["best_rival"]["mean"] == -1
    assert found["spatial"] == dict.fromkeys(runs, 99.0)
    assert found["tokens"] == {}
    assert found["train_seconds"]["model_token"] == 60


def test_variants_without_a_common_seed_are_not_compared():
    cost = {"student": 1, "alignment": 1, "operations": 1}
    runs = {
        "model_token": [one_run(0, {"a": 50}, kind="ours", cost=cost)],
        "regression": [one_run(s, {"a": 49}, cost=cost, losses={"x": s + 1.0}) for s in (0, 1)],
        "ladder": [one_run(1, {"a": 60}, cost=cost)],
        "only_b": [one_run(1, {"a": 40}, kind="teacher", cost=cost, losses={"x": 1.5})],
        "only_c": [one_run(2, {"a": 40}, kind="teacher", cost=cost, losses={"x": 1.5})],
    }
    found = report.summarise(runs, {})
    assert set(found["against"]) == set(found["against_pooled"]) == {"regression"}
    assert found["best_rival"]["name"] == "regression"
    assert found["company"] == {"b": {"joint": 2.0, "alone": 1.5}}  # of seed 1
    told = {row[0]: row[-1] for row in report.rows(found)}
    assert told["regression"] == "+1.00 [+1.00, +1.00] over tasks"
    assert told["ladder"] == told["only_b"] == "–"


def test_the_test_part_never_chooses():
    run = one_run(0, {"a": 50})  # its spatial readout is far better on test and worse on validation
    assert report.figures(run, "test") == {"a": 50}
    assert report.figures(run, "test", "spatial") == {"a": 99.0}


def test_a_readout_that_some_have_can_be_left_out_for_all():
    run = one_run(0, {"a": 50, "b": 60})
    run["scores"]["a"]["tokens"] = {"validation": 55.0, "test": 70.0}
    run["scores"]["b"]["tokens"] = {"validation": 55.0, "test": 80.0}  # not chosen anyway
    assert report.figures(run, "test") == {"a": 70.0, "b": 60}
    assert report.figures(run, "test", "shared") == {"a": 50, "b": 60}
    found = report.difference([run], [one_run(0, {"a": 45, "b": 45})], readout="shared")
    assert found["by_task"] == {"a": 5, "b": 15}


def test_every_alignment_is_compared():
    known = variants(["vit"])
    rivals = {name for name, variant in known.items() if variant.kind == "rival"}
    assert rivals == set(ALIGNMENTS) - {"model_token"}
    assert set(choose("model_token,teacher", known)) == {"model_token", "only_vit"}
    with pytest.raises(ConfigError, match="there are model_token"):
        choose("modeltoken", known)


OF_THE_BED = {
    "efficientnet_lite0": (320, 3, 1280),
    "vit_s_focus": (384, 6, 384),
    "u2netp": (64, 8, 64),
    "letters": (128, 6, 128),
    "pose": (128, 6, 128),
    "materials": (96, 6, 96),
}
"""Width of the map, its side, and width of the descriptor of the full bed's teachers."""


@pytest.mark.parametrize("student", STUDENTS)
def test_the_backbone_controls_have_the_parameters_that_they_state(student):
    spaces = {}
    for teacher, (dim, side, width) in OF_THE_BED.items():
        spaces[f"{teacher}/map"] = Space(teacher, side * side, dim, (side, side))
        spaces[f"{teacher}/mean"] = Space(teacher, 1, width, None)
    found, built = {}, {}
    for name, variant in timing.timed(variants([]), student).items():
        options = ["cache=unused", "data.shards=unused", *variant.all_options(student)]
        config = compose_options("train", options)
        model = build_student(dict(config.student), 0)
        built[name] = model, build_alignment(dict(config.align), model, spaces)
        found[name] = cost(*built[name])
    inside = found["ours_inside_backbone" if student == "vit" else "model_token"]
    assert found["regression_same_cost"]["student"] == pytest.approx(inside["student"], rel=0.02)
    for name in ("regression_wide_backbone", "regression_same_time"):
        assert found[name]["student"] > inside["student"]
        assert found[name]["operations"] > inside["operations"]
    assert found["regression"]["student"] < inside["student"]
    if student == "vit":
        # The tokens are after the backbone: it is the rivals', and they cost where they are read.
        assert found["model_token"] == {
            **found["regression"], "alignment": found["model_token"]["alignment"]
        }  # fmt: skip
        model, alignment = built["model_token"]
        read = found["model_token"]["student"] + alignment.readout_parameters("tokens")
        assert found["regression_same_time"]["student"] > read


@pytest.mark.parametrize(
    ("key", "then", "expected"),
    [
        ("align.write_back", 3, [3, 0]),
        ("align.since_gone", 0.1, [0.1, None]),
        ("align.since_gone", 0.0, None),  # it was off
        ("align.pool", "absent", None),  # it did what is the default since
        ("recipe.lr", 0.001, [0.001, 0.002]),
        ("recipe.lr", "absent", [None, 0.002]),  # the variant asks for it
        ("recipe.steps", 7, None),  # the plan's
        ("student.options.depth", 6, [6, 4]),
        ("engine.precision", "32-true", None),  # the plan's
    ],
)
def test_a_run_of_other_options_is_told(key, then, expected, tmp_path):
    variant = variants([])["model_token"]
    assert changed(trained_with(tmp_path), "vit", variant) == {}  # it has left nothing to compare
    options = ["cache=c", "data.shards=s", "recipe=short", *variant.all_options("vit")]
    config = compose_options("train", options)
    OmegaConf.set_struct(config, False)
    if then == "absent":
        del OmegaConf.select(config, key.rpartition(".")[0])[key.rpartition(".")[2]]
    else:
        OmegaConf.update(config, key, then)
    OmegaConf.save(config, tmp_path / "config.yaml")
    found = changed(trained_with(tmp_path), "vit", variant)
    assert found == ({} if expected is None else {key: expected})


def test_what_every_run_is_given_counts_as_its_variant(tmp_path):
    variant, of_all = variants([])["model_token"], ["recipe.lr=0.5"]
    options = ["cache=c", "data.shards=s", "recipe=short", *variant.all_options("vit"), *of_all]
    OmegaConf.save(compose_options("train", options), tmp_path / "config.yaml")
    then = trained_with(tmp_path)
    assert changed(then, "vit", variant, of_all) == {}
    assert changed(then, "vit", variant) == {"recipe.lr": [0.5, 0.002]}
    assert changed(then, "vit", variant, ["recipe.lr=0.25"]) == {"recipe.lr": [0.5, 0.25]}


def test_times_are_summarised_as_by_hand():
    found = timing._summary({"model_token": [1.0, 2.0, 4.0], "other": [3.0, 2.0, 2.0]})["other"]
    assert found == {
        "ms": 2000,
        "quartiles_ms": [2000, 2500],
        "ratio": 1.0,  # of 3, 1 and 0.5
        "quartiles": [0.75, 2.0],
    }


def test_runs_are_made_once_and_reported(bed, tmp_path, tmp_path_factory, capsys, monkeypatch):
    arguments = [
        "--bed", str(bed), "--out", str(tmp_path), "--students", "cnn", "--seeds", "1",
        "--steps", "2", "--json", str(tmp_path / "method.json"),
    ]  # fmt: skip
    chosen = "model_token,regression,supervised,random,ours_no_stream"  # of the ViT, the last one
    method.main([*arguments, "--variants", chosen])
    found = json.loads((tmp_path / "method.json").read_text())
    summary = found["summary"]["cnn"]
    assert set(summary["means"]) == {"model_token", "regression", "supervised", "random"}
    assert summary["best_rival"]["name"] == "regression"
    assert set(summary["teachers"]) == {"letters", "pose", "materials"}
    assert set(summary["cosines"]["end"]) == {"letters~pose", "letters~materials", "pose~materials"}
    assert all(-1 <= value <= 1 for value in summary["cosines"]["end"].values())
    # The difference, once more by hand from what the two runs left.
    runs = [
        json.loads((tmp_path / "cnn" / name / "s0" / "result.json").read_text())["scores"]
        for name in ("model_token", "regression")
    ]
    by_hand = []
    for task in TASKS:
        best = [max(run[task].values(), key=lambda score: score["validation"]) for run in runs]
        by_hand.append(best[0]["test"] - best[1]["test"])
    assert summary["best_rival"]["mean"] == pytest.approx(np.mean(by_hand))

    # The untrained student's batch norms have the statistics of the pool.
    floor, _ = load_trained(Bed(bed), tmp_path / "cnn" / "random" / "s0", "random", 0)
    pool = torch.from_numpy(Bed(bed).pixels["pool"])
    assert len(pool) == 128
    with torch.no_grad():
        seen = floor.model.conv1[0](normalise(pool, torch.device("cpu")))
    torch.testing.assert_close(floor.model.conv1[1].running_mean, seen.mean((0, 2, 3)))

    # What is there is not done again; a new variant joins the table.
    before = (tmp_path / "cnn" / "regression" / "s0" / "result.json").stat().st_mtime_ns
    capsys.readouterr()
    monkeypatch.setattr(timing, "ROUNDS", 2)
    monkeypatch.setattr(timing, "LEAST_SECONDS", 0)
    method.main([*arguments, "--variants", "regression,only_pose", "--time"])
    printed = capsys.readouterr().out
    assert printed.count("$ preceptor train") == 1
    assert (tmp_path / "cnn" / "regression" / "s0" / "result.json").stat().st_mtime_ns == before
    everything = json.loads((tmp_path / "method.json").read_text())
    again = everything["summary"]["cnn"]
    assert set(again["company"]["pose"]) == {"joint", "alone"}
    assert len(again["inference_ms"]) == 4
    for times in again["inference_ms"].values():
        assert set(times) == {*timing.timed(variants([]), "cnn"), timing.READ}
        assert times["model_token"]["ratio"] == 1
        assert all(own["ms"] > 0 and own["quartiles_ms"][0] > 0 for own in times.values())

    # A run of other options is refused, and told where it is reported.
    path = tmp_path / "cnn" / "regression" / "s0" / "config.yaml"
    whole = path.read_text()
    assert everything["other_options"] == {}
    path.write_text(whole.replace("clip: 3.0", "clip: 1.0"))
    with pytest.raises(SystemExit, match=r"regression/s0 was trained with recipe.clip=1.0, not 3"):
        method.main([*arguments, "--variants", "regression"])
    method.main([*arguments, "--report"])
    told = json.loads((tmp_path / "method.json").read_text())["other_options"]
    assert told == {"cnn/regression/s0": {"recipe.clip": [1.0, 3.0]}}
    path.write_text(whole)

    # What every run is given is part of the plan; labels alone do not heed it.
    given = [*arguments, "--out", str(tmp_path_factory.mktemp("given"))]
    of_all = ["--option", "recipe.clip=1.0"]
    with pytest.raises(SystemExit, match="supervised heeds no --option"):
        method.main([*given, *of_all, "--variants", "supervised"])
    method.main([*given, *of_all, "--variants", "regression"])
    given_all = json.loads((tmp_path / "method.json").read_text())
    assert given_all["protocol"]["options"] == ["recipe.clip=1.0"]
    assert given_all["other_options"] == {}
    with pytest.raises(SystemExit, match=r"regression/s0 was trained with recipe.clip=1.0, not 3"):
        method.main([*given, "--variants", "regression"])

    # The finished runs in one file give the same report without their folders, and are not done
    # again; a folder's own run counts before the file's.
    kept = tmp_path / "runs.jsonl"
    method.main([*arguments, "--report", "--runs", str(kept)])
    of_folders = json.loads((tmp_path / "method.json").read_text())
    assert len(kept.read_text().splitlines()) == 5
    capsys.readouterr()
    elsewhere = [*arguments, "--out", str(tmp_path / "elsewhere"), "--runs", str(kept)]
    method.main([*elsewhere, "--variants", "regression,only_letters"])
    commands = [line for line in capsys.readouterr().out.splitlines() if line.startswith("$")]
    assert ["only_letters" in line for line in commands] == [True]
    assert len(kept.read_text().splitlines()) == 6
    found = json.loads((tmp_path / "method.json").read_text())
    assert found["other_options"] == {}
    for name, expected in of_folders["summary"]["cnn"]["against"].items():
        told = found["summary"]["cnn"]["against"][name]
        assert told["mean"] == pytest.approx(expected["mean"], abs=1e-4)
        assert told["over_tasks"] == pytest.approx(expected["over_tasks"], abs=1e-4)
    whole = kept.read_text()
    kept.write_text(whole.replace('"recipe.clip":3.0', '"recipe.clip":1.0'))
    with pytest.raises(SystemExit, match=r"cnn/regression/s0 was trained with recipe.clip=1.0"):
        method.main([*elsewhere, "--variants", "regression"])
    kept.write_text(whole.replace('"steps":2', '"steps":3', 1))
    with pytest.raises(SystemExit, match=r"runs.jsonl, line 1: a run with steps=3"):
        method.main([*elsewhere, "--report"])
    kept.write_text(whole[:-20])
    with pytest.raises(SystemExit, match=r"runs.jsonl, line 6 is no finished run"):
        method.main([*elsewhere, "--report"])
    shutil.rmtree(tmp_path / "elsewhere")
    capsys.readouterr()

    # What the cache costs: the first views of the very store that has one for every step.
    method.main([*arguments, "--variants", "none", "--stores", "fp16,views1,online"])
    commands = [
        line
        for line in capsys.readouterr().out.splitlines()
        if line.startswith("$ preceptor train")
    ]
    caches = [re.search(r"cache=\S*/(\S+)", line)[1] for line in commands]
    assert caches == ["pool-fp16", "pool-random1", "pool-random1"]
    assert [" views=1 " in line for line in commands] == [False, True, False]
    found = json.loads((tmp_path / "method.json").read_text())["stores"]["cnn"]
    assert set(found) == {"fp16", "views1", "online"}
    assert found["views1"]["difference"]["mean"] == pytest.approx(
        found["views1"]["mean"] - found["online"]["mean"]
    )

    losses = [
        np.mean(list(json.loads(path.read_text())["losses"].values()))
        for path in (
            tmp_path / "stores" / name / "cnn/regression/s0/result.json"
            for name in ("views1", "online")
        )
    ]
    assert found["views1"]["held_out_difference"]["mean"] == pytest.approx(losses[0] - losses[1])
    assert found["views1"]["held_out_loss"] == pytest.approx(losses[0])

    # Judged on a bed whose tasks have changed since: told, and judged anew without training.
    for path in tmp_path.glob("**/s0/result.json"):
        if "supervised" not in path.parts:
            kept = json.loads(path.read_text())
            path.with_suffix(".before").write_text(json.dumps(kept))
            stale = {**kept, "bed": "another", "scores": {}}
            if "random" in path.parts:  # of before batch norms were settled, on these tasks
                stale |= {"bed": kept["bed"], "settled": None, "cosines": {}}
            path.write_text(json.dumps(stale))
    with pytest.raises(SystemExit, match="judged on other images"):
        method.main([*arguments, "--report"])
    capsys.readouterr()
    plan = Plan(Bed(bed), tmp_path, 2, bed / "stores" / "pool", shards.pattern(bed / "pool"))
    method.compare(plan, ["cnn"], choose("regression,random", variants([])), [0])
    assert "$ preceptor" not in capsys.readouterr().out
    method.main([*arguments, "--judge"])
    assert "$ preceptor" not in capsys.readouterr().out
    before = list(tmp_path.glob("**/result.before"))
    assert len(before) == 7
    for path in before:
        assert json.loads(path.with_suffix(".json").read_text()) == json.loads(path.read_text())

    with pytest.raises(SystemExit, match="not 3: choose another --out"):
        method.main([*arguments[:-4], "--steps", "3", "--report"])


def test_the_seconds_of_a_training_are_those_of_all_its_starts(bed, tmp_path, monkeypatch):
    pool = shards.pattern(bed / "pool")
    plan = Plan(Bed(bed), tmp_path, 2, bed / "stores" / "pool", pool)
    variant = variants([])["regression"]

    def stopped(*given):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(runs, "_scores", stopped)
        with pytest.raises(KeyboardInterrupt):
            runs.run(plan, "cnn", "regression", variant, 0)
    path = plan.folder("cnn", "regression", 0) / "summary.json"
    summary = json.loads(path.read_text())
    path.write_text(json.dumps({**summary, "seconds": 5000.0}))  # as if it had been a long one
    found = runs.run(plan, "cnn", "regression", variant, 0)
    assert found["seconds"]["train"] == 5000
    assert 5000 < found["seconds"]["all"] < 6000


def test_a_folder_without_a_bed_is_told(tmp_path):
    with pytest.raises(SystemExit, match=r"make\.py"):
        method.main(["--bed", str(tmp_path), "--report"])
