"""The standardisation of every space, measured on a random sample of rows and then frozen."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor

from ..cache import Cache, SpaceSpec, StoreWriter, TeacherRecord
from ..cache.convert import copy_calibration
from ..cache.statistics import SAMPLE_ROWS, CalibrationSums, calibration, prediction_weights
from ..errors import ConfigError, DataError, StoreError
from ..progress import ProgressLine
from .images import batched
from .storable import Computed, StoredRows

if TYPE_CHECKING:
    from .runner import TeacherRunner


def calibrate(writer: StoreWriter, runner: TeacherRunner, config: DictConfig) -> None:
    """Freeze the standardisation of the spaces that have none yet: measured, or another store's.

    Raises:
        ConfigError, StoreError: as `check_calibration`.
        DataError: no image of the sample can be used, or a teacher's tokens are not finite.
    """
    specs = writer.uncalibrated
    if not specs:
        return
    check_calibration(config.calibration, writer.plan.teachers, specs)
    if config.calibration.store is not None:
        other = Cache.open(str(config.calibration.store))
        for spec in specs:
            copy_calibration(other, writer, spec)
        return
    teachers = sorted({spec.teacher for spec in specs})
    rows = sample_rows(writer.plan.rows, int(config.calibration.images), int(config.seed))

    lists = batched(rows, runner.batch_size)
    stored = StoredRows(writer)

    def tokens() -> Iterator[Mapping[str, Tensor]]:
        problems: list[str] = []
        with ProgressLine("calibrate", len(rows), "rows") as line:
            for numbers, batch in zip(lists, runner.batches(lists), strict=True):
                # where they will be stored is known when all have been seen
                found = Computed.of(numbers, batch, runner.tokens(batch, teachers), {}).settled(
                    runner.index, stored, views=runner.policy.count, skip=runner.skip_corrupt
                )
                problems += found.batch.problems
                yield found.tokens
                line.advance(len(numbers))
        if len(problems) == len(rows):
            raise DataError(
                f"no image of the calibration's sample of {len(rows)} can be used, the first for "
                f"this: {problems[0]}; mend the shards, or say calibration.images=N for a larger "
                "sample"
            )

    # All at once: a run that went on with some of them would leave out the rows of fewer teachers.
    writer.calibrate_all(measure(specs, tokens()))


def check_calibration(
    options: DictConfig, teachers: Sequence[TeacherRecord], specs: Sequence[SpaceSpec]
) -> None:
    """Refuse options that cannot calibrate some spaces, before a store is begun for them.

    Args:
        options: the group ``calibration``.
        teachers: of the spaces.

    Raises:
        ConfigError: `calibration.images` is not positive.
        StoreError: `calibration.store` lacks a space, or has it of another teacher.
    """
    if not specs:
        return
    if options.store is None:
        if not isinstance(options.images, int) or options.images < 1:
            raise ConfigError(f"calibration.images={options.images}: expected a positive number")
        return
    path = str(options.store)
    other = Cache.open(path)
    identities = {teacher.name: teacher.identity for teacher in teachers}
    for spec in specs:
        if spec.id not in other.spaces:
            raise StoreError(
                f"calibration.store={path} has no space {spec.id}; it has {', '.join(other.spaces)}"
            )
        theirs, ours = other.plan.teacher(spec.teacher).identity, identities[spec.teacher]
        for part in (theirs.keys() | ours.keys()) - {"versions", "precision", "converted"}:
            if theirs.get(part) != ours.get(part):
                raise StoreError(
                    f"calibration.store={path} was made by another {spec.teacher}: its {part} is "
                    f"{theirs.get(part)} there and {ours.get(part)} here"
                )


def sample_rows(rows: int, wanted: int, seed: int) -> list[int]:
    """`wanted` distinct row numbers below `rows`, ascending, fixed by `seed`."""
    chosen = np.random.default_rng([seed, 0xCA11]).permutation(rows)[:wanted]
    return sorted(int(row) for row in chosen)


def measure(
    specs: Sequence[SpaceSpec], batches: Iterable[Mapping[str, Tensor]]
) -> dict[str, dict[str, Any]]:
    """What ``StoreWriter.calibrate_all`` takes of each space: ``mean``, ``std``, ``rows_used`` and,
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
