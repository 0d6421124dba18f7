"""What every alignment owes, over the registry."""

from __future__ import annotations

import copy
from importlib.resources import files

import pytest
import torch
from omegaconf import OmegaConf
from preceptor.errors import ConfigError
from preceptor.tests.train.alignment.references import interpolate, loss_in_numpy
from preceptor.train.alignment import ALIGNMENTS, Codes, alignment_options
from preceptor.train.alignment.base import Space
from timm.optim import param_groups_weight_decay
from torch.nn import functional

NO_STREAM = {"teacher_stream": 0.0}
VARIANTS = {
    **{name: {} for name in ALIGNMENTS},
    "model_token, no stream": NO_STREAM,
    "model_token, cross": {"inter": "cross"},
    "model_token, alone": {"inter": "none", "residual": False, "mlp_ratio": 0},
    "model_token, inside": {"write_back": 2, "layers": 0, "width": 16, "heads": 2, **NO_STREAM},
    "model_token, constant": {
        "intra": False,
        "write_back": 2,
        "layers": 1,
        "width": 16,
        **NO_STREAM,
    },
    "model_token, cross without intra": {"intra": False, "inter": "cross", "write_back": 1},
    "model_token, hidden": {"write_back": 2, "mask_weight": 0.3},
    "model_token, all": {"write_back": [0, 2], "teacher_stream": 0.5, "gamma": None},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
COMPILED = (
    *ALIGNMENTS,
    "model_token, cross",
    "model_token, constant",
    "model_token, hidden",
    "model_token, all",
)
LOOKS_TWICE = ("masked", "model_token, hidden")


@pytest.fixture
def make(build):
    def of(variant: str, **options):
        return build(variant.split(",")[0], **{**VARIANTS[variant], **options})

    return of


@pytest.mark.parametrize("match", ["teacher", "student"])
@pytest.mark.parametrize("variant", [v for v in VARIANTS if not v.startswith("relational")])
def test_a_space_is_compared_as_the_base_says(make, run, targets, variant, match):
    alignment = make(variant, match=match)
    output = run(alignment)
    found = alignment(output, targets)
    predicted = alignment.predict(output, dense=True)
    for space in ("cnn/pool", "vit/cls"):
        expected = loss_in_numpy(predicted.descriptors[space], targets[space][:, 0])
        assert float(found.losses[space]) == pytest.approx(expected, rel=1e-5)
    for space, grid in (("cnn/map", (2, 2)), ("vit/patch", (5, 6))):
        p, t = predicted.dense[space], targets[space]
        if match == "teacher":
            p = interpolate(p, (3, 3), grid)
        else:
            t = interpolate(t, grid, (3, 3))
        assert float(found.losses[space]) == pytest.approx(loss_in_numpy(p, t), rel=1e-5)


def test_autocast_does_not_round_targets_on_the_students_grid(build, targets):
    alignment = build("regression", match="student")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        _, found = alignment.matched("vit/patch", torch.zeros(5, 9, 16), targets["vit/patch"])
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, interpolate(targets["vit/patch"], (5, 6), (3, 3)))


@every_variant
def test_every_teacher_has_its_share_of_the_loss_with_gradient(make, run, targets, variant):
    alignment = make(variant, balance="fixed", dense_weight=0.4)
    output = run(alignment)
    found = alignment(output, targets)
    assert list(found.by_teacher) == ["cnn", "vit"]
    assert set(found.losses) >= set(targets)
    assert not any(loss.requires_grad for loss in found.losses.values())
    hidden = getattr(alignment, "hidden_patches", None)
    weights = {
        "": 0.4,
        "cls": 1,
        "pool": 1,
        "masked": hidden.weight if hidden is not None else 0,
        "stream": getattr(alignment, "teacher_stream", 0),
        "tokens": getattr(alignment, "teacher_stream", 0),
    }
    for teacher, term in found.by_teacher.items():
        own = {k: v for k, v in found.losses.items() if k.startswith(teacher)}
        kinds = [k.split(":")[1] if ":" in k else k.split("/")[1] for k in own]
        expected = sum(
            weights.get(kind, 0.4) * float(v) for kind, v in zip(kinds, own.values(), strict=True)
        )
        assert float(term.detach()) == pytest.approx(expected, rel=1e-5)
        assert term.dtype == torch.float32
    ends = [output.tokens, output.pooled]
    parts = [
        torch.autograd.grad(term, ends, retain_graph=True, materialize_grads=True)
        for term in found.by_teacher.values()
    ]
    whole = torch.autograd.grad(found.loss, ends, materialize_grads=True)
    for i, gradient in enumerate(whole):
        torch.testing.assert_close(parts[0][i] + parts[1][i], gradient)


@every_variant
def test_gradients_reach_the_student_and_every_parameter(make, run, targets, variant):
    alignment = make(variant, balance="fixed")
    optimizer = torch.optim.SGD(alignment.parameters(), lr=0.05)
    for _ in range(3):  # what starts at zero passes gradients on from the second step
        optimizer.zero_grad()
        output = run(alignment)
        output.tokens.retain_grad()
        alignment(output, targets).loss.backward()
        optimizer.step()
    assert float(output.tokens.grad.abs().min()) > 0
    if "alone" not in variant:
        assert float(output.pooled.grad.abs().min()) > 0
    idle = [n for n, p in alignment.named_parameters() if not float(p.grad.abs().max()) > 0]
    assert not idle


@every_variant
def test_readouts_are_as_wide_as_stated_and_use_the_parameters_that_they_count(make, run, variant):
    alignment = make(variant)
    width = alignment.norm.weight.numel() if hasattr(alignment, "norm") else 0
    tokens = 2 * 4 * width
    widths = {"pooled": 12, "spatial": 80, "predictions": 40, "tokens": tokens, "both": 12 + tokens}
    alignment.eval()
    for kind in alignment.readouts:
        output = run(alignment)
        feature = alignment.readout(output, kind)
        assert feature.shape == (5, widths[kind])
        alignment.zero_grad(set_to_none=True)
        # What lives in the backbone is computed for every readout.
        inside = 0 if output.carried is None else output.carried.sum() + output.tokens.sum()
        (feature.sum() + inside).backward()
        used = sum(p.numel() for p in alignment.parameters() if p.grad is not None)
        assert alignment.readout_parameters(kind) == used
    with pytest.raises(ConfigError, match="pooled, spatial, predictions"):
        alignment.readout(output, "nothing")


def test_the_spatial_readout_is_the_map_pooled_to_quarters(build, run):
    alignment = build("regression")
    output = run(alignment)
    image = output.tokens.transpose(1, 2).unflatten(2, (3, 3))
    pooled = functional.adaptive_avg_pool2d(image, 2)
    expected = pooled.flatten(2).transpose(1, 2).flatten(1)
    torch.testing.assert_close(alignment.readout(output, "spatial"), expected)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in LOOKS_TWICE])
def test_without_dense_terms_only_descriptors_are_read(make, run, targets, variant):
    alignment = make(variant, dense_weight=0)
    streams = ["cnn/map", "vit/patch"] if getattr(alignment, "teacher_stream", 0) else []
    assert alignment.required_spaces == ["cnn/pool", "vit/cls", *streams]
    some = {space: targets[space] for space in alignment.required_spaces}
    found = alignment(run(alignment), some)
    assert {name for name in found.losses if ":" not in name} == {"cnn/pool", "vit/cls"}
    assert all(p.requires_grad for p in alignment.parameters())


@every_variant
def test_a_teacher_without_descriptor_is_given_its_mean_token(make, run, targets, variant):
    alignment = make(variant, spaces={"cnn/map": Space("cnn", 4, 24, (2, 2))})
    output = run(alignment)
    found = alignment(output, {"cnn/map": targets["cnn/map"]})
    assert {"cnn/map", "cnn/map:mean"} <= set(found.losses)
    if not variant.startswith("relational"):
        predicted = alignment.predict(output, dense=False).descriptors["cnn/map:mean"]
        expected = loss_in_numpy(predicted, targets["cnn/map"].mean(1))
        assert float(found.losses["cnn/map:mean"]) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v not in LOOKS_TWICE])
def test_a_teacher_may_have_a_descriptor_alone(make, run, targets, variant):
    alignment = make(
        variant,
        spaces={"vit/cls": Space("vit", 1, 16, None), "cnn/map": Space("cnn", 4, 24, (2, 2))},
    )
    assert alignment.required_spaces == ["vit/cls", "cnn/map"]
    found = alignment(run(alignment), {k: targets[k] for k in alignment.required_spaces})
    assert float(found.loss.detach()) > 0
    assert list(found.by_teacher) == ["vit", "cnn"]


@pytest.mark.parametrize("match", ["teacher", "student"])
@every_variant
def test_codes_give_the_loss_and_gradients_of_their_floats(make, run, targets, variant, match):
    codes = {
        space: Codes(
            (40 * z).round().clamp(-127, 127).to(torch.int8), z.new_full(z.shape[:2], 1 / 40)
        )
        for space, z in targets.items()
    }
    found = []
    for wanted in (codes, {space: c.decode() for space, c in codes.items()}):
        alignment = make(variant, match=match, balance="fixed")
        torch.manual_seed(4)
        for units in alignment.units.values():
            units.gain.uniform_(0.3, 3)
        output = run(alignment)
        output.tokens.retain_grad()
        loss = alignment(output, wanted).loss
        loss.backward()
        learnt = {name: p.grad for name, p in alignment.named_parameters() if p.grad is not None}
        found.append((loss.detach(), output.tokens.grad, output.pooled.grad, learnt))
    torch.testing.assert_close(found[0], found[1], rtol=1e-5, atol=1e-6)


@every_variant
def test_the_state_brings_back_the_rest_of_a_run_bit_for_bit(make, run, targets, variant):
    """Buffers (running means, memories) and random draws after a save and a load."""
    options = {"balance": "normalised"}
    alignment = make(variant, **options)
    torch.manual_seed(9)
    for _ in range(3):
        alignment(run(alignment), targets)
    state, random = copy.deepcopy(alignment.state_dict()), torch.get_rng_state()
    expected = [float(alignment(run(alignment), targets).loss.detach()) for _ in range(2)]
    again = make(variant, **options)
    again.load_state_dict(state)
    torch.set_rng_state(random)
    assert [float(again(run(again), targets).loss.detach()) for _ in range(2)] == expected


@every_variant
def test_evaluation_changes_nothing_and_has_the_terms_of_every_space(make, run, targets, variant):
    alignment = make(variant, balance="normalised").eval()
    before = copy.deepcopy(alignment.state_dict())
    with torch.inference_mode():
        found = alignment(run(alignment), targets)
    assert set(found.losses) == set(targets)
    after = alignment.state_dict()
    assert all(torch.equal(after[key], before[key]) for key in before)


@every_variant
def test_only_matrices_are_decayed(make, variant):
    """Biases, norms, gates, learnt tokens and positions are not, whatever their dimensions."""
    alignment = make(variant)
    groups = param_groups_weight_decay(
        alignment, 0.1, no_weight_decay_list=alignment.no_weight_decay()
    )
    decayed = {id(p) for group in groups if group["weight_decay"] for p in group["params"]}
    names = {name for name, p in alignment.named_parameters() if id(p) in decayed}
    assert all(name.endswith("weight") for name in names)
    assert not [name for name in names if "norm" in name]
    assert any("heads" in name for name in names)


@every_variant
def test_bfloat16_autocast_keeps_losses_in_float32(make, run, targets, variant):
    alignment = make(variant, balance="fixed")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = alignment(run(alignment), targets)
    assert found.loss.dtype == torch.float32
    torch.manual_seed(4)
    found.loss.backward()
    assert all(torch.isfinite(p.grad).all() for p in alignment.parameters() if p.grad is not None)


@pytest.mark.parametrize("variant", COMPILED)
def test_training_compiles_to_one_graph_that_serves_every_step(
    make, run, targets, variant, given_student
):
    torch._dynamo.reset()  # what other tests compiled of the same code is no recompilation here
    alignment, student = make(variant).double(), given_student(dtype=torch.float64)
    compiled = torch.compile(alignment.forward, backend="aot_eager", fullgraph=True)
    coded = {}
    for name, tokens in targets.items():
        scales = tokens.abs().amax(-1) / 127
        coded[name] = Codes((tokens / scales.unsqueeze(-1)).round().to(torch.int8), scales)

    def step(function, seed):
        alignment.zero_grad()
        student.seed = seed
        torch.manual_seed(seed)
        output = run(alignment, student)
        ends = output.ends()
        found = function(output, coded)
        gradients = torch.autograd.grad(
            found.loss, [*alignment.parameters(), *ends], materialize_grads=True
        )
        return [found.loss.detach(), *found.losses.values(), *gradients]

    with torch._dynamo.config.patch(error_on_recompile=True):
        for seed in range(2):
            torch.testing.assert_close(step(compiled, seed), step(alignment, seed))


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_the_configuration_file_states_every_option_and_its_default(name):
    text = (files("preceptor.configs") / "align" / f"{name}.yaml").read_text()
    config = OmegaConf.to_container(OmegaConf.create(text))
    assert config.pop("name") == config.pop("method") == name
    assert config.pop("spaces") is None
    assert config == alignment_options(ALIGNMENTS[name])
    described = [line for line in text.splitlines() if not line.startswith("#")]
    assert all("  #" in line for line in described)
