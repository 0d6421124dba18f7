"""Tokens, grid and descriptor of many kinds of backbone, on inputs that are not square."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from preceptor.errors import ConfigError
from preceptor.train.alignment.grids import GridResample
from preceptor.train.students import Student, build_student
from safetensors.torch import save_file
from scipy.optimize import linear_sum_assignment

WIDE = (96, 160)
FAMILIES: dict[str, dict[str, Any]] = {
    # convolutions
    "resnet10t": {"channels": [16, 16, 32, 32]},
    "test_convnext": {},
    "test_efficientnet": {},
    "test_byobnet": {},
    "test_nfnet": {},
    "mobilenetv3_small_050": {},
    "regnetx_002": {},
    "regnety_002": {},
    "edgenext_xx_small": {},
    "mambaout_femto": {},
    # transformers: class tokens, two of them, registers, rotary positions, windows
    "test_vit": {},
    "test_vit3": {},
    "deit_tiny_distilled_patch16_224": {"depth": 2, "embed_dim": 48},
    "vit_small_patch14_reg4_dinov2": {
        "size": (56, 84), "depth": 2, "embed_dim": 48, "num_heads": 2,
    },
    "eva02_tiny_patch14_224": {"size": (56, 84), "depth": 2},
    "swin_tiny_patch4_window7_224": {"depths": [1, 1, 1, 1], "embed_dim": 24},
    "pvt_v2_b0": {},
    # both
    "vit_tiny_r_s16_p8_224": {"depth": 2, "embed_dim": 48},
    "coatnet_pico_rw_224": {},
    "maxvit_rmlp_pico_rw_256": {},
    "efficientformerv2_s0": {},
}  # fmt: skip
GLOBAL = {  # every token of theirs sees all of the image: where they look tells nothing
    "fastvit_t8": {},
    "mobilevit_xxs": {},
    "repvit_m0_9": {},
    "mobilenetv4_conv_small_035": {},
    "tiny_vit_5m_224": {},
    "hiera_tiny_224": {"size": (224, 224), "stages": [1, 1, 1, 1]},
}


def made(name: str) -> Student:
    torch.manual_seed(0)
    return Student(name, **{"size": WIDE, **FAMILIES.get(name, {}), **GLOBAL.get(name, {})}).eval()


@pytest.mark.parametrize("name", FAMILIES)
def test_every_token_looks_at_its_place_in_the_image(name: str) -> None:
    """Each cell of the image is painted over alone: the change it makes to each token, freed from
    how much a cell does to all and how much a token feels of all, singles out its own token."""
    student = made(name)
    (rows, columns), (height, width) = student.grid, student.size
    cells = [(i, j) for i in range(rows) for j in range(columns)]
    random = torch.Generator().manual_seed(1)
    change = torch.zeros(len(cells), len(cells))
    with torch.no_grad():
        for _ in range(3):
            image = torch.randn(1, 3, height, width, generator=random) * 0.5
            painted = image.repeat(len(cells), 1, 1, 1)
            for number, (i, j) in enumerate(cells):
                y = slice(i * height // rows, (i + 1) * height // rows)
                x = slice(j * width // columns, (j + 1) * width // columns)
                cell = painted[number, :, y, x]
                cell.copy_(torch.randn(cell.shape, generator=random) * 1.5)
            moved = (student(painted).tokens - student(image).tokens).norm(dim=-1)
            change += (moved + 1e-12).log()
    change -= change.mean(0, keepdim=True)
    change -= change.mean(1, keepdim=True)
    _, owner = linear_sum_assignment(-change.numpy())
    assert owner.tolist() == list(range(len(cells)))


@pytest.mark.parametrize("name", [*FAMILIES, *GLOBAL])
def test_descriptor_is_the_heads_and_gradients_reach_the_first_weights(name: str) -> None:
    student = made(name)
    pixels = torch.randn(2, 3, *student.size)
    output = student(pixels)
    with torch.no_grad():
        torch.testing.assert_close(output.pooled, student.model(pixels), rtol=1e-5, atol=1e-5)
    assert output.tokens.shape == (2, student.grid[0] * student.grid[1], student.token_dim)
    if student.size == WIDE:
        assert student.grid[0] < student.grid[1]  # rows first
    first = next(p for n, p in student.model.named_parameters() if p.ndim == 4)
    (gradient,) = torch.autograd.grad(output.tokens.square().sum(), first)
    assert gradient.abs().sum() > 0
    laid_out = student.to(memory_format=torch.channels_last)
    again = laid_out(pixels.contiguous(memory_format=torch.channels_last))
    torch.testing.assert_close(again.tokens, output.tokens, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("name", ["resnet10t", "test_vit", "vit_small_patch14_reg4_dinov2"])
def test_a_compiled_student_gives_the_same(name: str) -> None:
    student = made(name)
    pixels = torch.randn(2, 3, *student.size)
    with torch.no_grad():
        plain = student(pixels)
        student.compile(backend="aot_eager")
        compiled = student(pixels)
    torch.testing.assert_close(compiled.tokens, plain.tokens, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(compiled.pooled, plain.pooled, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("pair", [((7, 7), (16, 16)), ((3, 5), (6, 10)), ((5, 3), (4, 9))])
@pytest.mark.parametrize("back", [False, True])
def test_grids_meet_in_both_directions(pair: Any, back: bool) -> None:
    """Against a triangle filter in float64 NumPy, an axis at a time."""
    source, target = reversed(pair) if back else pair

    def axis(count: int, wanted: int) -> np.ndarray:
        ratio = count / wanted
        distance = np.arange(count) + 0.5 - (np.arange(wanted)[:, None] + 0.5) * ratio
        weights = np.maximum(0, 1 - abs(distance) / max(ratio, 1))
        return np.asarray(weights / weights.sum(1, keepdims=True))

    field = np.random.default_rng(0).normal(size=(*source, 3))
    rows, columns = (axis(a, b) for a, b in zip(source, target, strict=True))
    expected = np.einsum("yi,xj,ijd->yxd", rows, columns, field).reshape(-1, 3)
    tokens = torch.from_numpy(field.reshape(1, -1, 3))
    found = GridResample(source, target)(tokens)[0].numpy()
    np.testing.assert_allclose(found, expected, atol=2e-6)


# -- weights to start from -------------------------------------------------------------------------


def test_a_checkpoint_with_another_classifier_and_size_is_taken(tmp_path: Path) -> None:
    whole = timm.create_model("test_vit", num_classes=7, img_size=160)
    save_file(whole.state_dict(), tmp_path / "w.safetensors")
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in whole.state_dict().items()}},
        tmp_path / "w.pth",
    )
    for file in ("w.safetensors", "w.pth"):
        config = {"model": "test_vit", "size": 64, "checkpoint": str(tmp_path / file)}
        mine = dict(build_student(config, 0).model.state_dict())
        for name, value in whole.state_dict().items():
            if not name.startswith(("head.", "pos_embed")):
                assert torch.equal(mine[name], value), name
        assert mine["pos_embed"].shape == (1, 17, 64)


def test_a_checkpoint_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    with pytest.raises(ConfigError, match=r"w\.safetensors is no file"):
        Student("test_vit", checkpoint=str(path), size=64)
    save_file(timm.create_model("test_resnet").state_dict(), path)
    with pytest.raises(ConfigError, match=r"checkpoint=.* does not fit it"):
        Student("test_convnext", checkpoint=str(path), size=64)
    state = timm.create_model("test_vit", num_classes=0).state_dict()
    state["norm.weight"] = state["norm.weight"][:7]
    state["mine"] = state.pop("norm.bias")
    save_file({key: value.clone() for key, value in state.items()}, tmp_path / "v.safetensors")
    with pytest.raises(ConfigError) as caught:
        Student("test_vit", checkpoint=str(tmp_path / "v.safetensors"), size=160)
    assert "it lacks 1 tensor(s) (norm.bias)" in str(caught.value)
    assert "it has, and the network not, 1 tensor(s) (mine)" in str(caught.value)
    assert "sizes differ of 1 tensor(s) (norm.weight ([7] there, [64] here))" in str(caught.value)
    with pytest.raises(ConfigError, match="pretrained=true or a checkpoint, not both"):
        Student("test_resnet", checkpoint=str(path), pretrained=True, size=64)
    torch.save({"call": print}, tmp_path / "w.pth")
    with pytest.raises(ConfigError, match="holds more than tensors"):
        Student("test_resnet", checkpoint=str(tmp_path / "w.pth"), size=64)


def test_tokens_that_are_dropped_in_training_are_refused_at_once() -> None:
    with pytest.raises(ConfigError, match="patch_drop_rate of vit_tiny_patch16_224: tokens that"):
        Student("vit_tiny_patch16_224", size=32, patch_size=8, depth=1, patch_drop_rate=0.5)


def test_without_a_hub_the_way_out_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ConfigError,
        match=r"from the local cache .* student\.checkpoint to a local",
    ):
        Student("test_resnet", pretrained=True, size=64)
