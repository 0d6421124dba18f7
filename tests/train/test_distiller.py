"""What a training step hands to the alignment, and what precision may not change of it."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from preceptor.train import loop
from preceptor.train.alignment import Codes, hidden_patches
from preceptor.train.alignment.base import Alignment
from preceptor.train.alignment.grids import GridResample
from preceptor.train.alignment.hidden_patches import HiddenPatches


@pytest.fixture
def targets_seen(monkeypatch):
    """The targets of every step: as they are handed to the module, and as alignments get them."""
    given, got = [], []
    to_device, forward = loop.to_device, Alignment.forward

    def hand_over(batch, device):
        pixels, targets = to_device(batch, device)
        given.append(targets)
        return pixels, targets

    def take(self, output, targets):
        got.append(targets)
        return forward(self, output, targets)

    monkeypatch.setattr(loop, "to_device", hand_over)
    monkeypatch.setattr(Alignment, "forward", take)
    return given, got


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_targets_are_not_rounded_to_the_precision_of_training(
    train_config, targets_seen, full_bed, precision
):
    """Scales of int8 codes keep their 11 bits, crops of the teachers' grids their 24."""
    images = (f"cache={full_bed.cache}", f"data.shards={full_bed.shards}")
    crops = "recipe.crop={scale: [0.35, 1.0]}"
    steps = ("recipe.steps=2", f"engine.precision={precision}", "align=regression")
    loop.train(train_config(*images, crops, *steps))
    given, got = targets_seen
    assert len(given) == len(got) == 2
    kinds = set()
    for before, after in zip(given, got, strict=True):
        assert before.keys() == after.keys()
        for name, target in before.items():
            kinds.add(type(target))
            if isinstance(target, Codes):
                assert torch.equal(target.scales.float(), after[name].scales.float())
                assert torch.equal(target.codes, after[name].codes)
            else:
                assert after[name].dtype == torch.float32
                assert torch.equal(target, after[name])
    assert kinds == {Codes, torch.Tensor}


def test_autocast_hides_the_same_tokens(monkeypatch):
    """In bfloat16 a cell that is half hidden lands on either side of the half."""
    seen = []

    def token_loss(prediction, target, mask):
        seen.append(mask)
        return prediction.sum()

    monkeypatch.setattr(hidden_patches, "token_loss", token_loss)
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(64, 49, generator=generator).argsort(1) < 20
    part = SimpleNamespace(projectors={"t/p": torch.nn.Identity()}, weight=1.0)
    alignment = SimpleNamespace(
        dense=["t/p"],
        match="teacher",
        grids={"t/p": GridResample((7, 7), (16, 16))},
        spaces={"t/p": SimpleNamespace(teacher="t")},
        matched=lambda space, said, target: (said, target),
    )
    output = SimpleNamespace(masked=SimpleNamespace(tokens=torch.zeros(64, 49, 2)), mask=mask)
    monkeypatch.setattr(hidden_patches, "module_key", lambda name: name)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            list(HiddenPatches.terms(part, alignment, output, {"t/p": torch.zeros(64, 256, 2)}))
    assert seen[0].float().mean() > 0.2
    assert torch.equal(*seen)
