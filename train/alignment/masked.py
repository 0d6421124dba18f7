"""Masked: descriptors and tokens of the image, and tokens of patches that the student misses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ..students import StudentOutput
from .base import Runs, StudentShape, Term, token_loss
from .heads import dense_projector
from .regression import Regression
from .spaces import SpaceTarget, module_key
from .targets import Target


class Masked(Regression):
    """Three levels of targets: descriptor, all tokens, and the tokens behind a mask.

    The first two are `Regression`'s. In training the student sees each image a second time with a
    random part of its patches hidden, S' = student(masked image) [B, N, C], and predicts the
    teacher's tokens of the whole image where it could not look:

        L_t = Regression's + mask_weight * sum_{s of t} mean_{n hidden} l(V_s LN S'_n, x_sn)

    with projectors V_s of their own. Exactly ``round(mask_ratio * N)`` of the N cells of the
    student's grid are hidden in each image, drawn from torch's generator. A backbone that is a
    sequence of patch tokens is given a learnt token in the place of a hidden patch's embedding; the
    others (CNNs, hierarchical transformers) are given the image's cells in the mean colour: this
    project's adaptation. Where the loss is taken on the teacher's grid, a teacher's token
    counts if more than half of its resampling window is hidden.

    The form of Proteus (Zhang et al. 2024, "Accessing Vision Foundation Models via ImageNet-1K",
    arXiv:2407.10366), which uses the mean squared error; here l is everybody's. It costs a second
    pass of the student. Evaluation and export see no mask.

    Args:
        mask_ratio: share of the cells that is hidden, between 0 and 1.
        mask_weight: weight of the hidden tokens' terms.
        hidden: width of the descriptor projectors' hidden layer.
        **options: those of `Alignment`.
    """

    undecayed = ("mask_token",)

    def __init__(
        self,
        student: StudentShape,
        spaces: Mapping[str, SpaceTarget],
        *,
        mask_ratio: float = 0.4,
        mask_weight: float = 0.3,
        hidden: int = 512,
        **options: Any,
    ) -> None:
        super().__init__(student, spaces, hidden=hidden, **options)
        count = student.grid[0] * student.grid[1]
        self.hidden_cells = round(mask_ratio * count) if 0 < mask_ratio < 1 else 0
        if not 0 < self.hidden_cells < count:
            raise ConfigError(
                f"align.mask_ratio={mask_ratio}: of the student's {student.grid[0]} x "
                f"{student.grid[1]} cells some must be hidden and some not"
            )
        if not 0 < mask_weight < float("inf"):
            raise ConfigError(f"align.mask_weight={mask_weight}: must be positive")
        if not self.dense:
            raise ConfigError(
                f"align: masked predicts hidden tokens, and none of {', '.join(spaces)} has tokens "
                "on a grid; name such a space in align.spaces or choose another alignment"
            )
        self.mask_weight = mask_weight
        self.mask_token = None
        if student.patch_dim is not None:
            self.mask_token = nn.Parameter(torch.empty(student.patch_dim))
            nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.mask_projectors = nn.ModuleDict(
            {
                module_key(name): dense_projector(student.token_dim, spaces[name].dim)
                for name in self.dense
            }
        )

    def _required(self) -> list[str]:
        return list(self.spaces)

    def run_student(self, student: Runs, pixels: Tensor) -> StudentOutput:
        output = student(pixels)
        if not self.training:
            return output
        mask = self.draw(len(pixels), pixels.device)
        return replace(
            output, masked=student(pixels, mask=mask, mask_token=self.mask_token), mask=mask
        )

    def draw(self, batch: int, device: torch.device) -> Tensor:
        """Random masks [batch, N] bool over the student's grid, each with as many hidden cells."""
        count = self.student_grid[0] * self.student_grid[1]
        order = torch.rand(batch, count, device=device).argsort(1)
        return order < self.hidden_cells

    def terms(self, output: StudentOutput, targets: Mapping[str, Target]) -> Iterator[Term]:
        yield from super().terms(output, targets)
        if output.masked is None or output.mask is None:
            return
        for space in self.dense:
            said = self.mask_projectors[module_key(space)](output.masked.tokens)
            prediction, target = self.matched(space, said, targets[space])
            mask = output.mask
            if self.match == "teacher":
                cells = self.grids[module_key(space)](mask.unsqueeze(-1).float())
                mask = cells.squeeze(-1) > 0.5
            loss = token_loss(prediction, target, mask)
            yield Term(f"{space}:masked", self.spaces[space].teacher, self.mask_weight, loss)
