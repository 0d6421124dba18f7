"""Small stores with known tokens."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from preceptor.cache import (
    Cache,
    RowBatch,
    SpaceSpec,
    StorePlan,
    StoreWriter,
    TeacherRecord,
)

ROWS, SHARD_ROWS, GROUP_ROWS = 42, 16, 4
CORRUPT = (7, 33)
VALID = np.array([row for row in range(ROWS) if row not in CORRUPT])

SPACES = (
    SpaceSpec("vit", "patch", tokens=6, dim=70, grid=(2, 3)),
    SpaceSpec("vit", "cls", tokens=1, dim=70, grid=None, encoding="fp16"),
    SpaceSpec("cnn", "map", tokens=4, dim=9, grid=(2, 2), encoding="compact"),
    SpaceSpec("cnn", "small", tokens=4, dim=129, grid=(2, 2), encoding="int4"),
)


def make_plan(
    spaces: Iterable[SpaceSpec] = SPACES,
    rows: int = ROWS,
    shard_rows: int = SHARD_ROWS,
    group_rows: int = GROUP_ROWS,
) -> StorePlan:
    grouped: dict[str, list[SpaceSpec]] = {}
    for space in spaces:
        grouped.setdefault(space.teacher, []).append(space)
    teachers = tuple(
        TeacherRecord(name, tuple(found), {"source": f"call:tests:{name}", "size": [28, 28]})
        for name, found in grouped.items()
    )
    samples = {"count": rows, "sha256": "ab" * 32, "order": "source"}
    return StorePlan(
        samples, {"name": "center", "count": 1}, rows, shard_rows, group_rows, teachers
    )


def tokens_of(space: SpaceSpec, rows: np.ndarray) -> np.ndarray:
    """float32 ``[len(rows), N, D]``: a test's teacher, a pure function of the row."""
    seed = int.from_bytes(hashlib.sha256(space.id.encode()).digest()[:4], "big")
    parts = []
    for row in rows:
        rng = np.random.default_rng([seed, int(row)])
        x = rng.standard_normal((space.tokens, space.dim)) * (1 + np.arange(space.dim) % 5)
        parts.append(x * (1 + 20 * (rng.random((space.tokens, 1)) < 0.1)) + 3)
    return np.stack(parts).astype(np.float32) if parts else np.zeros((0, *shape(space)), np.float32)


def shape(space: SpaceSpec) -> tuple[int, int]:
    return space.tokens, space.dim


def facts_of(rows: np.ndarray, corrupt: Iterable[int] = CORRUPT) -> RowBatch:
    return RowBatch(
        keys=[f"train/{row:05d}é" for row in rows],
        labels=rows % 7 - 1,
        sizes=np.stack([rows + 100, rows + 200], 1),
        boxes=np.stack([rows * 0.5, rows * 0.25, rows + 28.0, rows + 28.5], 1),
        flips=rows % 3 == 0,
        valid=~np.isin(rows, list(corrupt)),
    )


def some_weights(
    dim: int, largest: int, rng: np.random.Generator, *, grid: bool = False
) -> np.ndarray:
    """int8 ``[dim, dim]``: random weights wherever a prediction may have them."""
    block = -(-dim // 4)
    start = np.arange(dim) // block * block
    weights = rng.integers(-largest, largest + 1, (dim, dim))
    weights = np.where(np.arange(dim) < start[:, None], weights, 0)
    if grid:
        np.fill_diagonal(weights, rng.integers(0, largest + 1, dim))
    return weights.astype(np.int8)


def calibrate(writer: StoreWriter) -> None:
    for space in writer.uncalibrated:
        x = tokens_of(space, np.arange(20)).reshape(-1, space.dim)
        rng = np.random.default_rng(space.dim)
        weights = None
        if space.predicted:
            weights = some_weights(space.dim, 100, rng, grid=space.grid is not None)
        writer.calibrate(space.id, x.mean(0), x.std(0), rows_used=20, weights=weights)


def write_shard(writer: StoreWriter, shard: int, units: tuple[str, ...], batch: int = 5) -> None:
    plan = writer.plan
    first = shard * plan.shard_rows
    rows = np.arange(first, first + plan.rows_in(shard))
    spaces = [space for space in plan.spaces.values() if space.teacher in units]
    with writer.shard(shard, units) as out:
        for at in range(0, len(rows), batch):
            facts = facts_of(rows[at : at + batch])
            seen = rows[at : at + batch][facts.valid]
            out.append(facts, {space.id: tokens_of(space, seen) for space in spaces})


def write_pending(writer: StoreWriter) -> None:
    for shard, units in writer.pending():
        write_shard(writer, shard, units)


def write_store(path: Path, plan: StorePlan | None = None) -> StoreWriter:
    writer = StoreWriter.open_or_create(path, plan or make_plan())
    calibrate(writer)
    write_pending(writer)
    writer.finish()
    return writer


def same_as_local(cache: Cache, local: Cache) -> None:
    """Every row of every space, read at once and in batches, is byte for byte that on the disk."""
    assert list(cache.keys) == list(local.keys)
    assert (cache.valid == local.valid).all()
    for name, space in local.spaces.items():
        theirs = cache[name].read(VALID)
        for part, values in space.read(VALID).parts.items():
            assert theirs.parts[part].numpy().tobytes() == values.numpy().tobytes()
    rows = []
    for batch in cache.batches(list(local.spaces), 8, seed=1, drop_last=False):
        rows += batch.rows.tolist()
        for name, tokens in batch.tokens.items():
            assert (local[name].read(batch.rows).codes.numpy() == tokens.codes.numpy()).all()
    assert sorted(rows) == VALID.tolist()
