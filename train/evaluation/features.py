"""Frozen features of labelled images: of students by running them, of teachers from the store."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor

from ...cache import Cache
from ...cache.samples import SampleIndex
from ...errors import DataError
from ...progress import ProgressLine
from ..alignment import Alignment
from ..alignment.base import descriptor_spaces
from ..data import StoredViews, decoded, normalise, prefetched
from ..students import Student

_ROWS = 1024


@dataclass(frozen=True)
class LabelledRows:
    """The first view of every labelled image of a store, with the images themselves.

    Attributes:
        rows: int64 [n], valid rows of the store.
        labels: int64 [n].
    """

    cache: Cache
    index: SampleIndex
    rows: NDArray[np.int64]
    labels: NDArray[np.int64]

    @classmethod
    def open(cls, cache: str, shards: str | Sequence[str]) -> LabelledRows:
        """Open a store and its images.

        Raises:
            StoreError, DataError: either cannot be used, or no image has a label.
        """
        store = Cache.open(cache)
        index = SampleIndex.from_shards(shards)
        labels = np.asarray(store.labels, dtype=np.int64)
        views = int(store.manifest.plan.views["count"])
        first = np.arange(len(store)) % views == 0
        rows = np.flatnonzero(first & np.asarray(store.valid, dtype=bool) & (labels >= 0))
        if not len(rows):
            raise DataError(f"{cache}: no image has a label (.cls), so nothing can be scored")
        return cls(store, index, rows, labels[rows])


def student_features(
    fabric: Fabric,
    student: Student,
    alignment: Alignment,
    readouts: Sequence[str],
    images: LabelledRows,
    *,
    batch_size: int = 256,
    workers: int = 0,
    interpolation: str = "bicubic",
    max_pixels: int | None = None,
    title: str = "features",
) -> dict[str, Tensor]:
    """Readouts of a frozen student, float32 [n, K] each on the CPU, at the stored views.

    Raises:
        DataError: the images are not those of the store.
        ConfigError: the alignment has no such readout.
    """
    views = StoredViews(
        images.cache, images.index, student.size, interpolation=interpolation, max_pixels=max_pixels
    )
    parts = np.split(images.rows, range(batch_size, len(images.rows), batch_size))
    orders = [[(int(row), 0) for row in part] for part in parts]
    student.to(fabric.device).eval()
    alignment.to(fabric.device).eval()
    found: dict[str, list[Tensor]] = {readout: [] for readout in readouts}
    with torch.inference_mode(), ProgressLine(title, len(images.rows), "images") as line:
        for pixels in prefetched(decoded(views, orders, workers), 2):
            with fabric.autocast():
                output = student(normalise(pixels, fabric.device))
                for readout in readouts:
                    found[readout].append(alignment.readout(output, readout).float().cpu())
            line.advance(len(pixels))
    return {readout: torch.cat(parts) for readout, parts in found.items()}


def teacher_features(images: LabelledRows) -> Iterator[tuple[str, Tensor]]:
    """Every teacher's descriptors as the store holds them: (label, float32 [n, D]).

    In the teacher's own units. A teacher without a global space gives the mean of its last grid's
    tokens, the same that alignments learn.
    """
    cache = images.cache
    specs = {name: cache[name].spec for name in cache.spaces}
    for label, name in descriptor_spaces(specs).items():
        space = cache[name]
        parts = np.split(images.rows, range(_ROWS, len(images.rows), _ROWS))
        decoded_parts = [space.decode(space.read(part)).mean(1).float() for part in parts]
        yield label, torch.cat(decoded_parts).cpu()
