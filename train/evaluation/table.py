"""Scores as rows of tables."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rich.console import Console
from rich.table import Table

from ...progress import plain_console
from .intervals import over_seeds
from .suite import DEFAULTS, Score

WIDTH = 120
"""Columns of text that the tables are made for, and take where there is no terminal."""

_COLUMNS = 4  # of scores in one table, so that `WIDTH` holds it
_FIGURE = len("100.0 ±10.0")


@dataclass(frozen=True)
class Row:
    """What one frozen feature is worth on the test images.

    Attributes:
        kind: "student", "teacher" or "untrained".
        name: of a student's run, as `runs.distinct_names` has it; space of a teacher.
        readout: which of its features.
        dim: width of the feature, after a reduction where one was asked for.
        width: the one that was asked for; None where the feature is as it was read.
        reads: which protocols read it: see `Features.kind`.
        scores: one for every figure of every protocol that reads such features.
        family: equal for students that differ in their seed alone; empty where not known, and for
            those that have one's seed and configuration.
    """

    kind: str
    name: str
    readout: str
    dim: int
    width: int | None
    reads: str
    scores: Sequence[Score]
    family: str = ""

    @property
    def values(self) -> dict[str, float]:
        """Value by the score's key."""
        return {score.key: score.value for score in self.scores}

    @property
    def reduced(self) -> bool:
        """Whether a width was asked for."""
        return self.width is not None

    def as_json(self) -> dict[str, Any]:
        """The values by key, and under ``scores`` all there is to each."""
        names = ("kind", "name", "readout", "dim", "width", "reduced")
        named = {name: getattr(self, name) for name in names}
        return {**named, **self.values, "scores": [score.as_json() for score in self.scores]}


def seed_means(rows: Sequence[Row]) -> list[dict[str, Any]]:
    """Means over students that differ in their seed alone, with Student's t intervals of 95 %."""
    families: dict[tuple[str, str, int, int | None], list[Row]] = {}
    for row in rows:
        if row.family:
            # Not by `dim` alone: a feature narrower than two widths has one `dim` at both.
            own = (row.family, row.readout, row.dim, row.width)
            families.setdefault(own, []).append(row)
    found = []
    for (_, readout, dim, width), members in families.items():
        if len(members) < 2:
            continue
        means = {}
        for key in members[0].values:
            interval = over_seeds([row.values[key] for row in members])
            means[key] = {"mean": interval.value, "low": interval.low, "high": interval.high}
        names = [row.name for row in members]
        told = {"names": names, "readout": readout, "dim": dim, "width": width}
        found.append({**told, "means": means})
    return found


def print_tables(rows: Sequence[Row], title: str, console: Console | None = None) -> None:
    """Print the scores in per cent with half their interval's width, four beside each other.

    Kinds keep their order, and within a kind the best of the first column comes first. ``-`` stands
    where a protocol has no figure for a feature.
    """
    console = console or plain_console(WIDTH)
    for kind in dict.fromkeys(row.reads for row in rows):
        own = [row for row in rows if row.reads == kind]
        columns = {score.key: heading(score) for row in own for score in row.scores}
        for part in _parts(list(columns)):
            print_table(own, {key: columns[key] for key in part}, title, console)
            title = ""


def _parts(keys: Sequence[str]) -> Iterator[Sequence[str]]:
    """Protocols kept together where they fit."""
    part: list[str] = []
    protocols: dict[str, list[str]] = {}
    for key in keys:
        protocols.setdefault(key.split("/")[0], []).append(key)
    for own in protocols.values():
        if part and len(part) + len(own) > _COLUMNS:
            yield part
            part = []
        part += own
        while len(part) > _COLUMNS:
            yield part[:_COLUMNS]
            part = part[_COLUMNS:]
    if part:
        yield part


def print_table(
    rows: Sequence[Row], columns: Mapping[str, str], title: str, console: Console
) -> None:
    """Print some of the scores: columns are headings by key."""
    table = Table(title=title or None)
    for column in ("", "name", "readout"):
        table.add_column(column, overflow="fold")  # names are never cut
    table.add_column("width", justify="right", no_wrap=True)
    for column in columns.values():
        table.add_column(column, justify="right", overflow="fold", min_width=_FIGURE)
    first = next(iter(columns))
    for kind in dict.fromkeys(row.kind for row in rows):
        of_kind = sorted(
            (row for row in rows if row.kind == kind),
            key=lambda row: -row.values.get(first, -math.inf),
        )
        for row in of_kind:
            scores = {score.key: score for score in row.scores}
            table.add_row(
                row.kind,
                row.name,
                row.readout,
                str(row.dim),
                *(percent(scores.get(key)) for key in columns),
                end_section=row is of_kind[-1],
            )
    console.print(table)


def print_seeds(means: Sequence[Mapping[str, Any]], console: Console | None = None) -> None:
    """Print what `seed_means` found."""
    console = console or plain_console(WIDTH)
    for entry in means:
        parts = [
            f"{key} {100 * one['mean']:.1f} ±{50 * (one['high'] - one['low']):.1f}"
            for key, one in entry["means"].items()
        ]
        count = len(entry["names"])
        readout = entry["readout"]
        if entry["width"] is not None:
            readout += f" at width={entry['width']}"
        console.print(
            f"{count} seeds, {entry['names'][0]} and so on, {readout}: {', '.join(parts)}"
        )


NAMES = {
    "knn": "k-NN",
    "linear": "linear",
    "retrieval": "mAP",
    "regression": "R²",
    "dense": "mIoU",
    "dense_regression": "map R²",
    "zeroshot": "zero-shot",
}
"""Of columns, where the protocol's own name is not the clearest."""


def heading(score: Score) -> str:
    """Of a column: what is shown, in per cent."""
    if score.variant:
        variant = score.variant
        name = f"CKA {variant}" if score.protocol == "cka" else variant.replace("_", " ")
        if score.protocol == "robustness" and variant == "mean":
            name = "corrupted"
    else:
        name = NAMES.get(score.protocol, score.protocol)
    return f"{name} %" + ("" if score.task in DEFAULTS else f" {score.task}")


def percent(score: Score | None) -> str:
    """``86.7 ±2.1``, or ``-`` where there is no score."""
    if score is None:
        return "-"
    text = f"{100 * score.value:.1f}"
    if score.low is None or score.high is None:
        return text
    return f"{text} ±{50 * (score.high - score.low):.1f}"
