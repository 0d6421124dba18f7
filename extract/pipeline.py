"""Stage 1: images -> views -> teachers -> encoded shards of the store.

Each process of a distributed launch takes every `world`-th pending shard; shards are independent,
so there is nothing to synchronise but the calibration before and the statistics after.
"""

from __future__ import annotations

import contextlib
import sys
import time
import uuid
from collections.abc import Iterable, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning_fabric import Fabric
from omegaconf import DictConfig
from torch import Tensor

from ..cache import (
    Cache,
    PixelSpec,
    SampleIndex,
    SpaceSpec,
    StorePlan,
    StoreWriter,
    TeacherRecord,
    ViewPolicy,
    class_sorted,
)
from ..cache.commit_thread import CommitThread
from ..cache.plan import PIXELS
from ..cache.rows import is_text
from ..cache.samples import list_samples
from ..cache.source import local_path
from ..cache.verify_report import write_beside
from ..engine import decoders, gathered, launch, one_first, precision
from ..errors import ConfigError, DataError, StoreError
from ..measure import peak_memory_mb
from ..options import plain
from ..pixels import normalise
from ..progress import ProgressLine
from .calibration import calibrate
from .images import Geometry, ViewBatch, ViewDataset, batched, geometry, stored_pixels, view_batches
from .teachers import OPTIONS, Teacher, closest, load_teacher
from .teachers.base import refuse_other_shapes

TEACHERS_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
PATIENCE = timedelta(days=7)
"""How long processes wait for each other: their shares of a large store end hours apart."""


def extract(config: DictConfig) -> dict[str, Any]:
    """Make the store that `config` (configs/extract.yaml) describes, or finish one that was begun.

    Returns:
        What the JSON summary beside the store (`<store>.extract.json`) holds.

    Raises:
        ConfigError, DataError, TeacherError, StoreError: each with one sentence for the user.
    """
    started = time.monotonic()
    _validate(config)
    fabric = launch(config.engine, patience=PATIENCE)
    with one_first(fabric):
        index = _sample_index(config, quiet=fabric.global_rank > 0)
    views = plain(config.views)
    # The other policies draw nothing, and their views are the same whatever the seed.
    policy = ViewPolicy(**views, seed=int(config.seed) if views["name"] == "random" else 0)
    teachers = load_teachers(config.teachers)
    plan = StorePlan(
        samples=index.describe(),
        views=policy.describe(),
        rows=len(index) * policy.count,
        shard_rows=config.shard_rows,
        group_rows=config.group_rows,
        teachers=tuple(
            teacher_record(teacher, options, teachers_precision(config.engine))
            for teacher, options in zip(teachers, config.teachers.values(), strict=True)
        ),
        key_bytes=key_room(index),
        pixels=stored_pixels(config.pixels),
    )
    runner = TeacherRunner(fabric, teachers, index, policy, config)
    if fabric.global_rank == 0:
        calibrate(StoreWriter.open_or_create(config.cache, plan), runner, config)
    fabric.barrier()
    check_same_folder(fabric, config.cache)
    writer = StoreWriter.open_or_create(config.cache, plan)
    done = gathered(fabric, (runner.fill(writer), runner.rows_extracted))
    summary: dict[str, Any] = {}
    if fabric.global_rank == 0:
        writer.finish()
        problems = [problem for share, _ in done for problem in share]
        extracted = sum(rows for _, rows in done)
        summary = _summary(config, started, runner, extracted, problems)
        keep_summary(config.cache, "extract", summary)
        print(
            f"{config.cache}: {summary['rows']:,} rows, {summary['bytes'] / 2**20:,.1f} MiB, "
            f"{summary['bytes_per_row']:,.0f} bytes a row; "
            f"{summary['rows_extracted']:,} rows extracted now in {summary['seconds']:.0f} s"
            + (f"; {summary['rows_invalid']} invalid rows" if summary["rows_invalid"] else "")
        )
    return summary


def check_same_folder(fabric: Fabric, path: str) -> None:
    """Refuse a store that is not one folder for all processes: each machine would fill its own.

    A collective.

    Raises:
        ConfigError: on every process, with those that do not see what the first one writes.
    """
    if fabric.world_size == 1:
        return
    token = fabric.broadcast(f".seen-{uuid.uuid4().hex}")
    mark = Path(path) / token
    if fabric.global_rank == 0:
        mark.touch()
    fabric.barrier()
    blind = [rank for rank, sees in enumerate(gathered(fabric, mark.exists())) if not sees]
    if fabric.global_rank == 0:
        mark.unlink()
    if blind:
        raise ConfigError(
            f"cache={path} is another folder for process {', '.join(map(str, blind))} than for "
            "process 0: on several machines it must be one that they share"
        )


class TeacherRunner:
    """Runs every teacher over the views of given rows, on the device Fabric chose."""

    def __init__(
        self,
        fabric: Fabric,
        teachers: Sequence[Teacher],
        index: SampleIndex,
        policy: ViewPolicy,
        config: DictConfig,
    ) -> None:
        self.fabric, self.teachers = fabric, teachers
        self.index, self.policy = index, policy
        self.batch_size, self.workers = int(config.batch_size), decoders(config.workers)
        if self.batch_size < 1:
            raise ConfigError(f"batch_size={self.batch_size}: expected a positive number")
        self.max_pixels = int(config.data.max_pixels)
        self.skip_corrupt = config.on_corrupt == "skip"
        self.rows_extracted = 0
        for teacher in teachers:
            teacher.to(fabric.device)

    def batches(
        self, rows: Iterable[Sequence[int]], pixels: PixelSpec | None = None
    ) -> Iterable[ViewBatch]:
        """Decode the given lists of rows; a damaged image stops the run unless skipping is on, one
        that cannot be read always does.

        Args:
            pixels: a further geometry, beside those of the teachers.
        """
        geometries = [geometry(teacher.preprocessing) for teacher in self.teachers]
        if pixels is not None:
            geometries.append((pixels.size, pixels.interpolation))
        dataset = ViewDataset(self.index, self.policy, geometries, list(rows), self.max_pixels)
        pin = self.fabric.device.type == "cuda"
        for batch in view_batches(dataset, self.workers, pin=pin):
            if batch.unread is not None:
                raise DataError(batch.unread)
            if batch.problems and not self.skip_corrupt:
                raise DataError(
                    f"{batch.problems[0]} (on_corrupt=skip leaves such images out and counts them)"
                )
            yield batch

    @torch.inference_mode()
    def tokens(self, batch: ViewBatch, only: Sequence[str] | None = None) -> dict[str, Tensor]:
        """Every space `teacher/name` of a batch's valid rows as float32 [v, N, D] on the device.

        Raises:
            TeacherError: a teacher gives other spaces or shapes than it states.
        """
        found: dict[str, Tensor] = {}
        sent: dict[Geometry, Tensor] = {}  # teachers of one geometry share the copy
        for teacher in self.teachers:
            if only is not None and teacher.name not in only:
                continue
            prepared = teacher.preprocessing
            shape = geometry(prepared)
            pixels = batch.pixels[shape]
            if not len(pixels):
                for space in teacher.spaces:
                    found[f"{teacher.name}/{space.name}"] = torch.empty(0, space.tokens, space.dim)
                continue
            if shape not in sent:
                sent[shape] = pixels.to(self.fabric.device, non_blocking=True)
            inputs = normalise(sent[shape], prepared.mean, prepared.std, self.fabric.device)
            with self.fabric.autocast():
                spaces = teacher(inputs)
            refuse_other_shapes(teacher, spaces, len(pixels))
            for name, tokens in spaces.items():
                found[f"{teacher.name}/{name}"] = tokens.float()
        return found

    def fill(self, writer: StoreWriter) -> list[str]:
        """Extract this process's share of the pending shards; returns the damaged images' names.

        A shard is written and read back while the teachers run for the next one.
        The first process shows how far its own share is: shares are equal to a shard.
        """
        rank, world = self.fabric.global_rank, self.fabric.world_size
        # One list is shared out: who looked late would miss what the others have committed by then.
        pending = self.fabric.broadcast(writer.pending() if rank == 0 else [])[rank::world]
        rows, problems = writer.plan.rows, list[str]()
        # Batches never cross a shard and always start at its first row: a shard's bytes do not
        # depend on where an earlier run was stopped.
        lists = [
            batched(range(first, min(first + writer.plan.shard_rows, rows)), self.batch_size)
            for first in (shard * writer.plan.shard_rows for shard, _ in pending)
        ]
        total = sum(len(batch) for batches in lists for batch in batches)
        pixels = writer.plan.pixels if any(PIXELS in units for _, units in pending) else None
        stream = iter(self.batches((batch for batches in lists for batch in batches), pixels))
        line = ProgressLine("extract" if world == 1 else f"extract, 1 of {world}", total, "rows")
        with line if rank == 0 else contextlib.nullcontext(), CommitThread() as commits:
            for (shard, units), batches in zip(pending, lists, strict=True):
                out = writer.shard(shard, units)
                for _ in batches:
                    batch = next(stream)
                    shown = None
                    if pixels is not None and PIXELS in units:
                        views = batch.pixels[pixels.size, pixels.interpolation]
                        shown = views.permute(0, 2, 3, 1).numpy()
                    out.append(batch.rows, self.tokens(batch, units), shown)
                    problems += batch.problems
                    self.rows_extracted += len(batch.rows.keys)
                    if rank == 0:
                        line.advance(len(batch.rows.keys))
                commits.commit(out)
        return problems


def keep_summary(store: str | Path, what: str, summary: Mapping[str, Any]) -> None:
    """Write a summary beside a store; a warning where its folder cannot be written, since the store
    itself is whole."""
    try:
        write_beside(store, what, summary)
    except StoreError as error:
        print(f"warning: {error}; the store is whole all the same", file=sys.stderr)


def key_room(index: SampleIndex) -> int:
    """Bytes that hold every key: 128, or the multiple of 64 that the longest needs.

    Raises:
        DataError: a key cannot be stored.
    """
    for number, key in enumerate(index.keys):
        if not is_text(key) or "\0" in key or not key:
            raise DataError(f"the key of sample {index.where(number)} is not UTF-8: rename it")
    longest = max(len(key.encode()) for key in index.keys)
    return max(128, -(-longest // 64) * 64)


def load_teachers(options: DictConfig) -> list[Teacher]:
    """The teachers of a configuration `{name: {source, size, checkpoint, spaces, ...}}`, in order.

    Raises:
        ConfigError: no teacher is named. TeacherError: one cannot be loaded.
    """
    if not options:
        raise ConfigError("teachers is empty; name at least one, e.g. teachers=imagenet_hub")
    loaded = []
    for name, choice in ((str(key), options[key]) for key in options):
        given = plain(choice)
        if not isinstance(given, dict) or "source" not in given:
            raise ConfigError(f"teachers.{name} needs a source such as timm:NAME")
        if unknown := [str(key) for key in given if key not in OPTIONS]:
            raise ConfigError(
                f"teachers.{name} has no option {unknown[0]}{closest(unknown[0], OPTIONS)}"
            )
        given.pop("encoding", None)
        loaded.append(load_teacher(name, **given))
    return loaded


def teachers_precision(engine: DictConfig) -> str:
    """The precision that teachers run in: float32 weights, with or without autocast.

    Raises:
        ConfigError: one of other weights: nothing would convert them, and the store would say so.
    """
    found = str(precision(engine))
    if found not in TEACHERS_PRECISIONS:
        raise ConfigError(
            f"engine.precision={found}: teachers run in {', '.join(TEACHERS_PRECISIONS)} or auto"
        )
    return found


def teacher_record(teacher: Teacher, options: DictConfig, precision: str) -> TeacherRecord:
    """What the manifest keeps of a teacher: its spaces, their encoding, and its identity."""
    encoding = options.get("encoding") or "int8"
    return TeacherRecord(
        name=teacher.name,
        spaces=tuple(
            SpaceSpec(teacher.name, space.name, space.tokens, space.dim, space.grid, encoding)
            for space in teacher.spaces
        ),
        identity={**teacher.identity(), "precision": precision},
    )


def _sample_index(config: DictConfig, *, quiet: bool) -> SampleIndex:
    shards = plain(config.data)["shards"]
    if shards is None:
        raise ConfigError("data.shards=null: teachers need the images; say data.shards=...")
    index = list_samples(shards, quiet=quiet)
    if index.ignored and not quiet:
        print(
            f"warning: {len(index.ignored):,} files of {shards} are no images by their extension "
            f"and are left out, such as {index.ignored[0]!r}",
            file=sys.stderr,
        )
    if config.order == "permuted":
        return index.permuted(int(config.seed))
    if not quiet and class_sorted(index.labels):
        print(
            "warning: the labels show that these shards are sorted by class, so neighbouring rows "
            "of the store will be alike and shuffled reading will be poor; order=permuted mends it",
            file=sys.stderr,
        )
    return index


def _validate(config: DictConfig) -> None:
    for key, allowed in (("order", ("source", "permuted")), ("on_corrupt", ("stop", "skip"))):
        if config[key] not in allowed:
            raise ConfigError(f"{key}={config[key]}: valid are {', '.join(allowed)}")
    for key in ("shard_rows", "group_rows"):
        if config[key] < 1:
            raise ConfigError(f"{key}={config[key]}: expected a positive number")
    if config.shard_rows % config.group_rows:
        raise ConfigError(
            f"shard_rows={config.shard_rows} is not a multiple of group_rows={config.group_rows}"
        )


def _summary(
    config: DictConfig,
    started: float,
    runner: TeacherRunner,
    extracted: int,
    problems: Sequence[str],
) -> dict[str, Any]:
    cache = Cache.open(config.cache)
    seconds = time.monotonic() - started
    root = local_path(config.cache, "extracting")
    size = sum(file.stat().st_size for file in root.rglob("*") if file.is_file())
    invalid = np.flatnonzero(~np.asarray(cache.valid))
    return {
        "store": str(config.cache),
        "rows": len(cache),
        "rows_extracted": extracted,
        "rows_invalid": len(invalid),
        # Of the whole store, whichever run met them; what was wrong with them only this run's.
        "damaged_images": [
            runner.index.where(int(sample)) for sample in np.unique(invalid // runner.policy.count)
        ],
        "damage": list(problems),
        "bytes": size,
        "bytes_per_row": size / len(cache),
        "spaces": {name: list(space.shape) for name, space in cache.spaces.items()},
        "pixels": cache.pixels and cache.pixels.as_json(),
        "device": str(runner.fabric.device),
        "seconds": seconds,
        "rows_per_second": extracted / seconds,
        "peak_memory_mb": peak_memory_mb(),
    }
