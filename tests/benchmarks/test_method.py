"""The comparison: judged as by hand, and paired as by hand."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
from omegaconf import OmegaConf
from preceptor.benchmarks.comparison import judge, report, timing
from preceptor.benchmarks.comparison.bed import Bed, Outputs
from preceptor.benchmarks.comparison.options import changed, trained_with
from preceptor.benchmarks.comparison.runs import cost
from preceptor.benchmarks.comparison.variants import STUDENTS, choose, variants
from preceptor.errors import ConfigError
from preceptor.options import compose_options
from preceptor.train.alignment import ALIGNMENTS, build_alignment
from preceptor.train.alignment.base import Space
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


def test_of_equal_readouts_the_first_is_chosen_whatever_their_last_bits_are():
    """A file of finished runs does not keep them, and is to give the same table."""
    figures = {"pooled": 6.45, "tokens": 6.450000000000001}
    scores = {name: {"validation": value, "test": 0.0} for name, value in figures.items()}
    kept = {name: {"validation": round(value, 5)} for name, value in figures.items()}
    assert judge.chosen({"a": scores}) == judge.chosen({"a": kept}) == {"a": "pooled"}


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
