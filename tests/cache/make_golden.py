"""Writes the golden store of a format version. Run once for a version, never again:

python tests/cache/make_golden.py 1 tests/cache/golden
python tests/cache/make_golden.py 2 tests/cache/golden_2
python tests/cache/make_golden.py 3 tests/cache/golden_3
"""

from __future__ import annotations

import json
import sys
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
from small_stores import some_weights

SPACES = {
    1: (
        SpaceSpec("vit", "patch", 2, 5, (1, 2), "int8"),
        SpaceSpec("vit", "cls", 1, 3, None, "fp16"),
        SpaceSpec("vit", "dense", 2, 4, (2, 1), "compact", plain=True, step=None),
        SpaceSpec("vit", "small", 1, 9, None, "int4"),
    ),
    2: (
        SpaceSpec("vit", "patch", 12, 10, (3, 4), "compact", step=None),
        SpaceSpec("vit", "cls", 1, 3, None, "compact", step=None),
        SpaceSpec("vit", "dense", 2, 4, (2, 1), "compact", plain=True, step=None),
        SpaceSpec("vit", "small", 1, 9, None, "int8"),
    ),
    3: (
        SpaceSpec("vit", "patch", 12, 10, (3, 4), "compact", step=15 / 128),
        SpaceSpec("vit", "cls", 1, 3, None, "compact", step=None),
        SpaceSpec("vit", "dense", 2, 4, (2, 1), "compact", plain=True, step=40 / 128),
        SpaceSpec("vit", "small", 1, 9, None, "int8"),
    ),
}


def write(version: int, path: Path) -> None:
    """The store of a version at ``path/store``, and what it decodes to."""
    spaces = SPACES[version]
    rng = np.random.default_rng(2024)
    plan = StorePlan(
        samples={"count": 5, "sha256": "0" * 64, "shards": []},
        views={"name": "center", "count": 1, "crop": 1.0},
        rows=5,
        shard_rows=4,
        group_rows=2,
        teachers=(TeacherRecord("vit", spaces, {"source": "golden"}),),
        key_bytes=16,
    )
    writer = StoreWriter.open_or_create(path / "store", plan)
    for space in spaces:
        mean, std = rng.standard_normal(space.dim), rng.random(space.dim) + 0.5
        weights = None
        if space.predicted:
            weights = some_weights(space.dim, 127, rng, grid=space.grid is not None)
        writer.calibrate(space.id, mean, std, rows_used=5, weights=weights)
    valid = np.array([True, True, True, False, True])
    for shard, units in writer.pending():
        rows = np.arange(shard * 4, shard * 4 + plan.rows_in(shard))
        seen = int(valid[rows].sum())
        with writer.shard(shard, units) as out:
            out.append(
                RowBatch(
                    [f"clé{row}" for row in rows],
                    rows - 1,
                    np.stack([rows + 10, rows + 20], 1),
                    np.stack([rows, rows, rows + 8.5, rows + 8.25], 1),
                    rows % 2 == 1,
                    valid[rows],
                ),
                {s.id: rng.standard_normal((seen, s.tokens, s.dim)) * 3 for s in spaces},
            )
    writer.finish()
    cache = Cache.open(path / "store")
    decoded = {
        name: space.decode(space.read(np.flatnonzero(valid))).double().numpy().tolist()
        for name, space in cache.spaces.items()
    }
    text = json.dumps({"valid": valid.tolist(), "decoded": decoded}) + "\n"
    (path / "expected.json").write_text(text)


if __name__ == "__main__":
    write(int(sys.argv[1]), Path(sys.argv[2]))
