"""Batch norms of untrained networks against their inputs, as hooks see them."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import timm
import torch
from preceptor.train.batch_norm import batch_norms, settle_batch_norms, settling_images
from torch import nn


@pytest.fixture
def network() -> nn.Module:
    """A ResNet that drops paths in training, and whose statistics were touched."""
    torch.manual_seed(0)
    network = timm.create_model("resnet10t", num_classes=0, drop_path_rate=0.5)
    network(torch.randn(4, 3, 32, 32))
    return network


def pixels(batches: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(8, 3, 32, 32, generator=generator) + n for n in range(batches)]


def test_statistics_are_means_of_those_of_the_batches(network):
    batches, norms = pixels(3), batch_norms(network)
    assert len(norms) == len([m for m in network.modules() if isinstance(m, nn.BatchNorm2d)])
    momenta = [norm.momentum for norm in norms]
    weights = copy.deepcopy(dict(network.named_parameters()))
    means, variances = {}, {}

    def see(norm, inputs):
        channels = inputs[0].double().transpose(0, 1).flatten(1)
        means.setdefault(norm, []).append(channels.mean(1))
        variances.setdefault(norm, []).append(channels.var(1))

    hooks = [norm.register_forward_pre_hook(see) for norm in norms]
    settle_batch_norms(network, batches)
    for hook in hooks:
        hook.remove()
    for norm in norms:
        assert len(means[norm]) == 3
        for found, seen in ((norm.running_mean, means), (norm.running_var, variances)):
            expected = torch.stack(seen[norm]).mean(0)
            torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-5)

    assert [norm.momentum for norm in norms] == momenta
    assert not any(module.training for module in network.modules())
    for name, weight in network.named_parameters():
        assert torch.equal(weight, weights[name])
        assert weight.grad is None


def test_nothing_of_it_is_random(network):
    others = copy.deepcopy(network).train()
    for one, seed in ((network, 0), (others, 1)):
        torch.manual_seed(seed)
        before = torch.get_rng_state()
        settle_batch_norms(one, pixels(2))
        assert torch.equal(torch.get_rng_state(), before)
    for name, value in network.state_dict().items():
        assert torch.equal(value, others.state_dict()[name])


def test_a_network_without_batch_norms_stays_as_it_is():
    network = timm.create_model("vit_tiny_patch16_224", img_size=32, depth=1, num_classes=0)
    before = copy.deepcopy(network.state_dict())
    settle_batch_norms(network, pixels(1))
    assert batch_norms(network) == []
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())


@pytest.mark.parametrize(
    ("count", "sizes"), [(1, [1]), (60, [60]), (64, [64]), (130, [64, 64]), (10**6, [64] * 8)]
)
def test_images_are_spread_over_all_in_equal_batches(count, sizes):
    parts = settling_images(count)
    assert [len(part) for part in parts] == sizes
    chosen = np.concatenate(parts)
    assert len(np.unique(chosen)) == len(chosen)
    assert (chosen[0], chosen[-1]) == (0, count - 1)
