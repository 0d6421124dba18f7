"""Rows a second of this project's reader and of others, from the same bytes where they can.

zarr-python and tensorstore read the very store that ours reads. np.memmap copies the same codes
and scales out of flat files and checks nothing: the ceiling. WebDataset reads tars of bfloat16
safetensors, one a row, the form in which features are usually published.

Shuffled groups: an epoch, groups of rows in random order, batches of 256 rows. Random rows: 256
row numbers from anywhere at once. Each contender is measured with one and with two threads (for
WebDataset: in this process, and with two loader processes), in turns, median of the rounds; the
summary compares the better of the two. Checksums are verified by ours, zarr-python and
tensorstore.

    python benchmarks/cache_read.py --json benchmarks/results/cache_read.json
"""

from __future__ import annotations

import argparse
import io
import mmap
import os
import shutil
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import tensorstore
import torch
import webdataset
import zarr
from preceptor.benchmarks.harness import cold, machine, median, rate, save, show
from preceptor.cache import Cache, RowBatch, SpaceSpec, StorePlan, StoreWriter, TeacherRecord
from preceptor.cache.verify import verify_store

TOKENS, DIM, GROUP, BATCH = 256, 768, 32, 256
SPACE = "vit/patch"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=3072)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=0.7, help="a measurement, at least")
    parser.add_argument("--folder", type=Path, help="keep the data here, and use what is there")
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = arguments.folder or Path(tempfile.mkdtemp(prefix="cache-read-"))
    try:
        make(folder, arguments.rows)
        save(arguments.json, measure(folder, arguments))
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


# -- contenders ------------------------------------------------------------------------------------


class Contender:
    """Reads an epoch of shuffled groups, or a batch of random rows; returns how many rows."""

    def __init__(self, folder: Path, threads: int) -> None:
        self.folder, self.threads = folder, threads
        self.rows = len(Cache.open(folder / "store"))
        self.random = np.random.default_rng(threads)
        self.codes = np.empty((BATCH, TOKENS, DIM), np.int8)
        self.scales = np.empty((BATCH, TOKENS), np.float16)
        self.pool = ThreadPoolExecutor(threads)
        self.open()

    def open(self) -> None:
        pass

    def forget(self) -> None:
        """Let go of what would keep files in the page cache."""

    def groups(self) -> int:
        """An epoch in batches of eight random groups."""
        order = self.random.permutation(self.rows // GROUP)
        each = BATCH // GROUP
        for at in range(0, len(order), each):
            jobs = list(enumerate(order[at : at + each].tolist()))
            self.take(jobs)
        return self.rows

    def take(self, jobs: list[tuple[int, int]]) -> None:
        """Read groups into their part of the batch, on the pool where there are threads."""
        if self.threads == 1:
            for place, group in jobs:
                self.take_group(place, group)
        else:
            list(self.pool.map(lambda job: self.take_group(*job), jobs))

    def take_group(self, place: int, group: int) -> None:
        raise NotImplementedError

    def single(self) -> int:
        return self.take_rows(self.random.integers(self.rows, size=BATCH))

    def take_rows(self, rows: np.ndarray) -> int:
        raise NotImplementedError


class Ours(Contender):
    name = "preceptor"

    def open(self) -> None:
        self.cache = Cache.open(self.folder / "store")
        self.epoch = 0

    def groups(self) -> int:
        self.epoch += 1
        seen = 0
        for batch in self.cache.batches(
            [SPACE], BATCH, seed=0, epoch=self.epoch, threads=self.threads
        ):
            seen += len(batch.rows)
        return seen

    def take_rows(self, rows: np.ndarray) -> int:
        return len(self.cache[SPACE].read(rows, threads=self.threads))


class Memmap(Contender):
    name = "np.memmap"

    def open(self) -> None:
        self.from_codes = np.load(self.folder / "codes.npy", mmap_mode="r")
        self.from_scales = np.load(self.folder / "scales.npy", mmap_mode="r")

    def forget(self) -> None:
        for array in (self.from_codes, self.from_scales):
            array._mmap.madvise(mmap.MADV_DONTNEED)  # type: ignore[attr-defined]

    def take_group(self, place: int, group: int) -> None:
        there = slice(group * GROUP, (group + 1) * GROUP)
        here = slice(place * GROUP, (place + 1) * GROUP)
        self.codes[here] = self.from_codes[there]
        self.scales[here] = self.from_scales[there]

    def take_rows(self, rows: np.ndarray) -> int:
        def some(places: np.ndarray) -> None:
            for place in places.tolist():
                self.codes[place] = self.from_codes[rows[place]]
                self.scales[place] = self.from_scales[rows[place]]

        list(self.pool.map(some, np.array_split(np.arange(len(rows)), self.threads)))
        return len(rows)


class ZarrPython(Contender):
    name = "zarr-python"

    def open(self) -> None:
        zarr.config.set({"threading.max_workers": self.threads})
        group = zarr.open_group(self.folder / "store", mode="r")
        self.arrays = [group[f"spaces/{SPACE}/{name}"] for name in ("codes", "scales")]

    def take_group(self, place: int, group: int) -> None:
        there = slice(group * GROUP, (group + 1) * GROUP)
        here = slice(place * GROUP, (place + 1) * GROUP)
        self.codes[here], self.scales[here] = (array[there] for array in self.arrays)

    def take_rows(self, rows: np.ndarray) -> int:
        # row by row: its own indexing with an array of rows is slower still
        rows = rows[:32]
        for place, row in enumerate(rows.tolist()):
            self.codes[place], self.scales[place] = (array[row] for array in self.arrays)
        return len(rows)


class TensorStore(Contender):
    name = "tensorstore"

    def open(self) -> None:
        context = tensorstore.Context(
            {
                "data_copy_concurrency": {"limit": self.threads},
                "file_io_concurrency": {"limit": self.threads},
                "cache_pool": {"total_bytes_limit": 50_000_000},  # for shard indices
            }
        )
        self.arrays = [
            tensorstore.open(
                {
                    "driver": "zarr3",
                    "kvstore": {
                        "driver": "file",
                        "path": str(self.folder / f"store/spaces/{SPACE}/{name}/"),
                    },
                    "recheck_cached_data": "open",
                    "recheck_cached_metadata": "open",
                },
                context=context,
                read=True,
                open=True,
            ).result()
            for name in ("codes", "scales")
        ]

    def take(self, jobs: list[tuple[int, int]]) -> None:
        futures = []
        for place, group in jobs:
            there = slice(group * GROUP, (group + 1) * GROUP)
            here = slice(place * GROUP, (place + 1) * GROUP)
            for array, out in zip(self.arrays, (self.codes, self.scales), strict=True):
                view = tensorstore.array(out[here], copy=False)
                futures.append(view.write(array[there].translate_to[0]))
        for future in futures:
            future.result()

    def take_rows(self, rows: np.ndarray) -> int:
        for future in [array[rows.tolist()].read() for array in self.arrays]:
            future.result()
        return len(rows)


class WebDataset(Contender):
    name = "webdataset"

    def groups(self) -> int:
        tars = sorted(str(path) for path in self.folder.glob("features-*.tar"))
        data = (
            webdataset.WebDataset(tars, shardshuffle=len(tars), seed=int(self.random.integers(99)))
            .shuffle(1024)
            .map(load)
            .batched(BATCH, collation_fn=torch.stack)
        )
        if self.threads == 1:
            return sum(len(batch) for batch in data)
        loader = torch.utils.data.DataLoader(data, batch_size=None, num_workers=self.threads)
        return sum(len(batch) for batch in loader)


def load(sample: dict[str, Any]) -> torch.Tensor:
    tokens: torch.Tensor = safetensors.torch.load(sample["safetensors"])["embedding"]
    return tokens


CONTENDERS: tuple[type[Contender], ...] = (Ours, Memmap, ZarrPython, TensorStore, WebDataset)


# -- measuring -------------------------------------------------------------------------------------


def check(folder: Path) -> None:
    """All contenders give the same numbers."""
    rows = np.array([5, 2000, 1023, 1024])
    ours = Cache.open(folder / "store")[SPACE].read(rows)
    memmap = np.load(folder / "codes.npy", mmap_mode="r")[rows]
    group = zarr.open_group(folder / "store", mode="r")[f"spaces/{SPACE}"]
    for codes in (memmap, np.stack([group["codes"][int(row)] for row in rows])):
        if not np.array_equal(codes, ours.codes.numpy()):
            raise SystemExit("the contenders do not read the same codes")
    store = TensorStore(folder, 1)
    store.take([(0, 7)])
    if not np.array_equal(store.codes[:GROUP], group["codes"][7 * GROUP : 8 * GROUP]):
        raise SystemExit("tensorstore does not read the same codes")


def measure(folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    torch.set_num_threads(1)
    check(folder)
    made = {
        (kind.name, threads): kind(folder, threads)  # type: ignore[attr-defined]
        for kind in CONTENDERS
        for threads in (1, 2)
    }
    found: dict[str, dict[str, dict[str, float]]] = {}
    for workload, work in workloads(made):
        rounds: dict[tuple[str, int], list[float]] = {key: [] for key in work}
        warm = workload.endswith("warm")
        for turn in range(arguments.rounds + warm):
            for (name, threads), one in work.items():
                if name == "zarr-python":
                    zarr.config.set({"threading.max_workers": threads})
                if not warm:
                    for contender in made.values():
                        contender.forget()
                    cold([folder])
                speed = rate(one, arguments.seconds if warm else 0.0)
                if turn or not warm:  # the first warm turn is for warming
                    rounds[name, threads].append(speed)
        found[workload] = {}
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
        "verify": verify_speed(folder / "store"),
        "summary": {
            "vs_memmap": best["preceptor"] / best["np.memmap"],
            "vs_tensorstore": best["preceptor"] / best["tensorstore"],
            "vs_zarr": best["preceptor"] / best["zarr-python"],
            "vs_webdataset": best["preceptor"] / best["webdataset"],
        },
    }


def workloads(
    made: dict[tuple[str, int], Contender],
) -> Iterator[tuple[str, dict[tuple[str, int], Callable[[], int]]]]:
    groups = {key: one.groups for key, one in made.items()}
    single = {key: one.single for key, one in made.items() if key[0] != "webdataset"}
    yield "shuffled groups, warm", groups
    yield "random rows, warm", single
    yield "shuffled groups, cold", groups
    yield "random rows, cold", single


def verify_speed(store: Path) -> dict[str, float]:
    """Whole-store verification against reading the same files and doing nothing with them."""
    found: dict[str, list[float]] = {"verify": [], "plain_read": []}
    size = sum(file.stat().st_size for file in store.rglob("*") if file.is_file())
    for _ in range(3):
        cold([store])
        start = time.perf_counter()
        report = verify_store(store)
        found["verify"].append(size / (time.perf_counter() - start))
        if not report.whole:
            raise SystemExit(str(report.problems[0]))
        cold([store])
        start = time.perf_counter()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(plain_read, [file for file in store.rglob("*") if file.is_file()]))
        found["plain_read"].append(size / (time.perf_counter() - start))
    verify, plain = median(found["verify"]), median(found["plain_read"])
    show(
        "whole store, cold, two threads",
        ["", "MB/s"],
        [["verify, every checksum", verify / 1e6], ["plain read", plain / 1e6]],
    )
    return {
        "verify_megabytes_per_second": verify / 1e6,
        "plain_read_megabytes_per_second": plain / 1e6,
        "vs_plain_read": verify / plain,
    }


def plain_read(file: Path) -> None:
    buffer = bytearray(4 << 20)
    fd = os.open(file, os.O_RDONLY)
    while os.readv(fd, [buffer]):
        pass
    os.close(fd)


if __name__ == "__main__":
    main()
