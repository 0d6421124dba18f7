"""What all runs of a comparison share."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from .bed import Bed

PRECISIONS = ("bf16-mixed", "32-true")
PRECISION = PRECISIONS[0]
"""What students are trained in on a GPU; a CPU with bfloat16 products is faster by it too."""


@dataclass(frozen=True)
class Plan:
    """What all runs of a comparison share.

    Attributes:
        bed: the test bed.
        out: folder of the runs.
        steps: optimiser steps of every run.
        store: of the pool, that students learn from.
        shards: its images.
        precision: of the training, as `engine.precision` names it.
        options: of `preceptor train`, for every run, over what its variant says.
        device: where students are trained and looked at, cpu or cuda.
    """

    bed: Bed
    out: Path
    steps: int
    store: Path
    shards: str
    precision: str = PRECISION
    options: tuple[str, ...] = ()
    device: str = "cpu"

    def folder(self, student: str, name: str, seed: int) -> Path:
        return self.out / student / name / f"s{seed}"

    @property
    def place(self) -> torch.device:
        return torch.device(self.device)

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Where students are trained. PyTorch's fused attention for CPUs (2.14) takes five times as
        long backwards in bfloat16 as in float32, and eight times as long as the plain one."""
        with nullcontext() if self.place.type == "cuda" else sdpa_kernel(SDPBackend.MATH):
            yield
