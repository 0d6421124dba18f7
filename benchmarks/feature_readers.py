"""The readers that cache_read.py compares, each over the same rows in the form that it reads."""

from __future__ import annotations

import mmap
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import tensorstore
import torch
import webdataset
import zarr
from preceptor.cache import Cache

TOKENS, DIM, GROUP, BATCH = 256, 768, 32, 256
KEPT = 8  # batches that ours holds: two windows of 1,024 rows
SPACE = "vit/patch"


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


class MemmapKept(Memmap):
    """The same copy into as many batches in turn as ours holds.

    A loader hands its batches out and cannot fill one buffer again and again. One of 50 MB stays in
    the processor's cache in part, where writing costs less.
    """

    name = "np.memmap, 8 batches"

    def open(self) -> None:
        super().open()
        self.batches = cycle(
            [(np.empty_like(self.codes), np.empty_like(self.scales)) for _ in range(KEPT)]
        )

    def take(self, jobs: list[tuple[int, int]]) -> None:
        self.codes, self.scales = next(self.batches)
        super().take(jobs)

    def take_rows(self, rows: np.ndarray) -> int:
        self.codes, self.scales = next(self.batches)
        return super().take_rows(rows)


class ZarrPython(Contender):
    name = "zarr-python"

    def open(self) -> None:
        # Heeded once, when zarr starts the threads that all its arrays share: as many as any has.
        zarr.config.set({"threading.max_workers": 2})
        group = zarr.open_group(self.folder / "store", mode="r")
        self.arrays = [group[f"spaces/{SPACE}/{name}"] for name in ("codes", "scales")]

    def take_group(self, place: int, group: int) -> None:
        there = slice(group * GROUP, (group + 1) * GROUP)
        here = slice(place * GROUP, (place + 1) * GROUP)
        self.codes[here], self.scales[here] = (array[there] for array in self.arrays)

    def take_rows(self, rows: np.ndarray) -> int:
        # Each group once, as ours: row by row, and by its own indexing with rows, it is slower.
        groups = rows // GROUP

        def some(own: np.ndarray) -> None:
            for group in own.tolist():
                places = np.flatnonzero(groups == group)
                there = slice(group * GROUP, (group + 1) * GROUP)
                for array, out in zip(self.arrays, (self.codes, self.scales), strict=True):
                    out[places] = array[there][rows[places] % GROUP]

        list(self.pool.map(some, np.array_split(np.unique(groups), self.threads)))
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
        # Each group once, as ours: by its own indexing with rows it is slower.
        groups = rows // GROUP
        futures = []
        for group in np.unique(groups).tolist():
            there, places = slice(group * GROUP, (group + 1) * GROUP), groups == group
            for array, out in zip(self.arrays, (self.codes, self.scales), strict=True):
                futures.append((array[there].read(), out, np.flatnonzero(places)))
        for future, out, places in futures:
            out[places] = future.result()[rows[places] % GROUP]
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


CONTENDERS: tuple[type[Contender], ...] = (
    Ours,
    Memmap,
    MemmapKept,
    ZarrPython,
    TensorStore,
    WebDataset,
)
