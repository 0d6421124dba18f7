"""Runs that are killed, told to stop, moved to other ranks, or out of space."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf
from preceptor.benchmarks import torture_train
from preceptor.cache import Cache
from preceptor.cli import main
from preceptor.errors import ConfigError, StoreError
from preceptor.tests.train.limits import largest_file
from preceptor.train import loop
from preceptor.train.checkpoint import (
    Checkpoints,
    check_same_run,
    load_checkpoint,
    load_model,
    save_checkpoint,
)
from preceptor.train.loop import train
from preceptor.train.monitor import KnnMonitor
from preceptor.train.settings import identity_of
from preceptor.train.stop import NOTICES, SIGNALS, FirstSignal
from safetensors.torch import load_file, save_file


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(("ranks", "kills"), [(1, 6), (2, 2)])
def test_a_run_killed_anywhere_ends_with_the_same_bits(bed, tmp_path, ranks, kills):
    # In a process of its own, since what it forks must not inherit running threads.
    command = (
        f"{sys.executable} -W ignore {torture_train.__file__} --kills {kills} --ranks {ranks} "
        f"--seed 1 --store {bed.cache} --shards {bed.shards} --json {tmp_path / 'result.json'}"
    )
    done = subprocess.run(shlex.split(command), capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    result = OmegaConf.load(tmp_path / "result.json")
    assert result.summary.kills == kills
    assert result.summary.steps_with_kills >= kills // 4  # all along the way
    # Two micro-batches a step and a rank, each seen at least once.
    assert result.summary.losses_compared >= 2 * ranks * result.steps
    assert result.summary.losses_different == 0
    assert result.summary.files_of_weights_different == []


def test_a_notice_after_another_signal_ends_nothing():
    """Slurm may send both, and the state is still being saved."""
    before = {number: signal.getsignal(number) for number in (*SIGNALS, *NOTICES)}
    with FirstSignal((*SIGNALS, *NOTICES)) as stop:
        signal.raise_signal(signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) == before[signal.SIGTERM]
        for number in NOTICES:
            signal.raise_signal(number)
            signal.raise_signal(number)
    assert stop.asked in NOTICES
    assert {number: signal.getsignal(number) for number in before} == before


def test_the_signal_that_follows_a_notice_ends_nothing_yet():
    """Slurm sends SIGTERM when the time is up, whether or not the state is saved by then."""
    with FirstSignal((*SIGNALS, *NOTICES)) as stop:
        signal.raise_signal(NOTICES[0])
        noted = signal.getsignal(signal.SIGTERM)
        signal.raise_signal(signal.SIGTERM)
        assert stop.asked == signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) != noted  # the next one ends it


@pytest.mark.parametrize("number", [*SIGNALS, *NOTICES])
def test_a_signal_saves_and_tells_how_to_go_on(bed, tmp_path, at_step, capsys, number):
    def arguments(out: str) -> list[str]:
        return [
            "train", f"cache={bed.cache}", f"data.shards={bed.shards}",
            f"out={tmp_path / out}", "student=resnet_micro", "student.size=32",
            "student.options.channels=[8,8,16,16]", "recipe=short", "recipe.steps=6",
            "recipe.batch_size=16", "recipe.checkpoint_every=0", "engine=cpu", "workers=0",
        ]  # fmt: skip

    assert main(arguments("whole")) == 0
    before = signal.getsignal(number)
    at_step({3: lambda: os.kill(os.getpid(), number)})
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        main([*arguments("parts"), "resume=false"])
    assert stopped.value.code == 0
    assert signal.getsignal(number) == before
    told = capsys.readouterr().out
    assert "stopped after step 4 of 6, which is saved" in told
    assert load_checkpoint(Checkpoints(tmp_path / "parts", 1).last)["step"] == 4

    at_step({})
    command = shlex.split(told.splitlines()[-1])
    assert command[:2] == ["preceptor", "train"]
    assert main(command[1:]) == 0
    assert "going on from step 4 of 6" in capsys.readouterr().out
    for name in ("student.safetensors", "alignment.safetensors"):
        whole, parts = ((tmp_path / run / name).read_bytes() for run in ("whole", "parts"))
        assert whole == parts


def test_a_second_signal_acts_as_it_always_did(train_config, at_step):
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)  # in this thread, one after the other
        signal.raise_signal(signal.SIGINT)

    at_step({3: twice})
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in the background
    try:
        with pytest.raises(KeyboardInterrupt):
            train(train_config())
    finally:
        signal.signal(signal.SIGINT, before)


def test_without_space_the_old_checkpoint_stays_and_the_run_says_so(
    train_config, tmp_path, at_step, capsys
):
    limit = largest_file(20_000)
    at_step({3: limit.__enter__, 5: lambda: limit.__exit__(None, None, None)})
    summary = train(train_config("recipe.checkpoint_every=2", "log.to=[]", "keep.last=9"))
    assert summary["steps"] == 8
    steps = list(Checkpoints(tmp_path / "run", 9).steps())
    assert steps == [2, 6, 8]  # 4 did not fit
    told = capsys.readouterr().err
    assert "step-00000004.pt failed: File too large; nothing was committed" in told
    assert "step-00000002.pt (step 2); training goes on" in told
    assert not list((tmp_path / "run" / "checkpoints").glob(".*"))


def test_a_run_that_cannot_save_its_end_fails_with_the_good_checkpoint(
    train_config, tmp_path, at_step
):
    limit = largest_file(20_000)
    at_step({5: limit.__enter__})
    told = r"step-00000008.pt failed.*last good checkpoint is .*step-00000004.pt \(step 4\)"
    try:
        with pytest.raises(StoreError, match=told):
            train(train_config("recipe.checkpoint_every=4", "log.to=[]"))
    finally:
        limit.__exit__(None, None, None)
    assert load_checkpoint(Checkpoints(tmp_path / "run", 1).last)["step"] == 4
    assert not (tmp_path / "run" / "summary.json").exists()


def test_the_last_checkpoints_and_the_best_are_kept(train_config, tmp_path):
    options = ("keep.last=2", "keep.best=loss", "recipe.checkpoint_every=2", "recipe.log_every=2")
    summary = train(train_config(*options))
    kept = Checkpoints(tmp_path / "run", 2)
    assert list(kept.steps()) == [6, 8]
    best = load_checkpoint(kept.best)
    assert best["step"] == summary["best"]["step"]
    assert best["best"] == summary["best"]
    # Every window's loss is in the log; the best is the least of them.
    assert summary["best"]["value"] <= summary["loss"]
    assert (tmp_path / "run" / "best" / "model.json").exists()


@pytest.fixture
def measured(monkeypatch):
    """Gives the k-NN of a run, in order, in place of those that its weights would have."""

    def give(*values):
        rest = iter(values)
        monkeypatch.setattr(KnnMonitor, "accuracy", lambda *_: next(rest))

    return give


BEST_KNN = ("keep.best=knn", "log.knn_every=2", "log.to=[]")


@pytest.mark.parametrize(
    ("full", "expected"),
    [(1, None), (3, {"metric": "knn", "value": 0.1, "step": 2})],
)
def test_a_best_one_that_did_not_fit_is_not_told_of(
    train_config, tmp_path, at_step, measured, full, expected
):
    limit = largest_file(20_000)
    measured(*((0.9, 0.5, 0.4, 0.3) if full == 1 else (0.1, 0.9, 0.5, 0.4)))
    at_step({full: limit.__enter__, full + 1: lambda: limit.__exit__(None, None, None)})
    summary = train(train_config(*BEST_KNN))
    assert summary["best"] == expected
    assert (tmp_path / "run" / "best" / "model.json").exists() == (expected is not None)


def test_a_best_one_younger_than_the_checkpoint_stays_the_best(
    train_config, tmp_path, interrupted, measured
):
    options = (*BEST_KNN, "recipe.checkpoint_every=3")
    measured(0.5, 0.9)
    with interrupted(5):
        train(train_config(*options))
    best = Checkpoints(tmp_path / "run", 1).best
    held = load_checkpoint(best)
    assert (held["step"], load_checkpoint(Checkpoints(tmp_path / "run", 1).last)["step"]) == (4, 3)
    measured(0.6, 0.4, 0.3)  # on a GPU the same steps may end elsewhere
    summary = train(train_config(*options))
    assert summary["best"] == {"metric": "knn", "value": 0.9, "step": 4}
    student = load_file(tmp_path / "run" / "best" / "student.safetensors")
    for name, value in student.items():
        assert torch.equal(value, held["module"][f"student.model.{name}"])


def test_another_number_of_ranks_goes_on_at_the_same_part_of_the_way(
    train_config, tmp_path, interrupted, capsys
):
    options = ("recipe.steps=null", "recipe.epochs=8", "recipe.checkpoint_every=4")

    with interrupted(5):
        train(train_config(*options))
    last = Checkpoints(tmp_path / "run", 1).last
    state = load_checkpoint(last)
    # As two ranks would have left it: in four steps they see twice as many images.
    save_checkpoint(last, {**state, "ranks": 2, "images": 2 * state["images"]})
    capsys.readouterr()
    train(train_config(*options))
    told = capsys.readouterr().out
    assert "was written by 2 ranks and this run has 1" in told
    assert "going on from step 8 of 16" in told


def test_more_ranks_for_less_than_a_step_do_one_more(train_config, tmp_path, interrupted, capsys):
    options = ("recipe.steps=null", "recipe.epochs=8", "recipe.checkpoint_every=4")
    options += ("recipe.log_every=50",)
    with interrupted(5):
        train(train_config(*options))
    last = Checkpoints(tmp_path / "run", 1).last
    state = load_checkpoint(last)
    # As a run with other steps would have left it, shortly before its end.
    save_checkpoint(last, {**state, "ranks": 2, "images": 4 * state["images"]})
    assert train(train_config(*options))["loss"] > 0
    assert "going on from step 15 of 16" in capsys.readouterr().out


def test_more_ranks_keep_their_own_checkpoints_though_their_steps_are_fewer(
    train_config, tmp_path, interrupted, capsys
):
    options = ("recipe.steps=null", "recipe.epochs=8", "recipe.checkpoint_every=4")
    with interrupted(13):
        train(train_config(*options))
    kept = Checkpoints(tmp_path / "run", 1)
    state = load_checkpoint(kept.last)
    assert state["step"] == 12
    # As a run with steps of half as many images would have left it.
    save_checkpoint(kept.last, {**state, "ranks": 2, "images": state["images"] // 2})
    with interrupted(9):
        train(train_config(*options))
    assert "going on from step 6 of 16" in capsys.readouterr().out
    assert list(kept.steps()) == [8]
    train(train_config(*options))
    assert "going on from step 8 of 16" in capsys.readouterr().out
    assert list(kept.steps()) == [16]


def test_a_run_killed_between_its_last_checkpoint_and_its_summary_ends(train_config, tmp_path):
    whole = train(train_config())
    (tmp_path / "run" / "summary.json").unlink()
    (tmp_path / "run" / "student.safetensors").unlink()
    again = train(train_config())
    assert again["loss"] == whole["loss"]
    assert again["losses"] == whole["losses"]
    assert (tmp_path / "run" / "student.safetensors").exists()


def test_a_run_that_starts_anew_leaves_nothing_of_the_one_before(
    train_config, tmp_path, monkeypatch
):
    options = ("recipe.ema=0.9", "keep.best=loss", "recipe.checkpoint_every=4")
    before = train(train_config(*options))
    out = tmp_path / "run"
    (out / "ema" / "notes.txt").write_text("mine")

    def killed(*_):
        raise KeyboardInterrupt

    # After the last checkpoint of the new run and before its results.
    anew = ("recipe.ema=0.9", "recipe.lr=0.003")
    with monkeypatch.context() as patch:
        patch.setattr(loop, "save_model", killed)
        with pytest.raises(KeyboardInterrupt):
            train(train_config(*anew, "resume=false"))
    assert load_checkpoint(Checkpoints(out, 1).last)["step"] == 8
    left = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert {name for name in left if not name.startswith(("logs/", "checkpoints/"))} == {
        "config.yaml",
        "ema/notes.txt",
    }
    after = train(train_config(*anew))
    assert after["loss"] != before["loss"]
    assert after["best"] is None
    assert not (out / "best" / "model.json").exists()


def test_the_images_and_seconds_of_a_summary_are_of_all_starts(train_config, tmp_path, interrupted):
    options = ("recipe.checkpoint_every=3",)
    with interrupted(5):
        train(train_config(*options))
    path = Checkpoints(tmp_path / "run", 1).last
    state = load_checkpoint(path)
    assert state["images"] == 3 * 16
    assert state["seconds"] > 0
    save_checkpoint(path, {**state, "seconds": 1e6})
    summary = train(train_config(*options))
    assert summary["images"] == 8 * 16
    assert summary["seconds"] > 1e6
    assert summary["images_per_second"] > 8 * 16 / 1e6  # of this start alone
    assert load_checkpoint(Checkpoints(tmp_path / "run", 1).last)["seconds"] > 1e6

    # Checkpoints of earlier versions do not say how long it took.
    with interrupted(5):
        train(train_config(*options, out="older"))
    path = Checkpoints(tmp_path / "older", 1).last
    state = load_checkpoint(path)
    del state["seconds"]
    save_checkpoint(path, state)
    older = train(train_config(*options, out="older"))
    assert older["images"] == 8 * 16
    assert 0 < older["seconds"] < 1e6


def test_a_run_older_than_the_gain_ends_in_the_units_that_it_began_with(train_config, tmp_path):
    """Its checkpoints and weights have none: tokens were learnt as the store has them."""
    options = ("recipe.checkpoint_every=4", "recipe.ema=0.9")
    train(train_config(*options, "recipe.steps=4"))
    out = tmp_path / "run"
    path = Checkpoints(out, 1).last
    state = load_checkpoint(path)
    for part in ("module", "average"):
        kept = {name: x for name, x in state[part].items() if not name.endswith(".gain")}
        assert len(kept) == len(state[part]) - 2
        state[part] = kept
    state["identity"]["recipe"]["steps"] = 8
    save_checkpoint(path, state)
    (out / "summary.json").unlink()
    train(train_config(*options, "recipe.steps=8"))
    for folder in (out, out / "ema"):
        weights = load_file(folder / "alignment.safetensors")
        gains = {name: x for name, x in weights.items() if name.endswith(".gain")}
        assert len(gains) == 2
        assert all((gain == 1).all() for gain in gains.values())
        older = {name: x for name, x in weights.items() if name not in gains}
        save_file(older, folder / "alignment.safetensors")
        _, alignment, _ = load_model(folder)
        loaded = alignment.state_dict()
        assert loaded.keys() == weights.keys()
        assert all(torch.equal(loaded[name], x) for name, x in weights.items())


def test_a_copied_checkpoint_of_other_options_is_refused_with_the_difference(train_config):
    train(train_config("recipe.steps=2"))
    with pytest.raises(Exception, match=r"recipe.ema \(0.0 there, 0.5 here\)"):
        train(train_config("recipe.steps=2", "recipe.ema=0.5"))


def test_teachers_that_nothing_is_learnt_from_may_come_and_go(train_config, bed):
    cache = Cache.open(bed.cache)
    config = train_config("align.spaces=[vit/cls]")
    ours = identity_of(config, cache, ["vit/cls"])
    assert set(ours["store"]) == {"rows", "vit"}
    assert set(identity_of(config, cache, [])["store"]) == {"rows"}
    # Where none is named a teacher of which nothing can be learnt, as by crops, is kept as ever.
    assert set(identity_of(train_config(), cache, [])["store"]) == {"rows", "vit"}
    stored = {**ours, "store": {**ours["store"], "another": "f00d"}}  # as an earlier release did
    check_same_run(Path("last.pt"), stored, ours)
    stored["store"]["vit"] = "f00d"
    with pytest.raises(ConfigError, match=r"store\.vit \(f00d there"):
        check_same_run(Path("last.pt"), stored, ours)
    everything = identity_of(train_config(), cache, ["vit/cls", "vit/patch"])
    lacking = {**everything, "store": {**everything["store"], "another": "f00d"}}
    with pytest.raises(ConfigError, match=r"store\.another \(f00d there, absent here\)"):
        check_same_run(Path("last.pt"), lacking, everything)


def test_an_option_younger_than_the_checkpoint_had_its_default_there():
    ours = {"align": {"name": "mine", "method": "model_token", "tokens": 2, "alone": 0.0}}
    stored = {"align": {"name": "mine", "method": "model_token", "tokens": 2}}
    check_same_run(Path("last.pt"), stored, ours)
    ours["align"]["alone"] = 0.5
    with pytest.raises(ConfigError, match=r"align\.alone \(0\.0 there, 0\.5 here\)"):
        check_same_run(Path("last.pt"), stored, ours)
    stored["align"]["alone"] = 0.5
    check_same_run(Path("last.pt"), stored, ours)
    ours["recipe"] = {"alignment_lr": 1.0}
    check_same_run(Path("last.pt"), stored, ours)
    ours["recipe"]["alignment_lr"] = 0.25
    with pytest.raises(ConfigError, match=r"recipe\.alignment_lr \(1\.0 there, 0\.25 here\)"):
        check_same_run(Path("last.pt"), stored, ours)
