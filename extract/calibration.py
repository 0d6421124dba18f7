"""The standardisation of every space, measured on a random sample of rows and then frozen."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..cache import SpaceSpec
from ..cache.statistics import SAMPLE_ROWS, CalibrationSums, calibration, prediction_weights
from ..errors import DataError


def sample_rows(rows: int, wanted: int, seed: int) -> list[int]:
    """`wanted` distinct row numbers below `rows`, ascending, fixed by `seed`."""
    chosen = np.random.default_rng([seed, 0xCA11]).permutation(rows)[:wanted]
    return sorted(int(row) for row in chosen)


def measure(
    specs: Sequence[SpaceSpec], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, dict[str, Any]]:
    """What ``StoreWriter.calibrate`` takes for each space: ``mean``, ``std``, ``rows_used`` and,
    where the space is predicted, ``weights``.

    Args:
        specs: the spaces to measure.
        batches: tokens [b, N, D] of those spaces, a mapping a batch.

    Raises:
        DataError: there was no row at all.
    """
    sums: dict[str, CalibrationSums] = {}
    kept: dict[str, list[Tensor]] = {spec.id: [] for spec in specs}
    for tokens in batches:
        for spec in specs:
            if spec.id not in tokens or not len(tokens[spec.id]):
                continue
            batch = tokens[spec.id]
            if spec.id not in sums:
                # Sums are taken around the first batch's mean, so that they lose few digits.
                sums[spec.id] = CalibrationSums(
                    batch.reshape(-1, spec.dim).mean(0, dtype=torch.float32)
                )
            sums[spec.id].add(batch)
            if spec.predicted and sum(map(len, kept[spec.id])) < SAMPLE_ROWS:
                kept[spec.id].append(batch.cpu())
    found: dict[str, dict[str, Any]] = {}
    for spec in specs:
        if spec.id not in sums:
            raise DataError("the calibration sample holds no readable image; check the shards")
        rows = sums[spec.id].count // spec.tokens
        mean, std = calibration(sums[spec.id])
        weights = None
        if spec.predicted:
            few = torch.cat(kept[spec.id])[:SAMPLE_ROWS]
            weights = prediction_weights(spec, sums[spec.id].moments(), mean, std, few)
        found[spec.id] = {"mean": mean, "std": std, "rows_used": rows, "weights": weights}
    return found
