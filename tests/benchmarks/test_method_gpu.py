"""The comparison at a larger scale: its bed, and its runs side by side, as far as a CPU shows."""

from __future__ import annotations

import json
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
from preceptor.benchmarks import method_gpu
from preceptor.benchmarks.comparison import side_by_side
from preceptor.benchmarks.comparison.bed import Bed
from preceptor.benchmarks.comparison.plan import Plan
from preceptor.benchmarks.comparison.side_by_side import BEST_TEACHER, Job, queue
from preceptor.benchmarks.comparison.variants import LARGER, Variant, variants
from preceptor.benchmarks.testbed import make, shards, training
from preceptor.benchmarks.testbed.tasks import TASKS, samples
from preceptor.cache import SampleIndex
from preceptor.kernels.availability import NO_TRITON


@pytest.mark.usefixtures("made_here")
def test_all_images_can_be_larger():
    for name in (*TASKS, "pool"):
        split = "pool" if name == "pool" else "test"
        sizes = [next(samples(name, split, 1, 0, size)) for size in (48, 80)]
        assert [sample.pixels.shape[:2] for sample in sizes] == [(48, 48), (80, 80)]
        if sizes[0].mask is not None:
            assert [sample.mask.shape for sample in sizes] == [(48, 48), (80, 80)]


@pytest.mark.usefixtures("made_here")
def test_processes_draw_the_same_bytes(tmp_path, plan, monkeypatch):
    monkeypatch.setattr(shards, "SHARD", 8)
    own = replace(plan, pool=20, heldout=8, tasks=("letters",), share=0.01, size=64)
    alone, together = (make._images(tmp_path / str(n), own, n) for n in (1, 2))
    assert alone == together
    assert sorted(path.name for path in (tmp_path / "2" / "pool").iterdir()) == [
        "000000.tar", "000001.tar", "000002.tar", "sources.json",
    ]  # fmt: skip
    drawn = [training.draw("pose", 5, 0, 64, workers)[0] for workers in (1, 2)]
    np.testing.assert_array_equal(*drawn)
    assert drawn[0].shape == (5, 3, 48, 48)


@pytest.mark.usefixtures("made_here")
def test_one_store_holds_the_pixels_and_tokens_of_all_tasks(tmp_path, plan):
    own = replace(
        plan, pool=64, share=0.02, tasks=("letters", "masks"), size=56, one_store=True,
        encoding="int8", course=replace(plan.course, images=64),
    )  # fmt: skip
    assert make.make(tmp_path, own)["size"] == 56
    bed = Bed(tmp_path)
    for name, folder in bed.sets().items():
        index = SampleIndex.from_shards(shards.pattern(tmp_path / folder))
        images = [np.asarray(index.image(i, 10**6).convert("RGB")) for i in range(len(index))]
        np.testing.assert_array_equal(bed.pixels[name], np.stack(images))
        assert len(bed.teacher("pose")[name].map) == len(images)
    assert bed.labels["masks/test"].masks.shape == (40, 56, 56)
    assert [path.name for path in sorted((tmp_path / "stores").iterdir()) if path.is_dir()] == [
        "heldout", "pool", "tasks",
    ]  # fmt: skip


def test_what_matters_most_is_run_first():
    jobs = queue(["a", "b"])
    assert jobs[:2] == [Job("a", "model_token", 0), Job("b", "model_token", 0)]
    assert [job.seed for job in jobs] == [0] * 8 + [1] * 6 + [0] * 8
    assert jobs[-1].variant == BEST_TEACHER
    names = {job.variant for job in jobs} - {BEST_TEACHER}
    assert all(set(LARGER) <= set(variants([])[name].students) for name in names)
    assert not set(LARGER) & set(variants([])["regression_same_cost"].students)
    assert queue(["a"], 1, ["random"]) == [Job("a", "random", 0)]


def test_runs_side_by_side_are_reported(bed, tmp_path):
    arguments = [
        "--device", "cpu", "--bed", str(bed), "--out", str(tmp_path / "runs"), "--size", "48",
        "--students", "cnn", "--variants", "model_token,regression", "--seeds", "1", "--steps", "2",
        "--processes", "2", "--workers", "2", "--option=recipe.batch_size=16",
        "--json", str(tmp_path / "found.json"),
    ]  # fmt: skip
    method_gpu.main(arguments)
    found = json.loads((tmp_path / "found.json").read_text())
    assert found["failures"] == []
    assert set(found["summary"]["cnn"]["means"]) == {"model_token", "regression"}
    assert found["summary"]["cnn"]["best_rival"]["name"] == "regression"
    assert set(found["summary"]["cnn"]["teachers"]) == {"letters", "pose", "materials"}
    assert found["other_options"] == {}
    assert all(run["speed"]["images_per_second"] > 0 for run in found["runs"])
    assert {"bed", "runs", "report", "all"} == set(found["seconds"])

    # What is there is not done again, and is reported when the time is over before it began.
    method_gpu.main([*arguments, "--deadline", "0"])
    again = json.loads((tmp_path / "found.json").read_text())
    assert again["summary"]["cnn"]["means"] == found["summary"]["cnn"]["means"]


def test_a_run_that_fails_is_told_and_done_by_another_process(bed, tmp_path, capsys, monkeypatch):
    pool = shards.pattern(bed / "pool")
    plan = Plan(Bed(bed), tmp_path, 2, bed / "stores" / "pool", pool)
    wrong = {"regression": Variant("rival", ("align=regression", "align.hidden=no"), "")}
    jobs = [Job("cnn", "regression", 0), Job("cnn", "model_token", 0)]
    # pytest's own capture would take what is to go to a file
    with capsys.disabled(), pytest.raises(SystemExit, match=str(side_by_side.FAILED)):
        side_by_side.work(plan, jobs, wrong, time.time() + 60, lambda: None)
    # One that another process has taken is not done; one that was not ended is told.
    (tmp_path / "taken" / str(jobs[1])).touch()
    side_by_side.work(plan, jobs, wrong, time.time() + 60, lambda: None)
    failed, late = side_by_side.unfinished(plan, jobs)
    assert failed["run"] == "cnn-regression-s0"
    assert "the training failed" in failed["error"]
    assert "align.hidden" in failed["output"]
    assert late["run"] == "cnn-model_token-s0"

    # A process that was begun anew tries it once more.
    monkeypatch.setenv(NO_TRITON, "1")
    right = {"regression": Variant("rival", ("align=regression", "recipe.batch_size=16"), "")}
    with capsys.disabled():
        side_by_side.work(plan, jobs, right, time.time() + 60, lambda: None)
    assert (plan.folder("cnn", "regression", 0) / "result.json").exists()
    told, _ = side_by_side.unfinished(plan, jobs)
    assert told == {**failed, "then": "it was done without Triton"}


def test_processes_are_ended_when_the_time_is_over(tmp_path):
    commands = [
        [sys.executable, "-c", "import time; time.sleep(3600)"],
        [sys.executable, "-c", "raise SystemExit('no')"],
    ]
    failures = side_by_side.oversee(commands, tmp_path, time.time() + 4)
    assert 1 <= len(failures) <= side_by_side.STARTS
    assert {failure["status"] for failure in failures} == {1}
    assert failures[0]["output"].strip() == "no"
