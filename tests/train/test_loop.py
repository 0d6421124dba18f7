"""The whole loop on a real store: it learns, resumes bitwise, and stops with a sentence."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_module
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision
from omegaconf import OmegaConf
from preceptor.cache import Cache
from preceptor.errors import ConfigError, DataError, TrainingError
from preceptor.train import loop
from preceptor.train.batch import normalise
from preceptor.train.checkpoint import Checkpoints, load_checkpoint, load_model, save_checkpoint
from preceptor.train.loop import train
from preceptor.train.settings import recipe_of_its_own
from preceptor.train.students import Student, load_student
from preceptor.train.views import StoredViews
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

CNN = ("student=resnet_micro", "student.options.channels=[8,8,16,16]")
VIT = (
    "student=vit_micro",
    "student.options.depth=2",
    "student.options.embed_dim=48",
    "+student.options.drop_path_rate=0.2",
)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("align", ["regression", "model_token"])
def test_a_run_learns_and_leaves_what_it_says(train_config, tmp_path, bed, align):
    config = train_config(f"align={align}", "recipe.steps=24", "recipe.lr=0.003")
    summary = train(config)
    out = tmp_path / "run"
    assert json.loads((out / "summary.json").read_text()) == json.loads(json.dumps(summary))
    assert OmegaConf.load(out / "config.yaml").align.name == align
    events = EventAccumulator(str(out / "logs")).Reload()
    tags = set(events.Tags()["scalars"])
    assert {"loss", "lr", "images_per_second", "wait_share"} <= tags
    assert {"loss/vit/patch", "loss/vit/cls"} <= tags
    losses = [event.value for event in events.Scalars("loss")]
    assert len(losses) == 6
    assert losses[-1] < losses[0]
    assert losses[-1] == pytest.approx(summary["loss"], rel=1e-6)

    # What was saved is what was trained, and gives the loss that the log ends with or better.
    student, alignment, _ = load_model(out)
    alone, mean, _ = load_student(out)
    assert all(torch.equal(v, student.state_dict()[k]) for k, v in alone.state_dict().items())
    assert mean.tolist() == pytest.approx([0.485, 0.456, 0.406])
    state = load_checkpoint(last(out))
    assert state["step"] == 24
    for name, value in load_file(out / "student.safetensors").items():
        assert torch.equal(value, state["module"][f"student.model.{name}"])
    cache = Cache.open(bed.cache)
    rows = [row for row in range(80) if row != 5]
    pixels = StoredViews(cache, bed.index, (32, 32)).__getitems__(rows)
    targets = {name: cache[name].read(rows).standardised() for name in alignment.spaces}
    with torch.no_grad():
        loss = alignment(student(normalise(pixels, torch.device("cpu"))), targets).loss
    assert float(loss) < losses[0]


@pytest.mark.parametrize(
    ("student", "options"),
    [
        (CNN, ("align=model_token",)),
        (VIT, ("align=regression", "recipe.accumulate=2")),
        (
            VIT,
            (
                "align=model_token",
                "align.write_back=2",
                "align.width=32",
                "align.teacher_stream=0.5",
                "align.targets=phis",
                "align.balance=normalised",
            ),
        ),
        (CNN, ("align=relational", "align.queue=20")),
        (VIT, ("align=masked", "align.balance=pcgrad")),
    ],
    ids=["cnn", "vit-dropping-paths", "tokens-inside", "memory", "masked"],
)
def test_an_interrupted_run_ends_with_the_same_bits(
    train_config, tmp_path, student, options, interrupted
):
    whole = train(train_config(*options, student=student, out="whole"))
    config = train_config(*options, "recipe.checkpoint_every=3", student=student, out="parts")
    with interrupted(5):  # after the checkpoint of step 3, in the middle of an epoch
        train(config)
    assert load_checkpoint(last(tmp_path / "parts"))["step"] == 3
    parts = train(config)
    assert parts["steps"] == whole["steps"] == 8
    for name in ("student.safetensors", "alignment.safetensors"):
        a, b = (load_file(tmp_path / run / name) for run in ("whole", "parts"))
        assert all(torch.equal(a[key], b[key]) for key in a)
    assert parts["loss"] == pytest.approx(whole["loss"], rel=0, abs=0)

    # A finished run is not run again, unless asked to.
    assert train(config) == parts
    assert train(OmegaConf.merge(config, {"resume": False}))["seconds"] != parts["seconds"]


@pytest.mark.parametrize("student", [CNN, VIT], ids=["cnn", "vit"])
def test_a_student_that_carries_its_tokens_is_loaded_with_them(train_config, tmp_path, student):
    options = (
        "align=model_token", "align.write_back=2", "align.layers=0", "align.width=32",
        "align.teacher_stream=0",
    )  # fmt: skip
    summary = train(train_config(*options, "recipe.lr=0.01", student=student))
    student, alignment, _ = load_model(tmp_path / "run")
    pixels = torch.randn(3, 3, 32, 32)
    with torch.inference_mode():
        carried = alignment.run_student(student, pixels)
        plain = student(pixels)
    assert not torch.allclose(carried.pooled, plain.pooled)
    state = load_checkpoint(last(tmp_path / "run"))["module"]
    for name, value in alignment.state_dict().items():
        assert torch.equal(value, state[f"alignment.{name}"])
    own = sum(p.numel() for p in student.parameters())
    inside = sum(p.numel() for p in alignment.write_back.parameters())
    assert summary["parameters"]["student"] == own
    expected = own + inside + alignment.model_tokens.numel()
    assert summary["parameters"]["inference"]["pooled"] == expected
    with pytest.raises(DataError, match="carries its model tokens inside the backbone"):
        load_student(tmp_path / "run")


def last(out: Path) -> Path:
    found = Checkpoints(out, 1).last
    assert found is not None
    return found


def test_workers_change_nothing(train_config, tmp_path):
    for workers in (0, 2):
        train(
            train_config(
                "align=regression", "recipe.steps=3", f"workers={workers}", out=f"w{workers}"
            )
        )
    a, b = (load_file(tmp_path / run / "student.safetensors") for run in ("w0", "w2"))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_another_configuration_does_not_continue_a_checkpoint(train_config):
    train(train_config("recipe.steps=2"))
    with pytest.raises(ConfigError, match=r"align.width \(128 there, 64 here\).*recipe.steps"):
        train(train_config("recipe.steps=4", "align.width=64"))
    with pytest.raises(
        ConfigError, match=r"configuration: align.(method|name) \(model_token there"
    ):
        train(train_config("align=regression"))


def test_a_loss_that_is_not_finite_stops_with_step_and_space(train_config, tmp_path, monkeypatch):
    original = loop.to_device
    calls = iter(range(100))

    def poisoned(batch, device):
        pixels, targets = original(batch, device)
        if next(calls) == 5:
            scales = targets["vit/patch"].scales.clone()
            scales[0, 0] = float("nan")
            targets["vit/patch"] = targets["vit/patch"]._replace(scales=scales)
        return pixels, targets

    monkeypatch.setattr(loop, "to_device", poisoned)
    with pytest.raises(
        TrainingError, match=r"step 5 \(spaces: vit/patch\).*step-00000004.pt \(step 4\)"
    ):
        # The teachers' stream would refuse such a scale itself.
        train(train_config("recipe.checkpoint_every=2", "align.teacher_stream=0"))
    assert load_checkpoint(last(tmp_path / "run"))["step"] == 4


def test_weights_that_are_not_finite_take_no_checkpoint_s_place(
    train_config, tmp_path, monkeypatch
):
    """The loss of the step is finite, its gradient is not: a checkpoint is due before the next loss
    tells."""
    original = loop.check_gradients
    calls = iter(range(100))

    def poisoned(module):
        original(module)
        if next(calls) == 3:
            next(module.parameters()).grad.fill_(float("inf"))

    monkeypatch.setattr(loop, "check_gradients", poisoned)
    told = r"weights are not finite after step 4 \(.*\); .*step-00000003.pt \(step 3\)"
    with pytest.raises(TrainingError, match=told):
        train(train_config("recipe.checkpoint_every=1"))
    state = load_checkpoint(last(tmp_path / "run"))
    assert state["step"] == 3


@pytest.mark.parametrize(
    ("error", "options", "advice"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\nMore"), (),
         r"recipe.batch_size=16 to less than 16 \(recipe.accumulate=2 with half of it keeps"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling"),
         ("+recipe.images_a_step=24",),
         r"recipe.batch_size=16 to less than 12 \(the ranks then take more passes"),
    ],
    ids=["of torch", "of a library of CUDA"],
)  # fmt: skip
def test_too_little_memory_is_told_with_what_makes_a_run_smaller(
    train_config, monkeypatch, error, options, advice
):
    forward = Student.forward

    def full(student, pixels, **options):
        if len(pixels) > 1:  # one image tells a student's shapes
            raise error
        return forward(student, pixels, **options)

    monkeypatch.setattr(Student, "forward", full)
    size = "of 32 x 32 pixels, in 32-true"
    with pytest.raises(TrainingError, match=rf"enough memory on cpu .*{size}.*{advice}") as told:
        train(train_config(*options))
    assert told.value.__cause__ is error
    assert "\n" not in str(told.value)


def test_a_failed_write_keeps_the_earlier_checkpoint(tmp_path, monkeypatch):
    import os

    path = tmp_path / "last.pt"
    save_checkpoint(path, {"step": 1, "weights": torch.ones(3)})

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        with pytest.raises(Exception, match="No space left"):
            save_checkpoint(path, {"step": 2, "weights": torch.zeros(3)})
    assert load_checkpoint(path)["step"] == 1
    assert [entry.name for entry in tmp_path.iterdir()] == ["last.pt"]


def test_a_damaged_checkpoint_is_told(tmp_path):
    path = tmp_path / "last.pt"
    path.write_bytes(b"no checkpoint")
    with pytest.raises(DataError, match="is not a checkpoint"):
        load_checkpoint(path)
    torch.save({"step": 1, "call": print}, path)  # would need code to be run
    with pytest.raises(DataError, match="is not a checkpoint"):
        load_checkpoint(path)


def recipes() -> list[str]:
    folder = resources.files("preceptor.configs").joinpath("recipe")
    return sorted(entry.name[:-5] for entry in folder.iterdir() if entry.name.endswith(".yaml"))


@pytest.mark.parametrize("recipe", recipes())
def test_every_recipe_trains(train_config, recipe):
    """All but the length and the size of the batch as it stands, for one epoch of two steps."""
    few = [] if recipe == "short" else ["recipe.images_a_step=20"]
    config = train_config(
        f"recipe={recipe}", "recipe.steps=null", "recipe.epochs=1", "recipe.batch_size=20", *few
    )
    with initialize_config_module("preceptor.configs", version_base="1.3"):
        named = compose("train", [f"recipe={recipe}"]).recipe
    assert recipe == "short" or recipe.endswith(f"_{named.epochs}ep")
    assert train(config)["steps"] == 2


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["student=vit_base"], "recipe=vit_base_100ep is vit_base's own (lr 0.0006, weight_decay "
         "0.03 at 512 images a step)"),
        (["student=resnet50"], "resnet50's own (optimizer lamb, lr 0.008, weight_decay 0.02 at "),
        (["student=vit_small"], None),  # whose recipe has the general one's rate
        (["student=resnet18"], None),  # has none
        (["student=vit_base", "recipe.lr=0.001"], None),
        (["student=vit_base", "recipe=vit_base_100ep"], None),
        (["student=vit_base", "recipe=short"], None),
    ],
)  # fmt: skip
def test_a_student_with_a_recipe_of_its_own_is_told_of_it(options, told):
    with initialize_config_module("preceptor.configs", version_base="1.3"):
        found = recipe_of_its_own(compose("train", options))
    assert found is None if told is None else told in found


def test_a_step_of_more_images_than_there_are_is_refused(train_config, tmp_path):
    with pytest.raises(ConfigError, match=r"40 images with tokens, fewer than .*a_step=41"):
        train(train_config("recipe.batch_size=10", "+recipe.images_a_step=41"))
    assert not (tmp_path / "run").exists()


def test_a_recipe_that_lacks_a_key_is_told(train_config):
    config = train_config()
    del config.recipe.ema
    with pytest.raises(ConfigError, match="the recipe lacks ema"):
        train(config)


def test_half_precision_resumes_with_its_gradient_scale(
    train_config, tmp_path, interrupted, monkeypatch
):
    """Float16 on the CPU, which Fabric would replace by bfloat16 unless it is handed a scaler."""

    def half(engine, **options):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**20, growth_interval=3)
        return Fabric(accelerator="cpu", plugins=MixedPrecision("16-mixed", "cpu", scaler))

    monkeypatch.setattr(loop, "launch", half)
    options = ("log.gradients_every=2", "recipe.checkpoint_every=3")
    train(train_config(*options, out="whole"))
    with interrupted(5):
        train(train_config(*options, out="parts"))
    scale = load_checkpoint(last(tmp_path / "parts"))["precision"]["scale"]
    assert scale != 2.0**20  # it has moved, so that a lost one would be noticed
    train(train_config(*options, out="parts"))
    a, b = (load_checkpoint(last(tmp_path / run)) for run in ("whole", "parts"))
    assert a["precision"] == b["precision"]
    assert all(torch.equal(a["module"][key], b["module"][key]) for key in a["module"])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("cache=???", "cache is required"),
        ("recipe.epochs=1", "either steps or epochs"),
        ("recipe.steps=0.5", "recipe.steps=0.5: expected a whole number"),
        ("recipe.steps=true", "recipe.steps=True: expected a whole number"),
        ("recipe.lr=0", "recipe.lr=0: expected a positive number"),
        ("recipe.batch_size=8.5", "recipe.batch_size=8.5: expected a whole number"),
        ("recipe.clip=-1", "recipe.clip=-1: expected a number from 0 up"),
        ("recipe.color_jitter=null", "recipe.color_jitter=None: expected strengths by name"),
        ("student.size=null", r"student.size=None: expected pixels, a whole number or \[height"),
        ("student.size=[32]", r"student.size=\[32\]: expected pixels"),
        ("recipe.min_lr=0.1", r"recipe.min_lr=0.1 is above recipe.lr=0\.\d+, which falls to it"),
        ("seed=-1", "seed=-1: expected a number from 0 up"),
        ("align.spaces=[clip]", "does not hold; there are vit/patch, vit/cls"),
        ("engine.precision=float8", "engine: "),
        (
            "engine.num_nodes=2",
            "engine.devices=1 engine.num_nodes=2: several processes are started",
        ),
        ("recipe.interpolation=nearst", "recipe.interpolation=nearst: valid are nearest, box"),
        ("+recipe.images_a_step=abc", "recipe.images_a_step=abc: expected a whole number"),
        (["recipe.steps=null", "recipe.epochs=0.5"], "recipe.epochs=0.5: expected a whole number"),
        (["keep.best=loss", "align.balance=drop"], "balance=drop does not.*say keep.best=knn"),
        (["keep.best=loss", "align.balance=normalised"], "balance=normalised does not tell"),
    ],
)
def test_mistakes_are_told_before_anything_is_written(train_config, tmp_path, override, message):
    with pytest.raises(ConfigError, match=message):
        train(train_config(*([override] if isinstance(override, str) else override)))
    assert not (tmp_path / "run").exists()


def test_images_a_step_are_forward_passes_of_at_most_a_batch(train_config, tmp_path, capsys):
    train(train_config("recipe.batch_size=8", "recipe.accumulate=2", out="told"))
    train(train_config("recipe.batch_size=10", "+recipe.images_a_step=16", out="shared"))
    assert "a step: 16 images (1 rank x 2 x 8)" in capsys.readouterr().out.splitlines()[-2]
    told, shared = (load_file(tmp_path / out / "student.safetensors") for out in ("told", "shared"))
    assert all(torch.equal(told[name], shared[name]) for name in told)
