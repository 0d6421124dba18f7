"""Live teachers and images against what a store holds of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from ..cache import Cache
from ..cache.report import fidelity
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
    sums: dict[str, list[torch.Tensor]] = {}
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
                sums.setdefault(name, []).append(_errors(cache, name, at, live.cpu()))
    if problems:
        more = f" and {len(problems) - _SHOWN} more" if len(problems) > _SHOWN else ""
        raise DataError(
            f"{len(problems)} of the {len(rows)} images to compare with the store cannot be read "
            f"any more: {'; '.join(problems[:_SHOWN])}{more}; give the images that the store was "
            "made from"
        )
    spaces = {}
    for name, parts in sums.items():
        error, power, z_error, z_power, cosine = torch.cat(parts, 1)
        expected = fidelity(cache[name], rows)
        explained = expected["relative_error_standardised"] if expected else 0.0
        standardised = float((z_error.sum() / z_power.sum()).sqrt())
        spaces[name] = {
            "cosine": float(cosine.mean()),
            "p1_cosine": float(cosine.quantile(0.01)),
            "relative_error": float((error.sum() / power.sum()).sqrt()),
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


def _errors(cache: Cache, name: str, rows: Sequence[int], live: torch.Tensor) -> torch.Tensor:
    """Per token: squared error and power, both again standardised, cosine: float64 [5, tokens]."""
    space = cache[name]
    stored = space.read(np.asarray(rows))
    x, found = live.double(), space.decode(stored).double()
    z = (x - space.mean.double()) / space.std.double()
    z_found = stored.standardised().double()
    parts = (
        ((x - found) ** 2).sum(-1),
        (x**2).sum(-1),
        ((z - z_found) ** 2).sum(-1),
        (z**2).sum(-1),
        torch.cosine_similarity(x, found, -1),
    )
    return torch.stack([part.flatten() for part in parts])


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
