"""What every alignment owes, over the registry; and the parts that all share."""

from __future__ import annotations

import copy
from importlib.resources import files

import numpy as np
import pytest
import torch
from omegaconf import OmegaConf
from preceptor.errors import ConfigError, DataError
from preceptor.train.alignment import ALIGNMENTS, Codes, alignment_options, build_alignment
from preceptor.train.alignment.base import Space, select_spaces, token_loss
from preceptor.train.alignment.grids import GridPool, GridResample
from timm.optim import param_groups_weight_decay
from torch.nn import functional

VARIANTS = {
    **{name: {} for name in ALIGNMENTS},
    "model_token, cross": {"inter": "cross"},
    "model_token, alone": {"inter": "none", "residual": False, "mlp_ratio": 0},
    "model_token, inside": {"write_back": 2, "layers": 0, "width": 16, "heads": 2},
    "model_token, constant": {"intra": False, "write_back": 2, "layers": 1, "width": 16},
    "model_token, cross without intra": {"intra": False, "inter": "cross", "write_back": 1},
    "model_token, hidden": {"write_back": 2, "mask_weight": 0.3, "teacher_stream": 0.3},
    "model_token, all": {"write_back": [0, 2], "teacher_stream": 0.5, "gamma": None},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)
LOOKS_TWICE = ("masked", "model_token, hidden")


@pytest.fixture
def make(build):
    def of(variant: str, **options):
        return build(variant.split(",")[0], **{**VARIANTS[variant], **options})

    return of


def loss_in_numpy(prediction: torch.Tensor, target: torch.Tensor) -> float:
    """0.9 (1 - cos) + 0.1 smooth-L1, one token at a time in float64."""
    p = prediction.detach().double().numpy().reshape(-1, prediction.shape[-1])
    t = target.double().numpy().reshape(p.shape)
    terms = []
    for a, b in zip(p, t, strict=True):
        cosine = a @ b / (np.linalg.norm(a) * np.linalg.norm(b))
        d = np.abs(a - b)
        terms.append(0.9 * (1 - cosine) + 0.1 * np.where(d < 1, 0.5 * d * d, d - 0.5).mean())
    return float(np.mean(terms))


@pytest.mark.parametrize("shape", [(6, 1, 7), (3, 4, 9)])
def test_token_loss_is_its_formula(shape):
    generator = torch.Generator().manual_seed(3)
    a, b = (2 * torch.randn(shape, generator=generator) for _ in range(2))
    assert float(token_loss(a, b)) == pytest.approx(loss_in_numpy(a, b), rel=1e-6)
    mask = torch.rand(shape[:2], generator=generator) > 0.4
    some = loss_in_numpy(a[mask], b[mask])
    assert float(token_loss(a, b, mask)) == pytest.approx(some, rel=1e-6)


def test_token_loss_is_float32_under_autocast():
    a, b = torch.randn(4, 1, 8), torch.randn(4, 1, 8)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = token_loss(a.bfloat16(), b)
    assert loss.dtype == torch.float32
    assert float(loss) == pytest.approx(loss_in_numpy(a.bfloat16(), b), rel=1e-5)


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


def interpolate(tokens, source, target):
    image = tokens.transpose(1, 2).unflatten(2, source)
    image = functional.interpolate(image, target, mode="bilinear", antialias=True)
    return image.flatten(2).transpose(1, 2)


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
    streams = ["cnn/map", "vit/patch"] if "all" in variant else []
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


@every_variant
def test_the_loss_compiles(make, run, targets, variant):
    alignment = make(variant, balance="fixed").eval()
    output = run(alignment)
    compiled = torch.compile(alignment, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(output, targets).loss, alignment(output, targets).loss)


@pytest.mark.parametrize(
    ("source", "target"),
    [((7, 7), (16, 16)), ((16, 16), (7, 7)), ((4, 6), (6, 4)), ((1, 1), (3, 2))],
)
def test_resampling_is_torchs_antialiased_bilinear(source, target):
    tokens = torch.randn(2, source[0] * source[1], 5)
    resample = GridResample(source, target)
    torch.testing.assert_close(
        resample(tokens), interpolate(tokens, source, target), rtol=1e-5, atol=1e-5
    )
    ones = torch.ones(1, source[0] * source[1], 1)
    torch.testing.assert_close(resample(ones), torch.ones(1, target[0] * target[1], 1))
    weight = torch.randn(5, 3)
    torch.testing.assert_close(
        resample(tokens) @ weight, resample(tokens @ weight), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
    ("source", "target"), [((7, 7), (2, 2)), ((9, 4), (8, 4)), ((1, 3), (2, 2))]
)
def test_pooling_is_torchs_adaptive_mean(source, target):
    tokens = torch.randn(2, source[0] * source[1], 5)
    image = tokens.transpose(1, 2).unflatten(2, source)
    expected = functional.adaptive_avg_pool2d(image, target).flatten(2).transpose(1, 2)
    torch.testing.assert_close(GridPool(source, target)(tokens), expected)


def test_equal_grids_are_left_alone():
    tokens = torch.randn(2, 12, 5)
    assert GridResample((3, 4), (3, 4))(tokens) is tokens
    with pytest.raises(DataError, match="12 tokens are not a grid of 5 x 5"):
        GridResample((5, 5), (3, 4))(tokens)


def test_spaces_are_chosen_by_name_or_teacher(spaces):
    assert list(select_spaces(spaces, None)) == list(spaces)
    assert list(select_spaces(spaces, ["vit"])) == ["vit/patch", "vit/cls"]
    assert list(select_spaces(spaces, ["vit/cls", "cnn"])) == ["vit/cls", "cnn/map", "cnn/pool"]
    with pytest.raises(ConfigError, match=r"vit/last.*cnn/map, cnn/pool, vit/patch, vit/cls"):
        select_spaces(spaces, ["vit/last"])


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"name": "modeltoken"}, "did you mean model_token"),
        ({"name": "regression", "tokens": 3}, "it has hidden, dense_weight, match, targets"),
        ({"name": "regression", "match": "both"}, "valid are teacher, student"),
        ({"name": "regression", "dense_weight": -1}, "dense_weight=-1: a weight is at least 0"),
        ({"name": "regression", "targets": "whiten"}, "valid are standardise, phis, none"),
        ({"name": "regression", "dense_weight": float("inf")}, "dense_weight=inf: a weight is"),
        ({"name": "regression", "dense_weight": None}, "dense_weight=null: it needs a value, such"),
        ({"name": "regression", "hidden": 0}, "hidden=0: at least 1"),
        ({"name": "ladder", "hidden": -3}, "hidden=-3: at least 1"),
        (
            {"name": "regression", "weights": [1, 2]},
            r"weights=\[1, 2\]: expected a number by teach",
        ),
        ({"name": "regression", "weights": {"vit": "a"}}, "weights.vit=a: a weight is at least 0"),
        (
            {"name": "regression", "weights": {"vit": None}},
            "weights.vit=None: a weight is at least",
        ),
        ({"name": "model_token", "intra": None}, "intra=null: it needs a value, such as True"),
        ({"name": "model_token", "mlp_ratio": float("inf")}, "mlp_ratio=inf: at least 0"),
        ({"name": "model_token", "gamma": float("nan")}, "gamma=nan: a finite number, or null"),
        ({"name": "model_token", "teacher_stream": float("inf")}, "teacher_stream=inf and"),
        ({"name": "masked", "mask_weight": float("inf")}, "mask_weight=inf: must be positive"),
        ({"name": "relational", "temperature": float("inf")}, "temperature=inf positive"),
        ({"name": "regression", "balance": "even"}, "valid are fixed, normalised, drop, pcgrad"),
        ({"name": "regression", "weights": {"clip": 2}}, "'clip', which is no teacher.*cnn, vit"),
        ({"name": "regression", "weights": {"vit": -2}}, "weights.vit=-2: a weight is at least 0"),
        ({"name": "regression", "weights": {"vit": 0, "cnn": 0}}, "every teacher has the weight 0"),
        ({"name": "regression", "balance": "drop", "drop": 2}, "drop=2: a probability"),
        ({"name": "regression", "balance": "normalised", "momentum": 1}, "momentum=1: from 0 to"),
        ({"name": "model_token", "inter": "all"}, "valid are none, self, cross"),
        ({"name": "model_token", "intra": False, "inter": "none"}, "leave the model tokens no mod"),
        ({"name": "model_token", "intra": False}, "without align.write_back nothing of them is"),
        (
            {"name": "model_token", "intra": False, "write_back": 1, "residual": False},
            "cannot predict alone, as align.residual=false asks",
        ),
        (
            {"name": "model_token", "intra": False, "write_back": 1, "alone": 0.5},
            "cannot predict alone, as align.alone=0.5 asks",
        ),
        ({"name": "model_token", "alone": -1}, "alone=-1 weights of at least 0"),
        (
            {"name": "model_token", "intra": False, "write_back": 1, "teacher_stream": 0.5},
            "teacher_stream=0.5 would read nothing",
        ),
        ({"name": "model_token", "width": 30, "heads": 4}, "multiple of heads=4"),
        ({"name": "model_token", "layers": 0}, "layers=0 must be at least 1"),
        ({"name": "model_token", "mlp_ratio": -1}, "mlp_ratio=-1: at least 0"),
        ({"name": "model_token", "pool": 0, "write_back": 1}, "pool=0 must be at least 1"),
        (
            {"name": "model_token", "write_back": 4},
            r"write_back=4: at most 3 .* 2 last \(3 x 3, 20\)",
        ),
        ({"name": "model_token", "write_back": [0, 5]}, r"no depth 5; it has 0 first \(6 x 7, 8\)"),
        ({"name": "model_token", "write_back": ["last"]}, "a number of depths, or a list"),
        (
            {"name": "model_token", "write_back": 1, "layers": 0, "teacher_stream": 1},
            "needs align.layers of at least 1",
        ),
        ({"name": "ladder", "depths": 3}, "depths=3: at most 2 depths"),
        ({"name": "ladder", "depths": [-4]}, "no depth -4"),
        ({"name": "masked", "mask_ratio": 0.01}, "3 x 3 cells some must be hidden and some not"),
        ({"name": "masked", "mask_weight": 0}, "mask_weight=0: must be positive"),
        ({"name": "masked", "spaces": ["vit/cls"]}, "none of the spaces has tokens on a grid"),
        ({"name": "model_token", "mask_weight": -1}, "mask_weight=-1: must be positive"),
        ({"name": "model_token", "mask_weight": 1, "mask_ratio": 1}, "mask_ratio=1: of the"),
        (
            {"name": "model_token", "mask_weight": 1, "spaces": ["vit/cls"]},
            "none of the spaces has tokens on a grid",
        ),
        ({"name": "relational", "queue": -1}, "queue=-1 must be at least 0"),
    ],
)
def test_a_mistake_is_told_with_what_is_valid(student, spaces, config, message):
    with pytest.raises(ConfigError, match=message):
        build_alignment(config, student, spaces)


def test_a_single_token_is_not_spread_over_a_grid(given_student, spaces):
    single = given_student(grid=(1, 1))
    with pytest.raises(
        ConfigError, match=r"cnn/map has a grid of 2 x 2 and the student one of 1 x 1"
    ):
        build_alignment({"name": "regression"}, single, spaces)
    build_alignment({"name": "regression", "match": "student"}, single, spaces)
    build_alignment({"name": "regression", "dense_weight": 0}, single, spaces)


def test_targets_of_another_grid_are_refused_with_both_sizes(build, run, targets):
    alignment = build("regression", match="student")
    with pytest.raises(DataError, match="20 tokens are not a grid of 5 x 6"):
        alignment(run(alignment), {**targets, "vit/patch": targets["vit/patch"][:, :20]})


@pytest.mark.parametrize("name", ALIGNMENTS)
def test_the_configuration_file_states_every_option_and_its_default(name):
    text = (files("preceptor.configs") / "align" / f"{name}.yaml").read_text()
    config = OmegaConf.to_container(OmegaConf.create(text))
    assert config.pop("name") == config.pop("method") == name
    assert config.pop("spaces") is None
    assert config == alignment_options(ALIGNMENTS[name])
    described = [line for line in text.splitlines() if not line.startswith("#")]
    assert all("  #" in line for line in described)
