"""Rows a second of this project's reader and of others, from the same bytes where they can.

zarr-python and tensorstore read the very store that ours reads. np.memmap copies the same codes
and scales out of flat files and checks nothing: once into one batch over and over, the ceiling, and
once into as many batches in turn as ours holds. WebDataset reads tars of bfloat16 safetensors, one
a row, the form in which features are usually published.

Shuffled groups: an epoch, groups of rows in random order, batches of 256 rows. Random rows: 256
row numbers from anywhere at once, which of 3,072 rows are in nearly every group; where they are of
a group each, readers of whole groups give fewer rows a second. Each contender is measured with one
and with two threads (for WebDataset: in this process, and with two loader processes), in turns,
median of the rounds; the summary compares the better of the two. Warm: all files were read from
the disk once, in order. A warm measurement that shared the machine with other processes is taken
again. Checksums are verified by ours, zarr-python and tensorstore.

    python benchmarks/cache_read.py --json benchmarks/results/cache_read.json
"""

from __future__ import annotations

import argparse
import io
import json
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
import zarr
from preceptor.benchmarks.feature_readers import (
    BATCH,
    CONTENDERS,
    DIM,
    GROUP,
    SPACE,
    TOKENS,
    Contender,
    TensorStore,
)
from preceptor.benchmarks.harness import (
    Patience,
    cold,
    machine,
    median,
    rate,
    save,
    show,
    undisturbed,
)
from preceptor.cache import Cache, RowBatch, SpaceSpec, StorePlan, StoreWriter, TeacherRecord
from preceptor.cache.verify import verify_store

WORKLOADS = (
    "shuffled groups, warm",
    "random rows, warm",
    "shuffled groups, cold",
    "random rows, cold",
)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=3072, help="a multiple of 1024, twice or more")
    parser.add_argument("--verify-rows", type=int, default=8192, help="of the store to verify")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.7, help="a measurement, at least")
    parser.add_argument(
        "--patience", type=float, default=60, help="seconds to measure again in, while others work"
    )
    parser.add_argument("--folder", type=Path, help="keep the data here, and use what is there")
    parser.add_argument(
        "--only",
        nargs="+",
        choices=[*WORKLOADS, "verify"],
        default=[*WORKLOADS, "verify"],
        help="measure these and keep the others of --json",
    )
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.rows < 2048 or arguments.rows % 1024:  # a tar for each of two loaders
        parser.error(f"--rows {arguments.rows}: must be a multiple of 1024, 2048 at least")
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="cache-read-"))
    try:
        make(folder, arguments.rows)
        before = {}
        if arguments.json is not None and arguments.json.exists():
            before = json.loads(arguments.json.read_text(encoding="utf-8"))
        save(arguments.json, measure(folder, arguments, before))
    finally:
        if arguments.folder is None:
            shutil.rmtree(folder)


# -- data ------------------------------------------------------------------------------------------


def make(folder: Path, rows: int) -> None:
    """The store, the flat files and the tars, unless they are there."""
    if (folder / "made").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    make_store(folder / "store", rows)
    cache = Cache.open(folder / "store")
    space = cache[SPACE]
    codes = np.lib.format.open_memmap(folder / "codes.npy", "w+", np.int8, (rows, TOKENS, DIM))
    scales = np.lib.format.open_memmap(folder / "scales.npy", "w+", np.float16, (rows, TOKENS))
    for first in range(0, rows, 1024):
        with tarfile.open(folder / f"features-{first // 1024:04d}.tar", "w") as tar:
            for start in range(first, first + 1024, BATCH):
                part = space.read(np.arange(start, start + BATCH))
                codes[start : start + BATCH] = part.codes.numpy()
                scales[start : start + BATCH] = part.parts["scales"].numpy()
                for row, tokens in enumerate(space.decode(part).bfloat16(), start):
                    raw = safetensors.torch.save({"embedding": tokens.contiguous()})
                    entry = tarfile.TarInfo(f"{row:08d}.safetensors")
                    entry.size = len(raw)
                    tar.addfile(entry, io.BytesIO(raw))
    codes.flush()
    scales.flush()
    (folder / "made").touch()


def make_store(path: Path, rows: int) -> None:
    """Random tokens as int8: 197 kB a row; their values do not matter for reading."""
    space = SpaceSpec("vit", "patch", TOKENS, DIM, (16, 16))
    plan = StorePlan(
        samples={"count": rows, "sha256": "0" * 64},
        views={"name": "center", "count": 1},
        rows=rows,
        shard_rows=1024,
        group_rows=GROUP,
        teachers=(TeacherRecord("vit", (space,), {"weights": "random"}),),
    )
    writer = StoreWriter.open_or_create(path, plan)
    writer.calibrate(space.id, np.zeros(DIM), np.ones(DIM), rows_used=1)
    random = torch.Generator().manual_seed(0)
    for shard, units in writer.pending():
        with writer.shard(shard, units) as out:
            for first in range(shard * 1024, shard * 1024 + plan.rows_in(shard), BATCH):
                tokens = torch.randn(BATCH, TOKENS, DIM, generator=random)
                out.append(facts(first, BATCH), {space.id: tokens})
    writer.finish()


def facts(first: int, count: int) -> RowBatch:
    return RowBatch(
        keys=[f"{row:08d}" for row in range(first, first + count)],
        labels=np.zeros(count, np.int64),
        sizes=np.full((count, 2), 224),
        boxes=np.tile(np.float32([0, 0, 224, 224]), (count, 1)),
        flips=np.zeros(count, bool),
        valid=np.ones(count, bool),
    )


# -- measuring -------------------------------------------------------------------------------------


def check(folder: Path) -> None:
    """All contenders give the same numbers."""
    cache = Cache.open(folder / "store")
    rows = np.array([5, len(cache) - 1, 1023, len(cache) // 2])
    ours = cache[SPACE].read(rows)
    memmap = np.load(folder / "codes.npy", mmap_mode="r")[rows]
    group = zarr.open_group(folder / "store", mode="r")[f"spaces/{SPACE}"]
    for codes in (memmap, np.stack([group["codes"][int(row)] for row in rows])):
        if not np.array_equal(codes, ours.codes.numpy()):
            raise SystemExit("the contenders do not read the same codes")
    store = TensorStore(folder, 1)
    store.take([(0, 7)])
    if not np.array_equal(store.codes[:GROUP], group["codes"][7 * GROUP : 8 * GROUP]):
        raise SystemExit("tensorstore does not read the same codes")


def measure(folder: Path, arguments: argparse.Namespace, before: dict[str, Any]) -> dict[str, Any]:
    torch.set_num_threads(1)
    check(folder)
    missing = {"shuffled groups, warm", "verify"} - set(arguments.only)
    if missing and not before:
        raise SystemExit(f"--only leaves out {', '.join(missing)}, which --json does not hold yet")
    made = {
        (kind.name, threads): kind(folder, threads)  # type: ignore[attr-defined]
        for kind in CONTENDERS
        for threads in (1, 2)
    }
    patience = Patience(arguments.patience)
    found: dict[str, dict[str, dict[str, float]]] = dict(before.get("rows_per_second", {}))
    disturbed: dict[str, int] = dict(before.get("disturbed_measurements", {}))
    for workload, work in workloads(made):
        if workload not in arguments.only:
            continue
        rounds: dict[tuple[str, int], list[float]] = {key: [] for key in work}
        warm = workload.endswith("warm")
        if warm:
            read_in(folder, made.values())
        for turn in range(arguments.rounds + warm):
            for key, one in work.items():
                if not warm:
                    forget(folder, made.values())
                speed = undisturbed(one, arguments.seconds, patience) if warm else rate(one, 0.0)
                if turn or not warm:  # the first warm turn is for warming
                    rounds[key].append(speed)
        found[workload], disturbed[workload] = {}, patience.disturbed
        patience.disturbed = 0
        for (name, threads), speeds in rounds.items():
            found[workload].setdefault(name, {})[str(threads)] = median(speeds)
        show(
            f"rows a second: {workload}",
            ["", "1 thread", "2 threads"],
            [[name, speeds["1"], speeds["2"]] for name, speeds in found[workload].items()],
        )
    best = {name: max(s.values()) for name, s in found["shuffled groups, warm"].items()}
    versions = ("numpy", "torch", "zarr", "tensorstore", "webdataset", "safetensors")
    return {
        "machine": machine(versions),
        "rows": arguments.rows,
        "row_bytes": TOKENS * DIM + 2 * TOKENS,
        "rows_per_second": found,
        "disturbed_measurements": disturbed,
        "verify": verify_speed(folder / "verified", arguments.verify_rows, arguments.rounds)
        if "verify" in arguments.only
        else before["verify"],
        "summary": {
            "vs_memmap": best["preceptor"] / best["np.memmap"],
            "vs_memmap_8_batches": best["preceptor"] / best["np.memmap, 8 batches"],
            "vs_tensorstore": best["preceptor"] / best["tensorstore"],
            "vs_zarr": best["preceptor"] / best["zarr-python"],
            "vs_webdataset": best["preceptor"] / best["webdataset"],
        },
    }


def forget(folder: Path, contenders: Iterable[Contender]) -> None:
    """Nothing of the data is left in memory."""
    for contender in contenders:
        contender.forget()
    cold([folder])


def read_in(folder: Path, contenders: Iterable[Contender]) -> None:
    """All files as they are in memory after they came from the disk, not as they were written.

    The page cache holds what was read in large pieces and what was written page by page; the
    copies of all readers are up to twice as fast from the former, and stores are written once.
    """
    forget(folder, contenders)
    for file in sorted(folder.rglob("*")):
        if file.is_file():
            plain_read(file)


def workloads(
    made: dict[tuple[str, int], Contender],
) -> Iterator[tuple[str, dict[tuple[str, int], Callable[[], int]]]]:
    groups = {key: one.groups for key, one in made.items()}
    single = {key: one.single for key, one in made.items() if key[0] != "webdataset"}
    for name in WORKLOADS:
        yield name, groups if "groups" in name else single


def verify_speed(store: Path, rows: int, rounds: int) -> dict[str, float]:
    """Whole-store verification against reading the same files and doing nothing with them.

    The two take turns at going first: what a disk was asked for a moment ago it may give faster.
    """
    if not store.exists():
        make_store(store, rows)
    files = [file for file in store.rglob("*") if file.is_file()]
    size = sum(file.stat().st_size for file in files)

    def verify() -> None:
        report = verify_store(store)
        if not report.whole:
            raise SystemExit(str(report.problems[0]))

    def plainly() -> None:
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(plain_read, files))

    works: dict[str, Callable[[], None]] = {"plain_read": plainly, "verify": verify}
    found: dict[str, list[float]] = {name: [] for name in works}
    for turn in range(rounds + 1):
        for name in sorted(works, reverse=bool(turn % 2)):
            cold([store])
            start = time.perf_counter()
            works[name]()
            if turn:  # the first turn is for warming
                found[name].append(size / (time.perf_counter() - start))
    ours, plain = median(found["verify"]), median(found["plain_read"])
    show(
        "whole store, cold",
        ["", "MB/s", "least", "most"],
        [
            [name, median(speeds) / 1e6, min(speeds) / 1e6, max(speeds) / 1e6]
            for name, speeds in found.items()
        ],
    )
    return {
        "bytes": size,
        "verify_megabytes_per_second": ours / 1e6,
        "plain_read_megabytes_per_second": plain / 1e6,
        "vs_plain_read": ours / plain,
    }


def plain_read(file: Path) -> None:
    buffer = bytearray(4 << 20)
    fd = os.open(file, os.O_RDONLY)
    while os.readv(fd, [buffer]):
        pass
    os.close(fd)


if __name__ == "__main__":
    main()
