"""Frozen features of a store's images, of students by running them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from importlib.metadata import version
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from ...cache import Cache
from ...cache.samples import SampleIndex, list_samples
from ...errors import ConfigError, DataError
from ...progress import ProgressLine
from ..alignment import Alignment
from ..batch import normalise
from ..loading import decoded, prefetched
from ..students import Student, StudentOutput
from ..views import choose_views, join
from .base import Array, OnDemand
from .corruptions import Corruption
from .feature_cache import FeatureCache
from .labels import Task

MAP = "map"
"""The readout of protocols that read tokens on a grid: the student's own tokens."""
_VERSIONS = {name: version(name) for name in ("torch", "timm", "Pillow")}
"""What a student's features depend on beside weights and images."""

Room = Callable[[Sequence[int]], Array]
"""Makes an empty float32 array of a shape."""

Units = tuple[Tensor, Tensor]
"""Mean and deviation [D] of a space, by which its tokens were standardised."""

Wanted = tuple[str, Corruption | None]
"""A readout, of the images as they are (None) or corrupted."""


@dataclass(frozen=True)
class Reader:
    """How features are read of a student.

    Attributes:
        run: normalised pixels [B, 3, H, W] to the student's output.
        readouts: how each is taken of that output.
        spaces: of those that are embeddings in a teacher's space, that space.
    """

    run: Callable[[Tensor], StudentOutput]
    readouts: Mapping[str, Callable[[StudentOutput], Tensor]]
    spaces: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class LabelledRows:
    """The first view of every labelled image of a store, with the images themselves.

    Attributes:
        rows: int64 [n], valid rows of the store; labelled for at least one task.
        labels: int64 [n], the store's classes (``.cls``), -1 where unknown.
        truths: labels by task, in the form of `Task.read`.
    """

    cache: Cache
    index: SampleIndex
    rows: NDArray[np.int64]
    labels: NDArray[np.int64]
    truths: Mapping[str, NDArray[Any]] = field(default_factory=dict)

    @classmethod
    def open(
        cls,
        cache: str,
        shards: str | Sequence[str],
        tasks: Sequence[Task] = (Task("class", "classification", "cls"),),
        *,
        max_pixels: int | None = None,
        option: str = "data.shards",
    ) -> LabelledRows:
        """Open a store and its images.

        Args:
            tasks: whose labels to read; without any, every image is taken.
            max_pixels: a larger label map is refused.
            option: what named the images, for messages.

        Raises:
            StoreError, DataError: either cannot be used, they are not of the same images, or no
                image has a label for some task.
        """
        store = Cache.open(cache)
        members = dict.fromkeys(task.member for task in tasks if task.member)
        index = list_samples(shards, list(members))
        views = store.plan.views_a_sample
        first = np.arange(len(store)) % views == 0
        rows = np.flatnonzero(first & np.asarray(store.valid, dtype=bool))
        if not len(rows):
            raise DataError(f"{cache}: no image has tokens, so nothing can be scored")
        samples = join(store, index, option)[0][rows]
        limit = {} if max_pixels is None else {"max_pixels": max_pixels}
        truths = {task.name: task.read(store, index, rows, samples, **limit) for task in tasks}
        kept = np.zeros(len(rows), dtype=bool)
        for task in tasks:
            values = truths[task.name]
            labelled = ~np.isnan(values) if values.dtype.kind == "f" else values >= 0
            if not labelled.any():
                of = f", field {' or '.join(task.fields)}" if task.member == "json" else ""
                raise DataError(
                    f"{cache}: no image has a label (.{task.member or 'cls'}{of}) of task "
                    f"{task.name}, so nothing can be scored"
                )
            kept |= labelled.reshape(len(rows), -1).any(1)
        if not tasks:
            kept[:] = True
        labels = np.asarray(store.labels, dtype=np.int64)[rows]
        return cls(
            store,
            index,
            rows[kept],
            labels[kept],
            {name: values[kept] for name, values in truths.items()},
        )

    @cached_property
    def identity(self) -> dict[str, str]:
        """What determines the pixels and the order of the rows: samples, views, row numbers.

        Images are known by their shard's name, key and length in bytes, as in the manifest.
        """
        return {
            "rows": self.cache.manifest.configuration("rows"),
            "samples": self.index.sha256,
            "chosen": hashlib.sha256(self.rows.astype("<i8").tobytes()).hexdigest(),
        }

    def teacher_identity(self, teacher: str) -> dict[str, Any]:
        """What determines a teacher's tokens of the rows."""
        return {
            "teacher": self.cache.manifest.configuration(teacher),
            "records": list(self.cache.completions[teacher].records),
            "chosen": self.identity["chosen"],
        }


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
    alignment.to(fabric.device).eval()
    found = run_student(
        fabric,
        student,
        aligned_reader(student, alignment, readouts),
        images,
        [(readout, None) for readout in readouts],
        batch_size=batch_size,
        workers=workers,
        interpolation=interpolation,
        max_pixels=max_pixels,
        title=title,
    )
    return {readout: torch.from_numpy(found[readout, None]) for readout in readouts}


def aligned_reader(
    student: Student,
    alignment: Alignment,
    names: Sequence[str],
    embeddings: Mapping[str, Units] | None = None,
) -> Reader:
    """Readouts of a trained student: those of its alignment, `MAP`, and predicted embeddings.

    Args:
        embeddings: spaces whose predicted descriptors are read in the teacher's own units, with
            the mean and deviation [D] that the alignment's targets were standardised by.

    Raises:
        ConfigError: the alignment has no such readout.
    """

    def reader(name: str) -> Callable[[StudentOutput], Tensor]:
        return lambda output: alignment.readout(output, name)

    def predicted(space: str, units: Units) -> Callable[[StudentOutput], Tensor]:
        label = next(own for own, of in alignment.descriptors.items() if of == space)

        def read(output: StudentOutput) -> Tensor:
            said = alignment.predict(output, dense=False).descriptors[label]
            mean, std = (part.to(said.device) for part in units)
            return alignment.standardised(space, said).float() * std + mean

        return read

    for name in names:
        if name != MAP and name not in alignment.readouts:
            raise ConfigError(
                f"readout {name!r}: {type(alignment).__name__} has {', '.join(alignment.readouts)}"
            )
    return Reader(
        partial(alignment.run_student, student),
        {name: _tokens if name == MAP else reader(name) for name in names}
        | {_said(space): predicted(space, units) for space, units in (embeddings or {}).items()},
        {_said(space): space for space in embeddings or {}},
    )


def _said(space: str) -> str:
    """The readout of a space's embeddings as the student predicts them."""
    return f"embedding of {space}"


def _tokens(output: StudentOutput) -> Tensor:
    return output.tokens


def _spatial(output: StudentOutput) -> Tensor:
    return quarters(output.tokens, output.grid)


def plain_reader(student: Student, names: Sequence[str]) -> Reader:
    """Those of the readouts that a backbone has without an alignment."""
    return Reader(student, {name: read for name, read in PLAIN.items() if name in names})


PLAIN: Mapping[str, Callable[[StudentOutput], Tensor]] = {
    "pooled": lambda output: output.pooled,
    "spatial": _spatial,
    MAP: _tokens,
}


def quarters(tokens: Tensor, grid: tuple[int, int]) -> Tensor:
    """Tokens [B, N, C] pooled to 2 x 2 and laid side by side: [B, 4 C], row-major."""
    pooled = functional.adaptive_avg_pool2d(tokens.transpose(1, 2).unflatten(2, grid), 2)
    return pooled.flatten(2).transpose(1, 2).flatten(1)


def in_memory(shape: Sequence[int]) -> Array:
    """A `Room`."""
    return np.empty(shape, dtype=np.float32)


def run_student(
    fabric: Fabric,
    student: Student,
    reader: Reader,
    images: LabelledRows,
    wanted: Sequence[Wanted],
    *,
    batch_size: int,
    workers: int,
    interpolation: str,
    max_pixels: int | None,
    title: str,
    room: Room = in_memory,
) -> dict[Wanted, Array]:
    """Features of a frozen student in one pass over the images, float32 [n, K] or [n, N, C].

    Images are decoded once, or not at all where the store has their pixels as the student takes
    them; every corruption is applied to the stored view at the student's size.

    Args:
        room: where the features go: memory, or `FeatureCache.room`.

    Raises:
        DataError: the images are not those of the store.
    """
    views, _ = choose_views(
        images.cache, lambda: images.index, student.size,
        interpolation=interpolation, max_pixels=max_pixels,
    )  # fmt: skip
    parts = np.split(images.rows, range(batch_size, len(images.rows), batch_size))
    orders = [[(int(row), 0) for row in part] for part in parts]
    student.to(fabric.device).eval()
    corruptions = list(dict.fromkeys(corruption for _, corruption in wanted))
    found: dict[Wanted, Array] = {}
    with (
        torch.inference_mode(),
        ThreadPoolExecutor(max(1, workers)) as pool,  # what corrupts pixels holds no lock
        ProgressLine(title, len(images.rows), "images") as line,
    ):
        batches = zip(parts, prefetched(decoded(views, orders, workers), 2), strict=True)
        done = 0
        for rows, pixels in batches:
            for corruption in corruptions:
                seen = pixels if corruption is None else _corrupted(pool, corruption, pixels, rows)
                with fabric.autocast():
                    output = reader.run(normalise(seen, fabric.device))
                    for key in wanted:
                        if key[1] == corruption:
                            part = reader.readouts[key[0]](output).float().cpu().numpy()
                            if key not in found:
                                # Filled part by part: joining parts would hold everything twice.
                                found[key] = room((len(images.rows), *part.shape[1:]))
                            found[key][done : done + len(part)] = part
            done += len(pixels)
            line.advance(len(pixels))
    return {key: found[key] for key in wanted}


def _corrupted(
    pool: ThreadPoolExecutor, corruption: Corruption, pixels: Tensor, rows: NDArray[np.int64]
) -> Tensor:
    return torch.from_numpy(np.stack(list(pool.map(corruption, pixels.numpy(), rows.tolist()))))


def cached_run(
    kept: FeatureCache,
    fabric: Fabric,
    student: Student,
    reader: Reader,
    images: LabelledRows,
    wanted: Sequence[Wanted],
    weights: Mapping[str, Any],
    *,
    prepare: Callable[[], None] = lambda: None,
    **options: Any,
) -> Mapping[Wanted, Array]:
    """`run_student` for what the feature cache lacks.

    Features are left in the cache and mapped from there whenever they are asked for: all readouts
    of all images, and of all their corruptions, are more than a machine's memory.

    Args:
        weights: JSON that determines the student and its readouts.
        prepare: makes the student what `weights` says, where it is to be run.
    """

    def identity(key: Wanted) -> dict[str, Any]:
        readout, corruption = key
        changed = corruption and [corruption.name, corruption.severity, corruption.seed]
        return {
            **images.identity,
            "weights": dict(weights),
            "readout": readout,
            "corruption": changed,
            "size": list(student.size),
            "interpolation": options["interpolation"],
            "device": fabric.device.type,
            "precision": str(fabric.strategy.precision.precision),
            "versions": _VERSIONS,
        }

    missing = [key for key in wanted if kept.get(identity(key), len(images.rows)) is None]
    if missing:
        prepare()
        made = run_student(fabric, student, reader, images, missing, room=kept.room, **options)
        for key in missing:
            kept.put(identity(key), made.pop(key))
    return OnDemand(wanted, lambda key: kept.read(identity(key), len(images.rows)))
