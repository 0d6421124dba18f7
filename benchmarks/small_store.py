"""A store of a few kilobytes with every encoding and pixels, which depend on the row alone.

For fault injection, in tests and in torture_cache.py.
"""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np
import torch
from preceptor.cache import (
    CalibrationSums,
    PixelSpec,
    RowBatch,
    SpaceSpec,
    StorePlan,
    StoreWriter,
    TeacherRecord,
    calibration,
)
from preceptor.cache.commit_thread import CommitThread
from preceptor.cache.encodings.prediction import blocks
from preceptor.cache.shard_writer import ShardWriter

ROWS, SHARD, GROUP = 14, 8, 4
INVALID = 5


def spaces(teacher: str, first: str, second: str) -> tuple[SpaceSpec, ...]:
    return (
        SpaceSpec(teacher, "patch", 4, 10, (2, 2), first),
        SpaceSpec(teacher, "cls", 1, 6, None, second),
    )


TEACHERS = (
    TeacherRecord("vit", spaces("vit", "int8", "fp16"), {"weights": "a"}),
    TeacherRecord("cnn", spaces("cnn", "compact", "int4"), {"weights": "b"}),
)


def plan(*teachers: TeacherRecord, rows: int = ROWS) -> StorePlan:
    return StorePlan(
        samples={"count": rows, "sha256": "0" * 64},
        views={"name": "center", "count": 1},
        rows=rows,
        shard_rows=SHARD,
        group_rows=GROUP,
        teachers=teachers or TEACHERS,
        pixels=PixelSpec((5, 3)),
    )


def tokens(space: SpaceSpec, rows: np.ndarray, version: int = 0) -> np.ndarray:
    """float32 [rows, N, D]; another version gives other tokens for the same rows."""
    name = int.from_bytes(hashlib.sha256(space.id.encode()).digest()[:4], "little")
    draws = [
        np.random.default_rng([name, version, int(row)]).normal(2, 3, (space.tokens, space.dim))
        for row in rows
    ]
    return np.array(draws, np.float32).reshape(len(rows), space.tokens, space.dim)


def pixels(rows: np.ndarray, version: int = 0) -> np.ndarray:
    """uint8 [rows, 5, 3, 3]."""
    draws = [np.random.default_rng([77, version, int(row)]).integers(0, 256, 45) for row in rows]
    return np.array(draws, np.uint8).reshape(len(rows), 5, 3, 3)


def batch(first: int, last: int) -> RowBatch:
    rows = np.arange(first, last)
    return RowBatch(
        keys=[f"key{row:04d}" for row in rows],
        labels=rows % 3,
        sizes=np.stack([40 + rows, 50 + rows], 1),
        boxes=np.stack([rows, rows, rows + 40, rows + 40], 1).astype(np.float32),
        flips=rows % 3 == 1,
        valid=rows != INVALID,
    )


def calibrate(writer: StoreWriter) -> None:
    for space in writer.uncalibrated:
        sums = CalibrationSums(torch.full((space.dim,), 2.0))
        sums.add(torch.from_numpy(tokens(space, np.arange(4))))
        mean, std = calibration(sums)
        weights = some_weights(space) if space.predicted else None
        writer.calibrate(space.id, mean, std, rows_used=4, weights=weights)


def some_weights(space: SpaceSpec) -> np.ndarray:
    """int8 [D, D]: weights of a prediction, all that may be other than zero."""
    weights = np.diag(np.full(space.dim, 0 if space.grid is None else 99)).astype(np.int8)
    for start, end in blocks(space.dim):
        shape = (end - start, start)
        weights[start:end, :start] = np.random.default_rng(start).integers(-90, 91, shape)
    return weights


def fill(writer: StoreWriter, version: int = 0) -> None:
    """Extract every pending shard, each committed while the next is filled."""
    with CommitThread() as commits:
        for shard, units in writer.pending():
            commits.commit(filled(writer, shard, units, version))


def fill_shard(writer: StoreWriter, shard: int, units: tuple[str, ...], version: int = 0) -> None:
    """Extract one shard and commit it."""
    with filled(writer, shard, units, version):
        pass


def filled(
    writer: StoreWriter, shard: int, units: tuple[str, ...], version: int = 0
) -> ShardWriter:
    """A shard with all its rows, appended three at a time."""
    first = shard * writer.plan.shard_rows
    last = first + writer.plan.rows_in(shard)
    wanted = [space for unit in units for space in writer.plan.spaces_of(unit)]
    out = writer.shard(shard, units)
    for start in range(first, last, 3):
        rows = batch(start, min(start + 3, last))
        numbers = np.arange(start, start + len(rows))[rows.valid]
        shown = pixels(numbers, version) if "pixels" in units else None
        out.append(rows, {space.id: tokens(space, numbers, version) for space in wanted}, shown)
    return out


def extract(path: Path, *teachers: TeacherRecord, rows: int = ROWS) -> StoreWriter:
    return _whole(StoreWriter.open_or_create(path, plan(*teachers, rows=rows)))


def add(path: Path, teacher: TeacherRecord) -> StoreWriter:
    """Extract one more teacher of a store."""
    writer = StoreWriter.open(path)
    writer.add(teacher)
    return _whole(writer)


def _whole(writer: StoreWriter) -> StoreWriter:
    calibrate(writer)
    fill(writer)
    writer.finish()
    return writer


def contents(path: Path) -> dict[str, bytes]:
    """Every file of a store by its path within it."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file()
    }


def restore(path: Path, files: dict[str, bytes]) -> None:
    shutil.rmtree(path, ignore_errors=True)
    for name, raw in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(raw)
