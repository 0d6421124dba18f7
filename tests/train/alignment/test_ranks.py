"""Two processes against one that does the work of both, in float64."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Callable, Mapping

import pytest
import torch
from preceptor.train.distiller import Distiller, Targets
from safetensors.torch import load_file
from torch import Tensor

from . import ranks

Found = Mapping[str, Tensor]


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Callable[[str], list[Found]]:
    """What both ranks have found of a variant; all are trained by one pair of processes."""
    folder = tmp_path_factory.mktemp("ranks")
    done = subprocess.run(
        [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2",
         "--standalone", ranks.__file__, str(folder)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return lambda variant: [load_file(folder / f"{variant}-{r}.safetensors") for r in range(2)]


def one_process(
    variant: str, parts: Callable[[tuple[Tensor, dict[str, Tensor]]], list]
) -> tuple[list[list[float]], Found]:
    """Losses by step and part, and last gradients, of a process that does all parts itself.

    Every part has its own random numbers, and starts a step from the first one's buffers.
    """
    distiller: Distiller = ranks.build(variant)
    optimizer = torch.optim.SGD(distiller.parameters(), lr=ranks.RATE)
    random: dict[int, Tensor] = {}
    losses: list[list[float]] = []
    for step in range(ranks.STEPS):
        optimizer.zero_grad()
        own = parts(ranks.batch(step))
        before = copy.deepcopy(dict(distiller.named_buffers()))
        of_step = [0.0] * len(own)
        for number in reversed(range(len(own))):  # the first one last: its buffers stay
            for name, buffer in distiller.named_buffers():
                buffer.copy_(before[name])
            if step:
                torch.set_rng_state(random[number])
            else:
                torch.manual_seed(number)
            torch.set_default_dtype(torch.float64)  # as Fabric does, and draws depend on it
            try:
                pixels, targets = own[number]
                loss = distiller(pixels, Targets(targets)).loss
            finally:
                torch.set_default_dtype(torch.float32)
            (loss / len(own)).backward()
            random[number] = torch.get_rng_state()
            of_step[number] = float(loss.detach())
        losses.append(of_step)
        if step + 1 < ranks.STEPS:
            optimizer.step()
    found = {n: p.grad for n, p in distiller.named_parameters() if p.grad is not None}
    return losses, found


def halves(whole):
    return [ranks.half(whole, rank) for rank in range(2)]


def check(found: Found, expected: Found) -> None:
    assert set(found) - {"losses"} == set(expected)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("variant", ranks.VARIANTS)
def test_two_ranks_are_the_mean_of_their_parts(two_ranks, variant):
    """Each rank with its own draws and its own part of the batch, on rank 0's buffers."""
    losses, gradients = one_process(variant, halves)
    for rank, found in enumerate(two_ranks(variant)):
        check(found, gradients)
        assert found["losses"].tolist() == pytest.approx([own[rank] for own in losses], rel=1e-6)


@pytest.mark.parametrize("variant", ranks.VARIANTS)
def test_where_the_loss_is_a_mean_of_images_they_are_the_joined_batch(two_ranks, variant):
    """And the alignments whose losses are not, as their docstrings say, differ from it."""
    losses, gradients = one_process(variant, lambda whole: [whole])
    found = two_ranks(variant)
    if variant in ("inside", "constant"):
        check(found[0], gradients)
        means = (found[0]["losses"] + found[1]["losses"]) / 2
        assert means.tolist() == pytest.approx([own[0] for own in losses], rel=1e-6)
    else:
        with pytest.raises(AssertionError):
            check(found[0], gradients)
