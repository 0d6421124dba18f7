"""Whole ablations through the command line: launched, resumed, with failed and killed runs."""

from __future__ import annotations

import json
import stat
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from preceptor.cache import Cache
from preceptor.cli import main
from preceptor.train import loop
from preceptor.train.ablate import job
from preceptor.train.checkpoint import Checkpoints
from preceptor.train.claim import claimed
from preceptor.train.loop import train
from safetensors.torch import load_file
from submitit import LocalJob


@pytest.fixture
def ablate(bed, test_bed, tmp_path, monkeypatch):
    """Runs the command for both beds and a very small student: (factors, more) -> exit status."""
    # Runs have processes of their own, and the last bits depend on the number of threads.
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    before = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(factors: str, *more: str, steps: int = 2, recipe: str = "") -> int:
        shared = (
            f"data.shards: {bed.shards}, student: resnet_micro, student.size: 32, recipe: short, "
            f"student.options.channels: [8, 8, 16, 16], recipe.steps: {steps}, engine: cpu, "
            f"recipe.batch_size: 16, workers: 0{recipe}"
        )
        judged = (
            f"test.cache: {test_bed.cache}, test.shards: {test_bed.shards}, knn.k: 5, "
            "engine: cpu, workers: 0"
        )
        given = [f"cache={bed.cache}", f"factors={{{factors}}}", f"out={tmp_path / 'out'}"]
        if not any(text.startswith("train=") for text in more):
            given.append(f"train={{{shared}}}")
        if not any(text.startswith("eval=") for text in more):
            given.append(f"eval={{{judged}}}")
        return main(["ablate", *given, *more])

    yield run
    torch.set_num_threads(before)


def test_runs_in_parallel_one_fails_and_a_second_call_does_only_what_is_missing(
    ablate, tmp_path, capsys
):
    out = tmp_path / "out"
    factors = (
        "align: [regression], "
        "what: {vit: {align.spaces: vit}, gone: {data.shards: gone.tar}, "
        "vit/cls: {align.spaces: vit/cls}}"
    )
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert ablate(factors, *launcher, "baseline=vit") == 1
    told = capsys.readouterr()
    assert "1 of 3 runs failed (regression-gone: " in told.err
    assert "gone.tar" in told.err
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["failures"]) == ["regression-gone"]
    rows = [row for row in summary["rows"] if row["score"] == "pooled/knn"]
    assert {row["variant"] for row in rows} == {"regression, vit", "regression, vit/cls"}

    # What the table says is what the run said.
    run = out / "runs/regression-vit"
    evaluated = json.loads((run / "eval/summary.json").read_text())
    (own,) = [row for row in rows if row["variant"] == "regression, vit"]
    score = next(r for r in evaluated["rows"] if r["readout"] == "pooled")["scores"][0]
    assert (own["mean"], own["over_seeds"]) == (score["value"], None)  # of one seed
    assert own["over_images"] == [score["low"], score["high"]]
    other = next(row for row in rows if row["variant"] != own["variant"])
    assert other["difference"] == other["mean"] - own["mean"]
    assert other["difference_over_images"] is not None
    assert own["student_parameters"] == sum(
        tensor.numel() for name, tensor in load_file(run / "train/student.safetensors").items()
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked"))
    )  # fmt: skip
    for name in ("table.csv", "table.md", "table.tex", "figure.png"):
        assert (out / name).stat().st_size

    # Again, with another seed in the place of the run that failed.
    before = (run / "result.json").stat().st_mtime_ns
    sound = factors.replace("gone: {data.shards: gone.tar}, ", "")
    assert ablate(sound, "score=pooled/linear") == 0
    assert "2 of 2 runs are finished already" in capsys.readouterr().out
    assert (run / "result.json").stat().st_mtime_ns == before
    summary = json.loads((out / "summary.json").read_text())
    assert (summary["failures"], summary["rows"][0]["score"]) == ({}, "pooled/linear")

    # Under the same name, other options are refused.
    assert ablate(factors, steps=3) == 1
    assert "is a run of other options: recipe.steps (2 there, 3 here)" in capsys.readouterr().err


def test_a_begun_run_goes_on_from_its_checkpoint(ablate, tmp_path, monkeypatch):
    """And a run whose process was killed is named with the signal."""
    killer = tmp_path / "killer"
    killer.write_text("#!/bin/sh\nkill -9 $$\n")
    killer.chmod(killer.stat().st_mode | stat.S_IXUSR)
    recipe = ", recipe.checkpoint_every: 2"
    with monkeypatch.context() as patch:
        patch.setattr(sys, "executable", str(killer))
        assert ablate("align: [regression]", steps=6, recipe=recipe) == 1
    run = tmp_path / "out/runs/regression"
    assert "was ended by SIGKILL" in (job.read_failure(run) or "")
    failures = json.loads((tmp_path / "out/summary.json").read_text())["failures"]
    assert list(failures) == ["regression"]

    config = OmegaConf.load(run / "train.yaml")
    whole = train(OmegaConf.merge(config, {"out": str(tmp_path / "whole")}))
    calls, original = iter(range(100)), loop.to_device

    def interrupted(*batch):
        if next(calls) == 5:
            raise KeyboardInterrupt
        return original(*batch)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "to_device", interrupted)
        with pytest.raises(KeyboardInterrupt):
            train(config)
    assert list(Checkpoints(run / "train", 1).steps()) == [4]
    assert ablate("align: [regression]", steps=6, recipe=recipe) == 0
    assert "from step 4 of 6" in (run / job.LOG).read_text()
    result = json.loads((run / job.RESULT).read_text())
    assert result["train"]["steps"] == whole["steps"] == 6
    ours, theirs = (
        load_file(folder / "student.safetensors") for folder in (run / "train", tmp_path / "whole")
    )
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


def test_runs_are_given_to_submitit(ablate, tmp_path, capsys):
    assert ablate("align: [regression]", "hydra/launcher=submitit_local") == 0
    assert f"1 job(s) are submitted and waited for; what each does is in {tmp_path}/out/runs/" in (
        capsys.readouterr().out
    )
    assert (tmp_path / "out/runs/regression" / job.RESULT).exists()


def test_an_interrupted_wait_says_that_jobs_stay_in_the_queue(ablate, monkeypatch, capsys):
    results = LocalJob.results

    def interrupted(job):
        results(job)  # else its process would outlive the test
        raise KeyboardInterrupt

    monkeypatch.setattr(LocalJob, "results", interrupted)
    assert ablate("align: [regression]", "hydra/launcher=submitit_local") == 130
    assert "what was submitted stays in the queue" in capsys.readouterr().err


def test_a_run_that_is_being_done_is_left_to_who_does_it(ablate, tmp_path, capsys):
    runs = tmp_path / "out/runs"
    with claimed(runs / "regression-vit"):
        assert job.run_apart(runs / "regression-vit").startswith("is being done by process ")
        assert ablate("align: [regression], spaces: [vit, vit/cls]") == 1
    told = capsys.readouterr()
    assert "regression-vit is being done by process " in told.out
    assert "1 of 2 runs failed (regression-vit: is being done by process " in told.err
    assert not (runs / "regression-vit" / job.FAILURE).exists()
    assert (runs / "regression-vit_cls" / job.RESULT).exists()


def test_encodings_are_stores_converted_once(ablate, bed, tmp_path, monkeypatch):
    """The runs themselves are not the point here, so none is done."""
    monkeypatch.setattr(job, "run_apart", lambda folder: None)
    assert ablate("encoding: [int8, fp16]", "seed=0") == 1  # there is no option seed
    assert ablate("encoding: [int8, fp16]") == 1  # no run left a result
    runs, stores = tmp_path / "out/runs", tmp_path / "out/stores"
    caches = {name: OmegaConf.load(runs / name / "train.yaml").cache for name in ("int8", "fp16")}
    assert caches == {"int8": bed.cache, "fp16": str(stores / "fp16")}
    assert [path.name for path in stores.iterdir()] == ["fp16"]
    converted = Cache.open(stores / "fp16")
    assert {converted[space].encoding for space in converted.spaces} == {"fp16"}


def test_views_are_ablated_over_one_store_that_has_several(ablate, bed, tmp_path, monkeypatch):
    used: dict[str, set[int]] = {}

    def in_this_process(folder):
        def noted(batch, device):
            used.setdefault(folder.name, set()).update(row % 2 for row in batch.rows.tolist())
            return to_device(batch, device)

        monkeypatch.setattr(loop, "to_device", noted)
        return job.read_failure(folder) if job.main(folder) else None

    to_device = loop.to_device
    monkeypatch.setattr(job, "run_apart", in_this_process)
    assert ablate("views: [1, 2]") == 0
    assert used == {"views=1": {0}, "views=2": {0, 1}}
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert {row["variant"] for row in summary["rows"]} == {"views=1", "views=2"}


def test_scores_at_several_widths_have_names_of_their_own(ablate, test_bed, tmp_path, monkeypatch):
    """Of a feature that is narrower than two of them as well."""
    monkeypatch.setattr(job, "run_apart", lambda folder: job.main(folder) or None)
    judged = (
        f"test.cache: {test_bed.cache}, test.shards: {test_bed.shards}, protocols: [knn], "
        "knn.k: 5, readouts: [pooled], width: [null, 128, 256], engine: cpu, workers: 0"
    )
    assert ablate("align: [regression]", f"eval={{{judged}}}") == 0
    rows = json.loads((tmp_path / "out/runs/regression/eval/summary.json").read_text())["rows"]
    assert [row["dim"] for row in rows] == [16, 16, 16]
    result = json.loads((tmp_path / "out/runs/regression/result.json").read_text())
    names = ("pooled/knn", "pooled-128/knn", "pooled-256/knn")
    assert result["scores"] == {n: row["knn"] for n, row in zip(names, rows, strict=True)}
    assert set(result["resampled"]) == set(names)


def test_mistakes_are_told_before_anything_runs(
    ablate, bed, test_bed, write_shard, tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(job, "run_apart", lambda folder: pytest.fail("a run was begun"))

    def told(*parts: str, factors: str = "align: [regression]", more: tuple[str, ...] = ()) -> None:
        assert ablate(factors, *more) == 1
        message = capsys.readouterr().err.strip()
        assert len(message.splitlines()) == 1
        for part in parts:
            assert part in message

    told("baseline=ladder", "align: regression", more=("baseline=ladder",))
    told("there is no option 'algn'", "did you mean align?", factors="algn: [regression]")
    told("align=regresion", "did you mean regression?", factors="align: [regresion]")
    told("factors.align: expected a list", factors="align: regression")
    told("preceptor eval", "say eval={test.cache: ...}", more=("eval={test.shards: x}",))
    told("hydra/launcher=jblib", "joblib", more=("hydra/launcher=jblib",))
    told("level=2", more=("level=2.0",))
    told("train=short: expected options", more=("train=short",))
    told("train.out: leave it out, every run has a folder", more=("train={out: x}",))
    told("weights=mean: valid are last, ema, best", more=("weights=mean",))
    some = "recipe.ema: [0.9, 0]"
    told("weights=ema: ema=0 keeps no average", "recipe.ema:", factors=some, more=("weights=ema",))
    told("weights=best: regression keeps no best", "keep.best: loss", more=("weights=best",))
    told("train would not take the options of lr=-1: recipe.lr=-1", factors="recipe.lr: [1, -1]")
    told("options of regression, clip: align.spaces names 'clip'", "there are vit/patch, vit/cls",
         factors="align: [regression], spaces: [vit, clip, vit/cls]")  # fmt: skip
    told("options of views=3: views=3: the store has 2 of every", factors="views: [1, 2, 3]")
    told("options of inter=slef: align.inter=slef: valid are none, self, cross; nor the options of",
         "inter=sefl: ", factors="align.inter: [self, slef, sefl]")  # fmt: skip
    told("options of batch_size=64: the store has 40 images with tokens, fewer than one batch",
         factors="recipe.batch_size: [16, 64]")  # fmt: skip
    told(
        "options of optimizer=adamm: recipe.optimizer=adamm",
        factors="recipe.optimizer: [adamm, sgd]",
    )
    told("there is no encoding 'int5'", factors="encoding: [int8, fp16, int5]")
    assert not (tmp_path / "out").exists()
    told("train.shards is required", "eval={train.shards: ...}", factors="data.shards: [null]")
    judged = f"test.cache: {test_bed.cache}, test.shards: {test_bed.shards}"
    told("protocols: dense needs a dense task", more=(f"eval={{{judged}, protocols: [dense]}}",))
    told("score=nope", "READOUT/SCORE, such as pooled/knn", more=("score=nope",))
    told("score=poled/knn", "did you mean pooled?", more=("score=poled/knn",))
    told("'lienar' is no SCORE", "did you mean linear?", more=("score=pooled/lienar",))
    told("'depth' is no task", "there are class", more=("score=pooled/knn@depth",))
    bare = "train={student: resnet_micro, engine: cpu}"
    told("data.shards is required: say train={data.shards: ...}", more=(bare,))
    (tmp_path / "file").touch()
    told(f"out={tmp_path / 'file/out'} cannot be written to: Not a directory",
         more=(f"out={tmp_path / 'file/out'}",))  # fmt: skip
    assert main(["ablate", f"cache={bed.cache}"]) == 1
    assert "factors names none" in capsys.readouterr().err

    unlabelled = f"test.cache: {tmp_path / 'bare'}, test.shards: {tmp_path / 'bare.tar'}"
    _unlabelled_store(tmp_path, write_shard)
    told("no image has a label", more=(f"eval={{{unlabelled}}}",))


def _unlabelled_store(folder: Path, write_shard) -> None:
    from preceptor.cache.samples import SampleIndex
    from preceptor.cache.views import ViewPolicy

    from ..conftest import write_store

    write_shard(folder / "bare.tar", 5, 3, label=False)
    write_store(folder / "bare", SampleIndex.from_shards(str(folder / "bare.tar")), ViewPolicy())
