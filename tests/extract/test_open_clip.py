"""Teachers against open_clip's own forward passes, with local checkpoints."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

import numpy as np
import open_clip
import pytest
import torch
from preceptor import contrastive
from preceptor.errors import PreceptorWarning, TeacherError
from preceptor.extract.teachers import load_teacher
from preceptor.tests.extract.random_networks import images, randomised
from torch import nn

CLIP = "ViT-test"


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> tuple[nn.Module, str]:
    """A small model of CLIP's architecture, known to open_clip, and its checkpoint."""
    folder = tmp_path_factory.mktemp("clip")
    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 64, "layers": 3, "width": 64, "patch_size": 16},
        "text_cfg": {
            "context_length": 8, "vocab_size": 100, "width": 64, "heads": 2, "layers": 1
        },
    }  # fmt: skip
    (folder / f"{CLIP}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder / f"{CLIP}.json")
    model = randomised(open_clip.create_model(CLIP))
    torch.save(model.state_dict(), folder / "clip.pt")
    return model, str(folder / "clip.pt")


def test_open_clip_spaces_equal_its_own_forward(clip: tuple[nn.Module, str]) -> None:
    model, path = clip
    spaces = {
        "patch": {},
        "embedding": {},
        "cls": {},
        "early": {"take": "tokens", "block": 0, "norm": False},
        "mean": {"block": 1},
    }
    teacher = load_teacher("t", f"open_clip:{CLIP}", checkpoint=path, spaces=spaces)
    pixels = images(teacher)
    found = teacher(pixels)
    seen: list[torch.Tensor] = []
    for block in model.visual.transformer.resblocks:
        block.register_forward_hook(lambda _module, _inputs, output: seen.append(output))
    model.visual.output_tokens = True
    with torch.no_grad():
        _, tokens = model.visual(pixels)
        embedding = model.encode_image(pixels)
        embedding = embedding[0] if isinstance(embedding, tuple) else embedding
        mean = model.visual.ln_post(seen[1])[:, 1:].mean(1)
        cls = model.visual.ln_post(seen[2])[:, 0]
    assert torch.allclose(found["patch"], tokens, atol=1e-5)
    assert torch.allclose(found["embedding"][:, 0], embedding, atol=1e-5)
    assert torch.allclose(found["cls"][:, 0], cls, atol=1e-5)
    assert torch.allclose(found["early"], seen[0][:, 1:], atol=1e-5)
    assert torch.allclose(found["mean"][:, 0], mean, atol=1e-5)
    assert [space.grid for space in teacher.spaces] == [(4, 4), None, None, (4, 4), None]
    assert teacher.preprocessing.size == (64, 64)
    np.testing.assert_allclose(teacher.preprocessing.mean, open_clip.OPENAI_DATASET_MEAN)
    np.testing.assert_allclose(teacher.preprocessing.std, open_clip.OPENAI_DATASET_STD)
    assert teacher.preprocessing.interpolation == "bicubic"


def test_open_clip_size_and_errors(clip: tuple[nn.Module, str], tmp_path: Path) -> None:
    _, path = clip
    teacher = load_teacher("t", f"open_clip:{CLIP}", checkpoint=path, size=96)
    assert teacher.spaces[0].grid == (6, 6)
    assert teacher.preprocessing.size == (96, 96)
    resized = open_clip.create_model(CLIP, pretrained=path, force_image_size=96).eval()
    pixels = images(teacher)
    with torch.no_grad():
        expected = resized.encode_image(pixels)
    assert torch.allclose(teacher(pixels)["embedding"][:, 0], expected, atol=1e-5)
    torch.save({"x": torch.zeros(1)}, tmp_path / "other.pt")
    with pytest.raises(TeacherError, match=rf"other\.pt does not fit open_clip:{CLIP}"):
        load_teacher("t", f"open_clip:{CLIP}", checkpoint=str(tmp_path / "other.pt"))


def test_open_clip_resnet_tower(tmp_path: Path) -> None:
    config = {
        "embed_dim": 32,
        "vision_cfg": {"image_size": 64, "layers": [1, 1, 1, 1], "width": 8},
        "text_cfg": {
            "context_length": 8, "vocab_size": 100, "width": 64, "heads": 2, "layers": 1
        },
    }  # fmt: skip
    (tmp_path / "RN-test.json").write_text(json.dumps(config))
    open_clip.add_model_config(tmp_path / "RN-test.json")
    model = randomised(open_clip.create_model("RN-test"))
    torch.save(model.state_dict(), tmp_path / "rn.pt")
    spaces = {"map": {}, "stem": {"take": "tokens", "block": 0}, "embedding": {}}
    path = str(tmp_path / "rn.pt")
    teacher = load_teacher("t", "open_clip:RN-test", checkpoint=path, spaces=spaces, size=64)
    with pytest.raises(TeacherError, match="RN-test takes squares, not 64 x 96 pixels"):
        load_teacher("t", "open_clip:RN-test", checkpoint=path, size=(64, 96))
    pixels = images(teacher)
    found = teacher(pixels)
    visual = model.visual
    with torch.no_grad():
        stem = visual.stem(pixels)
        final = visual.layer4(visual.layer3(visual.layer2(visual.layer1(stem))))
        embedding = model.encode_image(pixels)
    assert torch.allclose(found["map"], final.flatten(2).transpose(1, 2), atol=1e-5)
    assert torch.allclose(found["stem"], stem.flatten(2).transpose(1, 2), atol=1e-5)
    assert torch.allclose(found["embedding"][:, 0], embedding, atol=1e-5)


def test_weights_without_a_tag_have_what_all_tags_of_the_architecture_have() -> None:
    """A checkpoint of SigLIP would be shown images as OpenAI's are normalised."""
    for name in ("ViT-B-16-SigLIP", "PE-Core-T-16-384"):
        common = contrastive._common(name)
        assert common is not None
        assert common["mean"] == (0.5, 0.5, 0.5)
    for name in ("RN50", "ViT-H-14-quickgelu"):  # tags differ in what a view is, which views say
        common = contrastive._common(name)
        assert common is not None
        assert common["quick_gelu"] is True
    assert contrastive._common("ViT-B-32") is None  # OpenAI's has another activation
    assert contrastive._common(CLIP) == {}


def test_weights_without_a_tag_that_may_be_of_either_kind_are_told(
    monkeypatch: pytest.MonkeyPatch, clip: tuple[nn.Module, str]
) -> None:
    """OpenAI's would silently run with another activation than they were trained with."""
    path = clip[1]
    tags = {"openai": {"quick_gelu": True}, "laion2b": {"quick_gelu": False}}
    monkeypatch.setattr(contrastive, "list_pretrained_tags_by_model", lambda _: list(tags))
    monkeypatch.setattr(contrastive, "get_pretrained_cfg", lambda _, tag: tags[tag])
    told = rf"teacher t: weights of {CLIP} differ .* source=open_clip:{CLIP}/openai"
    with pytest.warns(PreceptorWarning, match=told):
        load_teacher("t", f"open_clip:{CLIP}", checkpoint=path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PreceptorWarning)
        load_teacher("t", f"open_clip:{CLIP}/openai", checkpoint=path)
