"""Stage 1: images -> views -> teachers -> encoded shards of the store.

Each process of a distributed launch takes the next pending shard whenever it is free; shards are
independent, so there is nothing else to synchronise but the calibration before and the statistics
after.
"""

from __future__ import annotations

import json
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
from lightning_fabric import Fabric
from omegaconf import DictConfig

from ..cache import (
    Cache,
    SampleIndex,
    SpaceSpec,
    StorePlan,
    StoreWriter,
    TeacherRecord,
    ViewPolicy,
    class_sorted,
)
from ..cache.durable import file_sizes
from ..cache.encodings import encoding as find_encoding
from ..cache.manifest import MANIFEST
from ..cache.rows import is_text
from ..cache.samples import list_samples
from ..cache.source import local_path
from ..cache.verify_report import write_beside
from ..engine import gathered, launch, precision
from ..errors import ConfigError, DataError, StoreError, closest, counted
from ..measure import peak_memory_mb
from ..options import plain
from .calibration import calibrate, check_calibration
from .images import stored_pixels
from .runner import TeacherRunner
from .teachers import OPTIONS, Teacher, load_teacher
from .teachers.base import named
from .turns import await_calibration, one_first

TEACHERS_PRECISIONS = ("32-true", "bf16-mixed", "16-mixed")
PATIENCE = timedelta(days=7)
"""How long processes wait for each other: a calibration, or a slow one's last shard, takes long."""


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
    with one_first(fabric, "lists the images"):
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
        if not (local_path(config.cache, "writing") / MANIFEST).exists():
            check_calibration(config.calibration, plan.teachers, list(plan.spaces.values()))
        calibrate(StoreWriter.open_or_create(config.cache, plan), runner, config)
    await_calibration(fabric)
    check_same_folder(fabric, config.cache)
    writer = StoreWriter.open_or_create(config.cache, plan)
    done = gathered(fabric, (runner.fill(writer), runner.rows_extracted))
    summary: dict[str, Any] = {}
    if fabric.global_rank == 0:
        writer.finish()
        problems = [problem for share, _ in done for problem in share]
        extracted = sum(rows for _, rows in done)
        summary = _summary(config, started, runner, extracted, problems)
        kept = keep_summary(config.cache, "extract", summary)
        invalid = summary["rows_invalid"]
        lacking = f"; {counted(invalid, 'row')} without tokens" if invalid else ""
        named = f", named in {kept}" if invalid and kept else ""
        print(
            f"{config.cache}: {summary['rows']:,} rows, {summary['bytes'] / 2**20:,.1f} MiB, "
            f"{summary['bytes_per_row']:,.0f} bytes a row; "
            f"{summary['rows_extracted']:,} rows extracted now in {summary['seconds']:.0f} s"
            f"{lacking}{named}"
        )
        if invalid == summary["rows"]:
            first = f", the first for this: {problems[0]}" if problems else ""
            raise DataError(
                f"{config.cache}: none of its {summary['rows']:,} rows has tokens{first}"
            )
    return summary


def check_same_folder(fabric: Fabric, path: str) -> None:
    """Refuse a store that is not one folder for all processes: each machine would fill its own.

    A collective.

    Raises:
        ConfigError: on every process, with those that do not see what the first one writes.
        StoreError: nothing can be written there.
    """
    if fabric.world_size == 1:
        return
    token = fabric.broadcast(f".seen-{uuid.uuid4().hex}")
    mark = local_path(path, "writing") / token
    if fabric.global_rank == 0:
        try:
            mark.touch()
        except OSError as error:
            raise StoreError(f"{mark} cannot be written: {error.strerror}") from error
    fabric.barrier()
    blind = [rank for rank, sees in enumerate(gathered(fabric, mark.exists())) if not sees]
    if fabric.global_rank == 0:
        mark.unlink()
    if blind:
        raise ConfigError(
            f"cache={path} is another folder for process {', '.join(map(str, blind))} than for "
            "process 0: on several machines it must be one that they share"
        )


def keep_summary(store: str | Path, what: str, summary: Mapping[str, Any]) -> Path | None:
    """Write a summary beside a store; where it is. A warning and None where its folder cannot be
    written, since the store itself is whole."""
    try:
        return write_beside(store, what, summary)
    except StoreError as error:
        print(f"warning: {error}; the store is whole all the same", file=sys.stderr)
        return None


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
    """What the manifest keeps of a teacher: its spaces, their encoding, and its identity.

    Raises:
        TeacherError: there is no such encoding, or a teacher of the user's own has no identity that
            is JSON.
    """
    encoding = str(options.get("encoding") or "int8")
    with named(teacher.name, "encoding"):
        find_encoding(encoding)
    with named(teacher.name, doing="its identity()" if teacher.own_code else None):
        identity = dict(teacher.identity())
        json.dumps(identity, allow_nan=False)
    return TeacherRecord(
        name=teacher.name,
        spaces=tuple(
            SpaceSpec(teacher.name, space.name, space.tokens, space.dim, space.grid, encoding)
            for space in teacher.spaces
        ),
        identity={**identity, "precision": precision},
    )


def _sample_index(config: DictConfig, *, quiet: bool) -> SampleIndex:
    shards = plain(config.data)["shards"]
    if shards is None:
        raise ConfigError("data.shards=null: teachers need the images; say data.shards=...")
    index = list_samples(shards, quiet=quiet)
    if index.ignored and not quiet:
        count = len(index.ignored)
        of_them = f"{count:,} files of {shards} are no images by their extension and are left out"
        if count == 1:
            of_them = f"one file of {shards} is no image by its extension and is left out"
        print(
            f"warning: {of_them}{', such as' if count > 1 else ':'} {index.ignored[0]!r}",
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
    size = sum(file_sizes(local_path(config.cache, "extracting")).values())
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
