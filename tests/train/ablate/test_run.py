"""Whole ablations through the command line: launched, resumed, with failed and killed runs."""

from __future__ import annotations

import json
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from preceptor.cache import Cache
from preceptor.cli import main
from preceptor.train import loop
from preceptor.train.ablate import job
from preceptor.train.ablate.stopping import SIGNALS, PoolStop
from preceptor.train.checkpoint import Checkpoints
from preceptor.train.claim import claimed
from preceptor.train.loop import train
from safetensors.torch import load_file
from submitit import LocalExecutor
from submitit.helpers import Checkpointable


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
    factors = "align: [regression], spaces: [vit, clip, vit/cls]"
    launcher = ("hydra/launcher=joblib", "hydra.launcher.n_jobs=2")
    assert ablate(factors, *launcher, "baseline=vit") == 1
    told = capsys.readouterr()
    assert "1 of 3 runs failed (regression-clip: align.spaces names 'clip'" in told.err
    assert "there are vit/patch, vit/cls" in told.err
    summary = json.loads((out / "summary.json").read_text())
    assert list(summary["failures"]) == ["regression-clip"]
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
    assert ablate("align: [regression], spaces: [vit, vit/cls]", "score=pooled/linear") == 0
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


@pytest.fixture
def in_place_of_a_run(tmp_path, monkeypatch):
    """A folder whose run is a program; what ends it or its parent is blocked and can be awaited."""

    def make(program: str) -> Path:
        script = tmp_path / "script"
        script.write_text(
            f"#!{sys.executable}\nimport os, signal, sys\nfrom pathlib import Path\n"
            "ends = {signal.SIGTERM, signal.SIGINT, signal.SIGHUP}\n"
            "signal.pthread_sigmask(signal.SIG_BLOCK, ends)\n"
            f"got = Path(sys.argv[-1], 'got')\n{program}"
        )
        script.chmod(script.stat().st_mode | stat.S_IXUSR)
        monkeypatch.setattr(sys, "executable", str(script))
        monkeypatch.delenv("SLURM_STEP_ID", raising=False)
        folder = tmp_path / "run"
        folder.mkdir()
        return folder

    def unhandled(number, frame):
        pytest.fail(f"{signal.Signals(number).name} was not for the run")

    before = {number: signal.signal(number, unhandled) for number in SIGNALS}
    yield make
    assert {number: signal.getsignal(number) for number in before} == dict.fromkeys(
        before, unhandled
    )
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_is_passed_on_and_the_run_is_waited_for(in_place_of_a_run, number):
    folder = in_place_of_a_run(
        f"os.kill(os.getppid(), {int(number)})\n"
        "first = signal.sigwait(ends)\n"
        # What a terminal sends goes to a group, and the parent is not in this one.
        "got.write_text(f'{int(first)} {os.getpgrp() == os.getpid()}')\n"
    )
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit) as stopped:
        job.run_apart(folder)
    if number != signal.SIGINT:
        assert stopped.value.code == 128 + number
    assert (folder / "got").read_text() == f"{int(number)} True"
    assert "was stopped and is saved" in (job.read_failure(folder) or "")


def test_nothing_is_begun_after_a_signal_that_a_run_finished_under(in_place_of_a_run):
    folder = in_place_of_a_run(
        "os.kill(os.getppid(), signal.SIGTERM)\ngot.with_name('result.json').write_text('{}')\n"
    )
    with pytest.raises(SystemExit):
        job.run_apart(folder)
    assert job.read_failure(folder) is None


def test_a_second_signal_kills_the_run(in_place_of_a_run):
    folder = in_place_of_a_run(
        "for _ in range(2):\n"
        "    os.kill(os.getppid(), signal.SIGINT)\n"
        "    got.write_text(str(int(signal.sigwait(ends))))\n"
        "got.write_text('two')\n"
    )
    with pytest.raises(KeyboardInterrupt):
        job.run_apart(folder)
    assert (folder / "got").read_text() == str(int(signal.SIGINT))
    assert "was ended by SIGKILL" in (job.read_failure(folder) or "")


def test_in_a_step_of_slurm_the_signal_is_not_sent_twice(in_place_of_a_run, monkeypatch):
    sent = []
    monkeypatch.setattr(job.subprocess.Popen, "send_signal", lambda self, n: sent.append(n))
    folder = in_place_of_a_run(
        "for process in (os.getppid(), os.getpid()):\n    os.kill(process, signal.SIGTERM)\n"
        "signal.sigwait(ends)\n"
    )
    monkeypatch.setenv("SLURM_STEP_ID", "0")
    with pytest.raises(SystemExit):
        job.run_apart(folder)
    assert sent == []


@pytest.mark.parametrize("step", [None, "0"])
def test_a_notice_goes_to_who_handles_it_after_the_run_has_saved(
    in_place_of_a_run, monkeypatch, step
):
    """As submitit does, which then submits the job again; Slurm tells the run as well."""
    saved = []

    def again(number, frame):
        saved.append((folder / "got").exists())
        raise SystemExit(7)

    before = signal.signal(signal.SIGUSR2, again)
    both = [
        "os.kill(os.getppid(), signal.SIGTERM)",
        "os.kill(os.getpid(), signal.SIGUSR2)",
    ]
    program = [
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})",
        *(both if step else []),
        "os.kill(os.getppid(), signal.SIGUSR2)",
        "got.write_text(str(int(signal.sigwait({signal.SIGUSR2}))))",
    ]
    folder = in_place_of_a_run("\n".join(program))
    if step is not None:
        monkeypatch.setenv("SLURM_STEP_ID", step)
    try:
        with pytest.raises(SystemExit, match="7"):
            job.run_apart(folder)
        assert signal.getsignal(signal.SIGUSR2) is again
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert saved == [True]
    assert (folder / "got").read_text() == str(int(signal.SIGUSR2))


def test_runs_are_given_to_submitit(ablate, tmp_path, capsys):
    assert ablate("align: [regression]", "hydra/launcher=submitit_local") == 0
    assert f"1 job(s) are submitted and waited for; what each does is in {tmp_path}/out/runs/" in (
        capsys.readouterr().out
    )
    assert (tmp_path / "out/runs/regression" / job.RESULT).exists()


class Run(Checkpointable):
    """What submitit is given: a run whose process is another program."""

    def __call__(self, folder: Path, program: str) -> str | None:
        sys.executable = program
        return job.run_apart(folder)


def test_submitit_submits_a_run_that_has_saved_again(tmp_path):
    """With its own processes in place of Slurm's jobs."""
    program, folder = tmp_path / "program", tmp_path / "run"
    program.write_text(
        f"#!{sys.executable}\nimport os, signal, sys\nfrom pathlib import Path\n"
        "folder = Path(sys.argv[-1])\n"
        "if (folder / 'saved').exists():\n"
        "    (folder / 'result.json').write_text('{}')\n"
        "    sys.exit()\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR2})\n"
        "os.kill(os.getppid(), signal.SIGUSR2)\n"
        "signal.sigwait({signal.SIGUSR2})\n"
        "(folder / 'saved').touch()\n"
    )
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    executor = LocalExecutor(tmp_path / "jobs", max_num_timeout=1)
    executor.update_parameters(timeout_min=60)  # so that the notice is of another job's coming
    submitted = executor.submit(Run(), folder, str(program))
    assert submitted.result() is None
    assert (folder / "saved").exists()
    assert (folder / job.RESULT).exists()
    assert not (folder / job.FAILURE).exists()


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


@pytest.mark.parametrize("step", [None, "0"])
def test_a_run_of_a_pool_is_asked_once(in_place_of_a_run, monkeypatch, step):
    """Where srun signals it already, the pool does not."""
    folder = in_place_of_a_run(
        "asked = signal.sigtimedwait(ends, 3)\ngot.write_text(str(asked and asked.si_signo))\n"
    )
    PoolStop(folder.parent)._ask(signal.SIGTERM, None)
    if step is not None:
        monkeypatch.setenv("SLURM_STEP_ID", step)
    assert job._run_for_a_pool([sys.executable, str(folder)], folder) == (0, None)
    assert (folder / "got").read_text() == str(None if step else int(signal.SIGTERM))


def test_runs_of_a_pool_stop_when_its_process_is_ended(tmp_path):
    """As joblib's do: the run in flight is asked to save, and none is begun after it."""
    told, run, pool = (tmp_path / name for name in ("told", "run", "pool.py"))
    os.mkfifo(told)
    run.write_text(
        f"#!{sys.executable}\nimport os, signal\n"
        "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})\n"
        f"fifo = open({str(told)!r}, 'w')\n"
        "print('begun', file=fifo, flush=True)\n"
        "asked = signal.sigtimedwait({signal.SIGTERM}, 60)\n"  # one that never comes fails here
        "print(asked and asked.si_signo, file=fifo, flush=True)\n"
    )
    run.chmod(run.stat().st_mode | stat.S_IXUSR)
    pool.write_text(
        "import multiprocessing, sys\nfrom pathlib import Path\n"
        "def work(folder):\n"
        "    from preceptor.train.ablate import job\n"
        f"    ours = open({str(told)!r}, 'w')  # the reader sees its end with this process's\n"
        f"    sys.executable = {str(run)!r}\n"
        "    for name in ('one', 'two'):\n"
        "        (folder / name).mkdir()\n"
        "        try:\n"
        "            job.run_apart(folder / name)\n"
        "        except SystemExit as stopped:\n"  # which joblib hands over and goes on
        "            print(stopped.code, file=ours, flush=True)\n"
        "if __name__ == '__main__':\n"
        "    spawned = multiprocessing.get_context('spawn')\n"
        "    spawned.Process(target=work, args=(Path(sys.argv[1]),)).start()\n"
    )
    process = subprocess.Popen([sys.executable, str(pool), str(tmp_path)])
    with told.open() as fifo:
        assert fifo.readline() == "begun\n"
        process.terminate()
        process.wait()
        assert fifo.read().split() == ["15", "143", "143"]
    assert "was stopped and is saved" in (job.read_failure(tmp_path / "one") or "")
    assert list((tmp_path / "two").iterdir()) == []


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
    assert ablate("views: [1, 2, 3]") == 1
    assert used == {"views=1": {0}, "views=2": {0, 1}}
    summary = json.loads((tmp_path / "out/summary.json").read_text())
    assert {row["variant"] for row in summary["rows"]} == {"views=1", "views=2"}
    (failure,) = summary["failures"].values()
    assert failure == "views=3: the store has 2 of every image, so 1 to 2 can be used"


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
    told("preceptor eval", "test.cache", more=("eval={test.shards: x}",))
    told("hydra/launcher=jblib", "joblib", more=("hydra/launcher=jblib",))
    told("level=2", more=("level=2.0",))
    told("train=short: expected options", more=("train=short",))
    told("weights=mean: valid are last, ema, best", more=("weights=mean",))
    some = "recipe.ema: [0.9, 0]"
    told("weights=ema: ema=0 keeps no average", "recipe.ema:", factors=some, more=("weights=ema",))
    told("weights=best: regression keeps no best", "keep.best: loss", more=("weights=best",))
    told("train would not take the options of lr=-1: recipe.lr=-1", factors="recipe.lr: [1, -1]")
    told("train.shards is required", "eval={train.shards: ...}", factors="data.shards: [null]")
    judged = f"test.cache: {test_bed.cache}, test.shards: {test_bed.shards}"
    told("protocols: dense needs a dense task", more=(f"eval={{{judged}, protocols: [dense]}}",))
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
