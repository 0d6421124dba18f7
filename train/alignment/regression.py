"""Regression: every space is predicted on its own, by its own projector."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from ..students import StudentOutput
from .base import Alignment, Predictions, StudentShape
from .heads import dense_projector, descriptor_mlp
from .spaces import SpaceTarget, module_key


class Regression(Alignment):
    """One projector a space, no exchange between spaces.

    With the student's descriptor p [B, P] and tokens S [B, N, C]:

        d^_t = W2_t GELU(W1_t LN p)          x^_s = W_s LN S

    The form of AM-RADIO (Ranzinger et al. 2024, arXiv:2312.06709) and Theia (Shang et al. 2024,
    arXiv:2407.20179), with linear token projectors.

    Args:
        hidden: width of the descriptor projectors' hidden layer.
        **options: those of `Alignment`.
    """

    def __init__(
        self,
        student: StudentShape,
        spaces: Mapping[str, SpaceTarget],
        *,
        hidden: int = 512,
        **options: Any,
    ) -> None:
        super().__init__(student, spaces, **options)
        self.heads = nn.ModuleDict(
            {
                module_key(label): descriptor_mlp(self.pooled_dim, hidden, spaces[space].dim)
                for label, space in self.descriptors.items()
            }
        )
        self.projectors = nn.ModuleDict(
            {
                module_key(name): dense_projector(student.token_dim, spaces[name].dim)
                for name in (self.dense if self.dense_weight else ())
            }
        )

    def predict(self, output: StudentOutput, *, dense: bool) -> Predictions:
        return Predictions(
            descriptors={
                label: self.heads[module_key(label)](output.pooled) for label in self.descriptors
            },
            dense={
                name: self.projectors[module_key(name)](output.tokens)
                for name in (self.dense if dense else ())
            },
        )

    def _readout_parts(self, kind: str) -> Iterable[nn.Module | nn.Parameter]:
        return (self.heads,) if kind == "predictions" else ()
