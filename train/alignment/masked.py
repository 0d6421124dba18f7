"""Masked: descriptors and tokens of the image, and tokens of patches that the student misses."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor

from ..students import StudentOutput
from .base import Runs, StudentShape, Term
from .hidden_patches import HiddenPatches
from .regression import Regression
from .spaces import SpaceTarget
from .targets import Target


class Masked(Regression):
    """Three levels of targets: descriptor, all tokens, and the tokens behind a mask.

    The first two are `Regression`'s. In training the student sees each image a second time with a
    random part of its patches hidden and predicts the teachers' tokens of the whole image where it
    could not look:

        L_t = Regression's + mask_weight * sum_{s of t} the term of `HiddenPatches`

    The form of Proteus (Zhang et al. 2024, "Accessing Vision Foundation Models via ImageNet-1K",
    arXiv:2407.10366), which uses the mean squared error; here l is everybody's. It costs a second
    pass of the student. Evaluation and export see no mask.

    Args:
        mask_ratio: share of the cells that is hidden, between 0 and 1.
        mask_weight: weight of the hidden tokens' terms.
        hidden: width of the descriptor projectors' hidden layer.
        **options: those of `Alignment`.
    """

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
        dense = {name: spaces[name] for name in self.dense}
        self.hidden_patches = HiddenPatches(student, dense, ratio=mask_ratio, weight=mask_weight)

    def _required(self) -> list[str]:
        return list(self.spaces)

    def run_student(self, student: Runs, pixels: Tensor) -> StudentOutput:
        output = student(pixels)
        return self.hidden_patches.look(student, pixels, output) if self.training else output

    def terms(self, output: StudentOutput, targets: Mapping[str, Target]) -> Iterator[Term]:
        yield from super().terms(output, targets)
        yield from self.hidden_patches.terms(self, output, targets)
