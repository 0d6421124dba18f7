"""Units of the targets against their definitions, on tokens with known moments."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from preceptor.cache import Accumulator, CalibrationSums, calibration
from preceptor.errors import DataError
from preceptor.train.alignment.targets import (
    Codes,
    PhiS,
    Standardised,
    Units,
    build_units,
    equal_variance_rotation,
    hadamard,
)
from scipy.linalg import hadamard as sylvester
from torch import nn


def store(tokens: torch.Tensor):
    """What `cache.Space` gives of a space with these tokens [n, D]; standardised as a store is."""
    moments = Accumulator(tokens[:10].mean(0).float())
    moments.add(tokens)
    part = CalibrationSums(tokens[:10].mean(0).float())
    part.add(tokens[:200])  # a store calibrates on a sample
    mean, std = (torch.from_numpy(x) for x in calibration(part))
    space = SimpleNamespace(mean=mean, std=std, statistics=moments.moments)
    return space, ((tokens - mean) / std).float()


@pytest.fixture(params=[24, 30, 12, 7], ids=lambda d: f"{d} dimensions")
def tokens(request) -> torch.Tensor:
    generator = torch.Generator().manual_seed(request.param)
    mixing = torch.randn(request.param, request.param, generator=generator).double()
    spread = torch.logspace(-2, 1, request.param).double()
    noise = torch.randn(3000, request.param, generator=generator).double()
    return noise * spread @ mixing + 5


@pytest.mark.parametrize("order", [1, 2, 4, 8, 12, 16, 20, 24, 28, 36, 48, 192, 384, 1152, 1280])
def test_hadamard_matrices_are_hadamard(order):
    matrix = hadamard(order)
    assert set(np.unique(matrix)) <= {-1.0, 1.0}
    np.testing.assert_array_equal(matrix @ matrix.T, order * np.eye(order))
    if order in (2, 8, 16):  # an independent construction has the same Gram matrix
        np.testing.assert_array_equal(matrix @ matrix.T, sylvester(order) @ sylvester(order).T)


@pytest.mark.parametrize("order", [3, 6, 7, 30, 92])
def test_where_no_matrix_is_at_hand_planes_are_turned(order):
    assert hadamard(order) is None
    variances = np.random.default_rng(order).exponential(size=order) ** 3
    rotation = equal_variance_rotation(variances)
    np.testing.assert_allclose(rotation @ rotation.T, np.eye(order), atol=1e-12)
    spread = np.diag(rotation @ np.diag(variances) @ rotation.T)
    np.testing.assert_allclose(spread, variances.mean(), rtol=1e-10)
    np.testing.assert_allclose(equal_variance_rotation(np.ones(order)), np.eye(order), atol=1e-12)


def test_phis_has_unit_variances_and_the_teachers_distances(tokens):
    space, z = store(tokens)
    phis = PhiS(tokens.shape[1])
    phis.fit(space)
    y = phis(z.unsqueeze(0)).squeeze(0).double()
    np.testing.assert_allclose(y.mean(0), 0, atol=2e-3)
    np.testing.assert_allclose(y.var(0, correction=0), 1, rtol=2e-3)
    alpha = torch.cov(tokens.t(), correction=0).trace().div(tokens.shape[1]).sqrt()
    distances = torch.cdist(tokens[:50], tokens[:50]) / alpha
    torch.testing.assert_close(torch.cdist(y[:50], y[:50]), distances, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize("kind", [PhiS, Units, Standardised])
def test_autocast_does_not_round_targets(tokens, kind):
    space, z = store(tokens)
    units = kind(tokens.shape[1])
    units.fit(space)
    expected = units(z)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = units(z)
    assert found.dtype == torch.float32
    assert torch.equal(found, expected)


def test_the_teachers_units_come_back(tokens):
    space, z = store(tokens)
    units = Units(tokens.shape[1])
    units.fit(space)
    torch.testing.assert_close(units(z).double(), tokens, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", [PhiS, Units, Standardised])
def test_predictions_go_back_to_the_units_of_the_store(tokens, kind):
    space, z = store(tokens)
    units = kind(tokens.shape[1])
    units.fit(space)
    torch.testing.assert_close(units.standardised(units(z)), z, rtol=1e-3, atol=1e-3)


def test_standardised_tokens_have_unit_mean_square_about_the_stores_centre(tokens):
    """Whatever s and m the store has: a reader takes them as they are."""
    generator = torch.Generator().manual_seed(1)
    dim = tokens.shape[1]
    space, _ = store(tokens)
    space.std = space.std * (torch.rand(dim, generator=generator) * 5 + 0.2)
    space.mean = torch.where(torch.rand(dim, generator=generator) < 0.5, 0.0, space.mean)
    z = ((tokens - space.mean) / space.std).float()
    units = build_units("standardise", dim, lambda: space)
    y = units(z).double()
    np.testing.assert_allclose(y.square().mean(0), 1, rtol=1e-4)
    rms = (tokens - space.mean).square().mean(0).sqrt()
    torch.testing.assert_close(y * rms + space.mean, tokens, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(units.standardised(y.float()), z, rtol=1e-4, atol=1e-4)


def test_a_dimension_that_hardly_moves_is_not_blown_up(tokens):
    tokens = tokens.clone()
    tokens[:, 0] = 3 + 1e-9 * tokens[:, 0]
    space, _ = store(tokens)
    units = build_units("standardise", tokens.shape[1], lambda: space)
    rms = (tokens - space.mean).square().mean(0).sqrt()
    floor = 1e-4 * rms.square().mean().sqrt()
    assert rms[0] < floor < rms[1:].min()
    expected = space.std / torch.maximum(rms, floor)
    torch.testing.assert_close(units.gain, expected.float(), rtol=1e-3, atol=0)


def test_standardised_codes_stay_codes():
    codes = Codes(torch.ones(2, 3, 4, dtype=torch.int8), torch.rand(2, 3).half())
    units = Standardised(4)
    units.gain.copy_(torch.tensor([0.5, 1, 2, 3]))
    found = units(codes)
    assert isinstance(found, Codes)
    assert found.codes is codes.codes
    assert found.scales is codes.scales
    torch.testing.assert_close(found.decode(), units(codes.decode()), rtol=0, atol=0)


def test_weights_without_a_gain_are_of_tokens_as_stored(tokens):
    """Of a run that is older than the gain: it goes on as it began, whatever the store says."""
    space, z = store(tokens)
    units = nn.ModuleDict({"vit/cls": build_units("standardise", z.shape[1], lambda: space)})
    assert not torch.equal(units["vit/cls"].gain, torch.ones(z.shape[1]))
    state = units.state_dict()
    assert state.pop("vit/cls.gain") is not None
    units.load_state_dict(state)
    assert torch.equal(units["vit/cls"](z), z)
    assert not state


@pytest.mark.parametrize("trembling", [0.0, 3e-8])
def test_tokens_that_do_not_vary_are_told(trembling):
    tokens = torch.full((300, 4), 0.1).double()
    tokens[::3] *= 1 + trembling
    space, _ = store(tokens)
    space.id = "vit/cls"
    with pytest.raises(DataError, match="the tokens of vit/cls do not vary"):
        PhiS(4).fit(space)
    # in the teacher's units rounding is small, and stays it
    units = build_units("standardise", 4, lambda: space)
    torch.testing.assert_close(units.gain, space.std)


def test_little_movement_far_from_zero_is_not_taken_for_rounding(tokens):
    tokens = (tokens - 5) / tokens.std(0) + 1e6
    space, z = store(tokens.float().double())
    y = build_units("standardise", tokens.shape[1], lambda: space)(z).double()
    np.testing.assert_allclose(y.square().mean(0), 1, rtol=1e-2)
    PhiS(tokens.shape[1]).fit(space)


def test_small_dimensions_beside_massive_ones_have_unit_mean_square(tokens):
    tokens = (tokens - 5) / tokens.std(0)
    tokens[:, 0] *= 1e6
    space, z = store(tokens)
    y = build_units("standardise", tokens.shape[1], lambda: space)(z).double()
    np.testing.assert_allclose(y.square().mean(0), 1, rtol=1e-3)


@pytest.mark.parametrize("kind", ["phis", "none", "standardise"])
def test_the_loss_is_taken_in_the_units_that_are_asked_for(build, run, spaces, targets, kind):
    generator = torch.Generator().manual_seed(0)
    tokens = {
        name: torch.randn(500, space.dim, generator=generator).double() ** 3 + 1
        for name, space in spaces.items()
    }
    stores = {name: store(x)[0] for name, x in tokens.items()}
    alignment = build("regression", stored=stores.__getitem__, targets=kind, balance="fixed")
    output = run(alignment)
    found = alignment(output, targets)
    plain = build("regression")
    weights = {k: v for k, v in alignment.state_dict().items() if not k.startswith("units.")}
    plain.load_state_dict(weights)
    converted = {}
    for name, z in targets.items():
        x = z * stores[name].std + stores[name].mean
        if kind == "phis":
            units = PhiS(spaces[name].dim)
            units.fit(stores[name])
            x = (units.matrix @ z.flatten(0, 1).t()).t().view_as(z) + units.offset
        if kind == "standardise":
            mean = stores[name].mean
            x = ((x - mean) / (tokens[name] - mean).square().mean(0).sqrt()).float()
        converted[name] = x
    expected = plain(output, converted)
    torch.testing.assert_close(found.loss, expected.loss, rtol=1e-5, atol=1e-6)
    # A run that is loaded has no store: its weights hold the units.
    again = build("regression", targets=kind)
    again.load_state_dict(alignment.state_dict())
    torch.testing.assert_close(again(output, targets).loss, found.loss, rtol=0, atol=0)
