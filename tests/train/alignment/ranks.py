"""Two training steps of several alignments, on this rank's part of the batch.

python -m torch.distributed.run --nproc-per-node=2 ranks.py FOLDER
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from preceptor.engine import launch
from preceptor.train.alignment import build_alignment
from preceptor.train.alignment.base import Space
from preceptor.train.distiller import Distiller, Targets
from preceptor.train.students import build_student
from safetensors.torch import save_file
from torch import Tensor

SPACES = {
    "cnn/map": Space("cnn", 4, 12, (2, 2)),
    "cnn/pool": Space("cnn", 1, 12, None),
    "vit/patch": Space("vit", 9, 8, (3, 3)),
    "vit/cls": Space("vit", 1, 8, None),
}
INSIDE: Mapping[str, Any] = {
    "name": "model_token", "width": 16, "heads": 2, "write_back": 2, "teacher_stream": 0.0
}  # fmt: skip
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "inside": INSIDE,
    "constant": {**INSIDE, "intra": False, "layers": 0},
    "relational": {"name": "relational", "queue": 6},
    "normalised": {"name": "regression", "balance": "normalised"},
    "drop": {"name": "regression", "balance": "drop"},
    "pcgrad": {"name": "regression", "balance": "pcgrad"},
}
STEPS, BATCH, RATE = 2, 8, 0.5
"""Steps, images of both ranks together, and learning rate."""


def build(variant: str) -> Distiller:
    """Student and alignment in float64; nothing starts at zero, so that every part takes part."""
    student = build_student(
        {
            "name": "vit",
            "model": "vit_tiny_patch16_224",
            "pretrained": False,
            "checkpoint": None,
            "size": 32,
            "options": {"patch_size": 8, "depth": 2, "embed_dim": 16, "num_heads": 2},
        },
        0,
    )
    distiller = Distiller(student, build_alignment(VARIANTS[variant], student, SPACES)).double()
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in distiller.parameters():
            noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            parameter += 0.1 * noise
    return distiller.train()


def batch(step: int) -> tuple[Tensor, dict[str, Tensor]]:
    """Pixels and targets of both ranks together; the halves differ much."""
    generator = torch.Generator().manual_seed(100 + step)

    def drawn(*shape: int) -> Tensor:
        return torch.randn(BATCH, *shape, generator=generator, dtype=torch.float64)

    pixels = drawn(3, 32, 32)
    pixels[: BATCH // 2] += 1
    return pixels, {name: drawn(space.tokens, space.dim) for name, space in SPACES.items()}


def half(whole: tuple[Tensor, dict[str, Tensor]], rank: int) -> tuple[Tensor, dict[str, Tensor]]:
    """The part of one rank."""
    own = slice(rank * BATCH // 2, (rank + 1) * BATCH // 2)
    pixels, targets = whole
    return pixels[own], {name: target[own] for name, target in targets.items()}


def main(folder: Path) -> None:
    """Train, and leave the losses of this rank, its last gradients and its weights."""
    config = OmegaConf.create((files("preceptor.configs") / "engine" / "cpu.yaml").read_text())
    config.precision = "64-true"
    fabric = launch(config)  # type: ignore[arg-type]
    for variant in VARIANTS:
        distiller = build(variant)
        optimizer = torch.optim.SGD(distiller.parameters(), lr=RATE)
        module, optimizer = fabric.setup(distiller, optimizer)
        torch.manual_seed(fabric.global_rank)
        losses = []
        for step in range(STEPS):
            optimizer.zero_grad()
            pixels, targets = half(batch(step), fabric.global_rank)
            loss = module(pixels, Targets.of(targets, fabric)).loss
            losses.append(loss.detach())
            fabric.backward(loss)
            if step + 1 < STEPS:
                optimizer.step()
        found = {name: p.grad for name, p in distiller.named_parameters() if p.grad is not None}
        found["losses"] = torch.stack(losses)
        save_file(found, folder / f"{variant}-{fabric.global_rank}.safetensors")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
