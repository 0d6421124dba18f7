"""The student wrapper against timm's own forward."""

from __future__ import annotations

from importlib.resources import files

import pytest
import timm
import torch
from omegaconf import OmegaConf
from preceptor.errors import ConfigError
from preceptor.pixels import not_whole_patches
from preceptor.train.students import Student, build_student

SMALL = {
    "resnet10t": {"size": 64, "channels": [16, 16, 32, 32], "output_stride": 16},
    "vit_tiny_patch16_224": {"size": (32, 48), "patch_size": 8, "depth": 2, "embed_dim": 48},
    "convnext_atto": {"size": 64},
    "mobilenetv3_small_050": {"size": 64},
    "swin_tiny_patch4_window7_224": {"size": 56, "depths": [1, 1, 1, 1], "embed_dim": 24},
}


@pytest.mark.parametrize("name", SMALL)
def test_output_is_timms_own(name):
    torch.manual_seed(0)
    student = Student(name, **SMALL[name]).eval()
    height, width = student.size
    pixels = torch.randn(2, 3, height, width)
    output = student(pixels)
    features = student.model.forward_features(pixels)
    if features.ndim == 4:
        if features.shape[1] != student.token_dim:  # swin keeps channels last
            features = features.permute(0, 3, 1, 2)
        tokens = features.flatten(2).transpose(1, 2)
    else:
        tokens = features[:, student.model.num_prefix_tokens :]
    torch.testing.assert_close(output.tokens, tokens, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(output.pooled, student.model(pixels), rtol=1e-5, atol=1e-5)
    assert output.tokens.shape == (2, student.grid[0] * student.grid[1], student.token_dim)
    assert output.grid == student.grid
    assert output.pooled.shape == (2, student.pooled_dim)


def test_rows_of_the_grid_come_first():
    student = Student("vit_tiny_patch16_224", **SMALL["vit_tiny_patch16_224"])
    assert student.grid == (4, 6)


def test_same_seed_same_weights():
    config = {"model": "resnet10t", "size": 32, "options": {"channels": [8, 8, 8, 8]}}
    first, again, other = (build_student(config, seed) for seed in (1, 1, 2))
    for name, value in first.state_dict().items():
        assert torch.equal(value, again.state_dict()[name])
    assert not torch.equal(first.model.conv1[0].weight, other.model.conv1[0].weight)


def test_positions_are_not_decayed():
    student = Student("vit_tiny_patch16_224", **SMALL["vit_tiny_patch16_224"])
    names = dict(student.named_parameters())
    assert {"model.pos_embed", "model.cls_token"} <= student.no_weight_decay() & set(names)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("resnet10", {}, "did you mean resnet10t"),
        ("resnet10t", {"patch_size": 3}, "unexpected keyword argument 'patch_size'"),
        ("vit_tiny_patch16_224", {"size": 64, "img_size": 32, "depth": 1}, "64 x 64"),
        (
            "vit_tiny_patch16_224",
            {"size": (100, 64), "depth": 1},
            "student.size .* 100 x 64 pixels are no whole patches of 16 x 16; say 96 x 64 or 112 x",
        ),
        ("vit_tiny_patch16_224", {"size": 32, "depth": 1, "global_pool": ""}, "drop .*global_pool"),
        ("swin_tiny_patch4_window7_224", {"size": 58, "embed_dim": 24}, "say 56 x 56 or 60 x 60"),
    ],
)
def test_a_mistake_is_told(name, options, message):
    with pytest.raises(ConfigError, match=message):
        Student(name, **options)


def test_patches_that_overlap_or_pad_leave_nothing_out():
    assert Student("pvt_v2_b0", size=50).grid == (2, 2)
    assert not_whole_patches(timm.create_model("test_vit", dynamic_img_pad=True), (50, 50)) is None


@pytest.mark.parametrize(
    "entry", sorted((files("preceptor.configs") / "student").iterdir()), ids=lambda e: e.name
)
def test_every_student_of_the_configuration_exists(entry):
    config = OmegaConf.to_container(OmegaConf.create(entry.read_text()))
    assert set(config) == {"name", "model", "pretrained", "checkpoint", "size", "options"}
    assert entry.name == f"{config['name']}.yaml"
    assert timm.is_model(config["model"])
