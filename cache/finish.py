"""Sealing a unit whose shards are all committed: its completion and its merged statistics."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import numpy as np

from ..errors import StoreError
from .commit import Commit, Completion, completion_name, record_name
from .constants import constant_bytes, statistics_sha256
from .layout import Layout
from .manifest import Manifest
from .plan import SpaceSpec
from .shard_writer import partial_name
from .spare import write_twice
from .statistics import Moments


def finish_unit(root: Path, manifest: Manifest, unit: str) -> None:
    """Write the completion of a unit, unless the one that is there holds already.

    Raises:
        StoreError: a record or a shard's statistics are missing or damaged.
    """
    layout = Layout(manifest.plan)
    names = [record_name(unit, shard) for shard in range(manifest.plan.shards)]
    raws = [(root / name).read_bytes() for name in names]
    records = tuple(hashlib.sha256(raw).hexdigest() for raw in raws)
    before = _completion(root, manifest, unit)
    if before is not None and before.records == records:
        return
    commits = [Commit.from_bytes(raw, name) for name, raw in zip(names, raws, strict=True)]
    sizes = {
        path: [commit.files[path].bytes for commit in commits] for path in layout.unit_arrays(unit)
    }
    done = Completion(unit, manifest.configuration(unit), records, sizes)
    for space in manifest.plan.spaces_of(unit):
        merged = _merged(root, space, commits)
        if merged is not None:
            values = {"mean": merged.mean, "covariance": merged.covariance}
            for name, spec in layout.statistics_arrays(space).items():
                write_twice(root, spec.file(0), constant_bytes(spec, values[name]))
            tokens, seal = merged.count, statistics_sha256(**values)
        elif before is not None:
            # A repair: the moments of the other shards were merged and dropped long ago.
            tokens, seal = before.tokens[space.name], before.statistics[space.name]
            done = replace(done, exact=False)
        else:
            raise StoreError(
                f"statistics of shards of {space.id} are missing in {root}: run `preceptor repair`"
            )
        done = replace(
            done,
            tokens={**done.tokens, space.name: tokens},
            statistics={**done.statistics, space.name: seal},
        )
    write_twice(root, completion_name(unit), done.to_bytes())


def _completion(root: Path, manifest: Manifest, unit: str) -> Completion | None:
    """The completion that is there, if it is of this configuration and undamaged."""
    try:
        raw = (root / completion_name(unit)).read_bytes()
        found = Completion.from_bytes(raw, completion_name(unit))
    except (FileNotFoundError, StoreError):
        return None
    return found if found.configuration == manifest.configuration(unit) else None


def _merged(root: Path, space: SpaceSpec, commits: list[Commit]) -> Moments | None:
    """The moments of all shards merged in order; None when some are no longer there."""
    merged = Moments.empty(space.dim)
    for commit in commits:
        try:
            raw = (root / partial_name(space, commit.shard)).read_bytes()
        except FileNotFoundError:
            return None
        if hashlib.sha256(raw).hexdigest() != commit.statistics.get(space.name):
            raise StoreError(
                f"the statistics of shard {commit.shard} of {space.id} in {root} are damaged: "
                "run `preceptor repair`"
            )
        merged = merged.merged(Moments.unpacked(np.frombuffer(raw, "<f8"), space.dim))
    return merged
