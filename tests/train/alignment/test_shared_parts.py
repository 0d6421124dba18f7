"""The parts that all alignments share: the loss of tokens, grids, the choice of spaces."""

from __future__ import annotations

import pytest
import torch
from preceptor.errors import ConfigError, DataError
from preceptor.tests.train.alignment.references import interpolate, loss_in_numpy
from preceptor.train.alignment import build_alignment
from preceptor.train.alignment.base import select_spaces, token_loss
from preceptor.train.alignment.grids import GridPool, GridResample
from torch.nn import functional


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
