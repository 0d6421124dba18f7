"""Images to teacher inputs: decode once, one resize for every distinct input size."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from ..cache import PixelSpec, RowBatch, SampleIndex, ViewPolicy
from ..cache.views import INTERPOLATIONS
from ..errors import ConfigError, DamagedImageError, DataError
from .teachers import Preprocessing

Geometry = tuple[tuple[int, int], str]
"""Input size (height, width) and interpolation: what teachers must share to share pixels."""


PREFETCHED = 2
"""Batches that every worker decodes ahead."""
SHARED_MEMORY = "/dev/shm"
"""Where workers leave them, on Linux."""


@dataclass(frozen=True)
class ViewBatch:
    """Consecutive rows: their facts, and the pixels of those whose image could be decoded.

    Attributes:
        rows: facts of all `b` rows.
        pixels: per geometry, uint8 [v, 3, height, width] of the `v <= b` valid rows.
        problems: one sentence for every invalid row.
        unread: what kept the bytes of an image from being read; None for nothing. It says nothing
            of the image, so that nobody may take its row for a damaged one.
    """

    rows: RowBatch
    pixels: dict[Geometry, Tensor]
    problems: list[str]
    unread: str | None = None

    def pin_memory(self) -> ViewBatch:
        """With its pixels in pinned memory; what `DataLoader` calls, which passes by what has no
        such method."""
        pixels = {geometry: pixels.pin_memory() for geometry, pixels in self.pixels.items()}
        return replace(self, pixels=pixels)


class ViewDataset(Dataset[ViewBatch]):
    """Batches of rows as a map-style dataset: item `i` is the `i`-th list of row numbers.

    A damaged image travels as a sentence instead of an exception, so that the parent process
    decides what becomes of it and a worker's traceback never reaches the user.
    """

    def __init__(
        self,
        index: SampleIndex,
        policy: ViewPolicy,
        geometries: Sequence[Geometry],
        batches: Sequence[Sequence[int]],
        max_pixels: int,
    ) -> None:
        self.index, self.policy, self.max_pixels = index, policy, max_pixels
        self.geometries, self.batches = list(dict.fromkeys(geometries)), batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, item: int) -> ViewBatch:
        keys: list[str] = []
        problems: list[str] = []
        unread: str | None = None
        facts: list[tuple[int, int, tuple[float, float, float, float], bool, bool]] = []
        pixels: dict[Geometry, list[np.ndarray]] = {geometry: [] for geometry in self.geometries}
        numbers = self.batches[item]
        count = self.policy.count
        samples = [row // count for row in numbers]
        # The views of an image stand side by side: it is decoded once for all of them.
        views = [
            (sample, list(rows)) for sample, rows in groupby(numbers, lambda row: row // count)
        ]
        images = self.index.images((sample for sample, _ in views), self.max_pixels)
        for (sample, rows), image in zip(views, images, strict=True):
            key = self.index.keys[sample]
            keys += [key] * len(rows)
            if isinstance(image, DataError):
                if not isinstance(image, DamagedImageError):
                    unread = unread or str(image)
                problems += [str(image)] * len(rows)
                facts += [(0, 0, (0.0, 0.0, 0.0, 0.0), False, False)] * len(rows)
                continue
            for row in rows:
                view = self.policy.draw(key, row % count, image.width, image.height)
                facts.append((image.height, image.width, view.box, view.flip, True))
                for size, interpolation in self.geometries:
                    pixels[size, interpolation].append(view.pixels(image, size, interpolation))
        return ViewBatch(
            rows=RowBatch(
                keys=keys,
                labels=self.index.labels[samples],
                sizes=np.array([fact[:2] for fact in facts], dtype=np.int32),
                boxes=np.array([fact[2] for fact in facts], dtype=np.float32),
                flips=np.array([fact[3] for fact in facts], dtype=bool),
                valid=np.array([fact[4] for fact in facts], dtype=bool),
            ),
            pixels={
                geometry: torch.from_numpy(np.stack(arrays)).permute(0, 3, 1, 2)
                if arrays
                else torch.empty(0, 3, *geometry[0], dtype=torch.uint8)
                for geometry, arrays in pixels.items()
            },
            problems=problems,
            unread=unread,
        )


def view_batches(
    dataset: ViewDataset, workers: int, *, pin: bool, order: Iterable[int] | None = None
) -> Iterator[ViewBatch]:
    """The dataset's batches, decoded ahead by `workers` processes (0: in this one).

    Args:
        order: of the items; asked for the next one when there is room for it. None: all of them.
    """
    options: dict[str, Any] = {} if order is None else {"sampler": order}
    if workers:
        _check_shared_memory(dataset, workers)
        start = dataset.index.start_method
        options |= {"prefetch_factor": PREFETCHED, "multiprocessing_context": start}
    loader = DataLoader(dataset, batch_size=None, num_workers=workers, pin_memory=pin, **options)
    return iter(loader)


def _check_shared_memory(dataset: ViewDataset, workers: int) -> None:
    """Refuse more workers than shared memory has room for: one that finds none hands over nothing,
    and who waits for its batch would wait for ever.

    Raises:
        ConfigError: names both sizes, and how many workers there is room for.
    """
    rows = max(map(len, dataset.batches), default=0)
    each = PREFETCHED * rows * sum(3 * height * width for (height, width), _ in dataset.geometries)
    free = shutil.disk_usage(SHARED_MEMORY).free if os.path.isdir(SHARED_MEMORY) else None
    if free is not None and workers * each > free:
        raise ConfigError(
            f"workers={workers}: their batches take up to {workers * each / 2**20:,.0f} MiB of "
            f"shared memory and {SHARED_MEMORY} has {free / 2**20:,.0f} MiB free: say "
            f"workers={free // each} or a smaller batch_size, or give the container more "
            "(docker run --shm-size=8g)"
        )


def stored_pixels(options: DictConfig | None) -> PixelSpec | None:
    """What the ``pixels`` options ask for; None where ``size`` is null.

    Raises:
        ConfigError: ``size`` is neither a side nor [height, width], or no such interpolation.
    """
    if options is None or options.size is None:
        return None
    size, interpolation = options.size, str(options.interpolation)
    edges = list(size) if isinstance(size, Sequence) and not isinstance(size, str) else [size] * 2
    if len(edges) != 2 or not all(type(edge) is int and edge > 0 for edge in edges):
        raise ConfigError(f"pixels.size={size}: expected a side in pixels, or [height,width]")
    if interpolation not in INTERPOLATIONS:
        raise ConfigError(
            f"pixels.interpolation={interpolation}: valid are {', '.join(INTERPOLATIONS)}"
        )
    return PixelSpec((edges[0], edges[1]), interpolation)


def geometry(preprocessing: Preprocessing) -> Geometry:
    """The part of a preprocessing that decides about pixels before normalisation."""
    return preprocessing.size, preprocessing.interpolation


def batched(rows: Sequence[int], size: int) -> list[Sequence[int]]:
    """Rows in lists of at most `size`."""
    return [rows[first : first + size] for first in range(0, len(rows), size)]
