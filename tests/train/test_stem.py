"""Weights of another normalisation, against timm's own model on pixels of its own normalisation."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from preceptor.train.stem import expect
from preceptor.train.students import IMAGENET_MEAN, IMAGENET_STD, Student
from safetensors.torch import save_file

SIZE = (64, 96)
TINY = {"depth": 2, "embed_dim": 48, "num_heads": 2}
EXACT: dict[str, dict[str, Any]] = {
    "vit_tiny_patch16_224.augreg_in21k": TINY,
    "vit_base_patch16_clip_224.openai": TINY,  # no bias: the shift goes to the positions
    "vit_base_patch16_siglip_224.webli": TINY,
    "eva02_base_patch16_clip_224.merged2b": TINY,
    "vit_pe_core_tiny_patch16_384.fb": TINY,  # no bias, and classes of its own
    "beit_base_patch16_224.in22k_ft_in22k": TINY,
    "convnext_base.clip_laion2b": {"depths": [1, 1, 1, 1], "dims": [8, 16, 16, 16]},
}
INEXACT = {
    "efficientnet_b0.ra4_e3600_r224_in1k": {},  # pads
    "tf_efficientnet_b0.ap_in1k": {},  # pads by itself, with an attribute that says it does not
    "resnetv2_50x1_bit.goog_in21k": {},  # standardises its weights
}


def moments(name: str) -> tuple[torch.Tensor, torch.Tensor]:
    cfg = timm.models.get_pretrained_cfg(name)
    assert cfg.mean != IMAGENET_MEAN
    return torch.tensor(cfg.mean, dtype=torch.float64), torch.tensor(cfg.std, dtype=torch.float64)


def normalised(pixels: torch.Tensor, mean: Any, std: Any) -> torch.Tensor:
    mean, std = (torch.as_tensor(part, dtype=pixels.dtype).view(3, 1, 1) for part in (mean, std))
    return (pixels - mean) / std


def made(name: str, options: dict[str, Any]) -> Any:
    """timm's model of a tag with weights of which none is at its neutral value."""
    torch.manual_seed(0)
    options = {key: tuple(v) if isinstance(v, list) else v for key, v in options.items()}
    if timm.models.get_pretrained_cfg(name).fixed_input_size:
        options["img_size"] = SIZE
    model = timm.create_model(name, num_classes=0, **options).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


@pytest.mark.parametrize("name", EXACT)
def test_the_difference_is_put_into_the_first_layer_exactly(name: str, capsys: Any) -> None:
    theirs = made(name, EXACT[name]).double()
    ours = copy.deepcopy(theirs)
    expect(
        ours, IMAGENET_MEAN, IMAGENET_STD, name=name, checkpoint=None, run="model.json", size=SIZE
    )
    pixels = torch.rand(2, 3, *SIZE, dtype=torch.float64)
    with torch.no_grad():
        expected = theirs.forward_features(normalised(pixels, *moments(name)))
        found = ours.forward_features(normalised(pixels, IMAGENET_MEAN, IMAGENET_STD))
        before = theirs.forward_features(normalised(pixels, IMAGENET_MEAN, IMAGENET_STD))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    assert (before - expected).abs().max() > 1e-3  # which tells them apart
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", INEXACT)
def test_what_cannot_be_put_there_is_told_and_left_alone(name: str, capsys: Any) -> None:
    model = made(name, INEXACT[name])
    before = copy.deepcopy(model.state_dict())
    expect(
        model, IMAGENET_MEAN, IMAGENET_STD, name=name, checkpoint=None, run="model.json", size=SIZE
    )
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    told = capsys.readouterr().err
    assert f"weights that student {name} starts from expect pixels of mean [0.5, 0.5, 0.5]" in told
    assert "[0.229, 0.224, 0.225]" in told


@pytest.mark.parametrize("how", ["pretrained", "tag", "config beside", "own export"])
def test_a_student_sees_what_its_weights_saw(how: str, tmp_path: Path, capsys: Any) -> None:
    name = "vit_tiny_patch16_224.augreg_in21k"
    theirs = made(name, TINY)
    path = tmp_path / "model.safetensors"
    save_file(theirs.state_dict(), path)
    options: dict[str, Any] = {**TINY, "size": SIZE}
    mean, std = moments(name)
    if how == "pretrained":
        overlay = {"file": str(path), "num_classes": 0, "custom_load": False}
        options |= {"pretrained": True, "pretrained_cfg_overlay": overlay}
    else:
        options["checkpoint"] = str(path)
    if how in ("config beside", "own export"):
        name = name.split(".")[0]
        if how == "own export":
            mean, std = (
                torch.tensor(part, dtype=torch.float64) for part in (IMAGENET_MEAN, IMAGENET_STD)
            )
        cfg = {"mean": mean.tolist(), "std": std.tolist()}
        (tmp_path / "config.json").write_text(json.dumps({"pretrained_cfg": cfg}))
    student = Student(name, **options).eval()
    pixels = torch.rand(2, 3, *SIZE)
    with torch.no_grad():
        expected = theirs(normalised(pixels, mean, std))
        found = student(normalised(pixels, IMAGENET_MEAN, IMAGENET_STD)).pooled
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("of_a_run", [False, True])
def test_a_file_of_unknown_normalisation_is_taken_as_it_is(
    of_a_run: bool, tmp_path: Path, capsys: Any
) -> None:
    theirs = made("vit_tiny_patch16_224.augreg_in21k", TINY)
    path = tmp_path / "student.safetensors"
    save_file(theirs.state_dict(), path)
    if of_a_run:
        (tmp_path / "model.json").write_text("{}")
    student = Student("vit_tiny_patch16_224", size=SIZE, checkpoint=str(path), **TINY)
    for key, value in student.model.state_dict().items():
        assert torch.equal(value, theirs.state_dict()[key])
    told = capsys.readouterr().err
    assert told == "" if of_a_run else "model with its tag, student.model=NAME.TAG" in told
