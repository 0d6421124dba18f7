"""A store with other encodings, from the codes of one that is there; no images, no teachers."""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Collection, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import ConfigError, DataError, StoreError
from ..progress import ProgressLine
from .commit import (
    COMMITS,
    Commit,
    Completion,
    completion_name,
    discard,
    is_whole,
    read_commit,
    record_name,
)
from .constants import statistics_files
from .durable import (
    Staged,
    directory_lock,
    file_sizes,
    holds,
    read_whole,
    sync_directory,
    write_whole,
)
from .encodings import encoding
from .encodings.prediction import Prediction
from .layout import Layout
from .manifest import MANIFEST
from .opening import read_files
from .plan import SpaceSpec, StorePlan, TeacherRecord
from .reader import Cache
from .rows import RowBatch
from .shard_writer import PARTIAL
from .source import LocalSource, local_path
from .spare import write_twice
from .statistics import SAMPLE_ROWS, prediction_weights
from .verify_report import VerifyReport, fresh_report
from .writer import StoreWriter

_ROWS_AT_ONCE = 128


def convert(config: Any) -> dict[str, Any]:
    """`preceptor convert`: see configs/convert.yaml."""
    started = time.monotonic()
    spaces = config.spaces
    if spaces is not None:
        spaces = [spaces] if isinstance(spaces, str) else list(spaces)
        if not spaces:
            raise ConfigError("spaces=[] names none: name some, or leave it out for all")
    convert_store(config.cache, config.out, str(config.encoding), spaces, progress=True)
    size = {name: _bytes(name) for name in (str(config.cache), str(config.out))}
    before, after = size.values()
    share = f", {after / before:.3f} of {config.cache}" if before else ""  # of a remote store: none
    print(f"{config.out}: {after / 2**20:,.1f} MiB{share}; {time.monotonic() - started:.0f} s")
    return {"bytes": size, "seconds": time.monotonic() - started}


def convert_store(
    source: str | Path,
    out: str | Path,
    encoding_name: str,
    spaces: list[str] | None = None,
    *,
    progress: bool = False,
) -> None:
    """Write the rows of a store with another encoding of some spaces, or go on doing so.

    Teachers of which no space changes are copied file by file, and so are calibrations and
    statistics, which are those of the original features. Decoding and encoding again adds the
    errors of both; the teacher's identity tells that it was converted, and from what. Going on,
    what ``out`` has got beside is left as it is, and what the source has got since is left out.

    Args:
        encoding_name: of the chosen spaces.
        spaces: their ids; None: all.

    Raises:
        ConfigError: ``out`` is the source, or within it.
        StoreError: the source is not whole, a space or encoding is unknown, or ``out`` holds
            another store, or none of the chosen spaces.
    """
    encoding(encoding_name)
    root = local_path(out, "converting")
    cache = Cache.open(source)
    real = Path(os.path.realpath(root))  # unlike resolve, of links that lead in a circle too
    if isinstance(cache.source, LocalSource) and (
        Path(cache.location).resolve() in (real, *real.parents)
    ):
        raise ConfigError(
            f"out={out} is the store {source} itself or in it: name another directory"
        )
    chosen = [cache[name].id for name in (cache.spaces if spaces is None else spaces)]
    plan = _converted(cache.plan, chosen, encoding_name)
    report = fresh_report(root)  # of a verification that found damage
    kept = {name for name, space in plan.spaces.items() if space.encoding == cache[name].encoding}
    writer = _target(root, plan, kept)
    plan = writer.plan.only([unit for unit in writer.plan.units if unit in plan.units])
    if lacking := [name for name in chosen if name not in plan.spaces]:
        told = f"{root} was begun without {', '.join(lacking)}"
        if spaces is not None or not plan.spaces:
            raise StoreError(f"{told}: name another directory")
        print(f"warning: {told}, which is left out", file=sys.stderr)
    for unit, shard in _damaged(report) if report else ():
        if unit in plan.units:
            discard(root, writer.manifest, unit, shard)
    for target in plan.spaces.values():
        copy_calibration(cache, writer, target)
    same = {unit for unit in plan.units if _same_unit(cache.plan, plan, unit)}
    todo = writer.pending(plan.units)
    if progress:
        with ProgressLine("convert", sum(plan.rows_in(shard) for shard, _ in todo), "rows") as line:
            for shard, units in todo:
                _convert_shard(cache, writer, shard, units, same)
                line.advance(plan.rows_in(shard))
    else:
        for shard, units in todo:
            _convert_shard(cache, writer, shard, units, same)
    for unit in plan.units:
        _seal(cache, writer, unit, unit in same)
    writer.finish(plan.units)


def _target(root: Path, plan: StorePlan, kept: Collection[str]) -> StoreWriter:
    """The store to write; of one that is there what the plan names must be as planned."""
    if not (root / MANIFEST).exists():
        return StoreWriter.open_or_create(root, plan, kept)
    writer = StoreWriter.open(root)
    both = [unit for unit in writer.plan.units if unit in plan.units]
    writer.refuse_other(writer.plan.only(both), plan.only(both), kept)
    return writer


def _damaged(report: VerifyReport) -> set[tuple[str, int]]:
    """The shards that are to be converted again. Moments of shards, which verify misses until their
    unit is finished, are what an extraction leaves: the original's statistics are copied here."""
    return {
        (problem.unit, problem.shard)
        for problem in report.problems
        if problem.unit is not None
        and problem.shard is not None
        and not problem.file.startswith(f"{PARTIAL}/")
    }


def _converted(plan: StorePlan, chosen: list[str], encoding_name: str) -> StorePlan:
    teachers = []
    for teacher in plan.teachers:
        spaces, history = [], dict(teacher.identity.get("converted", {}))
        for space in teacher.spaces:
            changed = replace(space, encoding=encoding_name, plain=False)
            if space.id in chosen and space != changed:
                history[space.name] = [*history.get(space.name, []), space.encoding]
                space = changed
            spaces.append(space)
        identity = {**teacher.identity, **({"converted": history} if history else {})}
        teachers.append(TeacherRecord(teacher.name, tuple(spaces), identity))
    return replace(plan, teachers=tuple(teachers))


def copy_calibration(cache: Cache, writer: StoreWriter, target: SpaceSpec) -> None:
    """Freeze the calibration that a space has in another store, unless that was done.

    Where the space is predicted here and not there, the prediction is fitted to the statistics of
    all of that store's rows, and to some of them.

    Raises:
        StoreError: the space has another calibration already.
    """
    space = cache[target.id]
    mean, std = space.mean.numpy(), space.std.numpy()
    weights = None
    if target.id in writer.manifest.calibrations:  # never fitted twice
        weights = writer.calibration(target.id).get("weights")
    elif target.predicted and space.spec.predicted:
        weights = None if space.prediction is None else space.prediction.weights.numpy()
    elif target.predicted:
        valid = np.flatnonzero(cache.valid)
        rows = valid[:: max(1, len(valid) // SAMPLE_ROWS)][:SAMPLE_ROWS]
        tokens = space.decode(space.read(rows))
        weights = prediction_weights(target, space.statistics(), mean, std, tokens)
    used = cache.manifest.calibrations[target.id].rows
    writer.calibrate(target.id, mean, std, rows_used=used, weights=weights)


def _same_unit(before: StorePlan, after: StorePlan, unit: str) -> bool:
    if not before.spaces_of(unit):
        return True
    return before.teacher(unit).as_json() == after.teacher(unit).as_json()


def _convert_shard(
    cache: Cache, writer: StoreWriter, shard: int, units: tuple[str, ...], same: set[str]
) -> None:
    for unit in units:
        if unit in same:
            _copy_shard(cache, writer, unit, shard)
    changed = tuple(unit for unit in units if unit not in same)
    if not changed:
        return
    targets = [space for unit in changed for space in writer.plan.teacher(unit).spaces]
    weights = {space.id: writer.calibration(space.id).get("weights") for space in targets}
    with writer.shard(shard, changed) as out:
        for rows, facts in _facts(cache, shard):
            out.append_encoded(
                facts, {s.id: _parts(cache, s, weights[s.id], rows) for s in targets}
            )


def _parts(
    cache: Cache, target: SpaceSpec, weights: np.ndarray | None, rows: np.ndarray
) -> dict[str, np.ndarray]:
    """The components of valid rows in the target's encoding."""
    tokens = cache[target.id].read(rows)
    if tokens.encoding == target.encoding:
        parts = tokens.restored().parts
    else:
        z, how = tokens.standardised(), target.how
        if bad := how.refused(z):
            raise DataError(
                f"token {bad[1]} of {target.id} in row {int(rows[bad[0]])} is too large for the "
                f"encoding {how.name}: choose another one"
            )
        parts = how.encode(z)
    found: dict[str, np.ndarray] = {name: part.numpy() for name, part in parts.items()}
    if weights is not None:
        found["codes"] = Prediction(weights, target.grid).residuals(found["codes"])
    return found


def _facts(cache: Cache, shard: int) -> Iterator[tuple[np.ndarray, RowBatch]]:
    """(valid row numbers, facts of all rows) of a shard, some rows at a time."""
    first = shard * cache.plan.shard_rows
    last = first + cache.plan.rows_in(shard)
    for start in range(first, last, _ROWS_AT_ONCE):
        part = slice(start, min(start + _ROWS_AT_ONCE, last))
        facts = RowBatch(
            keys=cache.keys[part],
            labels=cache.labels[part],
            sizes=cache.sizes[part],
            boxes=cache.boxes[part],
            flips=cache.flips[part],
            valid=cache.valid[part],
        )
        yield part.start + np.flatnonzero(facts.valid), facts


def _copy_shard(cache: Cache, writer: StoreWriter, unit: str, shard: int) -> None:
    """Copy one shard of a unit that stays as it is, checked by the hashes of its record, unless
    another process has done it meanwhile."""
    root, commit = writer.path, cache.chunks.commit(unit, shard)
    staged = []
    try:
        for path, spec in cache.layout.unit_arrays(unit).items():
            name = spec.file(shard)
            staged.append(Staged(root / name, [cache.source.read(name)]))
            if staged[-1].sha256 != commit.files[path].sha256:
                raise StoreError(
                    f"{cache.location} is damaged in shard {shard} of {unit}: {name} does not "
                    "match its SHA-256; run `preceptor verify` and `preceptor repair`"
                )
            staged[-1].verify()
        directory = root / COMMITS / unit
        with directory_lock(directory):
            if is_whole(root, writer.manifest, Layout(writer.plan), unit, shard):
                return
            (root / record_name(unit, shard)).unlink(missing_ok=True)
            for file in staged:
                file.publish()
                sync_directory(file.final.parent)
            write_whole(root / record_name(unit, shard), commit.to_bytes())
    finally:
        for file in staged:
            file.discard()


def _seal(cache: Cache, writer: StoreWriter, unit: str, same: bool) -> None:
    """The completion and, for a teacher, the statistics of the original features."""
    root, before = writer.path, cache.completions[unit]
    for space in writer.plan.spaces_of(unit):
        cache[space.id].statistics()  # a damaged one is not passed on
        names = statistics_files(cache.layout, cache[space.id].spec)
        for name, content in read_files(cache.source, names).items():
            _write_if_other(root, name, content)
    if same:
        _write_if_other(root, completion_name(unit), before.to_bytes())
        return
    commits: list[Commit] = []
    hashes: list[str] = []
    layout = Layout(writer.plan)
    for shard in range(writer.plan.shards):
        raw = read_whole(root / record_name(unit, shard))
        commits.append(read_commit(root, writer.manifest, layout, unit, shard))
        hashes.append(hashlib.sha256(raw).hexdigest())
    done = Completion(
        unit,
        writer.manifest.configuration(unit),
        tuple(hashes),
        {path: [c.files[path].bytes for c in commits] for path in layout.unit_arrays(unit)},
        before.tokens,
        before.statistics,
        before.exact,
    )
    _write_if_other(root, completion_name(unit), done.to_bytes())


def _write_if_other(root: Path, name: str, raw: bytes) -> None:
    if not holds(root / name, raw):
        write_twice(root, name, raw)


def _bytes(location: str) -> int:
    """Of a local store; 0 of another."""
    try:
        root = local_path(location, "measuring it")
    except StoreError:
        return 0
    return sum(file_sizes(root).values())
