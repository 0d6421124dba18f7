"""Parameter groups, rates and the average against sums that are done by hand."""

from __future__ import annotations

import pytest
import torch
from omegaconf import OmegaConf
from preceptor.errors import ConfigError
from preceptor.train.alignment import build_alignment
from preceptor.train.alignment.base import Space
from preceptor.train.checkpoint import load_checkpoint, load_model
from preceptor.train.distiller import Distiller
from preceptor.train.loop import train
from preceptor.train.optimizer import (
    average_of,
    build_optimizer,
    learning_rate,
    parts_of_a_step,
)
from preceptor.train.students import build_student
from torch import nn

RECIPE = {
    "optimizer": "adamw",
    "optimizer_options": {},
    "lr": 0.1,
    "weight_decay": 0.05,
    "layer_decay": 1.0,
    "alignment_lr": 1.0,
    "ema": 0.0,
}
VIT = {
    "model": "vit_tiny_patch16_224",
    "size": 32,
    "options": {"patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 2},
}


def recipe(**options):
    return OmegaConf.create({**RECIPE, **options})


@pytest.fixture
def distiller():
    student = build_student(VIT, 0)
    space = Space("vit", 16, 24, (4, 4))
    return Distiller(student, build_alignment({"name": "regression"}, student, {"vit/p": space}))


@pytest.mark.parametrize("alignment_lr", [1.0, 0.25])
@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_every_parameter_is_in_one_group_and_only_matrices_decay(
    distiller, layer_decay, alignment_lr
):
    own = recipe(layer_decay=layer_decay, alignment_lr=alignment_lr)
    optimizer = build_optimizer(distiller, own)
    names = {id(parameter): name for name, parameter in distiller.named_parameters()}
    found = [names[id(p)] for group in optimizer.param_groups for p in group["params"]]
    assert sorted(found) == sorted(names.values())
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            spared = parameter.ndim == 1 or name.endswith(("pos_embed", "cls_token"))
            assert group["weight_decay"] == (0.0 if spared else 0.05), name


def test_earlier_layers_of_the_backbone_learn_more_slowly(distiller):
    optimizer = build_optimizer(distiller, recipe(layer_decay=0.5))
    names = {id(parameter): name for name, parameter in distiller.named_parameters()}
    scale = {
        names[id(p)]: group.get("lr_scale", 1.0)
        for group in optimizer.param_groups
        for p in group["params"]
    }
    model = "student.model."
    # From the end: block 1 with the final norm, block 0, the patches with their positions.
    expected = {"norm.weight": 1, "blocks.1.mlp.fc1.weight": 1, "blocks.0.mlp.fc1.weight": 0.5}
    expected |= {"patch_embed.proj.weight": 0.25, "pos_embed": 0.25}
    assert {name: scale[f"{model}{name}"] for name in expected} == expected
    assert {s for name, s in scale.items() if name.startswith("alignment.")} == {1.0}


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_the_alignment_has_its_own_learning_rate(distiller, layer_decay):
    own = recipe(layer_decay=layer_decay, alignment_lr=0.25, weight_decay=0.0)
    optimizer = build_optimizer(distiller, own)
    for group in optimizer.param_groups:  # as the loop sets it
        group["lr"] = group["lr"] * group.get("lr_scale", 1.0)
    before = {name: p.detach().clone() for name, p in distiller.named_parameters()}
    for parameter in distiller.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    # Adam's first step is the learning rate itself, whatever the gradient
    moved = {
        name: float((before[name] - p.detach()).max()) for name, p in distiller.named_parameters()
    }
    assert moved["student.model.norm.weight"] == pytest.approx(0.1, rel=1e-4)
    alignment = {step for name, step in moved.items() if name.startswith("alignment.")}
    assert alignment
    assert all(step == pytest.approx(0.025, rel=1e-4) for step in alignment)


def test_learning_rate_warms_up_and_falls_along_a_cosine():
    recipe = OmegaConf.create({"lr": 2.0, "min_lr": 0.5, "warmup": 0.25})
    rates = [learning_rate(step, 8, recipe) for step in range(8)]
    assert rates[:3] == [1.0, 2.0, 2.0]
    assert rates[5] == pytest.approx(0.5 + 1.5 * 0.5)  # half of the way down
    assert rates == sorted(rates[:2]) + sorted(rates[2:], reverse=True)


def test_the_average_is_the_sum_that_it_says():
    torch.manual_seed(0)
    module = nn.Linear(3, 2)
    average = average_of(module, recipe(ema=0.6))
    expected = None
    for step in range(1, 7):
        with torch.no_grad():
            module.weight.add_(torch.randn_like(module.weight))
        average.update(module, step=step)
        # timm counts from its first update, which takes the weights as they are.
        decay = 0.0 if step == 1 else min(0.6, 1 - step ** (-2 / 3))
        new = module.weight.double()
        expected = new if expected is None else decay * expected + (1 - decay) * new
    assert torch.allclose(average.module.weight.double(), expected, atol=1e-6)
    assert average_of(module, recipe()) is None


def test_the_average_is_left_as_a_finished_run(train_config, tmp_path, capsys):
    train(train_config("recipe.ema=0.9"))
    assert f"{tmp_path / 'run' / 'ema'} their average" in capsys.readouterr().out
    raw, _, _ = load_model(tmp_path / "run")
    averaged, _, model = load_model(tmp_path / "run" / "ema")
    assert model["student"]["model"] == "resnet10t"
    differing = [
        name
        for name, value in averaged.state_dict().items()
        if value.is_floating_point() and not torch.equal(value, raw.state_dict()[name])
    ]
    assert "model.conv1.0.weight" in differing


@pytest.mark.parametrize(("metric", "judged"), [("loss", "module"), ("knn", "average")])
def test_the_best_weights_are_those_that_were_judged(train_config, tmp_path, metric, judged):
    """Beside an average: k-NN is the average's, the loss is not."""
    options = ("log.knn_every=2", "recipe.checkpoint_every=2", "recipe.log_every=2", "log.to=[]")
    train(train_config("recipe.ema=0.9", f"keep.best={metric}", *options))
    best, _, _ = load_model(tmp_path / "run" / "best")
    kept = load_checkpoint(tmp_path / "run" / "checkpoints" / "best.pt")
    name = "conv1.0.weight"
    weight = best.state_dict()[f"model.{name}"]
    assert torch.equal(weight, kept[judged][f"student.model.{name}"])
    assert not torch.equal(kept["module"][f"student.model.{name}"],
                           kept["average"][f"student.model.{name}"])  # fmt: skip


@pytest.mark.parametrize("name", ["lamb", "sgd"])
def test_other_optimisers_learn_too(train_config, tmp_path, name):
    rate = {"lamb": 0.02, "sgd": 0.1}[name]
    options = (f"recipe.optimizer={name}", f"recipe.lr={rate}", "recipe.steps=24", "log.to=[csv]")
    train(train_config(*options, "recipe.layer_decay=0.9"))
    text = (tmp_path / "run" / "logs" / "csv" / "metrics.csv").read_text().splitlines()
    column = text[0].split(",").index("loss")
    losses = [float(row.split(",")[column]) for row in text[1:] if row.split(",")[column]]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"optimizer": "adamv"}, "timm has no such optimiser"),
        ({"optimizer_options": {"beta": 1}}, "adamw does not take them"),
        ({"optimizer": "bnbadamw"}, "bnbadamw cannot be used here: CUDA required"),
        ({"optimizer": "fusedadam"}, "fusedadam cannot be used here: CUDA required"),
        ({"optimizer": "adahessian"}, "choose another, such as adamw"),
        ({"optimizer": "lookahead_adahessian"}, "choose another, such as adamw"),
        ({"optimizer_options": "betas:0.9"}, "optimizer_options=betas:0.9: expected options by"),
    ],
)
def test_an_optimiser_that_cannot_be_used_is_told(distiller, options, message, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match=message):
        build_optimizer(distiller, recipe(**options))


@pytest.mark.parametrize("world", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("most", [1, 48, 64, 512])
def test_ranks_share_the_images_of_a_step_whatever_their_number(world, most):
    own = recipe(images_a_step=512, batch_size=most, accumulate=1)
    rows, passes = parts_of_a_step(own, world)
    assert world * rows * passes == 512
    assert rows <= most
    fewer = [n for n in range(1, passes) if 512 // world % n == 0]
    assert all(512 // world // n > most for n in fewer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images_a_step": 512, "accumulate": 2}, r"leave out recipe\.accumulate=2"),
        ({"images_a_step": 500}, "8 rank.* a multiple of 8"),
        ({"images_a_step": 0}, "cannot share"),
    ],
)
def test_images_that_ranks_cannot_share_are_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        parts_of_a_step(recipe(**{"batch_size": 64, "accumulate": 1, **options}), 8)


def test_a_recipe_that_states_no_images_a_step_takes_its_batches():
    plain = {"batch_size": 64, "accumulate": 3}
    assert parts_of_a_step(recipe(**plain), 8) == (64, 3)
    assert parts_of_a_step(recipe(**plain, images_a_step=None), 8) == (64, 3)
