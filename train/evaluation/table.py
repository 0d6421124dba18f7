"""Scores as rows of a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table


@dataclass(frozen=True)
class Score:
    """What one frozen feature is worth on the test images.

    Attributes:
        kind: "student", "teacher" or "untrained".
        name: run folder of a student, space of a teacher.
        readout: which of its features.
        dim: width of the feature.
        knn, linear: accuracies from 0 to 1.
        strength: L2 strength that the linear probe chose.
        validation: the linear probe's accuracy where it chose it.
    """

    kind: str
    name: str
    readout: str
    dim: int
    knn: float
    linear: float
    strength: float
    validation: float

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def print_table(scores: Sequence[Score], title: str, console: Console | None = None) -> None:
    """Print the scores in per cent, best k-NN first within each kind."""
    table = Table(title=title)
    for column in ("", "name", "readout"):
        table.add_column(column, overflow="fold")  # names are never cut
    for column in ("width", "k-NN %", "linear %"):
        table.add_column(column, justify="right")
    kinds = list(dict.fromkeys(score.kind for score in scores))
    for kind in kinds:
        of_kind = sorted((s for s in scores if s.kind == kind), key=lambda s: -s.knn)
        for score in of_kind:
            table.add_row(
                score.kind,
                score.name,
                score.readout,
                str(score.dim),
                f"{100 * score.knn:.1f}",
                f"{100 * score.linear:.1f}",
                end_section=score is of_kind[-1],
            )
    (console or Console()).print(table)
