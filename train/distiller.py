"""What is trained: a student and the alignment that teaches it."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from .alignment import Alignment, AlignmentOutput, Target
from .students import Student, StudentOutput


class Distiller(nn.Module):
    """Student and alignment as one module, so that every strategy wraps and synchronises both.

    Attributes:
        watched: whether the next forward pass leaves what it computed in `seen`.
        seen: features and losses, with the graph behind them.
    """

    def __init__(self, student: Student, alignment: Alignment) -> None:
        super().__init__()
        self.student, self.alignment = student, alignment
        self.watched = False
        self.seen: tuple[StudentOutput, AlignmentOutput] | None = None

    def forward(self, pixels: Tensor, targets: Mapping[str, Target]) -> AlignmentOutput:
        """Normalised pixels [B, 3, H, W] and standardised targets [B, N, D] per space."""
        features = self.alignment.run_student(self.student, pixels)
        output: AlignmentOutput = self.alignment(features, targets)
        if self.watched:
            self.seen = (features, output)
        # Fabric lets gradients of what it returns be taken by itself alone.
        return output._replace(by_teacher={})

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that stay undecayed, besides all that have one dimension."""
        return {
            f"{part}.{name}"
            for part in ("student", "alignment")
            for name in getattr(self, part).no_weight_decay()
        }
