"""A second look at each image with patches hidden: what is predicted where the student is blind."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from ...errors import ConfigError
from ..students import StudentOutput
from .base import Alignment, StudentShape, Term, token_loss
from .heads import dense_projector
from .spaces import SpaceTarget, module_key
from .targets import Target


class HiddenPatches(nn.Module):
    """The terms of an alignment whose student sees each image a second time, in part.

    With S' [B, N, C] the student's tokens of the image with some of its cells hidden, each dense
    space s has one term more, weighted by `weight`:

        mean_{n hidden} l(V_s LN S'_n, x_sn)

    where x_s are the teacher's tokens of the whole image and V_s are projectors of their own.
    Exactly ``round(ratio * N)`` of the N cells of the student's grid are hidden in each image,
    drawn from torch's generator. A backbone that is a sequence of patch tokens is given a learnt
    token in the place of a hidden patch's embedding; the others (CNNs, hierarchical transformers)
    are given the image's cells in the mean colour: this project's adaptation. Where the loss is
    taken on the teacher's grid, a teacher's token counts if more than half of its resampling window
    is hidden: on a grid coarser than the student's fewer do than `ratio`, and none on a grid of one
    token unless more than half of the image is hidden; the term is then 0.

    The third level of targets of Proteus (Zhang et al. 2024, arXiv:2407.10366).

    Args:
        student: the widths and the grid of the student.
        spaces: what the store holds of each dense space.
        ratio: share of the cells that is hidden, between 0 and 1.
        weight: of the terms.
    """

    undecayed = ("mask_token",)

    def __init__(
        self,
        student: StudentShape,
        spaces: Mapping[str, SpaceTarget],
        *,
        ratio: float,
        weight: float,
    ) -> None:
        super().__init__()
        self.count = student.grid[0] * student.grid[1]
        self.hidden = round(ratio * self.count) if 0 < ratio < 1 else 0
        if not 0 < self.hidden < self.count:
            raise ConfigError(
                f"align.mask_ratio={ratio}: of the student's {student.grid[0]} x "
                f"{student.grid[1]} cells some must be hidden and some not"
            )
        if not 0 < weight < float("inf"):
            raise ConfigError(f"align.mask_weight={weight}: must be positive")
        if not spaces:
            raise ConfigError(
                "align: hidden tokens are to be predicted, and none of the spaces has tokens on a "
                "grid; name such a space in align.spaces or choose another alignment"
            )
        self.weight = weight
        self.mask_token = None
        if student.patch_dim is not None:
            self.mask_token = nn.Parameter(torch.empty(student.patch_dim))
            nn.init.trunc_normal_(self.mask_token, std=0.02)
        self.projectors = nn.ModuleDict(
            {
                module_key(name): dense_projector(student.token_dim, space.dim)
                for name, space in spaces.items()
            }
        )

    def look(
        self, run: Callable[..., StudentOutput], pixels: Tensor, output: StudentOutput
    ) -> StudentOutput:
        """The output with that of the same images, part of them hidden, beside it.

        Args:
            run: the student, as the first look ran it; it takes `mask` and `mask_token`.
        """
        mask = self.draw(len(pixels), pixels.device)
        masked = run(pixels, mask=mask, mask_token=self.mask_token)
        return replace(output, masked=masked, mask=mask)

    def draw(self, batch: int, device: torch.device) -> Tensor:
        """Random masks [batch, N] bool over the student's grid, each with as many hidden cells."""
        order = torch.rand(batch, self.count, device=device).argsort(1)
        return order < self.hidden

    def terms(
        self, alignment: Alignment, output: StudentOutput, targets: Mapping[str, Target]
    ) -> Iterator[Term]:
        """The terms of all dense spaces; none for an output without a second look."""
        if output.masked is None or output.mask is None:
            return
        for space in alignment.dense:
            said = self.projectors[module_key(space)](output.masked.tokens)
            prediction, target = alignment.matched(space, said, targets[space])
            mask = output.mask
            if alignment.match == "teacher":
                with torch.autocast(mask.device.type, enabled=False):  # it would round the halves
                    cells = alignment.grids[module_key(space)](mask.unsqueeze(-1).float())
                mask = cells.squeeze(-1) > 0.5
            loss = token_loss(prediction, target, mask)
            yield Term(f"{space}:masked", alignment.spaces[space].teacher, self.weight, loss)
