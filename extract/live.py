"""Live teachers and images against what a store holds of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from rich.table import Table

from ..cache import Cache
from ..cache.report import AT_ONCE, fidelity, first_percentile, relative
from ..errors import DataError
from ..progress import ProgressLine, plain_console
from .images import batched
from .runner import TeacherRunner

_SHOWN = 8  # unreadable images that are named
_ROUNDING = 2.0**-21  # of float32, in a teacher that sums in another order


def compare(cache: Cache, runner: TeacherRunner, rows: list[int]) -> dict[str, Any]:
    """Run teachers on rows of a store and compare with what it holds.

    Returns:
        By space: mean and 1st-percentile cosine of live and stored tokens, relative error in the
        teacher's units and in standardised ones, the error that the encoding explains, and
        whether they agree: no more than twice that error and one per cent, or nothing but the
        rounding of float32, which is all there is of a space that does not move. Of stored pixels,
        how many rows are equal, and those that differ by more than a level in the mean: decoders
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
    for name, (error, power, z_error, z_power, z_stored) in sums.items():
        cosine = torch.cat(cosines[name])
        expected = fidelity(cache[name], rows)
        explained = expected["relative_error_standardised"] if expected else 0.0
        error_of_all, standardised = relative(error, power), relative(z_error, z_power)
        # in absolute terms: of stored tokens that are next to nothing any error is a large part
        allowed = 2 * explained * z_stored.sqrt() + 0.01 * z_power.sqrt()
        spaces[name] = {
            "cosine": float(cosine.mean()),
            "p1_cosine": first_percentile(cosine),
            "relative_error": error_of_all,
            "relative_error_standardised": standardised,
            "expected_standardised": explained,
            "agrees": bool(z_error.sqrt() <= allowed) or error_of_all <= _ROUNDING,
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
    """Squared error and power, both again standardised, and the power of the stored tokens
    standardised: float64 [5]; cosines: float64 [tokens]."""
    space = cache[name]
    stored = space.read(np.asarray(rows))
    x, found = live.double(), space.decode(stored).double()
    z = (x - space.mean.double()) / space.std.double()
    z_found = stored.standardised().double()
    parts = ((x - found) ** 2, x**2, (z - z_found) ** 2, z**2, z_found**2)
    # torch's cosine_similarity takes whatever is shorter than 1e-8 for nothing.
    cosine = (x * found).sum(-1) / (x.norm(dim=-1) * found.norm(dim=-1)).clamp_min(1e-300)
    # A token may be all zeros, as behind a rectifier: stored as that it is what it was.
    cosine = torch.where((x == found).all(-1), 1.0, cosine)
    return torch.stack([part.sum() for part in parts]), cosine.flatten()


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
    plain_console(120).print(table)
    if "pixels" in live:
        pixels = live["pixels"]
        print(
            f"stored pixels: {pixels['equal_rows']} of {live['rows']} rows are equal to the bit, "
            f"the largest mean difference is {pixels['largest_mean_difference']:.3f} of 255 levels"
        )
