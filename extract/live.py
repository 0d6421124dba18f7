"""Live teachers and images against what a store holds of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ..cache import Cache
from ..cache.report import AT_ONCE, fidelity, first_percentile
from ..errors import DataError
from ..progress import ProgressLine
from .pipeline import TeacherRunner, batched

_SHOWN = 8  # unreadable images that are named


def compare(cache: Cache, runner: TeacherRunner, rows: list[int]) -> dict[str, Any]:
    """Run teachers on rows of a store and compare with what it holds.

    Returns:
        By space: mean and 1st-percentile cosine of live and stored tokens, relative error in the
        teacher's units and in standardised ones, the error that the encoding explains, and
        whether they agree: no more than twice that error and one per cent. Of stored pixels, how
        many rows are equal, and those that differ by more than a level in the mean: decoders
        round otherwise from version to version, but not by that.

    Raises:
        DataError: images of rows that have tokens cannot be read any more.
    """
    sums: dict[str, torch.Tensor] = {}
    cosines: dict[str, list[torch.Tensor]] = {}
    levels: list[torch.Tensor] = []
    problems: list[str] = []
    with ProgressLine("live", len(rows), "rows") as line:
        for batch in runner.batches(batched(rows, runner.batch_size), cache.pixels):
            at = rows[line.done : line.done + len(batch.rows.keys)]
            line.advance(len(at))
            problems += batch.problems
            if problems:  # the rest is only read, so that all are named
                continue
            if cache.pixels is not None:
                shown = batch.pixels[cache.pixels.size, cache.pixels.interpolation]
                levels.append(_levels(cache, at, shown))
            for name, live in runner.tokens(batch).items():
                for first in range(0, len(at), AT_ONCE):
                    some = slice(first, first + AT_ONCE)
                    parts, cosine = _errors(cache, name, at[some], live[some].cpu())
                    sums[name] = sums.get(name, 0.0) + parts
                    cosines.setdefault(name, []).append(cosine)
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise DataError(
            f"{len(problems)} of the {len(rows)} images to compare with the store cannot be read "
            f"any more: {'; '.join(problems[:_SHOWN])}{more}; give the images that the store was "
            "made from"
        )
    spaces = {}
    for name, (error, power, z_error, z_power) in sums.items():
        cosine = torch.cat(cosines[name])
        expected = fidelity(cache[name], rows)
        explained = expected["relative_error_standardised"] if expected else 0.0
        standardised = float((z_error / z_power).sqrt())
        spaces[name] = {
            "cosine": float(cosine.mean()),
            "p1_cosine": first_percentile(cosine),
            "relative_error": float((error / power).sqrt()),
            "relative_error_standardised": standardised,
            "expected_standardised": explained,
            "agrees": standardised <= 2 * explained + 0.01,
        }
    found: dict[str, Any] = {"rows": len(rows), "spaces": spaces}
    if levels:
        mean = torch.cat(levels)
        found["pixels"] = {
            "equal_rows": int((mean == 0).sum()),
            "largest_mean_difference": float(mean.max()),
            "other_rows": [row for row, off in zip(rows, mean.tolist(), strict=True) if off > 1],
        }
    return found


def _levels(cache: Cache, rows: Sequence[int], shown: torch.Tensor) -> torch.Tensor:
    """Mean absolute difference of stored pixels and of uint8 [b, 3, H, W], float64 [b]."""
    stored = cache.read_pixels(np.asarray(rows)).permute(0, 3, 1, 2)
    return (stored.double() - shown.double()).abs().flatten(1).mean(1)


def _errors(
    cache: Cache, name: str, rows: Sequence[int], live: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Squared error and power, both again standardised: float64 [4]; cosines: float64 [tokens]."""
    space = cache[name]
    stored = space.read(np.asarray(rows))
    x, found = live.double(), space.decode(stored).double()
    z = (x - space.mean.double()) / space.std.double()
    z_found = stored.standardised().double()
    parts = ((x - found) ** 2, x**2, (z - z_found) ** 2, z**2)
    cosine = torch.cosine_similarity(x, found, -1).flatten()
    return torch.stack([part.sum() for part in parts]), cosine


def show(live: Mapping[str, Any]) -> None:
    table = Table(title=f"live teachers against the store, {live['rows']} rows")
    for number, name in enumerate(
        ("space", "cosine", "p1 cosine", "error", "error / std", "explained")
    ):
        table.add_column(name, justify="right" if number else "left")
    for name, space in live["spaces"].items():
        numbers = ("relative_error", "relative_error_standardised", "expected_standardised")
        table.add_row(
            name,
            f"{space['cosine']:.6f}",
            f"{space['p1_cosine']:.6f}",
            *(f"{100 * space[number]:.3f} %" for number in numbers),
        )
    Console(width=None if Console().is_terminal else 120).print(table)
    if "pixels" in live:
        pixels = live["pixels"]
        print(
            f"stored pixels: {pixels['equal_rows']} of {live['rows']} rows are equal to the bit, "
            f"the largest mean difference is {pixels['largest_mean_difference']:.3f} of 255 levels"
        )
