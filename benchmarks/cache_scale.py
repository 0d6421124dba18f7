"""Opening, order and memory of a store as large as ImageNet-1k, and the arithmetic of a billion.

The store has 1,281,167 rows in 1,252 shards and four int8 teachers: about a terabyte, of which the
tokens are holes in sparse files. Rows, records, indices and lengths are real, so opening, labels
and the order of an epoch do all that they would do; only tokens cannot be read.

    python benchmarks/cache_scale.py --json benchmarks/results/cache_scale.json
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from preceptor.benchmarks.cache_read import facts
from preceptor.benchmarks.harness import machine, median, save, show
from preceptor.cache import Cache, SpaceSpec, StorePlan, StoreWriter, TeacherRecord
from preceptor.cache.commit import Commit, Completion, FileRecord, completion_name, record_name
from preceptor.cache.constants import constant_bytes, statistics_sha256
from preceptor.cache.documents import digest
from preceptor.cache.gather import by_group
from preceptor.cache.layout import CRC, Layout
from preceptor.cache.order import EpochOrder
from preceptor.cache.plan import ROWS
from preceptor.cache.sharding import alignment, crc32c
from preceptor.cache.spare import write_twice
from preceptor.measure import peak_memory_mb
from preceptor.progress import ProgressLine

IMAGENET, BILLION = 1_281_167, 1_000_000_000
DIMS = {"dinov2": 768, "clip": 768, "siglip": 1024, "convnext": 1024}
TOKENS, SHARD, GROUP, WORLD, BATCH = 256, 1024, 32, 8, 1024


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=IMAGENET)
    parser.add_argument("--folder", type=Path, help="where to make the store, such as /dev/shm")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.child:
        child = {"open": opened, "billion": billion}[arguments.child]
        print(json.dumps(child(arguments.folder)))
        return
    folder = Path(tempfile.mkdtemp(prefix="cache-scale-", dir=arguments.folder))
    try:
        make(folder / "store", arguments.rows)
        runs = [in_child("open", folder / "store") for _ in range(3)]
    finally:
        shutil.rmtree(folder)
    large = in_child("billion", folder)
    found = {name: median([run[name] for run in runs]) for name in runs[0]}
    show("1.28 M rows, four teachers", ["", ""], [[name, found[name]] for name in found])
    show("1 B rows, one teacher", ["", ""], [[name, large[name]] for name in large])
    save(
        arguments.json,
        {
            "machine": machine(),
            "rows": arguments.rows,
            "imagenet": found,
            "billion": large,
            "summary": {
                "open_seconds": found["open_seconds"],
                "peak_mb": found["peak_mb"],
                "growth_mb": found["growth_mb"],
            },
        },
    )


def in_child(what: str, folder: Path) -> dict[str, Any]:
    """A measurement in a fresh process, so that its memory is its own."""
    command = [sys.executable, __file__, "--child", what, "--folder", str(folder)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr)
    return dict(json.loads(done.stdout))


# -- the store -------------------------------------------------------------------------------------


def samples_of(rows: int) -> dict[str, Any]:
    """The description of ImageNet's samples as SampleIndex has it: 1,282 tars of 1000."""
    counts = [min(1000, rows - first) for first in range(0, rows, 1000)]
    tars = [
        {"name": f"imagenet1k-train-{number:04d}.tar", "bytes": 110_000 * count, "samples": count}
        for number, count in enumerate(counts)
    ]
    return {"count": rows, "sha256": "0" * 64, "order": {"kind": "shards"}, "shards": tars}


def plan_of(rows: int, dims: dict[str, int], samples: dict[str, Any]) -> StorePlan:
    return StorePlan(
        samples=samples,
        views={"name": "center", "count": 1},
        rows=rows,
        shard_rows=SHARD,
        group_rows=GROUP,
        teachers=tuple(
            TeacherRecord(name, (SpaceSpec(name, "patch", TOKENS, dim, (16, 16)),), {})
            for name, dim in dims.items()
        ),
    )


def make(path: Path, rows: int) -> None:
    plan = plan_of(rows, DIMS, samples_of(rows))
    writer = StoreWriter.open_or_create(path, plan)
    for space in plan.spaces.values():
        writer.calibrate(space.id, np.zeros(space.dim), np.ones(space.dim), rows_used=1)
    with ProgressLine("make", plan.shards, "shards") as line:
        for shard in range(plan.shards):
            with writer.shard(shard, (ROWS,)) as out:
                out.append(facts(shard * SHARD, plan.rows_in(shard)), {})
            line.advance()
    writer = StoreWriter.open(path)
    for teacher in plan.teachers:
        make_teacher(path, writer, teacher)
    writer.finish()


def make_teacher(path: Path, writer: StoreWriter, teacher: TeacherRecord) -> None:
    """Sparse files with true shard indices, and records and seals that fit them."""
    plan, layout, name = writer.plan, Layout(writer.plan), teacher.name
    arrays, records = layout.unit_arrays(name), []
    sizes: dict[str, list[int]] = {array: [] for array in arrays}
    for shard in range(plan.shards):
        files = {}
        for array, spec in arrays.items():
            chunks = layout.chunks_in(spec, shard)
            stored, step = spec.chunk_bytes + CRC, alignment(spec)
            index = np.full((spec.chunks_a_shard, 2), 2**64 - 1, "<u8")
            index[:chunks, 0] = np.arange(chunks) * (-(-stored // step) * step)
            index[:chunks, 1] = stored
            raw = index.tobytes()
            size = int(index[chunks - 1].sum()) + spec.index_bytes
            with (path / spec.file(shard)).open("wb") as file:
                file.truncate(size)
                file.seek(size - spec.index_bytes)
                file.write(raw + crc32c(raw).to_bytes(CRC, "little"))
            files[array] = FileRecord(size, "0" * 64, tuple(range(chunks)))
            sizes[array].append(size)
        count, first = plan.rows_in(shard), shard * SHARD
        keys = f"{first:08d}", f"{first + count - 1:08d}"
        configuration = writer.manifest.configuration(name)
        moments = {space.name: digest(shard) for space in teacher.spaces}
        commit = Commit(name, shard, configuration, count, count, *keys, files, moments)
        (path / record_name(name, shard)).write_bytes(commit.to_bytes())
        records.append(hashlib.sha256(commit.to_bytes()).hexdigest())
    tokens, seals = {}, {}
    for space in teacher.spaces:
        values = {"mean": np.zeros(space.dim), "covariance": np.eye(space.dim)}
        for part, spec in layout.statistics_arrays(space).items():
            write_twice(path, spec.file(0), constant_bytes(spec, values[part]))
        tokens[space.name] = plan.rows * TOKENS
        seals[space.name] = statistics_sha256(values["mean"], values["covariance"])
    configuration = writer.manifest.configuration(name)
    done = Completion(name, configuration, tuple(records), sizes, tokens, seals)
    write_twice(path, completion_name(name), done.to_bytes())


# -- measuring -------------------------------------------------------------------------------------


def resident_mb() -> float:
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20


def opened(path: Path) -> dict[str, float]:
    """Open, read labels and validity, and walk through an epoch's order of every rank."""
    before = resident_mb()
    start = time.perf_counter()
    cache = Cache.open(path)
    found = {"open_seconds": time.perf_counter() - start, "open_mb": resident_mb() - before}
    start = time.perf_counter()
    valid = cache.valid
    found["validity_seconds"] = time.perf_counter() - start
    start = time.perf_counter()
    labels = cache.labels
    found["labels_seconds"] = time.perf_counter() - start
    if len(labels) != len(cache) or not valid.all():
        raise SystemExit("labels and validity are not those of the rows")
    start = time.perf_counter()
    middle = len(cache) // BATCH // 2
    stream = cache.batches([next(iter(cache.spaces))], BATCH, seed=0, epoch=1, start_step=middle)
    found["batches_from_the_middle_seconds"] = time.perf_counter() - start
    stream.close()
    start = time.perf_counter()
    seen = np.zeros(len(cache), np.uint8)
    counts = set()
    for rank in range(WORLD):
        order = epoch_order(valid, rank)
        counts.add(order.rows)
        for window in range(order.windows):
            seen[order.window(window)] += 1
    found["epoch_order_of_8_ranks_seconds"] = time.perf_counter() - start
    found["rows_left_out"] = int((seen == 0).sum())
    if seen.max() > 1 or len(counts) != 1 or found["rows_left_out"] >= WORLD * BATCH:
        raise SystemExit("the order reads a row twice, or ranks unequal numbers of rows")
    found["peak_mb"] = peak_memory_mb()
    found["growth_mb"] = peak_memory_mb() - before
    found["store_terabytes"] = (
        sum(sum(sizes) for done in cache.completions.values() for sizes in done.sizes.values())
        / 1e12
    )
    return found


def epoch_order(valid: np.ndarray, rank: int) -> EpochOrder:
    return EpochOrder(
        valid,
        group_rows=GROUP,
        batch_size=BATCH,
        window_rows=BATCH,
        seed=0,
        epoch=1,
        rank=rank,
        world=WORLD,
        shuffle=True,
        drop_last=True,
    )


def billion(_: Path) -> dict[str, float]:
    """Positions, lengths and the order of a billion rows."""
    before = resident_mb()
    plan = plan_of(BILLION, {"dinov2": 768}, samples={})
    layout = Layout(plan)
    arrays = layout.space_arrays(plan.spaces["dinov2/patch"])
    rows = np.array([0, 2**29 + 17, BILLION // 2 + 31, BILLION - 1], np.int64)
    for group in by_group(rows, SHARD, GROUP):
        for local, place in zip(group.local.tolist(), group.places.tolist(), strict=True):
            if group.shard * SHARD + group.chunk * GROUP + local != int(rows[place]):
                raise SystemExit(f"row {rows[place]} is looked for in the wrong place")
    start = time.perf_counter()
    order = epoch_order(np.ones(BILLION, bool), WORLD - 1)
    found = {
        "shards": plan.shards,
        "terabytes": sum(spec.row_bytes for spec in arrays.values()) * BILLION / 1e12,
        "order_seconds": time.perf_counter() - start,
    }
    start = time.perf_counter()
    last = order.window(order.windows - 1)
    found["window_seconds"] = time.perf_counter() - start
    if len(np.unique(last)) != len(last) or not 0 <= last.min() <= last.max() < BILLION:
        raise SystemExit("the last window is not of rows of the store")
    found["growth_mb"] = peak_memory_mb() - before
    return found


if __name__ == "__main__":
    main()
